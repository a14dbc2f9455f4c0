"""What the commands share: settings from defaults, a TOML file and the command line; exit codes; progress.

Settings are the fields of dataclasses; a field is the flag ``--field-name`` and the key ``field_name`` of its section.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import io
import os
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import torch
from tqdm import tqdm

from .config import ConfigError
from .files import DataError
from .interrupt import Interrupted, Interrupts
from .loop import TrainingError
from .ranks import RankLost

BAD_INPUT = 2
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
# What helps a command whose memory ran out.
_FOR_MEMORY = {
    "seda_fast.train": "give a smaller --batch-size or a smaller model, or --precision bf16 on a GPU",
    "seda_fast.extract": "give a smaller --batch-size",
}


class Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one sentence and exits with 2; it takes no shortened options, which
    a new option could make ambiguous."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: {message} (--help shows the options)\n")


def add_settings(parser: argparse.ArgumentParser, section: str, config: type, *, skip: Sequence[str] = ()) -> None:
    """Add a flag for each field of a dataclass; an absent flag leaves no trace, so that the file can speak."""
    group = parser.add_argument_group(section)
    hints = get_type_hints(config)
    for field in dataclasses.fields(config):
        if field.name in skip:
            continue
        hint, flag = hints[field.name], "--" + field.name.replace("_", "-")
        options: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS}
        default = f" (default: {field.default})" if field.default != "" else ""
        options["help"] = (field.metadata["help"] + default).replace("%", "%%")
        if hint is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(hint) is Literal:
            options["choices"] = get_args(hint)
        else:
            options.update(type=hint, metavar={int: "N", float: "X"}.get(hint, "TEXT"))
        group.add_argument(flag, **options)


def read_settings(path: Path, sections: Mapping[str, type]) -> dict[str, dict[str, Any]]:
    """The settings of a TOML file by section.

    Raises:
        ConfigError: the file cannot be read, or a section or key is unknown.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a TOML file ({error})") from error
    for section, values in content.items():
        if section not in sections:
            raise ConfigError(f"{path}: unknown section [{section}]; known are {', '.join(sections)}")
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: {section} must be a section of settings")
        known = {field.name for field in dataclasses.fields(sections[section])}
        for key in values:
            if key not in known:
                raise ConfigError(f"{path}: unknown setting {key!r} in [{section}]")
    return content


def settings_of(
    program: str,
    description: str | None,
    sections: Mapping[str, type],
    argv: Sequence[str] | None,
    *,
    skip: Sequence[str] = (),
) -> dict[str, dict[str, Any]]:
    """What is set beyond the defaults, by section: the TOML file of ``--config``, overruled by the command line.

    Raises:
        ConfigError: the file cannot be read, or a section or key is unknown. (Bad arguments exit with 2.)
    """
    parser = Parser(prog=f"python -m {program}", description=(description or "").split("\n\n")[0])
    names = ", ".join(f"[{section}]" for section in sections)
    parser.add_argument("--config", type=Path, metavar="FILE.toml", help=f"settings in TOML, in {names}")
    for section, config in sections.items():
        add_settings(parser, section, config, skip=skip)
    arguments = parser.parse_args(argv)
    file = read_settings(arguments.config, sections) if arguments.config else {}
    return merge(arguments, file, sections)


def merge(
    arguments: argparse.Namespace, file: Mapping[str, Mapping[str, Any]], sections: Mapping[str, type]
) -> dict[str, dict[str, Any]]:
    """Settings in force, as far as given: the file's, overruled by the command line's."""
    given = vars(arguments)
    return {
        section: {
            **file.get(section, {}),
            **{f.name: given[f.name] for f in dataclasses.fields(config) if f.name in given},
        }
        for section, config in sections.items()
    }


def choose_device(name: str) -> torch.device:
    """ "auto" is CUDA where there is a device, else the CPU.

    Raises:
        ConfigError: CUDA is asked for and there is none.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError("device is cuda but PyTorch finds no CUDA device; see python -m seda_fast.info")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and available) else "cpu")


def run(command: Callable[[], None], program: str) -> int:
    """Run a command's body; expected failures become one sentence on stderr and exit code 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A letter that the terminal's encoding lacks must not cost the table that it stands in.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with Interrupts():
            command()
        if sys.stdout is not None:  # closed by whoever started us
            sys.stdout.flush()
    except (DataError, ConfigError, TrainingError, RankLost) as error:
        report(program, str(error))
        return BAD_INPUT
    except Interrupted as stop:
        report(program, str(stop))
        return stop.exit_code
    except (MemoryError, RuntimeError) as error:
        lacking = out_of_memory(error)
        if lacking is None:
            raise
        report(program, f"{lacking}; {_FOR_MEMORY.get(program, 'fewer rows at a time need less')}")
        return BAD_INPUT
    except BrokenPipeError:
        # The reader of our output (head, less) has closed it; nothing is wrong and nobody is left to tell.
        _drop_output()
        return 0
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        report(program, f"the output cannot be written: {error.strerror}")
        _drop_output()
        return BAD_INPUT
    finally:
        _drop_what_nobody_heard()
    return 0


def _drop_output() -> None:
    """What is left of the output would fail once more when the process ends."""
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def _drop_what_nobody_heard() -> None:
    """What stderr has not taken would fail once more when the process ends, and change its exit code."""
    if sys.stderr is not None:
        try:
            sys.stderr.flush()
        except (OSError, ValueError):
            sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def out_of_memory(error: BaseException) -> str | None:
    """What memory was missing, where that is what went wrong. PyTorch has a class of error for a GPU's alone."""
    said = (str(error).splitlines() or [""])[0]
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in said:
        return said
    # All that PyTorch's stable C interface passes on from an allocation in one of our C++ operations.
    inside = said.startswith('torch_call_dispatcher( "aten::empty"') and "API call failed" in said
    return said or "memory ran out" if isinstance(error, MemoryError) else "memory ran out" if inside else None


def report(program: str, sentence: str) -> None:
    """A sentence on stderr; of several ranks, all but the first say which they are.

    One that nobody can hear (the reader of a pipe has gone, a log's disk is full) costs no work.
    """
    rank = os.environ.get("RANK", "0")
    who = program if rank == "0" else f"{program} (rank {rank})"
    if sys.stderr is not None:  # else print would take the standard output
        with suppress(OSError, ValueError):
            print(f"{who}: {sentence}", file=sys.stderr, flush=True)


def progress(total: int, label: str) -> tqdm[NoReturn]:
    """A progress bar on stderr, silent when that is not a terminal, and on all ranks but the first."""
    silent = True if os.environ.get("RANK", "0") != "0" or sys.stderr is None else None
    return tqdm(total=total, desc=label, disable=silent, leave=False, dynamic_ncols=True)


def split_settings(model_folder: Path) -> tuple[float, int] | None:
    """Share and seed of the split that a model was trained with, so that its test part is found again.

    From the folder's ``config.toml``; None without one.

    Raises:
        ConfigError: the file is there but cannot be used.
    """
    path = model_folder / "config.toml"
    if not path.exists():
        return None
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        return float(content["run"]["test_fraction"]), int(content["train"]["seed"])
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: not the settings of a training run ({error})") from error
