"""The baselines every result is read against: same features, same labels.

`linear`: softmax linear probe on v, L2 chosen on a held-out fifth of the training part, then refitted.
`mlp`: hidden layers of Linear, LayerNorm, GELU and dropout on v.
`one_step`: the one-step mapping that the paper's abstract argues against: an MLP v -> t with a mean squared
    error, and a linear head on the mapped t with a cross entropy that also trains the mapping.
`one_step_mse`: the same mapping trained with the mean squared error alone; its classifier is a linear probe
    of the true t, applied to the mapped t.

With multi-label rows (N, K) each has a yes or no of each class in place of the softmax; the linear probe is one
logistic regression a class, with one penalty for all.

The networks train with AdamW, a tenth of warm-up and a cosine to zero. Defaults were picked on held-out
fifths of the training parts of three sets (5 216 x 768, 2 173 x 128, 420 x 1 024), on which width, depth,
norm and learning rate differed by less than the spread between splits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional

from .arrays import Labels, labelled_rows
from .nn.copies import first_copies
from .nn.multi_label import binary_cross_entropy, rate_logits, smoothed

__all__ = ["BASELINES", "Baseline", "LinearSettings", "NetworkSettings", "fit_baseline"]

BASELINES: tuple[str, ...] = ("linear", "mlp", "one_step", "one_step_mse")

UNLABELLED = -1
PREDICTION_ROWS = 4096

# Passes and rows a batch of the networks, and the steps that few rows make more passes for, as SeDA's do.
EPOCHS, BATCH_SIZE, FEWEST_STEPS = 40, 128, 240

Float = NDArray[np.float32]
Int = NDArray[np.int64]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class LinearSettings:
    """Settings of `linear`, and of the probe inside `one_step_mse`.

    l2_grid: penalties tried, strongest first, until two in a row do worse than the best:
        mean cross entropy + l2 / 2 * |weights|^2 is minimised.
    holdout: share of each class that chooses among them, by cross entropy (steadier than accuracy on few
        rows).
    max_iter: of L-BFGS, for each penalty.
    """

    l2_grid: tuple[float, ...] = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
    holdout: float = 0.2
    max_iter: int = 1000

    def __post_init__(self) -> None:
        if not self.l2_grid or not all(l2 > 0 for l2 in self.l2_grid):
            raise ValueError(f"l2_grid: expected positive numbers, got {self.l2_grid}")
        if not 0 < self.holdout < 1:
            raise ValueError(f"holdout: expected a number between 0 and 1, got {self.holdout}")
        if self.max_iter < 1:
            raise ValueError(f"max_iter: expected 1 or more, got {self.max_iter}")


@dataclass(frozen=True)
class NetworkSettings:
    """Settings of `mlp`, `one_step` and `one_step_mse`.

    ce_weight: of the cross entropy beside the squared error, `one_step` only.
    input_dropout: share of the visual features set to zero; a point or two on weak visual features.
    clip: largest norm of the gradient.
    """

    lr: float = 1e-3
    weight_decay: float = 0.05
    dropout: float = 0.5
    input_dropout: float = 0.2
    width: int = 512
    depth: int = 1
    label_smoothing: float = 0.1
    ce_weight: float = 1.0
    clip: float = 1.0

    def __post_init__(self) -> None:
        for name in ("lr", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        for name in ("weight_decay", "ce_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        for name in ("dropout", "input_dropout", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a number in [0, 1), got {getattr(self, name)}")
        for name in ("width", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)}")


class _Network(nn.Module):
    """trunk: visual -> hidden or mapped text; head: that -> logits."""

    def __init__(self, trunk: nn.Module, head: nn.Module, maps_to_text: bool) -> None:
        super().__init__()
        self.trunk, self.head, self.maps_to_text = trunk, head, maps_to_text


@dataclass(frozen=True)
class Baseline:
    """A fitted baseline.

    seconds: wall time of the whole fit. hyperparameters: every setting in force, the chosen `l2` included.
    """

    name: str
    seconds: float
    hyperparameters: dict[str, Any]
    visual_dim: int
    network: _Network = field(repr=False)
    multi_label: bool = False

    def log_proba(self, visual: Float) -> Float:
        """Natural log-probabilities (M, K) of visual features (M, Dv), standardised; multi-label, of carrying a class.

        Minus infinity for a class that `linear` or the probe of `one_step_mse` never saw.
        """

        def log_proba(v: Tensor) -> Tensor:
            logits: Tensor = self.network.head(self.network.trunk(v))
            return functional.logsigmoid(logits) if self.multi_label else logits.log_softmax(dim=1)

        return self._blocks(visual, log_proba)

    def aligned(self, visual: Float) -> Float | None:
        """Mapped features (M, Dt) in the standardised textual space; None for `linear` and `mlp`."""
        return self._blocks(visual, self.network.trunk) if self.network.maps_to_text else None

    def _blocks(self, visual: Float, function: Callable[[Tensor], Tensor]) -> Float:
        if visual.ndim != 2 or visual.shape[1] != self.visual_dim:
            raise ValueError(f"visual: expected shape (M, {self.visual_dim}), got {visual.shape}")
        device = next(self.network.parameters()).device
        out = []
        with torch.inference_mode():
            # One block at least, so that no row still gives (0, K).
            for start in range(0, max(1, len(visual)), PREDICTION_ROWS):
                rows = visual[start : start + PREDICTION_ROWS]
                block = torch.tensor(rows, dtype=torch.float32, device=device)
                out.append(function(block).cpu().numpy())
        return np.concatenate(out)


def enough_epochs(rows: int, batch_size: int = BATCH_SIZE) -> int:
    """`EPOCHS`, or as many as make `FEWEST_STEPS` of ``rows``: few steps would flatter whoever takes more."""
    return max(EPOCHS, -(-FEWEST_STEPS // max(1, -(-rows // batch_size))))


def fit_baseline(
    name: str,
    visual: Float,
    text: Float,
    labels: Labels,
    *,
    n_classes: int,
    seed: int,
    epochs: int = EPOCHS,
    batch_size: int = BATCH_SIZE,
    device: str = "cpu",
    progress: Progress | None = None,
    **hyperparameters: Any,
) -> Baseline:
    """Fit the baseline `name` of BASELINES.

    Args:
        visual: (N, Dv) float32, standardised.
        text: (N, Dt) float32, standardised; a row that is NaN throughout has no text.
        labels: (N,) integers in [-1, n_classes), -1 for an unlabelled row; or multi-label (N, n_classes), 1 where a row
            carries a class and 0 where not, a row of -1 unlabelled. `linear` and `mlp` use the
            labelled rows; `one_step` uses rows with text for its squared error and labelled rows for its
            cross entropy; `one_step_mse` uses rows with text, and of these the labelled ones for its probe.
        epochs, batch_size: of the networks; `linear` has neither.
        progress: called as progress(done, total) after each epoch, for `linear` after each penalty.
        hyperparameters: fields of NetworkSettings, of LinearSettings for `linear`; of both for
            `one_step_mse`.

    One seed on one machine with one number of threads gives one result. The global random state is left as it
    was.

    Raises:
        ValueError: unknown name or hyperparameter, shapes that do not fit, NaN or infinity, a label out of
            range, or no row that the method could learn from.
    """
    if name not in BASELINES:
        raise ValueError(f"name: no baseline {name!r}, expected one of {', '.join(BASELINES)}")
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"epochs, batch_size: expected 1 or more, got {epochs} and {batch_size}")
    linear, settings = _settings(name, hyperparameters)
    visual, text, labels, paired = _checked(visual, text, labels, n_classes)
    labelled = labelled_rows(labels)
    begin = time.perf_counter()
    used: dict[str, Any] = {}
    network: _Network
    if name == "linear":
        images = _images(visual[labelled])
        head, used["l2"] = _fit_linear(visual[labelled], labels[labelled], images, n_classes, seed, linear, progress)
        network = _Network(nn.Identity(), head, maps_to_text=False)
        used |= asdict(linear)
    else:
        targets = _Targets(visual, text, labels, paired)
        network = _fit_network(name, targets, n_classes, seed, epochs, batch_size, device, settings, progress)
        used |= asdict(settings) | {"epochs": epochs, "batch_size": batch_size}
        if name == "one_step_mse":
            rows = labelled & paired
            images = _images(visual[rows])
            network.head, used["l2"] = _fit_linear(text[rows], labels[rows], images, n_classes, seed, linear, None)
            used |= asdict(linear)
    network.to(device).eval()
    return Baseline(name, time.perf_counter() - begin, used, visual.shape[1], network, labels.ndim == 2)


def _settings(name: str, given: dict[str, Any]) -> tuple[LinearSettings, NetworkSettings]:
    linear = {f.name for f in fields(LinearSettings)} if name in ("linear", "one_step_mse") else set()
    network = {f.name for f in fields(NetworkSettings)} if name != "linear" else set()
    unknown = sorted(set(given) - linear - network)
    if unknown:
        known = ", ".join(sorted(linear | network))
        raise ValueError(f"{name}: no hyperparameter {unknown[0]!r}, expected one of {known}")
    return (
        LinearSettings(**{k: v for k, v in given.items() if k in linear}),
        NetworkSettings(**{k: v for k, v in given.items() if k in network}),
    )


def _checked(
    visual: Float, text: Float, labels: Labels, n_classes: int
) -> tuple[Float, Float, Labels, NDArray[np.bool_]]:
    """The arrays as float32 and int64, missing text as zeros, and which rows have text."""
    visual, text, labels = np.asarray(visual, np.float32), np.asarray(text, np.float32), np.asarray(labels)
    n_rows = len(visual)
    fitting = ((n_rows,), (n_rows, n_classes))
    if visual.ndim != 2 or text.ndim != 2 or len(text) != n_rows or labels.shape not in fitting:
        raise ValueError(
            f"visual, text, labels: expected (N, Dv), (N, Dt), (N,), got {visual.shape}, {text.shape}, {labels.shape}"
        )
    if labels.dtype.kind not in "iu":
        raise ValueError(f"labels: expected integers, got {labels.dtype}")
    paired = np.any(~np.isnan(text), axis=1, keepdims=True)
    text = np.where(paired, text, np.float32(0))
    for name, array in (("visual", visual), ("text", text)):
        bad = ~np.isfinite(array).all(axis=1)
        if bad.any():
            raise ValueError(f"{name}: row {int(bad.argmax())} holds NaN or infinity")
    if labels.ndim == 2:
        bad = ((labels != 0) & (labels != 1)).any(axis=1) & (labels != UNLABELLED).any(axis=1)
        if bad.any():
            raise ValueError(f"labels: row {int(bad.argmax())} is neither of 0 and 1 nor -1 throughout")
        return visual, text, labels.astype(np.int8), paired[:, 0]
    outside = (labels < UNLABELLED) | (labels >= n_classes)
    if outside.any():
        row = int(outside.argmax())
        raise ValueError(f"labels: row {row} is {labels[row]}, outside [-1, {n_classes})")
    return visual, text, labels.astype(np.int64), paired[:, 0]


# ----------------------------------------------------------------------------------------------- linear probe


def _images(visual: Float) -> Int:
    """Number of the first row of each row's image, (N, D) -> (N,): one image may have several texts."""
    return first_copies(torch.from_numpy(visual)).numpy()


