"""What a study shows while it runs: the state that a run's reports say, and the time that is left."""

from __future__ import annotations

import dataclasses
import io
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.text import Text

from diffvit.ledger.log import Step
from diffvit.ledger.spec import RunSpec
from study.cluster import display as displays
from study.cluster import runner
from study.cluster.display import StudyDisplay
from study.cluster.runner import Settings
from study.commands.training import _StepProgress
from study.grid import Grid
from study.live import board
from study.placement import Placement
from study.plan import PlannedRun, plan_runs
from study.text import clock


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The display's clock."""
    clock = SimpleNamespace(seconds=1000.0)
    for module in (displays, board):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.seconds))
    return clock


class Study:
    """A display off a terminal, and the events that Tune would send it."""

    def __init__(self, specs: list[RunSpec] | None = None):
        self.runs: list[PlannedRun] = plan_runs(specs or Grid("some", ("digits",)).runs()[:2], Path("nowhere"), {})
        self.console = Console(width=200, record=True, file=io.StringIO())
        self.display = StudyDisplay(self.runs, self.console)
        self.trials = [SimpleNamespace(config={"run": {"spec": run.spec}}, last_result={}) for run in self.runs]

    def start(self, number: int) -> None:
        self.display.on_trial_start(0, [], self.trials[number])

    def report(self, number: int, **result: Any) -> None:
        if "phase" in result:
            result.setdefault("step", None)
        self.trials[number].last_result = result
        self.display.on_trial_result(0, [], self.trials[number], result)

    def steps(self, number: int, share: float, seconds: float) -> None:
        step = round(share * self.runs[number].steps)
        self.report(number, step=step, train_loss=1.5, val_loss=2.5, images_per_second=100.0, seconds=seconds)

    def end(self, number: int, **outcome: Any) -> None:
        self.report(number, **{"status": "done", "steps": self.runs[number].steps, "test_accuracy": 0.5, **outcome})
        self.display.on_trial_complete(0, [], self.trials[number])

    def tick(self) -> str:
        """What Tune's loop makes the display say."""
        self.display.on_step_begin(0, [])
        return self.console.export_text()

    def left(self) -> str:
        return self.display.summary().rpartition("elapsed")[2]

    def table(self) -> str:
        self.console.export_text()  # forget what was said
        self.console.print(self.display.draw())
        return self.console.export_text()


def test_a_run_is_compiling_until_its_first_steps_arrive() -> None:
    study = Study()
    study.start(0)
    assert "compiling" not in study.table()
    study.report(0, phase="compiling")
    assert re.search(r"0\.1M +compiling +0/600", study.table()) and "1 compiling" in study.display.summary()
    study.steps(0, 0.1, 3.0)
    assert "compiling" not in study.table() and study.display.rows[study.runs[0].spec.title].state == "training"
    # A run that is begun again keeps what is known of it.
    study.report(0, phase="compiling", step=60)
    assert re.search(r"compiling +60/600 +1\.5000 +2\.5000", study.table())
    study.end(0, seconds=9.0)
    assert re.search(r"done +600/600", study.table())


def test_a_run_that_is_stopped_or_fails_while_it_compiles() -> None:
    study = Study()
    for number in (0, 1):
        study.start(number)
        study.report(number, phase="compiling")
    study.display.on_trial_complete(0, [], study.trials[0])
    study.report(1, failed="it died")
    study.display.on_trial_complete(0, [], study.trials[1])
    assert [row.state for row in study.display.rows.values()] == ["waiting", "failed"]


def test_compiling_is_a_line_only_where_it_lasts(now: SimpleNamespace) -> None:
    study = Study()
    for number in (0, 1):
        study.start(number)
        study.report(number, phase="compiling")
    now.seconds += 2
    assert study.tick() == ""
    study.steps(1, 0.1, 1.0)
    now.seconds += 5
    assert study.tick() == f"compiling  {study.runs[0].spec.title}\n"
    now.seconds += 5
    assert study.tick() == ""  # once


