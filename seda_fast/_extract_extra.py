"""Imported first by ``extract``: what is missing of the extra of that name is one sentence, not a traceback.

The libraries of models are looked for where a model is of one.
"""

from ._extras import need

need("extract", "PIL", "matplotlib", "scipy", "sklearn", "tomli_w")
