"""The forecast of `run.py plan`, the table of `study --dry_run`, and what a study expects of itself."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from typing import TYPE_CHECKING

from diffvit.errors import UserError
from diffvit.ledger.spec import overrides_text
from diffvit.machine.device import device_title, resolve_device
from study.cluster.nodes import gpu_title
from study.cost.devices import SHEETS, find_machine, find_sheet, keep_machine, sheet_of
from study.options import StudyOptions, connect_cluster
from study.plan import PlannedRun, absent_data_notes, load_fingerprints, model_notes, plan_runs, precision_notes, warmup_warnings
from study.shard import own_share
from study.text import flops_unit, runs_table, say, short_model, significant

if TYPE_CHECKING:
    from study.cluster.connect import Cluster
    from study.cost.devices import Machine
    from study.cost.forecast import StudyForecast


def dry_run_table(options: StudyOptions) -> str:
    """The runs of a study with their costs, as text. Data sets need not be at hand."""
    specs = options.on(None).runs()
    fingerprints = load_fingerprints(specs, options.data_root, required=False)
    every = plan_runs(specs, options.checkpoints, fingerprints)
    own = {run.spec.title for run in own_share(every, options.shard)}
    runs = [run for run in every if run.spec.title in own]  # in the grid's order
    unit, flop = flops_unit([run.train_flops for run in runs])
    numbers = ("parameters", "batch", "steps", flop)
    header = ("model", "size", "data set", "seed", "run_id", *numbers, "state", "overrides")
    rows = [
        (
            short_model(run.spec.model), run.spec.size, run.spec.dataset, str(run.spec.seed), run.run_id or "",
            f"{run.parameters:,}", str(run.spec.protocol.batch_size), f"{run.steps:,}",
            significant(run.train_flops / unit),
            run.status or (f"to do ({run.elsewhere})" if run.elsewhere else "to do"),
            overrides_text(run.spec.overrides),
        )
        for run in runs
    ]  # fmt: skip
    total = sum(run.train_flops for run in runs)
    unit_in_all, flop_in_all = flops_unit([total])
    lines = [runs_table(header, rows, numbers, shared=("data set", "seed", "batch", "steps", "state", "overrides")), ""]
    lines += [f"note: {note}" for note in (*warmup_warnings(specs), *precision_notes(runs), *model_notes(runs, options.checkpoints))]
    lines += [f"note: {note}" for note in absent_data_notes(runs)]
    ended = sum(run.ended for run in runs)
    return "\n".join([*lines, f"{len(runs)} runs, {ended} already finished, {significant(total / unit_in_all)} {flop_in_all} in all"])


def plan_study(
    options: StudyOptions, gpu: str | None = None, gpus: int = 1, probe_seconds: float | None = None, session: float | None = None
) -> StudyForecast:
    """Forecast a study from measurements or a data sheet. Data sets need not be at hand, unless they are measured with.

    Args:
        gpu: a name in study.cost.devices.SHEETS; None: the machine at hand.
        gpus: how many of it; machines, where the device is a CPU.
        probe_seconds: measure the machine at hand first, so long for each cell.
        session: hours after which the machine is taken away.

    Raises:
        UserError: an unknown GPU, a session that ends before the study begins, or nothing is known of the machine at hand.
    """
    from study.cost.forecast import forecast_study, measured_fleet, sheet_fleet

    sheet = find_sheet(gpu) if gpu else None
    if sheet and probe_seconds is not None:
        raise UserError("--gpu and --probe exclude each other.", "--probe measures the machine at hand; --gpu is for another one.")
    machine = None
    if probe_seconds is not None:
        machine = probe_machine(options, probe_seconds)
        options = dataclasses.replace(options, precision=machine.precision)
    else:
        if sheet and options.precision == "auto":
            options = dataclasses.replace(options, precision=sheet.precision)
        options = options.on(None)
        title = "" if sheet else _local_device(options)
        machine = _known_machine(options, sheet.names if sheet else f"^{re.escape(title)}$")
        sheet = sheet or sheet_of(title)
        if machine is None and sheet is None:
            hint = f"give --probe, which measures it in some seconds a cell, or --gpu with one of {', '.join(SHEETS)}."
            raise UserError(f"nothing has been measured on this machine ({title}) for these options.", hint)
    specs, compute, price = options.runs(), options.compute, options.placement.price
    runs = plan_runs(specs, options.checkpoints, load_fingerprints(specs, options.data_root, required=False))
    for note in model_notes(runs, options.checkpoints):
        say(f"note: {note}")
    if machine is not None:
        fleet = measured_fleet(machine, runs, gpus, compute, price)
    else:
        assert sheet
        fleet = sheet_fleet(sheet, gpus, compute, price)
    if session is not None:
        fleet = dataclasses.replace(fleet, session=3600 * session)
        if 3600 * session <= fleet.start:
            raise UserError(f"a session of {session:g} h is over before the first run begins.", f"that takes {fleet.start:.0f} s.")
    return forecast_study(runs, fleet, options.checkpoints)


def probe_machine(options: StudyOptions, seconds: float) -> Machine:
    """Measure the machine at hand, or the cluster's, for so many seconds a cell, and keep what was found.

    Raises:
        UserError: bad input, or data that cannot be loaded.
    """

    begun = time.monotonic()
    with contextlib.ExitStack() as stack:
        cluster = connect_cluster(stack, options)
        options = options.on(cluster)
        specs = options.runs()
        from study.cost.probe import probe

        loading = time.monotonic()
        fingerprints = load_fingerprints(specs, options.data_root, required=True)
        begun += time.monotonic() - loading  # it may be the first time; what it takes later is measured where runs are
        runs = plan_runs(specs, options.checkpoints, fingerprints)
        machine = probe(runs, options.settings(), cluster, begun, seconds, say)
        return keep_machine(machine, lambda text: say(f"warning: {text}"))


def _known_machine(options: StudyOptions, names: str) -> Machine | None:
    """The earlier measurement of a device whose name matches."""
    return find_machine(names, options.precision, options.placement.cpus_per_run, options.compute)


def _local_device(options: StudyOptions) -> str:
    """The name of this machine's device that the study would train on."""
    return device_title(resolve_device(options.placement.device))


def expected_forecast(options: StudyOptions, runs: list[PlannedRun], cluster: Cluster) -> StudyForecast | None:
    """Forecast the study on its cluster; None where its devices are unknown, or a group trains a run."""
    from study.cost.forecast import forecast_study, measured_fleet, sheet_fleet

    if options.placement.workers > 1:
        return None
    title = gpu_title() if options.placement.gpus_per_run else _local_device(options)
    machine, sheet = _known_machine(options, f"^{re.escape(title)}$"), sheet_of(title)
    if machine:
        fleet = measured_fleet(machine, runs, 1, options.compute, None)
    elif sheet:
        fleet = sheet_fleet(sheet, 1, options.compute, None)
    else:
        return None
    return forecast_study(runs, dataclasses.replace(fleet, slots=options.placement.slots(cluster)), options.checkpoints)
