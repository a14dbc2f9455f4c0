"""Reading class texts, forward and backward: the attention the library chose against the same in plain PyTorch."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seda_fast import reference
from seda_fast.ops import memory_read

WIDTH, HEADS, CLASSES = 512, 8, 100
ROWS = {"cuda": 16_384, "cpu": 1024}


def operands(rows: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device) * scale).to(dtype).requires_grad_()

    return {
        "h": draw(rows, WIDTH),
        "keys": draw(CLASSES, WIDTH),
        "values": draw(CLASSES, WIDTH),
        "w_q": draw(WIDTH, WIDTH, scale=WIDTH**-0.5),
        "b_q": draw(WIDTH, scale=0.1),
        "w_r": draw(WIDTH, WIDTH, scale=WIDTH**-0.5),
        "b_r": draw(WIDTH, scale=0.1),
    }


def eager(
    h: Tensor, keys: Tensor, values: Tensor, w_q: Tensor, b_q: Tensor, w_r: Tensor, b_r: Tensor, heads: int
) -> Tensor:
    query = F.linear(F.layer_norm(h, (WIDTH,)), w_q, b_q)
    q, k, v = (x.view(len(x), heads, -1).transpose(0, 1) for x in (query, keys, values))
    read = F.scaled_dot_product_attention(q, k, v)
    return h + F.linear(read.transpose(0, 1).reshape(len(h), WIDTH), w_r, b_r)


def bench_memory(
    contest: Any, device: torch.device, quick: bool, workload: Any, compile_variants: Any, close: Any
) -> None:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = 64 if quick else ROWS[device.type]
    given = operands(rows, dtype, device)
    leaves = list(given.values())
    weight = torch.randn(rows, WIDTH, device=device).to(dtype)
    functions = {"seda_fast": memory_read, "eager": eager, **compile_variants(eager, device, large=True)}
    competitors = {
        name: lambda function=function: torch.autograd.grad(function(**given, heads=HEADS), leaves, weight)
        for name, function in functions.items()
    }
    wide = {name: value.detach().double().requires_grad_() for name, value in given.items()}
    exact = reference.memory_read(**wide, heads=HEADS)
    gradients = torch.autograd.grad(exact, list(wide.values()), weight.double())
    usual = competitors["eager"]()

    def check(name: str, result: tuple[Tensor, ...]) -> None:
        for part, got, expected, plain in zip(given, result, gradients, usual, strict=True):
            close(got, expected, plain, f"{name}, gradient of {part}")

    moved = given["h"].element_size() * 4.0 * rows * WIDTH
    flops = 6.0 * rows * (2 * WIDTH * WIDTH + 2 * CLASSES * WIDTH)
    title = f"memory read forward + backward, B = {rows}, K = {CLASSES} {str(dtype)[6:]}"
    contest(workload(title, "", moved=moved, flops=flops, dtype=dtype), competitors, check)
