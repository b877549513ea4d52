"""Two arms compared on one data set, and clean runs with noisy ones: run tables in, answers without verdicts out."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from diffvit.protocol import ARMS, LIKE_CLASSIC, model_title
from study.report import curves, resampling, scaling
from study.report.curves import Line, PowerLaw, Ratio
from study.report.scaling import Cells, Estimate
from study.report.sentences import percent, relative
from study.report.verdict import Answer, null_spread
from study.table import seeds_of_study


@dataclass(frozen=True)
class ArmComparison:
    """Both arms on one data set: the answers and all that is exploratory.

    Attributes:
        cells: by measure. ratios: by measure and cost.
        equal_costs: the level of the error at equal cost, by cost; where larger models are better.
    """

    subject: str
    arms: tuple[str, str]
    cells: dict[str, Cells]
    answers: list[Answer]
    ratios: dict[tuple[str, str], Ratio]
    equal_costs: dict[str, Estimate]

    @functools.cached_property
    def lines(self) -> dict[str, tuple[Line, Line]]:
        """Of both arms, by measure."""
        return {name: (curves.line(each, 0), curves.line(each, 1)) for name, each in self.cells.items() if len(each.logs) > 1}

    @property
    def matches(self) -> list[tuple[float, float | None]]:
        """The second arm's sizes, and which size of the first has the same error; in parameters."""
        errors = self.cells["error"]
        return [(math.exp(errors.log_costs[1, i]), curves.equal_cost(errors, i)) for i in range(len(errors.logs))]

    @property
    def laws(self) -> dict[str, PowerLaw | None]:
        """Power laws, by measure."""
        return {name: curves.power_law(each) for name, each in self.cells.items()}


COSTS = {"parameters": "parameters", "forward_flops": "FLOPs", "seconds": "training time"}

# A row of a run table -> for each test image 1 if its answer was wrong, else 0, or a share if it was asked several times. [images]
WrongAnswers = Callable[[Any], np.ndarray]


def pairs_of(arms: Sequence[str]) -> list[tuple[str, str]]:
    """The first of the arms with each of the others."""
    return [(arms[0], other) for other in arms[1:]]


def compare(
    table: pd.DataFrame, subject: str, arms: tuple[str, str] = ARMS, wrong_of: WrongAnswers | None = None, whole: pd.DataFrame | None = None
) -> ArmComparison | None:
    """Compare two arms on the runs of one data set and one condition; None where they share no size and seed.

    Args:
        wrong_of: what runs answered wrongly, for the secondary interval; None leaves it out.
        whole: the table with runs that may not be compared too: a size of which nothing else is there blocks the trend. None: `table`.
    """
    first, second = (table[table["model"] == arm] for arm in arms)
    pairs = scaling.pair_table(first, second)
    if pairs.empty:
        return None
    tables = {measure: scaling.pair_table(first, second, measure) for measure in ("error", "cross-entropy")}
    by_measure = {measure: scaling.cells_of(each) for measure, each in tables.items() if len(each)}
    cells = by_measure["error"]
    by_cost = {name: scaling.cells_of(scaling.pair_table(first, second, cost=cost)) for cost, name in COSTS.items()}
    equal_costs = {name: at_equal for name, each in by_cost.items() if (at_equal := scaling.level_at_equal_cost(each))}
    wrong = _wrong_answers(wrong_of, first, second, pairs) if wrong_of else None
    without = _sizes_without_pair(table if whole is None else whole, pairs, arms)
    level, *trend = _answers(pairs, cells, subject, arms, wrong, _runs_of(table, pairs, arms), without)
    return ArmComparison(
        subject, arms, by_measure, [dataclasses.replace(level, remarks=_at_equal_cost(equal_costs, cells)), *trend],
        ratios={(measure, name): curves.effective_ratio(scaling.cells_of(scaling.pair_table(first, second, measure, cost)))
                for measure in by_measure for cost, name in COSTS.items()},
        equal_costs=equal_costs,
    )  # fmt: skip


