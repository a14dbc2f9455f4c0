"""What a caller has switched on in PyTorch, kept away from a training or a prediction that is the same everywhere."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_DEVICE_TYPES = ("cpu", "cuda")
# A process has one default dtype and one default generator for all its threads.
_GLOBAL = threading.RLock()
_inside = 0
_callers_dtype = torch.float32


@contextmanager
def undisturbed() -> Iterator[None]:
    """PyTorch as it starts, then as the caller had it: gradients on, no inference mode, no autocast, and new tensors
    float32 on the CPU. Also a decorator.

    A training inside `torch.no_grad` would stop at its first step, one under another default type or device at the
    first product with the data, and one inside `torch.autocast` would quietly have another precision than it says.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device_type in _DEVICE_TYPES:
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        # Entered always, it would be asked about each operation.
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(_float32())
        yield


@contextmanager
def _float32() -> Iterator[None]:
    """float32 as the default dtype while any thread is inside; the last one to leave restores the caller's, or what was
    set meanwhile."""
    global _inside, _callers_dtype
    with _GLOBAL:
        if not _inside or torch.get_default_dtype() != torch.float32:
            _callers_dtype = torch.get_default_dtype()
            torch.set_default_dtype(torch.float32)
        _inside += 1
    try:
        yield
    finally:
        with _GLOBAL:
            _inside -= 1
            if not _inside:
                torch.set_default_dtype(_callers_dtype)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """PyTorch's default generator of the CPU at ``seed``, then as it was; one thread at a time."""
    with _GLOBAL, torch.random.fork_rng(devices=[]):
        # `torch.manual_seed` would seed the GPUs' generators, too, and nothing brings those back.
        torch.default_generator.manual_seed(seed)
        yield
