"""Schedules runs: a Ray Tune grid of trials, each a Ray Train TorchTrainer around the shared loop.

One worker: the trainer is in local mode, the trial's process trains, and actors are reused from run to run.
Several workers: the trainer starts a worker group, and the trial only waits for it.

A run that dies is tried again, from its last state, after a pause that grows; one that dies three times at the same step has
failed. A run that another study or machine trains is left to the end and then looked at again. To stop a study, its stop flag is
set: every run saves its state and ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import logging
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import study.cluster  # noqa: F401  (sets what Ray reads when it is imported)

# isort: split
import ray
import torch
from ray import train as ray_train
from ray import tune
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer, get_device
from ray.tune import Callback, ResultGrid, TuneConfig, Tuner
from ray.tune.integration.ray_train import TuneReportCallback

from diffvit.compute import DEFAULT_COMPUTE, Compute
from diffvit.data.user_datasets import UserDataset, register
from diffvit.dataset import load
from diffvit.errors import DiffvitError, RunIsBusyError, StorageError, UserError, first_line, redacted
from diffvit.keeping.keeper import RunKeeper
from diffvit.keeping.saving import DEFAULT_SAVING, Saving
from diffvit.keeping.state import StateFolder
from diffvit.ledger.files import RunFiles
from diffvit.ledger.log import Step
from diffvit.ledger.spec import RunSpec
from diffvit.loop.fit import Stopped
from diffvit.protocol import Protocol
from diffvit.signals import StopSignals
from diffvit.tracking import Tracking
from diffvit.train import train
from study.cluster.connect import Cluster
from study.cluster.display import StudyDisplay
from study.cluster.metrics import RunGauges
from study.cluster.nodes import make_stop_flag
from study.placement import Placement
from study.plan import PlannedRun

# What a trial that only waits for its workers takes of a CPU, and what is left for each worker.
_WAITING_CPU = 0.01

# What Tune logs of a failed try is a traceback of its own; the study reports the run's reason.
logging.getLogger("ray.tune").setLevel(logging.CRITICAL)

# A run that dies this often at the same step has failed; a disk that fails is given a minute more, and a storage that does not answer
# is from then on not waited for. The pause before a try doubles from a second to a minute. Tune starts a trial again whose process
# died, at most so often.
_TRIES = 3
_STORAGE_TRIES = 7
_LONGEST_PAUSE = 60.0
_MOST_DEATHS = 100
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Settings:
    """How runs are placed, computed and saved; nothing here changes a result beyond rounding.

    Attributes:
        checkpoints: absolute path of the ledger.
        compute: but for its memory_share, which follows from the placement.
        user_datasets: definitions of grid files, which a worker's process has to know.
        study: a name for this execution of a study.
    """

    checkpoints: Path
    data_root: str | None = None
    placement: Placement = field(default_factory=Placement)
    compute: Compute = DEFAULT_COMPUTE
    saving: Saving = DEFAULT_SAVING
    tracker: str | None = None
    user_datasets: tuple[tuple[UserDataset, Protocol], ...] = ()
    study: str = field(default_factory=lambda: uuid.uuid4().hex[:8])

    def know_data(self) -> None:
        """Make the data sets that grid files define known to this process."""
        for dataset, protocol in self.user_datasets:
            register(dataset, protocol)

    def data_folders(self) -> list[str]:
        """The folders that every node must have."""
        return [*filter(None, [self.data_root, *(dataset.folder for dataset, _ in self.user_datasets)])]


def run_all(
    runs: list[PlannedRun], settings: Settings, cluster: Cluster, display: StudyDisplay, wait_for_others: bool = True
) -> tuple[dict[str, dict[str, Any]], int | None]:
    """Train the runs, longest first. A run that fails does not stop the others.

    Args:
        display: receives every report and every end, in this process.
        wait_for_others: wait until runs that another machine trains have ended or been abandoned.

    Returns:
        run_id -> the run's last report, which holds its outcome or, under "failed", why it has none; and the exit code if a signal ended
        the study.
    """
    record = Path(tempfile.mkdtemp(prefix="diffvit-tune-"))
    pending = sorted(runs, key=lambda run: run.train_flops, reverse=True)
    reports: dict[str, dict[str, Any]] = {}
    try:
        with StopSignals(display.stop) as signals, contextlib.redirect_stdout(io.StringIO()):  # Tune prints a banner; stdout is for results
            stop_flag = make_stop_flag()
            callbacks = [display, _PassOnStop(signals, stop_flag)]
            while pending and not signals.seen():
                reports |= _reports(_tuner(pending, record, settings, cluster, callbacks, stop_flag).fit())
                busy = [run for run in pending if reports.get(str(run.run_id), {}).get("busy")]
                pending = _when_one_is_free(busy, settings, signals) if wait_for_others else []
        return reports, signals.exit_code if signals.seen() else None
    finally:
        # The ledger is the checkpoints folder; Tune's own record of the experiment is not kept.
        shutil.rmtree(record, ignore_errors=True)
        shutil.rmtree(_tries_folder(settings), ignore_errors=True)


class _PassOnStop(Callback):
    """Sets the stop flag after a signal, repeatedly: the flag's process may have died."""

    def __init__(self, signals: StopSignals, stop_flag: Any):
        self._signals, self._stop_flag = signals, stop_flag

    def __getstate__(self) -> dict:
        return {}  # as StudyDisplay

    def on_step_begin(self, iteration: int, trials: list, **info: Any) -> None:
        if self._signals.seen():
            self._stop_flag.set.remote()


