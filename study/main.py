"""What the commands study, plot and list do, from options to exit code."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffvit.errors import StorageError, UserError, redacted
from diffvit.findings.kept import read_evaluations
from diffvit.keeping.saving import DEFAULT_SAVING, Saving, is_on_hub
from diffvit.ledger.disk import check_lockable, check_writable
from diffvit.ledger.files import RunFiles
from diffvit.ledger.spec import RunSpec, overrides_text
from study.grid import GRIDS, Grid, find_grid
from study.plan import PlannedRun, load_fingerprints, plan_runs, precision_notes, run_ids_of

if TYPE_CHECKING:
    import pandas as pd

    from diffvit.compute import Compute
    from study.cluster.connect import Cluster
    from study.cluster.runner import Settings
    from study.cost.devices import Machine
    from study.cost.forecast import StudyForecast
    from study.shard import Shard


@dataclass(frozen=True)
class StudyOptions:
    """The command line of `study`, parsed. `command` is how the user typed it."""

    grid: Grid
    checkpoints: Path
    seeds: int | None = None
    epochs: int | None = None
    data_root: str | None = None
    address: str | None = None
    dashboard: bool = True
    gpus_per_run: float | None = None
    cpus_per_run: int = 1
    workers: int = 1
    resources: Mapping[str, float] = field(default_factory=dict)
    precision: str = "auto"
    micro_batch: int | None = None
    deterministic: bool = False
    fused: bool | None = None
    graphs: bool | None = None
    compile: bool | None = None
    recompute: bool | None = None
    saving: Saving = DEFAULT_SAVING
    shard: Shard | None = None
    price: float | None = None
    command: str = "run.py study"

    def runs(self, precision: str) -> list[RunSpec]:
        """The grid's runs with this command's overrides."""
        return self.grid.runs(precision, self.seeds, {"epochs": self.epochs})

    @property
    def name(self) -> str:
        """What the study's tables are called: its grid and this command's overrides. Not its seeds, since the tables have all there are."""
        return _named_after(self.grid.name, [self.grid], self.epochs)


def _named_after(name: str, grids: list[Grid], epochs: int | None) -> str:
    """A name with the command line's overrides, if they change any run of the grids: "digits_epochs-3"."""
    from study.table import file_stem

    overrides = {"epochs": epochs}
    plain, asked = ([run.protocol for grid in grids for run in grid.runs(seeds=1, overrides=each)] for each in ({}, overrides))
    return file_stem(name, overrides_text(overrides)) if plain != asked else name


def dry_run_table(options: StudyOptions) -> str:
    """The runs of a study with their costs, as text. Data sets need not be at hand."""
    specs = options.runs(_local_precision(options))
    fingerprints = load_fingerprints(specs, options.data_root, required=False)
    runs = _share(plan_runs(specs, options.checkpoints, fingerprints), options)
    header = (
        "model", "size", "data set", "seed", "run_id", "parameters", "batch", "steps", "GFLOP/image", "train EFLOP", "state", "overrides",
    )  # fmt: skip
    rows = [
        (
            run.spec.model, run.spec.size, run.spec.dataset, str(run.spec.seed), run.run_id or "data not here",
            f"{run.parameters:,}", str(run.spec.protocol.batch_size), f"{run.steps:,}",
            _significant(run.forward_flops / 1e9), _significant(run.train_flops / 1e18),
            run.status or (f"to do ({run.elsewhere})" if run.elsewhere else "to do"),
            overrides_text(run.spec.overrides),
        )
        for run in runs
    ]  # fmt: skip
    total = sum(run.train_flops for run in runs)
    lines = [_columns([header, *rows], right=range(5, 10)), ""]
    lines += [f"note: {note}" for note in (*warmup_warnings(specs), *precision_notes(runs))]
    ended = sum(run.ended for run in runs)
    return "\n".join([*lines, f"{len(runs)} runs, {ended} ended, {_significant(total / 1e18)} EFLOP ({total:.2e} FLOP) in all"])


