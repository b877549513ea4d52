"""Schedules runs: a Ray Tune grid of trials, each a Ray Train TorchTrainer around the shared loop.

One worker: the trainer is in local mode, the trial's process trains, and actors are reused from run to run.
Several workers: the trainer starts a worker group, and the trial only waits for it.

A run that dies is tried again, from its last state, after a pause that grows; one that dies three times at the same step has
failed. To stop a study, its stop file is made: every run saves its state and ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import study.cluster  # noqa: F401  (sets what Ray reads when it is imported)

# isort: split
import torch
from ray import train as ray_train
from ray import tune
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer, get_device
from ray.tune import Callback, ResultGrid, TuneConfig, Tuner
from ray.tune.integration.ray_train import TuneReportCallback

from diffvit.errors import UserError
from diffvit.ledger import RunFiles, RunSpec
from diffvit.log import Step
from diffvit.signals import StopSignals
from diffvit.state import StateFolder
from diffvit.train import SAVE_EVERY, RunIsBusyError, Stopped, train
from study.cluster import Cluster
from study.plan import PlannedRun

# What a trial that only waits for its workers takes of a CPU, and what is left for each worker.
_WAITING_CPU = 0.01

# What Tune logs of a failed try is a traceback of its own; the study reports the run's reason.
logging.getLogger("ray.tune").setLevel(logging.CRITICAL)

# A run that dies this often at the same step has failed. The pause before a try doubles from a second to a minute.
_TRIES = 3
_LONGEST_PAUSE = 60.0
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Settings:
    """How runs are placed and computed; nothing here changes a result beyond rounding.

    Attributes:
        checkpoints: absolute path of the ledger.
        gpus_per_run: of each worker; a fraction lets runs share a GPU. 0: train on CPUs.
        cpus_per_run: of each worker; on a CPU this is its number of threads.
        workers: processes that train one run together.
        save_every: seconds between two resume states.
        stop_file: when it appears, runs save their state and end.
    """

    checkpoints: str
    data_root: str | None = None
    gpus_per_run: float = 0.0
    cpus_per_run: int = 1
    workers: int = 1
    micro_batch: int | None = None
    deterministic: bool = False
    save_every: float = SAVE_EVERY
    stop_file: str | None = None


def slots(cluster: Cluster, settings: Settings) -> int:
    """How many runs train at a time on the cluster."""
    by_cpu = cluster.cpus // (settings.cpus_per_run * settings.workers)
    by_gpu = cluster.gpus / (settings.gpus_per_run * settings.workers) if settings.gpus_per_run else by_cpu
    return int(min(by_cpu, by_gpu + 1e-9))


def run_all(runs: list[PlannedRun], settings: Settings, cluster: Cluster, callback: Callback) -> tuple[ResultGrid, int | None]:
    """Train the runs, longest first. A run that fails does not stop the others.

    Args:
        callback: hears of every report and every end, in this process.

    Returns:
        A result for each run, whose last metrics hold the run's outcome or, under "failed", why it has none; and the exit code if a
        signal ended the study.
    """
    longest_first = sorted(runs, key=lambda run: run.train_flops, reverse=True)
    state = Path(settings.checkpoints) / ".state" / f"tune-{uuid.uuid4().hex[:8]}"
    stop_file = state.with_suffix(".stop")
    settings = dataclasses.replace(settings, stop_file=str(stop_file))
    for run in runs:
        _attempts_file(settings, str(run.run_id)).unlink(missing_ok=True)
    try:
        with (
            StopSignals(on_first=stop_file.touch) as signals,
            contextlib.redirect_stdout(io.StringIO()),  # Tune prints a banner; stdout is for results
        ):
            results = _tuner(longest_first, state, settings, cluster, callback).fit()
        return results, signals.exit_code if signals.seen() else None
    finally:
        # The ledger is the checkpoints folder; Tune's own record of the experiment is not kept.
        shutil.rmtree(state, ignore_errors=True)
        stop_file.unlink(missing_ok=True)


def _tuner(runs: list[PlannedRun], state: Path, settings: Settings, cluster: Cluster, callback: Callback) -> Tuner:
    return Tuner(
        tune.with_resources(_trial, _trial_resources(settings)),
        param_space={
            "run": tune.grid_search([{"spec": dataclasses.asdict(run.spec), "run_id": run.run_id} for run in runs]),
            "settings": dataclasses.asdict(settings),
        },
        tune_config=TuneConfig(
            max_concurrent_trials=slots(cluster, settings),
            reuse_actors=settings.workers == 1,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            storage_path=str(state.parent),
            name=state.name,
            verbose=0,
            callbacks=[callback],
            failure_config=tune.FailureConfig(max_failures=-1),
        ),
    )


def _trial_resources(settings: Settings) -> dict[str, float]:
    if settings.workers > 1:
        return {"CPU": _WAITING_CPU}
    return {"CPU": settings.cpus_per_run, **({"GPU": settings.gpus_per_run} if settings.gpus_per_run else {})}


def _trial_name(trial: Any) -> str:
    spec = RunSpec(**trial.config["run"]["spec"])
    return f"{spec.model}_{spec.size}_{spec.dataset}_seed{spec.seed}_{trial.trial_id}"


def _trial(config: dict[str, Any]) -> None:
    """One Tune trial: tries of a run, until it is done, stopped or given up."""
    settings, spec, run_id = Settings(**config["settings"]), RunSpec(**config["run"]["spec"]), config["run"]["run_id"]
    should_stop = _should_stop(settings)
    reason = "its process died"
    while not should_stop():
        tries = _count_try(settings, run_id)
        if tries > _TRIES:
            failed = f"{reason} ({_TRIES} times at the same step){_last_lines(settings, spec, run_id)}"
            tune.report({"run_id": run_id, "failed": failed})
            return
        if tries > 1:
            time.sleep(min(2.0 ** (tries - 2), _LONGEST_PAUSE))
        try:
            _trainer(config, settings).fit()
            return
        except UserError as error:  # no try will change it
            tune.report({"run_id": run_id, "failed": str(error)})
            return
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]


def _trainer(config: dict[str, Any], settings: Settings) -> TorchTrainer:
    """A TorchTrainer around the loop."""
    if settings.workers == 1:
        scaling, run_config = ScalingConfig(num_workers=0, use_gpu=settings.gpus_per_run > 0), None
    else:
        per_worker = {"CPU": settings.cpus_per_run - _WAITING_CPU, "GPU": settings.gpus_per_run}
        scaling = ScalingConfig(
            num_workers=settings.workers,
            use_gpu=settings.gpus_per_run > 0,
            resources_per_worker={name: amount for name, amount in per_worker.items() if amount},
        )
        name = f"workers-{uuid.uuid4().hex[:8]}"
        run_config = ray_train.RunConfig(storage_path=tune.get_context().get_trial_dir(), name=name, callbacks=[TuneReportCallback()])
    return TorchTrainer(_worker, train_loop_config=config, scaling_config=scaling, run_config=run_config)


def _worker(config: dict[str, Any]) -> None:
    """One training process: the shared loop, told where to report."""
    settings, spec = Settings(**config["settings"]), RunSpec(**config["run"]["spec"])
    alone = settings.workers == 1
    report = tune.report if alone else ray_train.report
    if not settings.gpus_per_run:
        torch.set_num_threads(settings.cpus_per_run)

    def on_steps(steps: list[Step], total: int) -> None:
        if alone:  # a worker group reports together, and only its first process hears of steps
            last = steps[-1]
            report({**last._asdict(), "total_steps": total, "images_per_second": _pace(spec, last)})

    should_stop = _should_stop(settings)
    while not should_stop():
        try:
            result = train(
                spec,
                Path(settings.checkpoints),
                data_root=settings.data_root,
                device=(None if settings.gpus_per_run else "cpu") if alone else get_device(),
                micro_batch=settings.micro_batch,
                memory_share=_memory_share(settings),
                deterministic=settings.deterministic,
                on_steps=on_steps,
                save_every=settings.save_every,
                should_stop=should_stop,
            )
        except RunIsBusyError:  # another study trains it: its result will be ours
            time.sleep(_POLL_SECONDS)
        except Stopped:
            return
        else:
            # The outcome, flat, as Tune keeps it.
            report({key: value for key, value in result.items() if isinstance(value, (str, int, float, bool))})
            return


def _should_stop(settings: Settings) -> Callable[[], bool]:
    """Whether the study's stop file is there, looked up twice a second at most."""
    looked, there = float("-inf"), False

    def should_stop() -> bool:
        nonlocal looked, there
        if settings.stop_file and time.monotonic() - looked >= _POLL_SECONDS:
            looked, there = time.monotonic(), Path(settings.stop_file).exists()
        return there

    return should_stop


