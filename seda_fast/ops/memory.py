"""Memory: the state's cross-attention to class prototypes, by xformers or PyTorch, whichever measures faster.

Both are libraries' own kernels, so this is a function of their operations and no registered op of ours. With gradients
of many classes on a GPU neither is taken, but the formula step by step: the kernels' backward differs from run to run.
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ._dispatch import check_tensor, forced

# Rows of the measurement: what a training step has, and enough to fill the device.
_MEASURED_ROWS = {"cpu": 256, "cuda": 4096}
_REPEATS = 20
# Difference of the two results, relative to the largest entry, beyond which one of them must be wrong.
_AGREES = {torch.float64: 1e-9, torch.float32: 1e-3}
_AGREES_IN_HALF = 3e-2


class AttentionChoice(NamedTuple):
    """Which attention serves a memory: "xformers" or "torch", and why."""

    used: str
    reason: str


class _Found(NamedTuple):
    choice: AttentionChoice
    xformers: Callable[[Tensor, Tensor, Tensor], Tensor] | None


_found: dict[tuple[str, torch.dtype, int, int, int], _Found] = {}


def attention_choice(
    device: torch.device | str, dtype: torch.dtype, *, classes: int, width: int, heads: int
) -> AttentionChoice:
    """The attention of a memory of ``classes`` rows in a network of ``width``; measured at the first call, then kept.

    xformers' serves where it loads, has a kernel for the device and dtype, gives the same values and is at least as
    fast, forward and backward. On a GPU it serves more than 64 classes (32 where a head has more than 192 columns) in
    prediction alone: training goes step by step, and the choice is then "torch", with prediction's in its reason.
    Must not be called while a CUDA graph is captured.
    """
    device, size = torch.device(device), width // heads
    choice = _find(device, dtype, (classes, heads, size)).choice
    if not _any_order(device.type == "cuda", classes, size):
        return choice
    told = f"with gradients of more than {_one_block(size)} classes step by step, in a fixed order"
    return AttentionChoice("torch", f"{told}; without, {choice.used}: {choice.reason}")


def memory_read(
    h: Tensor,
    keys: Tensor,
    values: Tensor,
    w_q: Tensor,
    b_q: Tensor,
    w_r: Tensor,
    b_r: Tensor,
    *,
    heads: int,
) -> Tensor:
    """The state with what it reads from a memory, by multi-head cross-attention; see `reference.memory_read`.

    Args:
        h: state, (B, d) floating.
        keys, values: of the K prototypes, (K, d).
        w_q, w_r: projections of the query and of what is read, (d, d); b_q, b_r: (d,).
        heads: attention heads; they divide d.

    Returns:
        (B, d).

    Raises:
        ValueError: an argument has the wrong shape, dtype or device.
    """
    check_tensor(h, "h", (None, None), None, "floating")
    width, device = h.shape[1], h.device
    if heads < 1 or width % heads:
        raise ValueError(f"heads must divide the width {width}, not {heads}")
    check_tensor(keys, "keys", (None, width), device, "floating")
    check_tensor(values, "values", (keys.shape[0], width), device, "floating")
    for name, weight, bias in (("q", w_q, b_q), ("r", w_r, b_r)):
        check_tensor(weight, f"w_{name}", (width, width), device, "floating")
        check_tensor(bias, f"b_{name}", (width,), device, "floating")
    if forced() == "reference":
        return reference.memory_read(h, keys, values, w_q, b_q, w_r, b_r, heads)
    query = F.linear(reference.layer_norm(h), w_q, b_q)
    q, k, v = (x.unflatten(1, (heads, -1))[None] for x in (query, keys, values))
    return h + F.linear(_attention(q, k, v)[0].flatten(1), w_r, b_r)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``q`` (1, B, H, d/H), ``k`` and ``v`` (1, K, H, d/H) -> (1, B, H, d/H)."""
    gradients = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if gradients and _any_order(q.is_cuda, k.shape[1], k.shape[3]):
        return _attention_in_steps(q, k, v)
    # A compiler can look into PyTorch's attention and, for all that xformers promises, not into xformers'.
    if torch.compiler.is_compiling() or not q.shape[1]:
        return _torch_attention(q, k, v)
    key = (k.shape[1], k.shape[2], k.shape[3])
    found = _found.get((q.device.type, q.dtype, *key))
    if found is None:
        if q.is_cuda and torch.cuda.is_current_stream_capturing():
            return _torch_attention(q, k, v)
        found = _find(q.device, q.dtype, key)
    return found.xformers(q, k, v) if found.xformers is not None else _torch_attention(q, k, v)


