"""The C++ backend: whether the operators of csrc/cpu are here, why not, and which dtypes they serve."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import mmap
import os
import struct
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ._dispatch import implement

# The operators read float32 and bfloat16 and calculate in float32.
DTYPES = (torch.float32, torch.bfloat16)
PRODUCTS_RULE = "own: float32 on AMD from AVX2 on, 64 rows or more; else PyTorch's"
RULE = "float32 and bfloat16, the same for all operands of a call; the rest goes to the reference"

_OPERATORS = (
    "box_muller",
    "centre_backward",
    "gated_residual",
    "gated_residual_backward",
    "gated_silu",
    "gated_silu_backward",
    "gradient_norm",
    "interaction_network",
    "interaction_network_backward",
    "logits_block",
    "logits_block_backward",
    "matrix_product",
    "modulated_norm",
    "modulated_norm_backward",
    "projection_losses",
    "q_sample",
    "q_sample_backward",
    "read_rows",
    "reverse_chain",
    "weight_update",
)
_FUNCTIONS = ("cpu_features", "own_products")
_LIBRARY = "libseda_fast_cpu.so"
_REPORT = "_build.json"
PACKAGE = __name__.partition(".")[0]


def _read(file: Path) -> dict[str, Any]:
    """A build's report.

    Raises:
        ImportError: it is not what a build writes.
    """
    try:
        read: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        parts = [read.get(part, {}) for part in ("missing", "bytes", "cuda")]
    except (OSError, ValueError, AttributeError) as error:
        raise ImportError(f"{file} is damaged: {error}") from None
    if not all(isinstance(part, dict) for part in parts):
        raise ImportError(f"{file} is damaged: it is not a build's report")
    return read


@functools.cache
def _find_report() -> tuple[dict[str, Any], str | None]:
    """The report and, where there is one that cannot be read, why."""
    spec = importlib.util.find_spec(f"{PACKAGE}._C")
    # A checkout may borrow an installed copy's extension, and have a report of its own that tells of another.
    package: list[str] = list(importlib.import_module(PACKAGE).__path__)
    folders = map(Path, package) if spec is None or spec.origin is None else [Path(spec.origin).parent]
    try:
        return next((_read(folder / _REPORT) for folder in folders if (folder / _REPORT).is_file()), {}), None
    except ImportError as error:
        return {}, str(error)


def report() -> dict[str, Any]:
    """What the build left beside the package's files; empty where nothing was built or `damage` says why."""
    return _find_report()[0]


def damage() -> str | None:
    """Why the build's report cannot be read, or None; without it no library can be told from a damaged one."""
    return _find_report()[1]


