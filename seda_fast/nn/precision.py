"""Buffers that a half precision would spoil."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

_HALVES = (torch.bfloat16, torch.float16)


class WholeBuffers(nn.Module):
    """A module whose buffers of the names ``whole`` stay float32 where its weights are cast to a half precision."""

    whole: ClassVar[tuple[str, ...]] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: self._buffers[name] for name in self.whole}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, kept in before.items():
            after = self._buffers[name]
            if kept is not None and after is not None and after.dtype in _HALVES:
                self._buffers[name] = kept.to(after.device, torch.float32)
        return self
