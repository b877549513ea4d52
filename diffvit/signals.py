"""Ctrl-C, SIGTERM and SIGHUP as a request to save the state and end; a second signal ends the process at once.

SIGHUP comes when a terminal or an SSH session is closed, often twice, so that only other signals count as second ones. Where it is
ignored, as under nohup, it stays so.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def kept_from_children(number: signal.Signals = signal.SIGHUP) -> Iterator[None]:
    """Processes started in the block never get the signal, which a terminal sends to its whole group. Ours arrives after the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class StopSignals:
    """While the block runs, the first SIGINT, SIGTERM or SIGHUP is only remembered. Main thread only.

    Args:
        on_first: called when it comes.
    """

    def __init__(self, on_first: Callable[[], object] = lambda: None) -> None:
        self.received: int | None = None
        self._on_first = on_first
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        heeded = [number for number in _SIGNALS if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._remember) for number in heeded}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def seen(self) -> bool:
        """Whether a signal has come."""
        return self.received is not None

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells count: 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP."""
        return 128 + (self.received or 0)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a shell and the kernel both send one: the second is no haste
        self._on_first()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
