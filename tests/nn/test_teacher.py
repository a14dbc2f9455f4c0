"""The teacher of unlabelled pairs."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional

from seda_fast.nn import binary_teacher
from seda_fast.nn import teacher as module
from seda_fast.nn.teacher import PairTeacher, combined, fit_teacher, teacher_rows


def pairs(rows: int, classes: int = 4, noise: tuple[float, float] = (1.0, 1.0)) -> tuple[Tensor, Tensor, Tensor]:
    """Two views of a class, each with noise of its own."""
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(rows) % classes
    spaces = (
        torch.randn(classes, d, generator=generator)[y] + n * torch.randn(rows, d, generator=generator)
        for d, n in zip((12, 8), noise, strict=True)
    )
    return (*spaces, y)  # type: ignore[return-value]


def few_labels(y: Tensor, per_class: int) -> Tensor:
    return y.where(torch.arange(len(y)) < per_class * (int(y.max()) + 1), -1)


def test_teacher_beats_both_classifiers_that_it_started_from() -> None:
    v, t, y = pairs(2000)
    labels = few_labels(y, 4)
    known = labels >= 0
    found = fit_teacher(v, t, labels, 4, seed=0)(v, t)
    right = float((found.argmax(1) == y)[~known].float().mean())
    for x in (v, t):
        alone = LogisticRegression().fit(x[known].numpy(), labels[known].numpy()).score(x.numpy(), y.numpy())
        assert right > alone + 0.05
    torch.testing.assert_close(found.sum(1), torch.ones(2000))


def test_a_space_that_says_nothing_is_not_trusted() -> None:
    v, t, y = pairs(1200, noise=(100.0, 0.7))
    trained = fit_teacher(v, t, few_labels(y, 8), 4, seed=0)
    assert trained.trust[0] < trained.trust[1]
    good = (trained(v, t).argmax(1) == y).float().mean()
    assert good > 0.9


def test_fit_reaches_the_minimum_that_scikit_learn_finds() -> None:
    v, _, y = pairs(300)
    found = module.fitted(v, functional.one_hot(y, 4).float(), 0.01)
    theirs = LogisticRegression(C=1 / (0.01 * 300), max_iter=1000, tol=1e-8).fit(v.double().numpy(), y.numpy())
    np.testing.assert_allclose(found.log_proba(v).exp(), theirs.predict_proba(v.double().numpy()), atol=2e-3)


def test_classifiers_of_many_products_go_on_from_the_last_penalty(monkeypatch: pytest.MonkeyPatch) -> None:
    """They reach the same minimum sooner."""
    v, _, y = pairs(80, noise=(4.0, 1.0))
    fold, steps = module._folds(y, 0), []
    from_scratch = module.fitted

    def watched(x: Tensor, targets: Tensor, l2: float, start: module.Linear | None = None) -> module.Linear:
        steps.append(start is not None)
        return from_scratch(x, targets, l2, start)

    monkeypatch.setattr(module, "fitted", watched)
    afresh, penalty = module._held_out(v, y, 4, fold)
    assert not any(steps)
    steps.clear()
    monkeypatch.setattr(module, "MANY_PRODUCTS", v.numel() * 4)
    goes_on, same = module._held_out(v, y, 4, fold)
    assert not any(steps[:5]) and all(steps[5:]) and len(steps) > 5
    assert same == penalty
    torch.testing.assert_close(goes_on.exp(), afresh.exp(), rtol=0, atol=2e-3)


def test_multi_label_classifiers_go_on_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    v, _, y = pairs(80, noise=(4.0, 1.0))
    many, fold = functional.one_hot(y, 4).float(), module._folds(y, 0)
    afresh, penalty = binary_teacher._held_out(v, many, fold)
    starts = []
    from_scratch = binary_teacher.fitted

    def watched(x: Tensor, targets: Tensor, l2: float, start: module.Linear | None = None) -> module.Linear:
        starts.append(start is not None)
        return from_scratch(x, targets, l2, start)

    monkeypatch.setattr(binary_teacher, "fitted", watched)
    monkeypatch.setattr(binary_teacher, "MANY_PRODUCTS", v.numel() * 4)
    goes_on, same = binary_teacher._held_out(v, many, fold)
    assert not any(starts[:5]) and all(starts[5:]) and len(starts) > 5
    assert same == penalty
    torch.testing.assert_close(goes_on.sigmoid(), afresh.sigmoid(), rtol=0, atol=2e-3)


def test_large_weights_are_remembered_for_fewer_steps() -> None:
    assert module.history(torch.empty(28, 768)) == 100, "all that the fit takes"
    assert module.history(torch.empty(1000, 2816)) == 11
    assert module.history(torch.empty(10_000, 2816)) == 10


def test_combination_is_a_normalised_product_of_powers() -> None:
    p, q = torch.rand(2, 5, 3).softmax(2)
    expected = (p**0.5) * (q**2)
    torch.testing.assert_close(
        combined((p.log(), q.log()), torch.tensor([0.5, 2.0])), expected / expected.sum(1, keepdim=True),
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip


def test_folds_spread_every_class() -> None:
    y = torch.randint(0, 3, (90,), generator=torch.Generator().manual_seed(2))
    fold = module._folds(y, 0)
    for label in range(3):
        counts = torch.bincount(fold[y == label], minlength=5)
        assert counts.max() - counts.min() <= 1
    assert not torch.equal(fold, module._folds(y, 1))


def test_rows_of_an_image_are_held_out_together() -> None:
    """As where an image has several captions: a row's copies would make any classifier of images look trustworthy."""
    _, t, y = pairs(60)
    seeded = torch.Generator().manual_seed(1)
    v = torch.randn(60, 40, generator=seeded)  # images say nothing
    five = torch.arange(60).repeat_interleave(5)
    texts = t[five] + 0.1 * torch.randn(300, t.shape[1], generator=seeded)
    together, apart = (
        module._tuned((v[five], texts), y[five], first, 4, 0)[1] for first in (5 * five, torch.arange(300))
    )
    assert together[0] < 0.7 * apart[0], "trust in the images"
    single = torch.arange(4).repeat(5)
    trust = module._tuned((v[single], v[single]), single, single, 4, 0)[1]
    assert trust.tolist() == [1, 1], "no class has a second image"


