"""Ctrl-C and SIGTERM as a request: training saves its state and ends; a second signal ends the process at once."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """While the block runs, the first SIGINT or SIGTERM is only remembered. Main thread only.

    Args:
        on_first: called when it comes.
    """

    def __init__(self, on_first: Callable[[], object] = lambda: None) -> None:
        self.received: int | None = None
        self._on_first = on_first
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._remember) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def seen(self) -> bool:
        """Whether a signal has come."""
        return self.received is not None

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells count: 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + (self.received or 0)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()
        self._on_first()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
