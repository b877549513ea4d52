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
from pathlib import Path
from typing import Any

import ray
import torch

from diffvit.compute import Compute, choose, set_matmul_precision
from diffvit.dataset import Dataset, Prepare, load
from diffvit.evaluation import evaluate
from diffvit.ledger import RunSpec, save_weights
from diffvit.memory import affordable_micro_batch, device_memory
from diffvit.protocol import Protocol, images_in_steps
from diffvit.saving import Every
from diffvit.train import Stopped, device_title, fit, resolve_device
from diffvit.vit import VisionTransformer, build_model
from study.cluster import Cluster
from study.devices import CellRate, Machine, how
from study.forecast import cell_of
from study.plan import PlannedRun
from study.runner import Settings, memory_share, slots, worker_resources

# Steps are tried with more and more images, until one takes so much of a cell's time.
_SHARE_OF_STEP = 1 / 8
_GROWTH = 4


def probe(
    runs: Sequence[PlannedRun], settings: Settings, cluster: Cluster, begun: float, seconds: float, say: Callable[[str], None]
) -> Machine:
    """What the runs' cells take on the cluster's machines. The data must be at hand.

    Args:
        begun: time.monotonic() when the command began to start Ray: what a study waits for until its first run can begin.
        seconds: for each cell, about; it takes at least a few steps.
        say: hears which cell is measured.

    Raises:
        UserError: a single image of a cell does not fit into memory.
    """
    cells = {cell_of(run.spec): run for run in runs}
    datasets = dict.fromkeys(run.spec.dataset for run in runs)
    probers = [
        ray.remote(num_cpus=0)(_Prober).options(resources=needs, num_cpus=cpus, num_gpus=gpus).remote(dataclasses.asdict(settings))
        for cpus, gpus, needs in [_placement(settings)] * at_once(cluster, settings)
    ]
    facts = ray.get([prober.facts.remote() for prober in probers])[0]
    start = time.monotonic() - begun
    loading = {name: _mean(ray.get([prober.load.remote(name) for prober in probers])) for name in datasets}
    smallest = min(cells.values(), key=lambda run: run.forward_flops).spec
    start += _mean(ray.get([prober.warm_up.remote(dataclasses.asdict(smallest)) for prober in probers]))
    rates = {}
    for number, (cell, run) in enumerate(cells.items(), start=1):
        say(f"measuring {number} of {len(cells)}: {run.spec.model} {run.spec.size} {run.spec.dataset}")
        found = ray.get([prober.measure.remote(dataclasses.asdict(run.spec), seconds) for prober in probers])
        means = {name: _mean([each[name] for each in found]) for name in ("train", "evaluate", "start")}
        date = datetime.datetime.now(datetime.UTC).date().isoformat()
        rates[cell] = CellRate(**means, images=min(each["images"] for each in found), flops=run.forward_flops, date=date)
    return Machine(
        **facts, precision=runs[0].spec.precision, threads=settings.cpus_per_run, at_once=len(probers), computing=how(settings.compute),
        start=start, load=loading, cells=rates,
    )  # fmt: skip


