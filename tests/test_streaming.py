"""Features that stay in their files train to the same bits, in constant memory."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from seda_fast import DataError, FeatureSet, SeDA, SeDAConfig, prepare, streaming, train
from seda_fast.arrays import check_visual, mean_and_deviation, release
from seda_fast.arrays import rows as float_rows
from seda_fast.config import FOUND
from seda_fast.loop import TrainingSet
from seda_fast.measure import refuse_unpredictable
from seda_fast.nn.scaling import Scaling
from seda_fast.ops import read_rows, reads_rows
from seda_fast.prepare import reading_threads
from seda_fast.ranks import Ranks
from seda_fast.streaming import RowReader, StreamedSet, free_memory

SMALL = ["--width", "16", "--blocks", "1", "--diffusion-steps", "50", "--no-baselines", "--batch-size", "32"]


def folder_of(path: Path, dtype: Any = np.float32, rows: int = 90, **changes: Any) -> Path:
    """A folder of .npy files with unlabelled rows and rows without text."""
    rng = np.random.default_rng(3)
    labels = np.arange(rows) % 3
    text = rng.normal(size=(rows, 5)).astype(dtype)
    text[7:11] = np.nan
    arrays = {
        "visual_train": (3 + 2 * rng.normal(size=(rows, 8))).astype(dtype),
        "text_train": text,
        "label_train": np.where(np.arange(rows) % 5, labels, -1),
        "visual_test": rng.normal(size=(12, 8)).astype(dtype),
        "label_test": np.arange(12) % 3,
        **changes,
    }
    path.mkdir()
    for name, array in arrays.items():
        np.save(path / f"{name}.npy", array)
    return path


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
def test_streamed_training_has_the_bits_of_training_from_memory(dtype: str, tmp_path: Path) -> None:
    data = folder_of(tmp_path / "data", dtype)
    arguments = ["--data", str(data), "--unpaired", "keep", *SMALL, "--epochs", "3"]
    assert train.main([*arguments, "--out", str(tmp_path / "memory")]) == 0
    assert train.main([*arguments, "--out", str(tmp_path / "files"), "--memory-share", "0"]) == 0
    for name, where in (("memory", "on the device"), ("files", "in its files")):
        assert json.loads((tmp_path / name / "metrics.json").read_text())["train"]["data"] == where
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("memory", "files")]
    assert weights[0] == weights[1]


def test_baselines_refuse_what_they_would_have_to_load(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = folder_of(tmp_path / "data")
    arguments = ["--data", str(data), "--unpaired", "keep", "--out", str(tmp_path / "out"), "--memory-share", "0"]
    assert train.main(arguments) == 2
    (said,) = capfd.readouterr().err.splitlines()
    assert "the baselines would load it whole; give --no-baselines" in said
    assert not (tmp_path / "out").exists()


def streamed(data: Path) -> StreamedSet:
    maps = [np.lib.format.open_memmap(data / f"{name}_train.npy", mode="r") for name in ("visual", "text")]
    count = len(maps[0])
    return StreamedSet(
        RowReader(maps[0]), RowReader(maps[1]), *(f(n) for n in (8, 5) for f in (torch.zeros, torch.ones)),
        torch.zeros(count, dtype=torch.int64), torch.ones(count, dtype=torch.bool), torch.arange(count),
    )  # fmt: skip


def test_batches_are_the_rows_asked_for_though_buffers_are_used_again(tmp_path: Path) -> None:
    data = folder_of(tmp_path / "data")
    visual, text = np.load(data / "visual_train.npy"), np.nan_to_num(np.load(data / "text_train.npy"))
    parts = list(torch.randperm(90, generator=torch.Generator().manual_seed(1)).split(13))
    kept = list(streamed(data).batches(parts))
    for part, (v, t, _, _, ids) in zip(parts, kept, strict=True):
        np.testing.assert_array_equal(v.numpy(), visual[part])
        np.testing.assert_array_equal(t.numpy(), text[part])
        assert torch.equal(ids, part)


needs_cpp = pytest.mark.skipif(not reads_rows(), reason="the C++ half was not built")


@needs_cpp
@pytest.mark.parametrize("dtype", ["float16", "float32", ">f8"])
def test_rows_are_read_alike_in_cpp_and_in_python(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.npy"
    np.save(file, np.random.default_rng(1).normal(size=(50, 7)).astype(dtype))
    array = np.lib.format.open_memmap(file, mode="r")
    index = np.array([3, 3, 49, 0, 17, 20, 1])
    found = {}
    for threads in (1, 3, 16, 0):
        if threads == 0:
            monkeypatch.setattr(streaming, "reads_rows", lambda: False)
        found[threads] = np.full((7, 7), np.nan, np.float32)
        RowReader(array, max(1, threads)).into(found[threads], index)
        np.testing.assert_array_equal(found[threads], array[index].astype(np.float32))
    empty = np.zeros((0, 7), np.float32)
    RowReader(array).into(empty, index[:0])


@needs_cpp
def test_a_read_that_fails_says_why(tmp_path: Path) -> None:
    file = tmp_path / "rows"
    file.write_bytes(bytes(range(40)))
    with file.open("rb") as opened:
        target = torch.zeros(2, 8, dtype=torch.uint8)
        read_rows(opened.fileno(), 8, torch.tensor([3, 0]), target, threads=2)
        assert target.tolist() == [list(range(32, 40)), list(range(8, 16))]
        with pytest.raises(EOFError, match="the file ends before a row does"):
            read_rows(opened.fileno(), 8, torch.tensor([0, 4]), target)
        with pytest.raises(RuntimeError, match=r"rows\[1\] is -1"):
            read_rows(opened.fileno(), 8, torch.tensor([0, -1]), target)
        number = opened.fileno()
    with pytest.raises(OSError, match="Bad file descriptor"):
        read_rows(number, 8, torch.tensor([0, 1]), target)


def test_no_batch_waits_for_the_device(tmp_path: Path) -> None:
    """On a device without data: what is copied there must not make the host wait."""
    data = streamed(folder_of(tmp_path / "data"))
    there = {f.name: getattr(data, f.name) for f in dataclasses.fields(data)}
    there = {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in there.items()}
    waited = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._to_copy.default:
                waited.append(not (kwargs or {}).get("non_blocking", False))
            return func(*args, **(kwargs or {}))

    with Copies():
        assert [len(batch[0]) for batch in StreamedSet(**there).batches(torch.arange(30).split(10))] == [10] * 3
    assert waited == [False] * 9  # row numbers, visual and textual features


@pytest.mark.gpu
def test_batches_stay_what_they_are_while_a_busy_gpu_falls_behind(tmp_path: Path) -> None:
    data = streamed(folder_of(tmp_path / "data"))
    there = {f.name: getattr(data, f.name) for f in dataclasses.fields(data)}
    there = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in there.items()}
    parts, kept = list(torch.randperm(90, generator=torch.Generator().manual_seed(1)).split(7)), []
    torch.cuda.synchronize()
    for batch in StreamedSet(**there).batches(parts):
        # 10 ms: the host has filled both buffers again, and the reader waits for the copies out of them.
        torch.cuda._sleep(20_000_000)
        kept.append([field.clone() for field in batch])
    for part, found, expected in zip(parts, kept, data.batches(parts), strict=True):
        assert torch.equal(found[4].cpu(), part)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a.cpu(), b)


def test_a_loop_that_stops_early_leaves_no_reader(tmp_path: Path) -> None:
    import threading

    before = threading.active_count()
    batches = streamed(folder_of(tmp_path / "data")).batches(list(torch.arange(90).split(5)))
    next(batches)
    assert threading.active_count() == before + 1
    batches.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_a_file_that_shrinks_is_one_sentence(tmp_path: Path) -> None:
    data = folder_of(tmp_path / "data")
    rows = streamed(data)
    os.truncate(data / "visual_train.npy", 1000)
    with pytest.raises(DataError, match=r"visual_train.npy became shorter while it was read"):
        list(rows.batches([torch.arange(90)]))


def test_a_part_of_a_map_is_read_from_where_it_lies(tmp_path: Path) -> None:
    data = folder_of(tmp_path / "data")
    whole = np.lib.format.open_memmap(data / "visual_train.npy", mode="r")
    target = np.empty((2, 8), np.float32)
    RowReader(whole[10:]).into(target, np.array([0, 3]))
    np.testing.assert_array_equal(target, np.load(data / "visual_train.npy")[[10, 13]])


def test_columns_in_a_file_are_refused_with_what_helps(tmp_path: Path) -> None:
    """Each row lies in as many places as it has features: all of the file would be read for every batch, or held."""
    np.save(tmp_path / "turned.npy", np.asfortranarray(np.ones((30, 8), np.float32)))
    reader = RowReader(np.lib.format.open_memmap(tmp_path / "turned.npy", mode="r"))
    with pytest.raises(DataError, match=r"turned.npy is in Fortran order .* numpy.ascontiguousarray"):
        reader.into(np.empty((2, 8), np.float32), np.arange(2))


@pytest.mark.parametrize(
    ("device", "ranks", "threads"),
    [
        ("cpu", Ranks(), 1),
        ("cuda", Ranks(), 4),
        ("cuda", Ranks(0, 2), 4),
        ("cuda", Ranks(5, 6), 2),
        ("cuda", Ranks(0, 32), 1),
    ],
)
def test_the_ranks_of_a_host_share_its_processors_for_reading(
    device: str, ranks: Ranks, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("seda_fast.prepare.processors", lambda: 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks.world))
    assert reading_threads(torch.device(device), ranks) == threads


def test_torchrun_s_one_thread_a_rank_is_not_taken_for_the_number_of_processors() -> None:
    code = "import torch; from seda_fast.prepare import processors; print(torch.get_num_threads(), processors())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["1", str(len(os.sched_getaffinity(0)))]


# pthread_create in the place of the system's: from `fail` on there are no more threads.
NO_THREADS = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
int fail = 0, refused = 0;
int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*start)(void*), void* argument) {
  if (fail) return ++refused, EAGAIN;
  int (*real)(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*) = dlsym(RTLD_NEXT, "pthread_create");
  return real(thread, attributes, start, argument);
}
"""
READ_WITHOUT_THREADS = """
import ctypes, sys, numpy as np
from seda_fast.streaming import RowReader
shim = ctypes.CDLL(sys.argv[1])
array = np.load(sys.argv[2], mmap_mode="r")
ctypes.c_int.in_dll(shim, "fail").value = 1
found, index = np.empty((40, 8), np.float32), np.arange(40)[::-1].copy()
RowReader(array, 7).into(found, index)
assert ctypes.c_int.in_dll(shim, "refused").value == 1
assert (found == array[index]).all()
"""


