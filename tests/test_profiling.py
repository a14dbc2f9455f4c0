"""The profile of a run: a trace that can be opened, shares that add up, and the same results as without."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.autograd import DeviceType

from seda_fast import train
from seda_fast.profiling import Profile, profiled, shares


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


def event(key: str, device: DeviceType, cpu: float, gpu: float, annotation: bool = False) -> SimpleNamespace:
    times = {"self_cpu_time_total": cpu, "self_device_time_total": gpu}
    return SimpleNamespace(key=key, device_type=device, is_user_annotation=annotation, **times)


def test_on_a_gpu_each_kernel_counts_once() -> None:
    """As PyTorch lists a step: operations carry their kernels' time, kernels stand beside them, spans cover both."""
    events = [
        event("ProfilerStep*", DeviceType.CPU, 50, 0, annotation=True),
        event("aten::mm", DeviceType.CPU, 30, 60),
        event("aten::add", DeviceType.CPU, 10, 20),
        event("Optimizer.step#AdamW.step", DeviceType.CPU, 10, 0, annotation=True),
        event("ProfilerStep*", DeviceType.CUDA, 0, 80, annotation=True),
        event("Optimizer.step#AdamW.step", DeviceType.CUDA, 0, 15, annotation=True),
        event("gemm_kernel", DeviceType.CUDA, 0, 45),
        event("gemm_kernel", DeviceType.CUDA, 0, 15),
        event("Memcpy DtoD", DeviceType.CUDA, 0, 20),
    ]
    assert shares(events, cuda=True) == {"gemm_kernel": 0.75, "Memcpy DtoD": 0.25}
    assert shares(events, cuda=False) == {"aten::mm": 0.75, "aten::add": 0.25}


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