def _reports(results: ResultGrid) -> dict[str, dict[str, Any]]:
    reports = {}
    for result in results:
        if result.config:
            failed = {"failed": _reason(result.error)} if result.error else {}
            reports[result.config["run"]["run_id"]] = {**(result.metrics or {}), **failed}
    return reports


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in redacted(str(getattr(error, "cause", None) or error)).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


def _when_one_is_free(runs: list[PlannedRun], settings: Settings, signals: StopSignals) -> list[PlannedRun]:
    """Wait until one of the runs is free. Returns those that have not ended."""
    pause = 10.0 if settings.saving.storage else 1.0
    while runs and not signals.seen():
        left = []
        for run in runs:
            files = RunFiles.of(settings.checkpoints, run.spec, str(run.run_id))
            try:
                with RunKeeper(files, settings.saving) as keeper:
                    if keeper.result is None:
                        return runs
            except (RunIsBusyError, StorageError):
                left.append(run)
        runs = left
        wait_until = time.monotonic() + pause
        while runs and time.monotonic() < wait_until and not signals.seen():
            time.sleep(_POLL_SECONDS)
    return []


def _tuner(runs: list[PlannedRun], record: Path, settings: Settings, cluster: Cluster, callbacks: list[Callback], stop_flag: Any) -> Tuner:
    return Tuner(
        tune.with_resources(_trial, _trial_resources(settings.placement)),
        param_space={
            # Tune names a trial while objects in its config are placeholders still.
            "run": tune.grid_search([{"spec": run.spec, "run_id": run.run_id, "name": _name(run.spec)} for run in runs]),
            "settings": settings,
            "stop_flag": stop_flag,
        },
        tune_config=TuneConfig(
            # Trials that wait for workers must not take what these need; others are held back by what they take.
            max_concurrent_trials=settings.placement.slots(cluster) if settings.placement.workers > 1 else None,
            reuse_actors=settings.placement.workers == 1,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            storage_path=str(record),
            name=f"study-{uuid.uuid4().hex[:8]}",
            verbose=0,
            callbacks=callbacks,
            failure_config=tune.FailureConfig(max_failures=_MOST_DEATHS),
        ),
    )


def _trial_resources(placement: Placement) -> dict[str, float]:
    return {"CPU": _WAITING_CPU} if placement.workers > 1 else placement.worker_resources()


def _name(spec: RunSpec) -> str:
    return f"{spec.model}_{spec.size}_{spec.dataset}_seed{spec.seed}"


def _trial_name(trial: Any) -> str:
    return f"{trial.config['run']['name']}_{trial.trial_id}"


def _trial(config: dict[str, Any]) -> None:
    """One Tune trial: tries of a run, until it has ended, is stopped or given up."""
    settings, spec, run_id = config["settings"], config["run"]["spec"], config["run"]["run_id"]
    should_stop = _should_stop(config["stop_flag"])
    tries = _Tries(settings, run_id)
    reason, limit = "its process died", _TRIES
    while not should_stop():
        number = tries.count()
        if number > limit:
            failed = f"{reason} ({limit} times at the same step){_last_lines(settings, spec, run_id)}"
            tune.report({"run_id": run_id, "failed": failed})
            return
        if number > 1:
            time.sleep(min(2.0 ** (number - 2), _LONGEST_PAUSE))
        try:
            _trainer(_of_try(config, number), settings.placement).fit()
            tries.forget()  # done, stopped, or somebody else has the run
            return
        except Exception as error:
            cause = _cause(error)
            if isinstance(cause, StorageError):
                reason, limit = str(cause), _STORAGE_TRIES
            elif isinstance(cause, (UserError, RunIsBusyError)):  # no try will change it
                tune.report({"run_id": run_id, "failed": str(cause)})
                return
            else:
                reason, limit = f"{type(cause).__name__}: {first_line(cause)}", _TRIES


def _cause(error: Exception) -> BaseException:
    """The error that ended a run; of a group, its workers' first error of ours, not what follows from it in the others."""
    failures: list[BaseException] = list(getattr(error, "worker_failures", {}).values())
    return next((failure for failure in failures if isinstance(failure, DiffvitError)), error)


