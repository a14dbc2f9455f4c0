"""Exported graphs give what the model gives, noise included, without this library."""

import json
import logging
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from seda_fast import DataError, SeDA, SeDAConfig, export
from seda_fast.data import VisualRows
from seda_fast.outputs import model_outputs

SEED = 7
NAMES = ["ash", "beech", "cedar", "oak"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small model whose every part speaks: both samplers, no weight at 0."""
    config = SeDAConfig(
        visual_dim=10, text_dim=7, n_classes=4, width=16, blocks=1, expansion=1, time_embedding=4, semantic_steps=2,
        textual_steps=2, classification_steps=1, noise_draws=1,
    )  # fmt: skip
    torch.manual_seed(0)
    made = SeDA(config, NAMES)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    made.visual_mean.normal_()
    made.visual_scale.uniform_(0.5, 2.0)
    return made.save_pretrained(tmp_path_factory.mktemp("model")).parent


@pytest.fixture(scope="module")
def program(model: Path) -> Path:
    assert export.main(["--model", str(model), "--seed", str(SEED), "--features"]) == 0
    return model / "model.pt2"


@pytest.fixture(scope="module")
def loaded(program: Path) -> tuple[torch.export.ExportedProgram, dict[str, Any]]:
    """The program as its user loads it, and what it says of itself."""
    files = {"seda_fast.json": ""}
    return torch.export.load(program, extra_files=files), json.loads(files["seda_fast.json"])


@pytest.fixture(scope="module")
def onnx(model: Path, request: pytest.FixtureRequest) -> Any:
    """An onnxruntime session of the exported model."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=f"{request.node.nodeid} needs {name}")
    assert export.main(["--model", str(model), "--seed", str(SEED), "--features", "--format", "onnx"]) == 0
    import onnxruntime

    return onnxruntime.InferenceSession(model / "model.onnx", providers=["CPUExecutionProvider"])


def rows(count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(count)
    return rng.normal(size=(count, 10)).astype(np.float32), rng.integers(0, 2**40, count)


def assert_as_predicted(model: Path, found: list[np.ndarray], visual: np.ndarray, ids: np.ndarray) -> None:
    """Against what the command ``predict`` writes."""
    expected = model_outputs(SeDA.from_pretrained(model), VisualRows(visual, None, None, ids, "test"), seed=SEED)
    log_proba, label, semantic, aligned, point = found
    assert log_proba.shape == (len(visual), 4)
    np.testing.assert_allclose(log_proba, expected.log_proba, atol=1e-4)
    np.testing.assert_array_equal(label, expected.log_proba.argmax(1))
    np.testing.assert_allclose(semantic, expected.semantic, atol=1e-4)
    np.testing.assert_allclose(aligned, expected.aligned, atol=1e-4)
    np.testing.assert_allclose(point, expected.aligned_point, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 5, 130])
def test_onnxruntime_predicts_as_the_command_does(model: Path, onnx: Any, count: int) -> None:
    visual, ids = rows(count)
    found = onnx.run(None, {"visual": visual, "sample_ids": ids})
    assert_as_predicted(model, found, visual, ids)


@pytest.mark.slow
def test_the_noise_is_in_the_graph(onnx: Any) -> None:
    visual, _ = rows(1)
    same = np.repeat(visual, 50, axis=0)
    aligned = onnx.run(["aligned"], {"visual": same, "sample_ids": np.arange(50)})[0]
    assert aligned.std(0).min() > 1e-3
    again = onnx.run(["aligned"], {"visual": same, "sample_ids": np.zeros(50, dtype=np.int64)})[0]
    assert np.ptp(again, axis=0).max() < 1e-5


@pytest.mark.slow
def test_onnx_file_describes_itself(model: Path, onnx: Any) -> None:
    assert [given.name for given in onnx.get_inputs()] == ["visual", "sample_ids"]
    assert tuple(given.name for given in onnx.get_outputs()) == export.OUTPUTS
    about = json.loads(onnx.get_modelmeta().custom_metadata_map["seda_fast"])
    assert about["class_names"] == NAMES
    assert about["seed"] == SEED
    assert b"/seda_fast/" not in (model / "model.onnx").read_bytes()


@pytest.mark.parametrize("count", [1, 130])
def test_program_predicts_as_the_command_does(model: Path, loaded: Any, count: int) -> None:
    visual, ids = rows(count)
    module = loaded[0].module()
    found = [tensor.detach().numpy() for tensor in module(torch.from_numpy(visual), torch.from_numpy(ids))]
    assert_as_predicted(model, found, visual, ids)


def test_program_runs_without_this_library(program: Path, tmp_path: Path) -> None:
    code = """
import sys, torch
program = torch.export.load(sys.argv[1])
log_proba = program.module()(torch.zeros(4, 10), torch.arange(4))[0]
assert "seda_fast" not in sys.modules
assert not [node for node in program.graph.nodes if "seda_fast" in str(node.target)]
print(tuple(log_proba.shape))
"""
    command = [sys.executable, "-c", code, str(program)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.split("\n")[0] == "(4, 4)"


def test_program_file_describes_itself(program: Path, loaded: Any) -> None:
    about = loaded[1]
    assert about["outputs"] == list(export.OUTPUTS)
    assert about["config"]["textual_steps"] == 2
    with zipfile.ZipFile(program) as archive:
        content = b"".join(archive.read(name) for name in archive.namelist())
    assert str(Path(export.__file__).parent).encode() not in content


def test_classes_that_no_text_shows_are_part_of_the_graph(model: Path, tmp_path: Path) -> None:
    made = SeDA.from_pretrained(model)
    made._mark_unseen(torch.tensor([1, 3]))
    made.save_pretrained(tmp_path)
    assert export.main(["--model", str(tmp_path), "--seed", str(SEED), "--features"]) == 0
    visual, ids = rows(9)
    module = torch.export.load(tmp_path / "model.pt2").module()
    found = [tensor.detach().numpy() for tensor in module(torch.from_numpy(visual), torch.from_numpy(ids))]
    assert_as_predicted(tmp_path, found, visual, ids)
    with pytest.raises(AssertionError):
        assert_as_predicted(model, found, visual, ids)


def test_a_graph_that_differs_is_not_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(export, "program_of", lambda *args: None)
    monkeypatch.setattr(export, "write_program", lambda path, *args: path.write_bytes(b"graph"))
    loaded = SeDA.from_pretrained(model)
    visual, ids = (torch.from_numpy(array) for array in export.example_inputs(loaded).values())
    right = [tensor.detach().numpy() for tensor in export.WholePrediction(loaded, 0, True)(visual, ids)]
    out = tmp_path / "model.pt2"
    for place, shift in enumerate((2e-4, 1, 2e-4, 2e-4, 2e-4)):
        wrong = [array + np.array(shift, array.dtype) if i == place else array for i, array in enumerate(right)]
        monkeypatch.setattr(export, "run_program", lambda path, inputs, wrong=wrong: wrong)
        assert export.main(["--model", str(model), "--out", str(out), "--features"]) == 2
        assert "the written graph" in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(export, "run_program", lambda path, inputs: [np.full_like(right[0], np.nan), *right[1:]])
    assert export.main(["--model", str(model), "--out", str(out)]) == 2
    monkeypatch.setattr(export, "run_program", lambda path, inputs: right)
    assert export.main(["--model", str(model), "--out", str(out)]) == 0
    assert out.read_bytes() == b"graph"


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--model", "nowhere"], "nowhere/model.safetensors: there is no such file"),
        (["--out", "model.onnx"], "--out model.onnx: the name must end in .pt2"),
        (["--format", "onnx", "--out", "model.pt2"], "--out model.pt2: the name must end in .onnx"),
        (["--model", ""], "model is missing"),
        (["--seed", "-1"], "seed must be in"),
    ],
)
def test_refusals_are_one_sentence(
    model: Path, arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export.main(["--model", str(model), *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert len(error.splitlines()) == 1


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"onnx and onnxscript not installed; .*pip install 'seda_fast\[export\]'"):
        export.write_onnx(tmp_path / "model.onnx", torch.nn.Module(), "")  # type: ignore[arg-type]
    assert export.run_onnx(tmp_path / "model.onnx", {}) is None
    assert logging.getLogger("torch.onnx").level in (logging.NOTSET, logging.ERROR)
