"""What `run.py study` does, from options to exit code: train a grid, collect it, rehearse it."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from diffvit.errors import UserError, redacted
from diffvit.keeping.state import StateFolder
from diffvit.ledger.disk import check_lockable, check_writable
from diffvit.ledger.files import RunFiles
from diffvit.ledger.spec import RunSpec
from study.boxes import boxes_of
from study.cluster.nodes import check_shared_folder, check_storage_and_data
from study.cluster.watch import restarted, watch
from study.cost.planning import expected_forecast
from study.cost.truth import compare, comparison_lines, seconds_taken
from study.options import StudyOptions, connect_cluster, may_join
from study.plan import PlannedRun, data_notes, load_fingerprints, model_notes, plan_runs, precision_notes, warmup_warnings
from study.results import report_results
from study.shard import own_share
from study.table import missing_runs
from study.text import duration, say, show, warn

if TYPE_CHECKING:
    from study.cluster.connect import Cluster

# Seconds of work before which a person at a terminal is asked.
_WORTH_A_QUESTION = 600.0


def run_study(options: StudyOptions) -> int:
    """Train what is not done, then table and figures. Returns the exit code.

    Raises:
        UserError: bad input, before any training.
    """
    begun = time.monotonic()
    boxes = boxes_of(options.saving, options.shard, options.checkpoints)
    boxes.check()
    with contextlib.ExitStack() as stack:
        cluster = connect_cluster(stack, options) if may_join(options) else None
        options = options.on(cluster)
        specs = options.runs()
        say(f"loading {', '.join(dict.fromkeys(spec.dataset for spec in specs))}")
        fingerprints = load_fingerprints(specs, options.data_root, required=True)
        for note in data_notes(specs, options.data_root):
            say(f"data: {note}")
        _check_folders(options.checkpoints, specs)
        every = plan_runs(specs, options.checkpoints, fingerprints)
        tried = own_share(every, options.shard)
        unsent = boxes.exchange(tried, every)
        for warning in warmup_warnings(specs):
            warn(warning)
        for note in (*precision_notes(tried), *model_notes(tried, options.checkpoints)):
            say(f"note: {note}")
        failures: list[tuple[str, str]] = []
        with boxes.alive(every) as undone:
            runs, signal_code = tried, None
            while runs and signal_code is None:
                pending = [run for run in plan_runs([run.spec for run in runs], options.checkpoints, fingerprints) if not run.ended]
                if pending:
                    cluster = cluster or connect_cluster(stack, options)
                    failed, signal_code = _train(runs, pending, options.on(cluster), cluster, begun)
                    failures += failed
                    options = dataclasses.replace(options, ask=False)  # what is taken over later may be at night
                    unsent = boxes.exchange(tried, every, strict=False)
                else:
                    say(f"all {len(runs)} runs are done already")
                if signal_code is not None:
                    undone()
                else:
                    runs = boxes.left_by_others(every, tried)
                    tried = [*tried, *runs]
    drawn = report_results(options, specs, draw=signal_code is None, judge=not failures and not options.shard)
    if signal_code is not None:
        say(f"\nstopped: {_what_is_kept(options, tried)}")
        say(f"hint: to resume, run: {options.command}")
        return signal_code
    boxes.publish()
    failures += boxes.report_unsent(unsent, options.command)
    return _conclude(options, tried, len(every), failures) or (0 if drawn else 1)


def _what_is_kept(options: StudyOptions, runs: list[PlannedRun]) -> str:
    """How many of the runs are done, resume or have not begun, in words."""
    left = [run for run in runs if not _has_result(run, options)]
    done = f"{len(runs) - len(left)} of {len(runs)} runs are done"
    if options.saving.storage:  # where states may be that are not here
        return f"{done}; those that have begun resume from their states"
    begun = _with_states(left, options)
    return f"{done}, {begun} begun (they resume from their states), {len(left) - begun} not begun"


def _with_states(runs: list[PlannedRun], options: StudyOptions) -> int:
    """How many of the runs have a state here."""
    return sum(bool(StateFolder(options.checkpoints, str(run.run_id)).steps()) for run in runs)


def _ask() -> None:
    """Ask whether to start. Raises UserError if not."""
    if not click.confirm("start it?", default=True, err=True):
        raise UserError("the study was not started.", "fewer --epochs, or a smaller grid, take less; --yes starts without a question.")


def _conclude(options: StudyOptions, tried: list[PlannedRun], in_all: int, failures: list[tuple[str, str]]) -> int:
    """Print which runs failed, or what is left to other boxes. Returns the exit code."""
    if failures:
        say(f"\nerror: {len(failures)} of {len(tried)} runs failed:")
        for title, reason in failures:
            say(f"  {title}: {reason}")
        say(f"hint: to train only what is missing, run: {options.command}")
        return 1
    if options.shard:
        ended = sum(_has_result(run, options) for run in tried)
        collect = re.sub(r"--shard[ =]\S+", "--collect", options.command)
        say(
            f"\nshard {options.shard}: {ended} of {in_all} runs of the grid are done here"
            f"\nhint: to collect the runs of all boxes, run: {collect}"
        )
    return 0


def collect_study(options: StudyOptions) -> int:
    """Fetch the grid's finished runs from the storage, whoever trained them, then table and figures. Returns 1 where some are missing.

    Data sets need not be at hand.

    Raises:
        UserError: bad input.
        StorageError: the storage does not answer.
    """
    specs = options.on(None).runs()
    _check_folders(options.checkpoints, specs)
    boxes = boxes_of(options.saving, None, options.checkpoints)
    say(f"fetched {len(boxes.collect(specs))} runs from {options.saving.storage}")
    drawn = report_results(options, specs, draw=True, judge=True)
    boxes.publish()
    missing = missing_runs(options.checkpoints, specs)
    if missing:
        say(f"\n{len(missing)} of {len(specs)} runs are still missing:")
        for spec in missing:
            say(f"  {spec.title}")
        say(f"hint: when their boxes are done, give the same command again: {options.command}")
        return 1
    boxes.forget(specs)
    return 0 if drawn else 1


def rehearse_study(options: StudyOptions) -> int:
    """Train two real steps of every cell of the grid, from data to storage; print a line for each. Returns the exit code.

    The ledger and the storage stay as they were.

    Raises:
        UserError: bad input, or data that cannot be loaded.
    """
    boxes_of(options.saving, None, options.checkpoints).check()
    with contextlib.ExitStack() as stack:
        cluster = connect_cluster(stack, options)
        from study.cost.rehearsal import cells, rehearse

        options = options.on(cluster)
        specs = cells(options.runs())
        load_fingerprints(specs, options.data_root, required=True)
        say(f"{len(specs)} cells to rehearse, {options.placement.check_room(cluster)} at a time")
        outcomes = rehearse(specs, options.settings(), lambda each: show(redacted(each.line())))
    failed = [each.title for each in outcomes if each.fault]
    if failed:
        say(f"\nerror: {len(failed)} of {len(outcomes)} cells failed: {', '.join(failed)}\nhint: fix that before the study.")
        return 1
    say(f"all {len(outcomes)} cells work")
    return 0


def _train(
    runs: list[PlannedRun], pending: list[PlannedRun], options: StudyOptions, cluster: Cluster, begun: float
) -> tuple[list[tuple[str, str]], int | None]:
    """Train the pending runs. Returns (title, reason) of those that failed, and the exit code if a signal ended the study.

    Args:
        begun: time.monotonic() when the study began.
    """
    from study.cluster.display import StudyDisplay
    from study.cluster.runner import run_all

    settings, placement = options.settings(), options.placement
    slots = placement.check_room(cluster)
    if settings.saving.storage and not cluster.own:  # its workers have an environment of their own
        check_storage_and_data(settings.saving.storage, settings.data_folders())
    elif cluster.nodes > 1:
        check_shared_folder(options.checkpoints, settings.data_folders())
    with_states = _with_states(pending, options)
    resumed = f" ({with_states} resume from their states)" if with_states else ""
    say(f"{len(pending)} of {len(runs)} runs to train{resumed}, {slots} at a time")
    forecast = expected_forecast(options, runs, cluster)
    if forecast:
        sources = " and ".join(sorted({each.rate.source for each in forecast.pending}))
        say(f"forecast: {duration(forecast.makespan)} ({sources})")
        if options.ask and forecast.makespan > _WORTH_A_QUESTION and not restarted():
            _ask()
    with watch(cluster, say, options.command), StudyDisplay(runs) as display:
        reports, signal_code = run_all(pending, settings, cluster, display, wait_for_others=options.shard is None)
    took = time.monotonic() - begun
    with_storage = bool(settings.saving.storage)  # then another node may have it, and it is brought here in a moment
    failures = []
    for run in pending:
        report = reports.get(str(run.run_id), {})
        ended = _has_result(run, options) or (with_storage and "status" in report)
        if not ended and options.shard and report.get("busy"):
            say(f"{run.spec.title} is trained by another box")
        elif not ended:
            failures.append((run.spec.title, str(report.get("failed", "it ended without a result"))))
    if forecast:
        as_planned = not failures and signal_code is None
        for line in comparison_lines(compare(forecast, seconds_taken(reports), took if as_planned else None, options.checkpoints)):
            say(line)
    if placement.price and (rate := placement.dollars_per_second):
        seconds = sum(report.get("run_seconds", 0.0) for report in reports.values())
        devices, name = (cluster.gpus, "GPUs") if placement.gpus_per_run else (cluster.nodes, "machines")
        bill = placement.price * devices * took / 3600
        say(f"cost: ${rate * seconds:,.2f} for the runs' {duration(seconds)}; ${bill:,.2f} for all {devices:g} {name} from start to end")
    return failures, signal_code


def _has_result(run: PlannedRun, options: StudyOptions) -> bool:
    return RunFiles.of(options.checkpoints, run.spec, str(run.run_id)).result.is_file()


def _check_folders(checkpoints: Path, specs: list[RunSpec]) -> None:
    for folder in {checkpoints, checkpoints / "figures", *(checkpoints / spec.model for spec in specs)}:
        check_writable(folder)
    check_lockable(checkpoints)
