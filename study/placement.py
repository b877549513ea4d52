"""Where runs train: their share of GPUs and CPUs, and what it costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from diffvit.errors import UserError
from diffvit.machine.host import cpus

if TYPE_CHECKING:
    from study.cluster.connect import Cluster


@dataclass(frozen=True)
class Placement:
    """The resources of each worker of a run.

    Attributes:
        gpus_per_run: of each worker; a fraction lets runs share a GPU. 0: train on CPUs; None: 1 where there are GPUs, see `on`.
        cpus_per_run: of each worker; on a CPU this is its number of threads.
        workers: processes that train one run together.
        resources: custom Ray resources of each worker.
        price: dollars an hour of one GPU, or of a machine where runs train on CPUs; None: unknown.
    """

    gpus_per_run: float | None = None
    cpus_per_run: int = 1
    workers: int = 1
    resources: Mapping[str, float] = field(default_factory=dict)
    price: float | None = None

    @property
    def device(self) -> str | None:
        """The device's name as resolve_device takes it; None: the first GPU, or the CPU."""
        return "cpu" if self.gpus_per_run == 0 else None

    def on(self, cluster: Cluster) -> Placement:
        """The placement on a cluster: GPUs where it has them and none were asked for. Raises UserError for a share that is not possible."""
        gpus = self.gpus_per_run
        if gpus and gpus > 1 and gpus != int(gpus):
            raise UserError(f"gpus_per_run is {gpus:g}.", "give a fraction below 1, or a whole number.")
        return self if gpus is not None else dataclasses.replace(self, gpus_per_run=1.0 if cluster.gpus else 0.0)

    def worker_resources(self, cpus: float | None = None) -> dict[str, float]:
        """The resources that Ray reserves for one training process; `cpus` replaces cpus_per_run."""
        gpus = {"GPU": self.gpus_per_run} if self.gpus_per_run else {}
        return {"CPU": self.cpus_per_run if cpus is None else cpus, **gpus, **self.resources}

    def slots(self, cluster: Cluster) -> int:
        """The number of runs that train at a time on the cluster."""
        has = {**cluster.resources, "CPU": cluster.cpus, "GPU": cluster.gpus}
        return int(min(has.get(name, 0.0) / (amount * self.workers) for name, amount in self.worker_resources().items()) + 1e-9)

    def check_room(self, cluster: Cluster) -> int:
        """The slots. Raises UserError where the cluster has no room for one run."""
        if slots := self.slots(cluster):
            return slots
        needs = f"{self.workers} x {self.cpus_per_run} CPUs"
        needs += f" and {self.gpus_per_run:g} GPUs" if self.gpus_per_run else ""
        needs += "".join(f" and {amount:g} {name}" for name, amount in self.resources.items())
        raise UserError(
            f"a run needs {needs}, and the cluster has {cluster.cpus:g} CPUs and {cluster.gpus:g} GPUs.",
            "lower --cpus_per_run, --gpus_per_run, --resource or --workers.",
        )

    @property
    def memory_share(self) -> float:
        """The part of its device's memory that a run may count on."""
        return min(self.gpus_per_run, 1.0) if self.gpus_per_run else min(1.0, self.cpus_per_run / cpus())

    @property
    def dollars_per_second(self) -> float | None:
        """The price of a run's devices; None where it is unknown."""
        if self.price is None:
            return None
        return self.price / 3600 * (self.gpus_per_run or self.memory_share) * self.workers