def plan_study(
    options: StudyOptions, gpu: str | None = None, gpus: int = 1, price: float | None = None, probe_seconds: float | None = None
) -> StudyForecast:
    """What a study will take, from measurements or a data sheet. Data sets need not be at hand, unless they are measured with.

    Args:
        gpu: a name in study.cost.devices.SHEETS; None: the machine at hand.
        gpus: how many of it; machines, where the device is a CPU.
        price: of one of them, per hour.
        probe_seconds: measure the machine at hand first, so long for each cell.

    Raises:
        UserError: an unknown GPU, or nothing is known of the machine at hand.
    """
    from study.cost.devices import SHEETS, find_sheet, sheet_of
    from study.cost.forecast import forecast_study, measured_place, sheet_place

    sheet = find_sheet(gpu) if gpu else None
    if sheet and probe_seconds is not None:
        raise UserError("--gpu and --probe exclude each other.", "--probe measures the machine at hand; --gpu is for another one.")
    machine = None
    if probe_seconds is not None:
        machine = probe_machine(options, probe_seconds)
        precision = machine.precision
    else:
        precision = sheet.precision if sheet and options.precision == "auto" else _local_precision(options)
        title = "" if sheet else _local_device(options)
        machine = _known_machine(options, sheet.names if sheet else f"^{re.escape(title)}$", precision)
        sheet = sheet or sheet_of(title)
        if machine is None and sheet is None:
            hint = f"give --probe, or --gpu {'|'.join(SHEETS)}."
            raise UserError(f"nothing has been measured on this machine ({title}) for these options.", hint)
    specs, compute = options.runs(precision), computing(options)
    runs = plan_runs(specs, options.checkpoints, load_fingerprints(specs, options.data_root, required=False))
    if machine is not None:
        place = measured_place(machine, runs, gpus, compute, price)
    else:
        assert sheet
        place = sheet_place(sheet, gpus, compute, price)
    return forecast_study(runs, place, options.checkpoints)


def probe_machine(options: StudyOptions, seconds: float) -> Machine:
    """Measure the machine at hand, or the cluster's, for so many seconds a cell, and keep what was found.

    Raises:
        UserError: bad input, or data that cannot be loaded.
    """
    from study.cost.devices import keep_machine

    begun = time.monotonic()
    with contextlib.ExitStack() as stack:
        cluster = _connect(stack, options)
        specs = options.runs(_precision_on(cluster, options))
        from study.cost.probe import probe

        loading = time.monotonic()
        fingerprints = load_fingerprints(specs, options.data_root, required=True)
        begun += time.monotonic() - loading  # it may be the first time; what it takes later is measured where runs are
        runs = plan_runs(specs, options.checkpoints, fingerprints)
        machine = probe(runs, _settings(options, cluster), cluster, begun, seconds, _say)
        return keep_machine(machine, lambda text: _say(f"warning: {text}"))


def _known_machine(options: StudyOptions, names: str, precision: str) -> Machine | None:
    """What was measured earlier of a device whose name fits."""
    from study.cost.devices import find_machine

    return find_machine(names, precision, options.cpus_per_run, computing(options))


def _local_device(options: StudyOptions) -> str:
    from diffvit.machine.device import device_title, resolve_device

    return device_title(resolve_device("cpu" if options.gpus_per_run == 0 else None))


def _expected(options: StudyOptions, runs: list[PlannedRun], settings: Settings, cluster: Cluster) -> StudyForecast | None:
    """What the study will take on its cluster; None where nothing is known of the cluster's devices, or a group trains a run."""
    from study.cluster.nodes import gpu_title
    from study.cluster.runner import slots
    from study.cost.devices import sheet_of
    from study.cost.forecast import forecast_study, measured_place, sheet_place

    if settings.workers > 1:
        return None
    title = gpu_title() if settings.gpus_per_run else _local_device(dataclasses.replace(options, gpus_per_run=0))
    machine, sheet = _known_machine(options, f"^{re.escape(title)}$", runs[0].spec.precision), sheet_of(title)
    if machine:
        place = measured_place(machine, runs, 1, settings.compute, None)
    elif sheet:
        place = sheet_place(sheet, 1, settings.compute, None)
    else:
        return None
    return forecast_study(runs, dataclasses.replace(place, slots=slots(cluster, settings)), options.checkpoints)


