"""Multi-label terms: the definitions written out by hand in float64, odd rows, shards, prediction, the teacher."""

import pytest
import torch
from torch import Tensor, nn

from seda_fast import SeDA, SeDAConfig, TrainConfig
from seda_fast.nn import Shard, category_centres
from seda_fast.nn.binary_teacher import fit_binary_teacher
from seda_fast.nn.multi_label import binary_class_terms, binary_divergence, rate_logits, sample_centres
from seda_fast.nn.teacher import teacher_rows

DV, DT, K = 7, 5, 4
CONFIG = SeDAConfig(
    visual_dim=DV, text_dim=DT, n_classes=K, multi_label=True, width=16, blocks=1, time_embedding=8, diffusion_steps=50
)
# A row of two classes, of one, of none, of all, an unlabelled one, and one of two.
LABELS = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [-1, -1, -1, -1], [0, 1, 1, 0]])


def head(dtype: torch.dtype = torch.float64) -> nn.Linear:
    return nn.Linear(DV, K, dtype=dtype)


def sigmoid(z: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-z))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_values_and_gradients_are_the_formulas(smoothing: float) -> None:
    layer, centres = head(), torch.randn(K, DV, dtype=torch.float64)
    f = torch.randn(6, DV, dtype=torch.float64, requires_grad=True)
    centre, entropy = binary_class_terms(f, LABELS, centres, layer, smoothing, None)
    targets = LABELS.double() * (1 - smoothing) + smoothing / 2
    expected_centre, expected_entropy = 0.0, 0.0
    d_f, d_w, d_b = torch.zeros(6, DV).double(), torch.zeros(K, DV).double(), torch.zeros(K).double()
    for i in (0, 1, 2, 3, 5):
        z = layer.weight.detach() @ f[i].detach() + layer.bias.detach()
        p, y = sigmoid(z), targets[i]
        expected_entropy += float(-(y * p.log() + (1 - y) * (1 - p).log()).sum()) / 5
        d_f[i] += (p - y) @ layer.weight.detach() / 5
        d_w += torch.outer(p - y, f[i].detach()) / 5
        d_b += (p - y) / 5
        own = [centres[k] for k in range(K) if LABELS[i, k] == 1]
        if own:
            difference = f[i].detach() - torch.stack(own).mean(0)
            expected_centre += float((difference**2).mean()) / 4
            d_f[i] += 2 * difference / DV / 4
    assert centre.item() == pytest.approx(expected_centre, rel=1e-12)
    assert entropy.item() == pytest.approx(expected_entropy, rel=1e-12)
    (centre + entropy).backward()
    for got, want in ((f.grad, d_f), (layer.weight.grad, d_w), (layer.bias.grad, d_b)):
        assert got is not None
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_extreme_logits_stay_finite() -> None:
    layer = head(torch.float32)
    f = (1e4 * torch.randn(6, DV)).requires_grad_()
    _, entropy = binary_class_terms(f, LABELS, None, layer, 0.0, None)
    entropy.backward()  # type: ignore[no-untyped-call]
    assert torch.isfinite(entropy) and f.grad is not None and torch.isfinite(f.grad).all()


def test_soft_rows_count_as_labelled_ones_and_have_no_centre() -> None:
    layer, centres, f = head(), torch.randn(K, DV, dtype=torch.float64), torch.randn(6, DV, dtype=torch.float64)
    soft = torch.full((6, K), -1.0, dtype=torch.float64)
    soft[4] = torch.tensor([0.2, 0.9, 0.5, 0.0])
    centre, entropy = binary_class_terms(f, LABELS, centres, layer, 0.0, soft)
    known = [0, 1, 2, 3, 5]
    c, e = binary_class_terms(f[known], LABELS[known], centres, layer, 0.0, None)
    p = sigmoid(layer(f[4]))
    own = -(soft[4] * p.log() + (1 - soft[4]) * (1 - p).log()).sum()
    torch.testing.assert_close(entropy, (5 * e + own) / 6)
    torch.testing.assert_close(centre, c)


def test_without_a_labelled_row_the_terms_are_0_and_give_no_gradient() -> None:
    layer, f = head(), torch.randn(3, DV, dtype=torch.float64, requires_grad=True)
    terms = binary_class_terms(f, LABELS[[4, 4, 4]], torch.randn(K, DV, dtype=torch.float64), layer, 0.1, None)
    sum(terms).backward()  # type: ignore[union-attr]
    assert [float(term) for term in terms] == [0, 0]
    assert f.grad is not None and (f.grad == 0).all()


