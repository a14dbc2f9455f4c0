"""The Triton backend: whether it can run here, and its kernels, imported at the first use.

Triton is an optional dependency that takes seconds to import, so importing the package does not import it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch

from ._dispatch import implement

# Kernels compute in float32; float64 is the reference's.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _kernels(name: str) -> ModuleType:
    return importlib.import_module(f"..kernels.{name}", __package__)


@functools.cache
def _weakest_capability() -> tuple[int, int]:
    devices = range(torch.cuda.device_count())
    return min((torch.cuda.get_device_capability(i) for i in devices), default=(0, 0))


@functools.cache
def _launcher_fault() -> str | None:
    """Why no kernel can be started: Triton compiles what starts them, by the system's C compiler, when first asked.

    What is missing there it says in many ways: an assertion where the loader does not know the driver's library, an
    import that fails where code may not be loaded from its cache.
    """
    try:
        _ = importlib.import_module("triton.runtime").driver.active.utils
    except Exception as error:  # noqa: BLE001 - whatever it is, another backend serves
        return f"what starts its kernels cannot be built ({(str(error).splitlines() or [type(error).__name__])[0]})"
    return None


def unavailable(device_type: str) -> str | None:
    """Why Triton cannot serve ``device_type`` in this process, or None when it can."""
    if not _installed():
        return "the package triton is not installed"
    if device_type == "cuda":
        if not torch.cuda.is_available():
            return "PyTorch sees no CUDA device"
        if torch.version.hip is not None:
            return "its kernels are for NVIDIA GPUs, and this PyTorch is for AMD's"
        if _weakest_capability() < (8, 0):
            return f"its kernels need compute capability 8.0, the device has {_weakest_capability()}"
        return _launcher_fault()
    if os.environ.get("TRITON_INTERPRET") != "1" or not _kernels("philox").INTERPRETED:
        return "it runs there in its interpreter alone, with TRITON_INTERPRET=1 set first"
    return None


def _interprets_bfloat16(args: Sequence[Any]) -> bool:
    first = args[0][0] if isinstance(args[0], (list, tuple)) else args[0]
    # The first operand's device is all that a launch on a GPU, whose host is waited for, has to look at.
    return first.is_cpu and any(leaf.dtype == torch.bfloat16 for leaf in _tensors(args))


def _tensors(values: Sequence[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def implement_with_triton(op: str, kernel: str, function: str, dtypes: tuple[torch.dtype, ...] = DTYPES) -> None:
    """Register ``kernels.<kernel>.<function>`` for ``op``; it serves CUDA, and when forced the interpreter.

    ``dtypes`` are those that the op's first argument may have.
    """

    def launch(*args: Any) -> Any:
        if _interprets_bfloat16(args):
            raise RuntimeError(
                f"backend 'triton' cannot run {op} on cpu: its interpreter gets torch.bfloat16 wrong; "
                "float32 and float16 are right there"
            )
        run: Callable[..., Any] = getattr(_kernels(kernel), function)
        return run(*args)

    implement(op, "triton", launch, devices=("cuda",), unavailable=unavailable, dtypes=dtypes)
