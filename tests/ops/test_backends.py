"""Which backend serves a call: the default, the forced one, and what a backend that cannot run says."""

import subprocess
import sys
import types
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from seda_fast.ops import _cuda, _dispatch, _triton, q_sample, use_backend
from seda_fast.ops.cuda import reverse_chain as chain

# What is found out about the devices once.
CACHED = (_cuda._weakest_capability, _cuda._without_code, _cuda._runtime_fault, chain._measured, chain._splits)


def noise() -> torch.Tensor:
    table = torch.ones(3)
    ids = torch.arange(2)
    return q_sample(torch.zeros(2, 4), ids, table, table, seed=1, step=0, sample_ids=ids)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_memory_that_nobody_wrote_is_poisoned_in_these_tests(device: str) -> None:
    """By the fixture of all of them: an operation that leaves out part of its result is not to find what it should have
    written there."""
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8):
        written = torch.ones(3, dtype=dtype, device=device)
        for found in (torch.empty(9, dtype=dtype, device=device), written.new_empty(9), torch.empty_like(written)):
            poisoned = found.isnan() if dtype.is_floating_point else found == torch.iinfo(dtype).max
            assert poisoned.all(), dtype


def test_every_operation_has_a_reference() -> None:
    for operation in _dispatch.operations():
        with use_backend("reference"):
            assert _dispatch.choose(operation, "cpu")[0] == "reference"


def test_an_unknown_backend_is_refused_with_the_known_ones() -> None:
    with (
        pytest.raises(ValueError, match=r"backend must be one of \('auto', 'reference'.*not 'numpy'"),
        use_backend("numpy"),
    ):
        pass


def test_an_unavailable_backend_says_why() -> None:
    lacking = r"^backend 'triton' has no implementation of gradient_norm; it has \['cpp', 'reference'\]"
    with use_backend("triton"), pytest.raises(RuntimeError, match=lacking):
        _dispatch.choose("gradient_norm", "cpu")
    with use_backend("cuda"), pytest.raises(RuntimeError, match=r"^backend 'cuda' cannot run reverse_chain on cpu: \w"):
        _dispatch.choose("reverse_chain", "cpu")


def test_operations_that_cuda_has_no_code_for_are_served_as_without_it() -> None:
    """A whole model runs under it, though its reverse chain alone has such code."""
    expected = noise()
    with use_backend("cuda"):
        assert torch.equal(noise(), expected)
        assert _dispatch.choose("interaction_block", "cpu")[0] != "cuda"


