"""The reverse chain's CUDA kernel on an emulated machine: its own text, thread by thread, checked and compared."""

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from seda_fast import reference

HERE = Path(__file__).resolve().parent


WIDE, TALL, SPLIT, HOPPER = 0, 1, 2, 3


class Case(NamedTuple):
    """Sizes of a call and how it is spread: blocks of threads, kernel (tiles of 32 or 64 rows, columns, clusters)."""

    rows: int
    dim: int
    condition: int
    width: int
    hidden: int
    blocks: int
    steps: int
    noisy: bool
    thread_blocks: int
    kernel: int


class Outcome(NamedTuple):
    """What the emulator says, the result, barriers of the last block of threads."""

    error: str
    result: Tensor
    barriers: int


SMALL = Case(5, 24, 40, 64, 128, 1, 2, True, 1, WIDE)


@pytest.fixture(scope="module")
def machine(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernel compiled for the host, with the emulated machine in place of the GPU's."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("tests/cuda/test_chain.py needs g++")
    library = tmp_path_factory.mktemp("emulated") / "chain.so"
    flags = ["-std=c++20", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    folders = [f"-I{HERE}", f"-I{repository / 'csrc/cuda'}"]
    subprocess.run([compiler, *flags, *folders, str(HERE / "chain.cpp"), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.emulate_chain.restype = ctypes.c_char_p
    return loaded


def arguments(case: Case) -> tuple[list[Tensor], dict[str, Any]]:
    """Positional arguments of `reference.reverse_chain` in bfloat16 (the tables in float32), and the keywords."""

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape) * scale).bfloat16()

    def linear(out: int, into: int) -> tuple[Tensor, Tensor]:
        return draw(out, into, scale=into**-0.5), draw(out, scale=0.1)

    inner = [linear(case.hidden, case.width) for _ in range(case.blocks)]
    outer = [linear(case.width, case.hidden) for _ in range(case.blocks)]
    coefficients = torch.rand(case.steps, 5) * 0.6
    coefficients[:, 3] *= case.noisy
    # Steps without a part in the result, as in most samplers.
    coefficients[::2, 4] = 0
    given: list[Any] = [
        draw(case.rows, case.dim),
        draw(case.rows, case.dim),
        draw(case.rows, case.condition),
        coefficients,
        torch.randn(case.steps, case.blocks, 3, case.width) * 0.2,
        *linear(case.width, case.dim),
        *linear(case.width, case.condition),
        *linear(case.blocks * case.hidden, case.width),
        *([layer[part] for layer in layers] for layers in (inner, outer) for part in (0, 1)),
        *linear(case.dim, case.width),
    ]
    ids = torch.arange(case.rows) + 2**35
    keys = {"seed": torch.tensor(9), "step": torch.tensor(2), "sample_ids": ids, "stream": 4, "noisy": case.noisy}
    return given, keys


def emulate(
    machine: ctypes.CDLL,
    case: Case,
    given: list[Any],
    keys: dict[str, Any],
    order: int = 0,
    dropped_barrier: int = -1,
    early_arrival: bool = False,
    no_waiting_for_words: bool = False,
    dropped_consumers_barrier: int = -1,
    forgotten: str = "nothing",
    dropped_cluster_meeting: int = -1,
    room: int = 227 * 1024,
) -> Outcome:
    initial, source, condition, coefficients, modulation, w_x, b_x, w_c, b_c, w_g, b_g, w_h, b_h, w_o, b_o = given[:15]
    result = torch.full((case.rows, case.dim), float("nan"), dtype=torch.bfloat16)
    operands = [initial, source, condition, result, coefficients, modulation]
    operands += [keys["seed"], keys["step"], keys["sample_ids"]]
    operands += [w_x, b_x, w_c, b_c, w_g, b_g, *given[15:]]
    operands += [t for layer in zip(w_h, b_h, w_o, b_o, strict=True) for t in layer]
    sizes = [*case[:7], keys["stream"], case.noisy, case.thread_blocks, case.kernel]
    sizes += [order, dropped_barrier, early_arrival, no_waiting_for_words, dropped_consumers_barrier]
    sizes += [("nothing", "publishing", "empty", "full", "neighbour", "beginning").index(forgotten)]
    sizes += [dropped_cluster_meeting, room]
    said = machine.emulate_chain(
        (ctypes.c_int64 * len(sizes))(*map(int, sizes)),
        (ctypes.c_void_p * len(operands))(*(t.data_ptr() for t in operands)),
    )
    return Outcome(said.decode(), result, machine.barriers_passed())


def convert(given: list[Any], dtype: torch.dtype) -> list[Any]:
    return [[t.to(dtype) for t in g] if isinstance(g, list) else g.to(dtype) for g in given]


CASES = [
    SMALL,
    # A second row tile for one block of threads, a chunk of half width, sizes that end inside a slice.
    Case(37, 72, 200, 64, 64, 2, 3, True, 1, WIDE),
    Case(33, 136, 8, 192, 192, 1, 2, False, 2, WIDE),
    Case(70, 128, 64, 128, 256, 2, 2, False, 1, TALL),
    Case(1, 8, 8, 320, 128, 1, 1, True, 1, TALL),
    Case(130, 64, 64, 64, 128, 1, 2, True, 2, TALL),
]
SMALL_SPLIT = Case(3, 24, 40, 64, 128, 1, 2, True, 3, SPLIT)
CASES += [
    SMALL_SPLIT,
    Case(1, 8, 72, 128, 64, 2, 3, True, 5, SPLIT),
    Case(16, 136, 8, 192, 192, 2, 1, False, 2, SPLIT),
    # Three groups of 16 rows, the last with fewer.
    Case(37, 24, 40, 64, 128, 1, 2, True, 6, SPLIT),
]
SMALL_HOPPER = Case(5, 24, 40, 64, 128, 1, 2, True, 2, HOPPER)
CASES += [
    SMALL_HOPPER,
    # The second block of the last cluster has no rows in its last pass.
    Case(150, 72, 200, 128, 192, 2, 2, True, 2, HOPPER),
    Case(70, 128, 8, 192, 64, 1, 3, False, 4, HOPPER),
]
LARGE = [
    Case(100, 384, 1536, 512, 1024, 3, 2, True, 2, HOPPER),
    # Sizes that tests/ops/test_gpu.py has, too: panels, chunks and tiles that end inside.
    Case(150, 136, 272, 192, 320, 2, 3, True, 2, HOPPER),
    Case(16, 136, 272, 192, 320, 2, 3, True, 7, SPLIT),
    Case(2, 384, 1536, 512, 1024, 3, 2, True, 9, SPLIT),
    Case(9, 96, 64, 1024, 1024, 1, 2, False, 4, SPLIT),
    Case(40, 384, 1536, 512, 1024, 3, 2, True, 1, TALL),
    Case(20, 96, 64, 1024, 1024, 1, 2, False, 1, WIDE),
]


@pytest.mark.parametrize(
    "case",
    [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in LARGE)],
    ids=lambda c: "-".join(map(str, c)),
)
def test_the_kernel_computes_the_chain_and_no_access_races(machine: ctypes.CDLL, case: Case) -> None:
    given, keys = arguments(case)
    got = emulate(machine, case, given, keys)
    assert got.error == ""
    exact = reference.reverse_chain(*convert(given, torch.float64), **keys)
    eager = reference.reverse_chain(*convert(given, torch.bfloat16), **keys)
    assert torch.isfinite(got.result).all()
    error = (got.result.double() - exact).abs().max().item()
    allowed = 2 * (eager.double() - exact).abs().max().item()
    assert error <= allowed, f"off by {error:.3e}, {allowed:.3e} allowed"


@pytest.mark.parametrize("case", [SMALL, SMALL_SPLIT, SMALL_HOPPER], ids=["rows", "columns", "clusters"])
def test_the_order_of_the_warps_changes_no_bit(machine: ctypes.CDLL, case: Case) -> None:
    given, keys = arguments(case)
    first, *others = [emulate(machine, case, given, keys, order=order) for order in range(4)]
    for other in others:
        assert other.error == ""
        assert torch.equal(other.result, first.result)


def test_a_row_does_not_depend_on_its_neighbours(machine: ctypes.CDLL) -> None:
    case = CASES[1]
    given, keys = arguments(case)
    whole = emulate(machine, case, given, keys).result
    rows = torch.tensor([35, 3, 20])
    part = [t[rows].contiguous() for t in given[:3]] + given[3:]
    keys["sample_ids"] = keys["sample_ids"][rows].contiguous()
    assert torch.equal(emulate(machine, case._replace(rows=3), part, keys).result, whole[rows])


def test_every_barrier_is_needed_and_its_loss_is_found(machine: ctypes.CDLL) -> None:
    given, keys = arguments(SMALL)
    barriers = emulate(machine, SMALL, given, keys).barriers
    assert barriers > 10
    found = [emulate(machine, SMALL, given, keys, dropped_barrier=i).error for i in range(barriers)]
    assert [i for i, error in enumerate(found) if not error] == []
    assert all("shared memory" in error or "no barrier" in error for error in found)


def test_a_few_rows_wait_for_every_word_that_others_send(machine: ctypes.CDLL) -> None:
    given, keys = arguments(SMALL_SPLIT)
    got = emulate(machine, SMALL_SPLIT, given, keys, no_waiting_for_words=True)
    assert got.error or not torch.isfinite(got.result).all()


def test_a_few_rows_need_their_barriers_and_a_loss_is_found(machine: ctypes.CDLL) -> None:
    # One block of threads, which has columns in every product.
    case = SMALL_SPLIT._replace(rows=16, hidden=64, thread_blocks=1)
    given, keys = arguments(case)
    barriers = emulate(machine, case, given, keys).barriers
    assert barriers > 10
    found = [emulate(machine, case, given, keys, dropped_barrier=i).error for i in range(barriers)]
    assert all("shared memory" in error or "no barrier" in error for error in found if error)
    assert [i for i, error in enumerate(found) if not error] == []


def test_weights_without_room_in_shared_memory_are_read_where_they_lie(machine: ctypes.CDLL) -> None:
    given, keys = arguments(SMALL_SPLIT)
    whole = emulate(machine, SMALL_SPLIT, given, keys).result
    for kilobytes in (20, 40, 60):
        got = emulate(machine, SMALL_SPLIT, given, keys, room=kilobytes * 1024)
        assert got.error == ""
        assert torch.equal(got.result, whole)


def test_every_barrier_of_the_consumers_is_needed_and_its_loss_is_found(machine: ctypes.CDLL) -> None:
    # Two chunks in every leg.
    case = SMALL_HOPPER._replace(dim=136, condition=136, hidden=192)
    given, keys = arguments(case)
    assert emulate(machine, case, given, keys).error == ""
    barriers = machine.consumers_barriers_passed()
    assert barriers > 20
    found = [emulate(machine, case, given, keys, dropped_consumers_barrier=i).error for i in range(barriers)]
    assert [i for i, error in enumerate(found) if not error] == []


@pytest.mark.parametrize("forgotten", ["publishing", "empty", "full", "neighbour", "beginning"])
def test_a_forgotten_step_of_the_ring_is_found(machine: ctypes.CDLL, forgotten: str) -> None:
    given, keys = arguments(SMALL_HOPPER)
    error = emulate(machine, SMALL_HOPPER, given, keys, forgotten=forgotten).error
    words = ("not published", "no barrier", "under way", "before any write", "more arrivals", "not begun")
    assert any(word in error for word in words), error


def test_the_cluster_meets_before_the_barriers_are_used_and_before_a_block_leaves(machine: ctypes.CDLL) -> None:
    given, keys = arguments(SMALL_HOPPER)

    def errors(dropped: int) -> set[str]:
        # In some orders both blocks happen to be there.
        found = [
            emulate(machine, SMALL_HOPPER, given, keys, order=order, dropped_cluster_meeting=dropped)
            for order in range(8)
        ]
        return {outcome.error.partition(" (")[0] for outcome in found}

    assert "a barrier that was not started" in errors(0)
    assert "something is sent to a block of threads that has left" in errors(1)
    assert errors(2) == {""}


@pytest.mark.parametrize(
    ("sizes", "processors", "room", "hopper", "expected"),
    [
        ((65_536, 768, 768, 512, 1024, 3, 5), 132, 227, False, (TALL, 132)),
        ((65_536, 768, 768, 512, 1024, 3, 5), 133, 227, True, (HOPPER, 132)),
        ((65_536, 768, 768, 1024, 1024, 3, 5), 132, 227, True, (WIDE, 132)),
        ((2048, 384, 1536, 512, 1024, 3, 5), 132, 227, False, (WIDE, 64)),
        ((1, 768, 768, 512, 1024, 3, 5), 132, 227, False, (SPLIT, 128)),
        # Eight groups of 16 rows share the processors; with more, each would read all weights in every step.
        ((128, 768, 768, 512, 1024, 3, 5), 132, 227, True, (SPLIT, 128)),
        ((129, 768, 768, 512, 1024, 3, 5), 132, 227, True, (WIDE, 5)),
        # Features too wide for what a block of threads keeps of them, and steps too many for what blocks exchange.
        ((1, 4096, 8192, 512, 1024, 3, 5), 132, 227, True, (WIDE, 1)),
        ((128, 768, 768, 512, 1024, 3, 66), 132, 227, True, (WIDE, 4)),
        # A block of threads with little shared memory, and rows too wide for it.
        ((65_536, 768, 768, 512, 1024, 3, 5), 84, 99, False, (WIDE, 84)),
        ((65_536, 768, 768, 640, 640, 3, 5), 84, 99, False, (WIDE, 84)),
        ((65_536, 768, 768, 704, 704, 3, 5), 84, 99, False, (-1, 0)),
        ((100, 768, 768, 1024, 1024, 32, 1), 132, 122, False, (WIDE, 4)),
        ((100, 768, 768, 1024, 1024, 32, 1), 132, 121, False, (-1, 0)),
        # The calls of test_sanitizer.py.
        ((3, 72, 144, 64, 64, 1, 2), 132, 227, True, (SPLIT, 9)),
        ((140, 72, 144, 64, 192, 1, 2), 132, 227, True, (WIDE, 5)),
        ((140, 72, 144, 1024, 64, 1, 1), 132, 227, True, (WIDE, 5)),
        ((32 * 132 + 40, 72, 144, 64, 64, 1, 2), 132, 227, True, (HOPPER, 66)),
        ((32 * 108 + 40, 72, 144, 64, 64, 1, 2), 108, 163, False, (TALL, 55)),
        ((100, 768, 768, 1088, 1088, 1, 1), 132, 227, False, (-1, 0)),
        ((100, 770, 768, 512, 512, 1, 1), 132, 227, False, (-1, 0)),
        ((100, 768, 768, 512, 480, 1, 1), 132, 227, False, (-1, 0)),
        ((100, 768, 768, 512, 512, 33, 1), 132, 227, False, (-1, 0)),
        ((100, 768, 768, 512, 512, 1, 0), 132, 227, False, (-1, 0)),
    ],
)
def test_the_rule_for_sizes(
    machine: ctypes.CDLL, sizes: tuple[int, ...], processors: int, room: int, hopper: bool, expected: tuple[int, int]
) -> None:
    answer = (ctypes.c_int * 2)()
    machine.plan_for((ctypes.c_int64 * 7)(*sizes), processors, room * 1024, hopper, answer)
    assert tuple(answer) == expected


def test_the_weight_stream_gives_as_many_tiles_as_were_counted(machine: ctypes.CDLL) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        draw = [int(v) for v in torch.randint(1, 9, (6,), generator=generator)]
        sizes = (100, 40 * draw[0], 24 * draw[1], 64 * draw[2], 64 * draw[3], draw[4], draw[5])
        assert machine.count_tiles((ctypes.c_int64 * 7)(*sizes), 0) > 0, sizes
        # A weight that is a slice narrower than the stream takes it for would be read beyond its end.
        assert machine.count_tiles((ctypes.c_int64 * 7)(*sizes), 64) == -1, sizes


def test_a_few_rows_lie_on_different_banks(machine: ctypes.CDLL) -> None:
    for dim in range(8, 520, 8):
        sizes = (1, dim, 8, 64, 64, 1, 1)
        assert machine.lanes_on_the_same_banks((ctypes.c_int64 * 7)(*sizes)) == 0, dim


def test_a_wait_that_ends_too_early_is_found(machine: ctypes.CDLL) -> None:
    given, keys = arguments(SMALL)
    error = emulate(machine, SMALL, given, keys, early_arrival=True).error
    assert "while a copy into it is under way" in error or "before any write" in error


def test_normals_are_the_contract_s(machine: ctypes.CDLL) -> None:
    seed, step, sample, stream, quads = -(2**40) + 7, 2**33 + 5, 2**36 + 11, 5, 300
    four, two = torch.empty(4 * quads), torch.empty(4 * quads)
    integers = [ctypes.c_int64(value) for value in (seed, step, sample, stream, quads)]
    machine.draw_normals(*integers, ctypes.c_void_p(four.data_ptr()), ctypes.c_void_p(two.data_ptr()))
    ids = torch.tensor([sample])
    exact = reference.normals(torch.tensor(seed), torch.tensor(step), ids, 4 * quads, stream)[0]
    assert torch.equal(four, two)
    assert (four.double() - exact).abs().max() <= 2e-6


def test_box_muller_at_the_corners_of_both_words(machine: ctypes.CDLL) -> None:
    powers = [2**k + d for k in range(33) for d in (-2, -1, 0, 1)]
    eighths = [2**29 * k + d for k in range(9) for d in (-257, -256, -1, 0, 255, 256)]
    roots = [int(2**32 * f) + d for f in (0.5**0.5, 0.5**1.5) for d in (-512, -256, 0, 256)]
    corners = torch.tensor(sorted({w for w in powers + eighths + roots if 0 <= w < 2**32}))
    pairs = torch.cartesian_prod(corners, corners)
    words = torch.where(pairs >= 2**31, pairs - 2**32, pairs).to(torch.int32).contiguous()
    got = torch.empty(pairs.shape)
    machine.transform(ctypes.c_void_p(words.data_ptr()), ctypes.c_int64(len(words)), ctypes.c_void_p(got.data_ptr()))
    u = reference.uniforms(pairs)
    radius, angle = (-2 * u[:, 0].log()).sqrt(), 2 * torch.pi * u[:, 1]
    exact = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=1)
    assert (got.double() - exact).abs().max() <= 2e-6
