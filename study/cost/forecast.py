"""What a study will take: memory, time and money of each run, and when the last one ends.

A run takes the seconds of its training images, of the images that it evaluates, and of its start. These come from measurements on a
machine (probe.py), or are estimated from a GPU's data sheet. The study's end follows from the order in which it starts its runs:
longest first, each in the first free slot.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from diffvit.compute import Compute
from diffvit.keeping.saving import DEFAULT_SAVING
from diffvit.keeping.state import StateFolder
from diffvit.ledger.spec import RunSpec, overrides_text
from diffvit.machine.device import is_half
from diffvit.memory import micro_batch_within, training_memory
from diffvit.protocol import images_in_steps
from study.cost.devices import SHEETS, Machine, Sheet
from study.plan import PlannedRun, absent_data_notes, model_of, precision_notes
from study.text import clock, duration, runs_table, short_model

# The model of a GPU of which only the data sheet is known, for fused or compiled blocks: a pass takes its products at a share of
# the peak, and the bytes that its blocks move at a share of the bandwidth. Both add up. `python -m bench.fit_sheet` fits the shares to
# measured cells; fp16's is what a V100 reached with large matrices, 83 of 125 TFLOP/s (arXiv 1803.04014); fp32's is assumed. The size of
# a micro-batch makes no difference.
SHARE_OF_PEAK = {"bf16": 0.75, "fp16": 0.66, "fp32": 0.5}
SHARE_OF_BANDWIDTH = 0.61
PLAIN_BLOCKS = 1.8  # times as long, where there are no kernels to fuse them: measured on an H200, at bf16 (docs/performance.md)
PASSES_TRAINING = 3  # one forward, and a backward pass of twice that; one more with recomputation
_PASSES_OF_A_PRODUCT = 2  # its input and its output are written by one kernel and read by the next
_PASSES_OF_THE_STREAM = 6  # fp32 between the layers: each of the two residual sums reads and writes it, and the norm reads it again
SHEET_STUDY_START = 30.0
SHEET_FIRST_RUN = 37.0  # more than for later runs of the same process, which find compiled code
SHEET_RUN_START = 3.0

MEASURED, SCALED, SHEET = "measured", "scaled", "sheet"
_TO_BE_MEASURED = "the truth may be half or twice that, and --probe on the machine measures it"


@dataclass(frozen=True)
class Rate:
    """Seconds of an image's training step, of an image's evaluation, and of a run's start and end, and where they are from.

    Attributes:
        source: MEASURED; SCALED by FLOPs from another cell that was measured; SHEET, estimated from a data sheet.
        images: of a measured step; None elsewhere.
        date: of a measurement, or of the one that was scaled.
    """

    train: float
    evaluate: float
    start: float
    source: str
    images: int | None = None
    date: str = ""


@dataclass(frozen=True)
class RunForecast:
    """The forecast of a run.

    Attributes:
        micro_batch: images at once.
        memory: bytes at that micro-batch: parameters with all that belongs to them, and activations.
        fits: whether that is within the device's memory.
        steps_done: of a run that has begun, up to its last saved state; of one that has ended, all.
        seconds: what is left of it.
    """

    run: PlannedRun
    micro_batch: int
    memory: int
    fits: bool
    steps_done: int
    seconds: float
    rate: Rate

    @property
    def state(self) -> str:
        """The run's state, for a table."""
        if self.run.status:
            return self.run.status
        return f"{100 * self.steps_done / self.run.steps:.0f} % done" if self.steps_done else "to do"


@dataclass(frozen=True)
class Fleet:
    """The devices that a study will run on.

    Attributes:
        title: the device, for a person.
        kind: "cpu" or "cuda".
        memory: bytes of a device, or of the machine.
        devices: GPUs, or machines where the device is a CPU.
        runs_per_device: runs that share a device.
        slots: runs that train at a time on all of them.
        start: seconds until the first run begins, loading data included.
        session: seconds after which a lent device is taken away; None: never.
        rate: of a run's cell.
        sheet: the data sheet that rates are estimated from; None where they were measured.
        price: of a device, per hour; None: unknown.
    """

    title: str
    kind: str
    memory: int
    devices: int
    runs_per_device: int
    slots: int
    start: float
    rate: Callable[[PlannedRun], Rate]
    compute: Compute
    sheet: Sheet | None = None
    price: float | None = None
    session: float | None = None