def test_the_heartbeat_beats_while_nothing_is_reported(now: SimpleNamespace) -> None:
    study = Study()
    study.start(0)
    now.seconds += 31
    starting = f"starting  {study.runs[0].spec.title}\n"
    assert study.tick() == f"{starting}0 of 2 runs done, 0:31 elapsed, estimating the time left\n"
    assert study.tick() == ""
    study.report(0, phase="resumed at step 300", step=300)
    assert study.tick() == f"resumed at step 300  {study.runs[0].spec.title}\n"


def test_a_start_up_is_no_speed(now: SimpleNamespace) -> None:
    study = Study()
    study.start(0)
    study.report(0, phase="compiling")
    now.seconds += 500
    assert study.left() == ", estimating the time left"
    study.steps(0, 0.10, 40.0)  # it has begun before, and its first steps are slow
    assert study.left() == ", estimating the time left"
    study.steps(0, 0.11, 41.0)  # 1 % of it seen
    assert study.left() == ", estimating the time left"
    study.steps(0, 0.15, 45.0)  # a second for each hundredth
    share = study.runs[1].train_flops / study.runs[0].train_flops
    seconds = 85 + 100 * share
    assert study.left() == f", about {clock(round(seconds))} left"
    # Another start-up changes nothing, and both train at once: the longer one is the end.
    study.start(1)
    study.report(1, phase="compiling")
    now.seconds += 500
    seconds = max(85, 100 * share)
    assert study.left() == f", about {clock(round(seconds))} left"


def test_time_left_at_the_end_and_without_steps() -> None:
    study = Study()
    study.start(0)
    study.end(0, seconds=100.0, run_seconds=130.0)  # a worker group says nothing before its end
    share = study.runs[1].train_flops / study.runs[0].train_flops
    assert study.left() == f", about {clock(round(100 * share))} left"
    study.start(1)
    study.end(1, seconds=100.0, run_seconds=130.0)
    assert study.left() == ""
    elsewhere = Study()
    elsewhere.start(0)
    elsewhere.end(0, seconds=100.0, run_seconds=1.0)  # another machine has trained it
    assert elsewhere.left() == ", estimating the time left"


def test_lines_off_a_terminal_are_not_folded(now: SimpleNamespace) -> None:
    study = Study()
    study.console.width = 30
    study.start(0)
    study.report(0, phase="compiling")
    now.seconds += 31
    first, second = study.tick().splitlines()
    assert first == f"compiling  {study.runs[0].spec.title}" and second.endswith("estimating the time left")


