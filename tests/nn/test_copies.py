"""Rows of the same image are found."""

import pytest
import torch

from seda_fast.nn.copies import first_copies


def test_each_row_is_led_to_the_first_that_equals_it() -> None:
    a, b, c = [1.0, 2.0], [2.0, 1.0], [1.0, -0.0]
    rows = torch.tensor([b, a, c, a, [1.0, 0.0], b, a, [1.0, 2.0 + 2**-20]])
    assert first_copies(rows).tolist() == [0, 1, 2, 1, 2, 0, 1, 7]
    for dtype in (torch.float64, torch.bfloat16):
        assert first_copies(rows.to(dtype)[:, :1].expand(8, 3)).tolist() == [0, 1, 1, 1, 1, 0, 1, 1]
    assert first_copies(rows[:0]).tolist() == []
    # Rows of one length, which differ in the signs of their numbers alone.
    signs = torch.randint(0, 2, (400, 16), generator=torch.Generator().manual_seed(0)).mul(2).sub(1).unique(dim=0)
    for dtype in (torch.float64, torch.float32, torch.float16):
        twice = torch.cat((signs, signs)).to(dtype)
        assert torch.equal(first_copies(twice), torch.arange(len(signs)).repeat(2))
    torch.manual_seed(0)
    many = torch.randn(5000, 7)  # more than are looked at together
    assert torch.equal(first_copies(many), torch.arange(5000))
    assert torch.equal(first_copies(torch.cat((many, many))), torch.arange(5000).repeat(2))


def test_rows_whose_64_bits_agree_by_chance_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: torch.zeros(2, dtype=torch.int64))
    assert first_copies(torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, 2.0]])).tolist() == [0, 1, 0]
