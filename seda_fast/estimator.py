"""`SeDAClassifier`: SeDA as a scikit-learn estimator of features, labels and, while it is fitted, texts."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import issparse
from sklearn.base import BaseEstimator, ClassifierMixin, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.preprocessing import LabelEncoder
from sklearn.utils import _safe_indexing, check_array, check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data
from torch import Tensor

from .arrays import Labels, Mask, check_text, check_visual, refuse_what_float32_loses
from .command import choose_device
from .config import ConfigError, SeDAConfig, TrainConfig
from .data import FeatureSet
from .files import DataError, atomic_path, check_writable, checksum, naming
from .loop import train
from .nn import WEIGHTS_FILE, SeDA
from .nn.multi_label import THRESHOLD
from .nn.scaling import Scaling
from .outputs import first_nan
from .prepare import prepare
from .results import DERIVED, ESTIMATOR_FILE
from .surroundings import undisturbed

__all__ = ["SeDAClassifier"]

UNLABELLED = -1
# Sizes come from the data, the seed from random_state.
_ELSEWHERE = {"visual_dim", "text_dim", "n_classes", "class_text", "multi_label", "seed"}
_NARROW = (np.float16, np.float32)
_OWN: dict[str, Any] = {"device": "auto", "unlabelled": None, "random_state": None}
# Settings of a model that was trained without text: the textual head has learnt nothing and is not asked.
_WITHOUT_TEXT = {"textual_weight": 0.0}
_FILE_KEYS = {"settings", "seed", "classes", "dtype", "has_text", "feature_names", "model_sha256"}
# They tell of the model beside them.
_FILES_OF_A_RUN = ("config.toml", "metrics.json")


def _defaults(config: type) -> dict[str, Any]:
    """The settings of a section that the caller may choose, with their defaults."""
    return {field.name: field.default for field in dataclasses.fields(config) if field.name not in _ELSEWHERE}


_MODEL, _TRAIN = _defaults(SeDAConfig), _defaults(TrainConfig)
_ALL = {**_MODEL, **_TRAIN, **_OWN}


def _with_settings(init: Callable[..., None]) -> Callable[..., None]:
    """Give ``__init__`` the signature that scikit-learn reads parameters from; defaults stand in config.py alone."""
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    named = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=d) for n, d in _ALL.items()]
    init.__signature__ = inspect.Signature([own, *named])  # type: ignore[attr-defined]
    return init


def _plain(value: Any) -> Any:
    """A NumPy scalar, as a search over parameters passes it, as a Python value; anything else as it is."""
    return value.item() if isinstance(value, np.generic) else value


class SeDAClassifier(ClassNamePrefixFeaturesOutMixin, ClassifierMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """A classifier of visual features that looks at paired texts while it is fitted, and never when it predicts.

    Args:
        device: "auto" (CUDA where there is a device), "cpu" or "cuda".
        unlabelled: the value in ``y`` of rows whose class is not known. Those with a text train the translation to it
            and, through a teacher that looks at both, the classifiers. None: every row is labelled. Multi-label: such
            a row holds it throughout.
        random_state: int, None or a `numpy.random.RandomState`; an int is what ``seda_fast.train`` calls the seed.
        settings: every setting of `SeDAConfig` and `TrainConfig` but the sizes and the seed, with their defaults;
            ``SeDAClassifier().get_params()`` lists them.

    Attributes:
        model_: the trained `SeDA`. classes_: (K,) the classes, sorted; multi-label 0 .. K-1, the columns of ``y``.
            multi_label_: whether ``y`` had columns. n_features_in_: Dv. seed_: the seed used.
        has_text_: whether there were texts. history_: a dict of losses an epoch; empty after `from_pretrained`.

    A row's result depends on its features alone: the sample id that keys its noise is a hash of them.
    """

    @_with_settings
    def __init__(self, **settings: Any) -> None:
        unknown = sorted(settings.keys() - _ALL.keys())
        if unknown:
            raise TypeError(f"SeDAClassifier has no parameter {unknown[0]!r}")
        for name, default in _ALL.items():
            setattr(self, name, settings.get(name, default))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float32"]
        tags.classifier_tags.multi_label = True
        return tags

    # ---- fitting -------------------------------------------------------------------------------------------------

    @undisturbed()
    def fit(self, X: Any, y: Any, text: Any = None, text_classes: Any = None) -> SeDAClassifier:
        """Train on features, labels and texts.

        Args:
            X: (N, Dv) visual features, finite; an array or anything that makes one, a data frame, a tensor.
            y: (N,) class labels of any type that sorts; the value `unlabelled` marks rows without. Multi-label: an
                indicator matrix (N, K), dense or sparse, 1 where a row carries a class and 0 where not.
            text: (N, Dt) textual features, as ``X``; a row of NaN or a frame's missing values has no text. None: no row
                has any, and only the semantic stage is trained and asked.
            text_classes: instead of ``text``, one textual feature a class: (K, Dt), finite, in the order of
                ``classes_`` (the sorted classes). The networks keep them as a memory that they attend to, in
                prediction too.

        Raises:
            ValueError: data or a setting cannot be used; one sentence that names it.
            TrainingError: the loss is no longer finite.

        Warns:
            UserWarning: no row of ``y`` holds `unlabelled`, which something may have numbered as one of the classes.

        Whatever ends it early leaves the estimator as it was, fitted or not.
        """
        before = dict(self.__dict__)
        try:
            return self._fit(X, y, text, text_classes)
        except BaseException:
            # Else the model of before would tell of the classes of now.
            self.__dict__.clear()
            self.__dict__.update(before)
            raise

    def _fit(self, X: Any, y: Any, text: Any, text_classes: Any) -> SeDAClassifier:
        if self.unlabelled is not None and self.unlabelled != self.unlabelled:
            raise ConfigError("unlabelled is NaN, which no value equals; give another, such as -1")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"device must be one of auto, cpu, cuda, not {self.device!r}")
        given = {"X": X, "y": y, "text": text, "text_classes": text_classes}
        X, y, text, text_classes = (_of_tensor(*item) for item in given.items())
        as_given = X
        X, y = validate_data(self, X, y, dtype=np.float32, multi_output=True)
        if getattr(as_given, "dtype", None) not in _NARROW:
            refuse_what_float32_loses("X", check_array(as_given, dtype=np.float64))
        labels = self._encode(y)
        if self.multi_label_ and text_classes is not None:
            raise ValueError("text_classes need one class a row, but y is a multi-label indicator; give text")
        classes = _checked_class_texts(text_classes, text, self.classes_)
        text, paired = _checked_text(text, X)
        self.has_text_ = bool(paired.any()) or classes is not None
        self.seed_ = self._seed()
        chosen = {name: _plain(getattr(self, name)) for name in (*_MODEL, *_TRAIN)}
        if not self.has_text_:
            chosen.update(_WITHOUT_TEXT)
        sizes = {
            "visual_dim": X.shape[1],
            "text_dim": (text if classes is None else classes).shape[1],
            "n_classes": len(self.classes_),
            "multi_label": self.multi_label_,
            "class_text": classes is not None,
        }
        config = SeDAConfig(**{name: chosen[name] for name in _MODEL}, **sizes)
        settings = TrainConfig(**{name: chosen[name] for name in _TRAIN}, seed=self.seed_)
        names = tuple(str(name) for name in self.classes_)
        ids = np.arange(len(X), dtype=np.int64)
        parts = (X, text if classes is None else text[:, :0], labels, X[:0], labels[:0], None, names, ids, ids[:0])
        data = FeatureSet(*parts, "SeDAClassifier.fit", classes)
        scaling = Scaling(settings.visual_scaling, settings.text_scaling)
        device = choose_device(self.device)
        model, rows = prepare(data, config, self.seed_, device, label_share=settings.label_share, scaling=scaling)
        self.model_, history = train(model, rows, settings)
        self.history_ = [epoch.row() for epoch in history]
        return self

    def _encode(self, y: Any) -> Labels:
        """Sets ``classes_`` and ``multi_label_``; the rows' class numbers, -1 where ``y`` holds `unlabelled`."""
        y = y.toarray() if issparse(y) else np.asarray(y)
        self.multi_label_ = y.ndim == 2 and y.shape[1] > 1
        if self.multi_label_:
            return self._encode_indicators(y)
        y = column_or_1d(y, warn=True)
        labelled = np.ones(len(y), dtype=bool) if self.unlabelled is None else np.asarray(y != self.unlabelled)
        if not labelled.any():
            raise ValueError(f"y has no labelled row: every value is {self.unlabelled!r}, which marks unlabelled rows")
        _refuse_what_does_not_sort(y, labelled)
        known = y if self.unlabelled is None else _without_marks(y[labelled])
        check_classification_targets(known)
        if labelled.all() and self.unlabelled is not None:
            _refuse_marks_of_another_type(y, self.unlabelled)
            _warn_of_a_numbered_mark(y, self.unlabelled)
        encoder = LabelEncoder().fit(known)
        self.classes_ = encoder.classes_
        labels = np.full(len(y), UNLABELLED, dtype=np.int64)
        labels[labelled] = encoder.transform(known)
        return labels

    def _encode_indicators(self, y: NDArray[Any]) -> Labels:
        """The same of an indicator matrix (N, K): (N, K) int8, rows of -1 where ``y`` holds `unlabelled` throughout."""
        marked = np.zeros(y.shape, dtype=bool) if self.unlabelled is None else np.asarray(y == self.unlabelled)
        unlabelled = np.asarray(marked.all(axis=1))
        if unlabelled.all():
            raise ValueError(f"y has no labelled row: every value is {self.unlabelled!r}, which marks unlabelled rows")
        if not np.isin(y[~unlabelled], (0, 1)).all():
            raise ValueError("y of 2 dimensions must hold 1 where a row carries a class and 0 where not")
        self.classes_ = np.arange(y.shape[1])
        labels = np.full(y.shape, UNLABELLED, dtype=np.int8)
        labels[~unlabelled] = y[~unlabelled]
        return labels

    def _seed(self) -> int:
        state = _plain(self.random_state)
        if isinstance(state, bool) or (isinstance(state, int) and state < 0):
            raise ConfigError(f"random_state must be an int of 0 or more, a RandomState or None, not {state}")
        return state if isinstance(state, int) else int(check_random_state(state).randint(2**31 - 1))

    # ---- what is fitted ------------------------------------------------------------------------------------------

    @undisturbed()
    def predict_log_proba(self, X: Any) -> NDArray[np.float64]:
        """Log-probabilities of the classes, (M, Dv) -> (M, K), columns in the order of ``classes_``; multi-label, of
        carrying each.

        Raises:
            DataError: a row's features are so large that the result is not a number.
        """
        visual, ids = self._rows(X)
        with torch.inference_mode():
            found = _numbers(self.model_(visual, ids)).double()
        if self.multi_label_:
            return np.asarray(found.cpu().numpy())
        # Rounding to float32 leaves sums that differ from 1 by some 1e-7.
        result: NDArray[np.float64] = (found - found.logsumexp(dim=1, keepdim=True)).cpu().numpy()
        return result

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Probabilities of the classes, (M, Dv) -> (M, K), columns in the order of ``classes_``."""
        return np.exp(self.predict_log_proba(X))

    def predict(self, X: Any) -> NDArray[Any]:
        """The most probable class of each row, (M, Dv) -> (M,) in the type of ``y``; multi-label (M, K) integers, 1 for
        each class of probability 0.5 or more."""
        check_is_fitted(self, "model_")
        if self.multi_label_:
            return (self.predict_proba(X) >= THRESHOLD).astype(np.int64)
        best = self.predict_log_proba(X).argmax(axis=1)
        result: NDArray[Any] = self.classes_[best]
        return result

    @undisturbed()
    def transform(self, X: Any) -> NDArray[np.float32]:
        """Aligned features, standardised: (M, Dv) -> (M, Dt) float32 on the textual distribution.

        Fitted without text: the features in the semantic space, (M, Dv).

        Raises:
            DataError: a row's features are so large that the result is not a number.
        """
        visual, ids = self._rows(X)
        with torch.inference_mode():
            semantic, aligned = self.model_.align(visual, ids)
        result: NDArray[np.float32] = _numbers(aligned if self.has_text_ else semantic).cpu().numpy()
        return result

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Accuracy on the rows of ``y`` that are labelled (multi-label: the share of rows right in all classes).

        A row that holds `unlabelled` says nothing of a classifier: a search over few labels among many pairs judges by
        the labels alone.

        Raises:
            ValueError: no row is labelled, or a class cannot be used; one sentence that names it.
        """
        given = {"X": X, "y": y, "sample_weight": sample_weight}
        X, y, sample_weight = (_of_tensor(*item) for item in given.items())
        found = y.toarray() if issparse(y) else np.asarray(y)
        if self.unlabelled is None:
            _refuse_what_does_not_sort(found, np.ones(len(found), dtype=bool))
            return float(super().score(X, y, sample_weight))
        marked: Mask = np.all(np.reshape(found == self.unlabelled, (len(found), -1)), axis=1)
        labelled = ~marked
        if not labelled.any():
            raise ValueError(f"y has no labelled row: every value is {self.unlabelled!r}, which marks unlabelled rows")
        if found.ndim == 1 and labelled.all():
            _refuse_marks_of_another_type(found, self.unlabelled)
        _refuse_what_does_not_sort(found, labelled)
        weights = None if sample_weight is None else np.asarray(sample_weight)[labelled]
        return float(super().score(_safe_indexing(X, labelled), _without_marks(found[labelled]), weights))

    @property
    def _n_features_out(self) -> int:
        return int(self.model_.config.text_dim if self.has_text_ else self.model_.config.visual_dim)

    def _rows(self, X: Any) -> tuple[Tensor, Tensor]:
        """Checked features and sample ids on the model's device."""
        check_is_fitted(self, "model_")
        X = validate_data(self, _of_tensor("X", X), dtype=np.float32, reset=False)
        visual = np.add(X, np.float32(0), order="C")  # a fresh copy in which -0 and 0 are one
        device = self.model_.centres.device
        return torch.from_numpy(visual).to(device), torch.from_numpy(_ids_of(visual)).to(device)

    # ---- files ---------------------------------------------------------------------------------------------------

    def save_pretrained(self, directory: str | Path) -> Path:
        """Write ``model.safetensors``, which the commands read too, and ``estimator.json``; returns the folder.

        Raises:
            DataError: the folder cannot be written or holds a training run, or ``classes_`` are neither numbers nor
                text.
        """
        check_is_fitted(self, "model_")
        values = self.classes_.tolist()
        if self.classes_.dtype.kind not in "biufUO" or not all(isinstance(v, str | int | float) for v in values):
            raise DataError(f"classes of type {self.classes_.dtype} cannot be saved; numbers and text can")
        odd = next(
            (v for v in values if isinstance(v, str) and any("\ud800" <= letter <= "\udfff" for letter in v)), None
        )
        if odd is not None:
            raise DataError(f"the class {odd!r} cannot be saved: it is no text that a file can hold")
        settings = {name: _plain(getattr(self, name)) for name in _ALL}
        settings["random_state"] = settings["random_state"] if isinstance(settings["random_state"], int) else None
        about: dict[str, Any] = {
            "settings": settings,
            "seed": self.seed_,
            "classes": values,
            "dtype": self.classes_.dtype.str,
            "has_text": self.has_text_,
            "feature_names": list(getattr(self, "feature_names_in_", [])),
        }
        try:
            json.dumps(settings)
        except (TypeError, ValueError) as error:
            raise DataError(f"the settings cannot be saved: {error}") from error
        directory = Path(directory)
        check_writable(directory)
        run = next((name for name in _FILES_OF_A_RUN if (directory / name).exists()), None)
        if run is not None:
            raise DataError(
                f"the folder {directory} holds a training run ({run}), whose model is another; give another"
            )
        if (directory / ESTIMATOR_FILE).exists():
            # Graphs and reports of the model that was here are of another one; its settings stay until its weights go.
            for name in set(DERIVED) - {ESTIMATOR_FILE}:
                (directory / name).unlink(missing_ok=True)
        weights = self.model_.save_pretrained(directory)
        about["model_sha256"] = checksum(weights)
        with atomic_path(directory / ESTIMATOR_FILE) as draft:
            draft.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        return directory

    @classmethod
    @undisturbed()
    def from_pretrained(cls, directory: str | Path, device: str | torch.device = "cpu") -> SeDAClassifier:
        """Read what `save_pretrained` or the command ``seda_fast.train`` wrote.

        The command's classes are the numbers of the data's labels; its training settings are not read back, so a
        further `fit` uses the defaults. A `random_state` that was no int is None.

        Raises:
            DataError: the folder holds no readable model.
        """
        model = SeDA.from_pretrained(directory, device)
        path = Path(directory) / ESTIMATOR_FILE
        if path.exists():
            with naming(path):
                about = _read_about(path)
                if about["model_sha256"] != checksum(Path(directory) / WEIGHTS_FILE):
                    raise DataError(f"is of another model than the {WEIGHTS_FILE} beside it; delete one of them")
                return _restored(cls, model, about)
        chosen = {name: getattr(model.config, name) for name in _MODEL}
        about = {
            "settings": {**_ALL, **chosen},
            "seed": 0,
            "classes": list(range(model.config.n_classes)),
            "dtype": "<i8",
            "has_text": True,
            "feature_names": [],
        }
        return _restored(cls, model, about)


