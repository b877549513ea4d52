"""A run's metrics while it trains. Ray's dashboard and Prometheus read them as `ray_` and the name."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from diffvit.ledger.spec import RunSpec

TAGS = ("run_id", "model", "size", "dataset", "seed")

# Name -> what it is. docs/grafana.json draws each of them, and a test checks that it draws no other.
GAUGES = {
    "diffvit_train_loss": "Mean cross-entropy of the last training batch, in nats.",
    "diffvit_val_loss": "Mean cross-entropy of the last validation batch, in nats.",
    "diffvit_images_per_second": "Training images a second, over the run so far.",
    "diffvit_progress_ratio": "Steps done, as a share of the run's steps.",
    "diffvit_cost_dollars": "What the training so far costs at the price that --price says.",
}


class RunGauges:
    """One run's gauges, tagged with what it is.

    Args:
        dollars_per_second: of the devices that the run takes; None: unknown, and the cost is not exported.
    """

    def __init__(self, spec: RunSpec, run_id: str, dollars_per_second: float | None):
        self._tags = {"run_id": run_id, "model": spec.model, "size": spec.size, "dataset": spec.dataset, "seed": str(spec.seed)}
        self._dollars_per_second = dollars_per_second

    def set(self, report: Mapping[str, Any]) -> None:
        """Set the gauges from a run's report: the numbers of a step, `total_steps` and `images_per_second`."""
        values = {
            "diffvit_train_loss": report["train_loss"],
            "diffvit_val_loss": report["val_loss"],
            "diffvit_images_per_second": report["images_per_second"],
            "diffvit_progress_ratio": report["step"] / report["total_steps"],
        }
        if self._dollars_per_second is not None:
            values["diffvit_cost_dollars"] = report["seconds"] * self._dollars_per_second
        for name, value in values.items():
            _gauge(name).set(value, tags=self._tags)


@functools.cache
def _gauge(name: str) -> Any:
    """The process's gauge of a name: a process trains several runs, one after the other."""
    from ray.util.metrics import Gauge  # Ray takes seconds to import, and names alone do not need it

    return Gauge(name, GAUGES[name], tag_keys=TAGS)
