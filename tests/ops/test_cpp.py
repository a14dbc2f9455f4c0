"""The C++ operators themselves: the transform's corners, threads, instruction sets, refusals, what falls back."""

import functools
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def corner_words() -> Tensor:
    powers = [2**k + d for k in range(25) for d in (-2, -1, 0, 1)]
    # Beside the ends of the range: each eighth of a turn, where the folding of the angle changes, and sqrt(1/2), 1/2.
    eighths = [2**21 * k + d for k in range(9) for d in (-2, -1, 0, 1)]
    roots = [int(2**24 * f) + d for f in (0.5**0.5, 0.5**1.5) for d in (-2, -1, 0, 1)]
    corners = sorted({w for w in powers + eighths + roots if 0 <= w < 2**24} | {2**24 - 1, 2**24 - 2})
    return torch.cartesian_prod(*(torch.tensor(corners, dtype=torch.int32),) * 2)


INSTRUCTION_SETS = [name for name, has in _cpp.status()["cpu_features"].items() if has]


def run_with(instruction_set: str, code: str, *arguments: Path) -> None:
    """Run Python code where the row kernels are those of one instruction set: the choice is made once a process."""
    environment = os.environ | {"SEDA_FAST_CPU_ISA": instruction_set}
    subprocess.run([sys.executable, "-c", code, *map(str, arguments)], env=environment, check=True)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_box_muller_at_the_corners_of_both_words(name: str, tmp_path: Path) -> None:
    words = corner_words()
    torch.save(words, tmp_path / "words.pt")
    code = "import sys, torch, seda_fast.ops\n"
    code += "torch.save(torch.ops.seda_fast_cpp.box_muller(torch.load(sys.argv[1])), sys.argv[2])"
    run_with(name, code, tmp_path / "words.pt", tmp_path / "normals.pt")
    assert (torch.load(tmp_path / "normals.pt").double() - exact_normals(words)).abs().max() <= 2e-6


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
    weights = updated_weights([grad, other[0]], [h, gate[0]])
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
        *weights,
    ]


