"""Labels beside what texts say: how far they are believed, which rule finds that, and what it does to a training."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from seda_fast import FeatureSet, SeDA, SeDAConfig, TrainConfig
from seda_fast.config import ConfigError
from seda_fast.nn import kernel_head
from seda_fast.nn.kernel_head import (
    RIDGES,
    SHARES,
    SHARPNESS,
    KernelHead,
    judged_rows,
    label_share,
    tangent_kernel,
)
from seda_fast.nn.seda import Shard
from seda_fast.prepare import prepare
from seda_fast.train import main as train

K, DV, DT = 4, 6, 5


def rows(n: int, spread: float, wrong: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features (n, DV) of K classes, texts (n, DT) that tell them, labels, a share of them ``wrong``, and classes."""
    rng, places = np.random.default_rng(seed), np.random.default_rng(99)
    truth = np.arange(n) % K
    visual = places.standard_normal((K, DV))[truth] + spread * rng.standard_normal((n, DV))
    text = places.standard_normal((K, DT))[truth] + 0.1 * rng.standard_normal((n, DT))
    labels = np.where(rng.random(n) < wrong, rng.integers(0, K, n), truth)
    return (*(torch.from_numpy(x.astype(np.float32)) for x in (visual, text)), *map(torch.from_numpy, (labels, truth)))


def left_out(x: Tensor, targets: Tensor, ridge: float) -> Tensor:
    """What kernel ridge regressions say of each row that have not seen it: the kernel's own matrix, row by row."""
    told = []
    centred = targets - targets.mean(0)
    for i in range(len(x)):
        rest = torch.arange(len(x)) != i
        kernel = tangent_kernel(x[rest], x[rest]) + ridge * torch.eye(len(x) - 1, dtype=x.dtype)
        told.append(tangent_kernel(x[i : i + 1], x[rest]) @ torch.linalg.solve(kernel, centred[rest]))
    return torch.cat(told) + targets.mean(0)


@pytest.mark.parametrize("wrong", [0.0, 0.25])
def test_share_is_the_largest_within_one_standard_error_of_the_best(wrong: float) -> None:
    """By fits of all rows but one, for each ridge and share, whose losses are compared row by row."""
    visual, _, labels, truth = rows(33, 0.9, wrong)
    targets, opinions = (functional.one_hot(y, K).double() for y in (labels, truth))
    opinions = 0.8 * opinions + 0.2 / K
    x, y, told, counts, _ = kernel_head._distinct(visual, targets, opinions)
    losses = {}
    for share in SHARES:
        found = []
        for ridge in RIDGES:
            predicted = left_out(x, share * y + (1 - share) * told, ridge)
            entropies = [functional.cross_entropy(f * predicted, y, reduction="none") for f in SHARPNESS]
            found.append((min(entropies, key=lambda e: float(e.mean())), ridge))
        losses[share] = min(found, key=lambda one: float(one[0].mean()))
    best = min((loss for loss, _ in losses.values()), key=lambda e: float(e.mean()))
    close = [s for s, (e, _) in losses.items() if (e - best).mean() <= (e - best).std(correction=0) / 33**0.5]
    expected = max(close)
    assert kernel_head._best_ridge((x, y, told, counts), SHARES) == (losses[expected][1], expected)
    assert label_share(visual, targets, opinions, 0) == expected
    assert (expected < 1) == (wrong > 0)


def test_wrong_labels_are_left_for_texts_that_tell_better() -> None:
    """Most labels by chance: the head of a found share tells new images better than that of labels alone."""
    gained = []
    for seed in range(3):
        visual, _, labels, truth = rows(200, 0.5, wrong=0.6, seed=seed)
        new, _, _, new_truth = rows(600, 0.5, seed=100 + seed)
        targets, opinions = (functional.one_hot(y, K).float() for y in (labels, truth))
        heads = KernelHead(DV, K), KernelHead(DV, K)
        assert heads[0].fit(visual, targets, 0) == 1
        assert heads[1].fit(visual, targets, 0, 0.9 * opinions + 0.1 / K) < 1
        right = [float((head(new).argmax(1) == new_truth).float().mean()) for head in heads]
        gained.append(right[1] - right[0])
    assert np.mean(gained) > 0.03


def test_right_labels_are_believed_and_opinions_by_chance_are_not() -> None:
    visual, _, labels, _ = rows(200, 0.5)
    targets = functional.one_hot(labels, K).float()
    torch.manual_seed(0)
    assert label_share(visual, targets, torch.randn(200, K).softmax(1), 0) == 1
    assert label_share(visual, targets, targets, 0) == 1, "what texts say is what labels say"