def _of_tensor(name: str, value: Any) -> Any:
    """A tensor, on whatever device, part of a graph or not, as an array, bfloat16 as float32, which holds it; anything
    else as it is, but for what is masked: scikit-learn would take it as if it were not."""
    if np.ma.is_masked(value):
        raise DataError(f"{name} has masked values; fill them, or leave their rows out")
    if not isinstance(value, Tensor):
        return value
    value = value.detach().cpu()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()


def _checked_text(text: Any, visual: NDArray[Any]) -> tuple[NDArray[Any], Mask]:
    """Textual features (N, Dt) and which rows have any; without text one column of NaN."""
    if text is None:
        return np.full((len(visual), 1), np.nan, dtype=np.float32), np.zeros(len(visual), dtype=bool)
    _refuse_no_features("text", text)
    found = _floating("text", text)
    if found.ndim and len(found) != len(visual):
        raise DataError(f"text has {len(found)} rows but X has {len(visual)}")
    return check_text("text", found, "keep", learnt=True)


def _without_marks(labelled: NDArray[Any]) -> NDArray[Any]:
    """Class labels (n,) beside which `unlabelled` stood: numbers in an array of objects, which are no classes to
    scikit-learn, as an array of numbers."""
    if labelled.dtype != object or labelled.ndim != 1:
        return labelled
    plain = np.array(labelled.tolist())
    return plain if plain.dtype.kind in "biuf" and plain.ndim == 1 else labelled


