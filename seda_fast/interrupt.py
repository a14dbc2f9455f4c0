"""SIGTERM and Ctrl-C: a command cleans up, a training run first writes a checkpoint, and all in under 10 seconds."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

# How long a signal waits for a good moment, and how long what it then interrupts has before the process ends.
GRACE_SECONDS, LAST_SECONDS = 6.0, 3.0
# So long after the first, signals are of the same stop: torchrun passes on to its ranks what systemd, SLURM or a
# terminal sends them as well, and ``timeout`` signals its child and its group.
SAME_STOP_SECONDS = 1.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(KeyboardInterrupt):
    """The command was told to stop; the message is one sentence."""

    def __init__(self, sentence: str, signum: int) -> None:
        super().__init__(sentence)
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells count."""
        return 128 + self.signum


class Interrupts:
    """What SIGTERM and SIGINT do while the block runs: they raise `Interrupted`, or inside `deferred` only set
    ``requested``, for the code there to stop where it loses nothing.

    Deferred no longer than `GRACE_SECONDS`: then, and on a signal that comes more than `SAME_STOP_SECONDS` after the
    first, `Interrupted` is raised all the same, and
    `LAST_SECONDS` later a process that hangs (in a collective whose other end has died, say) is ended. Outside the
    main thread, where Python handles no signals, this does nothing.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self._deferring = False
        self._told, self._insisting = 0.0, False
        self._over = threading.Event()
        self._before: dict[int, Any] = {}
        self._wakeup_before = -1

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
            # Python calls a handler when the main thread is back from native code; the thread hears of it at once.
            self._ear, self._mouth = socket.socketpair()
            self._mouth.setblocking(False)
            self._wakeup_before = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._insist, args=(self._ear,), daemon=True).start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._over.set()
        if self._before:
            signal.set_wakeup_fd(self._wakeup_before)
            self._mouth.close()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Signals set ``requested`` while the block runs."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now, first = time.monotonic(), self.requested is None
        if first:
            self.requested, self._told = number, now
        elif now - self._told < SAME_STOP_SECONDS and not self._insisting:
            return  # once is enough: what the first has begun to clean up is not torn down
        if not (first and self._deferring):
            raise Interrupted(f"stopped by {signal.Signals(number).name}", number)

    def _insist(self, ear: socket.socket) -> None:
        with ear:
            number = self._heard(ear)
            if number is not None:
                self._force(number)

    def _force(self, number: int) -> None:
        if self._deferring and not self._over.wait(GRACE_SECONDS):
            self._insisting = True
            os.kill(os.getpid(), number)
        if not self._over.wait(LAST_SECONDS):
            if sys.stderr is not None:
                with suppress(OSError, ValueError):  # whoever reads it may have ended by the same signal
                    print("stopped by force, as an operation did not return", file=sys.stderr, flush=True)
            os._exit(128 + number)

    def _heard(self, ear: socket.socket) -> int | None:
        """The first of our signals that comes, None when the block ends before."""
        while content := ear.recv(1):
            if content[0] in _SIGNALS:
                return content[0]
        return None