@pytest.mark.parametrize(("width", "height"), [(80, 24), (100, 30), (120, 40)])
@pytest.mark.parametrize("conditions", [({},), ({}, {"label_noise": 0.4, "input_noise": 0.25})])
@pytest.mark.parametrize("seeds", [2, 6, 33])
def test_a_terminal_shows_what_matters_uncut(width: int, height: int, seeds: int, conditions: tuple[dict[str, float], ...]) -> None:
    study = Study(Grid("some", ("digits-noisy",), seeds=tuple(range(seeds)), conditions=conditions).runs())
    study.console.width, study.console.height = width, height
    count = len(study.runs)
    for number in range(count - 3):
        study.start(number)
        study.end(number, seconds=9.0) if number % 4 else study.display.on_trial_error(0, [], study.trials[number])
    study.start(count - 1)
    study.steps(count - 1, 0.5, 5.0)
    study.start(count - 2)
    study.report(count - 2, phase="resumed at step 300", step=300)
    lines = [line.rstrip() for line in study.table().splitlines()]
    assert len(lines) < height and max(map(len, lines)) <= width and "…" not in "".join(lines)
    assert re.match(rf"\d+ of {count} runs done, \d+ failed", lines[0]) and "digits-noisy" in lines[1]
    headers = lines[2]
    assert headers.startswith("model") and headers.endswith("test") and ("val loss" in headers or width < 120)
    running = [line for line in lines[3:8] if line.startswith(("differential  0.4M", "classic       0.4M"))]
    assert sum("300/600" in line and "━" in line for line in running) == 1 and sum(" resumed " in line for line in running) == 1
    assert lines[-1].startswith("1 waiting")
    ended = [line for line in lines if " done " in line and "50.0 %" in line]
    assert len(ended) >= min(count // 2, 4)


def test_runs_that_were_done_before_are_one_line() -> None:
    runs = plan_runs(Grid("some", ("digits",)).runs(), Path("nowhere"), {})
    study = board.Board(
        [dataclasses.replace(run, status="done" if number < 4 else None) for number, run in enumerate(runs)], Console(width=80)
    )
    lines = [line.plain for line in study.draw().renderables if isinstance(line, Text)]
    assert lines[0].startswith("4 of 6 runs done") and lines[-1] == "4 done before; 2 waiting"


def test_a_run_that_is_begun_again_keeps_its_place_and_its_pace() -> None:
    study = Study(Grid("some", ("digits",), models=("vit_classic",), sizes=("small",)).runs())
    study.start(0)
    for step in range(0, 401, 40):
        study.report(0, step=step, train_loss=1.0, val_loss=1.0, images_per_second=1.0, seconds=step / 10)
    assert study.left() == ", about 0:20 left"
    study.start(0)  # it died; its last state is of step 360
    study.report(0, phase="loading digits")
    assert "400/600" in study.table() and study.left() == ", about 0:20 left"
    study.report(0, phase="resumed at step 360", step=360)
    assert "360/600" in study.table() and study.left() == ", about 0:24 left"


def test_a_study_that_is_told_to_stop_says_so() -> None:
    study = Study()
    study.start(0)
    study.display.stop()
    assert not study.console.export_text() and study.left() == ", stopping: runs save their states"  # it may interrupt a write
    assert study.tick() == "stopping: runs save their states\n" and not study.tick()


def test_on_a_terminal_a_study_and_a_run_that_are_told_to_stop_say_so_at_once() -> None:
    study = Study()
    study.console = Console(width=80, file=io.StringIO(), force_terminal=True, record=True)
    study.display.console = study.console
    with study.display:
        study.start(0)
        study.display.stop()
        assert "stopping: runs save their states" in study.table()
        study.display.on_step_begin(0, [])
        study.display.on_step_begin(0, [])
    assert study.console.file.getvalue().count("stopping: runs save their states\n") == 1
    progress = _StepProgress("a run")
    progress.stop()
    assert progress._bar.tasks[0].description == "a run: stopping"
    progress([Step(3, 1, 1e-3, 2.0, 2.0, 0.1, 1.0, 1.0)], 10)
    assert progress._bar.tasks[0].description == "a run: stopping"


def test_a_run_is_forecast_from_what_is_most_like_it() -> None:
    """Seconds a FLOP differ between architectures and sizes; a run's own say most."""
    study = Study(Grid("some", ("digits",), sizes=("small", "medium"), seeds=(0, 1)).runs())
    numbers = {(run.spec.model, run.spec.size, run.spec.seed): number for number, run in enumerate(study.runs)}
    seconds = {
        ("vit_classic", "0.1M"): 30.0,
        ("vit_differential", "0.1M"): 60.0,
        ("vit_classic", "0.2M"): 80.0,
        ("vit_differential", "0.2M"): 200.0,
    }
    for (model, size), of_run in seconds.items():
        number = numbers[model, size, 0]
        study.start(number)
        study.end(number, seconds=of_run, run_seconds=of_run)
    assert study.left() == ", about 6:10 left"  # the second seeds, one after the other
    own = numbers["vit_differential", "0.2M", 1]
    study.start(own)
    study.steps(own, 0.0, 0.0)
    study.steps(own, 0.5, 50.0)  # twice as fast as the first seed
    assert study.left() == ", about 3:40 left"


def test_what_a_run_takes_beside_its_training_is_counted_for_those_that_wait(now: SimpleNamespace) -> None:
    study = Study(Grid("some", ("digits",), models=("vit_classic",), sizes=("small",), seeds=(0, 1, 2)).runs())
    study.start(0)
    now.seconds += 130
    study.end(0, seconds=100.0, run_seconds=130.0)
    assert study.left() == ", about 4:20 left"
    study.start(1)
    now.seconds += 10
    study.steps(1, 0.0, 0.0)
    study.steps(1, 0.5, 50.0)
    assert study.left() == ", about 3:00 left"


def test_a_run_that_slows_down_is_forecast_from_its_recent_pace() -> None:
    """Other work came onto the machine: a second a hundredth at first, three later."""
    study = Study(Grid("some", ("digits",), models=("vit_classic",), sizes=("small",)).runs())
    study.start(0)
    for percent in range(0, 41, 2):
        study.steps(0, percent / 100, float(percent))
    assert study.left() == ", about 1:00 left"
    for percent in range(42, 61, 2):
        study.steps(0, percent / 100, 40.0 + 3 * (percent - 40))
    assert study.left() == ", about 2:00 left"


def test_a_slot_that_is_free_for_a_moment_is_counted() -> None:
    study = Study(Grid("some", ("digits",), models=("vit_classic",), sizes=("small",), seeds=(0, 1, 2, 3)).runs())
    for number in (0, 1):
        study.start(number)
        study.steps(number, 0.0, 0.0)
        study.steps(number, 0.5, 50.0)
    assert study.left() == ", about 2:30 left"
    study.end(0, seconds=100.0)
    assert study.left() == ", about 2:30 left"  # 50 and 100 beside 100: the other slot is about to be taken


def test_slow_steps_of_one_run_have_a_time_left() -> None:
    now = [0.0]
    progress = _StepProgress("a run")
    task = progress._bar.tasks[0]
    progress._bar.get_time = task._get_time = lambda: now[0]
    for step in (1, 2, 3):
        now[0] += 90
        progress([Step(step, 1, 1e-3, 2.0, 2.0, 0.1, 1.0, now[0])], 10)
    assert task.time_remaining == 7 * 90


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_reports_its_phases(workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group reports together, so its processes leave that out."""
    reports: list[dict] = []

    def train(spec: Any, checkpoints: Path, *, on_phase: Any, on_steps: Any, **options: Any) -> Any:
        if on_phase:
            on_phase("compiling", 4)
        on_steps([Step(1, 1, 0.1, 1.5, 2.5, 0.5, 1.0, 7.0)], 12)
        return SimpleNamespace(content=lambda: {"status": "done", "seconds": 7.0})

    for name, value in {
        "train": train, "load": lambda *_: None, "_should_stop": lambda flag: lambda: False, "get_device": lambda: torch.device("cpu"),
        "RunGauges": lambda *_: SimpleNamespace(set=lambda numbers: None),
    }.items():  # fmt: skip
        monkeypatch.setattr(runner, name, value)
    for module in (runner.tune, runner.ray_train):
        monkeypatch.setattr(module, "report", reports.append)
    settings = Settings(tmp_path, placement=Placement(workers=workers, cpus_per_run=torch.get_num_threads()))
    spec = Grid("one", ("digits",)).runs()[0]
    runner._worker({"run": {"spec": spec, "run_id": "0"}, "settings": settings, "stop_flag": None})
    kinds = [(report.get("phase", report.get("status", "steps")), report.get("step")) for report in reports]
    of_steps = [("loading digits", None), ("compiling", 4), ("steps", 1)] if workers == 1 else []
    assert kinds == [*of_steps, ("done", None)]