@pytest.mark.parametrize("per_class", [1, 2])
def test_very_few_labels_still_give_a_teacher(per_class: int) -> None:
    v, t, y = pairs(400)
    found = fit_teacher(v, t, few_labels(y, per_class), 4, seed=0)(v, t)
    assert found.isfinite().all()
    assert (found.argmax(1) == y).float().mean() > 0.3


def test_rows_are_chosen_where_a_teacher_has_use() -> None:
    labels, paired = torch.tensor([0, 1, -1, -1, 1]), torch.tensor([True, True, True, False, False])
    assert teacher_rows(labels, paired, 0).tolist() == [0, 1, 2]
    assert not len(teacher_rows(labels.clamp(min=0), paired, 0))  # nothing unlabelled
    assert not len(teacher_rows(labels.clamp(max=0), paired, 0))  # one class
    assert not len(teacher_rows(labels, ~paired, 0))  # no labelled pair


def test_rows_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LABELLED_ROWS", 7)
    monkeypatch.setattr(module, "UNLABELLED_ROWS", 9)
    labels = torch.arange(100) % 4 - 1
    rows = teacher_rows(labels, torch.ones(100, dtype=torch.bool), 0)
    assert (labels[rows] >= 0).sum() == 7
    assert len(rows) == 16
    assert torch.equal(rows, teacher_rows(labels, torch.ones(100, dtype=torch.bool), 0))
    assert not torch.equal(rows, teacher_rows(labels, torch.ones(100, dtype=torch.bool), 1))


def test_it_is_deterministic_and_keeps_nothing_in_the_state_dict() -> None:
    v, t, y = pairs(200)
    one, two = (fit_teacher(v, t, few_labels(y, 4), 4, seed=5) for _ in range(2))
    assert torch.equal(one(v, t), two(v, t))
    assert isinstance(one, PairTeacher)
    assert not one.state_dict()


