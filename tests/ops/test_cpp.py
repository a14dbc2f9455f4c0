"""The C++ operators themselves: the transform's corners, threads, instruction sets, refusals, what falls back."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from seda_fast import reference
from seda_fast.ops import _cpp, _dispatch, interaction_block, q_sample, semantic_projection, use_backend

if _cpp.unavailable("cpu") is not None:
    pytest.skip(f"tests/ops/test_cpp.py: {_cpp.unavailable('cpu')}", allow_module_level=True)

cpp = torch.ops.seda_fast_cpp
COUNTER = torch.tensor(7)


def exact_normals(words: Tensor) -> Tensor:
    u = (words.double() + 0.5) * 2.0**-24
    radius, angle = (-2 * u[:, 0].log()).sqrt(), 2 * torch.pi * u[:, 1]
    return torch.stack((radius * angle.cos(), radius * angle.sin()), dim=1)


def test_box_muller_at_the_corners_of_both_words() -> None:
    powers = [2**k + d for k in range(25) for d in (-2, -1, 0, 1)]
    # Beside the ends of the range: each eighth of a turn, where the folding of the angle changes, and sqrt(1/2), 1/2.
    eighths = [2**21 * k + d for k in range(9) for d in (-2, -1, 0, 1)]
    roots = [int(2**24 * f) + d for f in (0.5**0.5, 0.5**1.5) for d in (-2, -1, 0, 1)]
    corners = sorted({w for w in powers + eighths + roots if 0 <= w < 2**24} | {2**24 - 1, 2**24 - 2})
    words = torch.cartesian_prod(*(torch.tensor(corners, dtype=torch.int32),) * 2)
    assert (cpp.box_muller(words).double() - exact_normals(words)).abs().max() <= 2e-6


@pytest.mark.slow
def test_box_muller_for_every_word() -> None:
    every = torch.arange(2**24, dtype=torch.int32)
    for words in (torch.stack((every, every.flip(0)), 1), torch.stack((every, (every * 5 + 77) % 2**24), 1)):
        assert (cpp.box_muller(words).double() - exact_normals(words)).abs().max() <= 2e-6


def block_results(threads: int) -> list[Tensor]:
    """A block's element-wise parts forward and backward, with timesteps that span several chunks of rows."""
    generator = torch.Generator().manual_seed(3)
    rows, width, steps = 700, 40, 9
    h, gate, grad, other = (torch.randn(rows, width, generator=generator) for _ in range(4))
    shift, scale, alpha = (torch.randn(steps, width, generator=generator) for _ in range(3))
    timesteps = torch.randint(0, steps, (rows,), generator=generator)
    dropout = 0.3, COUNTER, COUNTER, torch.arange(rows), 6
    torch.set_num_threads(threads)
    d_hidden = other.clone()
    return [
        q_sample(h, timesteps, shift[:, 0], scale[:, 0], seed=1, step=2, sample_ids=torch.arange(rows)),
        cpp.modulated_norm(h, timesteps, shift, scale),
        *cpp.modulated_norm_backward(grad, other, h, timesteps, scale),
        cpp.gated_silu(h, gate, *dropout),
        *cpp.gated_silu_backward(d_hidden, h, gate, *dropout),
        d_hidden,
        cpp.gated_residual(h, other, timesteps, alpha),
        *cpp.gated_residual_backward(grad, other, timesteps, alpha),
        cpp.centre_backward(h, alpha, timesteps, 3, 0.5, True, grad),
        grad,
    ]


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    try:
        with use_backend("cpp"):
            alone, together = block_results(1), block_results(4)
    finally:
        torch.set_num_threads(before)
    for i, (one, four) in enumerate(zip(alone, together, strict=True)):
        assert torch.equal(one, four), i


INSTRUCTION_SETS = [name for name, has in _cpp.status()["cpu_features"].items() if has]
FINGERPRINT = """
import sys, torch
from seda_fast.ops import q_sample, use_backend, interaction_block
torch.manual_seed(5)
x, table = torch.randn(9, 77), torch.rand(4, 77)
rows = torch.arange(9)
with use_backend("cpp"):
    noised = q_sample(x, rows % 4, table[:, 0], table[:, 1], seed=3, step=1, sample_ids=rows)
    block = interaction_block(x, x + 1, rows % 4, table, table, table, torch.eye(77), x[0], torch.eye(77), x[1],
                              dropout=0.25, seed=1, step=1, sample_ids=rows)
print(",".join(f"{v:.9g}" for v in torch.stack((noised, block)).flatten().tolist()))
"""


def test_instruction_sets_agree() -> None:
    results = []
    for name in INSTRUCTION_SETS:
        environment = os.environ | {"SEDA_FAST_CPU_ISA": name}
        done = subprocess.run(
            [sys.executable, "-c", FINGERPRINT], env=environment, capture_output=True, text=True, check=True
        )
        results.append(np.array(done.stdout.split(","), dtype=np.float64))
    assert "baseline" in INSTRUCTION_SETS
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], rtol=2e-6, atol=4e-6)