def _holdout(labels: Int, images: Int, share: float, seed: int) -> NDArray[np.bool_]:
    """`share` of each class's images, at least one; none of a class with a single one. ``images`` as of `_images`.

    scikit-learn's stratified splitters refuse such classes, which sets with few labels have.
    """
    generator = np.random.default_rng(seed)
    held, first = np.zeros(len(labels), dtype=bool), images == np.arange(len(images))
    for label in np.unique(labels):
        rows = generator.permutation(np.flatnonzero((labels == label) & first))
        if len(rows) > 1:
            held[rows[: min(len(rows) - 1, max(1, round(share * len(rows))))]] = True
    held = held[images]
    # An image may have rows of two classes, of which one has no other image.
    return held & ~np.isin(images, images[held & ~np.isin(labels, labels[~held])])


def _choose_l2(
    x: NDArray[np.float64], y: Int, images: Int, seed: int, settings: LinearSettings, progress: Progress | None
) -> float:
    grid = sorted(settings.l2_grid, reverse=True)
    held = _holdout(y, images, settings.holdout, seed)
    if not held.any():
        return grid[len(grid) // 2]
    train, truth = ~held, np.searchsorted(np.unique(y), y[held])
    model = LogisticRegression(max_iter=settings.max_iter, warm_start=True)
    losses: list[float] = []
    for step, l2 in enumerate(grid, start=1):
        model.set_params(C=1.0 / (l2 * int(train.sum())))
        model.fit(x[train], y[train])
        losses.append(-float(model.predict_log_proba(x[held])[np.arange(len(truth)), truth].mean()))
        if progress is not None:
            progress(step, len(grid) + 1)
        if len(losses) - int(np.argmin(losses)) > 2:
            break  # two penalties past the best: weaker ones overfit more, and cost most of the time
    return grid[int(np.argmin(losses))]


def _fit_linear(
    x: Float, y: Labels, images: Int, n_classes: int, seed: int, settings: LinearSettings, progress: Progress | None
) -> tuple[nn.Linear, float]:
    """A linear layer (D -> n_classes) with scikit-learn's weights, and the L2 penalty chosen on held-out ``images``.

    Where no class has two of these nothing can be held out, and the middle of the grid is taken.
    """
    if y.ndim == 2:
        return _fit_one_vs_rest(x.astype(np.float64), y > 0, images, seed, settings, progress)
    seen = np.unique(y)
    if len(seen) < 2:
        raise ValueError(f"labels: a linear probe needs labelled rows of 2 classes, got {len(seen)}")
    wide = x.astype(np.float64)  # L-BFGS in float32 stopped early at weak penalties
    l2 = _choose_l2(wide, y, images, seed, settings, progress)
    model = LogisticRegression(C=1.0 / (l2 * len(y)), max_iter=settings.max_iter).fit(wide, y)
    coefficients, intercept = model.coef_, model.intercept_
    if len(seen) == 2:  # scikit-learn keeps only the difference of the two
        coefficients, intercept = np.outer([-0.5, 0.5], coefficients[0]), intercept[0] * np.array([-0.5, 0.5])
    # skip_init: the usual random weights would be drawn from the global generator.
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, x.shape[1], n_classes).requires_grad_(False)
    layer.weight.zero_()
    layer.bias.fill_(-math.inf)
    layer.weight[seen] = torch.tensor(coefficients, dtype=torch.float32)
    layer.bias[seen] = torch.tensor(intercept, dtype=torch.float32)
    if progress is not None:
        progress(len(settings.l2_grid) + 1, len(settings.l2_grid) + 1)
    return layer, l2


