"""Each cell of the full grid at its whole batch: seconds of a step with its validation batch, memory, and what the study will take.

    python -m bench.cells                          the first GPU: 10 steps in each of the twelve cells, those first that say most
    python -m bench.cells --size 50B --cap_gb 24 --compare_uncapped     and as on a card with 24 GB: the process may take no more
    python -m bench.cells --toy                    one layer, four images, three steps: does it work? On a CPU too

Images are random, of the sizes in which the data sets are kept; a step takes the same time on real ones. `run.py plan --probe` measures a
machine in less time, from fewer steps and through Ray.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch

from bench.timing import Bar, Journal, fit_and_time, json_option, line
from diffvit.compute import Compute
from diffvit.data.batches import Prepare
from diffvit.dataset import Dataset, ImageSet
from diffvit.evaluation import evaluate
from diffvit.ledger.spec import RunSpec
from diffvit.loop.placement import place_model
from diffvit.machine.device import default_precision, device_memory, device_title, resolve_device
from diffvit.memory import training_memory
from diffvit.protocol import PROTOCOLS, Protocol
from study.grid import find_grid

# The bars: hours of the full grid by the GPU's name, a layer of 50B over one of 10B, and a step with little memory over one with all.
HOURS = {"H200": 4.0, "H100": 4.5}
LAYER_50B_TO_10B = 1.05
CAPPED_TO_UNCAPPED = 1.3

# Before the clock starts: allocations, autotuning.
_WARM_UP = 5

# What is measured first, so that a cut leaves what is worth most: the bars about layers are about CIFAR-100's smallest and largest models.
_ORDER = ("10B", "50B", "25B")

# Pixels a side as the data sets are kept in memory.
_KEPT_SIZE = {"CIFAR-100": 32, "BACH": 512}

_WIDTHS = (32, 9, 9, 8, 11, 14, 12, 18, 22, 8, 8)
_HEAD = ("cell", "s a step", "images/s", "TFLOP/s", "micro-batch", "peak GB", "foreseen GB", "attention", "used", "start s", "hours")


@functools.cache
def random_images(dataset: str) -> Dataset:
    """Splits of the data set's sizes; what one has of images beyond a few hundred is the same few hundred again."""
    protocol, side = PROTOCOLS[dataset], _KEPT_SIZE[dataset]
    generator = torch.Generator().manual_seed(0)

    def split(images: int) -> ImageSet:
        some = torch.randint(0, 256, (min(images, 256), protocol.channels, side, side), generator=generator, dtype=torch.uint8)
        rows = torch.arange(images) % len(some)
        return ImageSet(some[rows], torch.randint(0, protocol.classes, (images,), generator=generator))

    train, val, test = (split(images) for images in protocol.images)
    classes = tuple(str(number) for number in range(protocol.classes))
    return Dataset(dataset, train, val, test, classes, (0.5,) * 3, (0.25,) * 3, "none")


def cells_in_order(precision: str, size: str | None, dataset: str | None, model: str | None) -> list[RunSpec]:
    """The full grid's cells of a size, a data set and an architecture, or of all: those first that say most."""
    found = [spec for spec in find_grid("full").runs(precision) if size in (None, spec.size)]
    found = [spec for spec in found if dataset in (None, spec.dataset) and model in (None, spec.model)]
    return sorted(found, key=lambda spec: (spec.dataset != "CIFAR-100", _ORDER.index(spec.size)))


def measure(spec: RunSpec, protocol: Protocol, data: Dataset, device: torch.device, steps: int, compute: Compute) -> dict[str, Any]:
    """Seconds of a step and of an evaluated image, and memory, of one cell."""
    start = time.perf_counter()
    placed = place_model(spec.model, spec.size, protocol, 0, device, spec.precision, compute)
    model, chosen = placed.model, placed.chosen
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    prepared = time.perf_counter() - start
    fitted, warm_up, seconds = fit_and_time(model, data, protocol, _WARM_UP, steps, precision=spec.precision, **placed.fit_arguments)
    seconds /= steps
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    prepare = Prepare(protocol.image_size, data.mean, data.std, device)
    tested = data.test.head(1024 if device.type == "cuda" else 8)
    times = []
    for part in (data.test.head(8), tested):
        before = time.perf_counter()
        evaluate(model, part, prepare=prepare, batch_size=fitted.evaluation_batch, precision=spec.precision)
        times.append(time.perf_counter() - before)
    cell = {
        "model": spec.model, "size": spec.size, "dataset": spec.dataset, "depth": protocol.depths[spec.size], "steps": steps,
        "batch": protocol.batch_size, "micro_batch": fitted.micro_batch, "chosen_micro_batch": placed.micro_batch,
        "evaluation_batch": fitted.evaluation_batch,
        "seconds_a_step": seconds, "images_per_second": protocol.batch_size / seconds,
        "seconds_an_image_evaluated": times[1] / len(tested), "start_seconds": prepared + max(0.0, warm_up - _WARM_UP * seconds),
        **dataclasses.asdict(chosen), "recompute": model.recompute,
        "peak_memory": peak, "of_memory": peak / device_memory(device) if peak else None,
        "memory_foreseen": training_memory(model, fitted.micro_batch, spec.precision, device.type, model.recompute),
        "tflops": 4 * protocol.batch_size * model.estimate_flops() / seconds / 1e12,
    }  # fmt: skip
    return {**cell, "hours": hours_of_run(spec, cell)}


