"""Which backend serves a call: the default, the forced one, and what a backend that cannot run says."""

import subprocess
import sys

import pytest
import torch

from seda_fast.ops import _dispatch, q_sample, use_backend


def noise() -> torch.Tensor:
    table = torch.ones(3)
    ids = torch.arange(2)
    return q_sample(torch.zeros(2, 4), ids, table, table, seed=1, step=0, sample_ids=ids)


def test_every_operation_has_a_reference() -> None:
    for operation in _dispatch.operations():
        with use_backend("reference"):
            assert _dispatch.choose(operation, "cpu")[0] == "reference"


def test_an_unknown_backend_is_refused_with_the_known_ones() -> None:
    with (
        pytest.raises(ValueError, match=r"backend must be one of \('auto', 'reference'.*not 'numpy'"),
        use_backend("numpy"),
    ):
        pass


def test_an_unavailable_backend_says_why() -> None:
    with use_backend("cuda"), pytest.raises(RuntimeError, match=r"^backend 'cuda' .*q_sample"):
        noise()


def test_the_choice_ends_with_the_block_even_after_an_error() -> None:
    before = _dispatch.choose("q_sample", "cpu")[0]
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert _dispatch.choose("q_sample", "cpu")[0] == before


def test_a_backend_is_passed_over_for_a_dtype_that_it_lacks() -> None:
    for operation in _dispatch.operations():
        assert _dispatch.choose(operation, "cpu", torch.float64)[0] in ("reference", "cpp")


def test_importing_the_package_on_a_cpu_does_not_import_triton() -> None:
    code = "import sys, seda_fast.ops; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