def test_a_given_share_is_taken() -> None:
    visual, _, labels, truth = rows(90, 0.8, wrong=0.3)
    targets, opinions = (functional.one_hot(y, K).float() for y in (labels, truth))
    one, other = KernelHead(DV, K), KernelHead(DV, K)
    assert one.fit(visual, targets, 0, opinions, shares=(0.3,)) == 0.3
    x, y, told, counts, _ = kernel_head._distinct(visual, targets, opinions)
    ridge, _ = kernel_head._best_ridge((x, y, told, counts), (0.3,))
    mixed = 0.3 * y + 0.7 * told
    weight, errors = kernel_head._ridge_regression(x, mixed - (0.3 * targets + 0.7 * opinions).mean(0), counts, ridge)
    sharpness, _ = kernel_head._calibrated(mixed - errors, y, counts)
    torch.testing.assert_close(one.weight, (sharpness * weight.mT).float())
    other.fit(visual, targets, 0)
    assert not torch.equal(one.weight, other.weight)


# ---- in the training objective -------------------------------------------------------------------------------------

OFF = {"dropout": 0.0, "condition_dropout": 0.0, "visual_dropout": 0.0, "visual_input_dropout": 0.0}


def model(share: float) -> SeDA:
    torch.manual_seed(0)
    made = SeDA(SeDAConfig(visual_dim=DV, text_dim=DT, n_classes=K, width=16, blocks=1))
    visual, text, labels, _ = rows(40, 0.5)
    made.fit_statistics(torch.zeros(DV), torch.ones(DV), torch.zeros(DT), torch.ones(DT), visual, labels)
    made.set_textual_head(text, labels)
    made.set_label_share(share)
    return made


def batch(n: int) -> dict[str, Tensor]:
    visual, text, labels, _ = rows(n, 0.5, wrong=0.5, seed=3)
    labels[:2], paired = -1, torch.ones(n, dtype=torch.bool)
    paired[2:5] = False
    return {"visual": visual, "text": text.masked_fill(~paired[:, None], 0), "labels": labels, "paired": paired,
            "sample_ids": torch.arange(n)}  # fmt: skip


def losses(made: SeDA, data: dict[str, Tensor], shard: Shard | None = None, **settings: float):  # type: ignore[no-untyped-def]
    key = {"seed": torch.tensor(5), "step": torch.tensor(7)}
    return made.losses(**data, **key, settings=TrainConfig(**OFF, **settings), shard=shard)  # type: ignore[arg-type]


def test_semantic_and_visual_head_learn_the_mixture_of_label_and_text() -> None:
    """A row without text its label alone, an unlabelled one nothing; the terms of texts and centres their labels."""
    made, data = model(0.15), batch(14)
    seen: dict[str, Tensor] = {}
    made.learner.register_forward_hook(lambda module, inputs, output: seen.update(s=output))
    found = losses(made, data, label_smoothing=0.1)
    assert made.opinion is not None
    label = 0.9 * functional.one_hot(data["labels"].clamp(min=0), K) + 0.1 / K
    opinion = made.translator.head(data["text"]).softmax(1)
    target = torch.where(data["paired"][:, None], 0.3 * label + 0.7 * opinion, label)[2:].detach()
    for name, logits in (("semantic", made.learner.head(seen["s"])), ("visual", made.visual(data["visual"]))):
        torch.testing.assert_close(getattr(found, name), functional.cross_entropy(logits[2:], target), msg=name)
    made.set_label_share(0.5)
    assert made.opinion is None, "the networks take their labels as they are"
    alone = losses(made, data, label_smoothing=0.1)
    for name in ("centre", "text", "mapped", "textual_head", "teacher"):
        assert torch.equal(getattr(alone, name), getattr(found, name)), name
    assert abs(alone.visual - found.visual) > 1e-3


def test_opinion_is_that_of_the_start_and_does_not_learn() -> None:
    made, data = model(0.0), batch(14)
    with torch.no_grad():
        made.translator.head.weight.mul_(2.0)
    assert made.opinion is not None
    before = made.opinion(data["text"])
    assert not torch.allclose(before, made.translator.head(data["text"]).softmax(1))
    found = losses(made, data, **{f"{name}_weight": 0.0 for name in ("mapped", "textual_head", "teacher")})
    gradient = torch.autograd.grad(found.total, made.translator.head.weight, allow_unused=True)[0]
    assert gradient is None or not gradient.any()
    assert "opinion" not in " ".join(made.state_dict())


