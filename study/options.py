"""The options of `run.py study` and `run.py plan`, and how they are resolved on a cluster."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from diffvit.compute import DEFAULT_COMPUTE, Compute
from diffvit.keeping.saving import DEFAULT_SAVING, Saving
from diffvit.ledger.spec import RunSpec
from diffvit.machine.device import default_precision, resolve_device
from study.cluster.address import find_address
from study.cluster.connect import Cluster, connect
from study.cluster.nodes import gpu_precision
from study.grid import Grid, named_after
from study.placement import Placement
from study.text import say

if TYPE_CHECKING:
    from study.cluster.runner import Settings
    from study.shard import Shard


@dataclass(frozen=True)
class StudyOptions:
    """The parsed command line of `study`.

    Attributes:
        precision: "auto" until `on` has resolved it.
        compute: how runs are computed on a device that each has to itself.
        command: as the user typed it.
        ask: before long work, ask whether to start it.
        json_to: where the outcome goes as JSON; "-": to stdout, in place of the table.
    """

    grid: Grid
    checkpoints: Path
    seeds: int | None = None
    epochs: int | None = None
    data_root: str | None = None
    address: str | None = None
    dashboard: bool = True
    precision: str = "auto"
    compute: Compute = DEFAULT_COMPUTE
    placement: Placement = field(default_factory=Placement)
    saving: Saving = DEFAULT_SAVING
    tracker: str | None = None
    shard: Shard | None = None
    command: str = "run.py study"
    ask: bool = False
    json_to: Path | None = None

    def on(self, cluster: Cluster | None) -> StudyOptions:
        """With the precision, and on a cluster the GPUs of a run, that hold there; None: on this machine. Raises UserError."""
        placement, precision = self.placement.on(cluster) if cluster else self.placement, self.precision
        if precision == "auto" and cluster and cluster.gpus and placement.gpus_per_run:  # GPUs that this machine may not see
            precision = gpu_precision()
        elif precision == "auto":
            precision = default_precision(resolve_device(placement.device))
        return dataclasses.replace(self, placement=placement, precision=precision)

    def runs(self) -> list[RunSpec]:
        """The grid's runs with this command's overrides, in the precision that `on` has resolved."""
        return self.grid.runs(self.precision, self.seeds, {"epochs": self.epochs})

    @property
    def name(self) -> str:
        """The stem of the study's table files: its grid and overrides, not its seeds, since the tables have all seeds."""
        return named_after(self.grid.name, [self.grid], self.epochs)

    def settings(self) -> Settings:
        """The settings of each run, on a cluster that `on` has resolved."""
        from diffvit.data.user_datasets import registered
        from study.cluster.runner import Settings

        data_root = str(Path(self.data_root).resolve()) if self.data_root else None
        return Settings(self.checkpoints.resolve(), data_root, self.placement, self.compute, self.saving, self.tracker, registered())


def may_join(options: StudyOptions) -> bool:
    """Whether the study could run on a cluster whose GPUs this machine cannot see."""
    return find_address(options.address) != "local"


def connect_cluster(stack: contextlib.ExitStack, options: StudyOptions) -> Cluster:
    """Join or start Ray until the stack closes, and say which."""
    cluster = stack.enter_context(connect(options.address, options.dashboard))
    say(cluster.sentence())
    return cluster