def test_centres_are_means_over_the_rows_that_carry_a_class() -> None:
    labels = torch.tensor([[1, 0, 1], [1, 0, 0], [0, 0, 0], [-1, -1, -1]], dtype=torch.int8)
    features = torch.randn(4, DV)
    centres = category_centres(features, labels, 3)
    torch.testing.assert_close(centres[0], (features[0] + features[1]) / 2)
    torch.testing.assert_close(centres[1], torch.zeros(DV))  # nobody carries it: the origin
    torch.testing.assert_close(centres[2], features[0])
    targets = sample_centres(labels, centres)
    torch.testing.assert_close(targets[0], (centres[0] + centres[2]) / 2)
    torch.testing.assert_close(targets[1:], torch.stack((centres[0], torch.zeros(DV), torch.zeros(DV))))
    with pytest.raises(ValueError, match="labels have 3 columns but there are 5 classes"):
        category_centres(features, labels, 5)


def test_divergence_is_that_of_bernoulli_distributions() -> None:
    p, q = torch.randn(6, K, dtype=torch.float64), torch.randn(6, K, dtype=torch.float64)
    bernoulli = torch.distributions.Bernoulli
    expected = torch.distributions.kl_divergence(bernoulli(logits=p), bernoulli(logits=q)).sum(1)
    torch.testing.assert_close(binary_divergence(p, q), expected)
    assert (binary_divergence(p, p) == 0).all()


def test_rates_of_a_class_that_all_or_none_carry_are_finite() -> None:
    labels = torch.tensor([[1, 0], [1, 0], [1, 0], [-1, -1]])
    torch.testing.assert_close(rate_logits(labels), torch.tensor([4.0, 0.25]).log())


def model(**changes: object) -> SeDA:
    made = SeDA(SeDAConfig(**{**CONFIG.__dict__, **changes}))  # type: ignore[arg-type]
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    made.set_statistics(
        torch.randn(DV), torch.rand(DV) + 0.5, torch.randn(DT), torch.rand(DT) + 0.5, torch.randn(K, DV)
    )
    return made.double().eval()


