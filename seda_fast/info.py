"""``python -m seda_fast.info``: versions, devices, and which implementation serves each operation, in one screen."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from . import __version__
from .command import run, settings_of
from .config import SeDAConfig, check_types, setting
from .nn import STEPWISE
from .ops import BACKENDS, attention_choice, choose, cpp_status, cuda_status, operations, refusal

PROGRAM = "seda_fast.info"
PACKAGES = ("torch", "triton", "xformers", "numpy", "safetensors", "scikit-learn", "matplotlib")


# Classes that the attention to class texts is measured with.
_CLASSES = 100


@dataclass(frozen=True, kw_only=True)
class InfoConfig:
    """What is told, and how."""

    dtype: Literal["float32", "bfloat16", "float16"] = setting(
        "float32", "the operations' implementations for which dtype"
    )
    json: bool = setting(False, "print one JSON object instead of text, for a bug report or a script")

    def __post_init__(self) -> None:
        check_types(self)


def version_of(package: str) -> str:
    """The installed version, or that there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def devices() -> list[str]:
    """One line a device that PyTorch can use."""
    lines = [f"cpu: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"]
    if not torch.cuda.is_available():
        built = torch.version.cuda
        return [*lines, "cuda: none found" if built else "cuda: this PyTorch was built without CUDA"]
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        lines.append(f"cuda:{i}: {p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB")
    return lines


def _device_types() -> tuple[str, ...]:
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def operation_lines(dtype: torch.dtype) -> list[str]:
    """One line an operation: who serves it on each device now. Its gradient has a line where another serves that."""
    served = {
        op: ", ".join(f"{device}: {choose(op, device, dtype)[0]}" for device in _device_types()) for op in operations()
    }
    lines = []
    for op, by_device in served.items():
        forward = op.removesuffix("_backward")
        if forward != op and served.get(forward) == by_device:
            continue
        both = served.get(f"{op}_backward") == by_device
        lines.append(f"{op + ' and its gradient' * both:<38} {by_device}")
    return lines


def memory_lines(dtype: torch.dtype) -> list[str]:
    """Which attention a model with class texts would use on each device, measured now, and how it predicts."""
    default = SeDAConfig(visual_dim=1, text_dim=1, n_classes=_CLASSES)
    sizes = {"classes": _CLASSES, "width": default.width, "heads": default.memory_heads}
    chosen = ((device, attention_choice(device, dtype, **sizes)) for device in _device_types())
    lines = [f"attention, {device}: {choice.used} ({choice.reason})" for device, choice in chosen]
    lines.append(f"reverse chain: step by step ({STEPWISE})")
    return [part for line in lines for part in textwrap.wrap(line, width=110, subsequent_indent="  ")]


def unavailable_lines() -> list[str]:
    """Which backends cannot run here, and why; a reason shared by several operations is told once."""
    reasons: dict[str, list[str]] = {}
    for op in operations():
        for backend in BACKENDS[1:]:
            for device in _device_types():
                reason = refusal(op, backend, device)
                if reason is not None:
                    reasons.setdefault(f"{backend} on {device}: {reason}", []).append(op)
    return [
        line
        for text, ops in reasons.items()
        for line in textwrap.wrap(
            f"{text} ({len(ops)} operation{'s' * (len(ops) != 1)})", width=110, subsequent_indent="  "
        )
    ]


def extension_lines() -> list[str]:
    """What was compiled, for what, and what each half serves."""
    cpu, cuda = cpp_status(), cuda_status()
    if "build" in cpu:
        lines = [f"C++ for the CPU: {cpu['build']['compiler']}; {', '.join(cpu['build']['instruction_sets'])}"]
        lines += [f"matrix products on the CPU: {cpu['products']}"]
    else:
        found = importlib.util.find_spec("seda_fast._C") is not None
        lines = [f"seda_fast._C {'found, not used' if found else 'not built'}"]
    if cuda["build"]:
        lines += [f"CUDA: {cuda['build']['compiler']}; sm_{', sm_'.join(cuda['build']['architectures'])}"]
        lines += [f"CUDA, {operation}: {rule}" for operation, rule in cuda["rules"].items()]
    elif cuda["missing"] is not None:
        lines += [f"CUDA: not built: {cuda['missing']}"]
    return [part for line in lines for part in textwrap.wrap(line, width=110, subsequent_indent="  ")]


def report(config: InfoConfig) -> dict[str, list[str]]:
    """The lines of each part, by its title."""
    return {
        "packages": [f"{package:<14} {version_of(package)}" for package in PACKAGES],
        "devices": devices(),
        "compiled extension": extension_lines(),
        f"operations ({config.dtype})": operation_lines(getattr(torch, config.dtype)),
        f"models with class texts ({config.dtype}, {_CLASSES} classes)": memory_lines(getattr(torch, config.dtype)),
        "not available here": unavailable_lines(),
    }


def as_text(head: str, parts: Mapping[str, Sequence[str]]) -> str:
    """One screen."""
    lines = [head]
    for title, content in parts.items():
        if content:
            lines += ["", title, *(f"  {line}" for line in content)]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, or 2 with one sentence on stderr."""

    def body() -> None:
        config = InfoConfig(**settings_of(PROGRAM, __doc__, {"info": InfoConfig}, argv)["info"])
        head = f"seda_fast {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"
        parts = report(config)
        print(json.dumps({"seda_fast": head, **parts}, indent=1) if config.json else as_text(head, parts))

    return run(body, PROGRAM)


if __name__ == "__main__":
    sys.exit(main())