@dataclass(frozen=True)
class StudyForecast:
    """The forecast of a study.

    Attributes:
        runs: in the grid's order.
        makespan: seconds from the command to the end of the last run.
    """

    runs: list[RunForecast]
    fleet: Fleet
    makespan: float

    @property
    def pending(self) -> list[RunForecast]:
        """Runs that have not ended."""
        return [each for each in self.runs if not each.run.ended]

    @property
    def precision(self) -> str:
        """The precision of its runs."""
        return self.runs[0].run.spec.precision

    @property
    def sessions(self) -> int | None:
        """How many sessions of its fleet's length it takes; each begins with the study's start."""
        if self.fleet.session is None:
            return None
        return math.ceil((self.makespan - self.fleet.start) / (self.fleet.session - self.fleet.start)) if self.pending else 0

    @property
    def seconds(self) -> float:
        """Seconds of all runs together."""
        return sum(each.seconds for each in self.runs)

    def price(self, seconds: float) -> float | None:
        """Dollars of so many seconds on a run's share of a device; None where the price is unknown."""
        return None if self.fleet.price is None else seconds / 3600 * self.fleet.price / self.fleet.runs_per_device

    @property
    def bill(self) -> float | None:
        """Dollars of all devices until the last run ends; None where the price is unknown."""
        return None if self.fleet.price is None else self.makespan / 3600 * self.fleet.price * self.fleet.devices


def forecast_study(runs: Sequence[PlannedRun], fleet: Fleet, checkpoints: Path) -> StudyForecast:
    """Forecast runs on a fleet. Ended runs take nothing, unfinished ones the rest after their last saved state."""
    forecasts = [_forecast_run(run, fleet, checkpoints) for run in runs]
    # As the study does: by the work of the whole run, also where a part of it is done.
    order = sorted((each for each in forecasts if not each.run.ended), key=lambda each: each.run.train_flops, reverse=True)
    end = makespan([each.seconds for each in order], fleet.slots)
    return StudyForecast(forecasts, fleet, fleet.start + end if order else 0.0)


def makespan(seconds: Iterable[float], slots: int) -> float:
    """The end of the last job, where jobs begin in the given order, each in the slot that is free first."""
    free = [0.0] * slots
    for each in seconds:
        heapq.heappush(free, heapq.heappop(free) + each)
    return max(free)


def _forecast_run(run: PlannedRun, fleet: Fleet, checkpoints: Path) -> RunForecast:
    protocol, rate = run.spec.protocol, fleet.rate(run)
    model, recompute = model_of(run.spec), bool(fleet.compute.recompute)
    kind, precision = fleet.kind, run.spec.precision
    memory = fleet.memory / fleet.runs_per_device
    batch = protocol.batch_size
    micro_batch = min(fleet.compute.micro_batch or micro_batch_within(model, batch, memory, precision, kind, recompute), batch)
    needed = training_memory(model, micro_batch, precision, kind, recompute)
    done = run.steps if run.ended else _steps_saved(run, checkpoints)
    seconds = 0.0 if run.ended else run_seconds(run, rate, done)
    return RunForecast(run, micro_batch, needed, needed <= memory, done, seconds, rate)


def run_seconds(run: PlannedRun, rate: Rate, done: int = 0) -> float:
    """Seconds that a run still takes after `done` steps."""
    protocol = run.spec.protocol
    train, val, test = protocol.images
    trained, validated = (
        images_in_steps(rows, protocol.batch_size, run.steps) - images_in_steps(rows, protocol.batch_size, done) for rows in (train, val)
    )
    # A trial run is evaluated on as many images as it was trained on, at least 64.
    limit = max(64, images_in_steps(train, protocol.batch_size, run.steps)) if protocol.max_steps is not None else train + val + test
    evaluated = sum(min(images, limit) for images in (val, test, protocol.false_labels()))
    return rate.start + trained * rate.train + (validated + evaluated) * rate.evaluate


def _steps_saved(run: PlannedRun, checkpoints: Path) -> int:
    return next(iter(StateFolder(checkpoints, run.run_id).steps()), 0) if run.run_id else 0


def cell_of(spec: RunSpec) -> str:
    """The key of a run's cell: all that decides how long its steps take on a machine."""
    protocol = spec.protocol
    heads = f" heads{protocol.heads}" if "heads" in spec.overrides else ""
    shape = f"{protocol.image_size}/{protocol.patch_size} d{protocol.d_model} depth{protocol.depths[spec.size]}"
    return f"{spec.model} {shape} batch{protocol.batch_size}{' dropout' if protocol.dropout else ''}{heads}"


def sheet_rate(sheet: Sheet, recompute: bool = False) -> Callable[[PlannedRun], Rate]:
    """Rates estimated from a data sheet, by the model at the top of this file."""

    def rate(run: PlannedRun) -> Rate:
        products, moved = least_seconds(sheet, run)
        share = SHARE_OF_PEAK[sheet.peak(run.spec.precision)[0]]
        forward = (products / share + moved / SHARE_OF_BANDWIDTH) * (PLAIN_BLOCKS if sheet.bf16 is None else 1.0)
        return Rate((PASSES_TRAINING + recompute) * forward, forward, SHEET_RUN_START, SHEET)

    return rate


