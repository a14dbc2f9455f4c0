"""Category centres."""

import numpy as np
import pytest
import torch

from seda_fast.nn import category_centres


def test_centres_are_the_class_means_of_labelled_rows(rng: np.random.Generator) -> None:
    features = rng.normal(loc=1e4, size=(997, 5)).astype(np.float32)
    labels = np.concatenate([np.arange(7), rng.integers(-1, 7, size=990)])
    found = category_centres(torch.from_numpy(features), torch.from_numpy(labels), 7)
    for k in range(7):
        expected = features[labels == k].astype(np.float64).mean(0)
        # The float64 mean, rounded once.
        np.testing.assert_array_equal(found[k].numpy(), expected.astype(np.float32))


def test_unlabelled_rows_do_not_count() -> None:
    features = torch.tensor([[1.0], [3.0], [100.0]])
    assert category_centres(features, torch.tensor([0, 0, -1]), 1).tolist() == [[2.0]]


def test_a_class_without_rows_gets_the_origin() -> None:
    found = category_centres(torch.full((3, 2), 5.0), torch.tensor([0, 2, -1]), 3)
    assert found.tolist() == [[5.0, 5.0], [0.0, 0.0], [5.0, 5.0]]


def test_a_label_beyond_the_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="labels reach 3 but there are 2 classes"):
        category_centres(torch.zeros(2, 2), torch.tensor([0, 3]), 2)
