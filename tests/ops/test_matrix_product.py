"""Products of float32 matrices on the CPU: the extension's own tiles, and the rule by which they are taken."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from seda_fast.ops import _cpp, cpp_status

if not cpp_status()["available"]:
    pytest.skip("the C++ half is not built", allow_module_level=True)

INSTRUCTION_SETS = [name for name, has in cpp_status()["cpu_features"].items() if has]
# Of tiles of 12 or 6 rows and 8 to 32 columns: parts of one, exactly one, blocks of ten panels of rows and some more,
# groups of eight panels of columns and some more; sums in one part of 512, in two, and in three, a part in one chain of
# 128, in just two, and in several.
SHAPES = [
    (1, 1, 1),
    (5, 3, 7),
    (12, 512, 32),
    (6, 20, 16),
    (121, 65, 33),
    (7, 128, 9),
    (13, 129, 33),
    (6, 256, 40),
    (133, 513, 300),
    (64, 1030, 40),
    (3, 700, 530),
]


def own(
    left: Tensor, right: Tensor, bias: Tensor | None = None, out: Tensor | None = None, adds: bool = False
) -> Tensor:
    out = torch.full((left.shape[0], right.shape[1]), torch.nan) if out is None else out
    torch.ops.seda_fast_cpp.matrix_product(left, right, bias, adds, True, out)
    return out


def draw(rows: int, columns: int, layout: str = "rows") -> Tensor:
    if layout == "columns":
        return torch.randn(columns, rows).t()
    return torch.randn(rows, columns + 3)[:, 1 : columns + 1] if layout == "part" else torch.randn(rows, columns)


def close(found: Tensor, left: Tensor, right: Tensor, more: Tensor | float = 0.0) -> None:
    """Within what float32 leaves of a sum of that many terms."""
    exact = left.double() @ right.double() + more
    bound = 1e-6 * (left.double().abs() @ right.double().abs()) + 1e-6
    assert ((found.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("of_left", ["rows", "columns", "part"])
@pytest.mark.parametrize("of_right", ["rows", "columns", "part"])
def test_products_are_those_of_float64(shape: tuple[int, int, int], of_left: str, of_right: str) -> None:
    torch.manual_seed(0)
    rows, depth, columns = shape
    left, right = draw(rows, depth, of_left), draw(depth, columns, of_right)
    bias, before = torch.randn(columns), torch.randn(rows, columns)
    close(own(left, right), left, right)
    close(own(left, right, bias), left, right, bias)
    close(own(left, right, out=before.clone(), adds=True), left, right, before)
    close(own(left, right, bias, before.clone(), adds=True), left, right, before + bias)


@pytest.mark.parametrize("depth", [256, 512, 1000, 1024, 4096])
def test_roundings_do_not_grow_with_the_length_of_a_sum(depth: int) -> None:
    """Sums in one chain of 512 err by 6.8 halves of eps in the root mean square, and by 4.7 at 256 already."""
    torch.manual_seed(0)
    left, right = torch.randn(96, depth), torch.randn(depth, 96)
    exact = left.double() @ right.double()
    error = (own(left, right).double() - exact).norm() / exact.norm()
    assert error <= 4.2 * torch.finfo(torch.float32).eps / 2


def test_only_the_product_s_own_place_is_written() -> None:
    whole = torch.zeros(40, 50)
    own(torch.ones(37, 20), torch.ones(20, 45), out=whole[1:38, 2:47])
    expected = torch.zeros(40, 50)
    expected[1:38, 2:47] = 20
    assert torch.equal(whole, expected)


def test_what_is_not_finite_stays_in_its_row_and_column() -> None:
    left, right = torch.ones(13, 30), torch.ones(30, 35)
    left[12, 3], right[5, 34] = torch.nan, torch.inf
    expected = torch.full((13, 35), 30.0)
    expected[:, 34], expected[12] = torch.inf, torch.nan
    torch.testing.assert_close(own(left, right), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(300, 600, 200), (20, 600, 900)], ids=str)
def test_any_number_of_threads_gives_the_same_bits(shape: tuple[int, int, int]) -> None:
    """With few rows threads share the columns as well."""
    rows, depth, columns = shape
    left, right, before = draw(rows, depth), draw(depth, columns, "columns"), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3, 5, 16):
            torch.set_num_threads(threads)
            found.append(own(left, right))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


def run_with(code: str, folder: Path, **variables: str) -> Tensor:
    """What the code leaves in ``found``: instruction set and rule are chosen once a process."""
    code = f"import torch, seda_fast.ops\ntorch.manual_seed(3)\n{code}\ntorch.save(found, {str(folder / 'found.pt')!r})"
    subprocess.run([sys.executable, "-c", code], env=os.environ | variables, check=True)
    return torch.load(folder / "found.pt")


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_every_instruction_set_has_them(name: str, tmp_path: Path) -> None:
    code = "left, right, out = torch.randn(50, 600), torch.randn(600, 70), torch.empty(50, 70)\n"
    code += "torch.ops.seda_fast_cpp.matrix_product(left, right, None, False, True, out)\nfound = left, right, out"
    left, right, out = run_with(code, tmp_path, SEDA_FAST_CPU_ISA=name)
    close(out, left, right)


NETWORK = """
from seda_fast.ops import *
rows, d, m = 130, 40, 80
x, more, source = torch.randn(rows, 24), torch.randn(rows, 30), torch.randn(rows, 24)
def linear(out, into):
    return torch.randn(out, into) / into**0.5, torch.randn(out)