def least_seconds(sheet: Sheet, run: PlannedRun) -> tuple[float, float]:
    """Seconds of an image's forward pass for its products at full peak, and for its bytes at full bandwidth."""
    model, (precision, peak) = model_of(run.spec), sheet.peak(run.spec.precision)
    tokens, d_model = model.pos_embed.shape[1:]
    layers = [module for module in model.blocks[0].modules() if isinstance(module, nn.Linear)]
    values = (2 if is_half(precision) else 4) * sum(layer.in_features + layer.out_features for layer in layers)
    blocks = len(model.blocks) - 1  # of the last one only the class token is computed
    moved = blocks * tokens * (_PASSES_OF_A_PRODUCT * values + _PASSES_OF_THE_STREAM * 4 * d_model)
    return run.forward_flops / peak, moved / (sheet.bandwidth * 1e9)


def measured_rate(machine: Machine) -> Callable[[PlannedRun], Rate]:
    """Rates measured on a machine; an unmeasured cell has those of the nearest one, scaled by FLOPs."""

    def rate(run: PlannedRun) -> Rate:
        cell = machine.cells.get(cell_of(run.spec))
        if cell:
            return Rate(cell.train, cell.evaluate, cell.start, MEASURED, cell.images, cell.date)
        nearest = min(machine.cells.values(), key=lambda other: abs(other.flops / run.forward_flops - 1))
        factor = run.forward_flops / nearest.flops
        return Rate(nearest.train * factor, nearest.evaluate * factor, nearest.start, SCALED, None, nearest.date)

    return rate


def sheet_fleet(sheet: Sheet, devices: int, compute: Compute, price: float | None) -> Fleet:
    """GPUs of which only the data sheet is known."""
    compiles = compute.compile or compute.fused or not (compute.deterministic or compute.compile is compute.fused is False)
    start = SHEET_STUDY_START + (SHEET_FIRST_RUN if compiles else 0.0)  # the first runs compile side by side
    return Fleet(
        title=sheet.title, kind="cuda", memory=int(sheet.memory * 2**30),
        devices=devices, runs_per_device=1, slots=devices,
        start=start, rate=sheet_rate(sheet, bool(compute.recompute)), compute=compute, sheet=sheet, price=price,
    )  # fmt: skip


def measured_fleet(machine: Machine, runs: Iterable[PlannedRun], devices: int, compute: Compute, price: float | None) -> Fleet:
    """Machines like one that was measured."""
    datasets = {run.spec.dataset for run in runs if not run.ended}
    known = max(machine.load.values(), default=0.0)
    # The study loads each data set itself, and so does each process that trains.
    start = machine.start + 2 * sum(machine.load.get(dataset, known) for dataset in datasets)
    return Fleet(
        title=machine.device_name, kind=machine.device, memory=machine.memory, devices=devices,
        runs_per_device=machine.at_once, slots=devices * machine.at_once, start=start, rate=measured_rate(machine), compute=compute,
        price=price,
    )  # fmt: skip


def forecast_text(forecast: StudyForecast) -> str:
    """The forecast as a table and the sentences that belong to it."""
    money = ["$"] if forecast.fleet.price is not None else []
    numbers = ("parameters", "micro", "GB", "time", *money)
    rows = []
    for each in forecast.runs:
        spec = each.run.spec
        names = (short_model(spec.model), spec.size, spec.dataset, str(spec.seed))
        costs = (
            f"{each.run.parameters:,}", str(each.micro_batch),
            f"{each.memory / 2**30:.1f}" + ("" if each.fits else "!"), clock(each.seconds, with_hours=True),
            *(f"{forecast.price(each.seconds):,.2f}" for _ in money),
        )  # fmt: skip
        rows.append((*names, *costs, each.rate.source, each.state, overrides_text(spec.overrides)))
    shared = ("data set", "seed", "from", "state", "overrides")
    table = runs_table(("model", "size", "data set", "seed", *numbers, "from", "state", "overrides"), rows, numbers, shared)
    return "\n".join([table, "", *_sentences(forecast)])


