"""How many seeds it takes to see a difference, from the spread measured so far: studies simulated and judged by the report's rule."""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import special

from diffvit.errors import UserError
from diffvit.ledger.spec import RunSpec, overrides_text
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
        Rows of "dataset", "of" (the data set that the next three are of; for noise, the one without it), "spread" (standard deviation
        of a pair's log ratio), "pairs" (that it was measured on; 0: it is assumed),
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
    clean, noisy = _asked_about_noise(specs)
    questions[noisy].append("noise")
    family = (len(arms) - 1) * sum(map(len, questions.values()))
    scatter = {dataset: _scatter(measured.get(dataset) or piloted.get(dataset), dataset) for dataset in datasets}
    under_noise = scatter[noisy] if noisy != clean and noisy in measured else None
    rows = []
    for dataset, question in ((of, each) for of, asked in questions.items() for each in asked):
        of = clean if question == "noise" else dataset
        spread, error = scatter[of]
        chance_of = functools.partial(
            power, question, spread=spread, log_costs=costs[of], family=family, error=error, under_noise=under_noise
        )
        chance = _by_seeds(functools.partial(chance_of, math.log1p(-difference)))
        needed = next((seeds for seeds, probability in chance.items() if probability >= WANTED), None)
        found = {} if needed else {seeds: _smallest_found(chance_of, seeds, difference) for seeds in _USUAL_SEEDS}
        cells = measured.get(of) or piloted.get(of)
        rows.append(
            {
                "dataset": dataset, "of": of, "spread": spread, "pairs": int(cells.counts.sum()) if cells else 0,
                "pilot": of in piloted and of not in measured, "question": question,
                "questions": family, "power": {seeds: chance[seeds] for seeds in SEEDS}, "needed": needed, "found": found,
            }
        )  # fmt: skip
    return rows


def _scatter(cells: Cells | None, dataset: str) -> tuple[float, float]:
    """What a pair's log ratio scatters by, and the mean error; assumed where no runs say it."""
    return (cells.pair_spread(), float(np.exp(cells.means).mean())) if cells else (assumed_spread(dataset), _ASSUMED_ERROR)


def _asked_about_noise(specs: Sequence[RunSpec]) -> tuple[str, str]:
    """The data set without noise, and the one that the report names in its question about noise; by the rule of noise_questions."""
    datasets = sorted(dict.fromkeys(spec.dataset for spec in specs), key=lambda dataset: -protocol_of(dataset).images[2])
    conditions = {
        dataset: {overrides_text(spec.overrides): spec.overrides for spec in specs if spec.dataset == dataset} for dataset in datasets
    }
    base = {dataset: min(of.values(), key=len) for dataset, of in conditions.items()}
    for dataset, of in conditions.items():
        without = base[dataset]
        for each in of.values():
            if "input_noise" not in without and {**without, "input_noise": each.get("input_noise")} == each:
                return dataset, dataset
    twins = [dataset for dataset in datasets if base.get(f"{dataset}-noisy") == base[dataset]]
    return (twins[0], f"{twins[0]}-noisy") if twins else (datasets[0],) * 2


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


# Two digits each, from 0.1 to 99 %, about a twentieth apart.
_DIFFERENCES = sorted({float(f"{each:.2g}") for each in np.geomspace(0.001, 0.99, 150)})


def _smallest_found(chance_of: Callable[..., float], seeds: int, difference: float) -> float | None:
    """The smallest of some differences above `difference` that this many seeds find with 80 %; None: not even 99 %."""
    larger = [each for each in _DIFFERENCES if each > difference]
    place = bisect.bisect_left(larger, True, key=lambda each: chance_of(math.log1p(-each), seeds=seeds) >= WANTED)
    return larger[place] if place < len(larger) else None


def power(
    question: str, effect: float, spread: float, log_costs: np.ndarray, seeds: int, family: int, error: float = _ASSUMED_ERROR,
    under_noise: tuple[float, float] | None = None,
) -> float:  # fmt: skip
    """The probability of "better" or "worse", if a question's true value is `effect` and those of the others are 0.

    Args:
        effect: on the log scale; noise: on log-odds. spread: standard deviation of a pair's log ratio. log_costs: [sizes].
        family: how many questions. error: on clean images; noise only. under_noise: spread and error there; None: as without it, but
            for odds of an error that are half as large again.
    """
    chance = np.random.default_rng(seeds)
    if question == "noise":
        own: Mapping[str, Estimate] = _noise_on_scales(effect, (spread, error), under_noise, log_costs, seeds, chance)
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
    effect: float, clean: tuple[float, float], noisy: tuple[float, float] | None, log_costs: np.ndarray, seeds: int,
    chance: np.random.Generator,
) -> dict[str, Estimate]:  # fmt: skip
    """The question about noise in simulated studies, on all scales: arms alike on clean images, conditions that scatter independently.

    A pair's log error scatters by `spread` in a condition, its log-odds by 1 / (1 - error) as much.

    Args:
        clean, noisy: spread and error; noisy None: the clean spread, and _NOISE times the odds.
    """
    noisy = noisy or (clean[0], float(special.expit(special.logit(clean[1]) + math.log(_NOISE))))
    shares = []
    for (spread, error), of_arms in ((clean, (0.0, 0.0)), (noisy, (0.0, effect))):
        odds = special.logit(error) + np.asarray(of_arms)
        scatter = spread / math.sqrt(2) / (1 - special.expit(odds))
        draws = odds[:, None] + scatter[:, None] * chance.standard_normal((len(log_costs), _STUDIES, 2, seeds))
        shares.append(special.expit(draws))
    by_scale = {scale: np.stack([np.diff(to_scale(each), axis=2)[:, :, 0] for each in shares], axis=2)
                for scale, (to_scale, _) in scaling.SCALES.items()}  # fmt: skip
    return compare.noise_estimates({scale: Cells(np.stack([log_costs, log_costs]), list(each)) for scale, each in by_scale.items()})