def _refuse_marks_of_another_type(y: NDArray[Any], unlabelled: Any) -> None:
    """Nothing in ``y`` (N,) equals ``unlabelled``, but it may look like it: NumPy makes '-1' of -1 in [-1, "cat"]."""

    def alike(value: Any) -> bool:
        try:
            return float(value) == float(unlabelled)
        except (TypeError, ValueError):
            return str(value) == str(unlabelled)

    for value in dict.fromkeys(y.tolist()):
        if isinstance(value, str) != isinstance(unlabelled, str) and alike(value):
            kind = "text" if isinstance(value, str) else "number"
            raise ValueError(f"y holds {value!r}, but unlabelled is {unlabelled!r}, which no {kind} equals")


def _warn_of_a_numbered_mark(y: NDArray[Any], unlabelled: Any) -> None:
    """No row of ``y`` (N,) holds ``unlabelled``, but the mark may be one of its classes: what numbers the classes
    before it fits takes the mark for one of them, and leaves whole numbers from 0 up."""
    if y.dtype.kind in "iuf" and y.min() >= 0:
        warnings.warn(
            f"no row of y holds unlabelled={unlabelled!r}; what numbers the classes, as cross_val_predict does for "
            "probabilities, numbers that mark too, and its rows then train as a class",
            stacklevel=6,  # whoever called fit
        )