def _attention_in_steps(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The formula in at least float32, with all (B, K) weights of each head in memory."""
    dtype = q.dtype
    q, k, v = (x.to(torch.promote_types(dtype, torch.float32)).transpose(1, 2) for x in (q, k, v))
    with torch.autocast(q.device.type, enabled=False):
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
        # Of products with a softmax between them a compiler makes PyTorch's kernel again.
        weights = scores.log_softmax(3).exp() if torch.compiler.is_compiling() else scores.softmax(3)
        return (weights @ v).transpose(1, 2).to(dtype)


def _any_order(on_gpu: bool, classes: int, size: int) -> bool:
    """Whether the kernels' backward adds up gradients in the order in which its programs end: each has some of the keys
    and adds to the queries' gradient, so a single one alone is the same in every run."""
    return on_gpu and classes > _one_block(size)


def _one_block(size: int) -> int:
    """Keys of a program, in the narrowest of the kernels for heads of ``size`` columns."""
    return 64 if size <= 192 else 32


def _torch_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


# ---- the choice ------------------------------------------------------------------------------------------------------


def _find(device: torch.device, dtype: torch.dtype, key: tuple[int, int, int]) -> _Found:
    place = (device.type, dtype, *key)
    if place not in _found:
        with torch.inference_mode(False), torch.enable_grad():
            _found[place] = _measured(device, dtype, key)
    return _found[place]


def _measured(device: torch.device, dtype: torch.dtype, key: tuple[int, int, int]) -> _Found:
    try:
        xformers: Any = importlib.import_module("xformers.ops").memory_efficient_attention
    except ModuleNotFoundError as error:
        missing = "is not installed" if (error.name or "").startswith("xformers") else f"does not load: {_said(error)}"
        return _Found(AttentionChoice("torch", f"xformers {missing}"), None)
    except Exception as error:  # noqa: BLE001 - built for another PyTorch, it raises whatever its loader does
        return _Found(AttentionChoice("torch", f"xformers does not load: {_said(error)}"), None)
    classes, heads, size = key
    generator = torch.Generator(device).manual_seed(0)
    rows = _MEASURED_ROWS.get(device.type, 256)
    made = [
        torch.randn(1, n, heads, size, device=device, generator=generator).to(dtype).requires_grad_()
        for n in (rows, classes, classes)
    ]
    try:
        expected, given = _torch_attention(*made), xformers(*made)
        torch.autograd.grad(given.sum(), made)
    except Exception as error:  # noqa: BLE001 - no kernel for this device, dtype or size: it says so in many ways
        return _Found(AttentionChoice("torch", f"xformers has no kernel that serves: {_said(error)}"), None)
    difference = float((given - expected).detach().abs().max() / expected.detach().abs().max())
    if not difference <= _AGREES.get(dtype, _AGREES_IN_HALF):
        return _Found(AttentionChoice("torch", f"xformers gives other values (by {difference:.1g})"), None)
    theirs, ours = _times((xformers, _torch_attention), made)
    told = f"xformers {theirs * 1e3:.2f} ms, PyTorch {ours * 1e3:.2f} ms, forward and backward of {rows} rows"
    if theirs <= ours:
        return _Found(AttentionChoice("xformers", told), xformers)
    return _Found(AttentionChoice("torch", told), None)


def _times(functions: tuple[Callable[..., Tensor], ...], operands: list[Tensor]) -> list[float]:
    """Median seconds of each function's forward and backward, taken in turns."""
    cuda = operands[0].is_cuda
    seconds: list[list[float]] = [[] for _ in functions]
    for repeat in range(_REPEATS + 3):
        for function, found in zip(functions, seconds, strict=True):
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            result = function(*operands)
            torch.autograd.grad(result, operands, result)
            if cuda:
                torch.cuda.synchronize()
            if repeat >= 3:
                found.append(time.perf_counter() - start)
    return [median(found) for found in seconds]


def _said(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:120]
