"""The CUDA kernels' machine code for three GPU generations, compiled without a GPU: warnings, spills, instructions."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ARCHITECTURES = ("80", "90a", "100")
SOURCES = ("noising", "reverse_chain", "hopper_chain")
# What each kernel must hold, and what none may: loads and stores of local memory.
EXPECTED = {
    "noising_kernel": {"LDG"},
    # Products on tensor cores, copies to shared memory that pass registers by, matrices from there.
    "ChainThread": {"HMMA.16816.F32.BF16", "LDGSTS.E.BYPASS.128", "LDSM.16.M88.4"},
    # Products there as well; weights 16 bytes at a time; exchange through the cache that all share.
    "SplitThread": {"HMMA.16816.F32.BF16", "LDG.E.128", "LDS.128", "LDG.E.STRONG.GPU", "STG.E.STRONG.GPU"},
}
# Beside that, what has code for one architecture alone: products by warpgroups, tiles that the copy engine sends to
# both blocks of a cluster, waits at barriers in shared memory, registers that change hands, published writes.
ON_90A = {
    "hopper_chain_kernel": {
        *("HGMMA.64x64x16.F32.BF16", "UTMALDG.2D.MULTICAST", "SYNCS.PHASECHK", "USETMAXREG.TRY_ALLOC"),
        *("WARPGROUP.DEPBAR", "FENCE.VIEW.ASYNC", "UCGABAR_WAIT"),
    }
}
FORBIDDEN = {"LDL", "STL"}


def cuobjdump() -> str | None:
    """The disassembler on the path, or the one that Triton brings."""
    found = shutil.which("cuobjdump")
    if found is not None:
        return found
    triton = pytest.importorskip("triton")
    carried = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return str(carried) if carried.is_file() else None


@pytest.fixture(scope="module", params=SOURCES)
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


def test_instructions_are_those_that_were_meant(compiled: tuple[Path, str]) -> None:
    tool = cuobjdump()
    if tool is None:
        pytest.skip("test_instructions_are_those_that_were_meant needs cuobjdump")
    for architecture in ARCHITECTURES:
        command = [tool, "-sass", "-arch", f"sm_{architecture}", str(compiled[0])]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        functions = re.split(r"\n\s*Function : ", said)[1:]
        assert functions
        for function in functions:
            expected = EXPECTED | (ON_90A if architecture == "90a" else {name: {"BPT.TRAP"} for name in ON_90A})
            name = next(kernel for kernel in expected if kernel in function.partition("\n")[0])
            found = set(re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)", function))
            for wanted in expected[name]:
                assert any(i.startswith(wanted) for i in found), f"{name} for sm_{architecture} has no {wanted}"
            assert not {i for i in found if i.partition(".")[0] in FORBIDDEN}, f"{name} for sm_{architecture}"
