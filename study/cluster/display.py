"""What a study shows while it runs: a live table on a terminal, a line an event elsewhere. It goes to stderr."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ray.tune import Callback
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from diffvit.ledger.spec import RunSpec, overrides_text
from study.cost.forecast import makespan
from study.plan import PlannedRun
from study.text import clock

_HEARTBEAT_SECONDS = 30.0

_RUNNING = ("training", "compiling")

# Compiling that takes no longer is not worth a line.
_BRIEF_SECONDS = 5.0

_BAR_WIDTH = 12
_NUMBERS = ("step", "train loss", "val loss", "images/s", "test")
# Columns that a narrow terminal does without, the first one first.
_DISPENSABLE = ("images/s", "train loss", "val loss", "test")

# A run's speed is not believed before it has done so much of its work in this study, and is that of the last so much of its work.
_LEAST_SHARE = 0.05
_RECENT_SHARE = 0.2


@dataclass
class _Row:
    """A run as it is drawn.

    Attributes:
        started: when its trial began.
        since: when it began to compile; None once that has been said.
        opened: step and training seconds at the first report in this study, from which its speed is counted: neither a start-up nor
            what an earlier study did is in it.
        recent: step and training seconds at its reports, back to where it had _RECENT_SHARE of its work less.
        seconds: of training, as the run reports them.
    """

    run: PlannedRun
    state: str = "waiting"
    started: float = 0.0
    since: float | None = None
    step: int = 0
    opened: tuple[int, float] | None = None
    recent: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    train_loss: float | None = None
    val_loss: float | None = None
    pace: float | None = None
    accuracy: float | None = None

    @property
    def left(self) -> float:
        """FLOPs that are left."""
        return self.run.train_flops * (1 - self.step / self.run.steps)

    def advance(self, step: int, seconds: float, whole: bool) -> None:
        """Take a report's step and training seconds; of a `whole` run, which was trained in this study, it may be the only one."""
        if self.opened is None or step < self.opened[0]:
            self.opened = (0, 0.0) if whole else (step, seconds)
            self.recent = [self.opened]
        self.step, self.seconds = step, seconds
        self.recent.append((step, seconds))
        while len(self.recent) > 2 and step - self.recent[1][0] >= _RECENT_SHARE * self.run.steps:
            del self.recent[0]

    def seen(self) -> tuple[float, float]:
        """FLOPs that were done lately, and the seconds that they took; (0, 0) where they are too few to tell."""
        step, seconds = self.recent[0] if self.recent else (self.step, self.seconds)
        share = (self.step - step) / self.run.steps
        return (share * self.run.train_flops, self.seconds - seconds) if share >= _LEAST_SHARE else (0.0, 0.0)

    def fixed_seconds(self, now: float) -> float | None:
        """Of a run that ends now, what was no training: start, evaluation, files. None where it was not trained in this study."""
        if self.opened is None or self.step == self.opened[0]:
            return None
        return max(0.0, now - self.started - (self.seconds - self.opened[1]))


