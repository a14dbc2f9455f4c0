"""What features are divided by: which power of the deviations is found, what it is worth, and what a run says of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from seda_fast import FeatureSet, SeDA, SeDAConfig, TrainConfig
from seda_fast.config import ConfigError
from seda_fast.nn.kernel_head import distinct, left_out_losses
from seda_fast.nn.scaling import POWERS, Scaling, best_power, scale_of
from seda_fast.prepare import prepare
from seda_fast.ranks import Ranks
from seda_fast.streaming import StreamedSet
from seda_fast.train import main as train

K, D = 4, 60
Arrays = tuple[np.ndarray, np.ndarray]
CPU = torch.device("cpu")


def components(n: int, seed: int = 0, noise: float = 0.2) -> Arrays:
    """As principal components are: four large ones tell the classes, ``noise`` of the others' size is noise."""
    rng, places = np.random.default_rng(seed), np.random.default_rng(99).standard_normal((K, 4))
    labels = np.arange(n) % K
    told = places[labels] + 0.8 * rng.standard_normal((n, 4))
    return np.hstack([told, noise * rng.standard_normal((n, D - 4))]).astype(np.float32), labels


def units(n: int, seed: int = 0) -> Arrays:
    """Dimensions of units of their own: a large one tells nothing, small ones tell the class."""
    values, labels = components(n, seed, noise=1.0)
    return values[:, :12] * np.array([1e-3] * 4 + [1.0] * 7 + [1e4], np.float32), labels


def power_of(values: np.ndarray, labels: np.ndarray) -> float:
    deviation = values.astype(np.float64).std(0)
    scaled = (values - values.mean(0)) / scale_of(deviation, 1.0)
    return best_power(torch.from_numpy(scaled), deviation, torch.from_numpy(labels), K)


def test_scales_are_powers_of_the_deviations_and_keep_the_mean_square() -> None:
    deviation = np.array([3.0, 0.0, 4.0])
    common = np.sqrt((9 + 16) / 2)
    np.testing.assert_allclose(scale_of(deviation, 1.0), [3, common, 4])
    np.testing.assert_allclose(scale_of(deviation, 0.0), [common] * 3)
    np.testing.assert_allclose(scale_of(deviation, 0.5), [np.sqrt(3 * common), common, np.sqrt(4 * common)])
    kept = np.square(deviation / scale_of(deviation, 0.0))
    assert kept.sum() == pytest.approx(2)
    assert scale_of(np.zeros(2), 0.0).tolist() == [1, 1]


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_what_never_changed_counts_the_same_in_any_unit(power: float) -> None:
    """A row to come may have something there: pixels at the border, as 0 .. 255 or as 0 .. 1."""
    deviation, row = np.array([3.0, 0.0, 4.0]), np.array([2.0, 5.0, -1.0])
    expected = row / scale_of(deviation, power)
    for unit in (1e-20, 1 / 255, 1e3):
        np.testing.assert_allclose(unit * row / scale_of(unit * deviation, power), expected)


def test_sorted_components_are_not_blown_up_and_units_are_not_believed() -> None:
    for seed in range(3):
        assert power_of(*components(80, seed)) == 0
        assert power_of(*units(80, seed)) == 1
        alike, labels = components(80, seed, noise=1.0)
        assert power_of(alike, labels) == 1, "all dimensions alike"
        assert power_of(alike, np.random.default_rng(seed).permutation(labels)) == 1, "nothing to tell"


def test_what_is_plainly_better_is_told_by_rows_left_out() -> None:
    """By the losses themselves: two standard errors of their mean, and 0.05 nats a row."""
    found = []
    for noise in (0.2, 0.4, 0.6, 0.8, 1.0):
        values, labels = components(60, 1, noise)
        deviation = values.astype(np.float64).std(0)
        targets = functional.one_hot(torch.from_numpy(labels), K).double()
        losses = []
        for power in POWERS:
            x = torch.from_numpy((values - values.mean(0)) / scale_of(deviation, power))
            losses.append(left_out_losses(*distinct(x, targets, K)).numpy())
        gains = [losses[0] - loss for loss in losses]
        plain = [g.mean() > max(0.05, 2 * g.std() / np.sqrt(len(g))) for g in gains]
        best = max((i for i in range(len(POWERS)) if plain[i]), key=lambda i: float(gains[i].mean()), default=0)
        assert power_of(values, labels) == POWERS[best]
        found.append(POWERS[best])
    assert found[0] == 0 and found[-1] == 1


def data_of(visual: Arrays, text: np.ndarray, **others: Any) -> FeatureSet:
    values, labels = visual
    n = len(labels)
    fields = {
        "visual_train": values, "text_train": text, "label_train": labels, "visual_test": values[:0],
        "label_test": labels[:0], "text_test": None, "class_names": tuple("abcd"), "ids_train": np.arange(n),
        "ids_test": np.arange(0), "source": "made",
    }  # fmt: skip
    return FeatureSet(**{**fields, **others})


def prepared(data: FeatureSet, **settings: Any) -> tuple[SeDA, Any]:
    sizes = {"visual_dim": data.visual_dim, "text_dim": data.text_dim, "n_classes": K}
    config = SeDAConfig(**sizes, multi_label=data.multi_label, class_text=data.text_classes is not None, width=16, blocks=1)  # fmt: skip  # noqa: E501
    return prepare(data, config, 0, CPU, **settings)


