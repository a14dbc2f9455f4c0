"""The documentation's examples run as written, in their order; its links, commands and options are there."""

import dataclasses
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from seda_fast import __version__

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
