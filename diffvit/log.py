"""A run's training log: one line a step, readable by a person and by `pandas.read_csv(path, comment="#")`.

# run_id=3f0a… model=vit_classic size=10B dataset=CIFAR-100 …
# warning: warm-up (500 steps) is not shorter than the run …
step,epoch,learning_rate,train_loss,val_loss,val_accuracy,seconds
1,1,2.000e-07,4.8163,4.8020,0.0098,0.41
…
# test_accuracy=0.4312 test_loss=2.1310
"""

from __future__ import annotations

import os
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
        seconds: training time so far.
    """

    step: int
    epoch: int
    learning_rate: float
    train_loss: float
    val_loss: float
    val_accuracy: float
    seconds: float

    def line(self) -> str:
        """The step as a line of the log. Losses keep nine digits: enough to give an fp32 back exactly."""
        return (
            f"{self.step},{self.epoch},{self.learning_rate:.6e},{self.train_loss:.9g},{self.val_loss:.9g},"
            f"{self.val_accuracy:.6g},{self.seconds:.3f}"
        )


class TrainingLog:
    """Writes a log; lines reach the file when `write` returns.

    Args:
        path: the file; an existing one is replaced.
        facts: what stands in the first line.
        notes: sentences for the lines after it.
        keep: bytes of an existing log to go on from, as `position` gave them; what follows them is cut off.
    """

    def __init__(self, path: Path, facts: dict[str, object], notes: Iterable[str] = (), keep: int | None = None):
        path.parent.mkdir(parents=True, exist_ok=True)
        if keep is not None:
            self._file = open(path, "r+", encoding="utf-8")  # noqa: SIM115 (closed in __exit__)
            self._file.truncate(keep)
            self._file.seek(keep)
            return
        self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115 (closed in __exit__)
        self.note(" ".join(f"{key}={value}" for key, value in facts.items()))
        for note in notes:
            self.note(note)
        self._file.write(",".join(Step._fields) + "\n")
        self._file.flush()

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def position(self) -> int:
        """Bytes written so far, all of them on disk when this returns."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def note(self, text: str) -> None:
        """A comment line."""
        self._file.write(f"# {text}\n")
        self._file.flush()

    def write(self, steps: Iterable[Step]) -> None:
        """A line for each step."""
        self._file.write("".join(step.line() + "\n" for step in steps))
        self._file.flush()


def read_log(path: Path):
    """The log as a DataFrame, one row a step, columns as in Step."""
    import pandas as pd

    return pd.read_csv(path, comment="#")
