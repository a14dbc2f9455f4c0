"""Several ranks do what one does: the same loss curve, the same predictions, and a restart that goes on."""

import csv
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from seda_fast import FeatureSet, SeDAConfig, evaluate, predict, train
from seda_fast.config import ConfigError
from seda_fast.prepare import prepare
from seda_fast.ranks import Ranks, _attempt, _own_gpu, job, joined
from seda_fast.results import unfinished_folder

# Runs as one of several processes, or alone; the first prints what the test compares, by dtype.
TRAININGS = """
import dataclasses, json, sys
from pathlib import Path
import torch
from seda_fast import SeDA, SeDAConfig, TrainConfig, engine
from seda_fast.checkpoint import Checkpoints
from seda_fast.loop import Keeping, Trainer, TrainingSet
from seda_fast.ranks import joined

CONFIG = SeDAConfig(visual_dim=8, text_dim=5, n_classes=3, width=16, blocks=1, time_embedding=8, diffusion_steps=30)
# 3 batches of 20 rows and one of a single row an epoch; unlabelled rows and rows without text lie unevenly.
SETTINGS = TrainConfig(epochs=8, batch_size=20, learning_rate=3e-3)
DEVICE = torch.device("cuda" if "cuda" in sys.argv else "cpu")
# nccl refuses two ranks on one GPU, gloo does not.
EXCHANGE = torch.device("cpu") if "one" in sys.argv else DEVICE
ENGINE = "graph" if "graph" in sys.argv else "eager"


class Direct:
    # On a CPU the step that graphs capture, without them.

    def __init__(self, stepper):
        self.stepper = stepper

    def steps(self, parts):
        for rows, batch in zip(parts, self.stepper.data.batches(self.stepper.ranks.own(parts)), strict=True):
            self.stepper.device_step(batch, rows)
            yield


if ENGINE == "graph" and DEVICE.type == "cpu":
    engine.plan = lambda asked, *rest: engine.Plan(asked, asked, "a test")
    engine.Graph = Direct


def trainer(ranks, dtype, keeping=None, engine=ENGINE, precision="fp32"):
    generator = torch.Generator().manual_seed(9)
    labels, paired = torch.arange(61) % 3, torch.ones(61, dtype=torch.bool)
    labels[5:20], paired[30:37] = -1, False
    visual = torch.randn(61, 8, generator=generator, dtype=torch.float64)
    text = torch.randn(61, 5, generator=generator, dtype=torch.float64)
    data = TrainingSet(visual.to(dtype), text.to(dtype), labels, paired, torch.arange(61) * 7)
    torch.manual_seed(0)
    model = SeDA(CONFIG).to(dtype)
    zeros, ones = torch.zeros, torch.ones
    model.fit_statistics(zeros(8), ones(8), zeros(5), ones(5), data.visual, data.labels)
    model.fit_teacher(data.visual, data.text, data.labels, data.paired, 0)
    assert model.teacher is not None
    model.set_label_share(0.4)
    fields = (data.visual, data.text, data.labels, data.paired, data.sample_ids)
    data = TrainingSet(*(field.to(DEVICE) for field in fields))
    return Trainer(model.to(DEVICE), data, SETTINGS, ranks=ranks, keeping=keeping, engine=engine,
                   precision=precision)


class Stop(Exception):
    pass


def stop_at_18(done, total):
    if done == 18:
        raise Stop


def resumed(ranks, whole, folder):
    # In the middle of an epoch, on all ranks at once; the first has written the checkpoint of step 17.
    checkpoints = Checkpoints(Path(folder), print) if ranks.first else None
    keeping = Keeping(checkpoints, every=17 / 4)
    try:
        trainer(ranks, torch.float32, keeping).run(stop_at_18)
    except Stop:
        pass
    again = trainer(ranks, torch.float32, keeping)
    assert again.resume()
    assert again.stepper.done == 17
    again.run()
    pairs = zip(whole.model.parameters(), again.model.parameters(), strict=True)
    # The sums of an epoch that was cut add up in another order, in float64.
    close = all(abs(a.losses[k] - b.losses[k]) < 1e-12 * abs(a.losses[k])
                for a, b in zip(whole.history, again.history, strict=True) for k in a.losses)
    return all(torch.equal(a, b) for a, b in pairs) and close


with joined(EXCHANGE) as ranks:
    found = {}
    for name, dtype in (("float64", torch.float64), ("float32", torch.float32)):
        done = trainer(ranks, dtype)
        done.run()
        found[name] = [epoch.losses for epoch in done.history]
    found["resumed"] = resumed(ranks, done, sys.argv[1])
    found["engine"] = done.stepper.report()["used"]
    if "compile" in sys.argv:
        done = trainer(ranks, torch.float32, engine="compile")
        done.run()
        found["compiled"] = [epoch.losses for epoch in done.history]
        found["engine"] = done.stepper.report()["used"]
    if "fp16" in sys.argv:
        done = trainer(ranks, torch.float32, precision="fp16")
        done.run()
        found["fp16"] = [epoch.losses for epoch in done.history]
        found["scale"] = done.stepper.scaler.get_scale()
    if ranks.first:
        print(json.dumps(found))
"""