def power_text(rows: Sequence[dict[str, Any]], difference: float) -> str:
    """The rows for a person."""
    lines = [
        f"probability in % of a verdict, if the true difference is {100 * difference:g} %, at a first look",
        "(level: lower error over all sizes; trend: better scaling; noise: less lost by noise, in odds of an error; with Holm's correction "
        f"over {rows[0]['questions']} questions)\n",
    ]
    width = max(len(name) for name in ("data set", *(row["dataset"] for row in rows)))
    lines.append(f"{'data set':<{width}} {'seeds':<8} " + " ".join(f"{seeds:>3}" for seeds in SEEDS) + "  for 80 %")
    for row in rows:
        needed = f"{row['needed']}" if row["needed"] else f"> {max(SEEDS)}"
        cells = " ".join(f"{100 * probability:>3.0f}" for probability in row["power"].values())
        lines.append(f"{row['dataset']:<{width}} {row['question']:<8} {cells}  {needed}")
    if short := [row for row in rows if row["found"]]:
        lines += ["", *_found_lines(short, difference, width)]
    lines.append("")
    for dataset, row in {row["of"]: row for row in rows}.items():
        known = (
            f"measured on {row['pairs']} pairs{' of the pilot' if row['pilot'] else ''}"
            if row["pairs"]
            else "assumed: no cell has two seeds yet"
        )
        lines.append(f"{dataset}: the difference of a pair scatters by {100 * row['spread']:.1f} % from seed to seed ({known})")
    return "\n".join(lines)


def _found_lines(rows: Sequence[dict[str, Any]], difference: float, width: int) -> list[str]:
    """What can be found, of questions for which no number of seeds suffices."""
    lines = [f"{max(SEEDS)} seeds do not find {100 * difference:g} % here with a probability of 80 %. What is found with it:"]
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
