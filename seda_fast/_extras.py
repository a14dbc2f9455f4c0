"""What a command needs of an optional extra, said in one sentence where it is missing."""

import importlib.util
import sys


def need(extra: str, *modules: str) -> None:
    """End the process with code 2 where one of ``modules`` is not installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        command = f"pip install 'seda_fast[{extra}]'"
        print(f"{', '.join(missing)} not installed; this command needs: {command}", file=sys.stderr)
        raise SystemExit(2)