def run_study(options: StudyOptions) -> int:
    """Train what is not done, then table and figures. Returns the exit code.

    Raises:
        UserError: bad input, before any training.
    """
    begun = time.monotonic()
    with contextlib.ExitStack() as stack:
        cluster = None
        _check_storage(options)
        precision = _local_precision(options)
        if _may_join(options):
            cluster = _connect(stack, options)
            precision = _precision_on(cluster, options)
        specs = options.runs(precision)
        fingerprints = load_fingerprints(specs, options.data_root, required=True)
        _check_folders(options.checkpoints, specs)
        every = plan_runs(specs, options.checkpoints, fingerprints)
        own = _share(every, options)
        unsent = _exchange(options, _here_or(own, every))
        for warning in warmup_warnings(specs):
            _say(f"warning: {warning}")
        for note in precision_notes(own):
            _say(f"note: {note}")
        tried = [*own]
        failures: list[tuple[str, str]] = []
        with _alive(options, every) as undone:
            runs, signal_code = own, None
            while runs and signal_code is None:
                pending = [run for run in plan_runs([run.spec for run in runs], options.checkpoints, fingerprints) if not run.ended]
                if pending:
                    cluster = cluster or _connect(stack, options)
                    failed, signal_code = _train(runs, pending, options, cluster, begun)
                    failures += failed
                    unsent = _exchange(options, _here_or(tried, every), strict=False)
                else:
                    _say(f"all {len(runs)} runs are done already")
                if signal_code is not None:
                    undone()
                else:
                    runs = _left_by_others(options, every, tried)
                    tried += runs
    drawn = _report(options, specs, draw=signal_code is None)
    if signal_code is None:
        _publish(options, unsent)
    ended = sum(_has_result(run, options) for run in tried)
    if signal_code is not None:
        _say(f"\nstopped: {ended} of {len(tried)} runs are done, the states of the others are saved")
        _say(f"hint: carry on with {options.command}")
        return signal_code
    if not is_on_hub(options.saving.storage):
        failures += [(title, f"the storage {options.saving.storage} could not be reached") for title in unsent]
    if failures:
        _say(f"\nerror: {len(failures)} of {len(tried)} runs failed:")
        for title, reason in failures:
            _say(f"  {title}: {reason}")
        _say(f"hint: the same command trains only what is missing: {options.command}")
        return 1
    if options.shard:
        collect = re.sub(r"--shard[ =]\S+", "--collect", options.command)
        _say(f"\nshard {options.shard}: {ended} of {len(every)} runs of the grid are done here\nhint: bring all together with {collect}")
    return 0 if drawn else 1


def _here_or(runs: list[PlannedRun], every: list[PlannedRun]) -> list[PlannedRun]:
    """The runs, and those of others that have ended here."""
    ids = {run.run_id for run in runs}
    return [run for run in every if run.run_id in ids or run.ended]


def _share(runs: list[PlannedRun], options: StudyOptions) -> list[PlannedRun]:
    """This box's runs."""
    if not options.shard:
        return runs
    from study.shard import shares

    return shares(runs, options.shard.of)[options.shard.number - 1]


@contextlib.contextmanager
def _alive(options: StudyOptions, runs: list[PlannedRun]) -> Iterator[Callable[[], None]]:
    """With a shard and a storage: while the block runs, other boxes see that this one lives. Yields what to call if work is left undone."""
    if not (options.shard and options.saving.storage):
        yield lambda: None
        return
    from diffvit.keeping.storage import open_storage
    from study.shard import sign_of_life

    storage = open_storage(options.saving.storage)
    warn = lambda text: _say(f"warning: {text}")  # noqa: E731
    with sign_of_life(storage, runs, options.shard, options.checkpoints, options.saving.lease_seconds, warn) as undone:
        yield undone


def _left_by_others(options: StudyOptions, runs: list[PlannedRun], tried: list[PlannedRun]) -> list[PlannedRun]:
    """Runs of other boxes that this one takes over, having ended its own."""
    if not (options.shard and options.saving.storage):
        return []
    from diffvit.keeping.storage import open_storage
    from study.shard import stranded

    try:
        found = stranded(open_storage(options.saving.storage), runs, options.shard, options.checkpoints)
    except StorageError as error:
        _say(f"warning: {error.message} What other boxes left undone is not looked for.")
        return []
    ids = {run.run_id for run in tried}
    found = [run for run in found if run.run_id not in ids]
    if found:
        _say(f"{len(found)} runs were left undone by other boxes; taking them over")
    return found