def hours_of_run(spec: RunSpec, cell: Mapping[str, Any]) -> float:
    """What a run of the protocol takes."""
    _, val, test = spec.protocol.images
    seconds = (
        spec.protocol.total_steps() * cell["seconds_a_step"] + (val + test) * cell["seconds_an_image_evaluated"] + cell["start_seconds"]
    )
    return seconds / 3600


def bars_of(cells: Sequence[Mapping[str, Any]], device_name: str) -> list[Bar]:
    """The bars that the cells measured so far can tell about, on a GPU of this name."""
    free = {(cell["dataset"], cell["model"], cell["size"]): cell for cell in cells if cell["cap_gb"] is None}
    capped = {(cell["dataset"], cell["model"], cell["size"]): cell for cell in cells if cell["cap_gb"] is not None}
    bars = []
    limit = next((hours for name, hours in HOURS.items() if name in device_name), None)
    if limit and len(free) == len(find_grid("full").runs()):
        bars.append(Bar("hours of the full grid", sum(cell["hours"] for cell in free.values()), limit))
    for (dataset, model, size), cell in free.items():
        small = free.get((dataset, model, "10B"))
        if small and (dataset, size) == ("CIFAR-100", "50B"):
            over = cell["seconds_a_step"] / cell["depth"] / (small["seconds_a_step"] / small["depth"])
            bars.append(Bar(f"{model}: a layer of 50B over one of 10B", over, LAYER_50B_TO_10B))
    for key, cell in capped.items():
        if key in free:
            over = cell["seconds_a_step"] / free[key]["seconds_a_step"]
            bars.append(Bar(f"{' '.join(key)}: a step within {cell['cap_gb']:g} GiB over one with all memory", over, CAPPED_TO_UNCAPPED))
    return bars


def show(cell: Mapping[str, Any]) -> None:
    """Prints a cell's row."""
    name = f"{cell['model']} {cell['size']} {cell['dataset']}"
    peak = f"{cell['peak_memory'] / 1e9:.1f} ({100 * cell['of_memory']:.0f} %)" if cell["peak_memory"] else ""
    used = ", ".join(word for word in ("compiled", "fused", "graphs", "recompute") if cell[word])
    numbers = (f"{cell['seconds_a_step']:.4f}", f"{cell['images_per_second']:,.0f}", f"{cell['tflops']:.3g}", str(cell["micro_batch"]))
    others = (f"{cell['memory_foreseen'] / 1e9:.1f}", cell["attention"], used, f"{cell['start_seconds']:.1f}", f"{cell['hours']:.3f}")
    line((name, *numbers, peak, *others), _WIDTHS)


@click.command()
@click.option("--device", "device_name", help="[default: the first GPU, or the CPU]")
@click.option("--steps", type=click.IntRange(min=1), default=10, show_default=True, help="Measured in each cell, after a few others.")
@click.option("--size", help="One size only, such as 50B.")
@click.option("--dataset", help="One data set only.")
@click.option("--model", help="One architecture only.")
@click.option("--cap_gb", type=click.FloatRange(min=1), help="GiB of the GPU's memory that this process may take. [default: all]")
@click.option("--compare_uncapped", is_flag=True, help="With --cap_gb: measure the same cells with all memory before.")
@click.option("--recompute", is_flag=True)
@click.option("--toy", is_flag=True, help="One layer, four images, three steps.")
@json_option
def main(device_name: str | None, steps: int, size: str | None, dataset: str | None, model: str | None, cap_gb: float | None,
         compare_uncapped: bool, recompute: bool, toy: bool, json_path: Path | None) -> None:  # fmt: skip
    """Measure the cells of the full grid."""
    device = resolve_device(device_name)
    precision = default_precision(device)
    specs = cells_in_order(precision, size, dataset, model)
    if not specs:
        raise click.ClickException("the full grid has no cell of this size, data set and model.")
    journal = Journal(device, json_path, toy=toy)
    cells: list[dict[str, Any]] = []
    bars: list[Bar] = []
    failed, hours = 0, 0.0
    for cap in (None, cap_gb) if cap_gb and compare_uncapped else (cap_gb,):
        share = 1.0
        if cap and device.type == "cuda":
            share = min(1.0, cap * 2**30 / device_memory(device))
            torch.cuda.set_per_process_memory_fraction(share, device)
        click.echo(f"{precision}{', toy size' if toy else ''}{f', at most {cap:g} GiB' if cap else ''}")
        line(_HEAD, _WIDTHS)
        for spec in specs:
            protocol = spec.protocol
            if toy:
                protocol = dataclasses.replace(protocol.with_overrides({"batch_size": 4}), depths={spec.size: 1})
            compute = Compute(memory_share=share, recompute=recompute or None)
            try:
                cell = measure(spec, protocol, random_images(spec.dataset), device, 3 if toy else steps, compute)
            except Exception:  # the others may be measured none the less
                traceback.print_exc()
                failed += 1
            else:
                cells.append({**cell, "cap_gb": cap})
                show(cell)
            hours = sum(cell["hours"] for cell in cells if cell["cap_gb"] == cap)
            bars = bars_of(cells, device_title(device)) if device.type == "cuda" and not toy else []
            bars += [Bar("cells that could not be measured", failed, 0)] if failed else []
            journal.note(cells=cells, hours=hours, bars=bars)
            # A cap counts what the allocator holds, not what is in use.
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    click.echo(f"{hours:.2f} hours of this device for one run of each cell" + (" (at toy size: no forecast)" if toy else ""))
    journal.finish(bars)


if __name__ == "__main__":
    main()
