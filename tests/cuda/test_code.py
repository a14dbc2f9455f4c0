"""The CUDA kernels' machine code for three GPU generations, compiled without a GPU: warnings, spills, instructions."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ARCHITECTURES = ("80", "90a", "100")
# Products on tensor cores, copies to shared memory that pass registers by, matrices from there.
TILES = {"HMMA.16816.F32.BF16", "LDGSTS.E.BYPASS.128", "LDSM.16.M88.4"}
# The kernels of each file by a part of their names, and what each must hold.
EXPECTED = {
    "reverse_chain": {
        # Tiles of 32 rows of up to eight panels, and of 64 of up to four.
        "RingEngineILi32ELi8ELi3E": TILES,
        "RingEngineILi64ELi4ELi4E": TILES,
        # Products there as well; weights 16 bytes at a time, kept in shared memory; exchange through the cache that all
        # share, without fences.
        "SplitThread": {
            *("HMMA.16816.F32.BF16", "LDG.E.128", "LDS.128", "LDGSTS.E.BYPASS.128"),
            *("LDG.E.128.STRONG.GPU", "STG.E.64.STRONG.GPU", "STG.E.STRONG.GPU"),
        },
    },
    "hopper_chain": {"hopper_chain_kernel": {"BPT.TRAP"}},
}
# What has code for one architecture alone: products by warpgroups, tiles that the copy engine sends to both blocks of a
# cluster, waits at barriers in shared memory, registers that change hands, published writes.
ON_90A = {
    "hopper_chain_kernel": {
        *("HGMMA.64x64x16.F32.BF16", "UTMALDG.2D.MULTICAST", "SYNCS.PHASECHK", "USETMAXREG.TRY_ALLOC"),
        *("WARPGROUP.DEPBAR", "FENCE.VIEW.ASYNC", "UCGABAR_WAIT"),
    }
}
# Loads and stores of local memory.
FORBIDDEN = {"LDL", "STL"}


def cuobjdump() -> str | None:
    """The disassembler on the path, or the one that Triton brings."""
    found = shutil.which("cuobjdump")
    if found is not None:
        return found
    triton = pytest.importorskip("triton")
    carried = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return str(carried) if carried.is_file() else None


@pytest.fixture(scope="module", params=EXPECTED)
def compiled(
    request: pytest.FixtureRequest, repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """Object file with the code of all architectures, every warning an error, and what ptxas says of each kernel."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("tests/cuda/test_code.py needs nvcc")
    built = tmp_path_factory.mktemp("code") / f"{request.param}.o"
    source = repository / "csrc/cuda" / f"{request.param}.cu"
    flags = ["-std=c++20", "-O3", "-Xcompiler=-fPIC,-Wall,-Wextra,-Werror", "-Werror=all-warnings", "-Xptxas=-v"]
    flags += [f"-gencode=arch=compute_{name},code=sm_{name}" for name in ARCHITECTURES]
    done = subprocess.run([nvcc, *flags, "-c", source, "-o", built], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return built, done.stderr


def test_nothing_spills_on_any_architecture(compiled: tuple[Path, str]) -> None:
    said = compiled[1]
    kernels = re.findall(r"Compiling entry function '(\S+)' for 'sm_(\w+)'", said)
    assert {architecture for _, architecture in kernels} == set(ARCHITECTURES)
    stack = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert len(stack) == len(kernels)
    assert {numbers for line in stack for numbers in line} == {"0"}, said


def disassembled(built: Path, architecture: str) -> dict[str, list[str]]:
    """Each kernel's instructions, in order and without their operands."""
    tool = cuobjdump()
    if tool is None:
        pytest.skip("tests/cuda/test_code.py needs cuobjdump")
    command = [tool, "-sass", "-arch", f"sm_{architecture}", str(built)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions = re.split(r"\n\s*Function : ", said)[1:]
    assert functions
    instruction = re.compile(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)")
    return {function.partition("\n")[0]: instruction.findall(function) for function in functions}


def test_instructions_are_those_that_were_meant(compiled: tuple[Path, str]) -> None:
    kernels = EXPECTED[compiled[0].stem]
    for architecture in ARCHITECTURES:
        functions = disassembled(compiled[0], architecture)
        by_name = {name: [function for function in functions if name in function] for name in kernels}
        assert sorted(map(sorted, by_name.values())) == sorted([function] for function in functions), by_name
        for name, (function,) in by_name.items():
            found = set(functions[function])
            wanted_here = ON_90A.get(name, kernels[name]) if architecture == "90a" else kernels[name]
            for wanted in wanted_here:
                assert any(i.startswith(wanted) for i in found), f"{name} for sm_{architecture} has no {wanted}"
            assert not {i for i in found if i.partition(".")[0] in FORBIDDEN}, f"{name} for sm_{architecture}"


def test_warpgroups_have_their_registers_and_wait_for_no_more_than_they_must(compiled: tuple[Path, str]) -> None:
    if "hopper_chain" not in compiled[0].name:
        pytest.skip("warpgroups are in hopper_chain alone")
    # Where the compiler finds accumulators touched between products it waits after each; where it cannot say how many
    # registers a thread has it lets none change hands; of another number than a third of the processor's the threads
    # that ask for more would wait for ever.
    assert "serialized" not in compiled[1]
    assert "setmaxnreg" not in compiled[1]
    assert re.search(r"for 'sm_90a'\n.*\n.*\nptxas info\s*: Used 168 registers", compiled[1]), compiled[1]
    ((_, instructions),) = disassembled(compiled[0], "90a").items()
    # Stores that must reach the whole GPU and a cache that is emptied: where the cluster meets, at no tile's barriers.
    assert instructions.count("MEMBAR.ALL.GPU") == 2
    assert instructions.count("CCTL.IVALL") == 2