def _fit_one_vs_rest(
    x: NDArray[np.float64],
    y: NDArray[np.bool_],
    images: Int,
    seed: int,
    settings: LinearSettings,
    progress: Progress | None,
) -> tuple[nn.Linear, float]:
    """A logistic regression of each column of ``y`` (N, K), all with the penalty that is best on a random holdout.

    A class that all rows or none carry has no weights and the bias of its rate, by the rule of succession.
    """
    differ = y.any(axis=0) & ~y.all(axis=0)
    if not differ.any():
        raise ValueError("labels: a linear probe needs a class that some labelled rows carry and some do not")
    firsts, grid = np.unique(images), sorted(settings.l2_grid, reverse=True)
    drawn = np.random.default_rng(seed).permutation(firsts)[: round(settings.holdout * len(firsts))]
    out = np.isin(images, drawn)
    held, kept = np.flatnonzero(out), np.flatnonzero(~out)
    losses: list[float] = []
    found = None
    for step, l2 in enumerate(grid if len(held) else [], start=1):
        found = _logistic(x[kept], y[kept][:, differ], l2, settings.max_iter, found)
        losses.append(_entropy(x[held] @ found[:-1] + found[-1], y[held][:, differ]))
        if progress is not None:
            progress(step, len(grid) + 1)
        if len(losses) - int(np.argmin(losses)) > 2:
            break  # as in _choose_l2
    l2 = grid[int(np.argmin(losses))] if losses else grid[len(grid) // 2]
    found = _logistic(x, y[:, differ], l2, settings.max_iter, None)
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, x.shape[1], y.shape[1]).requires_grad_(False)
    layer.weight.zero_()
    layer.bias.copy_(torch.from_numpy(np.log((y.sum(axis=0) + 1.0) / ((~y).sum(axis=0) + 1.0))))
    layer.weight[torch.from_numpy(differ)] = torch.tensor(found[:-1].T, dtype=torch.float32)
    layer.bias[torch.from_numpy(differ)] = torch.tensor(found[-1], dtype=torch.float32)
    if progress is not None:
        progress(len(grid) + 1, len(grid) + 1)
    return layer, l2


