"""How many seeds it takes to see a difference, from the spread measured so far: studies simulated and judged by the report's rule."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import special

from diffvit.errors import UserError
from diffvit.ledger.spec import RunSpec
from diffvit.protocol import ARMS, protocol_of
from study.grid import GRIDS
from study.plan import plan_runs
from study.report import compare, scaling, verdict
from study.report.analysis import subjects
from study.report.scaling import Cells, Estimate
from study.table import comparable, run_table

SEEDS = (2, 3, 4, 5, 7, 10, 15, 20, 30, 50)
WANTED = 0.8
# Numbers of seeds for which is said what they find, where the difference that was asked about takes more than are tried.
_USUAL_SEEDS = (3, 10, 50)
_STUDIES = 4000
# The error at which test images add to the spread, and noise is judged, where no run says it.
_ASSUMED_ERROR = 0.5
# What noise is assumed to multiply both arms' odds of an error by.
_NOISE = 1.5


def power_rows(checkpoints: Path, specs: Sequence[RunSpec], difference: float, arms: Sequence[str] = ARMS) -> list[dict[str, Any]]:
    """For each data set of a grid and each question, the probability of a verdict "better" or "worse", by number of seeds.

    The family is level and trend of each data set, and noise once, for each arm against the first; only the row's own question has an
    effect. Of several arms, the one whose pairs scatter most counts.

    Args:
        difference: relative, of the error: 0.02 is 2 %; for the trend, of what changes from the smallest to the largest size; for noise,
            of the odds of an error.
        arms: the architectures that the grid compares, the baseline first.

    Returns:
        Rows of "dataset", "spread" (standard deviation of a pair's log ratio), "pairs" (that it was measured on; 0: it is assumed),
        "pilot" (whether these are the pilot's, since the grid's own cells have no two seeds), "question", "questions" (in the family),
        "power" (seeds -> probability), "needed" (the fewest seeds that give 80 %; None beyond 50), and for these "found" (seeds ->
        the difference that they do find with 80 %; None where they find none).

    Raises:
        UserError: a difference that is none, or a grid without the architectures.
    """
    if not 0 < difference < 1:
        raise UserError(f"the difference is {100 * difference:g} %.", "give a percentage above 0 and below 100.")
    specs = [spec for spec in specs if spec.model in arms]
    if not specs:
        raise UserError("the grid has none of the architectures that are compared.", f"name {' or '.join(arms)} in its models.")
    measured, piloted = _errors(checkpoints, specs, arms), _errors(checkpoints, GRIDS["pilot"].runs(), ARMS)
    datasets = list(dict.fromkeys(spec.dataset for spec in specs))
    costs = {dataset: _log_parameters([spec for spec in specs if spec.dataset == dataset], checkpoints) for dataset in datasets}
    questions = {dataset: ["level", *(["trend"] if len(costs[dataset]) > 1 else [])] for dataset in datasets}
    clean, noisy = _asked_about_noise(specs, datasets)
    questions[noisy].append("noise")
    family = (len(arms) - 1) * sum(map(len, questions.values()))
    rows = []
    for dataset, question in ((of, each) for of, asked in questions.items() for each in asked):
        of = clean if question == "noise" else dataset  # noise is simulated from what runs without it are like
        cells = measured.get(of) or piloted.get(of)
        spread = cells.pair_spread() if cells else assumed_spread(of)
        error = float(np.exp(cells.means).mean()) if cells else _ASSUMED_ERROR
        chance_of = functools.partial(power, question, spread=spread, log_costs=costs[of], family=family, error=error)
        chance = _by_seeds(functools.partial(chance_of, math.log1p(-difference)))
        needed = next((seeds for seeds, probability in chance.items() if probability >= WANTED), None)
        found = {} if needed else {seeds: _smallest_found(chance_of, seeds, difference) for seeds in _USUAL_SEEDS}
        rows.append(
            {
                "dataset": dataset, "spread": spread, "pairs": int(cells.counts.sum()) if cells else 0,
                "pilot": of in piloted and of not in measured, "question": question,
                "questions": family, "power": {seeds: chance[seeds] for seeds in SEEDS}, "needed": needed, "found": found,
            }
        )  # fmt: skip
    return rows


def _asked_about_noise(specs: Sequence[RunSpec], datasets: Sequence[str]) -> tuple[str, str]:
    """The data set without noise, and the one that the report names in its question about noise; in the order of noise_questions."""
    by_images = sorted(datasets, key=lambda dataset: -protocol_of(dataset).images[2])
    trained_on = [dataset for dataset in by_images if any(spec.dataset == dataset and spec.protocol.input_noise for spec in specs)]
    twins = [dataset for dataset in by_images if f"{dataset}-noisy" in datasets]
    if twins and not trained_on:
        return twins[0], f"{twins[0]}-noisy"
    return ((trained_on or by_images)[0],) * 2


def _errors(checkpoints: Path, specs: Sequence[RunSpec], arms: Sequence[str]) -> dict[str, Cells]:
    """Data set -> the errors under its condition of reference, where a cell has two seeds; of the pair of arms that scatters most."""
    table, _ = comparable(run_table(checkpoints, specs), arms)
    errors: dict[str, Cells] = {}
    for part, pair in itertools.product(subjects(table, arms), compare.pairs_of(arms)):
        if part.base and (comparison := compare.compare(part.table, part.name, pair)):
            cells = comparison.cells["error"]
            known = errors.get(part.dataset)
            if (cells.counts > 1).any() and (known is None or cells.pair_spread() > known.pair_spread()):
                errors[part.dataset] = cells
    return errors


def assumed_spread(dataset: str) -> float:
    """What a pair's log ratio scatters by where no cell has two seeds: unpaired runs, and chance over the data set's test images."""
    of_images = (1 - _ASSUMED_ERROR) / (_ASSUMED_ERROR * protocol_of(dataset).images[2])
    return math.sqrt(2 * (verdict.ASSUMED_RUN_SPREAD**2 + of_images))


def _by_seeds(chance_of: Callable[..., float]) -> dict[int, float]:
    """Power for 2 to 50 seeds; between the numbers of SEEDS, only up to the first that suffices is simulated, and others are left out."""
    chance = {seeds: chance_of(seeds=seeds) for seeds in SEEDS}
    enough = next((seeds for seeds in SEEDS if chance[seeds] >= WANTED), None)
    if enough is not None:
        fewer = max((seeds for seeds in SEEDS if seeds < enough), default=enough)
        for seeds in range(fewer + 1, enough):
            chance[seeds] = chance_of(seeds=seeds)
    return dict(sorted(chance.items()))


def _smallest_found(chance_of: Callable[..., float], seeds: int, difference: float) -> float | None:
    """The smallest difference above `difference` that this many seeds find with 80 %, within a thirtieth; None: not even 99 %."""
    low, high = math.log(difference), math.log(0.99)
    if chance_of(math.log1p(-0.99), seeds=seeds) < WANTED:
        return None
    while high - low > 1 / 30:
        middle = (low + high) / 2
        low, high = (low, middle) if chance_of(math.log1p(-math.exp(middle)), seeds=seeds) >= WANTED else (middle, high)
    return math.exp(high)


def power(
    question: str, effect: float, spread: float, log_costs: np.ndarray, seeds: int, family: int, error: float = _ASSUMED_ERROR
) -> float:
    """The probability of "better" or "worse", if a question's true value is `effect` and those of the others are 0.

    Args:
        effect: on the log scale; noise: on log-odds. spread: standard deviation of a pair's log ratio. log_costs: [sizes].
        family: how many questions. error: on clean images; noise only.
    """
    chance = np.random.default_rng(seeds)
    if question == "noise":
        own: Mapping[str, Estimate] = _noise_on_scales(effect, spread, error, log_costs, seeds, chance)
    else:
        own = {question: _contrast(question, effect, spread, log_costs, seeds, chance)}
    others: list[Mapping[str, Estimate]] = [
        {question: Estimate(chance.standard_normal(_STUDIES), np.ones(_STUDIES), np.full(_STUDIES, 1e6))} for _ in range(family - 1)
    ]
    _, words = verdict.verdicts([own, *others])
    return float(np.isin(words[0], ["better", "worse"]).mean())


def _contrast(question: str, effect: float, spread: float, log_costs: np.ndarray, seeds: int, chance: np.random.Generator) -> Estimate:
    """Level or trend of simulated studies."""
    along = (log_costs - log_costs.mean()) / np.ptp(log_costs) if question == "trend" else np.ones_like(log_costs)
    draws = spread * chance.standard_normal((len(log_costs), _STUDIES, seeds)) + (effect * along)[:, None, None]
    cells = Cells(np.stack([log_costs, log_costs]), [np.stack([np.zeros_like(each), each], axis=1) for each in draws])
    return {"level": scaling.level, "trend": scaling.trend}[question](cells)


def _noise_on_scales(
    effect: float, spread: float, error: float, log_costs: np.ndarray, seeds: int, chance: np.random.Generator
) -> dict[str, Estimate]:
    """The question about noise in simulated studies, on all scales: arms alike on clean images, conditions that scatter independently.

    Runs scatter by the same share of the error in both conditions, which is 1 / (1 - error) as much on log-odds.
    """
    clean = np.full(2, special.logit(error))
    shares = []
    for odds in (clean, clean + math.log(_NOISE) + np.asarray([0, effect])):
        scatter = spread / math.sqrt(2) / (1 - special.expit(odds))
        draws = odds[:, None] + scatter[:, None] * chance.standard_normal((len(log_costs), _STUDIES, 2, seeds))
        shares.append(special.expit(draws))
    by_scale = {scale: np.stack([np.diff(to_scale(each), axis=2)[:, :, 0] for each in shares], axis=2)
                for scale, (to_scale, _) in scaling.SCALES.items()}  # fmt: skip
    return compare.noise_estimates({scale: Cells(np.stack([log_costs, log_costs]), list(each)) for scale, each in by_scale.items()})


def power_text(rows: Sequence[dict[str, Any]], difference: float) -> str:
    """The rows for a person."""
    lines = [f"probability in % of a verdict, if the true difference is {100 * difference:g} %"]
    lines += [f"(Holm's correction over {rows[0]['questions']} questions counted; noise: of the odds of an error, on all scales)", ""]
    width = max(len(name) for name in ("data set", *(row["dataset"] for row in rows)))
    lines.append(f"{'data set':<{width}} {'seeds':<8} " + " ".join(f"{seeds:>3}" for seeds in SEEDS) + "  for 80 %")
    for row in rows:
        needed = f"{row['needed']}" if row["needed"] else f"> {max(SEEDS)}"
        cells = " ".join(f"{100 * probability:>3.0f}" for probability in row["power"].values())
        lines.append(f"{row['dataset']:<{width}} {row['question']:<8} {cells}  {needed}")
    if short := [row for row in rows if row["found"]]:
        lines += ["", *_found_lines(short, difference, width)]
    lines.append("")
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        row = next(each for each in rows if each["dataset"] == dataset)
        known = (
            f"measured on {row['pairs']} pairs{' of the pilot' if row['pilot'] else ''}"
            if row["pairs"]
            else "assumed: no cell has two seeds yet"
        )
        lines.append(f"{dataset}: the log ratio of a pair scatters by {100 * row['spread']:.1f} % ({known})")
    return "\n".join(lines)


def _found_lines(rows: Sequence[dict[str, Any]], difference: float, width: int) -> list[str]:
    """What can be found, of questions for which no number of seeds suffices."""
    lines = [f"{100 * difference:g} % is not found with {max(SEEDS)} seeds. Differences that are, with a probability of 80 %:"]
    lines.append(f"{'data set':<{width}} {'':<8} " + " ".join(f"{seeds:>2} seeds" for seeds in _USUAL_SEEDS))
    for row in rows:
        cells = " ".join(f"{'none' if found is None else f'{100 * found:.2g} %':>8}" for found in row["found"].values())
        lines.append(f"{row['dataset']:<{width}} {row['question']:<8} {cells}")
    return lines


def _log_parameters(specs: Sequence[RunSpec], checkpoints: Path) -> np.ndarray:
    """Log parameters of the sizes, the mean of the arms. [sizes]"""
    runs = plan_runs(specs, checkpoints, {})
    sizes = dict.fromkeys(run.spec.size for run in runs)
    return np.asarray([np.mean([math.log(run.parameters) for run in runs if run.spec.size == size]) for size in sizes])
