"""Timesteps: every backend's strata against the definition, which is exact in integers."""

from typing import Any

import pytest
import torch

from seda_fast import reference
from seda_fast.ops import stratified_timesteps

OPERATION = "stratified_timesteps"


def keys(rows: int, device: str) -> dict[str, Any]:
    return {
        "seed": torch.tensor(0x1234_5678_9ABC, device=device),
        "step": torch.tensor(2**33 + 3, device=device),
        "sample_ids": torch.randperm(2 * rows + 1, device=device)[:rows] + 2**33,
    }


@pytest.mark.parametrize(("rows", "steps"), [(0, 10), (1, 1000), (1, 1), (7, 3), (256, 1000), (257, 1), (1000, 17)])
@pytest.mark.parametrize("stream", [1, 2])
def test_values(lane: Any, rows: int, steps: int, stream: int) -> None:
    given = keys(rows, lane.device)
    got = stratified_timesteps(**given, steps=steps, stream=stream)
    assert torch.equal(got, reference.stratified_timesteps(**given, steps=steps, stream=stream))
    assert torch.equal(got, got.sort().values)
    assert ((got >= 0) & (got < steps)).all()


def test_a_part_of_a_batch_has_its_rows_timesteps(lane: Any) -> None:
    given = keys(41, lane.device)
    whole = stratified_timesteps(**given, steps=1000, stream=3)
    for first, end in ((0, 41), (1, 9), (20, 41)):
        part = {**given, "sample_ids": given["sample_ids"][first:end]}
        got = stratified_timesteps(**part, steps=1000, stream=3, first_row=first, batch=41)
        assert torch.equal(got, whole[first:end])


def test_the_largest_batch_that_is_exact(lane: Any) -> None:
    # Rows at the end of a batch of 2**27: the product of place and steps has 62 bits.
    rows, steps, batch = 5, 1000, 2**27
    given = keys(rows, lane.device)
    got = stratified_timesteps(**given, steps=steps, stream=2, first_row=batch - rows, batch=batch)
    place = {"first_row": batch - rows, "batch": batch}
    assert torch.equal(got, reference.stratified_timesteps(**given, steps=steps, stream=2, **place))
    assert (got == steps - 1).all()


def test_strided_sample_ids(lane: Any) -> None:
    given = keys(30, lane.device)
    spread = torch.stack((given["sample_ids"], given["sample_ids"]), dim=1)[:, 0]
    got = stratified_timesteps(**{**given, "sample_ids": spread}, steps=50, stream=2)
    assert torch.equal(got, stratified_timesteps(**given, steps=50, stream=2))


@pytest.mark.parametrize(("first_row", "batch"), [(0, 3), (-1, 9), (6, 9), (2, None)])
def test_rows_that_do_not_fit_the_batch_are_refused(first_row: int, batch: int | None) -> None:
    with pytest.raises(ValueError, match=f"first_row (is )?{first_row}"):
        stratified_timesteps(1, 2, torch.arange(4), 10, 2, first_row=first_row, batch=batch)


def test_opcheck(lane: Any) -> None:
    given = keys(12, lane.device)
    torch.library.opcheck(torch.ops.seda_fast.stratified_timesteps.default, (*given.values(), 20, 2, 0, 12))


def test_compiles_without_a_graph_break(lane: Any) -> None:
    given = keys(12, lane.device)

    @torch.compile(fullgraph=True)
    def twice(step: torch.Tensor) -> torch.Tensor:
        return 2 * stratified_timesteps(**{**given, "step": step}, steps=20, stream=2)

    assert torch.equal(twice(given["step"]), 2 * stratified_timesteps(**given, steps=20, stream=2))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"sample_ids": torch.zeros(3)}, "sample_ids must be int64, not torch.float32"),
        ({"sample_ids": torch.zeros(3, 1, dtype=torch.int64)}, r"sample_ids must have shape \(any\)"),
        ({"stream": 256}, r"stream must be in 0 \.\. 255, not 256"),
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"steps": 10.5}, "steps must be an int, not float"),
        ({"steps": 2**36}, r"steps must be less than 2\*\*38 over the batch's rows, 4, not 68719476736"),
        ({"seed": 2**63}, r"seed must be in -2\*\*63 \.\. 2\*\*63 - 1, not 9223372036854775808"),
        ({"step": -(2**63) - 1}, r"step must be in -2\*\*63 \.\. 2\*\*63 - 1, not -9223372036854775809"),
        ({"seed": 1.5}, "seed must be an int or an int64 tensor of shape"),
    ],
)
def test_bad_arguments_get_one_sentence(change: dict[str, Any], sentence: str) -> None:
    given = {**keys(4, "cpu"), "steps": 10, "stream": 2, **change}
    with pytest.raises(ValueError, match=sentence):
        stratified_timesteps(**given)