def _attempts_file(settings: Settings, run_id: str) -> Path:
    return StateFolder(Path(settings.checkpoints), run_id).path / "attempts"


def _count_try(settings: Settings, run_id: str) -> int:
    """Notes a try and returns how many there have been from the same step, this one included."""
    path = _attempts_file(settings, run_id)
    step = next(iter(StateFolder(Path(settings.checkpoints), run_id).steps()), 0)
    before = path.read_text().split() if path.is_file() else []
    same = list(itertools.takewhile(lambda noted: noted == str(step), reversed(before)))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(f"{step}\n")
    return len(same) + 1


def _last_lines(settings: Settings, spec: RunSpec, run_id: str) -> str:
    """The end of a run's log, for the report of its failure."""
    try:
        lines = RunFiles.of(Path(settings.checkpoints), spec, run_id).log.read_text().splitlines()
    except OSError:
        return ""
    return "; its log ends: " + " | ".join(lines[-3:])


def _pace(spec: RunSpec, last: Step) -> float:
    return last.step * spec.protocol.batch_size / max(last.seconds, 1e-9)


def _memory_share(settings: Settings) -> float:
    """The part of its device's memory that a run may count on."""
    if settings.gpus_per_run:
        return min(settings.gpus_per_run, 1.0)
    return min(1.0, settings.cpus_per_run / (os.cpu_count() or 1))
