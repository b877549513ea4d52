"""Each cell of the full grid at its whole batch: seconds of a step from many of them, memory, and what the study will take.

    python -m bench.cells                          the first GPU: 50 steps in each of the twelve cells
    python -m bench.cells --cap_gb 24 --size 50B   as on a card with 24 GB: the process may take no more of a larger one
    python -m bench.cells --toy                    one layer, four images, three steps: does it work? On a CPU too

Images are random, of the sizes in which the data sets are kept; a step takes the same time on real ones. `run.py plan --probe` measures a
machine in less time, from fewer steps and through Ray.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import click
import torch

from bench.timing import Bar, finish, json_option, table
from diffvit.compute import Compute, choose, set_matmul_precision
from diffvit.dataset import Dataset, ImageSet, Prepare
from diffvit.evaluation import evaluate
from diffvit.ledger import RunSpec
from diffvit.memory import affordable_micro_batch, device_memory, training_memory
from diffvit.protocol import Protocol
from diffvit.saving import Every
from diffvit.train import default_precision, fit, resolve_device
from diffvit.vit import build_model
from study.grid import find_grid

# The bar on an H100-class GPU: hours of the full grid.
HOURS = 4.0

# Before the clock starts: allocations, autotuning.
_WARM_UP = 5

# Pixels a side as the data sets are kept in memory.
_KEPT_SIZE = {"CIFAR-100": 32, "BACH": 512}


def random_images(spec: RunSpec) -> Dataset:
    """Splits of the data set's sizes; what one has of images beyond a few hundred is the same few hundred again."""
    protocol, side = spec.protocol, _KEPT_SIZE[spec.dataset]
    generator = torch.Generator().manual_seed(0)

    def split(images: int) -> ImageSet:
        some = torch.randint(0, 256, (min(images, 256), protocol.channels, side, side), generator=generator, dtype=torch.uint8)
        rows = torch.arange(images) % len(some)
        return ImageSet(some[rows], torch.randint(0, protocol.classes, (images,), generator=generator))

    train, val, test = (split(images) for images in protocol.images)
    classes = tuple(str(number) for number in range(protocol.classes))
    return Dataset(spec.dataset, train, val, test, classes, (0.5,) * 3, (0.25,) * 3, "none")


def measure(
    spec: RunSpec, protocol: Protocol, data: Dataset, device: torch.device, steps: int, compute: Compute, with_evaluation: bool = True
) -> dict[str, Any]:
    """Seconds of a step and of an evaluated image, and memory, of one cell."""
    start = time.perf_counter()
    model = build_model(spec.model, spec.size, protocol)
    model.initialise(0)
    model.to(device)
    set_matmul_precision(spec.precision)
    micro_batch = compute.micro_batch or affordable_micro_batch(
        model, protocol, device, spec.precision, compute.memory_share, compute.recompute
    )
    chosen = choose(model, micro_batch, spec.precision, compute)
    marks: list[float] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    run = dataclasses.replace(protocol, epochs=10**6, max_steps=_WARM_UP + steps + 1)  # the last one is not saved
    fitted = fit(
        model, data, run, seed=0, precision=spec.precision, micro_batch=micro_batch,
        on_save=lambda state: marks.append(time.perf_counter()) if state["step"] in (_WARM_UP, _WARM_UP + steps) else None,
        save_every=Every(steps=1 if steps < 10 else 5),
    )  # fmt: skip
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    prepare = Prepare(protocol.image_size, data.mean, data.std, device)
    tested = data.test.head(1024 if device.type == "cuda" else 8)
    times = []
    for part in (data.test.head(8), tested):
        before = time.perf_counter()
        evaluate(model, part, prepare=prepare, batch_size=fitted.micro_batch, precision=spec.precision)
        times.append(time.perf_counter() - before)
    return {
        "model": spec.model, "size": spec.size, "dataset": spec.dataset, "steps": steps, "batch": protocol.batch_size,
        "micro_batch": fitted.micro_batch, "chosen_micro_batch": micro_batch,
        "seconds_a_step": (marks[-1] - marks[0]) / steps, "seconds_an_image_evaluated": times[1] / len(tested),
        "start_seconds": began - start, "attention": chosen.attention, "compiled": chosen.compiled, "notes": chosen.notes,
        "peak_memory": peak, "memory_foreseen": training_memory(model, fitted.micro_batch, spec.precision, device.type, compute.recompute),
        "tflops": 4 * protocol.batch_size * model.estimate_flops() * steps / (marks[-1] - marks[0]) / 1e12,
    }  # fmt: skip