def test_a_model_divides_by_what_was_found_and_keeps_it(tmp_path: Path) -> None:
    visual, (text, _) = components(80), units(80, 5)
    text[::7] = np.nan
    data = data_of(visual, text)
    model, rows = prepared(data)
    assert model.scaling == Scaling(0.0, 1.0)
    np.testing.assert_allclose(
        rows.visual.std(0, correction=0), visual[0].std(0) / np.sqrt(visual[0].var(0).mean()), rtol=1e-4
    )
    np.testing.assert_allclose(rows.text[rows.paired].std(0, correction=0), 1, rtol=1e-4)
    torch.testing.assert_close(model.standardise_visual(torch.from_numpy(visual[0])), rows.visual)
    streamed = prepared(data_of((np.memmap(_saved(tmp_path, visual[0]), np.float32, "r", shape=visual[0].shape), visual[1]), text), memory_share=1e-9)  # fmt: skip  # noqa: E501
    assert isinstance(streamed[1], StreamedSet) and streamed[0].scaling == model.scaling
    torch.testing.assert_close(streamed[1].rows(torch.arange(9))[0], rows.visual[:9])
    model.save_pretrained(tmp_path / "model")
    loaded = SeDA.from_pretrained(tmp_path / "model")
    assert loaded.scaling is None
    torch.testing.assert_close(loaded.visual_scale, model.visual_scale)


def _saved(folder: Path, values: np.ndarray) -> Path:
    values.tofile(folder / "values")
    return folder / "values"


def test_given_powers_are_taken_and_nothing_is_sought_where_nothing_can_tell() -> None:
    visual, (text, _) = components(80), components(80, 3)
    data = data_of(visual, text)
    assert prepared(data)[0].scaling == Scaling(0.0, 0.0)
    for wanted in (Scaling(1.0, 1.0), Scaling(0.3, 0.7)):
        assert prepared(data, scaling=wanted)[0].scaling == wanted
    unlabelled = np.where(np.arange(80) < 50, -1, visual[1])
    assert prepared(data_of((visual[0], unlabelled), text))[0].scaling == Scaling(0.0, 0.0), "thirty labelled rows"
    of_classes = data_of(visual, text[:, :0], text_classes=text[:K])
    assert prepared(of_classes)[0].scaling == Scaling(0.0, 1.0)
    once = data_of((visual[0][:K], visual[1][:K]), text[:K])
    assert prepared(once)[0].scaling == Scaling(1.0, 1.0), "no class of two rows"


def test_all_ranks_divide_by_the_same() -> None:
    """A rank whose sums differ in the last bit must not choose for itself."""

    class Told(Ranks):
        def largest(self, values: Any) -> list[int]:
            return [POWERS.index(0.5)] if values == [POWERS.index(0.0)] else list(values)

    model, _ = prepared(data_of(components(80), units(80)[0]), ranks=Told())
    assert model.scaling == Scaling(0.5, 1.0)


def test_settings_are_bounded() -> None:
    for name in ("visual_scaling", "text_scaling"):
        for value in (-0.5, 1.5):
            with pytest.raises(ConfigError, match=rf"{name} must be in 0 \.\. 1, or -1 to have it found"):
                TrainConfig(**{name: value})


def test_few_rows_of_many_components_are_told_apart_and_a_run_says_how(tmp_path: Path) -> None:
    """As few rows as dimensions, which standardised lie equally far from each other."""
    (visual, labels), (new, truth) = components(60), components(200, 1)
    text, new_text = components(60, 2)[0], components(200, 3)[0]
    np.savez(tmp_path / "parts.npz", visual_train=visual, text_train=text, label_train=labels, visual_test=new,
             text_test=new_text, label_test=truth)  # fmt: skip
    small = ["--epochs", "20", "--width", "32", "--blocks", "1", "--device", "cpu", "--no-baselines"]
    top1 = []
    for name, extra, scaling in (
        ("found", [], {"visual": 0.0, "text": 0.0}),
        ("given", ["--visual-scaling", "1", "--text-scaling", "1"], {"visual": 1.0, "text": 1.0}),
    ):
        out = tmp_path / name
        assert train(["--data", str(tmp_path / "parts.npz"), "--out", str(out), *small, *extra]) == 0
        metrics = json.loads((out / "metrics.json").read_text())
        assert metrics["scaling"] == scaling
        top1.append(metrics["top1"])
    assert top1[0] > top1[1] + 10


def test_a_dimension_that_changes_less_than_float32_can_tell_is_one_that_never_does(tmp_path: Path) -> None:
    """A column of zeros and one subnormal number: its deviation would be 0 in float32, and rows no numbers."""
    assert scale_of(np.array([0.0, 1e-46, 2.0]), 1.0).tolist() == [2.0, 2.0, 2.0]
    assert scale_of(np.array([0.0, 1e-46, 2.0]), 0.5)[1] == 2.0
    rng = np.random.default_rng(0)
    visual, text = (rng.normal(size=(60, 4)).astype(np.float32) for _ in range(2))
    visual[:, 2] = text[:, 1] = 0
    visual[7, 2] = text[7, 1] = 1e-45
    labels = np.arange(60) % 3
    data = FeatureSet.from_arrays(
        visual_train=visual, label_train=labels, text_train=text, visual_test=visual, label_test=labels
    )
    config = SeDAConfig(visual_dim=4, text_dim=4, n_classes=3, width=16, blocks=1)
    model, _ = prepare(data, config, 0, torch.device("cpu"))
    assert model(torch.from_numpy(visual)).isfinite().all()
