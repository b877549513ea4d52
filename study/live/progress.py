"""How far each run of a study is, and the time that is left, from the training seen in this study alone."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from study.cost.forecast import makespan
from study.plan import PlannedRun

# A run's speed is not believed before it has done so much of its work in this study, and is that of the last so much of its work.
_LEAST_SHARE = 0.05
_RECENT_SHARE = 0.2


@dataclass
class RunProgress:
    """A run as its reports tell.

    Attributes:
        state: "waiting", "training", "stopped", "done", "done before", "diverged", "failed".
        phase: what a training process does beside steps, such as "compiling"; "" while it makes steps.
        started: when its trial began, on the study's clock.
        since: when its phase began; None once that has been said.
        ended: its place among the runs that ended in this study, from 1; 0 before.
        opened: step and training seconds at the first report in this study, from which its speed is counted: neither a start-up nor
            what an earlier study did is in it.
        recent: step and training seconds at its reports, back to where it had _RECENT_SHARE of its work less.
        seconds: of training, as the run reports them.
        fixed_seconds: of an ended run, what was no training: start, evaluation, files. None where it was not trained in this study.
    """

    run: PlannedRun
    state: str = "waiting"
    phase: str = ""
    started: float = 0.0
    since: float | None = None
    ended: int = 0
    step: int = 0
    opened: tuple[int, float] | None = None
    recent: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    fixed_seconds: float | None = None
    train_loss: float | None = None
    val_loss: float | None = None
    pace: float | None = None
    accuracy: float | None = None

    def enter(self, phase: str, step: int | None, now: float) -> None:
        """Begin a phase after so many steps, None where that is not known yet; what it takes is no part of the run's speed."""
        self.state, self.phase, self.since = "training", phase, now
        self.step = self.step if step is None else step
        if phase != "evaluating":
            self.opened = None

    def report(self, result: dict[str, Any]) -> None:
        """Take a report of steps, or of the outcome."""
        self.state, self.phase = "training", ""
        seconds = result.get("seconds", self.seconds)
        # A run that says nothing before its end is counted from its start, if all of it was done here.
        whole = "steps" in result and result.get("run_seconds", 0.0) >= seconds
        self._advance(result.get("step", result.get("steps", self.step)), seconds, whole)
        self.train_loss, self.val_loss = result.get("train_loss"), result.get("val_loss")
        self.pace = result.get("images_per_second", self.pace)
        self.accuracy = result.get("test_accuracy", self.accuracy)

    def _advance(self, step: int, seconds: float, whole: bool) -> None:
        if self.opened is None or step < self.opened[0]:
            self.opened = (0, 0.0) if whole else (step, seconds)
            self.recent = [self.opened]
        self.step, self.seconds = step, seconds
        self.recent.append((step, seconds))
        while len(self.recent) > 2 and step - self.recent[1][0] >= _RECENT_SHARE * self.run.steps:
            del self.recent[0]

    def end(self, state: str, number: int, now: float) -> None:
        """Take its end as the study's `number`-th."""
        self.state, self.phase, self.ended = state, "", number
        if state == "done":
            self.step = self.run.steps
            if self.opened is not None and self.step > self.opened[0]:
                self.fixed_seconds = max(0.0, now - self.started - (self.seconds - self.opened[1]))

    @property
    def left(self) -> float:
        """FLOPs that are left."""
        return self.run.train_flops * (1 - self.step / self.run.steps)

    def seen(self) -> tuple[float, float]:
        """FLOPs that were done lately, and the seconds that they took; (0, 0) where they are too few to tell."""
        if not self.recent:
            return 0.0, 0.0
        (step, seconds), (last, until) = self.recent[0], self.recent[-1]
        share = (last - step) / self.run.steps
        return (share * self.run.train_flops, until - seconds) if share >= _LEAST_SHARE else (0.0, 0.0)


def seconds_left(rows: Sequence[RunProgress], slots: int) -> float | None:
    """The time until all runs have ended; None until there is something to go by.

    Args:
        slots: as many runs train at a time.
    """
    running = [row for row in rows if row.state == "training"]
    waiting = sorted((row for row in rows if row.state in ("waiting", "stopped")), key=lambda row: row.left, reverse=True)
    seen: dict[Any, tuple[float, float]] = {}
    for row in rows:
        work, seconds = row.seen()
        for alike in _alike(row) if seconds else ():
            before = seen.get(alike, (0.0, 0.0))
            seen[alike] = before[0] + work, before[1] + seconds
    if not seen:
        return None
    pace = {alike: seconds / work for alike, (work, seconds) in seen.items()}
    fixed = statistics.fmean([row.fixed_seconds for row in rows if row.fixed_seconds is not None] or [0.0])

    def training(row: RunProgress) -> float:
        return row.left * next(pace[alike] for alike in _alike(row) if alike in pace)

    return makespan([*map(training, running), *(training(row) + fixed for row in waiting)], slots)


def _alike(row: RunProgress) -> tuple[Any, ...]:
    """What a run's seconds a FLOP are taken from, the most like it first: itself, its cell, its architecture, anything."""
    spec = row.run.spec
    return spec.title, (spec.model, spec.size, spec.dataset), (spec.model,), ()
