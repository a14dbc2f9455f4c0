"""Pictures of a run: loss curves, confusion matrix, and the paths of samples through both spaces.

Drawn with Figure objects on the Agg canvas: no display, no pyplot, no global state. Colours are those of Okabe and
Ito (2008), told apart with any colour vision; markers and line styles repeat what a colour says.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from scipy.sparse import csr_array
from sklearn.decomposition import PCA

from .arrays import labelled_rows
from .files import atomic_path
from .metrics import average_precisions

__all__ = ["write_figures"]

Array = NDArray[np.floating[Any]]
Points = NDArray[np.float64]

UNLABELLED = -1
DPI = 130
POINTS = 1500  # more dots hide one another
PATHS = 8
FULL_MATRIX = 40  # classes: above, only the most confused ones are shown
CONFUSED = 24
NAMED_CENTRES = 30

BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILION, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
)  # fmt: skip
CURVES = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY)
DASHES = ("-", "--", "-.", ":")


@matplotlib.rc_context({"text.usetex": False})  # which class names and captions are not written for
def write_figures(
    directory: Path,
    *,
    history: Sequence[Mapping[str, Any]],
    labels: NDArray[np.integer],
    predicted: NDArray[Any],
    class_names: Sequence[str],
    visual: Array,
    semantic: Array,
    aligned: Array,
    text: Array | None,
    semantic_path: Array,
    aligned_path: Array,
    centres: Array,
) -> list[Path]:
    """Write `loss.png`, `confusion.png` and `paths.png` into `directory`, which is made if need be.

    Multi-label rows have `average_precision.png` in place of `confusion.png`.

    Args:
        history: a row an epoch; columns whose name begins with "loss" are drawn against "epoch" where there is
            such a column, else against the row's number. No row: no `loss.png`.
        labels, predicted: (N,) classes; rows labelled -1 are left out. No labelled row: no `confusion.png`.
            Multi-label: (N, K) labels and log-probabilities. No class that a row carries: no `average_precision.png`.
        class_names: K names.
        visual, semantic: (N, Dv) v and s. centres: (K, Dv). All standardised.
        aligned: (N, Dt) t_. text: (N, Dt) t, rows of NaN for missing texts, or None.
        semantic_path: (S, n, Dv), aligned_path: (S', n, Dt): n samples after each step; the first 8 are drawn.

    Returns:
        The paths written. Each file appears whole or not at all.

    Raises:
        ValueError: shapes that do not fit. DataError: a file cannot be written.
    """
    _check(labels, predicted, class_names, visual, semantic, aligned, text, semantic_path, aligned_path, centres)
    figures: dict[str, Figure] = {}
    if history:
        figures["loss.png"] = _loss_figure(history)
    if labels.ndim == 2:
        if np.any(labels > 0):
            known = labelled_rows(labels)
            figures["average_precision.png"] = _average_precision_figure(labels[known], predicted[known], class_names)
    elif np.any(labels != UNLABELLED):
        known = labels != UNLABELLED
        figures["confusion.png"] = _confusion_figure(labels[known], predicted[known], class_names)
    figures["paths.png"] = _paths_figure(
        class_names, visual, semantic, aligned, text, semantic_path, aligned_path, centres
    )
    directory.mkdir(parents=True, exist_ok=True)
    return [_save(figure, directory / name) for name, figure in figures.items()]


def _check(
    labels: NDArray[np.integer],
    predicted: NDArray[Any],
    class_names: Sequence[str],
    visual: Array,
    semantic: Array,
    aligned: Array,
    text: Array | None,
    semantic_path: Array,
    aligned_path: Array,
    centres: Array,
) -> None:
    n_rows, n_classes = len(visual), len(class_names)
    of_labels = (n_rows, n_classes) if labels.ndim == 2 else (n_rows,)
    expected: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = [
        ("labels", labels.shape, of_labels),
        ("predicted", predicted.shape, of_labels),
        ("semantic", semantic.shape, visual.shape),
        ("aligned", aligned.shape, (n_rows, aligned.shape[-1])),
        ("text", aligned.shape if text is None else text.shape, aligned.shape),
        ("semantic_path", semantic_path.shape[2:], visual.shape[1:]),
        ("aligned_path", aligned_path.shape[2:], aligned.shape[1:]),
        ("centres", centres.shape, (n_classes, visual.shape[-1])),
    ]
    for name, got, want in expected:
        if got != want:
            raise ValueError(f"{name}: expected shape {want}, got {got}")
    if labels.ndim == 2:
        return
    for name, classes, low in (("labels", labels, UNLABELLED), ("predicted", predicted, 0)):
        if n_rows and not low <= classes.min() <= classes.max() < n_classes:
            raise ValueError(f"{name}: expected classes in [{low}, {n_classes})")


def _save(figure: Figure, path: Path) -> Path:
    FigureCanvasAgg(figure)
    with atomic_path(path) as draft, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure.savefig(draft, format="png", dpi=DPI)
    lacking = [warning for warning in caught if "missing from font" in str(warning.message)]
    for warning in caught:
        if warning not in lacking:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if lacking:
        # Matplotlib warns of each letter by its number.
        warnings.warn(f"{path.name} shows boxes for letters of class names that its font lacks", stacklevel=2)
    return path


def _despine(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


# ------------------------------------------------------------------------------------------------- loss curves


def _column(history: Sequence[Mapping[str, Any]], name: str) -> Points:
    """A column as float64; NaN where a row lacks it or holds nothing (a CSV's empty cell)."""
    cells = (row.get(name) for row in history)
    return np.array([np.nan if cell is None or cell == "" else float(cell) for cell in cells])


def _loss_figure(history: Sequence[Mapping[str, Any]]) -> Figure:
    names = list(dict.fromkeys(name for row in history for name in row if name.startswith("loss")))
    curves = {name: _column(history, name) for name in names}
    # A term that is switched off is a line of zeros, which says nothing and forbids a logarithmic axis.
    curves = {name: curve for name, curve in curves.items() if np.any(np.nan_to_num(curve) != 0.0)}
    has_epochs = all("epoch" in row for row in history)
    epochs = _column(history, "epoch") if has_epochs else np.arange(1.0, len(history) + 1)

    figure = Figure(figsize=(6.8, 4.4), layout="constrained")
    axes = figure.add_subplot()
    marker = "o" if len(history) < 3 else None
    terms = 0
    for name, curve in curves.items():
        if name == "loss":
            axes.plot(epochs, curve, color=BLACK, linewidth=2.4, marker=marker, label="loss (weighted sum)")
            continue
        style = DASHES[(terms // len(CURVES)) % len(DASHES)]
        label = name.removeprefix("loss").strip("_-./ ") or name
        axes.plot(epochs, curve, style, color=CURVES[terms % len(CURVES)], linewidth=1.6, marker=marker, label=label)
        terms += 1
    values = np.concatenate([*curves.values(), [np.nan]])
    values = values[np.isfinite(values)]
    if values.size and values.min() > 0.0 and values.max() > 10.0 * values.min():
        axes.set_yscale("log")
    axes.set(xlabel="epoch", ylabel="mean loss in the epoch", title="Training loss and its terms")
    axes.grid(alpha=0.25)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if curves:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    _despine(axes)
    return figure


# -------------------------------------------------------------------------------------------- confusion matrix


def _most_confused(counts: csr_array, size: int) -> NDArray[np.int64]:
    """The classes of the pairs that are taken for one another most often, at most `size`, in index order."""
    both = (counts + counts.T).tocoo()
    pairs = [(-n, i, j) for i, j, n in zip(both.row, both.col, both.data, strict=True) if i < j]
    chosen: set[int] = set()
    for _, i, j in sorted(pairs):
        if len(chosen | {int(i), int(j)}) > size:
            break
        chosen |= {int(i), int(j)}
    return np.array(sorted(chosen), dtype=np.int64)


def _confusion_figure(
    labels: NDArray[np.integer], predicted: NDArray[np.integer], class_names: Sequence[str]
) -> Figure:
    n_classes = len(class_names)
    # Sparse: a dense table of 20 000 classes would be 3 GB.
    counts = csr_array((np.ones(len(labels), np.int64), (labels, predicted)), shape=(n_classes, n_classes))
    counts.sum_duplicates()
    shown = np.arange(n_classes)
    title = f"{np.mean(labels == predicted):.1%} of {len(labels)} samples right; rows sum to 100 %"
    if n_classes > FULL_MATRIX:
        confused = _most_confused(counts, CONFUSED)
        shown = confused if confused.size else np.unique(labels)[:CONFUSED]
        title = (
            f"{np.mean(labels == predicted):.1%} of {len(labels)} samples right;\n"
            f"the {len(shown)} most confused of {n_classes} classes, rows in % of all predictions"
        )
    totals = np.asarray(counts.sum(axis=1))[shown]
    percent = 100.0 * counts[shown][:, shown].toarray() / np.maximum(totals, 1)[:, None]

    size = len(shown)
    inches = 3.2 + 0.31 * size if size > 12 else 3.6 + 0.42 * size
    figure = Figure(figsize=(inches + 1.2, inches), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(percent, cmap="Blues", vmin=0.0, vmax=100.0)
    for row, column in zip(*np.nonzero(percent >= 0.5), strict=True):
        value = percent[row, column]
        colour = "white" if value > 55.0 else BLACK
        axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7.5, color=colour)
    # A class without a sample is an empty row: the count in its name says so.
    names = [str(class_names[i]) for i in shown.tolist()]
    axes.set_yticks(
        range(size), [f"{_verbatim(_short(n))} ({t})" for n, t in zip(names, totals, strict=True)], fontsize=8
    )
    axes.set_xticks(range(size), [_verbatim(_short(n)) for n in names], rotation=90 if size > 12 else 45, fontsize=8)
    if size <= 12:
        for tick in axes.get_xticklabels():
            tick.set(ha="right", rotation_mode="anchor")
    axes.set_xticks(np.arange(size + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(size + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="0.9", linewidth=0.6)
    axes.tick_params(which="minor", length=0)
    axes.set(xlabel="predicted class", ylabel="true class (samples)")
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.7, label="% of the true class")
    return figure


# ------------------------------------------------------------------------------------------- average precision


def _average_precision_figure(
    labels: NDArray[np.integer], log_proba: NDArray[Any], class_names: Sequence[str]
) -> Figure:
    """A bar a class, the best at the top, with a mark at what chance would give; of many classes the lowest ones."""
    found = average_precisions(log_proba, labels)
    carried = np.flatnonzero(~np.isnan(found))
    order = carried[np.argsort(found[carried], kind="stable")]
    title = f"mean average precision {np.mean(found[carried]):.1%} of {len(carried)} classes"
    if len(order) > FULL_MATRIX:
        order = order[:FULL_MATRIX]
        title += f", the {FULL_MATRIX} lowest"
    rates = (labels > 0).mean(axis=0)
    figure = Figure(figsize=(6.8, 1.6 + 0.24 * len(order)), layout="constrained")
    axes = figure.add_subplot()
    where = np.arange(len(order))
    axes.barh(where, 100.0 * found[order], color=BLUE, height=0.72)
    axes.plot(100.0 * rates[order], where, "|", color=BLACK, markersize=11, markeredgewidth=2, label="chance")
    counts = (labels > 0).sum(axis=0)
    axes.set_yticks(
        where, [f"{_verbatim(_short(str(class_names[k])))} ({counts[k]})" for k in order.tolist()], fontsize=8
    )
    axes.set(xlim=(0, 100), xlabel="average precision, %", ylabel="class (rows that carry it)")
    axes.set_title(title, fontsize=10)
    axes.grid(axis="x", alpha=0.25)
    axes.legend(loc="lower right", fontsize=8)
    _despine(axes)
    return figure


def _short(name: str, length: int = 22) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def _verbatim(name: str) -> str:
    """A name for Matplotlib to show letter by letter: what stands between two $ would be a formula, or no right one."""
    return name.replace("$", r"\$")


# ------------------------------------------------------------------------------------------------------- paths


def _thin(points: Array) -> Points:
    """At most POINTS rows without NaN, evenly spaced in the set's order."""
    finite = points[np.isfinite(points).all(axis=1)]
    if len(finite) > POINTS:
        finite = finite[np.linspace(0, len(finite) - 1, POINTS).astype(np.int64)]
    return finite.astype(np.float64)


class _Plane:
    """The first two principal axes of a set of points; an axis that the set lacks is zero."""

    def __init__(self, points: Points) -> None:
        self.mean = points.mean(axis=0)
        self.axes, self.share = np.zeros((2, points.shape[1])), [0.0, 0.0]
        if np.any(points != points[0]):  # of equal points PCA divides by a variance of zero
            pca = PCA(n_components=min(2, *points.shape), svd_solver="full").fit(points)
            self.axes[: pca.n_components_] = pca.components_
            self.share[: pca.n_components_] = pca.explained_variance_ratio_.tolist()

    def __call__(self, points: Array) -> Points:
        flat: Points = (points.astype(np.float64) - self.mean) @ self.axes.T
        return flat

    def label(self, axes: Axes, of: str = "") -> None:
        first, second = (f"principal axis{of} ({share:.0%} of variance)" for share in self.share)
        axes.set(xlabel=f"first {first}", ylabel=f"second {second}")


def _dots(axes: Axes, points: Points, colour: str, marker: str, label: str, alpha: float) -> None:
    axes.scatter(
        points[:, 0],
        points[:, 1],
        s=9,
        c=colour,
        marker=marker,
        alpha=alpha,
        linewidths=0,
        label=label,
        rasterized=True,
    )


def _frame(axes: Axes, clouds: list[Points], whole: list[Points]) -> None:
    """Limits that show 99 % of each cloud and all of `whole`: a far outlier would squeeze the rest into a spot."""
    low = np.min([np.quantile(cloud, 0.005, axis=0) for cloud in clouds], axis=0)
    high = np.max([np.quantile(cloud, 0.995, axis=0) for cloud in clouds], axis=0)
    for points in whole:
        low = np.minimum(low, points.reshape(-1, 2).min(axis=0, initial=np.inf))
        high = np.maximum(high, points.reshape(-1, 2).max(axis=0, initial=-np.inf))
    margin = 0.05 * (high - low) + 1e-6
    axes.set(xlim=(low[0] - margin[0], high[0] + margin[0]), ylim=(low[1] - margin[1], high[1] + margin[1]))
    outside = sum(int(np.any((cloud < low - margin) | (cloud > high + margin), axis=1).sum()) for cloud in clouds)
    if outside:
        note = f"{outside} of {sum(map(len, clouds))} points lie outside"
        axes.text(0.995, 0.995, note, transform=axes.transAxes, ha="right", va="top", fontsize=7.5, color="0.35")


def _name_centres(axes: Axes, class_names: Sequence[str], where: Points) -> None:
    """A name at one of a centre's four corners, or none where it would cover another name.

    Boxes are in shares of the axes, from the mean width of a letter at this font size in this figure.
    """
    corner = np.array([axes.get_xlim()[0], axes.get_ylim()[0]])
    spots = (where - corner) / [np.ptp(axes.get_xlim()), np.ptp(axes.get_ylim())]
    taken: list[tuple[float, float, float, float]] = []
    for name, point, (x, y) in zip(class_names, where, spots, strict=True):
        label = _short(str(name), 14)
        width, height, gap = 0.0095 * len(label), 0.021, 0.009
        for right, up in ((True, True), (True, False), (False, True), (False, False)):
            left, bottom = x + gap if right else x - gap - width, y + 0.002 if up else y - 0.002 - height
            box = (left, bottom, left + width, bottom + height)
            if not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
                taken.append(box)
                axes.annotate(
                    _verbatim(label), point, (5 if right else -5, 1 if up else -1), textcoords="offset points",
                    fontsize=7, ha="left" if right else "right", va="bottom" if up else "top", zorder=8,
                )  # fmt: skip
                break


def _draw_paths(axes: Axes, paths: Points) -> None:
    """paths (S, n, 2): a line with a dot at each step, a ring at the first and a star at the last."""
    for sample in range(paths.shape[1]):
        track = paths[:, sample]
        axes.plot(*track.T, color="white", linewidth=3.2, zorder=4)
        axes.plot(*track.T, color=BLACK, linewidth=1.2, marker=".", markersize=5, zorder=5)
        first, last = ("path: first step", "path: last step") if sample == 0 else (None, None)
        axes.plot(*track[0], "o", markerfacecolor="white", color=BLACK, markersize=6, zorder=6, label=first)
        axes.plot(*track[-1], "*", color=BLACK, markersize=11, markeredgecolor="white", zorder=7, label=last)


def _semantic_panel(
    axes: Axes, class_names: Sequence[str], visual: Array, semantic: Array, centres: Array, path: Array
) -> None:
    v, s = _thin(visual), _thin(semantic)
    middle = _thin(centres)
    plane = _Plane(np.concatenate([v, s, middle]))
    _dots(axes, plane(v), SKY, "o", "v, visual features", 0.45)
    _dots(axes, plane(s), VERMILION, "^", "s, semantic features", 0.55)
    where = plane(middle)
    axes.plot(where[:, 0], where[:, 1], "D", color=YELLOW, markeredgecolor=BLACK, zorder=3, label="class centres")
    path = plane(path[:, :PATHS]) if path.size else np.empty((0, 0, 2))
    _frame(axes, [plane(v), plane(s)], [where, path])
    if len(centres) <= NAMED_CENTRES and len(where) == len(centres):
        _name_centres(axes, class_names, where)
    _draw_paths(axes, path)
    plane.label(axes)
    axes.set_title("Semantic space: v → s")


def _textual_panel(axes: Axes, aligned: Array, text: Array | None, path: Array) -> None:
    mapped = _thin(aligned)
    real = _thin(text) if text is not None else mapped[:0]
    # Of the mapped features: standardised text is nearly white, its own principal axes follow single outliers.
    plane = _Plane(mapped)
    if len(real):
        _dots(axes, plane(real), BLUE, "o", "t, true text", 0.45)
    _dots(axes, plane(mapped), ORANGE, "^", "t_, mapped features", 0.55)
    path = plane(path[:, :PATHS]) if path.size else np.empty((0, 0, 2))
    _frame(axes, [plane(real), plane(mapped)] if len(real) else [plane(mapped)], [path])
    _draw_paths(axes, path)
    plane.label(axes, " of t_")
    axes.set_title("Textual space: s → t_" + ("" if len(real) else " (no true text given)"))


def _paths_figure(
    class_names: Sequence[str],
    visual: Array,
    semantic: Array,
    aligned: Array,
    text: Array | None,
    semantic_path: Array,
    aligned_path: Array,
    centres: Array,
) -> Figure:
    figure = Figure(figsize=(14.0, 6.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    _semantic_panel(left, class_names, visual, semantic, centres, semantic_path)
    _textual_panel(right, aligned, text, aligned_path)
    for axes in (left, right):
        axes.grid(alpha=0.2)
        legend = axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.09), ncols=5, frameon=False, fontsize=8.5)
        for handle in legend.legend_handles:
            if isinstance(handle, PathCollection):
                handle.set(sizes=[36], alpha=1.0)
        _despine(axes)
    return figure