def at_once(cluster: Cluster, settings: Settings) -> int:
    """How many runs a study trains at a time on one GPU, or on one machine where it trains on CPUs."""
    if settings.gpus_per_run:
        return max(1, int(1 / settings.gpus_per_run + 1e-9))
    return max(1, slots(cluster, dataclasses.replace(settings, workers=1)) // cluster.nodes)


def _placement(settings: Settings) -> tuple[float, float, dict[str, float]]:
    """CPUs, GPUs and custom resources of a process that measures."""
    needs = worker_resources(settings, settings.cpus_per_run)
    return needs.pop("CPU"), needs.pop("GPU", 0), needs


def _mean(values: list[float]) -> float:
    return statistics.fmean(values)


class _Prober:
    """A process in the place of one that trains."""

    def __init__(self, settings: dict[str, Any]):
        self._settings = Settings.of(settings)
        if not self._settings.gpus_per_run:
            torch.set_num_threads(self._settings.cpus_per_run)
        self._device = resolve_device(None if self._settings.gpus_per_run else "cpu")
        self._compute = dataclasses.replace(self._settings.compute, memory_share=memory_share(self._settings))

    def facts(self) -> dict[str, Any]:
        return {"device_name": device_title(self._device), "device": self._device.type, "memory": device_memory(self._device)}

    def load(self, dataset: str) -> float:
        start = time.perf_counter()
        load(dataset, self._settings.data_root)
        return time.perf_counter() - start

    def warm_up(self, spec: dict[str, Any]) -> float:
        """Seconds of the first steps in this process, which import and set up much that later ones find there."""
        run, start = RunSpec(**spec), time.perf_counter()
        protocol = dataclasses.replace(run.protocol, max_steps=None, epochs=10**6)
        model = build_model(run.model, run.size, protocol).to(self._device)
        _step_seconds(model, load(run.dataset, self._settings.data_root), protocol, run.precision, micro=1, images=1)
        return time.perf_counter() - start

    def measure(self, spec: dict[str, Any], seconds: float) -> dict[str, Any]:
        run = RunSpec(**spec)
        return measure_cell(run, load(run.dataset, self._settings.data_root), self._device, self._compute, seconds)


def measure_cell(spec: RunSpec, data: Dataset, device: torch.device, compute: Compute, seconds: float) -> dict[str, Any]:
    """The values of a CellRate, from about so many seconds of real steps in this process. Nothing is left behind but caches."""
    start = time.perf_counter()
    # Endless, so that it is the clock that ends it.
    protocol = dataclasses.replace(spec.protocol, max_steps=None, epochs=10**6)
    model = build_model(spec.model, spec.size, protocol)
    model.initialise(spec.seed)
    model.to(device)
    set_matmul_precision(spec.precision)
    micro = compute.micro_batch or affordable_micro_batch(model, protocol, device, spec.precision, compute.memory_share, compute.recompute)
    choose(model, micro, spec.precision, compute)
    begin = time.perf_counter() - start

    images = 1
    while images < protocol.batch_size and _step_seconds(model, data, protocol, spec.precision, micro, images) < _SHARE_OF_STEP * seconds:
        images = min(_GROWTH * images, protocol.batch_size)
    trained, validated, took = _window(model, data, dataclasses.replace(protocol, batch_size=images), spec.precision, micro, seconds)

    prepare = Prepare(protocol.image_size, data.mean, data.std, device)
    tested = data.test.head(min(len(data.test), max(images, int(0.5 * seconds * trained / took))))
    times = []
    for part in (data.test.head(images), tested):  # the first one warms up
        start = time.perf_counter()
        evaluate(model, part, prepare=prepare, batch_size=min(micro, protocol.batch_size), precision=spec.precision)
        times.append(time.perf_counter() - start)
    evaluating = times[1] / len(tested)

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        save_weights(Path(folder) / "weights.safetensors", model, {})
    end = time.perf_counter() - start
    training = max(took - validated * evaluating, 0.0) / trained
    return {"train": training, "evaluate": evaluating, "start": begin + end, "images": images}


def _step_seconds(model: VisionTransformer, data: Dataset, protocol: Protocol, precision: str, micro: int, images: int) -> float:
    """Seconds of a step with so many images: the fastest of three after the first, since something else may disturb one."""
    protocol = dataclasses.replace(protocol, batch_size=images)
    marks = _marks(model, data, protocol, precision, micro, Every(steps=1), lambda marks: len(marks) > 3)
    times = [time for _, time in marks]
    return min(after - before for before, after in itertools.pairwise(times))


def _window(
    model: VisionTransformer, data: Dataset, protocol: Protocol, precision: str, micro: int, seconds: float
) -> tuple[int, int, float]:
    """Images trained and validated in a window of about so many seconds, and how long it took. It opens after the first steps."""
    deadline = time.perf_counter() + seconds
    # At each mark the device is waited for, so not at each of many short steps.
    marks = _marks(
        model, data, protocol, precision, micro, Every(seconds=seconds / 8), lambda marks: time.perf_counter() > deadline and len(marks) > 1
    )
    (first, opened), (last, closed) = marks[0], marks[-1]
    trained, validated = (
        images_in_steps(len(split), protocol.batch_size, last) - images_in_steps(len(split), protocol.batch_size, first)
        for split in (data.train, data.val)
    )
    return trained, validated, closed - opened


def _marks(
    model: VisionTransformer, data: Dataset, protocol: Protocol, precision: str, micro: int, every: Every,
    enough: Callable[[list[tuple[int, float]]], bool],
) -> list[tuple[int, float]]:  # fmt: skip
    """Trains until there is enough. Returns (step, time) of when states would have been saved: all work is done then."""
    marks: list[tuple[int, float]] = []
    try:
        fit(
            model, data, protocol, seed=0, precision=precision, micro_batch=micro, save_every=every,
            on_save=lambda state: marks.append((state["step"], time.perf_counter())), should_stop=lambda: enough(marks),
        )  # fmt: skip
    except Stopped:
        return marks
    raise AssertionError("training ended by itself")
