"""What a study shows while it runs: a live table on a terminal, a line an event elsewhere. It goes to stderr."""

from __future__ import annotations

import time
from typing import Any

from ray.tune import Callback
from rich.console import Console

from study.live.board import Board
from study.live.progress import RunProgress
from study.plan import PlannedRun

_HEARTBEAT_SECONDS = 30.0

# A phase that takes no longer is not worth a line.
_BRIEF_SECONDS = 5.0

_STOPPING = "stopping: runs save their states"


class StudyDisplay(Board, Callback):
    """Receives Tune's events in the study's process and draws them."""

    def __init__(self, runs: list[PlannedRun], console: Console | None = None):
        super().__init__(runs, console)
        self._beat = self.began
        self._ended = 0
        self._said_stopping = False

    def __getstate__(self) -> dict:
        return {}  # Tune pickles its callbacks into a record that nobody reads

    def stop(self) -> None:
        """Show that the study was told to stop. It writes nothing itself, for a signal may interrupt a write."""
        self.note = _STOPPING

    # Tune's events

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        row = self._row(trial)
        row.started = time.monotonic()
        row.enter("starting", None, row.started)

    def on_step_begin(self, iteration: int, trials: list, **info: Any) -> None:
        """Called by Tune again and again, whatever the runs report."""
        if self.note and not self._said_stopping:  # a table will be gone while what follows takes seconds
            self._said_stopping = True
            self.say(self.note)
        if self._live:
            return
        now = time.monotonic()
        for row in self.rows.values():
            if row.phase and row.since is not None and now - row.since > _BRIEF_SECONDS:
                row.since = None
                self.say(f"{row.phase}  {row.run.spec.title}")
        if now - self._beat > _HEARTBEAT_SECONDS:
            self._beat = now
            self.say(self.summary())

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
        row = self._row(trial)
        if phase := result.get("phase"):
            # Whoever reads the lines wants to know that a run resumed, however soon its steps follow.
            row.enter(phase, result["step"], float("-inf") if phase.startswith("resumed") else time.monotonic())
        else:
            row.report(result)

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        row, last = self._row(trial), trial.last_result or {}
        if "failed" in last:
            self.on_trial_error(iteration, trials, trial)
        elif last.get("status") == "diverged":
            self._end(row, "diverged", f"diverged  {row.run.spec.title} at step {row.step}")
        elif row.accuracy is None:  # stopped, or another study trains it
            row.state, row.phase = "waiting", ""
        else:
            self._end(row, "done", f"done    {row.run.spec.title}: test accuracy {100 * row.accuracy:.1f} %")

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        row = self._row(trial)
        self._end(row, "failed", f"failed  {row.run.spec.title}")

    def _end(self, row: RunProgress, state: str, line: str) -> None:
        self._ended += 1
        row.end(state, self._ended, time.monotonic())
        if not self._live:
            self.say(line)

    def _row(self, trial: Any) -> RunProgress:
        return self.rows[trial.config["run"]["spec"].title]
