"""Noising in one pass: x0 is read, x is written, the normal noise lives in registers only."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import philox
from .tuning import launching_on

# 16 elements a thread: with 8, a sixth of the instructions is addresses and coefficients (sm_90 machine code).
BLOCK_ROWS, BLOCK_FEATURES, WARPS = 8, 256, 4


@triton.jit
def noising_kernel(
    x0_ptr,
    timesteps_ptr,
    signal_ptr,
    noise_ptr,
    seed_ptr,
    step_ptr,
    sample_ids_ptr,
    x_ptr,
    stream,
    rows,
    features,
    steps,
    x0_row_stride,
    x0_feature_stride,
    UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):
    """``features`` and ``x0_row_stride`` in units, see `_unit`; ``x`` is contiguous."""
    features *= UNIT
    x0_row_stride *= UNIT
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    first = tl.program_id(1) * BLOCK_FEATURES
    feature = first + tl.arange(0, BLOCK_FEATURES)
    inside = (row < rows)[:, None] & (feature < features)[None, :]
    source = x0_ptr + row[:, None] * x0_row_stride + feature[None, :].to(tl.int64) * x0_feature_stride
    x0 = tl.load(source, mask=inside, other=0.0).to(tl.float32)

    tau = tl.load(timesteps_ptr + row, mask=row < rows, other=0).to(tl.int64)
    # A timestep outside the tables reads nothing and makes its row NaN.
    known = (tau >= 0) & (tau < steps)
    signal = tl.load(signal_ptr + tau, mask=known, other=float("nan")).to(tl.float32)
    noise = tl.load(noise_ptr + tau, mask=known, other=float("nan")).to(tl.float32)
    ids = tl.load(sample_ids_ptr + row, mask=row < rows, other=0)

    half: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth == 16
    eps = philox.row_normals(seed_ptr, step_ptr, ids[:, None], first, stream, noise[:, None], BLOCK_FEATURES, half)
    x = signal[:, None] * x0 + eps
    target = x_ptr + row[:, None] * features + feature[None, :]
    tl.store(target, x.to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def scaling_kernel(
    grad_ptr,
    timesteps_ptr,
    signal_ptr,
    out_ptr,
    rows,
    features,
    steps,
    grad_row_stride,
    grad_feature_stride,
    UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):
    """``features`` and ``grad_row_stride`` in units, see `_unit`; ``out`` is contiguous."""
    features *= UNIT
    grad_row_stride *= UNIT
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    feature = tl.program_id(1) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    inside = (row < rows)[:, None] & (feature < features)[None, :]
    source = grad_ptr + row[:, None] * grad_row_stride + feature[None, :].to(tl.int64) * grad_feature_stride
    tau = tl.load(timesteps_ptr + row, mask=row < rows, other=0).to(tl.int64)
    known = (tau >= 0) & (tau < steps)
    signal = tl.load(signal_ptr + tau, mask=known, other=float("nan")).to(tl.float32)
    scaled = signal[:, None] * tl.load(source, mask=inside, other=0.0).to(tl.float32)
    target = out_ptr + row[:, None] * features + feature[None, :]
    tl.store(target, scaled.to(out_ptr.dtype.element_ty), mask=inside)


def _grid(rows: int, features: int) -> tuple[int, int]:
    return triton.cdiv(rows, BLOCK_ROWS), triton.cdiv(features, BLOCK_FEATURES)


def _unit(x: Tensor) -> int:
    """Elements of 16 bytes if as many divide the features and the row stride of ``x``, else 1.

    Triton tells the compiler of a number whether 16 divides it, and of nothing smaller: with 1000 features of two bytes
    no access would be of 16. A product with the unit it knows to be a multiple; it is one of 32 bits, so a row stride
    beyond them is left whole.
    """
    elements, stride = 16 // x.element_size(), x.stride(0)
    return elements if x.shape[1] % elements == 0 and stride % elements == 0 and stride < 2**31 else 1


def q_sample(
    x0: Tensor,
    timesteps: Tensor,
    signal: Tensor,
    noise: Tensor,
    seed: Tensor,
    step: Tensor,
    sample_ids: Tensor,
    stream: int,
) -> Tensor:
    """``signal[tau] * x0 + noise[tau] * eps`` (B, D) in x0's dtype; any strides of ``x0``, arithmetic in float32."""
    x = torch.empty(x0.shape, dtype=x0.dtype, device=x0.device)
    if x.numel() == 0:
        return x
    unit = _unit(x0)
    with launching_on(x0):
        noising_kernel[_grid(*x0.shape)](
            x0,
            timesteps.contiguous(),
            signal.contiguous(),
            noise.contiguous(),
            seed,
            step,
            sample_ids.contiguous(),
            x,
            stream,
            x0.shape[0],
            x0.shape[1] // unit,
            signal.shape[0],
            x0.stride(0) // unit,
            x0.stride(1),
            UNIT=unit,
            BLOCK_ROWS=BLOCK_ROWS,
            BLOCK_FEATURES=BLOCK_FEATURES,
            num_warps=WARPS,
        )
    return x


def q_sample_backward(grad: Tensor, timesteps: Tensor, signal: Tensor) -> Tensor:
    """``signal[tau] * grad`` (B, D) in grad's dtype; any strides of ``grad``."""
    out = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
    if out.numel() == 0:
        return out
    unit = _unit(grad)
    with launching_on(grad):
        scaling_kernel[_grid(*grad.shape)](
            grad,
            timesteps.contiguous(),
            signal.contiguous(),
            out,
            grad.shape[0],
            grad.shape[1] // unit,
            signal.shape[0],
            grad.stride(0) // unit,
            grad.stride(1),
            UNIT=unit,
            BLOCK_ROWS=BLOCK_ROWS,
            BLOCK_FEATURES=BLOCK_FEATURES,
            num_warps=WARPS,
        )
    return out