def test_unlabelled_pairs_with_other_class_shares_are_labelled_by_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    v, t, y = pairs(6000, classes=8, noise=(2.0, 2.0))
    # Sixteen labels of each class, while nineteen in twenty of the other pairs of the classes 1 to 7 are missing.
    place = torch.arange(6000)
    kept = (place < 128) | (y == 0) | (place // 8 % 20 == 0)
    v, t, y = v[kept], t[kept], y[kept]
    labels = few_labels(y, 16)
    # Neighbours tell of the shares too: without them it is seen what the shares do alone.
    monkeypatch.setattr(module, "propagated", lambda proba, graphs: proba)

    def right() -> float:
        return float((fit_teacher(v, t, labels, 8, seed=0)(v, t).argmax(1) == y)[labels < 0].float().mean())

    with_shares = right()
    monkeypatch.setattr(module, "SHIFT_FLOOR", float("inf"))
    assert with_shares > right() + 0.05


def test_the_nearest_of_a_row_are_the_largest_cosines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROWS_TOGETHER", 7)  # blocks that end unevenly
    x = torch.randn(30, 5, generator=torch.Generator().manual_seed(5))
    x[3] = 0
    index, share = module.nearest(x)
    unit = functional.normalize(x.double(), dim=1)
    cosines = (unit @ unit.mT).fill_diagonal_(-2)
    expected = cosines.topk(module.NEIGHBOURS, dim=1)
    others = torch.arange(30) != 3
    assert torch.equal(index[others], expected.indices[others])
    weight = expected.values.clamp(min=0)
    torch.testing.assert_close(share[others].double(), (weight / weight.sum(1, keepdim=True))[others])
    assert not share[3].any()  # no direction, no neighbours


def test_fewer_rows_than_neighbours_have_all_others() -> None:
    index, share = module.nearest(torch.rand(4, 3) + 1)
    assert sorted(index[2].tolist()) == [0, 1, 3]
    torch.testing.assert_close(share.sum(1), torch.ones(4))


def test_labels_are_multiplied_by_the_neighbours_mean() -> None:
    proba = torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.2, 0.8]])
    graphs = [
        (torch.tensor([[1, 2], [0, 2], [0, 1]]), torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.0, 0.0]])),
        (torch.tensor([[1], [2], [0]]), torch.tensor([[1.0], [1.0], [1.0]])),
    ]
    least = module._LEAST_SHARE
    means = [
        [[0.55, 0.45], [0.5, 0.5], [0.0, 0.0]],
        [[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]],
    ]
    expected = proba * ((torch.tensor(means[0]) + least) * (torch.tensor(means[1]) + least)).sqrt()
    torch.testing.assert_close(
        module.propagated(proba, graphs), expected / expected.sum(1, keepdim=True), rtol=1e-4, atol=1e-5
    )


