"""Calls made again: after a pause where one failed, or at intervals in a thread of their own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TypeVar

_T = TypeVar("_T")

# Pauses in seconds between attempts at something that fails for a while, a minute in all.
PATIENT = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)


def retry(
    action: Callable[[], _T], pauses: Sequence[float], may_pass: Callable[[Exception], bool],
    on_failure: Callable[[Exception, float], float] | None = None,
) -> _T:  # fmt: skip
    """Call a function until it succeeds; the error of the last attempt, or one that another attempt cannot mend, is raised.

    Args:
        pauses: in seconds, one before each further attempt.
        may_pass: whether another attempt may succeed after this error.
        on_failure: called with the error and the pause before that is made; returns the pause to make instead.
    """
    for pause in pauses:
        try:
            return action()
        except Exception as error:
            if not may_pass(error):
                raise
            pause = on_failure(error, pause) if on_failure else pause
        time.sleep(pause)
    return action()


class Repeater(threading.Thread):
    """A daemon thread that calls a function again and again. As a context manager, it does so while the block runs.

    Args:
        action: returns the seconds until its next call, or None to end the thread.
        pause: seconds before the first call.

    Attributes:
        ending: set where no further call is to begin.
    """

    def __init__(self, name: str, action: Callable[[], float | None], pause: float):
        super().__init__(name=name, daemon=True)
        self.ending = threading.Event()
        self._action, self._pause = action, pause

    def run(self) -> None:
        pause: float | None = self._pause
        while pause is not None and not self.ending.wait(pause):
            pause = self._action()

    def stop(self) -> None:
        """End the thread, once a call that runs has returned."""
        self.ending.set()
        self.join()

    def __enter__(self) -> Repeater:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()