def updated_weights(weights: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """One step of the optimiser on copies, and the norm that it clips by."""
    state = [[t.clone() for t in weights], grads, *([t.abs() for t in weights] for _ in range(3))]
    norm = cpp.gradient_norm(grads)
    steps = [torch.tensor(2.0) for _ in weights]
    cpp.weight_update(*state, steps, norm, 1.0, 1e-2, 0.9, 0.99, 1e-8, 0.05, 0.1)
    return [norm, *(t for part in state for t in part)]


def projection_results(threads: int, dtype: torch.dtype) -> list[Tensor]:
    """The projection's own parts, on logits that are given: two blocks of classes, some rows without a label."""
    generator = torch.Generator().manual_seed(4)
    rows, dim, classes, first = 700, 40, 77, 45
    given = (torch.randn(rows, classes, generator=generator) * 3).to(dtype)
    features, centres = (torch.randn(n, dim, generator=generator).to(dtype) for n in (rows, classes))
    labels = torch.randint(0, classes, (rows,), generator=generator)
    labels[::7] = -100
    torch.set_num_threads(threads)
    state = torch.tensor([-torch.inf, 0.0, 0.0, 0.0]).repeat(rows, 1)
    blocks = [(0, given[:, :first].contiguous()), (first, given[:, first:].contiguous())]
    for start, logits in blocks:
        cpp.logits_block(logits.clone(), labels, start, classes, 0.7, -100, state)
    losses = cpp.projection_losses(state, features, labels, centres, classes, 0.1, -100)
    biases = [
        cpp.logits_block_backward(logits, labels, start, classes, 0.7, -100, losses[2], 0.3, 0.1)
        for start, logits in blocks
    ]
    return [state, *losses, *biases, *(logits for _, logits in blocks)]


def chain_results(threads: int, dtype: torch.dtype) -> list[Tensor]:
    """Reverse chains that no product of the vendor's has a part in: few rows, and where w_x @ w_y is made few too."""
    results = []
    torch.set_num_threads(threads)
    for rows, width, dim, noisy in ((1, 256, 200, True), (4, 256, 200, True), (3, 256, 40, False), (4, 4, 9000, False)):
        generator = torch.Generator().manual_seed(rows)

        def draw(*shape: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

        def linear(out: int, into: int, draw: Callable[..., Tensor] = draw) -> tuple[Tensor, Tensor]:
            return draw(out, into).to(dtype), draw(out)

        hidden, blocks, steps = 2 * width, 2, 3
        # Made once for all steps where that saves more than it costs: not for the wide network of the third chain.
        folded = not noisy and (steps - 1) * rows * (2 * dim - width) > 2 * dim * width
        assert folded == (dim == 9000)
        inner, outer = ([linear(*size) for _ in range(blocks)] for size in ((hidden, width), (width, hidden)))
        coefficients = torch.rand(steps, 5, generator=generator)
        coefficients[:, 3] *= noisy
        results.append(
            cpp.reverse_chain(
                *(draw(rows, dim).to(dtype) for _ in range(2)),
                draw(rows, 96).to(dtype),
                coefficients,
                draw(steps, blocks, 3, width),
                *linear(width, dim),
                *linear(width, 96),
                *linear(blocks * hidden, width),
                *([layer[part] for layer in layers] for layers in (inner, outer) for part in (0, 1)),
                *linear(dim, width),
                *(COUNTER, COUNTER, torch.arange(rows) + 2**35, 4, noisy),
            )
        )
    return results


# The interaction network's products are the vendor's: tests/ops/test_interaction_network.py takes weights that leave
# nothing to their order of summation.
@pytest.mark.parametrize(
    "results",
    [
        block_results,
        *(
            pytest.param(functools.partial(parts, dtype=dtype), id=f"{parts.__name__}-{dtype}")
            for parts in (projection_results, chain_results)
            for dtype in (torch.float32, torch.bfloat16)
        ),
    ],
)
def test_results_do_not_depend_on_the_number_of_threads(results: Callable[[int], list[Tensor]]) -> None:
    before = torch.get_num_threads()
    try:
        with use_backend("cpp"):
            alone, *others = [results(threads) for threads in (1, 2, 3, 5)]
    finally:
        torch.set_num_threads(before)
    for i, one in enumerate(alone):
        assert torch.isfinite(one).all(), i
        assert all(torch.equal(one, other[i]) for other in others), i


FINGERPRINT = """
import sys, torch
from seda_fast.ops import *
torch.manual_seed(5)
torch.set_num_threads(1)
x, table, square = torch.randn(9, 77), torch.rand(4, 77), torch.randn(77, 77) / 9
rows = torch.arange(9)
keys = {"seed": 3, "step": 1, "sample_ids": rows}
weights = ChainWeights(square, x[0], square.t(), x[1], torch.cat((square, -square)), table.flatten()[:154],
                       [square] * 2, [x[2]] * 2, [square.t()] * 2, [x[3]] * 2, square, x[4])
tables, coefficients = torch.rand(4, 2, 3, 77) / 4, torch.rand(4, 5) / 2
leaves = [t.clone().requires_grad_() for t in (x, x.flip(0))]
parts = {}
with use_backend("cpp"), torch.no_grad():
    parts["noising"] = [q_sample(x, rows % 4, table[:, 0], table[:, 1], **keys)]
    parts["block"] = [interaction_block(x, x + 1, rows % 4, table, table, table, torch.eye(77), x[0], torch.eye(77),
                                        x[1], dropout=0.25, **keys)]
    for count, noisy in ((9, True), (9, False), (3, True), (3, False)):
        few = {"seed": 3, "step": 1, "sample_ids": rows[:count], "stream": 4}
        chain = (x[:count], x[-count:], x[:count] / 2, coefficients * torch.tensor([1, 1, 1, noisy, 1]), tables)
        parts[f"chain {count} {noisy}"] = [reverse_chain(*chain, weights, noisy=noisy, **few)]
    with torch.enable_grad():
        centres, classes = torch.randn(2, 30, 77), torch.randn(30)
        losses = semantic_projection(leaves[0], rows, centres[0], centres[1], classes, label_smoothing=0.1)
        parts["projection"] = [*losses, *torch.autograd.grad(sum(losses), leaves[:1])]
        network = interaction_network(leaves[0], [leaves[1]], rows % 4, tables, weights, dropout=0.25, **keys)
        parts["network"] = [network, *torch.autograd.grad(network.square().sum(), leaves)]
    lists = [[x.clone()], [x + 1], [x / 2], [x.abs()], [x / 3], [torch.tensor(3.0)]]
    norm = gradient_norm(lists[1])
    numbers = {"clip_norm": 1.0, "learning_rate": 1e-2, "betas": (0.9, 0.99), "epsilon": 1e-8, "weight_decay": 0.05}
    weight_update(*lists, norm=norm, **numbers, moved=0.1)
    parts["weights"] = [norm, *(t[0] for t in lists)]
torch.save({name: torch.cat([t.detach().flatten() for t in part]) for name, part in parts.items()}, sys.argv[1])
"""


def test_instruction_sets_agree(tmp_path: Path) -> None:
    assert "baseline" in INSTRUCTION_SETS
    results = []
    for name in INSTRUCTION_SETS:
        run_with(name, FINGERPRINT, tmp_path / f"{name}.pt")
        results.append(torch.load(tmp_path / f"{name}.pt"))
    assert len(results[0]) == 9
    for result in results[1:]:
        for part, expected in results[0].items():
            # Chains and networks of several blocks carry a difference on.
            bound = (
                {"rtol": 2e-6, "atol": 4e-6}
                if part in ("noising", "block", "weights")
                else {"rtol": 1e-5, "atol": 2e-5}
            )
            torch.testing.assert_close(result[part], expected, **bound, msg=lambda said, part=part: f"{part}: {said}")


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


@pytest.mark.parametrize(
    ("switch", "value", "sentence"),
    [
        ("SEDA_FAST_CPU_ISA", "mmx", f"SEDA_FAST_CPU_ISA=mmx is none of this CPU's: {', '.join(INSTRUCTION_SETS)}"),
        ("SEDA_FAST_CPU_PRODUCTS", "OWN", "SEDA_FAST_CPU_PRODUCTS=OWN is neither own nor pytorch"),
    ],
)
def test_a_wrong_switch_is_one_warning_and_the_reference_serves(switch: str, value: str, sentence: str) -> None:
    code = "import sys, torch, seda_fast.info as info\nfrom seda_fast.ops import choose, q_sample\n"
    code += "rows = torch.arange(3)\n"
    code += "q_sample(torch.zeros(3, 4), rows, torch.ones(3), torch.ones(3), seed=1, step=2, sample_ids=rows)\n"
    code += "print(choose('q_sample', 'cpu')[0])\ninfo.main([])"
    command = [sys.executable, "-W", "always::RuntimeWarning", "-c", code]
    done = subprocess.run(command, env=os.environ | {switch: value}, capture_output=True, text=True, check=True)
    assert done.stderr.count(sentence) == 1
    assert "RuntimeWarning: seda_fast runs without its C++ operators; " in done.stderr
    assert done.stdout.startswith("reference\n")
    assert "".join(sentence.split()) in "".join(done.stdout.split())


@pytest.mark.parametrize("features", [{"baseline": True, "avx2": True, "avx512": False}, {"baseline": True}])
def test_an_instruction_set_that_this_cpu_lacks_is_a_wrong_switch(
    monkeypatch: pytest.MonkeyPatch, features: dict[str, bool]
) -> None:
    monkeypatch.delenv("SEDA_FAST_CPU_PRODUCTS", raising=False)
    for name in ("", *(name for name, has in features.items() if has)):
        monkeypatch.setenv("SEDA_FAST_CPU_ISA", name)
        assert _cpp.wrong_switch(features) is None
    monkeypatch.setenv("SEDA_FAST_CPU_ISA", "avx512")
    has = ", ".join(name for name in features if features[name])
    assert _cpp.wrong_switch(features) == f"SEDA_FAST_CPU_ISA=avx512 is none of this CPU's: {has}"
    monkeypatch.delenv("SEDA_FAST_CPU_ISA")
    for name in ("", "own", "pytorch"):
        monkeypatch.setenv("SEDA_FAST_CPU_PRODUCTS", name)
        assert _cpp.wrong_switch(features) is None


def whole(monkeypatch: pytest.MonkeyPatch, file: Path, data: bytes, written: int) -> str | None:
    """Why a file of such content, of which the build wrote so many bytes, is refused; None where it is loaded."""
    file.write_bytes(data)
    monkeypatch.setattr(_cpp, "report", lambda: {"bytes": {file.name: written}})
    try:
        _cpp.check_whole(file)
    except ImportError as error:
        return str(error)
    return None


def library_file() -> Path:
    return Path(str(_cpp._module.__file__)).parent / "libseda_fast_cpu.so"


@pytest.mark.parametrize("kind", ["as built", "stripped", "without sections", "of many sections", "big-endian"])
def test_a_library_cut_short_at_any_place_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    file, written = tmp_path / "libseda_fast_cpu.so", library_file().stat().st_size
    data = bytearray(library_file().read_bytes())
    if data[:4] != b"\x7fELF":
        pytest.skip(f"test_a_library_cut_short_at_any_place_is_refused[{kind}] is about ELF files")
    if kind == "stripped":
        if shutil.which("strip") is None:
            pytest.skip("test_a_library_cut_short_at_any_place_is_refused[stripped] needs strip")
        subprocess.run(["strip", "-o", str(file), str(library_file())], check=True)
        data = bytearray(file.read_bytes())
        assert len(data) != written
    elif kind == "without sections":
        sections, segments = struct.unpack_from("<Q", data, 40)[0], struct.unpack_from("<H", data, 56)[0]
        data[40:48], data[60:62] = bytes(8), bytes(2)
        ends = (sum(struct.unpack_from("<Q16xQ", data, 64 + 56 * i + 8)) for i in range(segments))
        del data[max(ends) :]
        assert len(data) <= sections
    elif kind == "of many sections":  # more than the header has room for: the first section tells how many
        sections, count = struct.unpack_from("<Q", data, 40)[0], struct.unpack_from("<H", data, 60)[0]
        struct.pack_into("<Q", data, sections + 32, count)
        data[60:62] = bytes(2)
    elif kind == "big-endian":
        data = bytearray(
            struct.pack(">4s5B7x2HI3QI6H", b"\x7fELF", 2, 2, 1, 0, 0, 3, 22, 1, 0, 64, 300, 0, 64, 56, 1, 64, 2, 1)
        )
        data += struct.pack(">2I6Q", 1, 5, 0, 0, 0, 250, 250, 4096) + bytes(300 + 128 - 120)
    assert whole(monkeypatch, file, bytes(data), written) is None
    assert whole(monkeypatch, file, bytes(data) + b"what a tool put behind", written) is None
    places = {0, 1, 3, 4, 5, 16, 40, 63, 64, 65, 100, 119, 120, 250, 299, *(len(data) * i // 97 for i in range(97))}
    for place in sorted({*places, len(data) - 1, len(data) - 64, len(data) - 65}):
        refused = whole(monkeypatch, file, bytes(data[:place]), written)
        assert refused is not None and f"{file} is damaged: it has {place} bytes" in refused, place


def test_a_library_of_another_kind_must_have_the_bytes_that_the_build_wrote(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "libseda_fast_cpu.so"
    data = b"\xcf\xfa\xed\xfe" + bytes(100)
    assert whole(monkeypatch, file, data, len(data)) is None
    for other in (data[:-1], data + b"\0", b""):
        refused = whole(monkeypatch, file, other, len(data))
        assert refused == f"{file} is damaged: it has {len(other)} bytes, the build wrote {len(data)}"
    monkeypatch.setattr(_cpp, "report", lambda: {"bytes": {}})
    with pytest.raises(ImportError, match="is not of the build"):
        _cpp.check_whole(library_file())


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


@pytest.mark.parametrize("gradient", [False, True])
def test_pytorch_s_default_dtype_changes_nothing(gradient: bool) -> None:
    features, weight = torch.randn(9, 12), torch.randn(5, 12)
    given = (features, torch.arange(9) % 5, torch.randn(5, 12), weight, torch.randn(5))

    def losses() -> tuple[Tensor, ...]:
        found = semantic_projection(given[0].clone().requires_grad_(gradient), *given[1:])
        return tuple(t.detach() for t in found)

    usual = losses()
    torch.set_default_dtype(torch.float64)
    try:
        other = losses()
    finally:
        torch.set_default_dtype(torch.float32)
    for one, two in zip(usual, other, strict=True):
        assert torch.equal(one, two)


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
