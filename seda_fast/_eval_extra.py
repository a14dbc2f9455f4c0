"""Imported first by commands that evaluate: what is missing of the extra ``eval`` is one sentence, not a traceback."""

import importlib.util
import sys

_MISSING = [name for name in ("matplotlib", "scipy", "sklearn", "tomli_w") if importlib.util.find_spec(name) is None]
if _MISSING:
    print(f"{', '.join(_MISSING)} not installed; this command needs: pip install 'seda_fast[eval]'", file=sys.stderr)
    raise SystemExit(2)
