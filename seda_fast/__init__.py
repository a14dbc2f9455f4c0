"""Fast training and inference of SeDA, semantic diffusion alignment for image classification."""

import importlib.util
from typing import TYPE_CHECKING, Any

from seda_fast import _layout

__version__ = "0.1.0"

_layout.complete(__name__, __path__, __version__)

from .config import SeDAConfig, TrainConfig
from .data import FeatureSet
from .files import DataError
from .nn import SeDA
from .ops import use_backend

__all__ = ["DataError", "FeatureSet", "SeDA", "SeDAConfig", "TrainConfig", "__version__", "use_backend"]

if TYPE_CHECKING:
    from .estimator import SeDAClassifier as SeDAClassifier


def __getattr__(name: str) -> Any:
    """`SeDAClassifier` on first use: scikit-learn is an extra, and takes seconds to import."""
    if name != "SeDAClassifier":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if importlib.util.find_spec("sklearn") is None:
        raise ImportError("SeDAClassifier needs scikit-learn: pip install 'seda_fast[eval]'")
    return importlib.import_module(f"{__name__}.estimator").SeDAClassifier
