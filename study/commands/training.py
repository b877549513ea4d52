"""`run.py train`: one run in this process, with a progress bar and its result printed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from diffvit.compute import Compute
from diffvit.keeping.saving import Saving
from diffvit.ledger.spec import RunSpec
from diffvit.loop.fit import Stopped
from diffvit.signals import StopSignals
from diffvit.tracking import Tracking
from diffvit.train import train
from diffvit.user_models import changed_note
from study.commands.terminal import fail, own_command
from study.hub import send_run
from study.text import STDOUT, put_json, say, show, warn


def train_and_print(
    spec: RunSpec, checkpoints: Path, *, data_root: str | None, device: torch.device, compute: Compute, saving: Saving,
    tracker: str | None, json_to: Path | None,
) -> None:  # fmt: skip
    """Train a run, or find it done, print its result, and see that its storage has it. Exits where the run is stopped or diverges."""
    if note := changed_note(checkpoints, spec.model):
        warn(note)
    try:
        with _StepProgress(spec.title) as progress, StopSignals(progress.stop) as signals:
            result = train(
                spec, checkpoints, data_root=data_root, device=device, compute=compute, on_steps=progress, on_warning=warn, saving=saving,
                tracking=Tracking(tracker), should_stop=signals.seen, on_phase=progress.enter,
            )  # fmt: skip
    except Stopped as stopped:
        say(f"{stopped}; its state is saved\nhint: to resume, run: {own_command()}")
        sys.exit(signals.exit_code)
    assert result is not None  # only a group has processes without one
    if not progress.steps:
        say(f"this run is done already: {result.finished}")
    files = result.files(checkpoints)
    if json_to:
        paths = {name: str(path) for name in ("weights", "log", "predictions", "result") if (path := getattr(files, name)).is_file()}
        put_json({**json.loads(files.result.read_text(encoding="utf-8")), "files": paths}, json_to)
    if result.diverged:
        wider = " or --precision fp32" if result.precision == "fp16" else ""
        hint = f"try a lower --lr, a longer --warmup_steps or --clip_norm 1{wider}; its log is kept."
        fail(f"the run {result.diverged['message']}.", hint, 1)
    whole = files.weights.is_file()
    if json_to != STDOUT:
        show("\n".join([*result.lines(), *([f"weights        {files.weights}"] if whole else [])]))
    if not whole:
        warn(f"{files.weights} is gone; delete the run's _result.json, and the same command trains it again")
    if saving.storage:
        send_run(saving.storage, files, warn, own_command())


class _StepProgress:
    """A progress bar of steps on stderr; away from a terminal, a line every ten seconds."""

    def __init__(self, title: str):
        self.steps = 0
        self._title, self._last_line = title, 0.0
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}", table_column=Column()),  # what a narrow terminal wraps
            *([BarColumn()] if self._console.width >= 120 else []), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[losses]}"), console=self._console, transient=True, disable=not self._console.is_terminal,
            speed_estimate_period=3600,  # steps may take minutes
        )  # fmt: skip
        self._task = self._bar.add_task(title, total=None, losses="")
        self._shown = self._bar.tasks[0]

    def __enter__(self) -> _StepProgress:
        self._bar.start()
        if not self._console.is_terminal:
            say(self._title)
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def stop(self) -> None:
        """Show on a terminal that the run was told to stop. It takes no lock, for a signal may interrupt anything."""
        self._title += ": stopping"
        self._shown.description = self._title

    def enter(self, phase: str, step: int) -> None:
        """Show what the run does beside steps."""
        self._bar.update(self._task, description=f"{self._title}: {phase}", completed=step)
        if not self._console.is_terminal:
            say(phase)

    def __call__(self, steps: list, total: int) -> None:
        last = steps[-1]
        self.steps = last.step
        losses = f"train {last.train_loss:.4f}  val {last.val_loss:.4f}"
        self._bar.update(self._task, description=self._title, completed=last.step, total=total, losses=losses)
        due = last.seconds - self._last_line >= 10 or last.step == total
        if not self._console.is_terminal and due:
            self._last_line = last.seconds
            say(f"step {last.step}/{total}  {losses}  {last.seconds:.0f} s")