# Ends at once after ranks have exchanged something: what gloo's threads still hold must not end the process badly.
ENDS_AT_ONCE = """
import torch
from seda_fast.ranks import joined
with joined(torch.device("cpu")) as ranks:
    torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 3))
    ranks.largest([1, 2])
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def begin(world: int, command: list[str], cwd: Path) -> list[subprocess.Popen[str]]:
    """``command`` as ``world`` ranks."""
    common = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = []
    for rank in range(world):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes.append(subprocess.Popen(command, env={**common, **place}, cwd=cwd, text=True, **pipes))
    return processes


def end(processes: list[subprocess.Popen[str]]) -> list[subprocess.CompletedProcess[str]]:
    """What each of them said."""
    ended = []
    for process in processes:
        out, said = process.communicate(timeout=300)
        ended.append(subprocess.CompletedProcess(process.args, process.returncode, out, said))
    return ended


def together(world: int, command: list[str], cwd: Path) -> list[subprocess.CompletedProcess[str]]:
    """``command`` as ``world`` ranks, to its end."""
    return end(begin(world, command, cwd))


def wait_for_checkpoints(out: Path, number: int, alive: Callable[[], bool]) -> None:
    """Until ``number`` more checkpoints were finished."""
    place, deadline = unfinished_folder(out), time.monotonic() + 120
    seen = set(place.glob("*.json"))
    while len(set(place.glob("*.json")) - seen) < number:
        assert alive(), "the run ended before"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def curves(world: int, folder: Path, *options: str) -> dict[str, Any]:
    folder.mkdir()
    ended = together(world, [sys.executable, "-c", TRAININGS, str(folder / "kept"), *options], folder)
    assert all(one.returncode == 0 for one in ended), "\n".join(one.stderr for one in ended)
    found: dict[str, Any] = json.loads(ended[0].stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_ranks_leave_without_a_crash(tmp_path: Path) -> None:
    for _ in range(4):
        for ended in together(4, [sys.executable, "-c", ENDS_AT_ONCE], tmp_path):
            assert (ended.returncode, ended.stderr) == (0, "")


def test_more_ranks_than_gpus_are_refused_before_nccl_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: pytest.fail("a GPU was taken"))
    told = {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
    for name, value in {**told, "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    refusal = pytest.raises(ConfigError, match="3 ranks on this host need a GPU each, and it has 2; start fewer")
    with refusal, joined(torch.device("cuda")):
        pass
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with refusal, joined(torch.device("cuda")):
        pass


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"MASTER_PORT": "abc"}, "MASTER_PORT is 'abc' in the environment, which is no port"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT is '70000' in the environment, which is no port"),
        ({"RANK": "x"}, "RANK is 'x' in the environment, which is none of 0 .. 1"),
        ({"RANK": "2"}, "RANK is '2' in the environment, which is none of 0 .. 1"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_ranks_that_are_told_nonsense_are_refused(
    monkeypatch: pytest.MonkeyPatch, told: dict[str, str], said: str
) -> None:
    usual = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in {**usual, **told}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=re.escape(said)), joined(torch.device("cpu")):
        pass


def test_ranks_that_cannot_meet_are_told_where(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        place = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in place.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ConfigError, match=f"cannot meet at 127.0.0.1:{port} "), joined(torch.device("cpu")):
            pass


def test_a_job_is_told_by_what_starts_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert job() is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    code = "import os; os.environ['TORCHELASTIC_RUN_ID'] = 'none'; from seda_fast.ranks import job; print(job())"
    ours = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(2)]
    assert ours[0].stdout == ours[1].stdout
    assert ours[0].stdout.split()[2] == str(os.getpid())
    # Of a process that has this number later, on a host that counts its ticks from its own start.
    monkeypatch.setattr("seda_fast.ranks._began", lambda process: "7")
    assert job() not in (None, ours[0].stdout.strip())


def differ(one: list[dict[str, float]], other: list[dict[str, float]]) -> float:
    """Largest relative difference of two loss curves."""
    return max(abs(a[name] - b[name]) / abs(a[name]) for a, b in zip(one, other, strict=True) for name in a)


@pytest.mark.slow
def test_one_two_and_four_ranks_have_the_same_loss_curve_and_resume_to_the_bit(tmp_path: Path) -> None:
    one, two, four = (curves(world, tmp_path / str(world)) for world in (1, 2, 4))
    for other in (two, four):
        assert differ(one["float64"], other["float64"]) < 1e-6
        assert differ(one["float32"], other["float32"]) < 1e-4
        assert one["float32"] != other["float32"], "the ranks did not share the work"
    assert (one["resumed"], two["resumed"], four["resumed"]) == (True, True, True)


@pytest.mark.slow
def test_ranks_that_add_up_their_gradients_between_graphs_have_the_same_loss_curve(tmp_path: Path) -> None:
    eager = curves(1, tmp_path / "eager")
    for world in (1, 3):
        found = curves(world, tmp_path / str(world), "graph")
        assert found["engine"] == "graph"
        assert differ(eager["float64"], found["float64"]) < 1e-6
        assert differ(eager["float32"], found["float32"]) < 1e-4
        assert found["resumed"] is True


@pytest.mark.gpu
@pytest.mark.slow
def test_two_ranks_on_two_gpus_have_the_loss_curve_of_one_and_resume_to_the_bit(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("test_two_ranks_on_two_gpus needs two CUDA devices")
    one, two = (curves(world, tmp_path / str(world), "cuda") for world in (1, 2))
    assert differ(one["float64"], two["float64"]) < 1e-6
    assert differ(one["float32"], two["float32"]) < 1e-4
    assert (one["resumed"], two["resumed"]) == (True, True)


@pytest.mark.gpu
def test_two_ranks_whose_steps_are_graphs_have_the_loss_curve_of_one_and_resume_to_the_bit(tmp_path: Path) -> None:
    """On one GPU or more: what is captured is the same, and what is exchanged goes over the host."""
    one, two = (curves(world, tmp_path / str(world), "cuda", "one", "graph") for world in (1, 2))
    assert (one["engine"], two["engine"]) == ("graph", "graph")
    assert differ(one["float64"], two["float64"]) < 1e-6
    assert differ(one["float32"], two["float32"]) < 1e-4
    assert one["float32"] != two["float32"], "the ranks did not share the work"
    assert (one["resumed"], two["resumed"]) == (True, True)


@pytest.mark.slow
def test_two_ranks_in_fp16_leave_out_the_steps_that_one_does(tmp_path: Path) -> None:
    """A loss times the number of ranks, whose gradients are then averaged, overflows a step earlier."""
    one, two = (curves(world, tmp_path / str(world), "fp16") for world in (1, 2))
    assert one["scale"] == two["scale"]
    assert differ(one["fp16"], two["fp16"]) < 1e-2


@pytest.mark.slow
def test_two_ranks_that_compile_have_the_eager_curve(tmp_path: Path) -> None:
    two = curves(2, tmp_path / "two", "compile")
    assert two["engine"] == "compile"
    assert differ(two["float32"], two["compiled"]) < 1e-4
    assert two["float32"] != two["compiled"], "nothing was compiled"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the ranks have: the vendor's matrix product adds in another order with another number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Second(Ranks):
    """A rank that the first one spreads ``told`` to: what is no tensor comes as text."""

    told: list[Any] = field(default_factory=list)

    def add(self, tensor: Tensor) -> Tensor:
        return tensor

    def largest(self, values: Sequence[int]) -> list[int]:
        return list(values)

    def spread(self, tensor: Tensor) -> None:
        tensor.copy_(self.told.pop(0))

    def spread_text(self, text: str) -> str:
        return str(self.told.pop(0))


def test_ranks_teach_and_predict_with_what_the_first_one_fitted() -> None:
    """Each fits a teacher, a kernel head and a share of the labels, and rounds as its own processor does."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    visual, text = (rng.normal(size=(60, d)).astype(np.float32) + labels[:, None] for d in (8, 5))
    few = np.where(np.arange(60) < 30, labels, -1)
    for given, part in ((few, "teacher"), (labels, "opinion")):
        data = FeatureSet.from_arrays(visual, text, given, visual, labels)
        config = SeDAConfig(visual_dim=8, text_dim=5, n_classes=3, width=16, blocks=1)
        share = {} if part == "teacher" else {"label_share": 0.25}
        first, _ = prepare(data, config, 0, torch.device("cpu"), **share)
        sent = [*first.parameters(), *first.buffers()]
        assert getattr(first, part) is not None
        found = [tensor + 1 if tensor.is_floating_point() else tensor.clone() for tensor in sent]
        second, _ = prepare(data, config, 0, torch.device("cpu"), ranks=Second(1, 2, [repr(first.label_share), *found]),
                            **share)  # fmt: skip
        for tensor, wanted in zip([*second.parameters(), *second.buffers()], found, strict=True):
            assert torch.equal(tensor, wanted)
        assert second.label_share == first.label_share


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(3)
    file = tmp_path_factory.mktemp("data") / "data.npz"
    labels = np.arange(90) % 3
    np.savez(
        file,
        visual_train=rng.normal(size=(90, 8)).astype(np.float32),
        text_train=rng.normal(size=(90, 5)).astype(np.float32),
        label_train=labels,
        visual_test=rng.normal(size=(131, 8)).astype(np.float32),
        text_test=rng.normal(size=(131, 5)).astype(np.float32),
        label_test=np.arange(131) % 3,
    )
    return file