def triples(rows: int) -> dict[str, Tensor]:
    labels = torch.randint(0, 2, (rows, K), dtype=torch.int8)
    labels[1], labels[rows // 2] = -1, 0
    paired = torch.ones(rows, dtype=torch.bool)
    paired[-2:] = False
    return {
        "visual": torch.randn(rows, DV).double(),
        "text": torch.randn(rows, DT).double(),
        "labels": labels,
        "paired": paired,
        "sample_ids": torch.arange(rows) + 5,
    }


def losses(made: SeDA, data: dict[str, Tensor], shard: Shard | None = None, **settings: float):  # type: ignore[no-untyped-def]
    given = TrainConfig(**settings)  # type: ignore[arg-type]
    return made.losses(**data, seed=torch.tensor(5), step=torch.tensor(7), settings=given, shard=shard)


def test_objective_is_the_methods_formula() -> None:
    made, data = model(), triples(12)
    seen: dict[str, Tensor] = {}
    made.learner.register_forward_hook(lambda module, inputs, output: seen.update(s=output))
    made.translator.register_forward_hook(lambda module, inputs, output: seen.update(t=output))
    off = {"dropout": 0.0, "condition_dropout": 0.0, "visual_dropout": 0.0, "visual_input_dropout": 0.0}
    found = losses(made, data, label_smoothing=0.0, **off)
    labels, paired, text = data["labels"], data["paired"], data["text"]
    known = (labels[:, 0] >= 0) & paired

    def entropy(layer: nn.Linear, features: Tensor, rows: Tensor) -> Tensor:
        y = labels[rows].double()
        return nn.functional.binary_cross_entropy_with_logits(layer(features[rows]), y, reduction="sum") / rows.sum()

    labelled, carrying = labels[:, 0] >= 0, (labels > 0).any(1)
    targets = torch.stack([made.centres[labels[i] > 0].mean(0) for i in carrying.nonzero()[:, 0]])
    torch.testing.assert_close(found.centre, (seen["s"][carrying] - targets).square().mean())
    torch.testing.assert_close(found.semantic, entropy(made.learner.head, seen["s"], labelled))
    torch.testing.assert_close(found.visual, entropy(made.visual.head, made.visual.hidden(data["visual"]), labelled))
    torch.testing.assert_close(found.mapped, entropy(made.translator.head, seen["t"], known))
    torch.testing.assert_close(found.textual_head, entropy(made.translator.head, text, known))
    torch.testing.assert_close(found.text, (seen["t"] - text)[paired].square().mean())
    teacher = made.translator.head(text)[paired] / 2
    students = [made.learner.head(seen["s"])[paired] / 2, made.translator.head(seen["t"])[paired] / 2]
    expected = sum(2 * binary_divergence(teacher, student).mean() for student in students)
    torch.testing.assert_close(found.teacher, expected)


@pytest.mark.parametrize("taught", [False, True])
def test_shards_of_a_batch_add_up_to_it(taught: bool) -> None:
    made, data = model(), triples(13)
    if taught:
        made.fit_teacher(**{name: data[name] for name in ("visual", "text", "labels", "paired")}, seed=0)
        assert made.teacher is not None
    whole = losses(made, data)
    rows = made.term_rows(data["labels"], data["paired"])
    parts = []
    for part in (slice(0, 7), slice(7, 13)):
        own = {name: value[part] for name, value in data.items()}
        shares = made.term_rows(own["labels"], own["paired"]).double() / rows.clamp(min=1)
        parts.append(losses(made, own, Shard(part.start, 13, shares)))
    for name in whole._fields:
        torch.testing.assert_close(sum(getattr(part, name) for part in parts), getattr(whole, name), msg=name)


def test_prediction_combines_the_heads_logits() -> None:
    made = model().float()
    combined, *heads = made.predict_log_proba(torch.randn(9, DV), heads=True)
    semantic, textual, visual = (torch.logit(h.double().exp()) for h in heads)
    config = made.config
    mixed = config.semantic_weight * semantic + config.textual_weight * textual + config.visual_weight * visual
    torch.testing.assert_close(combined.double().exp(), mixed.sigmoid(), rtol=1e-4, atol=1e-5)
    averaged = made.predict_log_proba(torch.randn(9, DV), noise_draws=3)
    assert isinstance(averaged, Tensor) and (averaged <= 0).all()


def worlds(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Classes 0 and 1 show in images, 2 and 3 in texts."""
    labels = torch.randint(0, 2, (rows, K), dtype=torch.int8)
    signs = 2 * labels.float() - 1
    visual, text = torch.randn(rows, DV), torch.randn(rows, DT)
    visual[:, :2] += 2 * signs[:, :2]
    text[:, :2] += 2 * signs[:, 2:]
    return visual, text, labels


def test_the_teacher_labels_pairs_by_what_image_and_text_say_together() -> None:
    visual, text, truth = worlds(600)
    labels = truth.clone()
    labels[60:] = -1
    paired = torch.ones(600, dtype=torch.bool)
    rows = teacher_rows(labels, paired, 3)
    assert len(rows) == 600
    teacher = fit_binary_teacher(visual, text, labels, 3)
    right = ((teacher(visual, text) > 0.5) == (truth > 0))[60:].float().mean(0)
    assert (right > 0.9).all(), right
    assert (teacher.trust[0, :2] > teacher.trust[1, :2]).all() and (teacher.trust[1, 2:] > teacher.trust[0, 2:]).all()
    again = fit_binary_teacher(visual, text, labels, 3)
    assert torch.equal(again(visual, text), teacher(visual, text))


def test_the_teacher_has_no_use_without_unlabelled_pairs_or_differing_rows() -> None:
    _, _, labels = worlds(20)
    paired = torch.ones(20, dtype=torch.bool)
    assert not len(teacher_rows(labels, paired, 0))
    alike = torch.full((20, K), -1, dtype=torch.int8)
    alike[:4] = torch.tensor([1, 0, 0, 1], dtype=torch.int8)
    assert not len(teacher_rows(alike, paired, 0))


def test_a_teacher_of_a_class_that_all_or_none_carry_is_finite() -> None:
    visual, text, labels = worlds(80)
    labels[:, 0], labels[:, 1] = 0, 1
    labels[40:] = -1
    found = fit_binary_teacher(visual, text, labels, 0)(visual, text)
    assert torch.isfinite(found).all()
    assert (found[:, 0] < 0.5).all() and (found[:, 1] > 0.5).all()