def _at_equal_cost(equal_costs: dict[str, Estimate], cells: Cells) -> tuple[str, ...]:
    """A sentence on the level at equal cost, or on why there is none.

    At equal parameters too, by interpolation, where the arms have not the same.

    Args:
        cells: with parameters as costs.
    """
    more = cells.log_costs[1] - cells.log_costs[0]
    alike = bool(np.abs(more).max() <= math.log1p(LIKE_CLASSIC))
    phrases = [f"at equal {name} {relative(level)}" for name, level in equal_costs.items() if name != "parameters" or not alike]
    parameters = "are equal" if alike else f"differ by up to {percent(float(more[np.abs(more).argmax()]))}"
    clauses = [" and ".join(phrases)] if phrases else []
    if "FLOPs" not in equal_costs and len(cells.logs) > 1:
        clauses.append("over both architectures the error does not fall with size, so nothing can be said at equal FLOPs")
    return (f"Parameters {parameters} here; {'; '.join(clauses)}.",) if clauses else ()


def _answers(
    pairs: pd.DataFrame, cells: Cells, subject: str, arms: tuple[str, str], wrong: list[np.ndarray] | None, runs: tuple[str, ...],
    without: str,
) -> list[Answer]:  # fmt: skip
    """Level and trend, not decided; a trend that is blocked has no number where one size alone has pairs."""
    spread, source = null_spread(cells, wrong)
    questions = {"level": scaling.level_weights(cells)}
    if len(cells.logs) > 1:
        questions["trend"] = scaling.trend_weights(cells)
    answers = [
        Answer(
            question, subject, arms, scaling.contrast(cells, weights), len(pairs), int(cells.counts.max()),
            unknown=scaling.why_no_interval(cells),
            blocked=without if question == "trend" else "", runs=runs,
            flips=resampling.sign_flips(cells, weights), new_images=resampling.crossed_bootstrap(wrong, weights) if wrong else None,
            null_half=scaling.null_range(weights, cells.counts, spread), null_source=source,
        )
        for question, weights in questions.items()
    ]  # fmt: skip
    if without and "trend" not in questions:
        answers.append(Answer("trend", subject, arms, Estimate.none(), len(pairs), int(cells.counts.max()), blocked=without, runs=runs))
    return answers


def _sizes_without_pair(table: pd.DataFrame, pairs: pd.DataFrame, arms: tuple[str, str]) -> str:
    """Why nothing can be said of a trend: the sizes of the arms' runs that have no pair, whatever became of them; "" for none."""
    of_arms = table[table["model"].isin(arms)].sort_values("parameters")
    paired = pairs.index.get_level_values("size")
    without = [size for size in dict.fromkeys(of_arms["size"]) if size not in paired]
    return f"{' and '.join(without)} {'has' if len(without) == 1 else 'have'} no pair of finished, comparable runs" if without else ""


def _runs_of(table: pd.DataFrame, pairs: pd.DataFrame, arms: tuple[str, str]) -> tuple[str, ...]:
    """The run_ids of the pairs."""
    rows = table[table["model"].isin(arms)].itertuples()
    return tuple(run.run_id for run in rows if run.status == "done" and (run.size, run.seed) in pairs.index)


def noise_answer(
    clean: pd.DataFrame,
    noisy: pd.DataFrame,
    subject: str,
    arms: tuple[str, str] = ARMS,
    measures: tuple[str, str] = ("error", "error"),
    wrong: tuple[WrongAnswers, WrongAnswers] | None = None,
) -> Answer | None:
    """How much noise changes the difference of the arms: below 0, the second arm loses less. None without common pairs.

    Args:
        clean, noisy: run tables of the two conditions.
        measures: of the two, as pair_table takes them.
        wrong: what runs of the clean and of the noisy table answered wrongly, for the secondary interval.
    """
    (clean_0, clean_1), (noisy_0, noisy_1) = ([table[table["model"] == arm] for arm in arms] for table in (clean, noisy))
    tables = {
        scale: (
            scaling.pair_table(clean_0, clean_1, measures[0], scale=scale),
            scaling.pair_table(noisy_0, noisy_1, measures[1], scale=scale),
        )
        for scale in scaling.SCALES
    }
    pairs = scaling.interaction_pairs(*tables["log-odds"])
    if pairs.empty:
        return None
    by_scale = {scale: scaling.cells_of(scaling.interaction_pairs(*both)) for scale, both in tables.items()}
    cells = by_scale["log-odds"]
    weights = scaling.level_weights(cells)
    estimate, *others = noise_estimates(by_scale).values()
    baseline = _wrong_answers(wrong[0], clean_0, clean_1, pairs) if wrong else None
    answers = _wrong_answers(wrong[1], noisy_0, noisy_1, pairs) if wrong else None
    new_images = None
    if baseline and answers and all(one.shape == other.shape for one, other in zip(baseline, answers, strict=True)):
        new_images = resampling.crossed_bootstrap(answers, weights, baseline, "log-odds")
    spreads = [
        null_spread(scaling.cells_of(on_odds), stack, float(points[["log_0", "log_1"]].to_numpy().mean()))
        for on_odds, points, stack in zip(tables["log-odds"], tables["points"], (baseline, answers), strict=True)
    ]
    return Answer(
        "noise", subject, arms, estimate, len(pairs), int(cells.counts.max()), dict(zip(list(by_scale)[1:], others, strict=True)),
        runs=_runs_of(clean, pairs, arms) + _runs_of(noisy, pairs, arms),
        flips=resampling.sign_flips(cells, weights), new_images=new_images,
        null_half=scaling.null_range(weights, cells.counts, math.hypot(*(spread for spread, _ in spreads))), null_source=spreads[0][1],
        unknown=scaling.why_no_interval(cells),
        beside=_accuracies_under_noise(*tables["points"], arms, corrupted=measures[1] == "corrupted error"),
    )  # fmt: skip