SMALL = ["--width", "16", "--blocks", "1", "--diffusion-steps", "50", "--no-baselines", "--batch-size", "16"]


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_commands_of_two_ranks_write_what_one_writes(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--data", str(data), *SMALL, "--epochs", "3", "--tensorboard", str(tmp_path / "events")]
    assert train.main([*options, "--out", str(tmp_path / "one")]) == 0
    capfd.readouterr()
    module = [sys.executable, "-m"]
    ended = together(2, [*module, "seda_fast.train", *options, "--out", "two"], tmp_path)
    assert [one.returncode for one in ended] == [0, 0], ended
    assert "top-1" in ended[0].stdout
    assert ended[1].stdout == ended[0].stderr == ended[1].stderr == ""
    rows = [list(csv.DictReader((tmp_path / name / "history.csv").open())) for name in ("one", "two")]
    for a, b in zip(*rows, strict=True):
        assert float(b["loss"]) == pytest.approx(float(a["loss"]), rel=1e-4)
    assert json.loads((tmp_path / "two" / "metrics.json").read_text())["train"]["ranks"] == 2
    assert not unfinished_folder(tmp_path / "two").exists()
    told = [EventAccumulator(str(tmp_path / "events" / name)).Reload().Scalars("loss/total") for name in ("one", "two")]
    assert [event.step for event in told[0]] == [event.step for event in told[1]] == [10, 18]
    assert [event.value for event in told[1]] == pytest.approx([event.value for event in told[0]], rel=1e-4)

    arguments = ["--model", str(tmp_path / "one"), "--data", str(data)]
    assert evaluate.main([*arguments, "--json"]) == 0
    printed = capfd.readouterr().out
    ended = together(2, [*module, "seda_fast.evaluate", *arguments, "--json"], tmp_path)
    assert [one.stdout for one in ended] == [printed, ""]

    assert predict.main([*arguments, "--out", str(tmp_path / "one.csv"), "--features", str(tmp_path / "one.npz")]) == 0
    for world, name in ((2, "two"), (4, "four")):
        outputs = ["--out", f"{name}.csv", "--features", f"{name}.npz"]
        ended = together(world, [*module, "seda_fast.predict", *arguments, *outputs], tmp_path)
        assert [one.returncode for one in ended] == [0] * world, ended
        assert (tmp_path / f"{name}.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()
        alone, shared = (dict(np.load(tmp_path / f"{which}.npz")) for which in ("one", name))
        assert set(alone) == set(shared)
        for array in alone:
            np.testing.assert_array_equal(alone[array], shared[array])


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_two_ranks_that_read_their_rows_from_files_learn_what_one_learns(data: Path, tmp_path: Path) -> None:
    """Unlabelled rows and rows without text lie in one rank's share; each sums its share for the category centres."""
    arrays = dict(np.load(data))
    arrays["label_train"] = np.where(np.arange(90) < 20, -1, arrays["label_train"])
    arrays["text_train"][60:80] = np.nan
    (tmp_path / "data").mkdir()
    for name, array in arrays.items():
        np.save(tmp_path / "data" / f"{name}.npy", array)
    told = ["--data", str(tmp_path / "data"), "--memory-share", "0", "--unpaired", "keep", *SMALL, "--epochs", "3"]
    assert train.main([*told, "--out", str(tmp_path / "one")]) == 0
    ended = together(2, [*TRAIN, *told, "--out", "two"], tmp_path)
    assert [one.returncode for one in ended] == [0, 0], ended
    made = [json.loads((tmp_path / name / "metrics.json").read_text())["train"] for name in ("one", "two")]
    assert [(one["data"], one["ranks"]) for one in made] == [("in its files", 1), ("in its files", 2)]
    rows = [list(csv.DictReader((tmp_path / name / "history.csv").open())) for name in ("one", "two")]
    for a, b in zip(*rows, strict=True):
        assert float(b["loss"]) == pytest.approx(float(a["loss"]), rel=1e-4)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    np.testing.assert_allclose(two["centres"], one["centres"], rtol=1e-6, atol=1e-6)
    for name in ("visual_mean", "visual_scale", "text_mean", "text_scale"):
        np.testing.assert_array_equal(two[name], one[name])


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of two ranks that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    ended = together(2, [*TRAIN, "--data", str(data), *LONG, "--out", "out"], folder)
    assert [one.returncode for one in ended] == [0, 0], ended
    return folder / "out"


TRAIN = [sys.executable, "-m", "seda_fast.train"]
LONG = [*SMALL, "--epochs", "60"]


def same_bits(one: Path, other: Path) -> bool:
    return (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_ranks_of_which_one_is_told_to_stop_leave_together_and_go_on_to_the_same_bits(
    data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [*TRAIN, "--data", str(data), *LONG, "--out", str(out), "--resume"]
    for rank, number in ((1, signal.SIGTERM), (0, signal.SIGINT)):
        processes = begin(2, command, tmp_path)
        wait_for_checkpoints(out, 2, lambda told=processes: all(one.poll() is None for one in told))  # type: ignore[misc]
        told = time.monotonic()
        processes[rank].send_signal(number)
        ended = end(processes)
        assert time.monotonic() - told < 10
        assert [one.returncode for one in ended] == [128 + number] * 2, ended
        assert re.search(r"stopped in step \d+ of 360; --resume continues from .*step-\d+.safetensors", ended[0].stderr)
    ended = together(2, command, tmp_path)
    assert [one.returncode for one in ended] == [0, 0], ended
    assert same_bits(undisturbed, out)


def process_of(rank: int, parent: int) -> int:
    """The process that torchrun, itself ``parent``, started as ``rank``."""
    for place in Path("/proc").iterdir():
        try:
            stat, environ = (place / "stat").read_text(), (place / "environ").read_bytes()
        except OSError:
            continue
        if int(stat.rsplit(")", 1)[1].split()[1]) == parent and f"RANK={rank}".encode() in environ.split(b"\0"):
            return int(place.name)
    raise AssertionError(f"no process is rank {rank}")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_is_started_again_and_the_run_ends(
    rank: int, data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    runner = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    process = subprocess.Popen(
        [sys.executable, *runner, "-m", "seda_fast.train", "--data", str(data), *LONG, "--out", str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_checkpoints(out, 2, lambda: process.poll() is None)
    os.kill(process_of(rank, process.pid), signal.SIGKILL)
    _, said = process.communicate(timeout=180)
    assert process.returncode == 0, said
    assert "continuing after step" in said
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["train"]["ranks"] == 2
    assert 0 < metrics["train"]["resumed_after_step"] < 360
    assert len(list(csv.DictReader((out / "history.csv").open()))) == 60
    assert same_bits(undisturbed, out)


@pytest.mark.slow
def test_torchrun_that_is_told_to_stop_stops_its_ranks_at_a_checkpoint(
    data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """And whoever signals all processes, as SLURM does, signals the ranks twice."""
    out = tmp_path / "out"
    runner = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*runner, "-m", "seda_fast.train", "--data", str(data), *LONG, "--out", str(out), "--resume"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True, **pipes)
    wait_for_checkpoints(out, 2, lambda: process.poll() is None)
    for rank in (0, 1):
        os.kill(process_of(rank, process.pid), signal.SIGTERM)
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    assert re.search(r"stopped in step \d+ of 360; --resume continues from .*step-\d+.safetensors", said)
    assert "stopped by SIGTERM" not in said
    ended = together(2, [*TRAIN, "--data", str(data), *LONG, "--out", str(out), "--resume"], tmp_path)
    assert [one.returncode for one in ended] == [0, 0], ended
    assert same_bits(undisturbed, out)


def test_ranks_of_hosts_that_count_restarts_otherwise_meet(tmp_path: Path) -> None:
    """In a store that has what dead ranks left there, as torchrun's own has it."""
    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)
    kept = torch.distributed.PrefixStore("/", server)
    for dead in ("attempt", "1f 1", "1f 2"):
        kept.set(dead, "1f")

    def meet(rank: int) -> str:
        store = torch.distributed.TCPStore("127.0.0.1", server.port, is_master=False)
        time.sleep(0.1 * (2 - rank))  # the first rank comes last
        return _attempt(torch.distributed.PrefixStore("/", store), rank, 3)

    met = []
    for _ in range(2):  # the second start is counted by none
        with ThreadPoolExecutor(3) as threads:
            met.append(set(threads.map(meet, range(3), timeout=30)))
    assert [len(names) for names in met] == [1, 1]
    assert len({"1f"}.union(*met)) == 3
    script = "import os, sys; os.environ['TORCHELASTIC_RESTART_COUNT'] = os.environ['RANK']\n" + ENDS_AT_ONCE
    assert [one.returncode for one in together(2, [sys.executable, "-c", script], tmp_path)] == [0, 0]


def test_a_rank_that_was_given_one_gpu_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torchrun --virtual-local-rank``: each sees its own GPU alone, as its first."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert _own_gpu() == 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="4 ranks on this host need a GPU each, and it has 2"):
        _own_gpu()


def test_bad_input_is_told_by_every_rank_and_ends_them_all(tmp_path: Path) -> None:
    ended = together(2, [sys.executable, "-m", "seda_fast.train", "--data", "nowhere.npz", "--out", "run"], tmp_path)
    assert [one.returncode for one in ended] == [2, 2]
    assert "seda_fast.train: nowhere.npz: does not exist" in ended[0].stderr
    assert "seda_fast.train (rank 1): nowhere.npz: does not exist" in ended[1].stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("rows", "world"), [(10, 4), (3, 4), (0, 2), (8, 4), (7, 1)])
def test_parts_cover_the_rows_in_order(rows: int, world: int) -> None:
    parts = [range(rows)[Ranks(rank, world).part(rows)] for rank in range(world)]
    assert [row for part in parts for row in part] == list(range(rows))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
