"""Fast training and inference of SeDA, semantic diffusion alignment for image classification."""

from seda_fast import _layout

__version__ = "0.1.0"

_layout.complete(__name__, __path__, __version__)

from .config import SeDAConfig, TrainConfig
from .data import FeatureSet
from .files import DataError
from .nn import SeDA
from .ops import use_backend

__all__ = ["DataError", "FeatureSet", "SeDA", "SeDAConfig", "TrainConfig", "__version__", "use_backend"]