@pytest.mark.parametrize(
    "fault, said",
    [
        (RuntimeError("Failed to find C compiler.\nSpecify it by CC"), "Failed to find C compiler."),
        (AssertionError("libcuda.so cannot found!\nPossible files are located at"), "libcuda.so cannot found!"),
        (ImportError("libtriton.so: failed to map segment from shared object"), "libtriton.so: failed to map segment"),
        (KeyError(), "KeyError"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_machine_that_cannot_start_kernels_falls_to_another_backend(
    monkeypatch: pytest.MonkeyPatch, fault: Exception, said: str
) -> None:
    """Triton needs a C compiler at its first launch, which slim images have not; the driver's library, which the loader
    may not know; and a folder from which code may be loaded."""
    driver = types.ModuleType("triton.runtime")

    class Active:
        @property
        def utils(self) -> None:
            raise fault

    driver.driver = types.SimpleNamespace(active=Active())  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton.runtime", driver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_triton, "_weakest_capability", lambda: (9, 0))
    _triton._launcher_fault.cache_clear()
    try:
        reason = _triton.unavailable("cuda")
        assert reason is not None and reason.startswith(f"what starts its kernels cannot be built ({said}")
        assert "\n" not in reason
        assert _dispatch.choose("q_sample", "cuda")[0] == "reference"
    finally:
        _triton._launcher_fault.cache_clear()


def test_an_amd_gpu_is_not_taken_for_one_of_nvidia(monkeypatch: pytest.MonkeyPatch) -> None:
    """A PyTorch for AMD's answers to the name of CUDA, with capabilities that may be 9.0 and more."""
    monkeypatch.setattr(torch.version, "hip", "6.4.43482")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_triton, "_weakest_capability", lambda: (9, 4))
    monkeypatch.setattr(_triton, "_launcher_fault", lambda: None)
    assert _triton.unavailable("cuda") == "its kernels are for NVIDIA GPUs, and this PyTorch is for AMD's"
    assert _dispatch.choose("q_sample", "cuda")[0] == "reference"


def test_blocks_that_overlap_leave_nothing_forced() -> None:
    """As those of two threads do, one of which ends before the other."""
    first, second = use_backend("reference"), use_backend("cpp")
    first.__enter__()
    second.__enter__()
    assert _dispatch.forced() == "cpp"
    first.__exit__(None, None, None)
    assert _dispatch.forced() == "cpp"
    second.__exit__(None, None, None)
    assert _dispatch.forced() == "auto"
    with use_backend("reference"):
        with use_backend("auto"):
            assert _dispatch.forced() == "auto"
        assert _dispatch.forced() == "reference"


def test_triton_s_interpreter_does_not_take_what_it_gets_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "_kernels", lambda name: None)
    monkeypatch.setattr(_triton, "unavailable", lambda device_type: None)
    table = torch.ones(3)
    x = torch.ones(2, 4, dtype=torch.bfloat16)
    launch = _dispatch._implementations["q_sample"]["triton"].function
    for operands in ((x, table), (table, [table, x])):
        with pytest.raises(
            RuntimeError, match=r"cannot run q_sample on cpu: its interpreter gets torch\.bfloat16 wrong"
        ):
            launch(*operands)


def test_an_empty_list_of_operands_is_refused_by_name() -> None:
    norm = torch.ones(())
    with pytest.raises(ValueError, match=r"^weights must hold at least one tensor$"):
        torch.ops.seda_fast.weight_update([], [], [], [], [], [], norm, 1.0, 1e-3, 0.9, 0.99, 1e-8, 0.0, 0.1)


@pytest.mark.parametrize(
    "built, yes, no",
    [
        # The default: machine code for three, PTX of 8.0 for all later ones.
        (["80", "90a", "100"], [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 1)], [(7, 5)]),
        (["90a"], [(9, 0)], [(8, 0), (8, 9), (9, 1), (10, 0), (12, 0)]),
        (["86"], [(8, 6), (8, 9), (9, 0), (12, 0)], [(8, 0)]),
        (["90a", "100"], [(9, 0), (10, 0), (10, 3), (12, 0)], [(8, 0), (8, 9)]),
        (["100f"], [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
    ],
)
def test_a_library_serves_the_devices_that_it_has_code_for(
    built: list[str], yes: list[tuple[int, int]], no: list[tuple[int, int]]
) -> None:
    assert [c for c in yes + no if _cuda.has_code(built, c)] == yes


def test_a_device_without_code_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a made-up device: what a launch would have ended in is known before it."""
    monkeypatch.setattr(_cuda, "_reason", None)
    monkeypatch.setattr(_cuda._cpp, "report", lambda: {"cuda": {"architectures": ["90a"]}})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.ops.seda_fast_cuda, "chain_fits", lambda *sizes: True, raising=False)
    for devices, told in (
        ([(9, 0), (9, 0)], None),
        (
            [(9, 0), (8, 0)],
            "it was built for sm_90a, the device has (8, 0); install it again with SEDA_FAST_CUDA_ARCHS=80",
        ),
        ([(9, 0), (7, 5)], "its kernels need compute capability 8.0, the device has (7, 5)"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", devices.__getitem__)
        for cached in CACHED:
            cached.cache_clear()
        assert _cuda.unavailable("cuda") == told
    for cached in CACHED:
        cached.cache_clear()


def _a_made_up_device(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """With an extension that serves the reverse chain on it, which `CACHED` must forget again."""
    monkeypatch.setattr(_cuda, "_reason", None)
    monkeypatch.setattr(_cuda._cpp, "report", lambda: {"cuda": {"architectures": ["80", "90a", "100"]}})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    known = _dispatch._implementations["reverse_chain"]  # Triton would look for the device's driver
    monkeypatch.setitem(
        _dispatch._implementations, "reverse_chain", {name: known[name] for name in ("reference", "cuda")}
    )
    for cached in CACHED:
        cached.cache_clear()


@pytest.fixture
def forgetful() -> Iterator[None]:
    """What was found out of made-up devices is forgotten."""
    yield
    for cached in CACHED:
        cached.cache_clear()


def test_a_library_of_a_newer_cuda_than_the_driver_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, forgetful: None
) -> None:
    def chain_fits(*sizes: int) -> bool:
        raise RuntimeError("the reverse chain cannot be launched: CUDA driver version is insufficient\nmore")

    _a_made_up_device(monkeypatch, (9, 0))
    monkeypatch.setattr(torch.ops.seda_fast_cuda, "chain_fits", chain_fits, raising=False)
    told = "its CUDA runtime cannot be used: the reverse chain cannot be launched: CUDA driver version is insufficient"
    assert _cuda.unavailable("cuda") == told
    with pytest.raises(RuntimeError, match=told), use_backend("cuda"):
        _dispatch.choose("reverse_chain", "cuda", torch.bfloat16)


@pytest.mark.parametrize("capability, served", [((9, 0), True), ((8, 0), False), ((12, 0), False)])
def test_who_serves_a_device_names_no_kernels_that_were_not_measured_on_it(
    monkeypatch: pytest.MonkeyPatch, forgetful: None, capability: tuple[int, int], served: bool
) -> None:
    _a_made_up_device(monkeypatch, capability)
    monkeypatch.setattr(torch.ops.seda_fast_cuda, "chain_fits", lambda *sizes: True, raising=False)
    found = _dispatch.choose("reverse_chain", "cuda", torch.bfloat16)[0]
    assert (found == "cuda") == served
    with use_backend("cuda"):
        assert _dispatch.choose("reverse_chain", "cuda", torch.bfloat16)[0] == "cuda"


def test_few_rows_that_cannot_be_split_go_to_triton(monkeypatch: pytest.MonkeyPatch, forgetful: None) -> None:
    _a_made_up_device(monkeypatch, (9, 0))
    asked = []

    def chain_splits(*sizes: int) -> bool:
        asked.append(sizes)
        return sizes[0] <= 4096

    monkeypatch.setattr(torch.ops.seda_fast_cuda, "chain_splits", chain_splits, raising=False)
    initial = SimpleNamespace(shape=(128, 768), get_device=lambda: 0)
    assert chain._faster(initial, (768, 768, 512, 1024, 3, 5))
    assert not chain._faster(initial, (8192, 8192, 512, 1024, 3, 5))
    assert asked == [(768, 768, 512, 1024, 3, 5, 128, 0), (8192, 8192, 512, 1024, 3, 5, 128, 0)]
    more = SimpleNamespace(shape=(129, 768), get_device=lambda: 0)
    assert not chain._faster(more, (768, 768, 512, 1024, 3, 5))
    assert len(asked) == 2


def test_the_choice_ends_with_the_block_even_after_an_error() -> None:
    before = _dispatch.choose("q_sample", "cpu")[0]
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert _dispatch.choose("q_sample", "cpu")[0] == before


def test_a_backend_is_passed_over_for_a_dtype_that_it_lacks() -> None:
    for operation in _dispatch.operations():
        assert _dispatch.choose(operation, "cpu", torch.float64)[0] in ("reference", "cpp")


def test_importing_the_package_on_a_cpu_does_not_import_triton() -> None:
    code = "import sys, seda_fast.ops; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