inner, outer = [linear(m, d) for _ in range(2)], [linear(d, m) for _ in range(2)]
weights = ChainWeights(*linear(d, 24), *linear(d, 60), *linear(2 * m, d), [w for w, _ in inner], [b for _, b in inner],
                       [w for w, _ in outer], [b for _, b in outer], *linear(24, d))
tables, tau = torch.randn(9, 2, 3, d) / 4, torch.randint(0, 9, (rows,))
keys = {"seed": 3, "step": 1, "sample_ids": torch.arange(rows)}
leaves = [t.requires_grad_() for t in (x, more, tables, weights.w_x, weights.w_g, *weights.w_h, *weights.w_o)]
y = interaction_network(x, [more, more.flip(0)], tau, tables, weights, dropout=0.1, **keys)
found = [y, *torch.autograd.grad(y.square().sum(), leaves)]
centres, classes = torch.randn(7, 24), torch.randn(7, 24).requires_grad_()
losses = semantic_projection(x, tau % 7, centres, classes, torch.randn(7))
found += [*losses, *torch.autograd.grad(sum(losses), (x, classes))]
with torch.no_grad():
    chain = source, torch.cat((more, more), 1), torch.rand(9, 5) / 2, tables
    found += [reverse_chain(x, *chain, weights, noisy=noisy, stream=4, **keys) for noisy in (True, False)]
    h, z = torch.randn(rows, d), torch.zeros(9, d)
    found += [interaction_block(h, torch.randn(rows, m), tau, z, z, z, *inner[0], *outer[0])]
found = [t.detach() for t in found]
"""


def test_operations_are_the_same_by_either_product(tmp_path: Path) -> None:
    ours, theirs = (run_with(NETWORK, tmp_path, SEDA_FAST_CPU_PRODUCTS=name) for name in ("own", "pytorch"))
    assert len(ours) == len(theirs) == 17
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-5 * float(other.abs().max()))


def test_the_rule_is_shown_and_can_be_decided_otherwise() -> None:
    told = "import seda_fast.ops as o; print(o.cpp_status()['products'])"

    def shown(**variables: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", told], env=os.environ | variables, capture_output=True, text=True, check=True
        ).stdout.strip()

    assert shown(SEDA_FAST_CPU_PRODUCTS="own").startswith("seda_fast's (own: float32 on AMD from AVX2 on")
    assert shown(SEDA_FAST_CPU_PRODUCTS="pytorch").startswith("PyTorch's (")
    amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text() and cpp_status()["cpu_features"]["avx2"]
    assert shown(SEDA_FAST_CPU_PRODUCTS="").startswith("seda_fast's (" if amd else "PyTorch's (")
    assert shown(SEDA_FAST_CPU_PRODUCTS="", SEDA_FAST_CPU_ISA="baseline").startswith("PyTorch's (")


def test_a_rule_that_is_not_known_is_refused_by_name() -> None:
    code = "import torch, seda_fast.ops\nm = torch.ones(64, 64)\n"
    code += "torch.ops.seda_fast_cpp.matrix_product(m, m, None, False, False, m)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"SEDA_FAST_CPU_PRODUCTS": "mkl"}, capture_output=True, text=True
    )
    assert "SEDA_FAST_CPU_PRODUCTS=mkl is neither own nor pytorch" in done.stderr


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"left": torch.ones(4, 0)}, "left must have at least one column"),
        ({"left": torch.ones(4, 3).double()}, "left must be Float, not Double"),
        ({"left": torch.ones(8, 6)[::2, ::2]}, "left must have contiguous rows or columns"),
        ({"right": torch.ones(4, 5)}, "right must have shape (3, any), not (4, 5)"),
        ({"bias": torch.ones(4)}, "bias must have shape (5), not (4,)"),
        ({"out": torch.ones(4, 6)}, "out must have shape (4, 5), not (4, 6)"),
        ({"out": torch.ones(5, 4).t()}, "out must have contiguous rows"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_by_name(change: dict[str, Tensor], sentence: str) -> None:
    given = {"left": torch.ones(4, 3), "right": torch.ones(3, 5), "bias": None, "out": torch.ones(4, 5)} | change
    with pytest.raises(RuntimeError) as refused:
        own(given["left"], given["right"], given["bias"], given["out"])
    assert sentence in str(refused.value)


def test_the_helper_takes_what_the_operator_refuses() -> None:
    left, right = torch.randn(70, 40)[::2, ::2], torch.randn(20, 9)
    torch.testing.assert_close(_cpp.product(left, right), left @ right)
    bias = torch.randn(18)[::2]
    torch.testing.assert_close(_cpp.product(left, right, bias), left @ right + bias)
    assert torch.equal(_cpp.product(torch.ones(2, 0), torch.ones(0, 3), torch.ones(3)), torch.ones(2, 3))
    half = _cpp.product(left.bfloat16(), right.bfloat16(), out=torch.ones(35, 9), adds=True)
    torch.testing.assert_close(half, 1 + (left.bfloat16() @ right.bfloat16()).float())
