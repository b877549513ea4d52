"""Measures how fast a machine trains the cells of a grid: a few real steps of each, as a study's own runs would take them.

As many processes measure at the same time as the study would train runs on the device, since they share its caches and its memory's
bandwidth. They are placed by Ray, with a worker's resources and threads.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch

from diffvit.compute import Compute
from diffvit.data.batches import Prepare
from diffvit.dataset import Dataset, load
from diffvit.evaluation import evaluate
from diffvit.keeping.saving import Every
from diffvit.ledger.spec import RunSpec
from diffvit.ledger.weights import save_weights
from diffvit.loop.fit import Stopped, fit
from diffvit.loop.placement import place_model
from diffvit.machine.device import device_memory, device_title, resolve_device
from diffvit.protocol import Protocol, images_in_steps
from diffvit.vit import VisionTransformer, build_model
from study.cluster.connect import Cluster
from study.cluster.runner import Settings
from study.cost.devices import CellRate, Machine, how
from study.cost.forecast import cell_of
from study.placement import Placement
from study.plan import PlannedRun

# Steps are tried with more and more images, until one takes so much of a cell's time.
_SHARE_OF_STEP = 1 / 8
_GROWTH = 4


def probe(
    runs: Sequence[PlannedRun], settings: Settings, cluster: Cluster, begun: float, seconds: float, say: Callable[[str], None]
) -> Machine:
    """Measure the runs' cells on the cluster's machines. The data must be at hand.

    Args:
        begun: time.monotonic() when the command began to start Ray: what a study waits for until its first run can begin.
        seconds: for each cell, about; it takes at least a few steps.
        say: called with a sentence before each cell is measured.

    Raises:
        UserError: a single image of a cell does not fit into memory.
    """
    cells = {cell_of(run.spec): run for run in runs}
    datasets = dict.fromkeys(run.spec.dataset for run in runs)
    probers = [
        ray.remote(num_cpus=0)(_Prober).options(resources=needs, num_cpus=cpus, num_gpus=gpus).remote(settings)
        for cpus, gpus, needs in [_resources(settings.placement)] * concurrent_runs(cluster, settings.placement)
    ]
    facts = ray.get([prober.facts.remote() for prober in probers])[0]
    start = time.monotonic() - begun
    loading = {name: _mean(ray.get([prober.load.remote(name) for prober in probers])) for name in datasets}
    smallest = min(cells.values(), key=lambda run: run.forward_flops).spec
    start += _mean(ray.get([prober.warm_up.remote(smallest) for prober in probers]))
    rates = {}
    for number, (cell, run) in enumerate(cells.items(), start=1):
        say(f"measuring {number} of {len(cells)}: {run.spec.model} {run.spec.size} {run.spec.dataset}")
        found = ray.get([prober.measure.remote(run.spec, seconds) for prober in probers])
        means = {name: _mean([each[name] for each in found]) for name in ("train", "evaluate", "start")}
        date = datetime.datetime.now(datetime.UTC).date().isoformat()
        rates[cell] = CellRate(**means, images=min(each["images"] for each in found), flops=run.forward_flops, date=date)
    return Machine(
        **facts, precision=runs[0].spec.precision, threads=settings.placement.cpus_per_run, at_once=len(probers),
        computing=how(settings.compute),
        start=start, load=loading, cells=rates,
    )  # fmt: skip


def concurrent_runs(cluster: Cluster, placement: Placement) -> int:
    """The number of runs that a study trains at a time on one GPU, or on one machine where it trains on CPUs."""
    if placement.gpus_per_run:
        return max(1, int(1 / placement.gpus_per_run + 1e-9))
    return max(1, dataclasses.replace(placement, workers=1).slots(cluster) // cluster.nodes)


def _resources(placement: Placement) -> tuple[float, float, dict[str, float]]:
    """CPUs, GPUs and custom resources of a process that measures."""
    needs = placement.worker_resources()
    return needs.pop("CPU"), needs.pop("GPU", 0), needs


def _mean(values: list[float]) -> float:
    return statistics.fmean(values)


class _Prober:
    """An actor that measures, with the resources of one that trains."""

    def __init__(self, settings: Settings):
        placement = settings.placement
        settings.know_data()
        self._data_root = settings.data_root
        if not placement.gpus_per_run:
            torch.set_num_threads(placement.cpus_per_run)
        self._device = resolve_device(None if placement.gpus_per_run else "cpu")
        self._compute = dataclasses.replace(settings.compute, memory_share=placement.memory_share)

    def facts(self) -> dict[str, Any]:
        return {"device_name": device_title(self._device), "device": self._device.type, "memory": device_memory(self._device)}

    def load(self, dataset: str) -> float:
        start = time.perf_counter()
        load(dataset, self._data_root)
        return time.perf_counter() - start

    def warm_up(self, run: RunSpec) -> float:
        """Seconds of the first steps in this process, which import and set up much that later ones find there."""
        start = time.perf_counter()
        protocol = dataclasses.replace(run.protocol, max_steps=None, epochs=10**6)
        model = build_model(run.model, run.size, protocol).to(self._device)
        data = load(run.dataset, self._data_root)
        _step_seconds(partial(_marks, model, data, precision=run.precision, micro_batch=1), protocol, images=1)
        return time.perf_counter() - start

    def measure(self, run: RunSpec, seconds: float) -> dict[str, Any]:
        return measure_cell(run, load(run.dataset, self._data_root), self._device, self._compute, seconds)


def measure_cell(spec: RunSpec, data: Dataset, device: torch.device, compute: Compute, seconds: float) -> dict[str, Any]:
    """The values of a CellRate, from about so many seconds of real steps in this process. Nothing is left behind but caches."""
    start = time.perf_counter()
    # Endless, so that it is the clock that ends it.
    protocol = dataclasses.replace(spec.protocol, max_steps=None, epochs=10**6)
    placed = place_model(spec.model, spec.size, protocol, spec.seed, device, spec.precision, compute)
    begin = time.perf_counter() - start
    trained = partial(_marks, placed.model, data, precision=spec.precision, **placed.fit_arguments)

    images = 1
    while images < protocol.batch_size and _step_seconds(trained, protocol, images) < _SHARE_OF_STEP * seconds:
        images = min(_GROWTH * images, protocol.batch_size)
    counts, took = _window(trained, data, dataclasses.replace(protocol, batch_size=images), seconds)

    prepare = Prepare(protocol.image_size, data.mean, data.std, device)
    tested = data.test.head(min(len(data.test), max(images, int(0.5 * seconds * counts[0] / took))))
    times = []
    for part in (data.test.head(images), tested):  # the first one warms up
        start = time.perf_counter()
        evaluate(placed.model, part, prepare=prepare, batch_size=placed.evaluation_batch, precision=spec.precision)
        times.append(time.perf_counter() - start)
    evaluating = times[1] / len(tested)

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        save_weights(Path(folder) / "weights.safetensors", placed.model, {})
    end = time.perf_counter() - start
    training = max(took - counts[1] * evaluating, 0.0) / counts[0]
    return {"train": training, "evaluate": evaluating, "start": begin + end, "images": images}


# Trains by a protocol, saving when it is said, until there is enough; see _marks.
Trained = Callable[[Protocol, Every, Callable[[list[tuple[int, float]]], bool]], list[tuple[int, float]]]


def _step_seconds(trained: Trained, protocol: Protocol, images: int) -> float:
    """Seconds of a step with so many images: the fastest of three after the first, since something else may disturb one."""
    marks = trained(dataclasses.replace(protocol, batch_size=images), Every(steps=1), lambda marks: len(marks) > 3)
    times = [time for _, time in marks]
    return min(after - before for before, after in itertools.pairwise(times))


def _window(trained: Trained, data: Dataset, protocol: Protocol, seconds: float) -> tuple[tuple[int, int], float]:
    """Images trained and validated in a window of about so many seconds, and how long it took. It opens after the first steps."""
    deadline = time.perf_counter() + seconds
    # At each mark the device is waited for, so not at each of many short steps.
    marks = trained(protocol, Every(seconds=seconds / 8), lambda marks: time.perf_counter() > deadline and len(marks) > 1)
    (first, opened), (last, closed) = marks[0], marks[-1]
    images, validated = (
        images_in_steps(len(split), protocol.batch_size, last) - images_in_steps(len(split), protocol.batch_size, first)
        for split in (data.train, data.val)
    )
    return (images, validated), closed - opened


def _marks(
    model: VisionTransformer, data: Dataset, protocol: Protocol, every: Every, enough: Callable[[list[tuple[int, float]]], bool], **how: Any
) -> list[tuple[int, float]]:
    """Train until `enough`. Returns (step, time) at which states would have been saved, when all queued work is done."""
    marks: list[tuple[int, float]] = []
    try:
        fit(
            model, data, protocol, seed=0, save_every=every,
            on_save=lambda state: marks.append((state["step"], time.perf_counter())), should_stop=lambda: enough(marks), **how,
        )  # fmt: skip
    except Stopped:
        return marks
    raise AssertionError("training ended by itself")
