"""How many seeds it takes to see a difference, from the spread measured so far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffvit.errors import UserError
from diffvit.ledger.spec import RunSpec
from diffvit.protocol import ARMS
from study.plan import plan_runs
from study.report import scaling, verdict
from study.report.analysis import subjects
from study.table import comparable, run_table

SEEDS = (2, 3, 4, 5, 7, 10, 15, 20, 30, 50)
WANTED = 0.8


def power_rows(checkpoints: Path, specs: Sequence[RunSpec], difference: float) -> list[dict[str, Any]]:
    """For each data set of a grid and each question, the probability that the interval excludes 0, by number of seeds.

    Args:
        difference: relative, of the error: 0.02 is 2 %; for the trend, of what changes from the smallest to the largest size.

    Returns:
        Rows of "dataset", "spread" (standard deviation of a pair's log ratio), "pairs" (that it was measured on; 0: it is assumed),
        "question", "power" (seeds -> probability) and "needed" (the fewest seeds that give 80 %; None beyond 50).

    Raises:
        UserError: a difference that is none, or a grid without the two architectures.
    """
    if not 0 < difference < 1:
        raise UserError(f"the difference is {100 * difference:g} %.", "give a percentage above 0 and below 100.")
    if not any(spec.model in ARMS for spec in specs):
        raise UserError("the grid has neither of the two architectures that are compared.", f"name {' or '.join(ARMS)} in its models.")
    table, _ = comparable(run_table(checkpoints, specs))
    measured = {part.dataset: verdict.compare(part.table, part.name) for part in subjects(table) if part.base}
    rows = []
    for dataset in dict.fromkeys(spec.dataset for spec in specs):
        comparison = measured.get(dataset)
        cells = comparison.cells["error"] if comparison and comparison.cells["error"].df else None
        spread = cells.pair_spread() if cells else verdict.ASSUMED_SPREAD
        x = _log_parameters([spec for spec in specs if spec.dataset == dataset], checkpoints)
        weights = {"level": np.full(len(x), 1 / len(x))}
        if len(x) > 1:
            weights["trend"] = scaling.slope_weights(x) * np.ptp(x)
        for question, each in weights.items():
            chance = {seeds: scaling.power(-math.log1p(-difference), spread, each, seeds) for seeds in range(2, max(SEEDS) + 1)}
            rows.append(
                {
                    "dataset": dataset,
                    "spread": spread,
                    "pairs": int(cells.counts.sum()) if cells else 0,
                    "question": question,
                    "power": {seeds: chance[seeds] for seeds in SEEDS},
                    "needed": next((seeds for seeds, probability in chance.items() if probability >= WANTED), None),
                }
            )
    return rows


def power_text(rows: Sequence[dict[str, Any]], difference: float) -> str:
    """The rows for a person."""
    lines = [f"probability in % that the 95 % interval excludes 0, if the true difference is {100 * difference:g} %"]
    lines += ["(for one question alone; Holm's correction over several asks for a little more)", ""]
    lines.append(f"{'data set':<14} {'question':<8} " + " ".join(f"{seeds:>4}" for seeds in SEEDS) + "  seeds; for 80 %")
    for row in rows:
        needed = f"{row['needed']}" if row["needed"] else f"more than {max(SEEDS)}"
        cells = " ".join(f"{100 * probability:>4.0f}" for probability in row["power"].values())
        lines.append(f"{row['dataset']:<14} {row['question']:<8} {cells}  {needed}")
    lines.append("")
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        row = next(each for each in rows if each["dataset"] == dataset)
        known = f"measured on {row['pairs']} pairs" if row["pairs"] else "assumed: no cell has two seeds yet"
        lines.append(f"{dataset}: the log ratio of a pair scatters by {100 * row['spread']:.1f} % ({known})")
    return "\n".join(lines)


def _log_parameters(specs: Sequence[RunSpec], checkpoints: Path) -> np.ndarray:
    """Log parameters of the sizes, the mean of both arms. [sizes]"""
    runs = [run for run in plan_runs(specs, checkpoints, {}) if run.spec.model in ARMS]
    sizes = dict.fromkeys(run.spec.size for run in runs)
    return np.asarray([np.mean([math.log(run.parameters) for run in runs if run.spec.size == size]) for size in sizes])