def collect_study(options: StudyOptions) -> int:
    """Bring the grid's finished runs from the storage, whoever trained them, then table and figures. Returns 1 where some are missing.

    Data sets need not be at hand.

    Raises:
        UserError: bad input, or the storage does not answer.
    """
    from diffvit.keeping.storage import open_storage
    from study.hub import collect
    from study.shard import forget_shards
    from study.table import missing_runs

    assert options.saving.storage
    specs = options.runs(_local_precision(options))
    _check_folders(options.checkpoints, specs)
    storage = open_storage(options.saving.storage)
    brought = collect(storage, specs, options.checkpoints)
    _say(f"brought {len(brought)} runs from {options.saving.storage}")
    drawn = _report(options, specs, draw=True)
    _publish(options, [])
    missing = missing_runs(options.checkpoints, specs)
    if missing:
        _say(f"\n{len(missing)} of {len(specs)} runs are not there yet:")
        for spec in missing:
            _say(f"  {spec.title}")
        _say(f"hint: when their boxes are done, give the same command again: {options.command}")
        return 1
    forget_shards(storage, specs)
    storage.tidy()
    return 0 if drawn else 1


def _publish(options: StudyOptions, unsent: list[str]) -> None:
    """On the hub: the model card, and what could not be sent, with the command that sends it later."""
    if is_on_hub(options.saving.storage):
        from study.hub import publish

        publish(str(options.saving.storage), options.checkpoints, lambda text: _say(f"warning: {text}"))
        if unsent:
            _say(f"warning: {len(unsent)} runs are not on the hub yet: {'; '.join(unsent)}\nhint: send them later with {options.command}")


def rehearse_study(options: StudyOptions) -> int:
    """Two real steps of every cell of the grid, from data to storage; a line for each to stdout. Returns the exit code.

    The ledger and the storage are afterwards as they were.

    Raises:
        UserError: bad input, or data that cannot be loaded.
    """
    _check_storage(options)
    with contextlib.ExitStack() as stack:
        cluster = _connect(stack, options)
        from study.cost.rehearsal import cells, rehearse

        specs = cells(options.runs(_precision_on(cluster, options)))
        load_fingerprints(specs, options.data_root, required=True)
        settings = _settings(options, cluster)
        at_once = _slots(cluster, settings)
        _say(f"{len(specs)} cells to rehearse, {at_once} at a time")
        outcomes = rehearse(specs, settings, lambda each: print(redacted(each.line()), flush=True))
    failed = [each.title for each in outcomes if each.fault]
    if failed:
        _say(f"\nerror: {len(failed)} of {len(outcomes)} cells failed: {', '.join(failed)}\nhint: mend that before the study.")
        return 1
    _say(f"all {len(outcomes)} cells work")
    return 0


def _check_storage(options: StudyOptions) -> None:
    """Raises UserError where the storage cannot be used, before anything that takes long: data may have to be downloaded."""
    if options.saving.storage:
        from diffvit.keeping.storage import open_storage

        open_storage(options.saving.storage).check()


def _exchange(options: StudyOptions, runs: list[PlannedRun], strict: bool = True) -> list[str]:
    """With a storage: brings ended runs that are only there, and sends those that are only here.

    Args:
        strict: a storage that does not answer is an error.

    Returns:
        Titles of the runs that could not be exchanged.
    """
    if not options.saving.storage:
        return []
    from diffvit.keeping.runs import settle_run
    from diffvit.keeping.storage import open_storage

    storage, unsent = open_storage(options.saving.storage), []
    for run in runs:
        try:
            settle_run(storage, RunFiles.of(options.checkpoints, run.spec, str(run.run_id)))
        except StorageError:
            if strict:
                raise
            unsent.append(run.spec.title)
    return unsent


