"""Sends a run's curves to an experiment tracker: TensorBoard, Weights & Biases or MLflow.

A tracker works in a thread of its own. One that fails is left out with a warning; it neither fails nor delays a run.
A run is known to its tracker by its run_id, so a resumed run continues its curves.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffvit.errors import UserError, first_line, redacted
from diffvit.ledger.log import Step
from diffvit.ledger.spec import RunSpec

# Tracker -> the package that it needs. Trackio is not among them: it wants an older Pillow.
TRACKERS = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}

PROJECT = "diffvit"

# The end of a run waits so long for what its tracker has not sent yet.
_SECONDS_TO_FINISH = 30.0
# A run that is stopped has a state to send, and is killed soon.
_SECONDS_TO_STOP = 2.0


@dataclass(frozen=True)
class Tracking:
    """Which tracker runs are sent to.

    Attributes:
        tracker: a key of TRACKERS; None: none.
        dollars_per_second: of a run's share of a device, for its cost; None if no price is known.
    """

    tracker: str | None = None
    dollars_per_second: float | None = None


NO_TRACKING = Tracking()


@dataclass(frozen=True)
class TrackedRun:
    """A run as a tracker shows it.

    Attributes:
        folder: where trackers keep their files, in the checkpoints folder.
        config: the run's names and protocol; text, numbers and booleans.
        resumed_at: the step that it resumes from; later steps will come again.
    """

    folder: Path
    run_id: str
    config: Mapping[str, Any]
    resumed_at: int = 0
    dollars_per_second: float | None = None

    @staticmethod
    def of(spec: RunSpec, run_id: str, checkpoints: Path, resumed_at: int, tracking: Tracking) -> TrackedRun:
        """The run that a specification names."""
        config = {**spec.names(run_id), **spec.protocol.identity(spec.size)}
        return TrackedRun(checkpoints / "tracking", run_id, config, resumed_at, tracking.dollars_per_second)

    @property
    def name(self) -> str:
        """For a list of runs; conditions of a study share it."""
        return f"{self.config['model']}_{self.config['size']}_{self.config['dataset']}_seed{self.config['seed']}"

    @property
    def tags(self) -> list[str]:
        """What runs are searched by."""
        return [str(self.config[key]) for key in ("model", "size", "dataset")]

    def numbers(self, step: Step) -> dict[str, float]:
        """What is drawn of a step."""
        numbers = {name: float(value) for name, value in step.columns.items() if name not in ("step", "seconds")}
        numbers["images_per_second"] = step.images_per_second(self.config["batch_size"])
        if self.dollars_per_second is not None:
            numbers["dollars"] = step.seconds * self.dollars_per_second
        return numbers


def check_tracker(name: str | None) -> None:
    """Raises UserError where the tracker's package is not installed."""
    package = TRACKERS.get(name or "")
    if package and importlib.util.find_spec(package) is None:
        sentence = f"--track {name} needs the package {package}, which is not installed."
        raise UserError(sentence, f"install it with: uv sync --extra {name}")
    if name == "mlflow" and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise UserError("--track mlflow has no server.", "export MLFLOW_TRACKING_URI, the address of one.")


class Tracker(ABC):
    """One run at one tracker; its methods may raise anything, and are called by one thread."""

    @abstractmethod
    def log(self, steps: list[tuple[int, dict[str, float]]]) -> None:
        """Steps and their numbers, in order."""

    @abstractmethod
    def finish(self, outcome: Mapping[str, float]) -> None:
        """Numbers of the finished run, such as test_accuracy; empty where it only stopped."""


class _TensorBoard(Tracker):
    def __init__(self, run: TrackedRun):
        from tensorboardX import SummaryWriter

        folder = run.folder / "tensorboard" / f"{run.name}_{run.run_id}"
        resumed: dict[str, Any] = {"purge_step": run.resumed_at + 1} if run.resumed_at else {}
        # A file is named after the second of its creation, which two tries may share.
        self._writer = SummaryWriter(str(folder), filename_suffix=f".{run.resumed_at}", **resumed)
        if not run.resumed_at:
            rows = "\n".join(f"| {name} | {value} |" for name, value in run.config.items())
            self._writer.add_text("config", f"| name | value |\n|---|---|\n{rows}")

    def log(self, steps: list[tuple[int, dict[str, float]]]) -> None:
        for step, numbers in steps:
            for name, value in numbers.items():
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def finish(self, outcome: Mapping[str, float]) -> None:
        for name, value in outcome.items():
            self._writer.add_scalar(f"final/{name}", value, 0)
        self._writer.close()


