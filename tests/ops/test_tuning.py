"""Tiles: the shape rule, measuring them when asked to, and the file that remembers what was measured."""

import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
tuning: Any = pytest.importorskip("seda_fast.kernels.tuning")


def test_small_results_get_small_tiles_and_large_ones_the_first() -> None:
    tiles = tuning.candidates(torch.bfloat16)
    assert tuning.by_shape(tiles, 100_000, 1024) == tiles[0]
    assert tuning.by_shape(tiles, 1, 1) == tiles[-1]
    chosen = [tuning.by_shape(tiles, rows, 512) for rows in (64, 1024, 4096, 65_536)]
    assert [tile.m * tile.n for tile in chosen] == sorted(tile.m * tile.n for tile in chosen)


def test_without_being_asked_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEDA_FAST_AUTOTUNE", raising=False)
    tiles = tuning.candidates(torch.float32)

    def launch(tile: Any) -> None:
        raise AssertionError("a tile was timed")

    assert tuning.choose("kernel", torch.zeros(1), (8, 8, 8), tiles, launch) == tiles[-1]


def test_the_fastest_tile_wins_and_one_that_does_not_fit_is_passed_over() -> None:
    tiles = tuning.candidates(torch.bfloat16)
    seconds = dict(zip(tiles, (1.0, 3.0, 2.0, 4.0), strict=True))
    last: list[Any] = []

    def launch(tile: Any) -> None:
        if tile == tiles[0]:
            raise tuning.triton.runtime.errors.OutOfResources(200_000, 100_000, "shared memory")
        last.append(tile)

    def measure(call: Any) -> float:
        call()
        return seconds[last[-1]]

    assert tuning.fastest(tiles, launch, measure) == tiles[2]


def test_what_was_measured_is_read_by_another_process(tmp_path: Path) -> None:
    file = tmp_path / "cache" / "tiles.json"
    tile = tuning.candidates(torch.bfloat16)[1]
    tuning.remember(file, "first", tile)
    tuning.remember(file, "second", tile._replace(m=16))
    code = (
        "import sys, pathlib; from seda_fast.kernels import tuning;"
        "print([list(tuning.read(pathlib.Path(sys.argv[1]))[key]) for key in ('first', 'second')])"
    )
    done = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [list(tile), [16, *tile[1:]]]
    assert [entry.name for entry in file.parent.iterdir()] == ["tiles.json"]


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"key": [1, 2]}', '{"key": ["a", 1, 1, 1, 1]}', "\x00"])
def test_a_damaged_file_counts_as_empty(tmp_path: Path, content: str) -> None:
    file = tmp_path / "tiles.json"
    file.write_text(content)
    assert tuning.read(file) == {}


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    tile = tuning.candidates(torch.bfloat16)[0]
    assert tuning.remember(tmp_path / "file" / "tiles.json", "key", tile) == tile


class Gpu:
    """What `choose` needs of a GPU: a tensor there, a device's name, whether a graph is being captured, a clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        monkeypatch.setenv("SEDA_FAST_AUTOTUNE", "1")
        monkeypatch.setenv("SEDA_FAST_CACHE_DIR", str(folder))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(tuning, "fastest", self.fastest)
        self.capturing, self.measured = False, 0
        self.tensor: Any = types.SimpleNamespace(is_cuda=True, device="cuda:0", dtype=torch.bfloat16)

    def fastest(self, tiles: tuple[Any, ...], launch: Any) -> Any:
        self.measured += 1
        return tiles[0]

    def choose(self, tiles: tuple[Any, ...], variant: str = "") -> Any:
        def launch(tile: Any) -> None:
            raise AssertionError("launched by the choice itself")

        # By the rule a small result gets the last tile.
        return tuning.choose("kernel", self.tensor, (8, 8, 8), tiles, launch, variant)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Gpu:
    return Gpu(monkeypatch, tmp_path)


def test_nothing_is_measured_while_a_graph_is_captured(gpu: Gpu) -> None:
    tiles = tuning.candidates(torch.bfloat16)
    gpu.capturing = True
    assert gpu.choose(tiles) == tiles[-1]
    assert gpu.measured == 0
    gpu.capturing = False
    assert gpu.choose(tiles) == tiles[0]
    gpu.capturing = True
    assert gpu.choose(tiles) == tiles[0], "what was measured before serves a capture too"
    assert gpu.measured == 1


def test_another_set_of_tiles_or_another_variant_is_measured_by_itself(gpu: Gpu) -> None:
    """Products of other sizes may take other tiles; TF32 and full precision differ."""
    tiles, wide = tuning.candidates(torch.bfloat16), tuning.candidates(torch.bfloat16, columns=128)
    assert wide != tiles
    for chosen, variant in ((tiles, ""), (wide, ""), (tiles, "PRECISION=tf32"), (tiles, "PRECISION=ieee")):
        before = gpu.measured
        assert gpu.choose(chosen, variant) == chosen[0]
        assert gpu.measured == before + 1
        assert gpu.choose(chosen, variant) == chosen[0]
        assert gpu.measured == before + 1


@pytest.mark.gpu
def test_tiles_are_measured_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEDA_FAST_AUTOTUNE", "1")
    monkeypatch.setenv("SEDA_FAST_CACHE_DIR", str(tmp_path))
    tiles = tuning.candidates(torch.bfloat16)
    calls: list[Any] = []
    chosen = tuning.choose("kernel", torch.zeros(1, device="cuda"), (8, 8, 8), tiles, calls.append)
    first = len(calls)
    assert set(calls) == set(tiles)
    assert tuning.choose("kernel", torch.zeros(1, device="cuda"), (8, 8, 8), tiles, calls.append) == chosen
    assert len(calls) == first
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tuning.choose("another", torch.zeros(1, device="cuda"), (8, 8, 8), tiles, calls.append)
    assert len(calls) == first


@pytest.mark.gpu
def test_the_head_s_products_are_measured_and_compute_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from seda_fast.ops import semantic_projection, use_backend

    features, weight = (torch.randn(n, 72, device="cuda").bfloat16().requires_grad_() for n in (300, 40))
    bias, labels = torch.zeros(40, device="cuda").bfloat16(), torch.arange(300, device="cuda") % 40
    found = []
    for asked in ("0", "1"):
        monkeypatch.setenv("SEDA_FAST_AUTOTUNE", asked)
        monkeypatch.setenv("SEDA_FAST_CACHE_DIR", str(tmp_path))
        with use_backend("triton"):
            entropy = semantic_projection(features, labels, None, weight, bias)[1]
            found.append((entropy.detach(), *torch.autograd.grad(entropy, (features, weight))))
    (file,) = tmp_path.iterdir()
    assert {key.split()[0] for key in json.loads(file.read_text())} == {"normaliser_kernel", "feature_gradient_kernel"}
    for tuned, by_rule in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(tuned, by_rule, rtol=2e-2, atol=1e-3)
