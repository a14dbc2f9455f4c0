"""The CUDA kernels under compute-sanitizer on a GPU: memory, races in shared memory, barriers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from seda_fast.ops import cuda_status

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

# A call of each kernel: few rows, split over columns; low tiles, rows of one panel and of eight; with more rows than
# low tiles share out (32 a processor), clusters where the GPU has them and tall tiles elsewhere.
# tests/cuda/test_chain.py holds the rule for sizes against these.
CALLS = {
    "split": "chain(3, 72, 64, 64, 1, 2)",
    "wide": "chain(140, 72, 64, 192, 1, 2)",
    "wide, eight panels": "chain(140, 72, 1024, 64, 1, 1)",
    "tall or hopper": "chain(32 * processors + 40, 72, 64, 64, 1, 2)",
}
SCRIPT = """
import runpy, sys, torch
from seda_fast.ops import reverse_chain, use_backend
chain_arguments = runpy.run_path(sys.argv[1])["chain_arguments"]
processors = torch.cuda.get_device_properties(0).multi_processor_count


def chain(*sizes):
    return reverse_chain(**chain_arguments(*sizes))


with use_backend("cuda"):
    found = eval(sys.argv[2])
torch.cuda.synchronize()
assert torch.isfinite(found).all()
"""


def sanitizer() -> str | None:
    """compute-sanitizer on the path or in CUDA's folder."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which(f"{home}/bin/compute-sanitizer")


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
def test_nothing_is_reported(call: str, tool: str, repository: Path, request: pytest.FixtureRequest) -> None:
    if not cuda_status()["available"]:
        pytest.skip(f"{request.node.nodeid} needs the CUDA library: {cuda_status()['reason']}")
    program = sanitizer()
    if program is None:
        pytest.skip(f"{request.node.nodeid} needs compute-sanitizer")
    command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SCRIPT]
    # Each tensor's memory is its own: the end of one is not the beginning of another.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        [*command, str(repository / "tests/ops/test_gpu.py"), call],
        env=environment,
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-5000:]
    summary = "RACECHECK SUMMARY: 0 hazards displayed" if tool == "racecheck" else "ERROR SUMMARY: 0 errors"
    assert summary in said, said[-5000:]