class StudyDisplay(Callback):
    """Hears Tune's events in the study's process and draws them.

    Args:
        runs: all runs of the study; those that are done already are shown so.
    """

    def __init__(self, runs: list[PlannedRun], console: Console | None = None):
        self.console = console or Console(file=sys.stderr)
        self._rows = {_key(run.spec): _Row(run, f"{run.status} before" if run.status else "waiting") for run in runs}
        # Worth a column only where they tell runs apart.
        self._conditions = len({overrides_text(run.spec.overrides) for run in runs}) > 1
        self._start = self._beat = time.monotonic()
        self._fixed_seconds: list[float] = []
        self._slots = 1
        self._live: Live | None = None

    def __enter__(self) -> StudyDisplay:
        if self.console.is_terminal:
            self._live = Live(console=self.console, get_renderable=self._draw, refresh_per_second=2, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def __getstate__(self) -> dict:
        return {}  # Tune pickles its callbacks into a record that nobody reads

    # Tune's events

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        row = self._row(trial)
        row.state, row.started = "training", time.monotonic()

    def on_step_begin(self, iteration: int, trials: list, **info: Any) -> None:
        """Again and again, whatever the runs report."""
        if self._live:
            return
        now = time.monotonic()
        for row in self._rows.values():
            if row.state == "compiling" and row.since is not None and now - row.since > _BRIEF_SECONDS:
                row.since = None
                self._say(f"compiling  {row.run.spec.title}")
        if now - self._beat > _HEARTBEAT_SECONDS:
            self._beat = now
            self._say(self._summary())

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
        row = self._row(trial)
        if result.get("preparing"):
            row.state, row.since, row.opened = "compiling", time.monotonic(), None
            return
        row.state = "training"
        step, seconds = result.get("step", result.get("steps", row.step)), result.get("seconds", row.seconds)
        row.advance(step, seconds, whole="steps" in result and result.get("run_seconds", 0.0) >= seconds)
        row.train_loss, row.val_loss = result.get("train_loss"), result.get("val_loss")
        row.pace = result.get("images_per_second", row.pace)
        row.accuracy = result.get("test_accuracy", row.accuracy)

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        row = self._row(trial)
        if "failed" in (trial.last_result or {}):
            self.on_trial_error(iteration, trials, trial)
            return
        if (trial.last_result or {}).get("status") == "diverged":
            row.state = "diverged"
            if not self._live:
                self._say(f"diverged  {row.run.spec.title} at step {row.step}")
            return
        if row.accuracy is None:  # stopped, or another study trains it
            row.state = "waiting"
            return
        row.state, row.step = "done", row.run.steps
        if (fixed := row.fixed_seconds(time.monotonic())) is not None:
            self._fixed_seconds.append(fixed)
        if not self._live:
            accuracy = f"test accuracy {100 * row.accuracy:.1f} %" if row.accuracy is not None else ""
            self._say(f"done    {row.run.spec.title}: {accuracy}")

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        row = self._row(trial)
        row.state = "failed"
        if not self._live:
            self._say(f"failed  {row.run.spec.title}")

    def _row(self, trial: Any) -> _Row:
        return self._rows[_key(trial.config["run"]["spec"])]

    def _say(self, line: str) -> None:
        """Off a terminal, where a width is nobody's."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    # The picture

    def _draw(self) -> Group:
        """The table, without the columns that are least needed where the terminal is narrow, and without runs that are not under way
        where it is low."""
        rows, room = list(self._rows.values()), self.console.height - 3
        if len(rows) > room:
            ranks = {"waiting": 1, "done": 2}
            shown = sorted(rows, key=lambda row: ranks.get(row.state.split()[0], 0))[: max(1, room)]
            rows = [row for row in rows if row in shown]
        unlimited = self.console.options.update(width=10_000)
        tables = (self._table(rows, without=_DISPENSABLE[:number]) for number in range(len(_DISPENSABLE) + 1))
        for table in tables:
            if self.console.measure(table, options=unlimited).maximum <= self.console.width:
                break
        hidden = len(self._rows) - len(rows)
        return Group(table, Text(self._summary() + (f"; {hidden} runs not shown" if hidden else "")))

    def _table(self, rows: list[_Row], without: Sequence[str] = ()) -> Table:
        table = Table(box=None, pad_edge=False, header_style="bold")
        cells = [self._cells(row) for row in rows]
        headers = [header for header in cells[0] if header not in without]
        for header in headers:
            layout: dict[str, Any] = {"justify": "right"} if header in _NUMBERS else {}
            table.add_column(header, no_wrap=header != "overrides", overflow="fold", **layout)
        for row, of_row in zip(rows, cells, strict=True):
            style = "dim" if row.state == "waiting" or row.state.endswith("before") else None
            table.add_row(*(of_row[header] for header in headers), style=style)
        return table

    def _cells(self, row: _Row) -> dict[str, Any]:
        spec, steps = row.run.spec, row.run.steps
        done = row.state.startswith("done")
        bar: Any = Text(row.state, style="red" if row.state in ("failed", "diverged") else "")
        if row.state == "training":
            bar = ProgressBar(total=steps, completed=row.step, width=_BAR_WIDTH)
        return {
            "model": spec.model, "size": spec.size, "data set": spec.dataset, "seed": str(spec.seed),
            **({"overrides": overrides_text(spec.overrides)} if self._conditions else {}),
            "progress": bar, "step": f"{steps if done else row.step}/{steps}",
            "train loss": _number(row.train_loss, ".4f"), "val loss": _number(row.val_loss, ".4f"), "images/s": _number(row.pace, ",.0f"),
            "test": "" if row.accuracy is None else f"{100 * row.accuracy:.1f} %",
        }  # fmt: skip

    def _summary(self) -> str:
        rows = list(self._rows.values())
        finished = sum(row.state.startswith("done") for row in rows)
        text = f"{finished} of {len(rows)} runs done"
        for state in ("diverged", "failed", "compiling"):
            if count := sum(row.state.startswith(state) for row in rows):
                text += f", {count} {state}"
        text += f", {clock(int(time.monotonic() - self._start))} elapsed"
        if not any(row.state in ("waiting", *_RUNNING) for row in rows):
            return text
        left = self._seconds_left()
        return text + (", estimating the time left" if left is None else f", about {clock(round(left))} left")

    def _seconds_left(self) -> float | None:
        """From the training that was seen in this study; None until there is something to go by."""
        running = [row for row in self._rows.values() if row.state in _RUNNING]
        waiting = sorted((row for row in self._rows.values() if row.state == "waiting"), key=lambda row: row.left, reverse=True)
        self._slots = max(self._slots, len(running))  # a slot may be free for a moment
        seen: dict[Any, tuple[float, float]] = {}
        for row in self._rows.values():
            work, seconds = row.seen()
            for alike in _alike(row) if seconds else ():
                before = seen.get(alike, (0.0, 0.0))
                seen[alike] = before[0] + work, before[1] + seconds
        if not seen:
            return None
        pace = {alike: seconds / work for alike, (work, seconds) in seen.items()}
        left = [row.left * next(pace[alike] for alike in _alike(row) if alike in pace) for row in (*running, *waiting)]
        fixed = statistics.fmean(self._fixed_seconds or [0.0])
        return makespan([*left[: len(running)], *(seconds + fixed for seconds in left[len(running) :])], self._slots)


def _alike(row: _Row) -> tuple[Any, ...]:
    """What a run's seconds a FLOP are taken from, the most like it first: itself, its cell, its architecture, anything."""
    spec = row.run.spec
    return spec.title, (spec.model, spec.size, spec.dataset), (spec.model,), ()


def _key(spec: RunSpec) -> str:
    return spec.title


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