def _of_try(config: dict[str, Any], number: int) -> dict[str, Any]:
    """A run's config for its first, second, … try."""
    settings = config["settings"]
    saving = dataclasses.replace(settings.saving, needs_storage=number <= _TRIES)
    return {**config, "settings": dataclasses.replace(settings, saving=saving)}


def _trainer(config: dict[str, Any], placement: Placement) -> TorchTrainer:
    """A TorchTrainer around the loop."""
    use_gpu = bool(placement.gpus_per_run)
    if placement.workers == 1:
        scaling, run_config = ScalingConfig(num_workers=0, use_gpu=use_gpu), None
    else:
        scaling = ScalingConfig(
            num_workers=placement.workers,
            use_gpu=use_gpu,
            resources_per_worker=placement.worker_resources(placement.cpus_per_run - _WAITING_CPU),
        )
        name = f"workers-{uuid.uuid4().hex[:8]}"
        run_config = ray_train.RunConfig(storage_path=tune.get_context().get_trial_dir(), name=name, callbacks=[TuneReportCallback()])
    return TorchTrainer(_worker, train_loop_config=config, scaling_config=scaling, run_config=run_config)


def _worker(config: dict[str, Any]) -> None:
    """One training process: the shared loop, which reports to Tune."""
    settings, spec = config["settings"], config["run"]["spec"]
    settings.know_data()
    placement: Placement = settings.placement
    alone = placement.workers == 1
    report = tune.report if alone else ray_train.report
    if not placement.gpus_per_run:
        torch.set_num_threads(placement.cpus_per_run)

    gauges = RunGauges(spec, config["run"]["run_id"], placement.dollars_per_second)

    def on_steps(steps: list[Step], total: int) -> None:
        last = steps[-1]
        numbers = {**last.columns, "total_steps": total, "images_per_second": last.images_per_second(spec.protocol.batch_size)}
        gauges.set(numbers)
        if alone:  # a worker group must report together, and only its first process has the steps
            report(numbers)

    on_phase = (lambda phase, step: report({"phase": phase, "step": step})) if alone else None
    try:
        if on_phase:
            on_phase(f"loading {spec.dataset}", None)
        load(spec.dataset, settings.data_root)  # once a process, and no part of a run's time
        start = time.perf_counter()
        result = train(
            spec,
            settings.checkpoints,
            data_root=settings.data_root,
            device=(None if placement.gpus_per_run else "cpu") if alone else get_device(),
            compute=dataclasses.replace(settings.compute, memory_share=placement.memory_share),
            on_steps=on_steps,
            on_phase=on_phase,
            saving=settings.saving,
            tracking=Tracking(settings.tracker, placement.dollars_per_second),
            should_stop=_should_stop(config["stop_flag"]),
        )
    except Stopped:
        return
    except RunIsBusyError:
        report({"run_id": config["run"]["run_id"], "busy": True})
        return
    # The outcome, flat, as Tune keeps it, and what the whole run took this process.
    content = result.content() if result else {"run_id": config["run"]["run_id"]}
    outcome = {key: value for key, value in content.items() if isinstance(value, (str, int, float, bool))}
    report({**outcome, "run_seconds": time.perf_counter() - start})


def _should_stop(stop_flag: Any) -> Callable[[], bool]:
    """Whether the study's stop flag is set, asked twice a second at most."""
    looked, is_set = float("-inf"), False

    def should_stop() -> bool:
        nonlocal looked, is_set
        if not is_set and time.monotonic() - looked >= _POLL_SECONDS:
            with contextlib.suppress(ray.exceptions.RayError):  # its process has died and is being started again
                is_set = ray.get(stop_flag.is_set.remote(), timeout=2)
            looked = time.monotonic()
        return is_set

    return should_stop


def _tries_folder(settings: Settings) -> Path:
    return settings.checkpoints / ".state" / f"tries-{settings.study}"


class _Tries:
    """Counts a run's tries from the same step: in a file, which outlives the process, and in memory, in case the disk is full."""

    def __init__(self, settings: Settings, run_id: str):
        self._file = _tries_folder(settings) / run_id
        self._states = StateFolder(settings.checkpoints, run_id)
        self._noted: list[str] = []

    def count(self) -> int:
        """Record a try. Returns how many there have been from the same step, this one included."""
        step = str(next(iter(self._states.steps()), 0))
        with contextlib.suppress(OSError):
            self._noted = max(self._noted, self._file.read_text(errors="replace").split(), key=len)
        self._noted.append(step)
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.write_text("\n".join(self._noted))
        return len(list(itertools.takewhile(step.__eq__, reversed(self._noted))))

    def forget(self) -> None:
        """Forget the tries: this one did not die."""
        self._noted.clear()
        self._file.unlink(missing_ok=True)


def _last_lines(settings: Settings, spec: RunSpec, run_id: str) -> str:
    """The end of a run's log, for the report of its failure."""
    try:
        lines = RunFiles.of(settings.checkpoints, spec, run_id).log.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return "; its log ends: " + " | ".join(lines[-3:])
