"""A study's forecast beside what it took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffvit.ledger.files import RunFiles
from diffvit.ledger.log import was_interrupted
from study.cost.forecast import StudyForecast
from study.text import duration


@dataclass(frozen=True)
class Comparison:
    """A forecast and the truth.

    Attributes:
        runs: (title, forecast, truth), in seconds, of runs that were done in one go.
        interrupted: titles of runs that were interrupted, whose times say nothing.
        makespan: (forecast, truth) of the whole study; None where a run failed or the study was stopped.
        source: where the forecast's rates come from.
    """

    runs: list[tuple[str, float, float]]
    interrupted: list[str]
    makespan: tuple[float, float] | None
    source: str


def seconds_taken(reports: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """run_id -> seconds of runs that are done, from their last reports. A run that was found done elsewhere took none of ours."""
    done = {run_id: report for run_id, report in reports.items() if report.get("status") == "done" and "run_seconds" in report}
    return {run_id: report["run_seconds"] for run_id, report in done.items() if report["run_seconds"] >= report["seconds"]}


def compare(forecast: StudyForecast, took: dict[str, float], makespan: float | None, checkpoints: Path) -> Comparison:
    """The forecast of a study beside what it took.

    Args:
        took: run_id -> seconds, of runs that are done.
        makespan: seconds of the whole study; None where it did not end as planned.
    """
    runs, interrupted = [], []
    for each in forecast.pending:
        run_id, spec = str(each.run.run_id), each.run.spec
        if run_id not in took:
            continue
        if was_interrupted(RunFiles.of(checkpoints, spec, run_id).log):
            interrupted.append(spec.title)
        else:
            runs.append((spec.title, each.seconds, took[run_id]))
    sources = " and ".join(sorted({each.rate.source for each in forecast.pending}))
    return Comparison(runs, interrupted, None if makespan is None else (forecast.makespan, makespan), sources)


def comparison_lines(comparison: Comparison) -> list[str]:
    """The comparison as text: a line per run, and one for the whole."""
    lines = []
    if comparison.runs:
        width = max(len(title) for title, _, _ in comparison.runs)
        lines.append(f"{f'forecast ({comparison.source}) and truth':<{width}}  forecast      took  error")
        lines += [f"{title:<{width}}  {said:6.1f} s  {took:6.1f} s  {_error(said, took)}" for title, said, took in comparison.runs]
        errors = sorted(abs(said / took - 1) for _, said, took in comparison.runs)
        middle = errors[len(errors) // 2]
        lines.append(f"{len(errors)} runs: the forecast is off by {100 * middle:.0f} % in the median, by {100 * errors[-1]:.0f} % at most")
    if comparison.interrupted:
        lines.append(f"{len(comparison.interrupted)} runs were interrupted and are left out")
    if comparison.makespan:
        said, took = comparison.makespan
        lines.append(f"whole study: forecast {duration(said)}, took {duration(took)}: {_error(said, took).strip()}")
    return lines


def _error(forecast: float, truth: float) -> str:
    return f"{100 * (forecast / truth - 1):+4.0f} %"
