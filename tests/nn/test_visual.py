"""The visual head and its dropout."""

import math

import pytest
import torch

from seda_fast import SeDAConfig, reference
from seda_fast.nn.visual import GaussianDropout, VisualHead

CONFIG = SeDAConfig(visual_dim=12, text_dim=3, n_classes=5, visual_width=16)


def dropout(rows: int, **changes: object) -> GaussianDropout:
    keys = {"seed": torch.tensor(3), "step": torch.tensor(4), "sample_ids": torch.arange(rows), "stream": 12}
    return GaussianDropout(
        **{"input_rate": 0.2, "hidden_rate": 0.5, "condition_rate": 0.4, "translator_rate": 0.3, **keys, **changes}
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("rate", [0.2, 0.5])
def test_dropout_is_the_contracts_noise_times_the_feature(rate: float) -> None:
    x = torch.randn(300, 40)
    eps = reference.normals(torch.tensor(3), torch.tensor(4), torch.arange(300), 40, 13)
    expected = x * (1 + math.sqrt(rate / (1 - rate)) * eps).float()
    torch.testing.assert_close(dropout(300).on(x, rate, 1), expected, rtol=1e-4, atol=1e-5)
    factor = dropout(300).on(torch.ones(300, 40), rate, 0)
    assert abs(float(factor.mean()) - 1) < 0.05
    assert abs(float(factor.var()) - rate / (1 - rate)) < 0.05


def test_every_part_of_the_conditions_has_noise_of_its_own() -> None:
    factors = dropout(300).conditions(torch.ones(300, 40))
    drawn = dropout(300).on(torch.ones(300, 80), 0.4, 2)
    assert torch.equal(torch.cat(factors[:2], dim=1), drawn)  # type: ignore[arg-type]
    assert torch.equal(factors[2], dropout(300).on(torch.ones(300, 40), 0.3, 3))  # type: ignore[arg-type]
    none = dropout(300, condition_rate=0.0, translator_rate=0.0)
    assert none.conditions(torch.ones(300, 40)) == (1, 1, 1)


def test_a_rate_of_0_leaves_the_feature_alone() -> None:
    x = torch.randn(4, 6)
    assert dropout(4).on(x, 0.0, 0) is x


def test_head_draws_two_streams_and_none_at_prediction() -> None:
    head, visual = VisualHead(CONFIG), torch.randn(7, 12)
    torch.testing.assert_close(head(visual), head.head(head.hidden(visual)))
    one = head.hidden(visual, dropout(7))
    assert torch.equal(one, head.hidden(visual, dropout(7)))
    for other in ({"stream": 13}, {"step": torch.tensor(5)}, {"hidden_rate": 0.0}, {"input_rate": 0.0}):
        assert not torch.equal(one, head.hidden(visual, dropout(7, **other)))
    rows = torch.tensor([5, 1])
    assert torch.allclose(head.hidden(visual[rows], dropout(2, sample_ids=rows)), one[rows], atol=1e-6)