def hours_of_run(spec: RunSpec, cell: dict[str, Any]) -> float:
    """What a run of the protocol takes."""
    _, val, test = spec.protocol.images
    seconds = (
        spec.protocol.total_steps() * cell["seconds_a_step"] + (val + test) * cell["seconds_an_image_evaluated"] + cell["start_seconds"]
    )
    return seconds / 3600


@click.command()
@click.option("--device", "device_name", help="[default: the first GPU, or the CPU]")
@click.option("--steps", type=click.IntRange(min=1), default=50, show_default=True, help="Measured in each cell, after a few others.")
@click.option("--size", help="One size only.")
@click.option("--cap_gb", type=click.FloatRange(min=1), help="GiB of the GPU's memory that this process may take. [default: all]")
@click.option("--recompute", is_flag=True)
@click.option("--toy", is_flag=True, help="One layer, four images, three steps.")
@json_option
def main(device_name: str | None, steps: int, size: str | None, cap_gb: float | None, recompute: bool, toy: bool,
         json_path: Path | None) -> None:  # fmt: skip
    """Measure the cells of the full grid."""
    device = resolve_device(device_name)
    share = 1.0
    if cap_gb and device.type == "cuda":
        share = min(1.0, cap_gb * 2**30 / device_memory(device))
        torch.cuda.set_per_process_memory_fraction(share, device)
    cells = []
    specs = [spec for spec in find_grid("full").runs(default_precision(device)) if size in (None, spec.size)]
    for spec in specs:
        protocol = spec.protocol
        if toy:
            protocol = dataclasses.replace(protocol.with_overrides({"batch_size": 4}), depths={spec.size: 1})
        cell = measure(spec, protocol, random_images(spec), device, 3 if toy else steps, Compute(memory_share=share, recompute=recompute))
        cells.append({**cell, "hours": hours_of_run(spec, cell)})
        click.echo(f"{spec.model} {spec.size} {spec.dataset}: {cell['seconds_a_step']:.3f} s a step", err=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    table(
        f"the full grid, {specs[0].precision}{', toy size' if toy else ''}{f', at most {cap_gb:g} GiB' if cap_gb else ''}",
        ("cell", "s a step", "images/s", "TFLOP/s", "micro-batch", "peak GB", "foreseen GB", "attention", "compiled", "hours"),
        [
            (
                f"{cell['model']} {cell['size']} {cell['dataset']}", f"{cell['seconds_a_step']:.4f}",
                f"{cell['batch'] / cell['seconds_a_step']:,.0f}", f"{cell['tflops']:.3g}", str(cell["micro_batch"]),
                f"{cell['peak_memory'] / 1e9:.1f}" if cell["peak_memory"] else "", f"{cell['memory_foreseen'] / 1e9:.1f}",
                cell["attention"], "yes" if cell["compiled"] else "no", f"{cell['hours']:.3f}",
            )
            for cell in cells
        ],
    )  # fmt: skip
    hours = sum(cell["hours"] for cell in cells)
    click.echo(f"{hours:.2f} hours of this device for one run of each cell" + (" (at toy size: no forecast)" if toy else ""))
    bars = [Bar("hours of the full grid", hours, HOURS)] if not (toy or size or cap_gb) and device.type == "cuda" else []
    finish({"cap_gb": cap_gb, "toy": toy, "cells": cells, "hours": hours}, bars, device, json_path)


if __name__ == "__main__":
    main()
