"""Which implementation serves which operation on which device.

An operation is one registered op, ``torch.ops.seda_fast.NAME``. Its kernel for a device asks here at call
time, so a backend can be forced around code that is already compiled. The choice is process-wide rather than
thread-local because autograd runs a GPU's backward in threads of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

BACKENDS = ("auto", "reference", "cpp", "triton", "cuda")
# Which have code for some operations alone, so that forcing them leaves the others as they are.
PARTIAL = ("cuda",)


@dataclass(frozen=True)
class Implementation:
    """One backend's code for one registered op.

    Attributes:
        function: called with the op's own arguments.
        devices: device types it serves by default ("cpu", "cuda").
        unavailable: gives the reason why it cannot run here for a device type, or None when it can.
        dtypes: dtypes of the op's first argument (a list's first tensor) that it computes in; empty means all.
        by_itself: whether it is asked here where no backend is forced.
    """

    function: Callable[..., Any]
    devices: tuple[str, ...]
    unavailable: Callable[[str], str | None]
    dtypes: tuple[torch.dtype, ...]
    by_itself: Callable[[], bool]

    def refusal(self, device_type: str, dtype: torch.dtype | None) -> str | None:
        """Why it cannot take operands of ``dtype`` (None: any) on ``device_type``, or None when it can."""
        if dtype is not None and self.dtypes and dtype not in self.dtypes:
            return f"it computes in {', '.join(map(str, self.dtypes))}, not in {dtype}"
        return self.unavailable(device_type)


_implementations: dict[str, dict[str, Implementation]] = {}
_forced: str = "auto"
# The blocks of `use_backend` that were entered and not left, which threads may do in any order; the last one counts.
_blocks: dict[object, str] = {}
_entering = threading.Lock()


def _always_available(device_type: str) -> str | None:
    return None


def _always() -> bool:
    return True


def implement(
    op: str,
    backend: str,
    function: Callable[..., Any],
    *,
    devices: tuple[str, ...] = ("cpu", "cuda"),
    unavailable: Callable[[str], str | None] = _always_available,
    dtypes: tuple[torch.dtype, ...] = (),
    by_itself: Callable[[], bool] = _always,
) -> None:
    """Register ``function`` as ``backend``'s implementation of ``op``.

    Of several that serve a device and dtype, the one registered last is the default, so the reference is
    registered first. It serves every dtype, so float64 (`torch.autograd.gradcheck`) works wherever a faster
    backend has no float64.
    """
    if backend not in BACKENDS[1:]:
        raise ValueError(f"backend must be one of {BACKENDS[1:]}, not {backend!r}")
    _implementations.setdefault(op, {})[backend] = Implementation(function, devices, unavailable, dtypes, by_itself)


def choose(op: str, device_type: str, dtype: torch.dtype | None = None) -> tuple[str, Implementation]:
    """The backend's name and implementation that a call of ``op`` on ``device_type`` gets now.

    ``dtype`` is that of the op's first argument; None asks for a dtype that every backend has.

    Raises:
        RuntimeError: a backend is forced (`use_backend`) that has no code for this op or cannot run here.
    """
    known = _implementations[op]
    wanted = _forced  # once: other threads enter and leave blocks meanwhile
    if wanted != "auto" and (wanted in known or wanted not in PARTIAL):
        if wanted not in known:
            raise RuntimeError(f"backend {wanted!r} has no implementation of {op}; it has {sorted(known)}")
        reason = known[wanted].refusal(device_type, dtype)
        if reason is not None:
            raise RuntimeError(f"backend {wanted!r} cannot run {op} on {device_type}: {reason}")
        return wanted, known[wanted]
    chosen = "reference"
    for backend, implementation in known.items():
        serves = device_type in implementation.devices and implementation.refusal(device_type, dtype) is None
        if serves and implementation.by_itself():
            chosen = backend
    return chosen, known[chosen]


def fallback(
    op: str, device_type: str, backends: Collection[str], dtype: torch.dtype | None = None
) -> Callable[..., Any]:
    """Where an implementation passes on what its own kernel does not take: the first of ``backends`` that can run it
    here, else the reference."""
    known = _implementations[op]
    for backend in backends:
        if backend in known and known[backend].refusal(device_type, dtype) is None:
            return known[backend].function
    return known["reference"].function


def forced() -> str:
    """The backend that `use_backend` forces now; "auto" outside of it."""
    return _forced


def operations() -> tuple[str, ...]:
    """Names of all registered ops that have implementations."""
    return tuple(_implementations)


def references() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The plain PyTorch definition of each registered op, for graphs that must run without this library."""
    return {
        getattr(torch.ops.seda_fast, op).default: by_backend["reference"].function
        for op, by_backend in _implementations.items()
    }


