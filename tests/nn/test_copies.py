"""Rows of the same image are found."""

import torch

from seda_fast.nn.copies import first_copies


def test_each_row_is_led_to_the_first_that_equals_it() -> None:
    a, b, c = [1.0, 2.0], [2.0, 1.0], [1.0, -0.0]
    rows = torch.tensor([b, a, c, a, [1.0, 0.0], b, a, [1.0, 2.0 + 2**-20]])
    assert first_copies(rows).tolist() == [0, 1, 2, 1, 2, 0, 1, 7]
    assert first_copies(rows.double()[:, :1].expand(8, 3)).tolist() == [0, 1, 1, 1, 1, 0, 1, 1]
    assert first_copies(rows[:0]).tolist() == []
    torch.manual_seed(0)
    assert torch.equal(first_copies(torch.randn(500, 7)), torch.arange(500))