def _refuse_what_does_not_sort(y: NDArray[Any], labelled: Mask) -> None:
    """Classes (N,) of a table with empty cells, or with numbers among its names, are objects that have no order."""
    if y.dtype != object or y.ndim != 1:
        return
    first = None
    for row, (value, counts) in enumerate(zip(y.tolist(), labelled.tolist(), strict=True)):
        if not counts:
            continue
        if value is None:
            raise ValueError(
                f"y holds None in row {row}; mark rows without a class by a value of the classes' type, such as '', "
                "and name it by unlabelled"
            )
        first = (row, value) if first is None else first
        try:
            _ = value < first[1]
        except TypeError as error:
            raise ValueError(
                f"y holds {first[1]!r} in row {first[0]} but {value!r} in row {row}, which do not sort; give classes "
                "of one type"
            ) from error


def _floating(name: str, value: Any) -> NDArray[Any]:
    """Floating numbers of what scikit-learn takes as ``X``: integers, frames of several types, missing values as NaN.

    A masked array is passed on, to be refused: its mask would be lost.
    """
    if isinstance(value, np.ma.MaskedArray):
        return value
    try:
        found = check_array(
            np.asarray(value) if isinstance(value, np.matrix) else value,
            dtype="numeric", ensure_all_finite=False, ensure_2d=False, allow_nd=True,
            ensure_min_samples=0, ensure_min_features=0, input_name=name,
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        raise DataError(f"{name} is no array of numbers: {str(error).splitlines()[0]}") from error
    return found.astype(np.float64) if found.dtype.kind in "biu" else np.asarray(found)


def _refuse_no_features(name: str, value: Any) -> None:
    """What somebody who has texts tries first."""
    if issparse(value):
        raise DataError(f"{name} is a sparse matrix; give a dense one, as TruncatedSVD makes of it")
    try:
        found = np.asarray(value)
    except ValueError:  # rows of several lengths, say
        return
    if found.dtype.kind in "US" or (found.dtype.kind == "O" and any(isinstance(v, str) for v in found.flat)):
        raise DataError(f"{name} holds strings; give their features, as TfidfVectorizer and TruncatedSVD make them")


def _checked_class_texts(value: Any, text: Any, classes: NDArray[Any]) -> NDArray[np.float32] | None:
    """Textual features of the classes (K, Dt), None where none are given."""
    if value is None:
        return None
    if text is not None:
        raise ValueError("text and text_classes are both given; give one text of each row or one of each class")
    _refuse_no_features("text_classes", value)
    texts = check_visual("text_classes", _floating("text_classes", value), learnt=True)
    if len(texts) != len(classes):
        raise ValueError(f"text_classes has {len(texts)} rows but y has {len(classes)} classes")
    return texts


def _numbers(found: Tensor) -> Tensor:
    """What a model says of the rows of X (M, ..); the largest class of NaN would be one of them all the same."""
    row = first_nan([found])
    if row is not None:
        raise DataError(f"row {row} of X has features so large that its prediction is not a number")
    return found


def _ids_of(visual: NDArray[np.float32]) -> Labels:
    """A sample id in 0 .. 2**48 - 1 of each row (M, Dv), from its bytes."""
    digests = (hashlib.blake2b(row, digest_size=6).digest() for row in visual)
    return np.fromiter((int.from_bytes(digest, "little") for digest in digests), np.int64, len(visual))


def _read_about(path: Path) -> dict[str, Any]:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be read ({error})") from error
    if not isinstance(about, dict) or set(about) != _FILE_KEYS:
        raise DataError(f"is not what save_pretrained writes: the keys {', '.join(sorted(_FILE_KEYS))} are needed")
    return about


def _restored(cls: type[SeDAClassifier], model: SeDA, about: dict[str, Any]) -> SeDAClassifier:
    try:
        restored = cls(**about["settings"])
        dtype = np.dtype(about["dtype"])
        if dtype.kind not in "biufUO":
            raise TypeError(f"classes of type {dtype}")
        restored.classes_ = np.array(about["classes"], dtype=dtype)
        names = [str(name) for name in about["feature_names"]]
        restored.seed_, restored.has_text_ = int(about["seed"]), bool(about["has_text"])
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"is damaged: {error}") from error
    if restored.classes_.shape != (model.config.n_classes,):
        raise DataError(f"names {restored.classes_.size} classes but the model has {model.config.n_classes}")
    restored.model_, restored.history_, restored.multi_label_ = model, [], model.config.multi_label
    restored.n_features_in_ = model.config.visual_dim
    if names:
        restored.feature_names_in_ = np.array(names, dtype=object)
    return restored