def _train(
    runs: list[PlannedRun], pending: list[PlannedRun], options: StudyOptions, cluster: Cluster, begun: float
) -> tuple[list[tuple[str, str]], int | None]:
    """Train the pending runs. Returns (title, reason) of those that failed, and the exit code if a signal ended the study.

    Args:
        begun: time.monotonic() when the study began.
    """
    from study.cluster.display import StudyDisplay
    from study.cluster.nodes import check_shared_folder, check_storage_and_data
    from study.cluster.runner import dollars_per_second, run_all
    from study.cluster.watch import watch
    from study.cost.forecast import duration
    from study.cost.truth import compare, comparison_lines, seconds_taken

    settings = _settings(options, cluster)
    at_once = _slots(cluster, settings)
    if settings.saving.storage and not cluster.own:  # its workers have an environment of their own
        check_storage_and_data(settings.saving.storage, settings.data_root)
    elif cluster.nodes > 1:
        check_shared_folder(options.checkpoints, settings.data_root)
    _say(f"{len(pending)} of {len(runs)} runs to train, {at_once} at a time")
    forecast = _expected(options, runs, settings, cluster)
    if forecast:
        sources = " and ".join(sorted({each.rate.source for each in forecast.pending}))
        _say(f"forecast: {duration(forecast.makespan)} ({sources})")
    with watch(cluster, _say, options.command), StudyDisplay(runs) as display:
        reports, signal_code = run_all(pending, settings, cluster, display, wait_for_others=options.shard is None)
    took = time.monotonic() - begun
    with_storage = bool(settings.saving.storage)  # then another node may have it, and it is brought here in a moment
    failures = []
    for run in pending:
        report = reports.get(str(run.run_id), {})
        ended = _has_result(run, options) or (with_storage and "status" in report)
        if not ended and options.shard and report.get("busy"):
            _say(f"{run.spec.title} is trained by another box")
        elif not ended:
            failures.append((run.spec.title, str(report.get("failed", "it ended without a result"))))
    if forecast:
        as_planned = not failures and signal_code is None
        for line in comparison_lines(compare(forecast, seconds_taken(reports), took if as_planned else None, options.checkpoints)):
            _say(line)
    rate = dollars_per_second(settings)
    if options.price and rate:
        seconds = sum(report.get("run_seconds", 0.0) for report in reports.values())
        devices, name = (cluster.gpus, "GPUs") if settings.gpus_per_run else (cluster.nodes, "machines")
        bill = options.price * devices * took / 3600
        _say(f"cost: ${rate * seconds:,.2f} for the runs' {duration(seconds)}; ${bill:,.2f} for all {devices:g} {name} from start to end")
    return failures, signal_code


def _slots(cluster: Cluster, settings: Settings) -> int:
    """How many runs train at a time. Raises UserError where the cluster has not room for one."""
    from study.cluster.runner import slots

    at_once = slots(cluster, settings)
    if at_once < 1:
        needs = f"{settings.workers} x {settings.cpus_per_run} CPUs"
        needs += f" and {settings.gpus_per_run:g} GPUs" if settings.gpus_per_run else ""
        needs += "".join(f" and {amount:g} {name}" for name, amount in settings.resources.items())
        raise UserError(
            f"a run needs {needs}, and the cluster has {cluster.cpus:g} CPUs and {cluster.gpus:g} GPUs.",
            "lower --cpus_per_run, --gpus_per_run, --resource or --workers.",
        )
    return at_once


def _has_result(run: PlannedRun, options: StudyOptions) -> bool:
    return RunFiles.of(options.checkpoints, run.spec, str(run.run_id)).result.is_file()


def _settings(options: StudyOptions, cluster: Cluster) -> Settings:
    from study.cluster.runner import Settings

    if options.gpus_per_run and options.gpus_per_run > 1 and options.gpus_per_run != int(options.gpus_per_run):
        raise UserError(f"gpus_per_run is {options.gpus_per_run:g}.", "give a fraction below 1, or a whole number.")
    gpus = options.gpus_per_run if options.gpus_per_run is not None else (1.0 if cluster.gpus else 0.0)
    return Settings(
        checkpoints=str(options.checkpoints.resolve()),
        data_root=str(Path(options.data_root).resolve()) if options.data_root else None,
        gpus_per_run=gpus,
        cpus_per_run=options.cpus_per_run,
        workers=options.workers,
        resources=dict(options.resources),
        compute=computing(options),
        saving=options.saving,
        price=options.price,
    )


def computing(options: StudyOptions) -> Compute:
    """How the study's runs are computed, on a device that each has to itself."""
    from diffvit.compute import Compute

    return Compute(
        micro_batch=options.micro_batch, deterministic=options.deterministic, fused=options.fused, graphs=options.graphs,
        compile=options.compile, recompute=options.recompute,
    )  # fmt: skip


def _may_join(options: StudyOptions) -> bool:
    """Whether the study could run on a cluster whose GPUs this machine cannot see."""
    from study.cluster.address import find_address

    return find_address(options.address) != "local"


def _connect(stack: contextlib.ExitStack, options: StudyOptions) -> Cluster:
    from study.cluster.connect import connect

    cluster = stack.enter_context(connect(options.address, options.dashboard))
    _say(cluster.sentence())
    return cluster


def _precision_on(cluster: Cluster, options: StudyOptions) -> str:
    """What the runs are computed in on a cluster, whose GPUs this machine may not see."""
    if options.precision == "auto" and cluster.gpus and options.gpus_per_run != 0:
        from study.cluster.nodes import gpu_precision

        return gpu_precision()
    return _local_precision(options)