def noise_estimates(by_scale: dict[str, Cells]) -> dict[str, Estimate]:
    """The answer to the question about noise on each scale, the primary one first: the mean change over the sizes."""
    return {scale: scaling.level(cells) for scale, cells in by_scale.items()}


def _accuracies_under_noise(clean: pd.DataFrame, noisy: pd.DataFrame, arms: tuple[str, str], corrupted: bool) -> str:
    """What the arms are worth under noise, in absolute terms, and what each loses.

    Args:
        clean, noisy: pair tables of error shares. corrupted: whether the noise is in test images only.
    """
    both = clean.join(noisy, how="inner", lsuffix="_clean", rsuffix="_noisy").groupby("size").mean().mean()
    first, second = (both[f"log_{arm}_noisy"] for arm in (0, 1))
    lost = [100 * (both[f"log_{arm}_noisy"] - both[f"log_{arm}_clean"]) for arm in (0, 1)]
    titles = [model_title(arm) for arm in arms]
    than = "more accurate than" if second < first else "less accurate than" if second > first else "as accurate as"
    accurate = f"under noise {titles[1]} is {than} {titles[0]} ({100 * (1 - second):.1f} against {100 * (1 - first):.1f} %)"
    share = f", a relative corruption error of {lost[1] / lost[0]:.2f}" if corrupted and lost[0] > 0 else ""
    return f"{accurate}; lost by noise {lost[1]:.1f} against {lost[0]:.1f} points{share}"


def _wrong_answers(of_run: WrongAnswers, first: pd.DataFrame, second: pd.DataFrame, pairs: pd.DataFrame) -> list[np.ndarray] | None:
    """For each size, smallest first: what was wrong of each test image's answers. [2, seeds, images]

    None where runs were tested on different numbers of images.
    """
    runs = [{(run.size, run.seed): run for run in arm[arm["status"] == "done"].itertuples()} for arm in (first, second)]
    sizes = pairs.groupby("size")["cost_0"].mean().sort_values().index
    by_size = {size: [pair for pair in pairs.index if pair[0] == size] for size in sizes}
    answers = {size: [[of_run(arm[pair]) for pair in of_size] for arm in runs] for size, of_size in by_size.items()}
    if len({len(each) for of_size in answers.values() for arm in of_size for each in arm}) > 1:
        return None
    return [np.stack([np.stack(arm) for arm in of_size]) for of_size in answers.values()]


def left_out(table: pd.DataFrame, arms: Sequence[str] = ARMS) -> list[str]:
    """Runs of the arms, the baseline first, that enter no pair, and why; also those missing of a seed that the study has."""
    table = table[table["model"].isin(arms)]
    done = {(run.model, run.size, run.seed) for run in table.itertuples() if run.status == "done"}
    statuses = {(run.model, run.size, run.seed): run.status for run in table.itertuples()}
    asked = set(seeds_of_study(table))
    phrases = []
    for size, seed, arm in itertools.product(dict.fromkeys(table["size"]), dict.fromkeys(sorted(table["seed"])), arms):
        name = f"{model_title(arm)} {size} seed {seed}"
        partners = arms[1:] if arm == arms[0] else arms[:1]
        if (arm, size, seed) not in statuses:
            if seed in asked:
                phrases.append(f"{name} failed or was not trained")
        elif statuses[arm, size, seed] != "done":
            phrases.append(f"{name} {statuses[arm, size, seed]}")
        elif not any((partner, size, seed) in done for partner in partners):
            phrases.append(f"{name} has no partner")
    return phrases
