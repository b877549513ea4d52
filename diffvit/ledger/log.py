"""A run's training log: one line a step, readable by a person and by `pandas.read_csv(path, comment="#")`.

# run_id=3f0a… model=vit_classic size=10B dataset=CIFAR-100 …
# warning: warm-up (500 steps) is not shorter than the run …
step,epoch,learning_rate,train_loss,val_loss,val_accuracy,grad_norm,seconds
1,1,2.000e-07,4.8163,4.8020,0.0098,1.93,0.41
…
# test_accuracy=0.4312 test_loss=2.1310

In fp16 a comment follows the line of a step whose update was skipped; its gradient's norm is then infinite or no number.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

from diffvit.errors import UserError, first_line
from diffvit.ledger.disk import flush_to_disk

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd


class Step(NamedTuple):
    """The record of one optimiser step.

    Attributes:
        step, epoch: counted from 1.
        train_loss: mean cross-entropy (nats) of the step's batch, with dropout, before the update.
        val_loss, val_accuracy: of one validation batch, without dropout, after the update.
        grad_norm: L2 norm of the whole gradient, before clipping.
        seconds: training time so far.
        overflowed_at: where the gradient overflowed fp16 and the update was therefore skipped: its loss scale. No column.
    """

    step: int
    epoch: int
    learning_rate: float
    train_loss: float
    val_loss: float
    val_accuracy: float
    grad_norm: float
    seconds: float
    overflowed_at: float | None = None

    @property
    def columns(self) -> dict[str, float]:
        """What the log has of it: name -> number."""
        return {name: getattr(self, name) for name in STEP_COLUMNS}

    @property
    def is_sound(self) -> bool:
        """Whether training still works: a loss that is not a number, or an update by such a gradient, spoils it for good."""
        losses = math.isfinite(self.train_loss) and math.isfinite(self.val_loss)
        return losses and (math.isfinite(self.grad_norm) or self.overflowed_at is not None)

    def images_per_second(self, batch_size: int) -> float:
        """Mean since the run's first step."""
        return self.step * batch_size / max(self.seconds, 1e-9)

    def line(self) -> str:
        """The step as a line of the log, and a skipped one's comment. Losses keep nine digits: enough to give an fp32 back exactly."""
        scale = self.overflowed_at
        skipped = f"\n# step {self.step} was skipped: its gradient overflowed fp16 at a loss scale of {scale:.0f}" if scale else ""
        return (
            f"{self.step},{self.epoch},{self.learning_rate:.6e},{self.train_loss:.9g},{self.val_loss:.9g},"
            f"{self.val_accuracy:.6g},{self.grad_norm:.6g},{self.seconds:.3f}{skipped}"
        )


STEP_COLUMNS = Step._fields[:-1]


class LogPosition(NamedTuple):
    """A length of a log, and the SHA-256 of that much of it."""

    bytes: int
    sha256: str

    def fits(self, path: Path) -> bool:
        """Whether the file begins with what the position was taken of."""
        try:
            if not 0 <= self.bytes <= path.stat().st_size:  # so much would be made room for
                return False
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
        keep: keep so much of an existing log; what follows is cut off.
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
        self._append(",".join(STEP_COLUMNS) + "\n")

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with contextlib.suppress(OSError):  # nothing is buffered; on some network file systems a full disk shows here again
            self._file.close()

    def position(self) -> LogPosition:
        """The log so far, flushed to disk when this returns."""
        flush_to_disk(self._file.fileno())
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


class WorkAgain(NamedTuple):
    """Steps that a run repeated after an interruption, and their seconds. The log has them in a note."""

    steps: int
    seconds: float

    def note(self, what: str) -> str:
        """The text of the note; `what` says how the run went on."""
        return f"{what}; {self.steps} steps, {self.seconds:.1f} s done again"

    @staticmethod
    def noted(text: str) -> list[WorkAgain]:
        """The notes in a log, or a part of one."""
        return [WorkAgain(int(match[1]), float(match[2])) for match in _WORK_AGAIN.finditer(text)]

    @staticmethod
    def after(path: Path, position: LogPosition | None) -> WorkAgain:
        """The steps that are repeated when a run resumes from a position of its log.

        Work that was done again there already, and is cut off with the rest, counts too.
        """
        try:
            content = path.read_bytes()
        except OSError:
            return WorkAgain(0, 0.0)
        cut = position.bytes if position else 0
        kept, lost = (part.decode(errors="replace") for part in (content[:cut], content[cut:]))
        (_, before), (steps, seconds) = _steps_and_seconds(kept), _steps_and_seconds(lost)
        notes = [WorkAgain(steps, max(0.0, seconds - before) if steps else 0.0), *WorkAgain.noted(lost)]
        return WorkAgain(sum(note.steps for note in notes), sum(note.seconds for note in notes))


# Anchored: else a long line of `#` would be searched from each of them. Digits: no more than make a number.
_WORK_AGAIN = re.compile(r"^# .*; ([0-9]{1,15}) steps, ([0-9]{1,15}(?:\.[0-9]{1,15})?) s done again", re.MULTILINE)


def was_interrupted(path: Path) -> bool:
    """Whether a log says that its run did not go from start to end in one go. False where there is none."""
    try:
        return bool(WorkAgain.noted(path.read_text(errors="replace")))
    except OSError:
        return False


def skipped_steps(path: Path) -> int:
    """How many steps' updates were skipped, by the comments of a log."""
    return len(re.findall(r"^# step [0-9]+ was skipped: ", path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE))