class _WandB(Tracker):
    def __init__(self, run: TrackedRun):
        import wandb

        folder = run.folder / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        settings = wandb.Settings(silent=True, console="off", reinit="create_new")
        self._run = wandb.init(
            project=project, id=run.run_id, name=run.name, resume="allow", dir=str(folder), config=dict(run.config), tags=run.tags,
            settings=settings,
        )  # fmt: skip

    def log(self, steps: list[tuple[int, dict[str, float]]]) -> None:
        for step, numbers in steps:
            self._run.log(numbers, step=step)

    def finish(self, outcome: Mapping[str, float]) -> None:
        self._run.summary.update(dict(outcome))
        self._run.finish()


class _MLflow(Tracker):
    def __init__(self, run: TrackedRun):
        from mlflow import MlflowClient

        self._client = MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        number = self._experiment(name)
        known = self._client.search_runs([number], f"tags.run_id = '{run.run_id}'")
        tags = {"run_id": run.run_id, **{key: str(run.config[key]) for key in ("model", "size", "dataset")}}
        self._id = (known[0] if known else self._client.create_run(number, run_name=run.name, tags=tags)).info.run_id
        if known:
            self._client.update_run(self._id, status="RUNNING")
        else:
            for key, value in run.config.items():
                self._client.log_param(self._id, key, value)

    def _experiment(self, name: str) -> str:
        """The experiment's id; created where it is not there."""
        if experiment := self._client.get_experiment_by_name(name):
            return experiment.experiment_id
        try:
            return self._client.create_experiment(name)
        except Exception:
            if experiment := self._client.get_experiment_by_name(name):  # a run that began at the same time created it
                return experiment.experiment_id
            raise

    def log(self, steps: list[tuple[int, dict[str, float]]]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for step, numbers in steps for name, value in numbers.items()]
        for begin in range(0, len(metrics), 1000):  # the most that its servers take at once
            self._client.log_batch(self._id, metrics[begin : begin + 1000])

    def finish(self, outcome: Mapping[str, float]) -> None:
        for name, value in outcome.items():
            self._client.log_metric(self._id, name, value)
        self._client.set_terminated(self._id)


_CLASSES: dict[str, Callable[[TrackedRun], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "mlflow": _MLflow,
}


def open_tracker(name: str, run: TrackedRun) -> Tracker:
    """A run at the tracker of that name. Raises whatever the tracker raises."""
    return _CLASSES[name](run)


class Curves:
    """What a run hands to its tracker."""

    def __init__(self, run: TrackedRun):
        self._run = run
        self.queue: queue.SimpleQueue[list[tuple[int, dict[str, float]]] | None] = queue.SimpleQueue()
        self.outcome: dict[str, float] = {}
        self.failure: str | None = None

    def steps(self, steps: list[Step]) -> None:
        """Hand on some steps."""
        self.queue.put([(step.step, self._run.numbers(step)) for step in steps])

    def end(self, outcome: Mapping[str, Any]) -> None:
        """Hand on the numbers of the finished run."""
        self.outcome = {name: float(value) for name, value in outcome.items() if isinstance(value, (int, float))}


@contextlib.contextmanager
def tracked(name: str | None, run: TrackedRun, on_failure: Callable[[str], None]) -> Iterator[Curves | None]:
    """A run's curves at a tracker while the block runs; None where no tracker is named.

    Args:
        on_failure: called with a sentence, once and by the caller's thread, where the tracker has failed.
    """
    if name is None:
        yield None
        return
    curves = Curves(run)

    def work() -> None:
        tracker = None
        try:
            tracker = open_tracker(name, run)
            while (steps := curves.queue.get()) is not None:
                tracker.log(steps)
            tracker.finish(curves.outcome)
        except BaseException as error:  # a tracker's own exits too
            if tracker:  # else the process's next run would go into this one
                with contextlib.suppress(BaseException):
                    tracker.finish({})
            curves.failure = f"{name} has failed, and is left out: {redacted(first_line(error))}"

    thread = threading.Thread(target=work, name=f"track-{name}", daemon=True)
    thread.start()
    patience = _SECONDS_TO_STOP
    try:
        yield curves
        patience = _SECONDS_TO_FINISH
    finally:
        curves.queue.put(None)
        thread.join(patience)
        if thread.is_alive():
            curves.failure = f"{name} had not received everything {patience:.0f} s after the last step"
        if curves.failure:
            on_failure(curves.failure)
