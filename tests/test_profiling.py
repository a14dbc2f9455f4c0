"""The profile of a run: a trace that can be opened, shares that add up, and the same results as without."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from seda_fast import train
from seda_fast.profiling import Profile, profiled


def test_a_profiled_run_prints_shares_and_writes_a_trace(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    data = tmp_path / "data.npz"
    np.savez(
        data,
        visual_train=rng.normal(size=(60, 8)),
        text_train=rng.normal(size=(60, 5)),
        label_train=np.arange(60) % 3,
    )
    arguments = ["--data", str(data), "--width", "16", "--blocks", "1", "--epochs", "2", "--batch-size", "16"]
    arguments += ["--diffusion-steps", "40", "--no-baselines", "--out"]
    assert train.main([*arguments, str(tmp_path / "plain")]) == 0
    assert "share of time" not in capfd.readouterr().out
    assert train.main([*arguments, str(tmp_path / "run"), "--profile"]) == 0
    shown = capfd.readouterr().out
    assert "share of time in 1 training steps" in shown
    assert "seda_fast::interaction_network" in json.dumps(json.loads((tmp_path / "run" / "trace.json").read_text()))
    assert not (tmp_path / "plain" / "trace.json").exists()
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "run")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("steps", [1, 2, 4, 6, 40])
def test_any_number_of_steps_has_a_profile(steps: int, tmp_path: Path) -> None:
    found = Profile({})
    with profiled(tmp_path / "trace.json", torch.device("cpu"), steps, found) as recorder:
        for _ in range(steps):
            torch.randn(64, 64) @ torch.randn(64, 64)
            recorder.step()
    assert found.steps == max(1, min(20, steps - 5))
    assert sum(found.shares.values()) == pytest.approx(1)
    assert found.shares["aten::mm"] > 0
    lines = found.table().splitlines()
    assert sum(float(line.split("%")[0]) for line in lines[1:]) == pytest.approx(100, abs=1)