def _local_precision(options: StudyOptions) -> str:
    if options.precision != "auto":
        return options.precision
    from diffvit.machine.device import default_precision, resolve_device

    return default_precision(resolve_device("cpu" if options.gpus_per_run == 0 else None))


def _check_folders(checkpoints: Path, specs: list[RunSpec]) -> None:
    for folder in {checkpoints, checkpoints / "figures", *(checkpoints / spec.model for spec in specs)}:
        check_writable(folder)
    check_lockable(checkpoints)


def warmup_warnings(specs: list[RunSpec]) -> list[str]:
    """A sentence for each data set and warm-up that is not shorter than its run."""
    found = dict.fromkeys((spec.dataset, spec.protocol.warmup_warning(spec.protocol.total_steps())) for spec in specs)
    return [f"{dataset}: {warning}" for dataset, warning in found if warning]


def _report(options: StudyOptions, specs: list[RunSpec], draw: bool) -> bool:
    """The table to stdout and as CSV, then the figures. Returns False where these failed, which has been said.

    Of all seeds and precisions that there are, so that nothing is taken off them.
    """
    from study.table import run_table, write_csv, write_step_csv

    table = run_table(options.checkpoints, specs)
    if table.empty:
        return True
    print(table_text(table))
    runs, steps = (options.checkpoints / f"{options.name}_{what}.csv" for what in ("runs", "steps"))
    write_csv(table, runs)
    write_step_csv(options.checkpoints, table, steps)
    _say(f"\ntable    {runs}")
    drawn = not draw or _draw(options, table)
    gone = [path for files, run in zip(_files(options.checkpoints, table), table.itertuples(), strict=True)
            for path in _kept_files(files, run.status) if not path.is_file()]  # fmt: skip
    if gone:
        _say(f"warning: files of finished runs are gone: {', '.join(map(str, gone))}")
        _say("hint: delete the _result.json of such a run, and the same command trains it again.")
    return drawn


def _draw(options: StudyOptions, table: pd.DataFrame) -> bool:
    """The figures. Returns False where they failed, which has been said: training that is done shall not be lost for a picture."""
    from study.table import step_table

    out = options.checkpoints / "figures"
    try:
        from study.report.figures import draw_figures

        draw_figures(table, step_table(options.checkpoints, table), out, options.grid.prefix)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        _say(f"error: the figures could not be drawn: {reason}\nhint: the same command draws them again: {options.command}")
        return False
    _say(f"figures  {out}")
    return True


def _kept_files(files: RunFiles, status: str) -> list[Path]:
    """What an ended run must have."""
    return [files.weights, files.log, files.predictions, files.result] if status == "done" else [files.log, files.result]


def table_text(table: pd.DataFrame) -> str:
    """The run table for a person: outcome only, flags below."""
    header = (
        "model",
        "size",
        "data set",
        "seed",
        "run_id",
        "parameters",
        "steps",
        "seconds",
        "images/s",
        "train loss",
        "val loss",
        "test loss",
        "test accuracy",
        "overrides",
    )
    rows = [
        (
            run.model, run.size, run.dataset, str(run.seed), run.run_id, f"{run.parameters:,}", f"{run.steps:,}",
            f"{run.seconds:,.1f}", f"{run.images_per_second:,.0f}",
            *(("", "", "", "diverged") if run.status == "diverged" else
              (f"{run.train_loss:.4f}", f"{run.val_loss:.4f}", f"{run.test_loss:.4f}", f"{100 * run.test_accuracy:.2f} %")),
            run.overrides,
        )
        for run in table.itertuples()
    ]  # fmt: skip
    flags = [f"flag: {dataset}: {flag}" for dataset, flag in table[["dataset", "flags"]].drop_duplicates().itertuples(index=False) if flag]
    diverged = [
        f"note: {f'{run.model} {run.size} {run.dataset} seed {run.seed} {run.overrides}'.rstrip()}: {run.notes}"
        for run in table.itertuples()
        if run.status == "diverged"
    ]
    return "\n".join([_columns([header, *rows], right=range(5, 13)), *flags, *diverged])


def plot_grid(
    checkpoints: Path, grid: str | None, out: Path | None = None, epochs: int | None = None, dataset: str | None = None
) -> list[Path]:
    """Draw the finished runs of a grid, or of the built-in grids that have any. Returns the files.

    Args:
        out: None: where a study draws. dataset: as find_grid takes it.

    Raises:
        UserError: there is nothing to draw, or the folder cannot be written.
    """
    from study.report.figures import draw_figures
    from study.table import step_table

    table, grids = _finished(checkpoints, grid, epochs, dataset)
    out = out or checkpoints / "figures"
    check_writable(out)
    return draw_figures(table, step_table(checkpoints, table), out, grids[0].prefix if grid else "")


