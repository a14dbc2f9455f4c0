"""The networks: schedule, semantic space, PFIN, and the two stages joined."""

from .interaction import PFIN, STEPWISE, Dropout, InteractionBlock
from .schedule import NoiseSchedule, Sampler
from .seda import WEIGHTS_FILE, Losses, SeDA, SemanticLearner, SemanticTranslator, Shard
from .space import category_centres, centres_of, class_sums

__all__ = [
    "PFIN",
    "STEPWISE",
    "WEIGHTS_FILE",
    "Dropout",
    "InteractionBlock",
    "Losses",
    "NoiseSchedule",
    "Sampler",
    "SeDA",
    "SemanticLearner",
    "SemanticTranslator",
    "Shard",
    "category_centres",
    "centres_of",
    "class_sums",
]
