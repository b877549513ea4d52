"""Schedules runs: a Ray Tune grid of trials, each a Ray Train TorchTrainer around the shared loop.

One worker: the trainer is in local mode, the trial's process trains, and actors are reused from run to run.
Several workers: the trainer starts a worker group, and the trial only waits for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import shutil
import uuid
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

from diffvit.ledger import RunSpec
from diffvit.log import Step
from diffvit.train import train
from study.cluster import Cluster
from study.plan import PlannedRun

# What a trial that only waits for its workers takes of a CPU, and what is left for each worker.
_WAITING_CPU = 0.01


@dataclass(frozen=True)
class Settings:
    """How runs are placed and computed; nothing here changes a result beyond rounding.

    Attributes:
        checkpoints: absolute path of the ledger.
        gpus_per_run: of each worker; a fraction lets runs share a GPU. 0: train on CPUs.
        cpus_per_run: of each worker; on a CPU this is its number of threads.
        workers: processes that train one run together.
    """

    checkpoints: str
    data_root: str | None = None
    gpus_per_run: float = 0.0
    cpus_per_run: int = 1
    workers: int = 1
    micro_batch: int | None = None
    deterministic: bool = False


def slots(cluster: Cluster, settings: Settings) -> int:
    """How many runs train at a time on the cluster."""
    by_cpu = cluster.cpus // (settings.cpus_per_run * settings.workers)
    by_gpu = cluster.gpus / (settings.gpus_per_run * settings.workers) if settings.gpus_per_run else by_cpu
    return int(min(by_cpu, by_gpu + 1e-9))


def run_all(runs: list[PlannedRun], settings: Settings, cluster: Cluster, callback: Callback) -> ResultGrid:
    """Train the runs, longest first. A run that fails does not stop the others.

    Args:
        callback: hears of every report and every end, in this process.

    Returns:
        A result for each run; each's last metrics hold the run's outcome, or its error is set.
    """
    longest_first = sorted(runs, key=lambda run: run.train_flops, reverse=True)
    state = Path(settings.checkpoints) / ".state" / f"tune-{uuid.uuid4().hex[:8]}"
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # Tune prints a banner; stdout is for results
            return _tuner(longest_first, state, settings, cluster, callback).fit()
    finally:
        # The ledger is the checkpoints folder; Tune's own record of the experiment is not kept.
        shutil.rmtree(state, ignore_errors=True)


def _tuner(runs: list[PlannedRun], state: Path, settings: Settings, cluster: Cluster, callback: Callback) -> Tuner:
    return Tuner(
        tune.with_resources(_trial, _trial_resources(settings)),
        param_space={
            "spec": tune.grid_search([dataclasses.asdict(run.spec) for run in runs]),
            "settings": dataclasses.asdict(settings),
        },
        tune_config=TuneConfig(
            max_concurrent_trials=slots(cluster, settings),
            reuse_actors=settings.workers == 1,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(storage_path=str(state.parent), name=state.name, verbose=0, callbacks=[callback]),
    )


def _trial_resources(settings: Settings) -> dict[str, float]:
    if settings.workers > 1:
        return {"CPU": _WAITING_CPU}
    return {"CPU": settings.cpus_per_run, **({"GPU": settings.gpus_per_run} if settings.gpus_per_run else {})}


def _trial_name(trial: Any) -> str:
    spec = RunSpec(**trial.config["spec"])
    return f"{spec.model}_{spec.size}_{spec.dataset}_seed{spec.seed}_{trial.trial_id}"


def _trial(config: dict[str, Any]) -> None:
    """One Tune trial: a TorchTrainer around the loop."""
    settings = Settings(**config["settings"])
    if settings.workers == 1:
        scaling, run_config = ScalingConfig(num_workers=0, use_gpu=settings.gpus_per_run > 0), None
    else:
        per_worker = {"CPU": settings.cpus_per_run - _WAITING_CPU, "GPU": settings.gpus_per_run}
        scaling = ScalingConfig(
            num_workers=settings.workers,
            use_gpu=settings.gpus_per_run > 0,
            resources_per_worker={name: amount for name, amount in per_worker.items() if amount},
        )
        run_config = ray_train.RunConfig(storage_path=tune.get_context().get_trial_dir(), name="workers", callbacks=[TuneReportCallback()])
    TorchTrainer(_worker, train_loop_config=config, scaling_config=scaling, run_config=run_config).fit()


def _worker(config: dict[str, Any]) -> None:
    """One training process: the shared loop, told where to report."""
    settings, spec = Settings(**config["settings"]), RunSpec(**config["spec"])
    alone = settings.workers == 1
    report = tune.report if alone else ray_train.report
    if not settings.gpus_per_run:
        torch.set_num_threads(settings.cpus_per_run)

    def on_steps(steps: list[Step], total: int) -> None:
        if alone:  # a worker group reports together, and only its first process hears of steps
            last = steps[-1]
            report({**last._asdict(), "total_steps": total, "images_per_second": _pace(spec, last)})

    result = train(
        spec,
        Path(settings.checkpoints),
        data_root=settings.data_root,
        device=(None if settings.gpus_per_run else "cpu") if alone else get_device(),
        micro_batch=settings.micro_batch,
        memory_share=_memory_share(settings),
        deterministic=settings.deterministic,
        on_steps=on_steps,
    )
    # The outcome, flat, as Tune keeps it.
    report({key: value for key, value in result.items() if isinstance(value, (str, int, float, bool))})


def _pace(spec: RunSpec, last: Step) -> float:
    return last.step * spec.protocol.batch_size / max(last.seconds, 1e-9)


def _memory_share(settings: Settings) -> float:
    """The part of its device's memory that a run may count on."""
    if settings.gpus_per_run:
        return min(settings.gpus_per_run, 1.0)
    return min(1.0, settings.cpus_per_run / (os.cpu_count() or 1))