def report_grid(
    checkpoints: Path, grid: str | None, out: Path | None = None, epochs: int | None = None, dataset: str | None = None
) -> list[Path]:
    """Write the report of a grid's finished runs, or of the built-in grids' that have any. Returns the files.

    Args:
        out: None: report in the checkpoints folder, with the overrides in its name. dataset: as find_grid takes it.

    Raises:
        UserError: nothing is finished, or the folder cannot be written.
    """
    from study.report.write import write_report

    table, grids = _finished(checkpoints, grid, epochs, dataset)
    out = out or checkpoints / _named_after("report", grids, epochs)
    check_writable(out)
    return write_report(checkpoints, table, out, _commands(checkpoints, grid, epochs, dataset))


def _commands(checkpoints: Path, grid: str | None, epochs: int | None, dataset: str | None) -> list[str]:
    """The commands that give these runs again. Without a grid: of the built-in ones that have runs which those before do not have."""
    from study.table import run_table

    commands: list[str] = []
    seen: set[str] = set()
    for name in [grid] if grid else list(GRIDS):
        specs = find_grid(name, dataset).runs(overrides={"epochs": epochs})
        runs = run_table(checkpoints, specs)
        if set(runs["run_id"]) <= seen:
            continue
        seen |= set(runs["run_id"])
        values = {"--grid": name, "--dataset": dataset, "--epochs": epochs}
        options = shlex.join(text for option, value in values.items() if value is not None for text in (option, str(value)))
        more_seeds = {spec.seed for spec in specs} == {0} and int(runs["seed"].max()) > 0
        commands.append(f"uv run run.py study {options}" + (f" --seeds {int(runs['seed'].max()) + 1}" if more_seeds else ""))
        kinds = {kind for files in _files(checkpoints, runs) for kind in read_evaluations(files)}
        if kinds:
            commands.append(f"uv run run.py evaluate {options} " + " ".join(f"--{kind}" for kind in sorted(kinds)))
    return [*commands, "uv run run.py report" + (f" {options}" if grid else "")]


def _files(checkpoints: Path, table: pd.DataFrame) -> list[RunFiles]:
    from study.table import files_of

    return [files_of(checkpoints, run) for run in table.itertuples()]


def finished_checkpoints(checkpoints: Path, grid: str, epochs: int | None = None, dataset: str | None = None) -> list[Path]:
    """The weights of a grid's finished runs. Raises UserError where there are none."""
    table, _ = _finished(checkpoints, grid, epochs, dataset)
    done = table[table["status"] == "done"]
    if done.empty:
        raise UserError(f"all finished runs of {grid} have diverged.", "there are no weights to evaluate.")
    return [files.weights for files in _files(checkpoints, done)]


def _finished(checkpoints: Path, grid: str | None, epochs: int | None, dataset: str | None) -> tuple[pd.DataFrame, list[Grid]]:
    """The run table of a grid, or of all built-in ones, and those grids; UserError where none of its runs is finished."""
    from study.table import run_table

    _check_dataset(grid, dataset)
    grids = [find_grid(grid, dataset)] if grid else list(GRIDS.values())
    specs = [spec for each in grids for spec in each.runs(overrides={"epochs": epochs})]
    table = run_table(checkpoints, specs)
    if table.empty:
        name = f"the grid {grid}" if grid else "a built-in grid"
        raise UserError(
            f"{checkpoints} has no finished run of {name}.", "`run.py list` shows the runs there are; `run.py study` trains a grid."
        )
    return table, grids


def _check_dataset(grid: str | None, dataset: str | None) -> None:
    if dataset is not None and grid is None:
        raise UserError("--dataset is given without --grid.", "--dataset goes with --grid noise or lr.")


