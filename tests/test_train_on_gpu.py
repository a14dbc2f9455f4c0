"""Whole runs on a GPU: each engine and precision by the command, predictions as on a CPU, a resumed run's bits."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from seda_fast import SeDA, SeDAConfig, TrainConfig, train
from seda_fast.checkpoint import Checkpoints
from seda_fast.loop import Keeping, Trainer, TrainingSet
from seda_fast.ranks import ALONE, Ranks
from seda_fast.streaming import RowReader, StreamedSet

pytestmark = pytest.mark.gpu

SMALL = ["--width", "48", "--blocks", "2", "--diffusion-steps", "50", "--batch-size", "32", "--epochs", "2"]


def data(folder: Path, labels: np.ndarray[Any, Any]) -> Path:
    """90 training rows, some without label or text, and 12 test rows."""
    rng = np.random.default_rng(3)
    text = rng.normal(size=(90, 5)).astype(np.float32)
    text[7:11] = np.nan
    arrays = {
        "visual_train": (3 + 2 * rng.normal(size=(90, 8))).astype(np.float32),
        "text_train": text,
        "label_train": labels,
        "visual_test": rng.normal(size=(12, 8)).astype(np.float32),
        "label_test": labels[1:13],
    }
    folder.mkdir()
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return folder


@pytest.mark.parametrize(
    ("engine", "precision", "more"),
    [
        ("graph", "fp32", ()),
        ("graph", "tf32", ()),
        ("graph", "bf16", ("--profile",)),
        ("graph", "fp16", ()),
        ("graph", "bf16", ("--memory-share", "0")),
        ("graph", "fp16", ("--memory-share", "0")),
        ("compile", "fp32", ("--profile",)),
        ("eager", "fp16", ()),
        ("eager", "bf16", ("--memory-share", "0")),
    ],
)
def test_the_command_trains(tmp_path: Path, engine: str, precision: str, more: tuple[str, ...]) -> None:
    labels = np.where(np.arange(90) % 5, np.arange(90) % 3, -1)
    labels[:13] = np.arange(13) % 3
    out = tmp_path / "run"
    command = ["--data", str(data(tmp_path / "data", labels)), "--unpaired", "keep", "--out", str(out), *SMALL]
    command += ["--device", "cuda", "--engine", engine, "--precision", precision, "--no-baselines", *more]
    assert train.main(command) == 0
    told = json.loads((out / "metrics.json").read_text())["train"]
    assert told["engine"]["used"] == engine
    assert [fallback["what"] for fallback in told["engine"]["fallbacks"]] in ([], ["a batch of 26 rows"])
    assert told["data"] == ("in its files" if "--memory-share" in more else "on the device")
    if "--profile" in more:
        # What a captured step asks for is in the trace by its kernels' names.
        trace = json.loads((out / "trace.json").read_text())
        assert any(event.get("cat") == "kernel" for event in trace["traceEvents"])
    here, there = (SeDA.from_pretrained(out, device) for device in ("cpu", "cuda"))
    visual = torch.from_numpy(np.load(tmp_path / "data" / "visual_test.npy"))
    with torch.no_grad():
        torch.testing.assert_close(there(visual.cuda()).cpu(), here(visual), rtol=1e-3, atol=1e-3)


def test_several_labels_a_row_are_captured_too(tmp_path: Path) -> None:
    labels = (np.random.default_rng(4).random((90, 4)) < 0.4).astype(np.int64)
    out = tmp_path / "run"
    command = ["--data", str(data(tmp_path / "data", labels)), "--unpaired", "keep", "--out", str(out), *SMALL]
    assert train.main([*command, "--device", "cuda", "--engine", "graph", "--no-baselines"]) == 0
    told = json.loads((out / "metrics.json").read_text())["train"]["engine"]
    assert told["used"] == "graph"


class Stop(Exception):
    pass


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("where", ["device", "files"])
def test_a_resumed_graph_has_the_bits_of_one_run(tmp_path: Path, where: str, precision: Any) -> None:
    config = SeDAConfig(visual_dim=8, text_dim=5, n_classes=3, width=16, blocks=2, time_embedding=8, diffusion_steps=60)
    generator = torch.Generator().manual_seed(9)
    fields = (torch.randn(60, 8, generator=generator), torch.randn(60, 5, generator=generator), torch.arange(60) % 3)
    told = (torch.ones(60, dtype=torch.bool), torch.arange(60))
    rows: Any = TrainingSet(*(f.cuda() for f in (*fields, *told)))
    if where == "files":
        statistics = (f(n).cuda() for n in (8, 5) for f in (torch.zeros, torch.ones))
        readers = (RowReader(f.numpy()) for f in fields[:2])
        rows = StreamedSet(*readers, *statistics, *(f.cuda() for f in (fields[2], *told)))

    def trainer(folder: str) -> Trainer:
        torch.manual_seed(0)
        model = SeDA(config)
        model.fit_statistics(torch.zeros(8), torch.ones(8), torch.zeros(5), torch.ones(5), fields[0], fields[2])
        # 5 steps an epoch: a checkpoint after step 17, in the middle of one.
        keeping = Keeping(Checkpoints(tmp_path / folder, print), every=17 / 5)
        settings = TrainConfig(epochs=6, batch_size=14)
        return Trainer(model.cuda(), rows, settings, engine="graph", precision=precision, keeping=keeping)

    def stop_at_18(done: int, total: int) -> None:
        if done == 18:
            raise Stop

    whole = trainer("whole")
    whole.run()
    with pytest.raises(Stop):
        trainer("cut").run(stop_at_18)
    again = trainer("cut")
    assert again.resume()
    assert again.stepper.done == 17
    again.run()
    assert again.stepper.report()["used"] == "graph"
    for (name, a), b in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b), name


class OneRank(Ranks):
    """A rank without others that asks them all the same."""

    @property
    def alone(self) -> bool:
        return False


@pytest.fixture
def nccl() -> Iterator[None]:
    """One rank, whose exchanges on the GPU go through nccl: two of them need two GPUs (`tests/test_ranks.py`)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=address, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("nccl")
@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_a_rank_of_nccl_trains_as_one_that_is_alone(engine: Any) -> None:
    generator = torch.Generator().manual_seed(5)
    fields = (torch.randn(60, 8, generator=generator), torch.randn(60, 5, generator=generator), torch.arange(60) % 3)
    rows = TrainingSet(*(f.cuda() for f in (*fields, torch.ones(60, dtype=torch.bool), torch.arange(60))))
    config = SeDAConfig(visual_dim=8, text_dim=5, n_classes=3, width=16, blocks=2, time_embedding=8, diffusion_steps=60)
    curves = []
    for ranks in (ALONE, OneRank()):
        torch.manual_seed(0)
        model = SeDA(config)
        model.fit_statistics(torch.zeros(8), torch.ones(8), torch.zeros(5), torch.ones(5), fields[0], fields[2])
        trainer = Trainer(model.cuda(), rows, TrainConfig(epochs=4, batch_size=14), engine=engine, ranks=ranks)
        trainer.run()
        assert trainer.stepper.report()["used"] == engine
        curves.append([list(epoch.losses.values()) for epoch in trainer.history])
    torch.testing.assert_close(torch.tensor(curves[1]), torch.tensor(curves[0]), rtol=1e-4, atol=1e-6)