def _sentences(forecast: StudyForecast) -> list[str]:
    fleet, pending = forecast.fleet, forecast.pending
    unit = "GPU" if fleet.kind == "cuda" else "machine"
    where = f"{fleet.devices} x {fleet.title}" + (f", {fleet.runs_per_device} runs at a time on each" if fleet.runs_per_device > 1 else "")
    ended, begun = len(forecast.runs) - len(pending), sum(bool(each.steps_done) for each in pending)
    lines = [
        f"place     {where}, {forecast.precision}, {fleet.memory / 2**30:,.0f} GB",
        f"runs      {len(pending)} to train" + (f", {begun} of them begun" if begun else "") + f"; {ended} already finished",
        f"work      {duration(forecast.seconds / fleet.runs_per_device)} of {unit} time"
        + (f", ${forecast.price(forecast.seconds):,.2f}" if fleet.price is not None else "; --price P says what that costs"),
        f"end       {duration(forecast.makespan)} after the start, longest runs first",
    ]
    if forecast.bill is not None:
        lines.append(f"bill      ${forecast.bill:,.2f}: every {unit} is paid until the last run ends")
    if pending:
        again = DEFAULT_SAVING.sync_every
        dollars = f" (${fleet.price * again / 3600:,.2f} of each {unit})" if fleet.price is not None else ""
        lines.append(f"spot      with --storage an interruption costs at most {duration(again)}{dollars}; without it, all unfinished work")
    if fleet.session and (sessions := forecast.sessions):
        enough = "one suffices" if sessions == 1 else f"{sessions} of them, each of which resumes from the last checkpoints"
        lines.append(f"sessions  of {duration(fleet.session)}, if they last as long: {enough}")
    lines += _sources(forecast)
    runs = [each.run for each in forecast.runs]
    lines += [f"note      {note}" for note in (*absent_data_notes(runs), *precision_notes(runs))]
    if not all(each.fits for each in pending):
        lines.append("warning   ! does not fit into memory: lower --micro_batch, or give --recompute")
    return lines


def _sources(forecast: StudyForecast) -> list[str]:
    """Where the rates come from, a sentence for each source."""
    chosen = forecast.pending or forecast.runs
    sources = {each.rate.source for each in chosen}
    lines = []
    if MEASURED in sources:
        rates = [
            (each.rate.date, each.rate.images or 0, each.run.spec.protocol.batch_size) for each in chosen if each.rate.source == MEASURED
        ]
        few = "; some with fewer images a step than the batch, for which --probe_seconds is too short"
        days = " and ".join(sorted({date for date, _, _ in rates}))
        lines.append(f"measured  on {forecast.fleet.title}, {days}" + (few if any(images < batch for _, images, batch in rates) else ""))
    if SCALED in sources:
        lines.append("scaled    by FLOPs from the nearest cell that was measured; --probe measures these too")
    if SHEET in sources:
        lines.append(f"sheet     ESTIMATED from the data sheet: {_assumptions(forecast.fleet.sheet, chosen[0].run)}")
    return lines


def _assumptions(sheet: Sheet | None, run: PlannedRun) -> str:
    """The assumptions of an estimate from a data sheet."""
    assert sheet
    precision, _ = sheet.peak(run.spec.precision)
    memory = f"memory at {100 * SHARE_OF_BANDWIDTH:.0f} % of bandwidth"
    products = f"products at {100 * SHARE_OF_PEAK[precision]:.0f} % of peak"
    fitted = "fitted to measurements on " + " and ".join(f"{each.title}, {each.measured}" for each in SHEETS.values() if each.measured)
    if precision != "bf16":
        why = "as large matrices reached on a V100" if precision == "fp16" else "which is assumed"
        plain = "" if sheet.bf16 else f"; {PLAIN_BLOCKS:g} times that for plain blocks, as on an H200"
        return f"{memory}, {fitted}, and {products}, {why}{plain}; not measured at {precision}: {_TO_BE_MEASURED}"
    return f"{products} and {memory}, {fitted}" + ("" if sheet.measured else f"; not measured on this GPU: {_TO_BE_MEASURED}")


def forecast_json(forecast: StudyForecast) -> dict[str, Any]:
    """The forecast as JSON values: seconds, bytes, dollars."""
    fleet = forecast.fleet
    return {
        "device": fleet.title, "kind": fleet.kind, "precision": forecast.precision, "devices": fleet.devices,
        "runs_per_device": fleet.runs_per_device,
        "memory": fleet.memory, "price": fleet.price, "start_seconds": fleet.start, "seconds": forecast.seconds,
        "makespan_seconds": forecast.makespan, "dollars": forecast.price(forecast.seconds), "bill": forecast.bill,
        "session_seconds": fleet.session, "sessions": forecast.sessions,
        "runs": [
            {
                **each.run.spec.names(str(each.run.run_id)), "run_id": each.run.run_id, "overrides": dict(each.run.spec.overrides),
                "parameters": each.run.parameters, "train_flops": each.run.train_flops, "steps": each.run.steps,
                "steps_done": each.steps_done, "state": each.state, "micro_batch": each.micro_batch, "memory": each.memory,
                "fits": each.fits, "seconds": each.seconds, "dollars": forecast.price(each.seconds), "rate": dataclasses.asdict(each.rate),
            }
            for each in forecast.runs
        ],
    }  # fmt: skip
