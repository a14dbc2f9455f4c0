"""The kernel head: its kernel, what it says of rows that it has not seen, and when there is none."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from seda_fast import FeatureSet, SeDA, SeDAConfig
from seda_fast.nn import kernel_head
from seda_fast.nn.kernel_head import BIAS, RIDGES, KernelHead, kernel_rows, tangent_kernel
from seda_fast.nn.linear import placeless_linear
from seda_fast.prepare import prepare

K, DV = 3, 5


def clouds(rows: int, spread: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Standardised features (rows, DV) of K classes in turn, and their classes (rows,)."""
    rng = np.random.default_rng(seed)
    labels = np.arange(rows) % K
    visual = np.random.default_rng(1).standard_normal((K, DV))[labels] + spread * rng.standard_normal((rows, DV))
    visual = (visual - visual.mean(0)) / visual.std(0)
    return torch.from_numpy(visual.astype(np.float32)), torch.from_numpy(labels)


def fitted(visual: Tensor, labels: Tensor, seed: int = 0) -> KernelHead:
    head = KernelHead(visual.shape[1], K)
    head.fit(visual, functional.one_hot(labels, K).float(), seed)
    return head


def test_kernel_is_that_of_a_very_wide_hidden_layer() -> None:
    """Gradients of both layers of ``sqrt(2 / m) a . relu(W x + b)`` with normal a, W and b of variance `BIAS`."""
    torch.manual_seed(0)
    x, y = torch.randn(4, DV, dtype=torch.float64), torch.randn(6, DV, dtype=torch.float64)
    weight, bias = torch.randn(400_000, DV, dtype=torch.float64), torch.randn(400_000, dtype=torch.float64)

    def layer(z: Tensor) -> Tensor:
        return z @ weight.mT + math.sqrt(BIAS) * bias

    of_last = 2 * layer(x).relu() @ layer(y).relu().mT / len(bias)
    active = 2 * (layer(x) > 0).double() @ (layer(y) > 0).double().mT / len(bias)
    expected = of_last + (x @ y.mT + BIAS) * active
    torch.testing.assert_close(tangent_kernel(x, y), expected, rtol=0.02, atol=0.02)
    torch.testing.assert_close(tangent_kernel(x, x).diagonal(), 2 * (x.square().sum(1) + BIAS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_does_not_round_the_kernel(dtype: torch.dtype) -> None:
    """Its errors would come into a logit times hundreds of weights: tenths of a nat to several."""
    visual, labels = clouds(600, 0.7)
    data = FeatureSet.from_arrays(3e4 + 100 * visual.numpy(), visual.numpy(), labels, visual.numpy()[:9], labels[:9])
    config = SeDAConfig(visual_dim=DV, text_dim=DV, n_classes=K, width=16, blocks=1, visual_width=16)
    model, _ = prepare(data, config, 0, torch.device("cpu"))
    model.eval()
    given = 3e4 + 100 * visual[:50]
    with torch.no_grad():
        exact = model.predict_log_proba(given, heads=True)[-1]
        with torch.autocast("cpu", dtype):
            in_region = model.predict_log_proba(given, heads=True)[-1]
        model.to(dtype)
        kept = {model.kernel.rows.dtype, model.kernel.weight.dtype, model.visual_mean.dtype, model.text_scale.dtype}
        assert kept == {torch.float32}
        assert model.centres.dtype == dtype
        of_model = model.predict_log_proba(given, heads=True)[-1]
        # Features of 30 000 with a deviation of 100 are standardised before they are rounded.
        visual_head = model.visual(model.standardise_visual(given).to(dtype))
    assert torch.equal(in_region, exact)
    assert torch.equal(of_model, exact)
    assert visual_head.isfinite().all()


def test_kernel_is_the_same_with_gradients_and_without() -> None:
    """Without, it is computed in place."""
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float64):
        x, y = torch.randn(9, DV, dtype=dtype), torch.randn(11, DV, dtype=dtype)
        kept = x.clone(), y.clone()
        plain = tangent_kernel(x, y)
        assert torch.equal(x, kept[0]) and torch.equal(y, kept[1])
        assert torch.equal(plain, tangent_kernel(x.requires_grad_(), y).detach())


def test_kernel_has_a_gradient_between_a_row_and_itself() -> None:
    x = torch.randn(6, DV, dtype=torch.float64)
    y = torch.cat((x[:3], -x[3:4], torch.randn(2, DV, dtype=torch.float64)))
    wanted = x.clone().requires_grad_()
    tangent_kernel(wanted, y).sum().backward()
    assert wanted.grad is not None
    # The kernel's kink is even about a row, so that differences to both sides of it leave the slope that is taken.
    step = 1e-4 * torch.eye(DV, dtype=x.dtype)
    slopes = [(tangent_kernel(x + step[i], y) - tangent_kernel(x - step[i], y)).sum(1) / 2e-4 for i in range(DV)]
    torch.testing.assert_close(wanted.grad, torch.stack(slopes, 1), rtol=1e-3, atol=1e-3)
    head = fitted(*clouds(30, 1.0))
    rows = head.rows * head.scale
    rows.requires_grad_()
    head(rows).square().sum().backward()
    assert rows.grad is not None and rows.grad.isfinite().all()


@pytest.mark.parametrize("rows_together", [7, 256])
def test_what_is_left_out_is_told_as_by_a_fit_without_it(monkeypatch: pytest.MonkeyPatch, rows_together: int) -> None:
    monkeypatch.setattr(kernel_head, "_ROWS_TOGETHER", rows_together)
    visual, labels = clouds(23, 1.0)
    x, y = visual.double(), functional.one_hot(labels, K).double() - 1 / K
    weight, errors = kernel_head._ridge_regression(x, y, torch.ones(23).double(), 0.3)
    torch.testing.assert_close((tangent_kernel(x, x) + 0.3 * torch.eye(23, dtype=x.dtype)) @ weight, y)
    for i in range(23):
        rest = torch.arange(23) != i
        kernel = tangent_kernel(x[rest], x[rest]) + 0.3 * torch.eye(22, dtype=x.dtype)
        told = tangent_kernel(x[i : i + 1], x[rest]) @ torch.linalg.solve(kernel, y[rest])
        torch.testing.assert_close(y[i] - errors[i], told[0])


def test_a_fit_takes_little_more_memory_than_its_kernel() -> None:
    """Factored, solved and inverted where it is: copies of it were a run's peak, most of all with many threads."""
    code = """
import torch
from seda_fast.measure import peak_memory_bytes
from seda_fast.nn.kernel_head import _ridge_regression

def fit(n):
    x, y = torch.randn(n, 16).double(), torch.randn(n, 3).double()
    _ridge_regression(x, y, torch.ones(n).double(), 0.1)

fit(600)
before = peak_memory_bytes(torch.device("cpu"))
fit(5000)
print(peak_memory_bytes(torch.device("cpu")) - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1.75 * 5000**2 * 8


def test_ridge_is_the_one_whose_left_out_rows_are_told_best(monkeypatch: pytest.MonkeyPatch) -> None:
    best, once = [], torch.ones(60).double()
    for spread in (0.3, 3.0):
        losses = {}
        visual, labels = clouds(60, spread)
        x, y = visual.double(), functional.one_hot(labels, K).double()
        for ridge in RIDGES:
            _, errors = kernel_head._ridge_regression(x, y - y.mean(0), once, ridge)
            losses[ridge] = min(float(functional.cross_entropy(s * (y - errors), y)) for s in kernel_head.SHARPNESS)
        best.append(kernel_head._best_ridge((x, y, y, once), (1.0,))[0])
        assert best[-1] == min(losses, key=losses.__getitem__)
    assert best[0] < best[1]


def _noise(rows: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return torch.randn(rows, DV).double(), functional.one_hot(torch.randint(K, (rows,)), K).double()


def test_classes_are_told_and_what_cannot_be_known_is_not() -> None:
    """Of rows unlike those seen: sharp where the classes lie apart, the classes' shares where features say nothing."""
    visual, labels = clouds(120, 0.2)
    head = fitted(visual[:90], labels[:90])
    told = head(visual[90:]).softmax(1)
    assert (told.argmax(1) == labels[90:]).all()
    assert told.max(1).values.min() > 0.9 and told.max() < 1 - 1e-4, "sure, but not as if nothing could be unforeseen"
    blind, shares = _noise(400)
    vague = KernelHead(DV, K)
    vague.fit(blind[:300], shares[:300], 0)
    torch.testing.assert_close(vague(blind[300:].float()).softmax(1), shares[:300].mean(0).float().expand(100, K),
                               atol=0.1, rtol=0)  # fmt: skip


def test_rare_classes_are_not_forgotten() -> None:
    """Squared errors alone give a class of few rows next to nothing; shifts fitted on left-out rows bring it back."""
    visual, labels = clouds(600, 0.9)
    keep = (labels > 0) | (torch.arange(600) % 30 == 0)
    head = fitted(visual[keep], labels[keep])
    new, truth = clouds(600, 0.9, seed=7)
    shifted = head(new)
    rare = truth == 0
    found = float((shifted.argmax(1) == 0)[rare].float().mean())
    mean_shares = functional.one_hot(labels[keep], K).float().mean(0)
    unshifted = shifted - head.bias + mean_shares * 5
    assert found > 0.2
    assert found > float((unshifted.argmax(1) == 0)[rare].float().mean())


def test_where_features_say_nothing_classes_have_the_roots_of_their_shares() -> None:
    """Halfway between the shares seen, which rows to come may have, and equal ones, which they may have as well."""
    targets = functional.one_hot(torch.tensor([0] * 900 + [1] * 100), 2).double()
    sharpness, shift = kernel_head._calibrated(torch.full((1000, 2), 0.5).double(), targets, torch.ones(1000).double())
    told = (sharpness * 0.5 + shift).softmax(0)
    torch.testing.assert_close(told, torch.tensor([0.75, 0.25]).double(), atol=0.01, rtol=0)


def test_rows_of_one_image_are_left_out_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where an image has several captions: what five copies say is what one says, five times as surely."""
    visual, labels = clouds(40, 1.5)
    often = torch.arange(40).repeat_interleave(torch.arange(40) % 5 + 1)
    x, y, counts = kernel_head._merged(visual[often].double(), functional.one_hot(labels[often], K).double())
    torch.testing.assert_close(x, visual.double(), rtol=0, atol=0)
    assert torch.equal(counts, (torch.arange(40) % 5 + 1).double())
    assert torch.equal(y, functional.one_hot(labels, K).double())

    # With c copies the regression is that of all rows, and what is left out is told as by a fit without any of them.
    mean = counts @ y / counts.sum()
    weight, errors = kernel_head._ridge_regression(x, y - mean, counts, 0.3)
    every, all_targets = visual[often].double(), functional.one_hot(labels[often], K).double() - mean
    kernel = tangent_kernel(every, every) + 0.3 * torch.eye(len(often)).double()
    summed = torch.zeros_like(weight).index_add_(0, often, torch.linalg.solve(kernel, all_targets))
    torch.testing.assert_close(weight, summed)
    rest = often != 4
    kernel = tangent_kernel(every[rest], every[rest]) + 0.3 * torch.eye(int(rest.sum())).double()
    told = tangent_kernel(x[4:5], every[rest]) @ torch.linalg.solve(kernel, all_targets[rest])
    torch.testing.assert_close((y - mean - errors)[4], told[0])
    losses = {}
    for ridge in RIDGES:
        _, errors = kernel_head._ridge_regression(x, y - mean, counts, ridge)
        losses[ridge] = min(
            float(counts @ functional.cross_entropy(s * (y - errors), y, reduction="none"))
            for s in kernel_head.SHARPNESS
        )
    assert kernel_head._best_ridge((x, y, y, counts), (1.0,))[0] == min(losses, key=losses.__getitem__)


def test_five_captions_an_image_make_no_head_surer_of_what_it_has_not_seen() -> None:
    visual, labels = clouds(60, 1.5)
    new, truth = clouds(600, 1.5, seed=9)
    once, five = (fitted(visual.repeat(n, 1), labels.repeat(n)) for n in (1, 5))
    assert len(five.rows) == 60
    losses = [float(functional.cross_entropy(head(new), truth)) for head in (once, five)]
    assert losses[1] < losses[0] + 0.05
    # One image alone, of two classes, tells nothing but their shares.
    alone = fitted(visual[:1].repeat(4, 1), torch.tensor([0, 1, 1, 1]))
    assert alone(new).isfinite().all()


def test_which_rows_it_is_fitted_on(monkeypatch: pytest.MonkeyPatch) -> None:
    labels, paired = torch.tensor([0, -1, 1, 1, -1, 0]), torch.tensor([True, True, False, True, False, True])

    def of(labels: Tensor = labels, taught: bool = False, classes: int = K) -> tuple[list[int], str]:
        rows, absence = kernel_rows(labels, paired[: len(labels)], taught, classes)
        return rows.tolist(), absence

    assert of() == ([0, 2, 3, 5], "")
    assert of(taught=True) == ([0, 1, 2, 3, 5], ""), "unlabelled pairs have a teacher"
    too_few = "it needs two classes, and one with two rows that differ"
    assert of(torch.zeros(6, dtype=torch.int64)) == of(torch.tensor([0, 1, 2])) == ([], too_few)
    assert of(classes=2**23) == ([], "it takes at most 2 rows, and there are 4"), "rows times classes"
    monkeypatch.setattr(kernel_head, "MOST_ROWS", 3)
    assert of() == ([], "it takes at most 3 rows, and there are 4")


def features(labels: np.ndarray, visual: np.ndarray) -> FeatureSet:
    text = np.random.default_rng(2).standard_normal((len(labels), 4)).astype(np.float32)
    return FeatureSet.from_arrays(visual, text, labels, visual[:6], np.arange(6) % K)


def made(labels: np.ndarray, visual: np.ndarray, **settings: object) -> SeDA:
    config = SeDAConfig(visual_dim=DV, text_dim=4, n_classes=K, width=16, blocks=1, **settings)  # type: ignore[arg-type]
    return prepare(features(labels, visual), config, 0, torch.device("cpu"))[0].eval()


def test_four_heads_are_combined_with_their_weights(tmp_path: Path) -> None:
    visual, labels = clouds(61, 0.5)
    raw = 3 * visual.numpy() + 1
    model = made(labels.numpy(), raw, kernel_weight=0.6, textual_weight=0.3, visual_weight=0.2)
    assert model.kernel.fitted
    with torch.no_grad():
        combined, semantic, textual, seen, kernel = model.predict_log_proba(torch.from_numpy(raw), heads=True)
        # Not `visual`: of a row of its own the kernel tells by a square root how far rounding has moved it.
        told = model.kernel(model.standardise_visual(torch.from_numpy(raw)))
    torch.testing.assert_close(kernel, told.log_softmax(1), atol=1e-4, rtol=1e-4)
    three = 0.5 * semantic + 0.3 * textual + 0.2 * seen
    torch.testing.assert_close(combined, (0.4 * three + 0.6 * kernel).log_softmax(1))
    assert (kernel.argmax(1) == labels).float().mean() > 0.9

    model.save_pretrained(tmp_path)
    again = SeDA.from_pretrained(tmp_path)
    assert torch.equal(again.predict_log_proba(torch.from_numpy(raw)), combined)


def test_without_weight_there_is_none_and_no_row_is_kept(tmp_path: Path) -> None:
    visual, labels = clouds(61, 0.5)
    model = made(labels.numpy(), visual.numpy(), kernel_weight=0.0)
    assert not model.kernel.fitted and model.kernel.absence == "its weight is 0"
    assert len(model.predict_log_proba(visual, heads=True)) == 4
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors")["kernel.rows"].shape == (0, DV)


def test_a_model_of_before_has_none(tmp_path: Path) -> None:
    visual, labels = clouds(61, 0.5)
    model = made(labels.numpy(), visual.numpy())
    path = model.save_pretrained(tmp_path)
    tensors, about = load_file(path), _metadata(path)
    save_file({name: value for name, value in tensors.items() if "kernel" not in name}, path, metadata=about)
    before = SeDA.from_pretrained(tmp_path)
    assert not before.kernel.fitted
    _, semantic, textual, seen = before.predict_log_proba(visual, heads=True)
    expected = (0.25 * semantic + 0.25 * textual + 0.5 * seen).log_softmax(1)
    torch.testing.assert_close(before.predict_log_proba(visual), expected)
    # A head of other rows takes the place of one's own, and none that of one.
    for other in (made(labels.numpy()[:40], visual.numpy()[:40]), before):
        model.load_state_dict(other.state_dict())
        assert torch.equal(model.predict_log_proba(visual), other.predict_log_proba(visual))


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def test_unlabelled_pairs_count_as_what_the_teacher_says() -> None:
    visual, labels = clouds(90, 0.4)
    few = labels.clone()
    few[9:] = -1
    text = functional.one_hot(labels, 4).numpy().astype(np.float32)
    text += 0.05 * np.random.default_rng(0).standard_normal(text.shape).astype(np.float32)
    data = FeatureSet.from_arrays(visual.numpy(), text, few.numpy(), visual.numpy()[:6], np.arange(6) % K)
    config = SeDAConfig(visual_dim=DV, text_dim=4, n_classes=K, width=16, blocks=1)
    model, rows = prepare(data, config, 0, torch.device("cpu"))
    assert model.teacher is not None and len(model.kernel.rows) == 90
    seen, texts = rows.rows(torch.arange(90))[:2]
    targets = functional.one_hot(few.clamp(min=0), K).float()
    targets[9:] = model.teacher(seen[9:], texts[9:])
    expected = KernelHead(DV, K)
    expected.fit(seen, targets, 0)
    for name, value in expected.state_dict().items():
        assert torch.equal(model.kernel.state_dict()[name], value), name
    alone = fitted(seen[:9], labels[:9])
    assert (model.kernel(seen).argmax(1) == labels).sum() >= (alone(seen).argmax(1) == labels).sum()


@pytest.mark.parametrize("length", [30, 64, 90, 301])
def test_a_row_does_not_see_its_place(length: int) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(64, length), torch.randn(K, length), torch.randn(K)
    found = placeless_linear(x, weight, bias)
    torch.testing.assert_close(found, functional.linear(x, weight, bias))
    for _ in range(10):
        order = torch.randperm(64)
        assert torch.equal(placeless_linear(x[order], weight, bias), found[order])


def test_where_each_class_has_one_image_there_is_no_head_and_labels_stand() -> None:
    """Its captions make rows of it, but none of them is another image: left out, nothing is left to tell it."""
    visual, labels = torch.randn(10, DV), torch.arange(10)
    captions = visual.repeat_interleave(5, 0), functional.one_hot(labels, 10).float().repeat_interleave(5, 0)
    flat = torch.full((50, 10), 0.1)
    head = KernelHead(DV, 10)
    assert head.fit(*captions, 0, flat, kernel_head.SHARES) == 1.0
    assert not head.fitted
    assert head.absence == kernel_head.NOTHING_TO_LEAVE_OUT
    assert kernel_head.label_share(*captions, flat, 0) == 1.0


def test_rows_that_are_alone_in_their_class_do_not_condemn_labels() -> None:
    """Without its only row a class is never told, and what says little of any class would be believed."""
    visual, labels = clouds(60, 0.3)
    many = torch.cat((visual, 3 * torch.randn(40, DV, generator=torch.Generator().manual_seed(0))))
    targets = functional.one_hot(torch.cat((labels, torch.arange(K, K + 40))), K + 40).float()
    assert kernel_head.label_share(many, targets, torch.full_like(targets, 1 / (K + 40)), 0) == 1.0


def test_a_prediction_does_not_depend_on_its_place() -> None:
    """Of features whose number is no multiple of 16."""
    visual, labels = clouds(60, 0.5)
    wide = torch.cat((visual, torch.randn(60, 508)), dim=1)
    head = fitted(wide, labels)
    for rows in (8, 37):
        found = head(wide[:rows])
        for turn in range(1, rows):
            assert torch.equal(head(wide[:rows].roll(turn, 0)), found.roll(turn, 0))


def test_rows_that_are_judged_have_fellows_of_their_class() -> None:
    """Of many classes some are judged, with as many rows each as a training sees, or thirty-two."""
    assert kernel_head.drawn(torch.arange(900) % 9, 300, 0).equal(
        torch.randperm(900, generator=torch.Generator().manual_seed(0))[:300]
    )
    classes = torch.arange(2000) % 100 + 5
    for seed in range(3):
        found = kernel_head.drawn(classes, 300, seed)
        assert len(found) == 300 == len(found.unique())
        counts = classes[found].bincount()
        assert counts[counts > 0].sort().values.tolist() == [20] * 15
    many = torch.arange(20000) % 100
    counts = many[kernel_head.drawn(many, 300, 0)].bincount()
    assert counts[counts > 0].sort().values.tolist() == [12, *[32] * 9]
    assert not kernel_head.drawn(many, 300, 0).equal(kernel_head.drawn(many, 300, 1))


def test_labels_of_many_classes_are_believed_though_few_rows_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the labels err, and two fifths of what texts say: with two rows a class texts would be believed most, a
    training has twenty."""
    rng = np.random.default_rng(0)
    classes, rows = 200, 4000
    true = torch.arange(rows) % classes
    centres, noise = (torch.from_numpy(rng.standard_normal((n, 24), dtype=np.float32)) for n in (classes, rows))
    visual = centres[true] + noise
    labels, said = (
        torch.from_numpy(np.where(rng.random(rows) < wrong, rng.integers(classes, size=rows), true))
        for wrong in (0.5, 0.4)
    )
    opinions = torch.softmax(4 * functional.one_hot(said, classes).float(), 1)
    monkeypatch.setattr(kernel_head, "RIDGE_ROWS", 400)
    found = {}
    for fellows in (32, 0):
        monkeypatch.setattr(kernel_head, "_ROWS_A_CLASS", fellows)
        judged = kernel_head.judged_rows(labels, torch.ones(rows, dtype=torch.bool), 400, 0)
        targets = functional.one_hot(labels[judged], classes).float()
        found[fellows] = kernel_head.label_share(visual[judged], targets, opinions[judged], 0)
    assert found[32] >= 0.75 and found[0] <= 0.5
