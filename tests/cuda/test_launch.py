"""The CUDA launches' host side with a runtime that writes down what it is asked, in place of CUDA's own."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

HERE = Path(__file__).resolve().parent
# cudaErrorLaunchOutOfResources: of one launch, the context stays whole.
FAILURE = 701
# Rows, dim, condition_dim, width, hidden, blocks, steps.
FEW_ROWS, SOME_ROWS = (1, 768, 768, 512, 1024, 3, 5), (300, 768, 768, 1024, 1024, 3, 5)
MANY_ROWS, WIDE_ROWS = (65_536, 768, 384, 512, 1024, 3, 5), (140, 40, 8, 1024, 64, 1, 1)


@pytest.fixture(scope="module")
def runtime(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The launches as nvcc compiles them for the host; their device code is for one architecture and is not run."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("tests/cuda/test_launch.py needs nvcc")
    folder = tmp_path_factory.mktemp("launch")
    flags = ["-std=c++20", "-Xcompiler=-fPIC,-Wall,-Wextra", "-DSEDA_CODE_FOR_90A", f"-I{repository / 'csrc/cuda'}"]
    sources = [*sorted((repository / "csrc/cuda").glob("*.cu")), HERE / "runtime.cpp"]
    # The least work for ptxas.
    flags += ["-gencode=arch=compute_90,code=sm_90", "-Xptxas=-O0"]
    for source in sources:
        done = subprocess.run(
            [nvcc, *flags, "-c", source, "-o", folder / f"{source.name}.o"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
    library = folder / "launch.so"
    objects = [str(folder / f"{source.name}.o") for source in sources]
    subprocess.run(["g++", "-shared", "-Wl,-Bsymbolic", *objects, "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    for name in ("start_chain", "heard"):
        getattr(loaded, name).restype = ctypes.c_char_p
    loaded.begin(False, 0)
    return loaded


def start(runtime: ctypes.CDLL, *sizes: int) -> tuple[str | None, list[str]]:
    """What a launch says went wrong, and what it asked of CUDA."""
    error = runtime.start_chain((ctypes.c_int64 * 7)(*sizes))
    return error and error.decode(), runtime.heard().decode().splitlines()


def test_a_few_rows_are_one_cooperative_launch_after_all_words_that_are_exchanged_were_set_to_nothing(
    runtime: ctypes.CDLL,
) -> None:
    runtime.begin(False, 0)
    error, asked = start(runtime, *FEW_ROWS)
    assert error is None
    # 16 rows of 1024 bfloat16, 64 bytes apart; two rooms for the warps' parts of 16 by 8 sums; seven tiles of values
    # that threads keep; 32 slots of weights, of which 23 are for the steps.
    shared = 16 * (2 * 1024 + 64) + 2 * 8 * 16 * 8 * 4 + 7 * 16 * 8 * 4 + 32 * 256 * 16
    # The condition; in each of five steps four states, three blocks' hidden rows and x as two bfloat16 a word.
    words = 512 + 5 * (4 * 512 + 3 * 1024 // 2 + 768 // 2)
    launch = f"SplitThread grid 128 block 256 shared {shared} stream 77 cooperative"
    assert asked == ["device 1", f"set 4096 to 255, bytes {4 * words} stream 77", launch]


def test_many_rows_go_to_clusters_of_two_with_a_map_for_each_weight(runtime: ctypes.CDLL) -> None:
    runtime.begin(False, 0)
    error, asked = start(runtime, *MANY_ROWS)
    assert error is None
    weights = [(512, 384), (3072, 512), (512, 768), (768, 512), *[(1024, 512), (512, 1024)] * 3]
    maps = [f"map {rows}x{columns} box 64x64" for rows, columns in weights]
    # Normed rows, a chunk, four weight tiles, two sums for each row and warp, two barriers a tile.
    shared = 64 * 512 * 2 + 64 * 128 * 2 + 4 * 128 * 64 * 2 + 64 * 2 * 4 * 4 + 4 * 16
    launch = f"hopper_chain_kernel grid 132 block 384 shared {shared} stream 77 cluster 2"
    assert asked == ["device 1", *maps, launch]


@pytest.mark.parametrize(("sizes", "blocks"), [(SOME_ROWS, 10), (WIDE_ROWS, 5)], ids=["some rows", "wide rows"])
def test_other_rows_are_one_plain_launch(runtime: ctypes.CDLL, sizes: tuple[int, ...], blocks: int) -> None:
    runtime.begin(False, 0)
    error, asked = start(runtime, *sizes)
    assert error is None
    assert asked[0] == "device 1"
    assert asked[1].startswith(f"WideChain grid {blocks} block 256 shared ")
    assert asked[1].endswith(" stream 77")


@pytest.mark.parametrize("sizes", [FEW_ROWS, SOME_ROWS, MANY_ROWS], ids=["few", "some", "many"])
def test_a_first_launch_inside_a_capture_may_load_its_code(runtime: ctypes.CDLL, sizes: tuple[int, ...]) -> None:
    runtime.begin(True, 0)
    error, asked = start(runtime, *sizes)
    assert error is None
    assert "left changed" not in asked[-1]


@pytest.mark.parametrize("sizes", [FEW_ROWS, SOME_ROWS, MANY_ROWS], ids=["few", "some", "many"])
def test_a_failed_launch_is_told_at_once_and_blames_no_later_one(runtime: ctypes.CDLL, sizes: tuple[int, ...]) -> None:
    runtime.begin(False, FAILURE)
    assert start(runtime, *sizes)[0] == f"error {FAILURE}"
    assert start(runtime, *sizes)[0] is None


def test_a_launch_for_fewer_bytes_leaves_room_for_one_in_another_thread(runtime: ctypes.CDLL) -> None:
    runtime.begin(False, 0)
    assert start(runtime, *(300, 64, 64, 1024, 64, 1, 1))[0] is None
    assert runtime.shared_limit(b"WideChain") == 227 * 1024