def test_neighbours_of_kinds_of_a_class_make_its_labels_better(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each class has three kinds of pairs, which four labelled ones hardly show."""
    y, propagated = torch.arange(800) % 4, module.propagated
    gains = []
    for seed in (6, 7, 8):
        generator = torch.Generator().manual_seed(seed)
        kind = torch.randint(0, 3, (800,), generator=generator)
        spaces = []
        for d in (12, 8):
            centres = 0.7 * (torch.randn(4, 3, d, generator=generator) + torch.randn(4, 1, d, generator=generator))
            spaces.append(centres[y, kind] + torch.randn(800, d, generator=generator))
        right = []
        for labels in (propagated, lambda proba, graphs: proba):
            monkeypatch.setattr(module, "propagated", labels)
            found = fit_teacher(spaces[0], spaces[1], few_labels(y, 4), 4, seed=0)(*spaces)
            right.append(float((found.argmax(1) == y)[16:].float().mean()))
        gains.append(right[0] - right[1])
    assert min(gains) > 0.005
    assert sum(gains) > 0.06


def test_shared_directions_are_canonical_variates_times_their_correlations() -> None:
    v, t, _ = pairs(300)
    found = module.shared_directions(v, t)
    assert found.shape == (12, 8)

    def whitening(x: Tensor) -> Tensor:
        gram = x.double().T @ x.double()
        values, vectors = torch.linalg.eigh(gram + module.RIDGE_ROWS * gram.trace() / 300 * torch.eye(len(gram)))
        return vectors @ torch.diag(values**-0.5) @ vectors.T

    own, other = whitening(v), whitening(t)
    left, correlations, _ = torch.linalg.svd(own @ v.double().T @ t.double() @ other, full_matrices=False)
    variates = v.double() @ own @ left * correlations
    variates *= v.norm() / variates.norm()
    # A rotation of the variates is the same to a classifier with a penalty on its squares.
    along = (v @ found).double()
    torch.testing.assert_close(along @ along.T, variates @ variates.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((v @ found).norm(), v.norm())


def test_a_narrowed_classifier_says_of_rows_what_it_says_of_widened_ones() -> None:
    v, t, _ = pairs(50)
    directions = module.shared_directions(v, t)
    classifier = module.Linear(torch.randn(4, 20), torch.randn(4))
    wide = module.widened(v, directions)
    torch.testing.assert_close(wide.norm(), v.norm())
    expected = classifier.log_proba(wide)
    torch.testing.assert_close(module.narrowed(classifier, directions).log_proba(v), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("nothing", [torch.zeros(60, 8), torch.ones(60, 8)], ids=["zeros", "constant"])
def test_a_space_without_differences_shares_no_direction_that_is_not_a_number(nothing: Tensor) -> None:
    v, _, y = pairs(60)
    for x, other in ((v, nothing), (nothing, v)):
        assert module.shared_directions(x, other).isfinite().all()
    assert fit_teacher(v, nothing, few_labels(y, 4), 4, seed=0)(v, nothing).isfinite().all()


def test_what_the_spaces_share_makes_the_labels_better(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classes lie in 6 dimensions that both spaces show, beside 40 larger ones of each space's own."""
    gains = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        y = torch.arange(3000) % 5
        classes = torch.randn(5, 6, generator=generator)[y] + 0.5 * torch.randn(3000, 6, generator=generator)
        spaces = [
            classes @ torch.randn(6, d, generator=generator) / 2
            + torch.randn(3000, 40, generator=generator) @ torch.randn(40, d, generator=generator) / 2
            for d in (60, 50)
        ]
        right = []
        for directions in (module.shared_directions, lambda x, other: torch.zeros(x.shape[1], other.shape[1])):
            with monkeypatch.context() as patch:
                patch.setattr(module, "shared_directions", directions)
                found = fit_teacher(spaces[0], spaces[1], few_labels(y, 4), 5, seed=0)(*spaces)
            right.append(float((found.argmax(1) == y)[20:].float().mean()))
        gains.append(right[0] - right[1])
    assert min(gains) > 0.1, gains


def test_equal_class_shares_leave_the_labels_as_they_are() -> None:
    generator = torch.Generator().manual_seed(3)
    y = torch.arange(900) % 3
    logits = functional.one_hot(y, 3) * 2.0 + torch.randn(900, 3, generator=generator)
    proba = logits.softmax(1)
    assert torch.equal(module.shifted(proba, torch.full((3,), 1 / 3)), proba)


def test_shifted_probabilities_are_bayes_under_the_new_shares() -> None:
    generator = torch.Generator().manual_seed(4)
    shares = torch.tensor([0.9, 0.08, 0.02])
    y = torch.multinomial(shares, 20000, replacement=True, generator=generator)
    x = 1.5 * functional.one_hot(y, 3) + torch.randn(20000, 3, generator=generator)  # x . e_k is sufficient
    before, after = (1.5 * x).softmax(1), (1.5 * x + shares.log()).softmax(1)
    found = module.shifted(before, torch.full((3,), 1 / 3))
    ratio = (found[0] / before[0]).log() - (found[0] / before[0]).log()[0]
    exact = (after[0] / before[0]).log() - (after[0] / before[0]).log()[0]
    power = (ratio / exact)[1:]
    gain = float((before @ (3 * shares)).log().mean())
    torch.testing.assert_close(power, torch.full((2,), 1 - module.SHIFT_FLOOR / gain), rtol=0.08, atol=0)
    torch.testing.assert_close(found.sum(1), torch.ones(20000))


def test_a_class_without_a_row_does_not_take_what_weak_classifiers_leave_it() -> None:
    """Its share is nothing, over which what floors leave it was divided: it got every row."""
    proba = torch.full((200, 4), 0.25).mul(1 + 0.2 * torch.randn(200, 4)).abs()
    proba[:, 3] = 1e-4
    proba /= proba.sum(1, keepdim=True)
    for shares in (torch.tensor([0.8, 0.1, 0.1, 0.0]), torch.tensor([0.05, 0.05, 0.9, 0.0])):
        found = module.shifted(proba, shares)
        assert found.isfinite().all()
        torch.testing.assert_close(found.sum(1), torch.ones(200))
        assert (found.argmax(1) == 3).sum() == 0


def test_a_class_without_a_label_gets_none_by_the_shares() -> None:
    v, t, y = pairs(600)
    labels = few_labels(y, 4)
    labels[labels == 3] = -1
    found = fit_teacher(v, t, labels, 4, seed=0)(v, t)
    assert found.isfinite().all()
    assert (found.argmax(1) == 3).float().mean() < 0.01


def test_more_classes_than_rows_are_taken_have_no_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a class without a row among them the teacher would know nothing, and label its pairs as others'."""
    monkeypatch.setattr(module, "LABELLED_ROWS", 8)
    for classes, expected in ((8, 8), (9, 0)):
        labels = torch.cat((torch.arange(classes).repeat(2), torch.full((20,), -1)))
        found = teacher_rows(labels, torch.ones(len(labels), dtype=torch.bool), 0)
        assert len(labels[found][labels[found] >= 0].unique()) == expected
