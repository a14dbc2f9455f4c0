"""What a caller has switched on in PyTorch, kept away from a training or a prediction that is the same everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_DEVICE_TYPES = ("cpu", "cuda")


@contextmanager
def undisturbed() -> Iterator[None]:
    """PyTorch as it starts, then as the caller had it: gradients on, no inference mode, no autocast, and new tensors
    float32 on the CPU. Also a decorator.

    A training inside `torch.no_grad` would stop at its first step, one under another default type or device at the
    first product with the data, and one inside `torch.autocast` would quietly have another precision than it says.
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device_type in _DEVICE_TYPES:
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        # Entered always, it would be asked about each operation.
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
