"""Checkpoint files: whole or not there, damage is found and the one before is used, the last two are kept."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

from seda_fast import DataError
from seda_fast import checkpoint as module
from seda_fast.checkpoint import Checkpoints


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def kept(tmp_path: Path, said: list[str]) -> Checkpoints:
    return Checkpoints(tmp_path / "kept", said.append)


def save(kept: Checkpoints, step: int) -> Path:
    path = kept.save(step, {"a": torch.full((5,), float(step)), "n": torch.tensor(step)}, {"step is": step, "x": 0.1})
    kept.finish()
    return path


def names(kept: Checkpoints) -> list[str]:
    return sorted(path.name for path in kept.folder.iterdir())


def test_what_was_saved_comes_back_and_the_last_two_stay(kept: Checkpoints, said: list[str]) -> None:
    assert kept.newest() is None
    for step in (3, 7, 20):
        save(kept, step)
    found = kept.newest()
    assert found is not None
    assert found.step == 20
    assert found.state == {"step is": 20, "x": 0.1}
    assert torch.equal(found.tensors["a"], torch.full((5,), 20.0))
    assert int(found.tensors["n"]) == 20
    stems = ("step-000000007", "step-000000020")
    assert names(kept) == sorted(f"{stem}.{suffix}" for stem in stems for suffix in ("json", "safetensors"))
    assert said == []
    kept.clear()
    assert names(kept) == []


def test_the_tensors_are_those_of_the_call_though_training_goes_on(kept: Checkpoints) -> None:
    value = torch.zeros(3_000_000)
    kept.save(1, {"a": value}, {})
    value += 1
    kept.finish()
    found = kept.newest()
    assert found is not None
    assert not found.tensors["a"].any()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 16
    path.write_bytes(bytes(content))


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, empty, Path.unlink])
@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_a_damaged_newest_is_reported_and_the_one_before_used(
    kept: Checkpoints, said: list[str], damage: Callable[[Path], None], suffix: str
) -> None:
    save(kept, 1)
    path = save(kept, 2).with_suffix(suffix)
    damage(path)
    found = kept.newest()
    assert found is not None
    assert found.step == 1
    if damage is Path.unlink and suffix == ".json":
        assert said == []  # tensors without JSON were never finished
    else:
        assert len(said) == 1
        assert "step-000000002.safetensors is damaged (" in said[0]
    # Going on from there, the damaged one does not count among the two that are kept.
    save(kept, 2)
    assert kept.steps() == [1, 2]
    again = kept.newest()
    assert again is not None
    assert again.step == 2


def test_every_changed_value_in_the_json_is_found(kept: Checkpoints, said: list[str]) -> None:
    path = save(kept, 1).with_suffix(".json")
    text = path.read_text()
    for before, after in (("0.1", "0.2"), ('"step is": 1', '"step is": 2'), ('"format": 1', '"format": 9')):
        assert before in text
        path.write_text(text.replace(before, after))
        with pytest.raises(DataError, match=r"none of the 1 checkpoints in .* can be used"):
            kept.newest()
    assert len(said) == 3


def test_a_checkpoint_of_a_way_not_taken_goes(kept: Checkpoints) -> None:
    for step in (10, 20):
        save(kept, step)
    save(kept, 15)
    assert kept.steps() == [10, 15]


def test_leftovers_of_killed_writes_go(kept: Checkpoints) -> None:
    save(kept, 1)
    (kept.folder / ".step-000000002.0a1b.safetensors").write_bytes(b"half")
    (kept.folder / "step-000000002.safetensors").write_bytes(b"tensors whose JSON never came")
    save(kept, 3)
    assert kept.steps() == [1, 3]
    assert len(names(kept)) == 4


@pytest.mark.parametrize("writer", ["save_file", "atomic_path"])
def test_a_full_disk_is_one_sentence_and_leaves_the_older_ones(
    kept: Checkpoints, monkeypatch: pytest.MonkeyPatch, writer: str
) -> None:
    for step in (1, 2):
        save(kept, step)
    before = {path: path.read_bytes() for path in kept.folder.iterdir()}

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, writer, full)
    with pytest.raises(DataError, match=r"step-000000003.safetensors cannot be written: No space left on device"):
        save(kept, 3)
    assert {path: path.read_bytes() for path in kept.folder.iterdir()} == before


def test_no_tensors_stay_without_their_json(kept: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    save(kept, 1)
    before = names(kept)
    whole = module.atomic_path

    def full(path: Path) -> AbstractContextManager[Path]:
        if path.suffix == ".json":
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(path)

    monkeypatch.setattr(module, "atomic_path", full)
    with pytest.raises(DataError, match=r"step-000000002.safetensors cannot be written: No space left on device"):
        save(kept, 2)
    assert names(kept) == before


def test_files_are_on_disk_before_they_have_their_names(kept: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def flushed(handle: int) -> None:
        done.append(f"flush {Path(os.readlink(f'/proc/self/fd/{handle}')).name}")
        fsync(handle)

    def renamed(path: Path, target: Path) -> Path:
        done.append(f"rename {path.name} to {target.name}")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "replace", renamed)
    save(kept, 1)
    drafts = [line.split()[1] for line in done if line.startswith("rename")]
    assert done == [
        f"flush {drafts[0]}",
        f"rename {drafts[0]} to step-000000001.safetensors",
        f"flush {kept.folder.name}",
        f"flush {drafts[1]}",
        f"rename {drafts[1]} to step-000000001.json",
        f"flush {kept.folder.name}",
    ]


WRITE_UNTIL_FULL = """
import sys
from pathlib import Path
import torch
from seda_fast import DataError
from seda_fast.checkpoint import Checkpoints
kept = Checkpoints(Path(sys.argv[1]), print)
try:
    for step, size in enumerate((1000, 2000, 1_000_000), start=1):
        kept.save(step, {"a": torch.zeros(size)}, {})
        kept.finish()
except DataError as error:
    print(error)
"""


def test_a_file_that_may_not_grow_is_one_sentence_too(tmp_path: Path) -> None:
    """The system itself refuses the write, in the middle of the tensors."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    command = [sys.executable, "-c", WRITE_UNTIL_FULL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, preexec_fn=limit)
    assert len(done.stdout.splitlines()) == 1
    assert "step-000000003.safetensors cannot be written: " in done.stdout
    kept = Checkpoints(tmp_path, print)
    assert kept.steps() == [1, 2]
    found = kept.newest()
    assert found is not None
    assert found.step == 2
    assert len(list(tmp_path.iterdir())) == 4


def test_the_json_is_plain(kept: Checkpoints) -> None:
    about = json.loads(save(kept, 4).with_suffix(".json").read_text())
    assert set(about) == {"format", "step", "sha256", "bytes", "state", "about_sha256"}


def test_a_damaged_checkpoint_does_not_push_out_a_good_one(kept: Checkpoints, said: list[str]) -> None:
    save(kept, 6)
    path = save(kept, 12)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    found = kept.newest()
    assert found is not None
    assert found.step == 6
    save(kept, 18)
    assert kept.steps() == [6, 18]
    save(kept, 24)
    assert kept.steps() == [18, 24]