def ledger_rows(
    checkpoints: Path,
    grid: str | None,
    seeds: int | None = None,
    epochs: int | None = None,
    data_root: str | None = None,
    dataset: str | None = None,
) -> list[dict[str, Any]]:
    """A row for each finished run, and with a grid for each of its runs that is not done.

    Args:
        dataset: as find_grid takes it.

    Raises:
        UserError: an unknown grid, or a damaged result file.
    """
    from study.table import effective_overrides, files_of, run_table

    def cell(model: str, size: str, dataset: str, seed: int, overrides: str) -> tuple:
        return model, size, dataset, seed, *effective_overrides(dataset, overrides)

    _check_dataset(grid, dataset)
    specs = None
    if grid:
        options = StudyOptions(find_grid(grid, dataset), checkpoints, seeds, epochs)
        specs = options.runs(_local_precision(options))
    table = run_table(checkpoints, specs)
    rows = []
    for run in table.itertuples():
        paths = _kept_files(files_of(checkpoints, run), run.status)
        row = {"state": run.status, **{key: getattr(run, key) for key in ("run_id", "model", "size", "dataset", "seed", "overrides")}}
        row |= {"test_accuracy": run.test_accuracy if run.status == "done" else None, "finished": run.finished}
        rows.append(
            row | {"files": [str(path) for path in paths if path.is_file()], "missing": [str(path) for path in paths if not path.is_file()]}
        )
    if specs:
        fingerprints = load_fingerprints(specs, data_root, required=False)
        cells_done = {cell(*(row[key] for key in ("model", "size", "dataset", "seed", "overrides"))) for row in rows}
        ids_done = {row["run_id"] for row in rows}
        for spec in specs:
            # In whatever precision: the machine that trained may have another than this one. Without the data at hand, a run of the
            # cell counts; with them, only this very run.
            run_ids = list(run_ids_of(spec, fingerprints[spec.dataset]).values()) if spec.dataset in fingerprints else []
            of_spec = cell(spec.model, spec.size, spec.dataset, spec.seed, overrides_text(spec.overrides))
            if ids_done.intersection(run_ids) if run_ids else of_spec in cells_done:
                continue
            started = [run_id for run_id in run_ids if RunFiles.of(checkpoints, spec, run_id).log.is_file()]
            rows.append(
                {
                    "state": "unfinished" if started else "to do", "run_id": next(iter(started or run_ids), None),
                    "model": spec.model, "size": spec.size,
                    "dataset": spec.dataset, "seed": spec.seed, "overrides": overrides_text(spec.overrides),
                    "test_accuracy": None, "finished": None, "files": [], "missing": [],
                }
            )  # fmt: skip
    return rows


def verify_ledger(checkpoints: Path) -> dict[str, Any]:
    """Re-reads all files of all ended runs and the states of all others.

    Returns:
        "damaged": a sentence for each thing that is wrong; "summary": one for all.
    """
    from diffvit.keeping.state import StateFolder
    from diffvit.ledger.files import result_paths
    from diffvit.ledger.verify import verify_run

    paths = result_paths(checkpoints)
    of_runs = [verify_run(path) for path in paths]
    unfinished = sorted({path.parent.name for path in checkpoints.glob(".state/*/*.state")})
    of_states = [wrong for run_id in unfinished for wrong in StateFolder(checkpoints, run_id).damaged()]
    bad = sum(map(bool, of_runs))
    summary = f"{len(paths) - bad} of {len(paths)} ended runs are whole, {len(unfinished)} unfinished runs have states"
    return {"damaged": [*(wrong for each in of_runs for wrong in each), *of_states], "summary": summary}


def ledger_text(rows: list[dict[str, Any]]) -> str:
    """The ledger for a person."""
    if not rows:
        return "no finished runs"
    header = ("state", "model", "size", "data set", "seed", "run_id", "test accuracy", "finished", "overrides", "weights")
    body = [
        (
            row["state"], row["model"], row["size"], row["dataset"], str(row["seed"]), row["run_id"] or "data not here",
            "" if row["test_accuracy"] is None else f"{100 * row['test_accuracy']:.2f} %", row["finished"] or "",
            row["overrides"], row["files"][0] if row["state"] == "done" and row["files"] else "",
        )
        for row in rows
    ]  # fmt: skip
    missing = [f"missing: {path}" for row in rows for path in row["missing"]]
    done = sum(row["state"] == "done" for row in rows)
    return "\n".join([_columns([header, *body], right=[6]), *missing, f"{done} of {len(rows)} runs done"])


def _columns(rows: list[tuple[str, ...]], right: Any = ()) -> str:
    """Aligned text; no colour, no lines, so that it can be read anywhere and cut by any tool."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = (
        "  ".join(cell.rjust(width) if i in right else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def _significant(value: float) -> str:
    """Three significant digits, without an exponent where that can be read."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
        return f"{value:,.{digits}f}"
    return f"{value:.2e}"


def _say(text: str) -> None:
    print(redacted(text), file=sys.stderr, flush=True)
