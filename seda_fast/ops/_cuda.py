"""The CUDA C++ backend: whether the operators of csrc/cuda are here, why not, and what they serve.

The reverse chain in bfloat16 is all that they serve: by default few rows on compute capability 9.0, where they were
measured fastest by at least a tenth (see ops/cuda/reverse_chain.py), and all that they can under
``use_backend("cuda")``.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import _cpp
from ._dispatch import implement

# What each operation's kernel serves; a call outside goes to another backend or the reference.
RULES: dict[str, str] = {}

_LIBRARY = "libseda_fast_cuda.so"
_OPERATORS = ("chain_fits", "chain_splits", "reverse_chain")


def _absence() -> str | None:
    """Why the library is not to be loaded, or None."""
    if torch.version.cuda is None:
        return "this PyTorch was built without CUDA"
    if _cpp.damage() is not None:
        # The C++ half has warned of it.
        return f"it cannot be loaded: {_cpp.damage()}"
    missing = _cpp.report().get("missing", {}).get("cuda")
    if missing is not None:
        return f"it was not built: {missing}"
    spec = importlib.util.find_spec(f"{_cpp.PACKAGE}._C")
    if spec is None or spec.origin is None or not (Path(spec.origin).parent / _LIBRARY).is_file():
        return "it was not built"
    return None


def _load() -> str | None:
    """Register the operators; the reason why they are not usable, or None."""
    reason = _absence()
    if reason is not None:
        return reason
    spec = importlib.util.find_spec(f"{_cpp.PACKAGE}._C")
    assert spec is not None and spec.origin is not None
    path = Path(spec.origin).parent / _LIBRARY
    try:
        _cpp.check_whole(path)
        torch.ops.load_library(str(path))
        old = [name for name in _OPERATORS if not hasattr(torch.ops.seda_fast_cuda, name)]
        if old:
            raise ImportError(f"it was built from other sources (no {', '.join(old)}); install the package again")
    except (ImportError, OSError) as error:
        reason = f"it cannot be loaded: {error.__cause__ or error}"
        warnings.warn(f"seda_fast runs without its CUDA C++ operators; {reason}", RuntimeWarning, stacklevel=4)
    return reason


_reason = _load()


@functools.cache
def _weakest_capability() -> tuple[int, int]:
    devices = range(torch.cuda.device_count())
    return min((torch.cuda.get_device_capability(i) for i in devices), default=(0, 0))


def unavailable(device_type: str) -> str | None:
    """Why the CUDA operators cannot run on a device type, or None when they can."""
    if _reason is not None:
        return f"the CUDA library is missing: {_reason}"
    if device_type != "cuda":
        return "it has code for CUDA only"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    if _weakest_capability() < (8, 0):
        return f"its kernels need compute capability 8.0, the device has {_weakest_capability()}"
    return _without_code(tuple(_cpp.report().get("cuda", {}).get("architectures", ()))) or _runtime_fault()


def has_code(architectures: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether a library built for ``architectures``, as "80" or "90a", has code for a device.

    Machine code serves its own generation from its minor version on ("100f" too), that of "90a" its own device alone.
    Of the lowest architecture without a letter there is PTX, which every later device translates for itself.
    """
    listed = [(divmod(int(name.rstrip("af")), 10), name) for name in architectures]
    portable = [least for least, name in listed if name.isdigit()]
    own = any(
        capability == least if name.endswith("a") else least <= capability and least[0] == capability[0]
        for least, name in listed
    )
    return own or capability >= min(portable, default=(100, 0))


@functools.cache
def _without_code(architectures: tuple[str, ...]) -> str | None:
    """Why the devices cannot run what was built, or None; a launch would end in "no kernel image is available"."""
    for i in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(i)
        if architectures and not has_code(architectures, capability):
            built = ", ".join(f"sm_{name}" for name in architectures)
            needed = f"SEDA_FAST_CUDA_ARCHS={capability[0]}{capability[1]}"
            return f"it was built for {built}, the device has {capability}; install it again with {needed}"
    return None


@functools.cache
def _runtime_fault() -> str | None:
    """What the library's own CUDA runtime says against the devices, or None: one of a newer CUDA than PyTorch's may
    need a newer driver."""
    try:
        torch.ops.seda_fast_cuda.chain_fits(8, 8, 64, 64, 1, 1, torch.cuda.current_device())
    except RuntimeError as error:
        return f"its CUDA runtime cannot be used: {str(error).splitlines()[0]}"
    return None


def implement_with_cuda(
    op: str, function: Callable[..., Any], rule: str, dtypes: tuple[torch.dtype, ...], by_itself: Callable[[], bool]
) -> None:
    """Register ``function`` for ``op`` in ``dtypes``; ``rule`` says which calls it serves, ``by_itself`` whether it is
    asked here where no backend is forced."""
    RULES[op] = rule
    implement(op, "cuda", function, devices=("cuda",), unavailable=unavailable, dtypes=dtypes, by_itself=by_itself)


def status() -> dict[str, Any]:
    """What `seda_fast.info` shows of the CUDA library.

    Returns:
        ``available``: bool; ``reason``: why not, or None; ``rules``: operation to what the kernel serves; ``build``:
        compiler, flags and architectures, empty where it was not built; ``missing``: why the build left it out, or
        None.
    """
    return {
        "available": _reason is None,
        "reason": _reason,
        "rules": dict(RULES),
        "build": _cpp.report().get("cuda", {}),
        "missing": _cpp.report().get("missing", {}).get("cuda"),
    }