def _entropy(logits: NDArray[np.float64], y: NDArray[np.bool_]) -> float:
    """Mean over rows of the cross entropies of yes and no, summed over the classes."""
    return float((np.logaddexp(0.0, logits) - y * logits).sum() / len(y))


def _logistic(
    x: NDArray[np.float64], y: NDArray[np.bool_], l2: float, max_iter: int, start: NDArray[np.float64] | None
) -> NDArray[np.float64]:
    """Weights (D + 1, K), the last row the biases, of independent logistic regressions by one run of L-BFGS.

    scikit-learn's `LogisticRegression` has the same objective, one class at a time.
    """
    shape = (x.shape[1] + 1, y.shape[1])

    def objective(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        w = flat.reshape(shape)
        logits = x @ w[:-1] + w[-1]
        residual = (expit(logits) - y) / len(x)
        gradient = np.vstack((x.T @ residual + l2 * w[:-1], residual.sum(axis=0)))
        return _entropy(logits, y) + 0.5 * l2 * float(np.square(w[:-1]).sum()), gradient.ravel()

    # The tolerances of scikit-learn's LogisticRegression.
    options = {"maxiter": max_iter, "gtol": 1e-4, "ftol": 64 * np.finfo(float).eps, "maxls": 50}
    first = np.zeros(shape) if start is None else start
    found = minimize(objective, first.ravel(), jac=True, method="L-BFGS-B", options=options)
    result: NDArray[np.float64] = found.x.reshape(shape)
    return result


# --------------------------------------------------------------------------------------------------- networks


@dataclass(frozen=True)
class _Targets:
    visual: Float
    text: Float
    labels: Labels
    paired: NDArray[np.bool_]


def _layers(n_in: int, settings: NetworkSettings) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Dropout(settings.input_dropout)]
    for depth in range(settings.depth):
        layers += [
            nn.Linear(settings.width if depth else n_in, settings.width),
            nn.LayerNorm(settings.width),
            nn.GELU(),
            nn.Dropout(settings.dropout),
        ]
    return layers