def refusal(op: str, backend: str, device_type: str) -> str | None:
    """Why ``backend`` cannot serve ``op`` on ``device_type``; None when it can, or has no code for this op at all."""
    implementation = _implementations[op].get(backend)
    return None if implementation is None else implementation.unavailable(device_type)


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Force one backend for every operation called inside the block, in all threads.

    Of blocks that overlap, the one that was entered last counts.

    Args:
        backend: "auto" (the default choice), "reference" (plain PyTorch, the oracle), "cpp", "triton" or
            "cuda", which has code for reverse chains alone: others are served as without it.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: (at the call of an operation) the backend has no code for it or cannot run here, with
            the reason.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, not {backend!r}")
    block = object()
    _enter(block, backend)
    try:
        yield
    finally:
        _leave(block)


def _enter(block: object, backend: str) -> None:
    global _forced
    with _entering:
        _blocks[block] = _forced = backend


def _leave(block: object) -> None:
    global _forced
    with _entering:
        del _blocks[block]
        _forced = next(reversed(_blocks.values()), "auto")


def define(
    name: str,
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    autocast: Collection[int] = (),
    rows: tuple[int, int] | None = None,
) -> Callable[..., Any]:
    """Define the opaque op ``seda_fast::name`` with its reference implementation and its fake.

    Args:
        schema: arguments and results in PyTorch's schema language, as in ``"(Tensor x) -> Tensor"``.
        reference: takes the op's arguments, runs on every device.
        fake: result shapes and dtypes without data, for `torch.compile`.
        autocast: places of the arguments that a `torch.autocast` region casts to its dtype.
        rows: places of timesteps and of a table whose rows they are. On a CPU the reference is not given any others,
            of which PyTorch would take the negative ones for rows from the end.

    Returns:
        The op's only overload, ``torch.ops.seda_fast.NAME.default``.
    """
    qualified = f"seda_fast::{name}"
    torch.library.define(qualified, schema)
    implement(name, "reference", reference)

    def kernel(device_type: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if forward_ad._current_level >= 0:
                # Of an op without such a derivative PyTorch drops the tangents, and a Jacobian would be 0.
                raise RuntimeError(
                    f"{name} has no forward-mode derivative, so it does not run inside torch.func.jvp, jacfwd or "
                    "torch.autograd.forward_ad; reverse mode (torch.autograd.grad) and the functions of "
                    "seda_fast.reference do"
                )
            first = args[0]
            if isinstance(first, (list, tuple)):
                if not first:
                    raise ValueError(f"{op._schema.arguments[0].name} must hold at least one tensor")
                first = first[0]
            backend, implementation = choose(name, device_type, first.dtype)
            if rows is not None and backend == "reference" and device_type == "cpu":
                _refuse_other_rows(args[rows[0]], len(args[rows[1]]))
            return implementation.function(*args, **kwargs)

        return run

    for device_type in ("cpu", "cuda"):
        torch.library.impl(qualified, device_type, kernel(device_type))
    torch.library.register_fake(qualified, fake)
    op = getattr(torch.ops.seda_fast, name).default
    if autocast:
        for device_type in ("cpu", "cuda"):
            rule = _autocasting(op, device_type, frozenset(autocast))
            torch.library.impl(qualified, f"Autocast{device_type.upper()}", rule)
    return op  # type: ignore[no-any-return]


def _refuse_other_rows(timesteps: Tensor, count: int) -> None:
    outside = (timesteps < 0) | (timesteps >= count)
    if outside.any():
        place = int(outside.int().argmax())
        raise ValueError(f"timesteps[{place}] is {int(timesteps[place])}, outside 0 .. {count - 1}")


def _autocasting(op: Callable[..., Any], device_type: str, places: Collection[int]) -> Callable[..., Any]:
    """What a call of ``op`` means inside a `torch.autocast` region.

    `torch.library.register_autocast` would cast every floating argument, the schedule's tables and the row statistics
    too, and to one dtype fixed beforehand.
    """

    def cast(value: Any, dtype: torch.dtype) -> Any:
        if isinstance(value, (list, tuple)):
            return [cast(one, dtype) for one in value]
        # As PyTorch's own rule has it: float64 is left alone.
        eligible = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
        return value.to(dtype) if eligible else value

    def run(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)
        given = [cast(value, dtype) if place in places else value for place, value in enumerate(args)]
        with torch.autocast(device_type, enabled=False):
            return op(*given)

    return run


class _OnlyOnce(torch.autograd.Function):
    """Lets gradients through; whoever differentiates them is told that this operation has no second derivative."""

    @staticmethod
    def forward(ctx: Any, name: str, anchors: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        return tuple(gradient.view_as(gradient) for gradient in tensors[anchors:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            f"{ctx.name} cannot be differentiated twice: its gradients come of a formula of their own, which has none; "
            "the functions of seda_fast.reference can"
        )


def differentiable_once(name: str, backward: Callable[..., Any]) -> Callable[..., Any]:
    """``backward`` of the operation ``name`` for `torch.library.register_autograd`, refusing a second derivative.

    It is called as ``backward(ctx, saved, *grads)``: `torch.utils.checkpoint` lets the saved tensors be read once.

    Saved gradients and opaque backward ops look like constants to autograd, which would leave out their part of a
    Hessian without a word. Gradients themselves may be asked for with ``create_graph=True``. All operands that have
    gradients must be saved, needed again or not.
    """

    @wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> Any:
        saved = ctx.saved_tensors
        with torch.no_grad():
            found = backward(ctx, saved, *grads)
        if not torch.is_grad_enabled():
            return found
        # All that a gradient may be asked for with respect to: autograd goes no way that does not lead there.
        anchors = [t for t in (*grads, *saved) if t is not None and t.requires_grad]
        leaves, structure = pytree.tree_flatten(found)
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        given = (*anchors, *(leaves[i] for i in places))
        marked = _OnlyOnce.apply(name, len(anchors), *given)  # type: ignore[no-untyped-call]
        for i, gradient in zip(places, marked, strict=True):
            leaves[i] = gradient
        return pytree.tree_unflatten(leaves, structure)

    return run


def as_counter(value: int | Tensor, name: str, device: torch.device) -> Tensor:
    """A seed or step as an int64 tensor of shape () on ``device``; Python ints are wrapped.

    Raises:
        ValueError: it is neither an int of 64 bits nor an int64 tensor of shape () on ``device``.
    """
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"{name} must be in -2**63 .. 2**63 - 1, not {value}")
        # Filled on the device: `torch.tensor` would copy from the host's memory, which no graph can capture.
        return torch.full((), value, dtype=torch.int64, device=device)
    if not isinstance(value, Tensor) or value.dtype != torch.int64 or value.shape != ():
        raise ValueError(f"{name} must be an int or an int64 tensor of shape (), not {describe(value)}")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device} but the operands are on {device}")
    return value


def check_tensor(
    value: object, name: str, shape: tuple[int | None, ...], device: torch.device | None, dtypes: str
) -> None:
    """Refuse a tensor argument that has the wrong shape, device or kind of dtype.

    Args:
        shape: expected sizes, None where any size goes.
        device: where it must lie; None for the first operand, whose device the others share.
        dtypes: "floating" or "integer" (int32 or int64) or "int64".

    Raises:
        ValueError: one sentence that names the argument.
    """
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor, not {describe(value)}")
    # A chain's call checks 27: those whose every size is given, which most are, are compared at once.
    sizes, dtype = value.shape, value.dtype
    fits = sizes == shape or (
        len(sizes) == len(shape) and all(want is None or have == want for have, want in zip(sizes, shape, strict=True))
    )
    if not fits:
        wanted = "(" + ", ".join("any" if n is None else str(n) for n in shape) + ")"
        raise ValueError(f"{name} must have shape {wanted}, not {tuple(sizes)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} is on {value.device} but the operands are on {device}")
    if dtypes == "floating":
        allowed = dtype.is_floating_point
    else:
        allowed = dtype is torch.int64 or (dtypes == "integer" and dtype is torch.int32)
    if not allowed:
        raise ValueError(f"{name} must be {dtypes}, not {dtype}")


def check_stream(stream: int) -> None:
    """Refuse a stream id outside 0 .. 255 (one byte of the counter)."""
    if not 0 <= stream <= 255:
        raise ValueError(f"stream must be in 0 .. 255, not {stream}")


def describe(value: object) -> str:
    """What an argument is, for an error sentence."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    return type(value).__name__
