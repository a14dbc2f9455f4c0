"""Nothing is lost: a run that is killed, told to stop, or out of disk goes on to the bits of an undisturbed one."""

import csv
import errno
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from seda_fast import DataError, train
from seda_fast.results import results_folder, unfinished_folder

SMALL = ["--width", "16", "--blocks", "1", "--diffusion-steps", "50", "--no-baselines", "--batch-size", "16"]
KILLS = 30

# One process imports the package; each run is a fork of it and starts at once.
NURSERY = """
import json, os, sys
import seda_fast.train
for line in sys.stdin:
    arguments, limit = json.loads(line)
    pid = os.fork()
    if pid == 0:
        if limit:
            import resource, signal
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        os._exit(seda_fast.train.main(arguments))
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Nursery:
    """Runs of ``seda_fast.train``, one at a time."""

    def __init__(self, errors: Path) -> None:
        self.errors = errors
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", NURSERY],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors.open("a"),
            text=True,
            env=environment,
        )

    def _line(self) -> str:
        assert self._process.stdout is not None
        while True:
            line = self._process.stdout.readline()
            if re.fullmatch(r"-?\d+\n", line):  # the rest is what the runs print
                return line
            assert line, self.errors.read_text()

    def start(self, *arguments: str, limit: int = 0) -> int:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([arguments, limit]) + "\n")
        self._process.stdin.flush()
        return int(self._line())

    def wait(self) -> int:
        """Exit code of the run, negative where a signal ended it."""
        return int(self._line())

    def run(self, *arguments: str, limit: int = 0) -> int:
        self.start(*arguments, limit=limit)
        return self.wait()

    def said(self) -> str:
        """What stood on stderr since the last call."""
        text = self.errors.read_text()
        os.truncate(self.errors, 0)
        return text

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    made = Nursery(tmp_path_factory.mktemp("nursery") / "errors")
    yield made
    made.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(3)
    labels, test_labels = np.arange(90) % 3, np.arange(12) % 3
    file = tmp_path_factory.mktemp("data") / "data.npz"
    np.savez(
        file,
        visual_train=rng.normal(size=(90, 8)).astype(np.float32),
        text_train=rng.normal(size=(90, 5)).astype(np.float32),
        label_train=labels,
        visual_test=rng.normal(size=(12, 8)).astype(np.float32),
        label_test=test_labels,
    )
    return file


def history(out: Path) -> list[dict[str, str]]:
    rows = list(csv.DictReader((out / "history.csv").open()))
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def same(one: Path, other: Path) -> bool:
    """Weights and history to the bit; every file is there."""
    assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}
    weights = "model.safetensors"
    return (one / weights).read_bytes() == (other / weights).read_bytes() and history(one) == history(other)


@pytest.mark.slow
def test_killed_at_thirty_moments_a_run_ends_with_the_same_bits(nursery: Nursery, data: Path, tmp_path: Path) -> None:
    """SIGKILL after random times, every third as soon as a checkpoint is being written."""
    common = ["--data", str(data), *SMALL, "--epochs", "30", "--checkpoint-every", "0.34"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert nursery.run(*common, "--out", str(whole)) == 0
    rng, kills, in_write, finished = random.Random(7), 0, 0, 0
    place = unfinished_folder(out)

    def half_written() -> bool:
        try:
            return any(path.name.startswith(".step-") for path in place.iterdir())
        except FileNotFoundError:
            return False

    while kills < KILLS or not out.exists():
        pid = nursery.start(*common, "--out", str(out), "--resume")
        if kills < KILLS:
            deadline = time.monotonic() + rng.uniform(0, 0.5)
            if kills % 3 == 2:
                deadline = time.monotonic() + 5
                skip = time.monotonic() + rng.uniform(0.1, 0.4)
            else:
                skip = deadline
            while time.monotonic() < deadline and not (time.monotonic() > skip and half_written()) and not out.exists():
                time.sleep(0.0002)
            os.kill(pid, signal.SIGKILL)
        code = nursery.wait()
        assert code in (0, -signal.SIGKILL), nursery.said()
        if code != 0:
            kills += 1
            in_write += half_written()
        elif kills < KILLS:
            assert same(whole, out)
            finished += 1
            for path in sorted(out.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            out.rmdir()
    assert same(whole, out)
    assert not place.exists()
    assert in_write >= 5, "too few kills came during a write"
    assert finished <= 8, "the run is too short for its kills"


@pytest.mark.slow
def test_told_to_stop_a_run_writes_a_checkpoint_and_leaves_soon(nursery: Nursery, data: Path, tmp_path: Path) -> None:
    common = ["--data", str(data), *SMALL, "--epochs", "30", "--checkpoint-every", "2"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert nursery.run(*common, "--out", str(whole)) == 0
    for number in (signal.SIGTERM, signal.SIGINT):
        nursery.said()
        before = max(unfinished_folder(out).glob("*.json"), default=None)
        pid = nursery.start(*common, "--out", str(out), "--resume")
        while max(unfinished_folder(out).glob("*.json"), default=None) == before:
            time.sleep(0.01)
        told = time.monotonic()
        os.kill(pid, number)
        assert nursery.wait() == 128 + number
        assert time.monotonic() - told < 10
        said = nursery.said().splitlines()[-1]
        assert re.search(r"stopped in step \d+ of 180; --resume continues from .*step-\d+.safetensors", said), said
        assert not out.exists()
        assert [path.suffix for path in sorted(unfinished_folder(out).iterdir())][-2:] == [".json", ".safetensors"]
    assert nursery.run(*common, "--out", str(out), "--resume") == 0
    assert re.search(r"continuing after step \d+ of 180, from ", nursery.said())
    assert same(whole, out)
    metrics = json.loads((out / "metrics.json").read_text())
    assert 0 < metrics["train"]["resumed_after_step"] < 180


def test_a_full_disk_stops_with_a_sentence_and_the_run_can_go_on(nursery: Nursery, data: Path, tmp_path: Path) -> None:
    common = ["--data", str(data), *SMALL, "--epochs", "4"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert nursery.run(*common, "--out", str(whole)) == 0
    nursery.said()
    assert nursery.run(*common, "--out", str(out), limit=20_000) == 2
    (said,) = nursery.said().splitlines()
    assert "step-000000006.safetensors cannot be written: " in said
    assert "File too large" in said
    assert not unfinished_folder(out).exists()
    assert nursery.run(*common, "--out", str(out)) == 0
    assert same(whole, out)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A file system of so many bytes; called again, it grows. The test is skipped where none can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def sized(size: int) -> Path:
        again = "remount," if os.path.ismount(folder) else ""
        command = ["mount", "-t", "tmpfs", "-o", f"{again}size={size}", "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, check=False)
        except FileNotFoundError:
            pytest.skip("tests/test_resume.py needs mount for a small disk")
        if done.returncode:
            pytest.skip("tests/test_resume.py needs the right to mount a small disk")
        return folder

    yield sized
    if os.path.ismount(folder):
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_that_fills_up_leaves_both_older_checkpoints(
    nursery: Nursery, data: Path, tmp_path: Path, small_disk: Callable[[int], Path]
) -> None:
    """The disk itself: two checkpoints fit, a third beside them does not."""
    common = ["--data", str(data), *SMALL, "--epochs", "4"]
    whole = tmp_path / "whole"
    assert nursery.run(*common, "--out", str(whole), "--checkpoint-every", "1") == 0
    stopped = tmp_path / "stopped"
    arguments = [*common, "--out", str(stopped)]
    pid = nursery.start(*common, "--epochs", "200", "--out", str(stopped))
    while len(list(unfinished_folder(stopped).glob("*.json"))) < 2:
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    nursery.wait()
    size = max(path.stat().st_size for path in unfinished_folder(stopped).glob("*.safetensors"))
    out = small_disk(int(2.6 * size)) / "out"
    arguments = [*common, "--out", str(out)]
    nursery.said()
    assert nursery.run(*arguments) == 2
    (said,) = nursery.said().splitlines()
    assert "step-000000018.safetensors cannot be written: " in said
    assert "No space left on device" in said or "os error 28" in said, said
    names = sorted(path.name for path in unfinished_folder(out).iterdir())
    assert names == [f"step-0000000{step}.{kind}" for step in ("06", "12") for kind in ("json", "safetensors")]
    small_disk(50_000_000)
    assert nursery.run(*arguments, "--resume") == 0
    assert "continuing after step 12 of 24" in nursery.said()
    assert same(whole, out)


# ---------------------------------------------------------------------------------------------- within this process


def unfinished(data: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> list[str]:
    """A run that failed after training; returns its arguments."""
    arguments = ["--data", str(data), *SMALL, "--epochs", "3", "--out", str(out), *options]

    def fail(*given: object, **named: object) -> None:
        raise DataError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(train, "sharded_outputs", fail)
        assert train.main(arguments) == 2
    return arguments


def test_an_unfinished_run_is_neither_overwritten_nor_resumed_unasked(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = unfinished(data, out, monkeypatch)
    capfd.readouterr()
    before = sorted(unfinished_folder(out).iterdir())
    assert len(before) == 4
    assert train.main(arguments) == 2
    assert "an unfinished run to" in (said := capfd.readouterr().err)
    assert "--resume continues it, --overwrite drops it" in said
    assert sorted(unfinished_folder(out).iterdir()) == before
    assert train.main([*arguments, "--overwrite"]) == 0
    assert not unfinished_folder(out).exists()


def test_a_run_that_cannot_begin_drops_nothing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whoever mistypes --data beside --overwrite still has the unfinished run and its events."""
    out, told = tmp_path / "out", tmp_path / "events" / "out"
    arguments = unfinished(data, out, monkeypatch)
    told.mkdir(parents=True)
    (told / "events.out.tfevents.1.host.1.0").write_text("")
    before = sorted(unfinished_folder(out).iterdir())
    wrong = ["--data", str(tmp_path / "typo.npz"), *arguments[2:], "--overwrite"]
    assert train.main([*wrong, "--tensorboard", str(told.parent)]) == 2
    assert "typo.npz: does not exist" in capfd.readouterr().err
    assert sorted(unfinished_folder(out).iterdir()) == before
    assert len(list(told.iterdir())) == 1
    assert train.main([*arguments, "--resume"]) == 0


