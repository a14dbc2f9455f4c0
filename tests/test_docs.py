"""The documentation's examples run as written, in their order; its links, commands and options are there."""

import dataclasses
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from seda_fast import FeatureSet, SeDA, __version__, train, use_backend
from seda_fast.ops import cpp_status

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)


WITH_PYTHON = [page for page in DOCS if blocks(page.read_text(encoding="utf-8"), "python")]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.stem)
def test_python_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a page share their names, as a reader's session would."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for number, example in enumerate(blocks(page.read_text(encoding="utf-8"), "python"), 1):
        exec(compile(example, f"{page.name}, example {number}", "exec"), names)


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.stem)
def test_links_lead_to_files_that_are_there(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.stem)
def test_commands_and_their_options_exist(page: Path) -> None:
    for block in blocks(page.read_text(encoding="utf-8"), ""):
        for line in block.splitlines():
            if not line.startswith("python -m seda_fast."):
                continue
            words = shlex.split(line, comments=True)
            command = importlib.import_module(words[2])
            sections = [kind for kind in vars(command).values() if dataclasses.is_dataclass(kind)]
            known = {"--" + field.name.replace("_", "-") for kind in sections for field in dataclasses.fields(kind)}
            unknown = {word for word in words[3:] if word.startswith("--")} - known
            assert not unknown, f"{page.name}: {line}"


def test_the_api_page_is_what_the_docstrings_say(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    pytest.importorskip("griffe2md", reason=f"{request.node.nodeid} needs griffe2md")
    command = [sys.executable, str(ROOT / "docs" / "make_api.py"), str(tmp_path / "api.md")]
    subprocess.run(command, check=True, cwd=tmp_path)
    written, kept = ((folder / "api.md").read_text(encoding="utf-8") for folder in (tmp_path, ROOT / "docs"))
    assert written == kept, "the docstrings have changed: make api"


@pytest.mark.slow
def test_results_differ_between_backends_as_troubleshooting_says(tmp_path: Path) -> None:
    """On the digits: by rounding between C++ and the definition (9.5e-7 after whole training), between batches not at
    all."""
    if cpp_status()["reason"] is not None:
        pytest.skip("test_results_differ_between_backends_as_troubleshooting_says needs the C++ operators")
    command = ["--data", "digits", "--out", str(tmp_path / "run"), "--no-baselines", "--epochs", "3", "--device", "cpu"]
    assert train.main(command) == 0
    model, digits = SeDA.from_pretrained(tmp_path / "run"), FeatureSet.load("digits")
    visual, ids = torch.from_numpy(digits.visual_test), torch.from_numpy(digits.ids_test)
    with torch.no_grad():
        ours = model.predict_log_proba(visual, ids)
        with use_backend("reference"):
            defined = model.predict_log_proba(visual, ids)
        assert 0 < (ours - defined).abs().max() < 1e-5
        assert torch.equal(ours.argmax(1), defined.argmax(1))
        for size in (1, 7, 64):
            parts = zip(visual.split(size), ids.split(size), strict=True)
            assert torch.equal(torch.cat([model.predict_log_proba(*part) for part in parts]), ours)


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\((\w+\.md)\)", index)) == {page.name for page in DOCS} - {"README.md"}


def test_citation_and_changelog_name_this_version(request: pytest.FixtureRequest) -> None:
    yaml = pytest.importorskip("yaml", reason=f"{request.node.nodeid} needs pyyaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "license"} <= set(citation)
    assert citation["version"] == __version__
    assert citation["references"][0]["identifiers"][0]["value"] == "arXiv:2505.05721"
    assert __version__ in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
