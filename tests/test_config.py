"""Settings are validated where they are made."""

import pytest

from seda_fast.config import ConfigError, SeDAConfig, TrainConfig

SIZES = {"visual_dim": 4, "text_dim": 3, "n_classes": 2}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"width": 0}, "width must be at least 1, not 0"),
        ({"width": 2.5}, "width must be of type int, not 2.5"),
        ({"width": True}, "width must be of type int, not True"),
        ({"visual_dim": 0}, "visual_dim must be at least 1, not 0"),
        ({"textual_sampler": "euler"}, "textual_sampler must be one of ddim, renoise, not 'euler'"),
        ({"semantic_steps": 1001}, "semantic_steps must be at most diffusion_steps, not 1001"),
        ({"textual_weight": 1.5}, "textual_weight must be in 0 .. 1, not 1.5"),
        ({"textual_weight": "much"}, "textual_weight must be a number, not 'much'"),
        ({"time_embedding": 7}, "time_embedding must be even, at least 2, not 7"),
        ({"noise_draws": 0}, "noise_draws must be in 1 .. 65535, not 0"),
    ],
)
def test_model_settings_out_of_range_are_one_sentence(change: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SeDAConfig(**{**SIZES, **change})  # type: ignore[arg-type]
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"epochs": -1}, "epochs must be in 1 .. 2**31 - 1, or 0 for the rule, not -1"),
        ({"batch_size": 10**20}, f"batch_size must be in 1 .. 2**31 - 1, or 0 for the rule, not {10**20}"),
        ({"learning_rate": 0.0}, "learning_rate must be positive, not 0.0"),
        ({"teacher_temperature": 1e300}, "teacher_temperature must be in 1e-6 .. 1e6, not 1e+300"),
        ({"clip_norm": float("inf")}, "clip_norm must be a finite number, not inf"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number, not nan"),
        ({"dropout": 1}, "dropout must be in 0 .. 1, 1 excluded, not 1.0"),
        ({"text_weight": -1}, "text_weight must be at least 0, not -1.0"),
        ({"seed": -1}, "seed must be in 0 .. 2**63 - 1, not -1"),
    ],
)
def test_training_settings_out_of_range_are_one_sentence(change: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**change)  # type: ignore[arg-type]
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("rows", "size", "epochs"), [(40, 32, 120), (224, 32, 35), (420, 52, 27), (2173, 256, 27), (5216, 256, 20)]
)
def test_small_training_parts_take_small_batches_and_more_passes(rows: int, size: int, epochs: int) -> None:
    chosen = TrainConfig().for_rows(rows)
    assert (chosen.batch_size, chosen.epochs) == (size, epochs)
    assert chosen.epochs * -(-rows // size) >= 240
    given = TrainConfig(epochs=3, batch_size=100, translator_dropout=0.1)
    assert given.for_rows(rows) == given


@pytest.mark.parametrize(("rows", "rate"), [(400, 0.45), (2000, 0.25), (4000, 0.0), (50_000, 0.0)])
def test_the_translator_s_noise_falls_with_the_rows(rows: int, rate: float) -> None:
    assert TrainConfig().for_rows(rows).translator_dropout == pytest.approx(rate)
    assert TrainConfig(condition_dropout=0.2).for_rows(rows).translator_dropout == pytest.approx(0.4 * rate)
    assert TrainConfig(translator_dropout=0.3).for_rows(rows).translator_dropout == 0.3


def test_settings_are_frozen_and_integers_pass_as_floats() -> None:
    config = TrainConfig(learning_rate=1)
    assert isinstance(config.learning_rate, float)
    with pytest.raises(AttributeError):
        config.epochs = 3  # type: ignore[misc]


@pytest.mark.parametrize(("textual", "visual"), [(0.8, 0.2), (0.9, 0.1), (0.7, 0.3), (0.6, 0.4), (1.0, 0.0)])
def test_weights_that_add_up_to_1_as_decimals_leave_nothing(textual: float, visual: float) -> None:
    """1 - 0.8 is less than 0.2 in binary."""
    found = SeDAConfig(visual_dim=2, text_dim=2, n_classes=2, textual_weight=textual, visual_weight=visual)
    assert found.semantic_weight == 0
    with pytest.raises(ConfigError, match="visual_weight must be"):
        SeDAConfig(visual_dim=2, text_dim=2, n_classes=2, textual_weight=textual, visual_weight=visual + 1e-3)
