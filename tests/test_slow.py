"""Slow tests run while they fit."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

SLOW = "tests/test_slow.py::test_one_that_is_called_slow"


@pytest.mark.slow
def test_one_that_is_called_slow() -> None:
    pass


@pytest.mark.parametrize("until, outcome", [(None, "1 passed"), (60, "1 passed"), (-60, "1 skipped")])
def test_no_slow_test_begins_after_its_time(repository: Path, until: int | None, outcome: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "SLOW_TESTS_UNTIL"}
    if until is not None:
        environment["SLOW_TESTS_UNTIL"] = str(int(time.time()) + until)
    command = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", SLOW]
    ended = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=300)
    assert outcome in ended.stdout, ended.stdout + ended.stderr
    assert ended.returncode == 0
    if until == -60:
        assert f"{SLOW} is slow, and the time that SLOW_TESTS_UNTIL gives is over" in " ".join(ended.stdout.split())
