"""How fast machines are: GPUs from their data sheets, and machines that were measured.

Measurements are kept in the user's cache folder, `measured_rates.json`, so that a machine is measured once.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffvit.errors import unknown_name
from diffvit.machine.caches import cache_folder, read_cache, remember

if TYPE_CHECKING:
    from diffvit.compute import Compute


@dataclass(frozen=True)
class Sheet:
    """A GPU's data sheet.

    Attributes:
        name: what `--gpu` calls it.
        title: its full name.
        names: a regular expression for what torch calls it.
        bf16: dense bf16 products summed up in fp32, TFLOP/s; None where it has no bf16.
        fp32: fp32 outside of the tensor cores, TFLOP/s: what a run at fp32 uses.
        fp16: as bf16, of a GPU whose tensor cores have fp16 only; others take both alike.
        memory: GB as it is sold, which are 2^30 bytes each.
        bandwidth: of its memory, GB/s.
        measured: when cells of the full grid were measured on it, and by which torch; "": never.
    """

    name: str
    title: str
    names: str
    bf16: float | None
    fp32: float
    memory: float
    bandwidth: float
    measured: str = ""
    fp16: float | None = None

    @property
    def precision(self) -> str:
        """The precision that `--precision auto` gives on it."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "fp32"

    def peak(self, precision: str) -> tuple[str, float]:
        """The precision that a run's products have on it, which is fp32 where it has no other, and their peak in FLOP/s."""
        half = {"bf16": self.bf16, "fp16": self.bf16 or self.fp16}.get(precision)
        return (precision, half * 1e12) if half else ("fp32", self.fp32 * 1e12)


# The makers' data sheets and, for GeForce cards, the white papers of the Blackwell, Ada and Ampere architectures.
SHEETS = {
    sheet.name: sheet
    for sheet in (
        Sheet("b200", "NVIDIA B200 SXM", r"B200", 2250, 75, 180, 7700),
        Sheet("h200", "NVIDIA H200 SXM", r"H200", 989, 67, 141, 4800, measured="2026-11-27, torch 2.11"),
        Sheet("h100", "NVIDIA H100 SXM", r"H100.*80GB HBM3", 989, 67, 80, 3350),
        Sheet("a100", "NVIDIA A100 SXM 80 GB", r"A100.*80GB", 312, 19.5, 80, 2039),
        Sheet("a100-40", "NVIDIA A100 SXM 40 GB", r"A100.*40GB", 312, 19.5, 40, 1555),
        Sheet("l40s", "NVIDIA L40S", r"L40S", 362, 91.6, 48, 864),
        Sheet("l4", "NVIDIA L4", r"L4$", 121, 30.3, 24, 300),
        Sheet("6000-ada", "NVIDIA RTX 6000 Ada", r"RTX 6000 Ada", 364, 91.1, 48, 960),
        Sheet("a6000", "NVIDIA RTX A6000", r"RTX A6000", 155, 38.7, 48, 768),
        Sheet("5090", "NVIDIA GeForce RTX 5090", r"RTX 5090$", 210, 105, 32, 1792),
        Sheet("4090", "NVIDIA GeForce RTX 4090", r"RTX 4090$", 165, 82.6, 24, 1008),
        Sheet("3090", "NVIDIA GeForce RTX 3090", r"RTX 3090$", 71, 35.6, 24, 936),
        Sheet("a10", "NVIDIA A10", r"A10$", 125, 31.2, 24, 600),
        Sheet("v100", "NVIDIA V100 SXM2 16 GB", r"V100-SXM2-16GB", None, 15.7, 16, 900, fp16=125),
        Sheet("v100-32", "NVIDIA V100 SXM2 32 GB", r"V100-SXM2-32GB", None, 15.7, 32, 900, fp16=125),
        Sheet("t4", "NVIDIA T4", r"T4$", None, 8.1, 16, 320, fp16=65),
        Sheet("mi300x", "AMD Instinct MI300X", r"MI300X", 1307, 163, 192, 5300),
    )
}


def find_sheet(name: str) -> Sheet:
    """The data sheet of a GPU by the name that `--gpu` takes, or its title: "4090", "RTX 4090", "A100 40 GB". Raises UserError."""
    by_name = {_plain(text): sheet for sheet in SHEETS.values() for text in (sheet.title, sheet.name)}
    if _plain(name) not in by_name:
        raise unknown_name("GPU", name, SHEETS)
    return by_name[_plain(name)]


def _plain(name: str) -> str:
    """A GPU's name without its maker, brand and form, which people write or leave out."""
    return re.sub(r"nvidia|geforce|amd|instinct|tesla|rtx|sxm\d?|gb|[^a-z0-9]", "", name.lower())


