"""Slow tests run while they fit, after all others."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

SLOW = "tests/test_slow.py::test_one_that_is_called_slow"


@pytest.mark.slow(seconds=30)
def test_one_that_is_called_slow() -> None:
    pass


@pytest.mark.parametrize("until, outcome", [(None, "1 passed"), (300, "1 passed"), (20, "1 skipped")])
def test_no_slow_test_begins_that_would_not_end_in_time(repository: Path, until: int | None, outcome: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "SLOW_TESTS_UNTIL"}
    if until is not None:
        environment["SLOW_TESTS_UNTIL"] = str(int(time.time()) + until)
    command = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", SLOW]
    ended = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=300)
    assert outcome in ended.stdout, ended.stdout + ended.stderr
    assert ended.returncode == 0
    if until == 20:
        assert f"{SLOW} is slow, and the time that SLOW_TESTS_UNTIL gives is over" in " ".join(ended.stdout.split())


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_each_worker_ends_with_its_slow_tests(request: pytest.FixtureRequest, workers: int) -> None:
    class Item:
        def __init__(self, slow: bool) -> None:
            self.slow = slow

        def get_closest_marker(self, name: str) -> bool:
            return self.slow and name == "slow"

    conftest = next(p for p in request.config.pluginmanager.get_plugins() if hasattr(p, "slow_last"))
    items = [Item(place % 7 == 3) for place in range(160)]
    found = conftest.slow_last(items, workers)
    assert sorted(map(id, found)) == sorted(map(id, items))
    for slow in (False, True):  # in their order
        assert [item for item in found if item.slow == slow] == [item for item in items if item.slow == slow]
    slow_ones = [item for item in items if item.slow]
    later = [item for item in conftest.slow_last(items, workers, len(slow_ones) + 5) if item.slow]
    assert later == slow_ones[5:] + slow_ones[:5]
    size = len(items) / workers
    for worker in range(workers):
        # Equal stretches are of whole tests: one at a border may be the neighbour's.
        stretch = [item.slow for item in found[round(worker * size) : round((worker + 1) * size)]][1:-1]
        assert any(stretch) and not all(stretch)
        assert stretch == sorted(stretch)


def test_slow_tests_are_collected_last(repository: Path) -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "tests/test_slow.py"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    ended = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=300)
    found = [line for line in ended.stdout.splitlines() if "::" in line]
    assert len(found) > 5 and found[-1] == SLOW
