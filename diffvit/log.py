"""A run's training log: one line a step, readable by a person and by `pandas.read_csv(path, comment="#")`.

# run_id=3f0a… model=vit_classic size=10B dataset=CIFAR-100 …
# warning: warm-up (500 steps) is not shorter than the run …
step,epoch,learning_rate,train_loss,val_loss,val_accuracy,grad_norm,seconds
1,1,2.000e-07,4.8163,4.8020,0.0098,1.93,0.41
…
# test_accuracy=0.4312 test_loss=2.1310
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import NamedTuple


class Step(NamedTuple):
    """What is recorded of one optimiser step.

    Attributes:
        step, epoch: counted from 1.
        train_loss: mean cross-entropy (nats) of the step's batch, with dropout, before the update.
        val_loss, val_accuracy: of one validation batch, without dropout, after the update.
        grad_norm: L2 norm of the whole gradient, before clipping.
        seconds: training time so far.
    """

    step: int
    epoch: int
    learning_rate: float
    train_loss: float
    val_loss: float
    val_accuracy: float
    grad_norm: float
    seconds: float

    @property
    def is_finite(self) -> bool:
        """Whether training still works: a loss or a gradient that is not a number spoils all weights for good."""
        return all(map(math.isfinite, (self.train_loss, self.val_loss, self.grad_norm)))

    def line(self) -> str:
        """The step as a line of the log. Losses keep nine digits: enough to give an fp32 back exactly."""
        return (
            f"{self.step},{self.epoch},{self.learning_rate:.6e},{self.train_loss:.9g},{self.val_loss:.9g},"
            f"{self.val_accuracy:.6g},{self.grad_norm:.6g},{self.seconds:.3f}"
        )


class LogPosition(NamedTuple):
    """A length of a log, and the SHA-256 of that much of it."""

    bytes: int
    sha256: str

    def fits(self, path: Path) -> bool:
        """Whether the file begins with what the position was taken of."""
        try:
            with open(path, "rb") as file:
                content = file.read(self.bytes)
        except OSError:
            return False
        return len(content) == self.bytes and hashlib.sha256(content).hexdigest() == self.sha256


class TrainingLog:
    """Writes a log; lines reach the file when `write` returns.

    Args:
        path: the file; an existing one is replaced.
        facts: what stands in the first line.
        notes: sentences for the lines after it.
        keep: go on after so much of an existing log; what follows is cut off.
    """

    def __init__(self, path: Path, facts: dict[str, object], notes: Iterable[str] = (), keep: LogPosition | None = None):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "w+b" if keep is None else "r+b", buffering=0)  # noqa: SIM115 (closed in __exit__)
        self._digest = hashlib.sha256()
        if keep is not None:
            self._digest.update(self._file.read(keep.bytes) or b"")
            self._file.truncate()
            return
        self.note(" ".join(f"{key}={value}" for key, value in facts.items()))
        for note in notes:
            self.note(note)
        self._append(",".join(Step._fields) + "\n")

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with contextlib.suppress(OSError):  # nothing is buffered; on some network file systems a full disk shows here again
            self._file.close()

    def position(self) -> LogPosition:
        """What is written so far, all of it on disk when this returns."""
        os.fsync(self._file.fileno())
        return LogPosition(self._file.tell(), self._digest.hexdigest())

    def note(self, text: str) -> None:
        """A comment line."""
        self._append(f"# {text}\n")

    def write(self, steps: Iterable[Step]) -> None:
        """A line for each step."""
        self._append("".join(step.line() + "\n" for step in steps))

    def _append(self, text: str) -> None:
        rest = memoryview(text.encode())
        self._digest.update(rest)
        while rest:  # a nearly full disk takes a part, and then raises
            rest = rest[self._file.write(rest) :]


def note_of_work_again(what: str, steps: int, seconds: float) -> str:
    """The note of a run that goes on after it was interrupted."""
    return f"{what}; {steps} steps, {seconds:.1f} s done again"


_WORK_AGAIN = re.compile(r"# .*; (\d+) steps, ([\d.]+) s done again")


def was_interrupted(path: Path) -> bool:
    """Whether a log says that its run did not go from start to end in one go. False where there is none."""
    try:
        return bool(_WORK_AGAIN.search(path.read_text(errors="replace")))
    except OSError:
        return False


def work_after(path: Path, position: LogPosition | None) -> tuple[int, float]:
    """Steps in a log after a position, and the seconds they took: what is done again when a run goes on from there.

    Work that was done again there already, and is cut off with the rest, counts too.
    """
    try:
        content = path.read_bytes()
    except OSError:
        return 0, 0.0
    cut = position.bytes if position else 0
    kept, lost = (_steps_and_seconds(part.decode(errors="replace")) for part in (content[:cut], content[cut:]))
    notes = [(int(match[1]), float(match[2])) for match in _WORK_AGAIN.finditer(content[cut:].decode(errors="replace"))]
    seconds = max(0.0, lost[1] - kept[1]) if lost[0] else 0.0
    return lost[0] + sum(steps for steps, _ in notes), seconds + sum(seconds for _, seconds in notes)


def _steps_and_seconds(text: str) -> tuple[int, float]:
    """How many whole step lines there are, and the training time that the last one says."""
    lines = [line.split(",") for line in text.splitlines(keepends=True) if line.endswith("\n")]
    steps = [cells for cells in lines if len(cells) == len(Step._fields) and cells[0].isdigit()]
    try:
        return len(steps), float(steps[-1][-1]) if steps else 0.0
    except ValueError:
        return len(steps), 0.0


def read_log(path: Path):
    """The log as a DataFrame, one row a step, columns as in Step."""
    import pandas as pd

    return pd.read_csv(path, comment="#")
