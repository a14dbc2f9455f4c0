"""Settings of the model and of a run: frozen, validated, and the one place where defaults stand."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints


class ConfigError(ValueError):
    """A setting is unknown or out of range; the message is one sentence that names it."""


def setting(default: Any, help: str) -> Any:
    """A dataclass field with its help text."""
    return field(default=default, metadata={"help": help})


FOUND = -1.0  # a label_share or a scaling that is left to `nn.kernel_head.label_share` or `nn.scaling.best_power`

ConditionName = Literal["both", "semantic", "visual"]
SamplerName = Literal["ddim", "renoise"]


# Both networks' blocks and three noises of conditions and heads have streams of their own from 6 on, of 256 in all.
_MOST_BLOCKS = 123
# Of a sum of a few decimals.
_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class SeDAConfig:
    """The model's shape and how it predicts.

    Symbols are the method's: d width, m expansion, L blocks, T diffusion steps, S sampling steps per stage, R draws.
    """

    visual_dim: int = setting(0, "size of a visual feature, Dv (taken from the data)")
    text_dim: int = setting(0, "size of a textual feature, Dt (taken from the data)")
    n_classes: int = setting(0, "number of classes, K (taken from the data)")
    class_text: bool = setting(False, "whether there is one text a class instead of one a row (taken from the data)")
    multi_label: bool = setting(False, "whether a row carries any number of the classes (taken from the data)")
    width: int = setting(512, "width of the networks, d")
    expansion: int = setting(2, "hidden size of a block over its width, m")
    blocks: int = setting(3, "interaction blocks in each network, L")
    visual_width: int = setting(512, "hidden size of the visual head")
    time_embedding: int = setting(64, "size of the sinusoidal timestep embedding and its hidden layer")
    memory_heads: int = setting(8, "heads of the networks' attention to class texts; 0: the networks do not see them")
    condition: ConditionName = setting("both", "what the translator sees: s and v, or one of them")
    diffusion_steps: int = setting(1000, "timesteps of the noise schedule, T")
    semantic_sampler: SamplerName = setting("renoise", "sampler of the semantic stage")
    semantic_steps: int = setting(5, "sampling steps of the semantic stage, S")
    textual_sampler: SamplerName = setting("ddim", "sampler of the textual stage")
    textual_steps: int = setting(10, "sampling steps of the textual stage for aligned features, S")
    classification_steps: int = setting(
        1, "sampling steps of the textual stage for classification (1: the posterior mean)"
    )
    textual_weight: float = setting(0.25, "weight of the textual head's log-probabilities, 0 .. 1")
    visual_weight: float = setting(
        0.5, "weight of the visual head's log-probabilities, 0 .. 1; the semantic head has the rest"
    )
    kernel_weight: float = setting(
        0.5,
        "weight of the kernel head's log-probabilities, 0 .. 1, the other heads' sum having the rest; 0: no such head",
    )
    noise_draws: int = setting(1, "noise draws that a prediction averages over, R")

    def __post_init__(self) -> None:
        check_types(self)
        sizes = ("visual_dim", "text_dim", "n_classes")
        for name in sizes:
            check_range(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("width", "visual_width", "blocks", "expansion"):
            check_range(self, name, getattr(self, name) >= 1, "at least 1")
        check_range(self, "blocks", self.blocks <= _MOST_BLOCKS, f"at most {_MOST_BLOCKS}")
        for name in ("semantic_steps", "textual_steps", "classification_steps"):
            check_range(self, name, getattr(self, name) >= 1, "at least 1")
        check_range(
            self, "time_embedding", self.time_embedding >= 2 and self.time_embedding % 2 == 0, "even, at least 2"
        )
        check_range(self, "diffusion_steps", self.diffusion_steps >= 2, "at least 2")
        for name in ("semantic_steps", "textual_steps", "classification_steps"):
            check_range(self, name, getattr(self, name) <= self.diffusion_steps, "at most diffusion_steps")
        check_range(self, "memory_heads", self.memory_heads >= 0, "at least 0")
        check_range(
            self, "memory_heads", not self.has_memory or self.width % self.memory_heads == 0,
            f"a divisor of the width {self.width}",
        )  # fmt: skip
        check_range(self, "textual_weight", 0 <= self.textual_weight <= 1, "in 0 .. 1")
        # As decimals add up to 1, whatever their roundings do.
        fits = self.visual_weight >= 0 and self.textual_weight + self.visual_weight <= 1 + _ROUNDING
        check_range(self, "visual_weight", fits, "in 0 .. 1 - textual_weight")
        check_range(self, "kernel_weight", 0 <= self.kernel_weight <= 1, "in 0 .. 1")
        if self.multi_label and self.class_text:
            raise ConfigError("class_text needs one class a row, so it does not go with multi_label")
        check_range(self, "noise_draws", 1 <= self.noise_draws <= 65535, "in 1 .. 65535")

    @property
    def has_memory(self) -> bool:
        """Whether the networks attend to class texts."""
        return self.class_text and self.memory_heads > 0

    @property
    def semantic_weight(self) -> float:
        """Weight of the semantic head's log-probabilities: what the textual and the visual one leave."""
        rest = 1 - self.textual_weight - self.visual_weight
        return rest if rest > _ROUNDING else 0.0

    def head_weights(self, heads: int) -> tuple[float, ...]:
        """Weights of the log-probabilities of three heads, semantic, textual and visual, or of four: kernel last."""
        three = self.semantic_weight, self.textual_weight, self.visual_weight
        if heads == len(three):
            return three
        return (*((1 - self.kernel_weight) * weight for weight in three), self.kernel_weight)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained. Loss weights are the method's w1 .. w6, and w7 of the visual head."""

    epochs: int = setting(0, "passes over the training part; 0: 20, more where that makes fewer than 240 steps")
    batch_size: int = setting(0, "rows of an optimiser step; 0: 256, an eighth of a training part below 2048 rows")
    learning_rate: float = setting(1e-3, "peak learning rate of AdamW")
    weight_decay: float = setting(0.05, "decoupled weight decay of the matrices")
    warmup: float = setting(0.05, "share of the steps in which the learning rate rises")
    clip_norm: float = setting(1.0, "largest gradient norm")
    ema_decay: float = setting(0.995, "decay of the weights' exponential moving average")
    dropout: float = setting(0.1, "dropout rate inside the interaction blocks")
    condition_dropout: float = setting(
        0.5, "rate of Gaussian dropout on what the networks are told: the learner v, the translator s"
    )
    translator_dropout: float = setting(
        -1.0, "the same on the v that the translator is told; -1: condition_dropout * (1 - rows / 4000), at least 0"
    )
    visual_dropout: float = setting(0.5, "rate of Gaussian dropout inside the visual head")
    visual_input_dropout: float = setting(0.2, "rate of Gaussian dropout on the visual head's input")
    label_smoothing: float = setting(0.1, "label smoothing of the class terms")
    label_share: float = setting(
        -1.0,
        "share of a label beside what the row's text says of its class, 0 .. 1, in the kernel head; in the networks "
        "twice that, at most 1; -1: found by leaving rows out",
    )
    visual_scaling: float = setting(
        -1.0,
        "power of its deviation that a visual dimension is divided by, 0 .. 1: 1 standardises, 0 leaves the dimensions "
        "as they are to each other; -1: found by leaving rows out",
    )
    text_scaling: float = setting(-1.0, "the same of the textual features")
    centre_weight: float = setting(1.0, "w1: distance of s to its category centre")
    semantic_weight: float = setting(1.0, "w2: cross entropy of the semantic head")
    text_weight: float = setting(1.0, "w3: distance of t_ to the paired text")
    mapped_weight: float = setting(1.0, "w4: cross entropy of the textual head on t_ (gradient stopped)")
    textual_head_weight: float = setting(1.0, "w5: cross entropy of the textual head on the text itself")
    teacher_weight: float = setting(1.0, "w6: divergence of both heads from the textual head on the text")
    visual_head_weight: float = setting(1.0, "w7: cross entropy of the visual head")
    teacher_temperature: float = setting(2.0, "temperature of the text as teacher")
    seed: int = setting(0, "seed of initial weights, order, noise, dropout and split")

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("epochs", "batch_size"):
            check_range(self, name, 0 <= getattr(self, name) < 2**31, "in 1 .. 2**31 - 1, or 0 for the rule")
        for name in ("learning_rate", "clip_norm"):
            check_range(self, name, getattr(self, name) > 0, "positive")
        # Beyond that its square, and what is divided by it, are of no float32.
        check_range(self, "teacher_temperature", 1e-6 <= self.teacher_temperature <= 1e6, "in 1e-6 .. 1e6")
        for f in dataclasses.fields(self):
            if f.name.endswith("_weight") or f.name == "weight_decay":
                check_range(self, f.name, getattr(self, f.name) >= 0, "at least 0")
        shares = ("warmup", "ema_decay", "dropout", "condition_dropout", "visual_dropout", "visual_input_dropout")
        for name in (*shares, "label_smoothing"):
            check_range(self, name, 0 <= getattr(self, name) < 1, "in 0 .. 1, 1 excluded")
        for name in ("label_share", "visual_scaling", "text_scaling"):
            share = getattr(self, name)
            check_range(self, name, share == FOUND or 0 <= share <= 1, "in 0 .. 1, or -1 to have it found")
        translator = self.translator_dropout
        check_range(
            self, "translator_dropout", translator == -1 or 0 <= translator < 1,
            "in 0 .. 1, 1 excluded, or -1 for the rule",
        )  # fmt: skip
        check_range(self, "seed", 0 <= self.seed < 2**63, "in 0 .. 2**63 - 1")

    def for_rows(self, rows: int) -> TrainConfig:
        """These settings with ``epochs``, ``batch_size`` and ``translator_dropout`` chosen where a rule is to choose.

        A training part of few ``rows`` takes small batches, an eighth of it but at least 32 rows, and as many passes as
        make 240 steps: with 20 passes in batches of 256, 224 rows would take 20 steps, and the networks hardly move.
        Noise on the v that the translator is told raises the alignment of a small set, whose rows it would learn by
        heart, and lowers that of a large one (docs/method.md).
        """
        size = self.batch_size or min(256, max(32, rows // 8))
        steps = -(-rows // size)
        epochs = self.epochs or max(20, -(-240 // steps))
        rate = self.translator_dropout
        if rate == -1:
            rate = self.condition_dropout * max(0.0, 1 - rows / 4000)
        return dataclasses.replace(self, batch_size=size, epochs=epochs, translator_dropout=rate)

    @property
    def loss_weights(self) -> tuple[float, ...]:
        """w1 .. w7, in the order of the objective's terms."""
        return (
            self.centre_weight,
            self.semantic_weight,
            self.text_weight,
            self.mapped_weight,
            self.textual_head_weight,
            self.teacher_weight,
            self.visual_head_weight,
        )


def check_types(config: Any) -> None:
    """Refuse a dataclass whose values are not of their fields' types (ints pass as floats, bools do not as ints).

    Raises:
        ConfigError: one sentence that names the setting.
    """
    hints = get_type_hints(type(config))
    for f in dataclasses.fields(config):
        value, hint = getattr(config, f.name), hints[f.name]
        if get_origin(hint) is Literal:
            if value not in get_args(hint):
                raise ConfigError(f"{f.name} must be one of {', '.join(get_args(hint))}, not {value!r}")
        elif hint is float:
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ConfigError(f"{f.name} must be a number, not {value!r}")
            if not math.isfinite(value):
                raise ConfigError(f"{f.name} must be a finite number, not {value!r}")
            object.__setattr__(config, f.name, float(value))
        elif hint in (int, bool, str) and type(value) is not hint:
            raise ConfigError(f"{f.name} must be of type {hint.__name__}, not {value!r}")
        elif hint is str and any("\ud800" <= letter <= "\udfff" for letter in value):
            # Bytes of a file's name that are no UTF-8: what is written about a run could not hold it.
            raise ConfigError(f"{f.name} must be UTF-8 text, not {value!r}")


def check_range(config: Any, name: str, good: bool, expected: str) -> None:
    """Raise a `ConfigError` naming the setting unless ``good``."""
    if not good:
        raise ConfigError(f"{name} must be {expected}, not {getattr(config, name)!r}")


def check_given(config: Any, *names: str) -> None:
    """Raise a `ConfigError` naming the first of the text settings that is empty."""
    for name in names:
        if not getattr(config, name):
            raise ConfigError(f"{name} is missing: give --{name.replace('_', '-')} or {name} in --config")