def _told_length(file: Path) -> int | None:
    """Bytes that a 64-bit ELF file must have by its own header, also when tools have rewritten it; None for others."""
    if file.stat().st_size == 0:
        return None
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:5] != b"\x7fELF\x02":
            return None
        if len(data) < 64:
            return 64
        order = ">" if data[5] == 2 else "<"
        segments, sections, n_segments, section, n_sections = struct.unpack(f"{order}32x2Q8x3H2x", data[:64])
        table = data[segments : segments + 56 * n_segments]
        ends: list[int] = [segments + 56 * n_segments]
        ends += map(sum, struct.iter_unpack(f"{order}8xQ16xQ16x", table[: len(table) // 56 * 56]))
        if sections:
            # More sections than the header has room for are counted in the first one's size.
            (first,) = struct.unpack(f"{order}32xQ24x", data[sections : sections + 64].ljust(64, b"\0"))
            ends.append(sections + section * max(n_sections or first, 1))
        return max(ends)


def check_whole(file: Path) -> None:
    """Loading a file that was cut short ends the process with a bus error, so its length is compared first.

    An ELF file tells its own, which strip and patchelf change; others must have the size that the build wrote.

    Raises:
        ImportError: it is too short, or is not of the build that the report tells of at all.
    """
    size = report().get("bytes", {}).get(file.name)
    found = file.stat().st_size
    if size is None:
        raise ImportError(f"{file} is not of the build that {_REPORT} beside it tells of; install the package again")
    told = _told_length(file)
    if told is None and found != size:
        raise ImportError(f"{file} is damaged: it has {found} bytes, the build wrote {size}")
    if told is not None and found < told:
        raise ImportError(f"{file} is damaged: it has {found} bytes, its own header tells of {told}")


def wrong_switch(features: Mapping[str, bool]) -> str | None:
    """What is wrong with the variables that choose among the operators' code, or None; ``features`` by this CPU."""
    isa, products = (os.environ.get(f"SEDA_FAST_CPU_{name}", "") for name in ("ISA", "PRODUCTS"))
    if isa and not features.get(isa, False):
        return f"SEDA_FAST_CPU_ISA={isa} is none of this CPU's: {', '.join(filter(features.get, features))}"
    if products not in ("", "own", "pytorch"):
        return f"SEDA_FAST_CPU_PRODUCTS={products} is neither own nor pytorch"
    return None


def _load_extension() -> ModuleType | None:
    """``seda_fast._C`` with its operators registered, or None where the last build did not make it.

    Raises:
        ImportError, OSError: it is there but cannot be loaded.
    """
    if damage() is not None:
        raise ImportError(damage())
    spec = importlib.util.find_spec(f"{PACKAGE}._C")
    if spec is None or spec.origin is None or "cpu" in report().get("missing", {}):
        return None
    library = Path(spec.origin).parent / _LIBRARY
    for file in (Path(spec.origin), library):
        check_whole(file)
    module = importlib.import_module(f"{PACKAGE}._C")
    torch.ops.load_library(str(library))
    # The module may be of an earlier build than the library, which another Python's install has made anew.
    old = [name for name in _FUNCTIONS if not hasattr(module, name)]
    old += [name for name in _OPERATORS if not hasattr(torch.ops.seda_fast_cpp, name)]
    if old:
        raise ImportError(f"it was built from other sources (no {', '.join(old)}); install the package again")
    return module


def _load() -> tuple[ModuleType | None, str | None]:
    """The extension module and the reason why its operators are not usable; one of the two is None."""
    try:
        module = _load_extension()
    except (ImportError, OSError) as error:
        reason = f"it cannot be loaded: {error.__cause__ or error}"
    else:
        if module is None:
            missing = report().get("missing", {}).get("cpu")
            return None, "it was not built" if missing is None else f"it was not built: {missing}"
        wrong = wrong_switch(module.cpu_features())
        if wrong is None:
            return module, None
        reason = f"it is left out: {wrong}"
    warnings.warn(f"seda_fast runs without its C++ operators; {reason}", RuntimeWarning, stacklevel=4)
    return None, reason


_module, _reason = _load()


def unavailable(device_type: str) -> str | None:
    """Why the C++ operators cannot run on a device type, or None when they can."""
    if _reason is not None:
        return f"the C++ half is missing: {_reason}"
    return None if device_type == "cpu" else "it has code for the CPU only"


def implement_with_cpp(
    op: str,
    function: Callable[..., Any],
    operands: slice | tuple[int, ...],
    reference: Callable[..., Any],
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> None:
    """Register ``function`` for ``op`` on the CPU.

    ``operands`` says which arguments must share one dtype of ``dtypes`` (integer ones and None aside); a call that
    mixes dtypes goes to ``reference``, which promotes or refuses as PyTorch does.
    """

    places = range(*operands.indices(operands.stop)) if isinstance(operands, slice) else operands

    def run(*args: Any) -> Any:
        return (function if _share_a_dtype([args[place] for place in places]) else reference)(*args)

    # One operand shares its dtype with itself.
    chosen = function if operands == slice(1) else run
    implement(op, "cpp", chosen, devices=("cpu",), unavailable=unavailable, dtypes=dtypes)


def _share_a_dtype(arguments: Iterable[Any]) -> bool:
    flat = (t for a in arguments for t in (a if isinstance(a, list | tuple) else (a,)))
    dtypes = {t.dtype for t in flat if isinstance(t, Tensor) and t.dtype.is_floating_point}
    return len(dtypes) == 1 and dtypes <= set(DTYPES)


def rows(tensor: Tensor) -> Tensor:
    """The tensor with each row's elements side by side, as the operators read it; itself where it is so already."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def contiguous(arguments: Iterable[Any]) -> list[Any]:
    """The same arguments with every tensor contiguous."""
    return [a.contiguous() if isinstance(a, Tensor) else a for a in arguments]


def table(tensor: Tensor) -> Tensor:
    """A vector or a small table as the operators read it: float32, each row's elements side by side."""
    return rows(tensor if tensor.dtype is torch.float32 else tensor.to(torch.float32))


def product(a: Tensor, b: Tensor, bias: Tensor | None = None, out: Tensor | None = None, adds: bool = False) -> Tensor:
    """``a @ b`` (+ bias) of one dtype, in ``out`` or new memory; with ``adds`` on top of what ``out`` has.

    float32 by the extension, which knows the faster code for this CPU (``products`` of `status`), bfloat16 by PyTorch.
    """
    if a.dtype is torch.float32:
        # `contiguous` leaves a matrix of one element the strides that it has.
        a, b = (m if 1 in m.stride() else m.clone(memory_format=torch.contiguous_format) for m in (a, b))
        out = a.new_empty(a.shape[0], b.shape[1]) if out is None else out
        if a.shape[1] > 0:
            bias = bias if bias is None else bias.contiguous()
            torch.ops.seda_fast_cpp.matrix_product(a, b, bias, adds, False, out)
            return out
    if adds and out is not None:
        return out.add_(torch.mm(a, b))
    return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)


def status() -> dict[str, Any]:
    """What `seda_fast.info` shows of the C++ half.

    Returns:
        ``available``: bool; ``reason``: why not, or None; ``rule``: the dtypes it serves; and where it is built
        ``build``: compiler, flags, architectures, instruction sets, PyTorch headers and ABI version, as a dict;
        ``cpu_features``: instruction set to whether this CPU has it; ``products``: whose products of float32 matrices
        are used, and by which rule.
    """
    shown: dict[str, Any] = {"available": _reason is None, "reason": _reason, "rule": RULE}
    if _module is not None:
        build = {part: told for part, told in report().items() if part != "bytes"}
        # The module's own report may be of an earlier build than the libraries beside it.
        shown |= {"build": build, "cpu_features": _module.cpu_features()}
        shown["products"] = f"{'seda_fast' if _module.own_products() else 'PyTorch'}'s ({PRODUCTS_RULE})"
    return shown
