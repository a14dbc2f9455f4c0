"""Signals: at once where nothing is lost, deferred where something would be, and never longer than promised."""

import signal
import subprocess
import sys
import time

import pytest

from seda_fast.interrupt import GRACE_SECONDS, LAST_SECONDS, SAME_STOP_SECONDS, Interrupted, Interrupts

HANGS = """
import hashlib, signal, sys, time
from seda_fast import interrupt
interrupt.GRACE_SECONDS = interrupt.LAST_SECONDS = 0.2
with interrupt.Interrupts() as interrupts, interrupts.deferred():
    print("ready", flush=True)
    try:
        if sys.argv[1] == "deaf":
            hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # native code, from which no handler brings it back
        time.sleep(60)
    except interrupt.Interrupted as stop:
        print(stop)
        sys.exit(stop.exit_code)
"""


def test_a_signal_raises_at_once_and_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Interrupts(), pytest.raises(Interrupted, match="stopped by SIGTERM") as caught:
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_deferred_signal_is_only_noted_and_a_second_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    with Interrupts() as interrupts, interrupts.deferred():
        signal.raise_signal(signal.SIGINT)
        assert interrupts.requested == signal.SIGINT
        # One stop may come as several signals.
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert interrupts.requested == signal.SIGINT
        then = time.monotonic() + SAME_STOP_SECONDS
        monkeypatch.setattr(time, "monotonic", lambda: then + 0.1)
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGTERM)


def test_what_a_signal_interrupted_cleans_up_in_peace() -> None:
    cleaned = []

    def work() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            cleaned.append(True)

    with Interrupts(), pytest.raises(Interrupted):
        work()
    assert cleaned == [True]


@pytest.mark.parametrize("kind", ["hears", "deaf"])
def test_the_wait_has_an_end_even_where_nothing_returns(kind: str) -> None:
    assert GRACE_SECONDS + LAST_SECONDS < 10
    process = subprocess.Popen(
        [sys.executable, "-c", HANGS, kind], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    out, said = process.communicate(timeout=20)
    assert process.returncode == 143
    assert (out, said) == {
        "hears": ("stopped by SIGTERM\n", ""),
        "deaf": ("", "stopped by force, as an operation did not return\n"),
    }[kind]


def test_the_end_comes_where_nobody_reads_that_it_does() -> None:
    """Of "... 2>&1 | tee log" Ctrl-C ends tee as well."""
    process = subprocess.Popen(
        [sys.executable, "-c", HANGS, "deaf"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "ready\n"
    process.stderr.close()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 143