def sheet_of(device_name: str) -> Sheet | None:
    """The data sheet that matches a torch device name."""
    return next((sheet for sheet in SHEETS.values() if re.search(sheet.names, device_name)), None)


# ------------------------------------------------------------------------------------------------------------- measured


@dataclass(frozen=True)
class CellRate:
    """Measured seconds of a cell's work on a machine.

    Attributes:
        train: an image's part of a training step, without validation.
        evaluate: of one image, without gradients.
        start: what a run takes before its first step and after its last evaluation.
        images: of a measured step; fewer than the batch where a whole step takes too long.
        flops: of one image's forward pass.
        date: of the measurement, UTC.
    """

    train: float
    evaluate: float
    start: float
    images: int
    flops: int
    date: str


@dataclass(frozen=True)
class Machine:
    """A machine on which something was measured, as a study uses it.

    Attributes:
        device: "cpu" or "cuda".
        at_once: concurrent runs that shared the device, or the whole machine where that is a CPU, while it was measured.
        memory: of the device, or of the machine, in bytes.
        start: seconds that a study takes until its first run begins, without loading data.
        load: data set -> seconds that a process takes to load it.
        cells: cell_of(spec) -> its rate.
    """

    device_name: str
    device: str
    precision: str
    threads: int
    at_once: int
    memory: int
    computing: str
    start: float
    load: dict[str, float] = field(default_factory=dict)
    cells: dict[str, CellRate] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The key of a measurement: two with the same key measure the same thing."""
        return f"{self.device_name}, {self.precision}, {self.threads} threads, {self.at_once} at once, {self.computing}"


def measurements_file() -> Path:
    """Where measurements are kept."""
    return cache_folder() / "measured_rates.json"


def read_machines() -> list[Machine]:
    """The readable entries of the measurements' file."""
    return [machine for values in read_cache(measurements_file()).values() if (machine := _machine(values))]


def _machine(values: Any) -> Machine | None:
    """A machine from the file; None for an entry of another version, or with numbers that are not finite."""
    try:
        machine = Machine(**{**values, "cells": {cell: CellRate(**rate) for cell, rate in values["cells"].items()}})
        rates = [rate for cell in machine.cells.values() for rate in (cell.train, cell.evaluate, cell.images, cell.flops)]
        times = [machine.start, *machine.load.values(), *(cell.start for cell in machine.cells.values())]
        texts = [machine.device_name, machine.device, machine.precision, machine.computing, *(cell.date for cell in machine.cells.values())]
        sound = all(0 < rate < math.inf for rate in (*rates, machine.threads, machine.at_once, machine.memory))
        sound = sound and all(0 <= seconds < math.inf for seconds in times) and all(isinstance(text, str) for text in texts)
        return machine if sound else None
    except (KeyError, TypeError, AttributeError):
        return None


def how(compute: Compute) -> str:
    """How runs are computed, as far as it decides their speed, and by which torch."""
    import torch

    names = ("fused", "graphs", "compile", "recompute", "deterministic")
    chosen = {name: getattr(compute, name) for name in names}
    words = [f"torch {torch.__version__}", *(name if value else f"no {name}" for name, value in chosen.items() if value is not None)]
    return ", ".join([*words, *([f"{compute.micro_batch} images at once"] if compute.micro_batch else [])])


def find_machine(names: str, precision: str, threads: int, compute: Compute) -> Machine | None:
    """The machine that was measured last among those that fit, or None.

    Args:
        names: a regular expression for the device's name.
    """
    fitting = [
        machine for machine in read_machines()
        if re.search(names, machine.device_name)
        and machine.cells
        and (machine.precision, machine.threads, machine.computing) == (precision, threads, how(compute))
    ]  # fmt: skip
    return max(fitting, key=lambda machine: max(rate.date for rate in machine.cells.values()), default=None)


def keep_machine(machine: Machine, on_warning: Callable[[str], None] = lambda text: None) -> Machine:
    """Merge a machine's measurements into the file; newer ones of a cell win. Returns the machine with all of its cells.

    Args:
        on_warning: called if the file cannot be written.
    """
    if older := next((known for known in read_machines() if known.key == machine.key), None):
        machine = dataclasses.replace(machine, load={**older.load, **machine.load}, cells={**older.cells, **machine.cells})
    if fault := remember(measurements_file(), machine.key, dataclasses.asdict(machine)):
        on_warning(f"the measurements cannot be kept in {measurements_file()}: {fault.strerror}; DIFFVIT_CACHE names another folder")
    return machine