def _steps_and_seconds(text: str) -> tuple[int, float]:
    """How many whole step lines there are, and the training time that the last one says."""
    lines = [line.split(",") for line in text.splitlines(keepends=True) if line.endswith("\n")]
    steps = [cells for cells in lines if len(cells) == len(STEP_COLUMNS) and cells[0].isdigit()]
    try:
        return len(steps), float(steps[-1][-1]) if steps else 0.0
    except ValueError:
        return len(steps), 0.0


class LogRows(NamedTuple):
    """The steps of a log.

    Attributes:
        text: their lines as they stand in the log, without the column names and without comments; each ends with a line feed.
        columns: name of a field of Step -> its values, in order of step; whole numbers as int64, others as float64. [steps]
    """

    text: bytes
    columns: dict[str, np.ndarray]

    @property
    def last(self) -> int:
        """The last step; 0 where there is none."""
        return len(self.columns["step"])

    def after(self, step: int) -> list[Step]:
        """The steps that follow one, in order; after 0, all."""
        return [Step(*(self.columns[name][number].item() for name in STEP_COLUMNS)) for number in range(step, self.last)]


def read_log(path: Path, steps: int | None = None) -> pd.DataFrame:
    """The log as a DataFrame, one row a step, columns as in Step. Arguments and errors as in read_rows."""
    import pandas as pd

    return pd.DataFrame(read_rows(path, steps).columns)


def read_rows(path: Path, steps: int | None = None) -> LogRows:
    """The steps of a log: nothing but numbers, and each step from 1 on, once and in order.

    Args:
        steps: how many there must be: those of an ended run's result. Without it the run may be unfinished: a last line that is cut, as a
            killed process or a full disk leaves it, is no step, and a log that was hardly begun has none.

    Raises:
        UserError: the log cannot be read or is damaged; it names the file and the line.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.", _hint(steps)) from error
    try:
        return _rows(content, steps)
    except ValueError as error:  # quickly found, and slowly explained
        raise UserError(f"{path} is damaged: {_damage(content, steps) or first_line(error)}.", _hint(steps)) from error


_HEADER = ",".join(STEP_COLUMNS).encode()
_WHOLE_NUMBERS = ("step", "epoch")


def _rows(content: bytes, steps: int | None) -> LogRows:
    """Raises ValueError for a log that is damaged in any way."""
    import numpy as np
    import pyarrow
    from pyarrow import csv

    text = _without_comments(content[: content.rfind(b"\n") + 1])
    if text.startswith(_HEADER + b"\n"):
        text = text[len(_HEADER) + 1 :]
    elif text or steps is not None:
        raise ValueError("it has no column names")
    count = text.count(b"\n")
    if steps is not None and count != steps:
        raise ValueError(f"it has {count} steps instead of {steps}")
    kinds = {name: pyarrow.int64() if name in _WHOLE_NUMBERS else pyarrow.float64() for name in STEP_COLUMNS}
    if not count:
        return LogRows(text, {name: np.empty(0, kind.to_pandas_dtype()) for name, kind in kinds.items()})
    table = csv.read_csv(
        pyarrow.BufferReader(text),
        csv.ReadOptions(use_threads=False, column_names=list(kinds), block_size=len(text) + 1),  # one block: arrays in one piece
        csv.ParseOptions(quote_char=False, double_quote=False, ignore_empty_lines=False),
        csv.ConvertOptions(column_types=kinds, null_values=[], strings_can_be_null=False),
    )
    columns = {name: table.column(name).to_numpy() for name in kinds}
    if not np.array_equal(columns["step"], np.arange(1, count + 1)):
        raise ValueError("its steps are not in order")
    return LogRows(text, columns)


def _without_comments(content: bytes) -> bytes:
    first, *commented = (b"\n" + content).split(b"\n#")
    rests = (part[part.find(b"\n") :] if b"\n" in part else b"" for part in commented)  # nothing where the next comment follows at once
    return b"".join([first, *rests])[1:]


_NUMBER = re.compile(rb"[+-]?(\d+(\.\d*)?(e[+-]?\d+)?|inf|nan)")
_WHOLE_NUMBER = re.compile(rb"\d+")


def _damage(content: bytes, steps: int | None) -> str:
    """The first damage of a log, with its line; "" where there is none."""
    *lines, cut = content.split(b"\n")
    named, step = False, 0
    for number, line in enumerate(lines, start=1):
        if line.startswith(b"#"):
            continue
        if not named:
            if line != _HEADER:
                return f"line {number} is {_shown(line)} instead of the column names"
            named = True
            continue
        step += 1
        cells = line.split(b",")
        if len(cells) != len(STEP_COLUMNS):
            return f"line {number} has {len(cells)} of {len(STEP_COLUMNS)} values: {_shown(line)}"
        for name, cell in zip(STEP_COLUMNS, cells, strict=True):
            whole = name in _WHOLE_NUMBERS
            if not (_WHOLE_NUMBER if whole else _NUMBER).fullmatch(cell):
                return f"line {number} has {_shown(cell)} for {name}, which is no {'whole ' if whole else ''}number"
        if cells[0].lstrip(b"0") != b"%d" % step:
            return f"line {number} has step {cells[0][:20].decode()} in place of step {step}"
        if steps is not None and step > steps:
            return f"line {number} has step {step}, and the result says that the run has {steps}"
    if steps is not None and step < steps:
        where = f"line {len(lines) + 1} is cut" if cut else f"it ends with line {len(lines)}" if lines else "it is empty"
        return f"{where}, after {step} of {steps} steps"
    return ""


def _shown(text: bytes) -> str:
    """An excerpt of a file, on one line."""
    return repr(text[:40].decode(errors="replace")) + (" …" if len(text) > 40 else "")


def _hint(steps: int | None) -> str:
    if steps is None:
        return "`study` or `train` resumes from the last checkpoint before the damage."
    return "delete the run's _result.json, and `study` or `train` trains it again."