def test_losses_of_parts_add_up_and_compile() -> None:
    made, data = model(0.3), batch(13)
    whole = torch.stack(tuple(losses(made, data)))
    rows_of = made.term_rows(data["labels"], data["paired"])
    total = torch.zeros_like(whole)
    for first, last in ((0, 4), (4, 9), (9, 13)):
        part = {name: value[first:last] for name, value in data.items()}
        shares = made.term_rows(part["labels"], part["paired"]) / rows_of.clamp(min=1)
        total += torch.stack(tuple(losses(made, part, Shard(first, 13, shares))))
    torch.testing.assert_close(total, whole)
    key = {"seed": torch.tensor(5), "step": torch.tensor(7)}
    settings = TrainConfig(**OFF)
    compiled = torch.compile(lambda: made.losses(**data, **key, settings=settings), fullgraph=True)
    torch.testing.assert_close(torch.stack(tuple(compiled())), whole)


# ---- where it is found ---------------------------------------------------------------------------------------------


def prepared(data: FeatureSet, share: float = -1.0, **settings: float) -> SeDA:
    sizes = {"visual_dim": DV, "text_dim": DT, "n_classes": K}
    config = SeDAConfig(**sizes, width=16, blocks=1, **settings)  # type: ignore[arg-type]
    return prepare(data, config, 0, torch.device("cpu"), label_share=share)[0]


def features(wrong: float, unlabelled: int = 0) -> FeatureSet:
    visual, text, labels, _ = rows(300, 1.0, wrong)
    labels[:unlabelled] = -1
    return FeatureSet.from_arrays(visual.numpy(), text.numpy(), labels.numpy(), visual.numpy()[:8], np.arange(8) % K)


def share_of(made: SeDA) -> float:
    assert (made.opinion is None) == (made.label_share >= 0.5)
    return made.label_share


def test_preparation_finds_the_share_with_and_without_a_kernel_head(monkeypatch: pytest.MonkeyPatch) -> None:
    assert share_of(prepared(features(0.0))) == 1
    noisy = features(0.5)
    found = prepared(noisy)
    assert share_of(found) <= 0.5
    assert share_of(prepared(noisy, kernel_weight=0.0)) == share_of(found)
    monkeypatch.setattr(kernel_head, "MOST_ROWS", 100)
    large = prepared(noisy)
    assert not large.kernel.fitted and share_of(large) == share_of(found)
    assert share_of(prepared(noisy, 0.6)) == 0.6


def test_a_share_that_nothing_stands_beside_is_refused() -> None:
    few = features(0.0, unlabelled=200)
    assert share_of(prepared(few)) == 1
    with pytest.raises(ConfigError, match=r"label_share is 0\.5, .* unlabelled pairs, which a teacher of pairs labels"):
        prepared(few, 0.5)
    assert share_of(prepared(few, 1.0)) == 1
    for value in (-0.5, 1.5):
        with pytest.raises(ConfigError, match=r"label_share must be in 0 \.\. 1, or -1 to have it found"):
            TrainConfig(label_share=value)


def test_rows_to_judge_by_are_bounded_and_can_tell() -> None:
    labels, paired = torch.tensor([0, 1, -1, 1, 0, 2]), torch.tensor([True, True, True, False, True, True])
    assert judged_rows(labels, paired, 9, 0).tolist() == [0, 1, 4, 5]
    assert judged_rows(labels, labels == 0, 9, 0).tolist() == [], "one class"
    assert judged_rows(torch.arange(6), paired, 9, 0).tolist() == [], "no class of two rows"
    assert len(judged_rows(labels, paired, 3, 1)) in (0, 3)


def test_a_run_tells_the_share(tmp_path: Path) -> None:
    visual, text, labels, _ = rows(300, 1.0, wrong=0.5)
    new, new_text, _, new_truth = rows(80, 1.0, seed=1)
    np.savez(tmp_path / "noisy.npz", visual_train=visual, text_train=text, label_train=labels, visual_test=new,
             text_test=new_text, label_test=new_truth)  # fmt: skip
    small = ["--epochs", "1", "--width", "16", "--blocks", "1", "--device", "cpu", "--no-baselines"]
    for extra, low, high in (([], 0.0, 0.5), (["--label-share", "1"], 1.0, 1.0)):
        out = tmp_path / f"run{len(extra)}"
        assert train(["--data", str(tmp_path / "noisy.npz"), "--out", str(out), *small, *extra]) == 0
        assert low <= json.loads((out / "metrics.json").read_text())["label_share"] <= high
        assert not [name for name in load_file(out / "model.safetensors") if "opinion" in name]