def _build(name: str, visual_dim: int, text_dim: int, n_classes: int, settings: NetworkSettings) -> _Network:
    layers = _layers(visual_dim, settings)
    if name == "mlp":
        return _Network(nn.Sequential(*layers), nn.Linear(settings.width, n_classes), maps_to_text=False)
    trunk = nn.Sequential(*layers, nn.Linear(settings.width, text_dim))
    return _Network(trunk, nn.Linear(text_dim, n_classes), maps_to_text=True)


def _rows_used(name: str, labelled: NDArray[np.bool_], paired: NDArray[np.bool_]) -> NDArray[np.bool_]:
    if name != "one_step_mse" and not labelled.any():
        raise ValueError(f"labels: no labelled row, so {name} cannot be trained")
    if name != "mlp" and not paired.any():
        raise ValueError(f"text: no row has text, so {name} cannot be trained")
    return {"mlp": labelled, "one_step": labelled | paired, "one_step_mse": paired}[name]


def _warmup_cosine(total: int) -> Callable[[int], float]:
    warmup = max(1, total // 10)
    return lambda step: min((step + 1) / warmup, 0.5 * (1.0 + math.cos(math.pi * min(step, total) / total)))


@contextmanager
def _seeded(seed: int, device: str) -> Iterator[None]:
    """The generators of the CPU and of ``device`` at ``seed``, then as they were; those of other GPUs stay as they are,
    which `torch.manual_seed` would not leave them."""
    gpus = [torch.device(device)] if device.startswith("cuda") else []
    with torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(seed)
        for gpu in gpus:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        yield


def _fit_network(
    name: str,
    data: _Targets,
    n_classes: int,
    seed: int,
    epochs: int,
    batch_size: int,
    device: str,
    settings: NetworkSettings,
    progress: Progress | None,
) -> _Network:
    rows = _rows_used(name, labelled_rows(data.labels), data.paired)
    visual, text = (torch.from_numpy(array[rows]).to(device) for array in (data.visual, data.text))
    labels, paired = (torch.from_numpy(array[rows]).to(device) for array in (data.labels, data.paired))
    known = torch.from_numpy(labelled_rows(data.labels)[rows])
    loss = _Loss(name, settings, float(known.float().mean()), float(paired.float().mean()))
    with _seeded(seed, device):
        network = _build(name, visual.shape[1], text.shape[1], n_classes, settings).to(device).train()
        if labels.ndim == 2 and isinstance(network.head, nn.Linear):
            nn.init.zeros_(network.head.bias).data += rate_logits(labels)
        parameters = list((network.trunk if name == "one_step_mse" else network).parameters())
        optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
        n_batches = -(-len(visual) // batch_size)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _warmup_cosine(epochs * n_batches))
        for epoch in range(1, epochs + 1):
            for batch in torch.randperm(len(visual)).to(device).split(batch_size):
                optimizer.zero_grad(set_to_none=True)
                loss(network, visual[batch], text[batch], labels[batch], paired[batch]).backward()
                nn.utils.clip_grad_norm_(parameters, settings.clip)
                optimizer.step()
                schedule.step()
            if progress is not None:
                progress(epoch, epochs)
    return network


@dataclass(frozen=True)
class _Loss:
    """Cross entropy of labelled rows and squared error of rows with text.

    Each is divided by the number of such rows that a batch is *expected* to hold: dividing by the number it
    holds would give one lone row the weight of many.
    """

    name: str
    settings: NetworkSettings
    labelled_share: float
    paired_share: float

    def __call__(self, network: _Network, visual: Tensor, text: Tensor, labels: Tensor, paired: Tensor) -> Tensor:
        out: Tensor = network.trunk(visual)
        total = out.new_zeros(())
        if self.name != "mlp":
            error = (out - text).square().mean(dim=1)
            total = total + (error * paired).sum() / (len(visual) * self.paired_share)
        if self.name != "one_step_mse":
            entropy = self._entropy(network.head(out), labels)
            weight = self.settings.ce_weight if self.name == "one_step" else 1.0
            total = total + weight * entropy / (len(visual) * self.labelled_share)
        return total

    def _entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy of the labelled rows, their sum."""
        if labels.ndim == 2:
            targets = smoothed(labels, self.settings.label_smoothing, logits.dtype)
            return torch.where(labels[:, 0] >= 0, binary_cross_entropy(logits, targets), 0).sum()
        return functional.cross_entropy(
            logits,
            labels,
            ignore_index=UNLABELLED,
            label_smoothing=self.settings.label_smoothing,
            reduction="sum",
        )
