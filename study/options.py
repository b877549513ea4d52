"""The options of `run.py study` and `run.py plan`, and how they are resolved."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from diffvit.errors import UserError
from diffvit.keeping.saving import DEFAULT_SAVING, Saving
from diffvit.ledger.spec import RunSpec, overrides_text
from study.grid import Grid
from study.text import say

if TYPE_CHECKING:
    from diffvit.compute import Compute
    from study.cluster.connect import Cluster
    from study.cluster.runner import Settings
    from study.shard import Shard


@dataclass(frozen=True)
class StudyOptions:
    """The command line of `study`, parsed. `command` is how the user typed it."""

    grid: Grid
    checkpoints: Path
    seeds: int | None = None
    epochs: int | None = None
    data_root: str | None = None
    address: str | None = None
    dashboard: bool = True
    gpus_per_run: float | None = None
    cpus_per_run: int = 1
    workers: int = 1
    resources: Mapping[str, float] = field(default_factory=dict)
    precision: str = "auto"
    micro_batch: int | None = None
    deterministic: bool = False
    fused: bool | None = None
    graphs: bool | None = None
    compile: bool | None = None
    recompute: bool | None = None
    saving: Saving = DEFAULT_SAVING
    shard: Shard | None = None
    price: float | None = None
    command: str = "run.py study"

    def runs(self, precision: str) -> list[RunSpec]:
        """The grid's runs with this command's overrides."""
        return self.grid.runs(precision, self.seeds, {"epochs": self.epochs})

    @property
    def name(self) -> str:
        """What the study's tables are called: its grid and this command's overrides. Not its seeds, since the tables have all there are."""
        return named_after(self.grid.name, [self.grid], self.epochs)


def named_after(name: str, grids: list[Grid], epochs: int | None) -> str:
    """A name with the command line's overrides, if they change any run of the grids: "digits_epochs-3"."""
    from study.table import file_stem

    overrides = {"epochs": epochs}
    plain, asked = ([run.protocol for grid in grids for run in grid.runs(seeds=1, overrides=each)] for each in ({}, overrides))
    return file_stem(name, overrides_text(overrides)) if plain != asked else name


def local_device(options: StudyOptions) -> str:
    """The name of this machine's device that the study would train on."""
    from diffvit.machine.device import device_title, resolve_device

    return device_title(resolve_device("cpu" if options.gpus_per_run == 0 else None))


def settings_of(options: StudyOptions, cluster: Cluster) -> Settings:
    """The runs' settings on a cluster. Raises UserError for GPUs that cannot be shared so."""
    from study.cluster.runner import Settings

    if options.gpus_per_run and options.gpus_per_run > 1 and options.gpus_per_run != int(options.gpus_per_run):
        raise UserError(f"gpus_per_run is {options.gpus_per_run:g}.", "give a fraction below 1, or a whole number.")
    gpus = options.gpus_per_run if options.gpus_per_run is not None else (1.0 if cluster.gpus else 0.0)
    return Settings(
        checkpoints=str(options.checkpoints.resolve()),
        data_root=str(Path(options.data_root).resolve()) if options.data_root else None,
        gpus_per_run=gpus,
        cpus_per_run=options.cpus_per_run,
        workers=options.workers,
        resources=dict(options.resources),
        compute=computing(options),
        saving=options.saving,
        price=options.price,
    )


def computing(options: StudyOptions) -> Compute:
    """How the study's runs are computed, on a device that each has to itself."""
    from diffvit.compute import Compute

    return Compute(
        micro_batch=options.micro_batch, deterministic=options.deterministic, fused=options.fused, graphs=options.graphs,
        compile=options.compile, recompute=options.recompute,
    )  # fmt: skip


def may_join(options: StudyOptions) -> bool:
    """Whether the study could run on a cluster whose GPUs this machine cannot see."""
    from study.cluster.address import find_address

    return find_address(options.address) != "local"


def connect_cluster(stack: contextlib.ExitStack, options: StudyOptions) -> Cluster:
    """Join or start Ray until the stack closes, and say which."""
    from study.cluster.connect import connect

    cluster = stack.enter_context(connect(options.address, options.dashboard))
    say(cluster.sentence())
    return cluster


def precision_on(cluster: Cluster, options: StudyOptions) -> str:
    """What the runs are computed in on a cluster, whose GPUs this machine may not see."""
    if options.precision == "auto" and cluster.gpus and options.gpus_per_run != 0:
        from study.cluster.nodes import gpu_precision

        return gpu_precision()
    return local_precision(options)


def local_precision(options: StudyOptions) -> str:
    """What the runs are computed in on this machine."""
    if options.precision != "auto":
        return options.precision
    from diffvit.machine.device import default_precision, resolve_device

    return default_precision(resolve_device("cpu" if options.gpus_per_run == 0 else None))
