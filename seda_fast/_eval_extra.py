"""Imported first by commands that evaluate: what is missing of the extra ``eval`` is one sentence, not a traceback."""

from ._extras import need

need("eval", "matplotlib", "scipy", "sklearn", "tomli_w")
