"""Fixtures that all tests share: seeds, the shared real data, and skips that name the test they skip."""

import os
import random
import zlib
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"

# Busy machines stall, so an example has no deadline; on CI a red test must be red again when repeated.
hypothesis.settings.register_profile("seda_fast", deadline=None, derandomize=bool(os.environ.get("CI")))
hypothesis.settings.load_profile("seda_fast")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run; the reason names the test, so that pytest -ra lists each one."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason=f"{item.nodeid} needs a CUDA device"))
        if "shared_data" in getattr(item, "fixturenames", ()) and not SHARED_DATA.is_dir():
            item.add_marker(pytest.mark.skip(reason=f"{item.nodeid} needs ../shared/data"))


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root folder of the checkout that the tests lie in."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder ``../shared/data`` of real paired sets; tests that ask for it are skipped where it is absent."""
    return SHARED_DATA


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Seed in [0, 2**32) of this test: another for each test and parameter, the same on every run."""
    return zlib.crc32(request.node.name.encode())


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    """NumPy generator, seeded for this test."""
    return np.random.default_rng(seed)


@pytest.fixture(autouse=True)
def _seed_global_generators(request: pytest.FixtureRequest) -> None:
    """Seed the generators that libraries use behind a test's back."""
    value = zlib.crc32(request.node.name.encode())
    random.seed(value)
    np.random.seed(value)  # noqa: NPY002 - scikit-learn falls back to this generator
    torch.manual_seed(value)
