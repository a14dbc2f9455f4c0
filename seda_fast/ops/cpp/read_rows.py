"""Rows of a file by number, in C++ (csrc/cpu/read_rows.cpp), where Python would wait for its own interpreter."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from .._cpp import unavailable


def reads_rows() -> bool:
    """Whether `read_rows` can be called: it is in the C++ half."""
    return unavailable("cpu") is None


def read_rows(file: int, start: int, rows: Tensor, target: Tensor, threads: int = 1) -> None:
    """Read rows of an open file, each as long as one of ``target`` (n, bytes), uint8, without Python's lock.

    Args:
        file: its descriptor. start: in bytes, where its row 0 begins.
        rows: (n,) int64, which rows. target: contiguous, overwritten.
        threads: 1 .. 64, that share the rows.

    Raises:
        EOFError: the file ends before a row does.
        OSError: it cannot be read.
        RuntimeError: an argument is not as said.
    """
    end: int = torch.ops.seda_fast_cpp.read_rows(file, start, rows, target, threads)
    if end < 0:
        raise EOFError("the file ends before a row does")
    if end > 0:
        raise OSError(end, os.strerror(end))
