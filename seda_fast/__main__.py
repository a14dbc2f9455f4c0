"""``python -m seda_fast``: which commands there are; ``--version`` gives the version."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from . import __version__
from .command import Parser, run

COMMANDS = {
    "extract": "make features of images and captions",
    "train": "train SeDA and the baselines, evaluate, and write everything to one folder",
    "evaluate": "measure a saved model on the test part of a data set",
    "predict": "classes and aligned features of visual features, without any text",
    "report": "tell a training run in one HTML file",
    "export": "write the whole prediction as one graph that runs without this library",
    "info": "versions, devices, and which implementation serves each operation",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the commands; anything but ``--help`` and ``--version`` is refused with exit code 2."""
    return run(lambda: _show(argv), "seda_fast")


def _show(argv: Sequence[str] | None) -> None:
    parser = Parser(prog="seda_fast", description=__doc__, usage="python -m seda_fast.COMMAND [options]")
    parser.add_argument("--version", action="version", version=__version__)
    _, others = parser.parse_known_args(argv)
    if others:
        given = others[0]
        parser.error(f"give python -m seda_fast.{given}" if given in COMMANDS else f"unrecognized arguments: {given}")
    width = max(map(len, COMMANDS))
    print(f"seda_fast {__version__}; python -m seda_fast.COMMAND --help shows a command's options\n")
    print("\n".join(f"  {name:{width}}  {told}" for name, told in COMMANDS.items()))


if __name__ == "__main__":
    sys.exit(main())
