"""What a caller has switched on in PyTorch changes neither a training nor a prediction, and is as it was afterwards."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from seda_fast import FeatureSet, SeDA, SeDAClassifier, SeDAConfig, TrainConfig
from seda_fast.baselines import fit_baseline
from seda_fast.loop import train
from seda_fast.prepare import prepare
from seda_fast.surroundings import undisturbed

SMALL = {"width": 16, "blocks": 1, "expansion": 1, "time_embedding": 4, "diffusion_steps": 20}
RNG = np.random.default_rng(0)
LABELS = np.arange(48) % 3
VISUAL = (RNG.normal(size=(48, 8)) + LABELS[:, None]).astype(np.float32)
TEXT = (RNG.normal(size=(48, 5)) + LABELS[:, None]).astype(np.float32)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)


SURROUNDINGS = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default float64": lambda: default_dtype(torch.float64),
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    # As torch.set_default_device("cuda") does where there is one: a tensor made there meets none of the others.
    "default device": lambda: torch.device("meta"),
}


def surrounded(name: str) -> AbstractContextManager[object]:
    found: AbstractContextManager[object] = SURROUNDINGS[name]()  # type: ignore[no-untyped-call,operator]
    return found


def estimated(folder: Path) -> np.ndarray:
    model = SeDAClassifier(**SMALL, epochs=2, random_state=1).fit(VISUAL, LABELS, text=TEXT)
    model.save_pretrained(folder)
    again = SeDAClassifier.from_pretrained(folder)
    return np.hstack([model.predict_log_proba(VISUAL), again.predict_log_proba(VISUAL), again.transform(VISUAL)])


def trained() -> list[torch.Tensor]:
    ids = np.arange(48)
    parts = (VISUAL, TEXT, LABELS, VISUAL[:0], LABELS[:0], None, ("a", "b", "c"), ids, ids[:0])
    config = SeDAConfig(**SMALL, visual_dim=8, text_dim=5, n_classes=3)
    model, rows = prepare(FeatureSet(*parts, "rows"), config, 1, torch.device("cpu"))
    return list(train(model, rows, TrainConfig(epochs=2))[0].state_dict().values())


@pytest.fixture(scope="module")
def plainly_estimated(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    return estimated(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def plainly_trained() -> list[torch.Tensor]:
    return trained()


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_an_estimator_is_the_same_in_any(name: str, tmp_path: Path, plainly_estimated: np.ndarray) -> None:
    with surrounded(name):
        found = estimated(tmp_path)
    np.testing.assert_array_equal(found, plainly_estimated)


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_a_training_is_the_same_in_any(name: str, plainly_trained: list[torch.Tensor]) -> None:
    with surrounded(name):
        found = trained()
    for ours, expected in zip(found, plainly_trained, strict=True):
        assert ours.device == expected.device and torch.equal(ours, expected)


def test_estimators_are_fitted_in_threads_as_one_by_one() -> None:
    """A process has one default generator and one default dtype: both were taken from under a neighbour."""

    def fit(seed: int) -> np.ndarray:
        model = SeDAClassifier(**SMALL, epochs=2, random_state=seed).fit(VISUAL, LABELS, text=TEXT)
        return model.predict_log_proba(VISUAL)

    alone = [fit(seed) for seed in range(8)]
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    with default_dtype(torch.float64), ThreadPoolExecutor(4) as pool:
        for found, wanted in zip(pool.map(fit, range(8)), alone, strict=True):
            np.testing.assert_array_equal(found, wanted)
    assert torch.rand(1).equal(expected)


def test_a_gpu_s_generator_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.manual_seed` would seed those of all GPUs, which nothing brings back."""
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    before = torch.get_rng_state()
    trained()
    assert torch.equal(torch.get_rng_state(), before)
    assert seeds == []
    torch.manual_seed(3)
    assert seeds == [3]


def test_a_default_dtype_that_is_set_inside_is_kept_out_and_restored() -> None:
    with undisturbed():
        torch.set_default_dtype(torch.float64)
        with undisturbed():
            assert torch.get_default_dtype() == torch.float32
    assert torch.get_default_dtype() == torch.float64
    torch.set_default_dtype(torch.float32)


def test_a_model_is_read_in_the_type_it_was_written_in(tmp_path: Path) -> None:
    estimated(tmp_path)
    ids = torch.arange(48)
    expected = SeDA.from_pretrained(tmp_path)(torch.from_numpy(VISUAL), ids)
    with default_dtype(torch.float64):
        found = SeDA.from_pretrained(tmp_path)(torch.from_numpy(VISUAL), ids)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_tensors_are_taken_as_arrays_are(dtype: torch.dtype) -> None:
    visual, text = (torch.from_numpy(a).to(dtype).requires_grad_() for a in (VISUAL, TEXT))
    arrays = [a.detach().to(torch.float32).numpy() for a in (visual, text)]
    model = SeDAClassifier(**SMALL, epochs=1, random_state=1)
    expected = model.fit(arrays[0], LABELS, text=arrays[1]).predict_proba(arrays[0])
    found = model.fit(visual, torch.from_numpy(LABELS), text=text)
    np.testing.assert_array_equal(found.predict_proba(visual), expected)
    assert found.score(visual, torch.from_numpy(LABELS)) == (expected.argmax(1) == LABELS).mean()


def test_tensors_are_scored_as_arrays_are() -> None:
    indicator = np.eye(3, dtype=np.float32)[LABELS]
    indicator[::4] = -1
    model = SeDAClassifier(**SMALL, epochs=1, random_state=1, unlabelled=-1).fit(VISUAL, indicator, text=TEXT)
    visual, targets = (torch.from_numpy(a).to(torch.bfloat16).requires_grad_() for a in (VISUAL, indicator))
    weights = torch.linspace(0.1, 1, 48, dtype=torch.bfloat16, requires_grad=True)
    arrays = [a.detach().float().numpy() for a in (visual, weights)]
    assert model.score(visual, targets, weights) == model.score(arrays[0], indicator, arrays[1])


@pytest.mark.parametrize("name", ["mlp", "one_step"])
def test_baselines_leave_a_gpu_s_generator_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    before = torch.get_rng_state()
    found = [fit_baseline(name, VISUAL, TEXT, LABELS, n_classes=3, seed=0, epochs=1) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert seeds == []
    assert np.array_equal(*(baseline.log_proba(VISUAL) for baseline in found))


def test_data_are_read_under_another_default_device(tmp_path: Path) -> None:
    with torch.device("meta"):
        found = FeatureSet.from_arrays(VISUAL, TEXT, LABELS)
    assert np.array_equal(found.label_test, FeatureSet.from_arrays(VISUAL, TEXT, LABELS).label_test)