def test_an_unknown_instruction_set_is_refused_by_name() -> None:
    code = "import torch, seda_fast.ops; torch.ops.seda_fast_cpp.gated_silu("
    code += "*[torch.ones(1, 1)] * 2, 0.0, *[torch.tensor(1)] * 2, torch.arange(1), 0)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"SEDA_FAST_CPU_ISA": "mmx"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "SEDA_FAST_CPU_ISA=mmx is not one of baseline, avx2 and avx512" in done.stderr


def noising(**change: Any) -> Tensor:
    given: dict[str, Any] = {
        "x0": torch.zeros(4, 6),
        "timesteps": torch.arange(4),
        "signal": torch.ones(5),
        "noise": torch.ones(5),
        "seed": COUNTER,
        "step": COUNTER,
        "sample_ids": torch.arange(4),
        "stream": 0,
    }
    result: Tensor = cpp.q_sample(*(given | change).values())
    return result


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"x0": torch.zeros(4)}, r"x0 must have shape \(any, any\), not \(4,\)"),
        ({"x0": torch.zeros(4, 6, dtype=torch.float64)}, "x0 must be float32 or bfloat16, not Double"),
        ({"x0": torch.zeros(6, 4).T}, "x0 must have contiguous rows"),
        ({"x0": torch.frombuffer(bytearray(97), dtype=torch.uint8)[1:].view(4, 24)}, "x0 must be float32 or bfloat16"),
        (
            {"x0": torch.frombuffer(bytearray(97), dtype=torch.float32, offset=1, count=24).view(4, 6)},
            "x0 does not start",
        ),
        ({"timesteps": torch.tensor([0, 1, 5, 2])}, r"timesteps\[2\] is 5, outside 0 \.\. 4"),
        ({"timesteps": torch.tensor([0, -1, 0, 2])}, r"timesteps\[1\] is -1, outside 0 \.\. 4"),
        ({"timesteps": torch.zeros(4)}, "timesteps must be int32 or int64, not Float"),
        ({"signal": torch.ones(5).double()}, "signal must be Float, not Double"),
        ({"noise": torch.ones(10)[::2]}, "noise must be contiguous"),
        ({"noise": torch.ones(4)}, r"noise must have shape \(5\), not \(4,\)"),
        ({"seed": torch.tensor([1])}, r"seed must have shape \(\), not \(1,\)"),
        ({"step": torch.tensor(1.0)}, "step must be Long, not Float"),
        ({"sample_ids": torch.arange(5)}, r"sample_ids must have shape \(4\), not \(5,\)"),
        ({"stream": 300}, r"stream must be in 0 \.\. 255, not 300"),
    ],
)
def test_operators_refuse_bad_arguments_by_name(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RuntimeError, match=sentence):
        noising(**change)


@pytest.mark.parametrize("name", ["x0", "signal", "seed"])
def test_operators_take_no_tensor_of_another_device(name: str) -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        noising(**{name: torch.zeros((), device="meta")})


def test_status_says_what_was_built() -> None:
    status = _cpp.status()
    assert status["available"]
    assert status["reason"] is None
    assert set(status["build"]["instruction_sets"]) <= set(status["cpu_features"])
    for key in ("compiler", "flags", "architectures", "torch_headers", "torch_abi"):
        assert status["build"][key], key


def test_float64_and_mixed_dtypes_go_to_the_reference() -> None:
    assert _dispatch.choose("q_sample", "cpu", torch.float64)[0] == "reference"
    assert _dispatch.choose("q_sample", "cpu", torch.float32)[0] == "cpp"
    features, labels = torch.randn(3, 4), torch.arange(3)
    mixed: Callable[[], object] = lambda: semantic_projection(  # noqa: E731
        features, labels, torch.randn(3, 4).double(), torch.randn(3, 4), torch.zeros(3)
    )
    with use_backend("cpp"):
        got = mixed()
    assert isinstance(got, tuple)
    with use_backend("cpp"), pytest.raises(RuntimeError, match=r"backend 'cpp' .* not in torch\.float64"):
        semantic_projection(features.double(), labels, None, torch.randn(3, 4).double(), torch.zeros(3).double())


def test_a_table_of_another_float_type_is_promoted_as_in_the_reference() -> None:
    rows = torch.arange(3)
    h, table = torch.randn(3, 8), torch.randn(3, 8, dtype=torch.float64)
    weights = (torch.randn(8, 8), torch.zeros(8)) * 2
    results = []
    for backend in ("cpp", "reference"):
        with use_backend(backend):
            try:
                results.append(str(interaction_block(h, h, rows, table, table, table, *weights)))
            except RuntimeError as error:
                results.append(str(error))
    assert results[0] == results[1]


def test_dropout_draws_the_contract_s_words() -> None:
    ones, ids = torch.ones(5, 37), torch.arange(5) + 2**33
    hidden = cpp.gated_silu(ones, ones, 0.4, COUNTER, COUNTER, ids, 9)
    keep = reference.dropout_keep(COUNTER, COUNTER, ids, 37, 9, 0.4)
    assert torch.equal(hidden != 0, keep)
    expected = torch.nn.functional.silu(torch.ones(())) / 0.6
    torch.testing.assert_close(hidden[keep], expected.expand(int(keep.sum())))
