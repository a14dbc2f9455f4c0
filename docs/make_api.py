"""Write docs/api.md from the docstrings: ``python docs/make_api.py [FILE]``, or ``make api``."""

import ast
import logging
import re
import sys
from pathlib import Path
from typing import Any

import griffe
from griffe2md import render_object_docs

ROOT = Path(__file__).resolve().parents[1]
# What a user meets, by the module that it is imported from.
PUBLIC = {
    "seda_fast": ["SeDA", "SeDAConfig", "TrainConfig", "FeatureSet", "SeDAClassifier", "use_backend", "DataError"],
    "seda_fast.ops": [
        "q_sample",
        "interaction_block",
        "interaction_network",
        "semantic_projection",
        "reverse_chain",
        "ChainWeights",
    ],
    "seda_fast.nn": ["PFIN", "NoiseSchedule", "Sampler", "Losses"],
    "seda_fast.loop": ["Trainer", "TrainingSet", "Epoch", "Keeping", "train"],
}
HEAD = """# API

Made from the docstrings by `make api`; a test keeps it in step with them. Formulas and symbols are those of
[method.md](method.md); shapes are in brackets, B rows, D features, K classes.
"""
OPTIONS: dict[str, Any] = {
    "heading_level": 3,
    "show_root_full_path": False,
    "show_category_heading": False,
    "summary": False,
    "docstring_section_style": "list",
    "members_order": "source",
    "filters": ["!^_"],
    "show_if_no_docstring": False,
    "line_length": 100,
}


def explain(settings: Any) -> None:
    """Give each field of a settings class its own default and sentence, which stand in `setting(default, sentence)`."""
    for parameter in settings.members["__init__"].parameters:
        call = ast.parse(str(parameter.default), mode="eval").body
        if isinstance(call, ast.Call):
            default, sentence = (ast.literal_eval(argument) for argument in call.args[:2])
            parameter.default = repr(default)
            field = settings.members[parameter.name]
            field.value, field.docstring = repr(default), griffe.Docstring(sentence + ".", parent=field)


def page() -> str:
    """The whole page."""
    # One name for two parameters ("seed, draw") is what our docstrings do and griffe warns of.
    logging.getLogger("griffe").setLevel(logging.ERROR)
    package = griffe.load("seda_fast", search_paths=[str(ROOT)], docstring_parser="google")
    for settings in ("SeDAConfig", "TrainConfig"):
        explain(package["config"][settings])
    parts = [HEAD]
    for module, names in PUBLIC.items():
        parts.append(f"## {module}\n")
        for name in names:
            # SeDAClassifier is imported on first use, which no static reader sees.
            path = "estimator.SeDAClassifier" if name == "SeDAClassifier" else f"{module}.{name}"[len("seda_fast.") :]
            found = package[path]
            # An operation and its module share a name.
            found = found[name] if found.is_module else found
            parts.append(render_object_docs(found.final_target if found.is_alias else found, OPTIONS).strip() + "\n")
    text = "\n".join(parts)
    # Signatures are not examples, and are not run as such; types have no place here that a link could lead to.
    text = re.sub(r"\[([^\[\]]+)\]\(#[\w.]+\)", r"\1", text.replace("```python\n", "```py\n"))
    # `seda_fast.nn.seda.SeDA.align` is SeDA.align to its user.
    return re.sub(r"^(#+) `seda_fast\.[\w.]*?(\w+\.\w+)`$", r"\1 `\2`", text, flags=re.MULTILINE)


if __name__ == "__main__":
    Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "docs" / "api.md").write_text(page(), encoding="utf-8")