def test_what_torchrun_starts_anew_goes_on_with_its_own_run_alone(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With --overwrite, which every attempt is given: results and checkpoints of an earlier run are not its own."""
    out = tmp_path / "out"
    assert train.main(["--data", str(data), *SMALL, "--epochs", "1", "--out", str(out)]) == 0
    earlier = (out / "model.safetensors").read_bytes()
    arguments = [*unfinished(data, out, monkeypatch, "--overwrite"), "--resume"]
    # What torchrun calls every job that is not named.
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    # Another job, of another process, has left an unfinished run: neither its first attempt nor a later one goes on.
    with monkeypatch.context() as before:
        before.setattr(os, "getppid", lambda: 1)
        unfinished(data, out, before, "--overwrite")
    capfd.readouterr()
    assert train.main(["--data", str(data), *SMALL, "--epochs", "1", "--out", str(out)]) == 2
    assert "give another --out or --overwrite" in capfd.readouterr().err
    # The first attempt ended before it began to train: what is here is another run's.
    unfinished(data, out, monkeypatch, "--overwrite")
    assert "continuing" not in capfd.readouterr().err
    assert (out / "model.safetensors").read_bytes() == earlier
    # This one did begin.
    assert train.main([option for option in arguments if option != "--resume"]) == 0
    assert "continuing after step 18 of 18" in capfd.readouterr().err
    assert (out / "model.safetensors").read_bytes() != earlier
    assert not unfinished_folder(out).exists()


@pytest.mark.parametrize("change", ["labels", "texts of other rows", "rows"])
def test_other_data_do_not_resume_although_their_moments_are_the_same(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], change: str
) -> None:
    arguments = unfinished(data, tmp_path / "out", monkeypatch)
    with np.load(data) as source:
        arrays = dict(source)
    order = np.random.default_rng(0).permutation(len(arrays["label_train"]))
    if change == "labels":
        same_class = np.flatnonzero(arrays["label_train"] == arrays["label_train"][0])[:2]
        arrays["label_train"][same_class[0]] = (arrays["label_train"][same_class[0]] + 1) % 3
    elif change == "rows":
        arrays = {name: value[:-1] if name.endswith("_train") else value for name, value in arrays.items()}
    else:
        arrays["text_train"] = arrays["text_train"][order]
    np.savez(tmp_path / "other.npz", **arrays)
    capfd.readouterr()
    assert train.main(["--data", str(tmp_path / "other.npz"), *arguments[2:], "--resume"]) == 2
    assert "is of a run on other data" in capfd.readouterr().err


def test_a_trained_run_resumes_to_its_evaluation(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = unfinished(data, out, monkeypatch)
    assert train.main([*arguments, "--resume"]) == 0
    assert "continuing after step 18 of 18" in capfd.readouterr().err
    assert train.main([*arguments, "--resume"]) == 2
    assert "holds the results of an earlier run" in capfd.readouterr().err
    plain = [*arguments[:-2], "--out", str(tmp_path / "plain")]
    assert train.main(plain) == 0
    assert same(out, tmp_path / "plain")


def test_resuming_nothing_says_so_and_starts(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data", str(data), *SMALL, "--epochs", "1", "--out", str(tmp_path / "out"), "--resume"]
    assert train.main(arguments) == 0
    assert "there is no unfinished run to" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (["--epochs", "5"], "epochs is 5, but the run to resume began with 3"),
        (["--width", "32"], "width is 32, but the run to resume began with 16"),
        (["--seed", "4"], "seed is 4, but the run to resume began with 0"),
    ],
)
def test_other_settings_do_not_resume(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    change: list[str],
    sentence: str,
) -> None:
    arguments = unfinished(data, tmp_path / "out", monkeypatch)
    capfd.readouterr()
    assert train.main([*arguments, "--resume", *change]) == 2
    (said,) = capfd.readouterr().err.splitlines()
    assert sentence in said
    assert len(list(unfinished_folder(tmp_path / "out").iterdir())) == 4


def test_other_data_do_not_resume(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = unfinished(data, tmp_path / "out", monkeypatch)
    arrays: dict[str, Any] = dict(np.load(data))
    arrays["visual_train"] = arrays["visual_train"] + 1
    np.savez(tmp_path / "other.npz", **arrays)
    capfd.readouterr()
    assert train.main([*arguments, "--resume", "--data", str(tmp_path / "other.npz")]) == 2
    assert "is of a run on other data" in capfd.readouterr().err


def test_a_damaged_newest_checkpoint_is_reported_and_the_run_ends_the_same(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = unfinished(data, out, monkeypatch)
    newest = max(unfinished_folder(out).glob("*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:1000])
    capfd.readouterr()
    assert train.main([*arguments, "--resume"]) == 0
    said = capfd.readouterr().err
    assert "step-000000018.safetensors is damaged (it has 1000 bytes where" in said
    assert "continuing after step 12 of 18" in said
    assert train.main([*arguments[:-2], "--out", str(tmp_path / "plain")]) == 0
    assert same(out, tmp_path / "plain")


# ------------------------------------------------------------------------------------------------------------- locks


def lock(out: Path, **content: Any) -> Path:
    place = unfinished_folder(out)
    place.mkdir(parents=True)
    file = place / "lock"
    file.write_text(json.dumps(content))
    return file


def test_a_second_run_into_the_same_folder_refuses(nursery: Nursery, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--data", str(data), *SMALL, "--epochs", "200", "--out", str(out)]
    pid = nursery.start(*arguments)
    while not (unfinished_folder(out) / "draft").exists():
        time.sleep(0.01)
    second = subprocess.run(
        [sys.executable, "-m", "seda_fast.train", *arguments], capture_output=True, text=True, check=False
    )
    assert second.returncode == 2
    assert f"another run works on {out}: process {pid} on {socket.gethostname()}" in second.stderr
    assert len(second.stderr.splitlines()) == 1
    os.kill(pid, signal.SIGTERM)
    assert nursery.wait() == 128 + signal.SIGTERM


def test_a_run_by_a_link_to_the_folder_of_another_refuses(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "same"
    link.symlink_to(tmp_path / "mine")
    options = {"overwrite": False, "resume": False, "report": print}
    with results_folder(tmp_path / "mine", **options) as (draft, _):
        (draft / "metrics.json").write_text("of the first")
        with pytest.raises(DataError, match="another run works on"), results_folder(link, **options):
            pass
    with pytest.raises(DataError, match="holds the results of an earlier run"), results_folder(link, **options):
        pass
    with results_folder(link, **{**options, "overwrite": True}) as (draft, _):
        (draft / "metrics.json").write_text("of the second")
    assert (tmp_path / "mine" / "metrics.json").read_text() == "of the second"
    assert link.is_symlink() and sorted(p.name for p in tmp_path.iterdir()) == ["links", "mine"]


def test_a_stale_lock_is_recognised(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Nobody holds it: neither a process that is gone, nor a living one that took the same number."""
    for pid in (2**22 + 1, os.getpid()):
        out = tmp_path / str(pid)
        lock(out, host=socket.gethostname(), pid=pid)
        assert train.main(["--data", str(data), *SMALL, "--epochs", "1", "--out", str(out)]) == 0
        assert f"the lock of process {pid}, which is no more, is taken over" in capfd.readouterr().err


def test_another_hosts_lock_is_not_taken_over(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = lock(tmp_path / "out", host="elsewhere", pid=12)
    assert train.main(["--data", str(data), *SMALL, "--epochs", "1", "--out", str(tmp_path / "out")]) == 2
    said = capfd.readouterr().err
    assert "process 12 on elsewhere works, or worked, on" in said
    assert str(file) in said
    assert file.exists()


def test_results_moved_in_part_are_completed(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between two files of the move, a resumed run replaces what came over."""
    out = tmp_path / "out"
    arguments = unfinished(data, out, monkeypatch)
    out.mkdir()
    (out / "config.toml").write_text("half")
    assert train.main([*arguments, "--resume"]) == 0
    assert train.main([*arguments[:-2], "--out", str(tmp_path / "plain")]) == 0
    assert same(out, tmp_path / "plain")


def test_results_go_to_a_mounted_volume(
    nursery: Nursery, data: Path, tmp_path: Path, small_disk: Callable[[int], Path]
) -> None:
    """Nothing can be moved there from beside it, and what lies beside it a container loses."""
    out = small_disk(50_000_000)
    assert nursery.run("--data", str(data), *SMALL, "--epochs", "1", "--out", str(out)) == 0
    assert (out / "model.safetensors").is_file() and (out / "report").is_dir()
    assert not unfinished_folder(out).exists()
    assert [path.name for path in tmp_path.iterdir() if "unfinished" in path.name] == []
    assert nursery.run("--data", str(data), *SMALL, "--epochs", "1", "--out", str(out), "--overwrite") == 0


def test_results_that_cannot_be_moved_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As to a bind mount of the same file system, which looks like any folder."""
    out = tmp_path / "out"
    (out / "notes").mkdir(parents=True)
    replace = Path.replace

    def across(self: Path, target: Path) -> Path:
        if out in Path(target).parents and out not in self.parents:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", across)
    with results_folder(out, overwrite=False, resume=False, report=print) as (draft, _):
        (draft / "report").mkdir()
        (draft / "report" / "loss.png").write_bytes(b"1")
        (draft / "config.toml").write_text("2")
    assert (out / "report" / "loss.png").read_bytes() == b"1"
    assert (out / "config.toml").read_text() == "2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_an_empty_folder_that_is_there_stays_the_user_s(tmp_path: Path) -> None:
    """With its rights, and their shell in it."""
    out = tmp_path / "out"
    out.mkdir()
    out.chmod(0o2770)
    before = out.stat()
    with results_folder(out, overwrite=False, resume=False, report=print) as (draft, _):
        (draft / "config.toml").write_text("2")
    assert (out / "config.toml").read_text() == "2"
    assert (out.stat().st_ino, out.stat().st_mode) == (before.st_ino, before.st_mode)