@needs_cpp
def test_where_there_are_no_more_threads_one_reads_all(tmp_path: Path) -> None:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("this test needs a C compiler")
    (tmp_path / "shim.c").write_text(NO_THREADS)
    shim = str(tmp_path / "shim.so")
    subprocess.run([compiler, "-shared", "-fPIC", str(tmp_path / "shim.c"), "-o", shim, "-ldl"], check=True)
    np.save(tmp_path / "rows.npy", np.random.default_rng(2).normal(size=(40, 8)).astype(np.float32))
    command = [sys.executable, "-c", READ_WITHOUT_THREADS, shim, str(tmp_path / "rows.npy")]
    done = subprocess.run(
        command, env={**os.environ, "LD_PRELOAD": shim}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_passes_over_a_map_leave_none_of_it_in_memory(tmp_path: Path) -> None:
    made = np.lib.format.open_memmap(tmp_path / "a.npy", mode="w+", dtype=np.float32, shape=(2**18, 256))
    del made
    array = np.lib.format.open_memmap(tmp_path / "a.npy", mode="r")
    before = resident()
    check_visual("a", array)
    mean_and_deviation(array)
    small = SeDAConfig(visual_dim=256, text_dim=4, n_classes=3, width=16, blocks=1)
    refuse_unpredictable(SeDA(small), array, "a")
    assert resident() - before < 64e6
    assert array.sum() == 0  # maps all of it
    assert resident() - before > 200e6
    release(array)
    assert resident() - before < 64e6


def test_ranks_of_a_host_share_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = FeatureSet.load(folder_of(tmp_path / "data"), unpaired="keep")
    config = SeDAConfig(visual_dim=8, text_dim=5, n_classes=3, width=16, blocks=1)
    cpu = torch.device("cpu")
    # Half of the free memory is enough for one rank, and for one of two on a host it is not.
    monkeypatch.setattr(prepare, "free_memory", lambda device: int(2.5 * 4 * 90 * (8 + 5)))
    monkeypatch.setattr(Ranks, "add", lambda ranks, tensor: tensor)
    monkeypatch.setattr(Ranks, "largest", lambda ranks, values: list(values))
    monkeypatch.setattr(Ranks, "spread", lambda ranks, tensor: None)
    for hosts, on_host, streams in ((1, "1", False), (2, "1", False), (2, "2", True)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", on_host)
        _, rows = prepare.prepare(data, config, 0, cpu, ranks=Ranks(0, hosts))
        assert isinstance(rows, StreamedSet) == streams
    # One rank without room is enough.
    monkeypatch.setattr(Ranks, "largest", lambda ranks, values: [max(*values, 1)])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert isinstance(prepare.prepare(data, config, 0, cpu, ranks=Ranks(0, 2))[1], StreamedSet)


def test_free_memory_is_what_the_system_says() -> None:
    assert 0 < free_memory(torch.device("cpu")) <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("inner", "outer", "left"),
    [
        ((900, 500, 100), None, 500),
        ((900, 500, 0), (700, 600, 50), 150),
        (("max", 1, 0), None, 4096),
        ((9, 50, 3), None, 0),
    ],
)
def test_free_memory_is_what_a_container_leaves(
    tmp_path: Path, inner: tuple[Any, int, int], outer: tuple[int, int, int] | None, left: int
) -> None:
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 4 kB\n")
    (tmp_path / "proc" / "self" / "cgroup").write_text("1:cpu:/x\n0::/a/b\n")
    for path, told in (("a/b", inner), ("a", outer)):
        group = tmp_path / "sys" / "fs" / "cgroup" / path
        group.mkdir(parents=True, exist_ok=True)
        if told is not None:
            for name, value in zip(("max", "current", "stat"), told, strict=True):
                (group / f"memory.{name}").write_text(f"inactive_file {value}\n" if name == "stat" else f"{value}\n")
    assert free_memory(torch.device("cpu"), tmp_path) == left


def test_what_was_changed_in_a_copy_on_write_map_is_kept_and_trained_on(tmp_path: Path) -> None:
    """Its pages are the user's own: given back to the system, they would be the file's again."""
    folder = folder_of(tmp_path / "data")
    changed = np.load(folder / "visual_train.npy", mmap_mode="c")
    changed[:] = 3 * changed + 5
    expected = np.array(changed)
    check_visual("a", changed)
    mean, _ = mean_and_deviation(changed[:])
    target = np.empty((3, changed.shape[1]), np.float32)
    RowReader(changed).into(target, np.array([4, 1, 80]))
    release(changed)
    np.testing.assert_array_equal(changed, expected)
    np.testing.assert_allclose(mean, expected.mean(axis=0), rtol=1e-6)
    np.testing.assert_array_equal(target, expected[[4, 1, 80]])


def test_a_map_whose_file_was_removed_is_read_as_it_is(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    np.save(tmp_path / "a.npy", values)
    array = np.load(tmp_path / "a.npy", mmap_mode="r")
    (tmp_path / "a.npy").unlink()
    found = np.empty((3, 4), dtype=np.float32)
    RowReader(array).into(found, np.array([5, 0, 19]))
    np.testing.assert_array_equal(found, values[[5, 0, 19]])


def test_texts_in_a_file_are_streamed_beside_images_in_memory(tmp_path: Path) -> None:
    rng, labels = np.random.default_rng(0), np.arange(60) % 3
    np.save(tmp_path / "text.npy", rng.normal(size=(60, 5)).astype(np.float32))
    visual = rng.normal(size=(60, 8)).astype(np.float32)
    text = np.load(tmp_path / "text.npy", mmap_mode="r")
    data = FeatureSet.from_arrays(visual, text, labels, visual[:9], labels[:9])
    assert isinstance(data.text_train, np.memmap)
    config = SeDAConfig(visual_dim=8, text_dim=5, n_classes=3, width=16, blocks=1)
    _, rows = prepare.prepare(data, config, 0, torch.device("cpu"), memory_share=1e-12)
    assert isinstance(rows, StreamedSet)
    (batch,) = rows.batches([torch.tensor([3, 59])])
    _, loaded = prepare.prepare(data, config, 0, torch.device("cpu"))
    assert isinstance(loaded, TrainingSet)
    torch.testing.assert_close(batch[1], loaded.text[[3, 59]])


def test_moments_are_of_the_float32_that_is_standardised(tmp_path: Path) -> None:
    """A column of float64 that varies by less than float32 can tell lies in two of its numbers."""
    rng, labels = np.random.default_rng(0), np.arange(100) % 2
    visual = rng.normal(size=(100, 5))
    visual[:, 0] = 16777217 + 1e-6 * rng.normal(size=100)
    folder = folder_of(tmp_path / "data", rows=100)
    for name, array in {"visual_train": visual, "visual_test": visual[:9], "text_train": visual[:, 1:]}.items():
        np.save(folder / f"{name}.npy", array)
    np.save(folder / "label_train.npy", labels)
    np.save(folder / "label_test.npy", labels[:9])
    config = SeDAConfig(visual_dim=5, text_dim=4, n_classes=2, width=16, blocks=1)
    _, rows = prepare.prepare(FeatureSet.load(folder), config, 0, torch.device("cpu"))
    assert isinstance(rows, TrainingSet)
    assert rows.visual.abs().max() < 10
    assert rows.visual[:, 0].std() == pytest.approx(1, rel=0.02)


def test_a_map_of_a_file_without_a_name_is_read_as_it_is() -> None:
    with tempfile.TemporaryFile() as file:
        array = np.memmap(file, np.float32, "w+", shape=(6, 3))
        array[:] = np.arange(18).reshape(6, 3)
        target = np.empty((2, 3), np.float32)
        RowReader(array).into(target, np.array([4, 1]))
        np.testing.assert_array_equal(target, array[[4, 1]])


def test_rows_take_no_more_memory_than_they_have() -> None:
    array = np.random.default_rng(0).normal(size=(4000, 200)).astype(np.float32)
    for index in (slice(None), np.arange(4000)):
        tracemalloc.start()
        found = float_rows(array, index)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        np.testing.assert_array_equal(found, array)
        assert not np.shares_memory(found, array)
        assert most < 1.2 * array.nbytes
    assert float_rows(array[:, ::2], slice(None)).flags.c_contiguous
    assert float_rows(array.astype(np.float64), slice(5)).dtype == np.float32


def test_a_set_fits_a_gpu_only_where_it_fits_the_host_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = FeatureSet.load(folder_of(tmp_path / "data"), unpaired="keep")
    needed = 4 * 90 * (8 + 5)
    for host, gpu, too_large in ((3, 3, False), (3, 1, True), (1, 3, True)):
        free = {"cpu": host * needed, "cuda": gpu * needed}
        monkeypatch.setattr(prepare, "free_memory", lambda device, free=free: free[device.type])
        assert prepare._too_large(data, torch.device("cuda"), 0.5, Ranks()) == too_large


MEASURED = """
import sys, torch
import seda_fast.train
from seda_fast.measure import peak_memory_bytes
code = seda_fast.train.main(sys.argv[1:])
print(peak_memory_bytes(torch.device("cpu")))
sys.exit(code)
"""


def peak(arguments: list[str]) -> int:
    """Peak of resident bytes of a run."""
    command = [sys.executable, "-c", MEASURED, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


def in_memory(file: Path) -> int:
    """Bytes of a mapped file that this process has in memory."""
    blocks = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.M)
    of_file = (block for block in blocks if block.split("\n", 1)[0].endswith(str(file)))
    return sum(1024 * int(kb) for block in of_file for kb in re.findall(r"^Rss: +(\d+)", block, flags=re.M))


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="what of a map is in memory is read from /proc")
def test_rows_that_tell_the_scaling_leave_little_of_their_map_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, 1024 rows here and there had brought 1.3 of 2 GB: of a map each row brings those around it."""
    rows, dim = 10_000, 1000
    data = folder_of(tmp_path / "data", rows=rows, label_train=np.arange(rows) % 3)
    file = data / "visual_train.npy"
    file.unlink()
    test = np.zeros((12, dim))
    np.save(data / "visual_test.npy", test)
    visual = np.lib.format.open_memmap(file, mode="w+", dtype=np.float64, shape=(rows, dim))
    visual[:, 0] = np.arange(rows) % 7
    del visual
    held = []

    def watched(array: Any, index: Any) -> Any:
        found = float_rows(array, index)
        if array.shape[1] == dim and len(held) < 24:
            held.append(in_memory(file))
        return found

    monkeypatch.setattr(prepare, "float_rows", watched)
    read = FeatureSet.load(data, unpaired="keep")
    config = SeDAConfig(visual_dim=dim, text_dim=5, n_classes=3, width=16, blocks=1, kernel_weight=0)
    prepare.prepare(
        read, config, 0, torch.device("cpu"), memory_share=0.0, label_share=1.0, scaling=Scaling(FOUND, 1.0)
    )
    assert len(held) == 24
    assert 0 < max(held) < 0.25 * rows * dim * 8


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_four_gigabytes_train_within_six_hundred_megabytes(tmp_path: Path) -> None:
    """Sparse files, which take no disk but are read like any other."""
    rows, dim = 62_500, 4000
    test = np.zeros((12, dim))
    few: dict[str, Any] = {"visual_train": np.zeros((300, dim)), "text_train": np.zeros((300, dim))}
    few |= {"label_train": np.arange(300) % 3, "visual_test": test}
    small = folder_of(tmp_path / "small", np.float64, **few)
    large = folder_of(tmp_path / "large", np.float64, visual_test=test, label_train=np.arange(rows) % 3)
    for name in ("visual_train", "text_train"):
        del_me = np.lib.format.open_memmap(large / f"{name}.npy", mode="w+", dtype=np.float64, shape=(rows, dim))
        del del_me
    assert sum((large / f"{name}.npy").stat().st_size for name in ("visual_train", "text_train")) >= 4e9
    common = ["--width", "16", "--blocks", "1", "--diffusion-steps", "20", "--no-baselines", "--batch-size", "512"]
    common += ["--visual-width", "16", "--epochs", "1", "--memory-share"]
    without = peak([*common, "1", "--data", str(small), "--out", str(tmp_path / "a")])
    streamed = peak([*common, "0.01", "--data", str(large), "--out", str(tmp_path / "b")])
    assert json.loads((tmp_path / "b" / "metrics.json").read_text())["train"]["data"] == "in its files"
    assert 1e8 < without < 1e9  # the process alone, not what started it
    assert streamed - without < 600e6
