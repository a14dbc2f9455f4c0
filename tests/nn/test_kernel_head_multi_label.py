"""The kernel head, and the scaling that is found, where a row carries any number of the classes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from seda_fast import FeatureSet, SeDA, SeDAConfig
from seda_fast.nn import kernel_head
from seda_fast.nn.kernel_head import (
    NOTHING_TO_CARRY,
    RIDGES,
    SHARPNESS,
    KernelHead,
    judged_rows,
    kernel_rows,
    tangent_kernel,
)
from seda_fast.prepare import prepare

K, DV = 3, 5


def carrying(rows: int, noise: float, seed: int = 0, missing: float = 0.1) -> tuple[Tensor, Tensor]:
    """Standardised features (rows, DV), and what they carry (rows, K): a yes or no along a direction each."""
    rng = np.random.default_rng(seed)
    directions = np.random.default_rng(1).standard_normal((DV, K))
    visual = rng.standard_normal((rows, DV)).astype(np.float32)
    carried = visual @ directions + noise * rng.standard_normal((rows, K)) > missing
    return torch.from_numpy(visual), torch.from_numpy(carried.astype(np.int64))


def fitted(visual: Tensor, targets: Tensor, seed: int = 0) -> KernelHead:
    head = KernelHead(visual.shape[1], targets.shape[1])
    head.fit_multi_label(visual, targets, seed)
    return head


def entropies(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1)


def test_it_is_the_regression_that_tells_left_out_rows_best() -> None:
    """By fits without each row: the ridge, and a sharpness and shifts that nothing near them beats."""
    visual, labels = carrying(30, 0.6)
    head = fitted(visual, labels.float())
    x = visual.double()
    scale = x.square().sum(1).mean().sqrt()
    x, y = x / scale, (30 * labels.double() + 1 / 2) / 31  # one row more carries each class by half
    kernel, mean = tangent_kernel(x, x), y.mean(0)
    losses, told = {}, {}
    for ridge in RIDGES:
        rows = []
        for i in range(30):
            rest = torch.arange(30) != i
            gram = kernel[rest][:, rest] + ridge * torch.eye(29, dtype=x.dtype)
            rows.append(kernel[i, rest] @ torch.linalg.solve(gram, (y - mean)[rest]) + mean)
        told[ridge] = torch.stack(rows)
        losses[ridge] = min(float(entropies(s * (told[ridge] - 0.5), y).mean()) for s in SHARPNESS)
    ridge = min(losses, key=losses.__getitem__)

    weight = torch.linalg.solve(kernel + ridge * torch.eye(30, dtype=x.dtype), y - mean)
    sharpness = (head.weight.double().mT / weight).mean()
    torch.testing.assert_close(head.weight.double().mT, sharpness * weight, rtol=1e-4, atol=1e-4)
    shift = head.bias.double() - sharpness * (mean - 0.5)
    best = entropies(sharpness * (told[ridge] - 0.5) + shift, y).sum() + shift.square().sum() / 2
    for i in range(K + 1):
        for step in (-0.05, 0.05):
            sharp, moved = sharpness * (1 + step * (i == K)), shift.clone()
            if i < K:
                moved[i] += step
            assert best < entropies(sharp * (told[ridge] - 0.5) + moved, y).sum() + moved.square().sum() / 2


def test_what_rows_carry_is_told_and_what_cannot_be_known_is_not() -> None:
    visual, labels = carrying(400, 0.1)
    head = fitted(visual[:300], labels[:300].float())
    told, truth = head(visual[300:]), labels[300:]
    wrong = ((told > 0) != (truth > 0)).float().mean()
    assert wrong < 0.07
    assert entropies(told, truth.float()).mean() / K < 3 * wrong, "as sure as it may be"
    torch.manual_seed(3)
    blind, rates = torch.randn(400, DV), torch.tensor([0.5, 0.2, 0.05])
    vague = fitted(blind[:300], torch.bernoulli(rates.expand(300, K)))
    torch.testing.assert_close(vague(blind[300:]).sigmoid().mean(0), rates, atol=0.06, rtol=0)


def test_rows_of_one_image_are_left_out_together() -> None:
    visual, labels = carrying(60, 1.0)
    new, truth = carrying(600, 1.0, seed=9)
    once, five = (fitted(visual.repeat(n, 1), labels.float().repeat(n, 1)) for n in (1, 5))
    assert len(five.rows) == 60
    losses = [float(entropies(head(new), truth.float()).mean()) for head in (once, five)]
    assert losses[1] < losses[0] + 0.1
    carries = torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 0, 1]])
    alone = fitted(visual[:1].repeat(3, 1), carries)
    assert not alone.fitted and alone.absence == NOTHING_TO_CARRY


def test_which_rows_tell() -> None:
    labels = torch.tensor([[1, 0], [-1, -1], [0, 1], [1, 1], [-1, -1], [0, 0]])
    paired = torch.tensor([True, True, False, True, False, True])

    def of(labels: Tensor = labels, taught: bool = False) -> tuple[list[int], str]:
        rows, absence = kernel_rows(labels, paired, taught, 2)
        return rows.tolist(), absence

    assert of() == ([0, 2, 3, 5], "")
    assert of(taught=True) == ([0, 1, 2, 3, 5], ""), "unlabelled pairs have a teacher"
    once = torch.tensor([[1, 0], [0, 1], [0, 0], [0, 0], [0, 0], [0, 0]])
    for nothing in (once, torch.zeros_like(labels), torch.ones_like(labels)):
        assert of(nothing) == ([], NOTHING_TO_CARRY)
        assert judged_rows(nothing, paired, 9, 0).tolist() == []
    assert judged_rows(labels, torch.ones(6, dtype=torch.bool), 9, 0).tolist() == [0, 2, 3, 5]
    assert judged_rows(labels, labels[:, 1] > 0, 9, 0).tolist() == [], "all judged carry the second, one the first"
    some = judged_rows(torch.tensor([[0], [1]]).repeat(500, 1), torch.ones(1000, dtype=torch.bool), 100, 0)
    assert len(some) == 100 and some.equal(some.sort().values) and some[-1] > 500


def made(visual: np.ndarray, labels: np.ndarray, text: np.ndarray, **settings: object) -> tuple[SeDA, FeatureSet]:
    data = FeatureSet.from_arrays(visual, text, labels, visual[:6], np.maximum(labels[:6], 0))
    sizes = {"visual_dim": visual.shape[1], "text_dim": text.shape[1], "n_classes": labels.shape[1]}
    config = SeDAConfig(**sizes, multi_label=True, width=16, blocks=1, **settings)  # type: ignore[arg-type]
    return prepare(data, config, 0, torch.device("cpu"))[0].eval(), data


def test_four_heads_logits_are_added_and_kept(tmp_path: Path) -> None:
    visual, labels = carrying(80, 0.3)
    text = np.random.default_rng(2).standard_normal((80, 4)).astype(np.float32)
    model, _ = made(visual.numpy(), labels.numpy(), text, kernel_weight=0.6)
    assert model.kernel.fitted and not model.kernel.absence
    with torch.no_grad():
        combined, *heads = model.predict_log_proba(visual, heads=True)
    logits = [head.double() - torch.log1p(-head.double().exp()) for head in heads]
    expected = sum(w * logit for w, logit in zip((0.1, 0.1, 0.2, 0.6), logits, strict=True))
    torch.testing.assert_close(combined.double(), functional.logsigmoid(expected), atol=1e-4, rtol=1e-4)
    model.save_pretrained(tmp_path)
    assert torch.equal(SeDA.from_pretrained(tmp_path).predict_log_proba(visual), combined)
    assert not made(visual.numpy(), labels.numpy(), text, kernel_weight=0.0)[0].kernel.fitted


def test_unlabelled_pairs_count_as_what_the_teacher_says() -> None:
    visual, labels = carrying(120, 0.3)
    few = labels.clone()
    few[40:] = -1
    text = np.hstack([labels.numpy(), np.ones((120, 1))]).astype(np.float32)
    text += 0.1 * np.random.default_rng(0).standard_normal(text.shape).astype(np.float32)
    model, data = made(visual.numpy(), few.numpy(), text)
    assert model.teacher is not None and len(model.kernel.rows) == 120
    seen = model.standardise_visual(torch.from_numpy(np.asarray(data.visual_train)))
    texts = model.standardise_text(torch.from_numpy(np.asarray(data.text_train)))
    targets = few.clamp(min=0).float()
    targets[40:] = model.teacher(seen[40:], texts[40:])
    expected = fitted(seen, targets)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(model.kernel.state_dict()[name], value, msg=name)
    new, truth = carrying(400, 0.3, seed=5)
    told = model.standardise_visual(new)
    alone = fitted(seen[:40], targets[:40])
    losses = [float(entropies(head(told), truth.float()).mean()) for head in (model.kernel, alone)]
    assert losses[0] < losses[1]


def test_sorted_components_are_not_blown_up() -> None:
    rng = np.random.default_rng(0)
    visual, labels = carrying(90, 0.3)
    wide = np.hstack([visual.numpy(), 0.2 * rng.standard_normal((90, 80))]).astype(np.float32)
    alike = np.hstack([visual.numpy(), rng.standard_normal((90, 80))]).astype(np.float32)
    assert made(wide, labels.numpy(), alike)[0].scaling == (0.0, 1.0)
    assert made(alike, labels.numpy(), wide)[0].scaling == (1.0, 0.0)
    unlabelled = np.where(np.arange(90)[:, None] >= 60, -1, labels.numpy())
    assert made(wide, unlabelled, alike)[0].scaling == (0.0, 1.0), "sixty labelled rows"
    once = (np.arange(90)[:, None] == np.arange(K)).astype(np.int64)
    assert made(wide, once, wide)[0].scaling == (1.0, 1.0), "no class that two rows carry"


def test_scalings_are_judged_by_yes_and_no() -> None:
    """The losses that tell a scaling are those of the best ridge and sharpness, in nats a row, over all classes."""
    visual, labels = carrying(40, 0.5)
    x, y, counts = kernel_head.distinct(visual.double(), labels.double(), 2)
    torch.testing.assert_close(y, (40 * labels.double() + 0.5) / 41)
    found = kernel_head.left_out_losses(x, y, counts, multi_label=True)
    x = x / x.square().sum(1).mean().sqrt()
    least = min(
        float(entropies(s * (y - kernel_head._ridge_regression(x, y - y.mean(0), counts, ridge)[1] - 0.5), y).mean())
        for ridge in RIDGES
        for s in SHARPNESS
    )
    assert float(found.mean()) == pytest.approx(least)
