"""What is asked, by what rule it is answered, and the answer in a sentence. The rule was written down before any data were there.

Three questions, on the test error, each with one number (see scaling.py):

    level   is one architecture better at the sizes measured?
    trend   does one scale better with depth?
    noise   does noise change the difference of the two?

    better / worse   the 95 % interval excludes 0, and so does Holm's correction over all questions of the report
    equivalent       else, if the interval lies within +-2 % relative error
    undecided        else; the sentence says what would have been found
    no interval      one seed: the sentence says what no effect at all would produce

Cross-entropy, ratios, slopes, power laws and everything else are exploratory: shown with intervals, and no verdict.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from diffvit.protocol import ARMS, MODEL_TITLES
from study.report import scaling
from study.report.scaling import Cells, Estimate, Line, PowerLaw, Ratio

# Relative error within which two architectures count as equivalent.
MARGIN = 0.02
ALPHA = 1 - scaling.LEVEL

# What a pair's log ratio scatters by where nothing in the ledger says it: 3 % a run, unpaired.
ASSUMED_SPREAD = 0.03 * math.sqrt(2)


@dataclass(frozen=True)
class Answer:
    """One question's number and verdict.

    Attributes:
        question: "level", "trend" or "noise".
        subject: the data set, with the condition where there are several.
        p_holm: corrected over the family; nan with one seed. questions: how many that family has.
        flips: p of the sign-flip test.
        new_images: interval of the crossed bootstrap, where predictions are there.
        null_half, null_source: with one seed, half of the range that no effect would produce, and where its spread comes from.
    """

    question: str
    subject: str
    arms: tuple[str, str]
    estimate: Estimate
    pairs: int
    seeds: int
    verdict: str = ""
    p_holm: float = math.nan
    questions: int = 1
    flips: float = math.nan
    new_images: tuple[float, float] | None = None
    null_half: float = math.nan
    null_source: str = ""


@dataclass(frozen=True)
class Comparison:
    """Both architectures on one data set: the answers and all that is exploratory.

    Attributes:
        lines: of both arms, by measure. ratios: by measure and cost. laws: power laws, by measure.
    """

    subject: str
    arms: tuple[str, str]
    cells: dict[str, Cells]
    answers: list[Answer]
    lines: dict[str, tuple[Line, Line]]
    ratios: dict[tuple[str, str], Ratio]
    matches: list[tuple[float, float | None]]
    laws: dict[str, PowerLaw | None]
    correlation: float


COSTS = {"parameters": "parameters", "forward_flops": "FLOPs", "seconds": "training time"}


# A row of a run table -> for each test image 1 if its answer was wrong, else 0, or a share if it was asked several times. [images]
WrongAnswers = Callable[[Any], np.ndarray]


def compare(table: pd.DataFrame, subject: str, arms: tuple[str, str] = ARMS, wrong_of: WrongAnswers | None = None) -> Comparison | None:
    """Compare two architectures on the runs of one data set and one condition; None where they share no size and seed.

    Args:
        wrong_of: what runs answered wrongly, for the secondary interval; None leaves it out.
    """
    first, second = (table[table["model"] == arm] for arm in arms)
    pairs = scaling.pair_table(first, second)
    if pairs.empty:
        return None
    tables = {measure: scaling.pair_table(first, second, measure) for measure in ("error", "cross-entropy")}
    by_measure = {measure: scaling.cells_of(each) for measure, each in tables.items() if len(each)}
    cells = by_measure["error"]
    wrong = _wrong_answers(wrong_of, first, second, pairs) if wrong_of else None
    spread, source = null_spread(cells, wrong)
    several = len(cells.logs) > 1
    questions = {"level": scaling.level_weights(cells), **({"trend": scaling.trend_weights(cells)} if several else {})}
    answers = [
        Answer(
            question, subject, arms, scaling.contrast(cells, weights), int(cells.counts.sum()), int(cells.counts.max()),
            flips=scaling.sign_flips(cells, weights), new_images=scaling.crossed_bootstrap(wrong, weights) if wrong else None,
            null_half=scaling.null_range(weights, cells.counts, spread), null_source=source,
        )
        for question, weights in questions.items()
    ]  # fmt: skip
    return Comparison(
        subject, arms, by_measure, answers,
        lines={name: (scaling.line(each, 0), scaling.line(each, 1)) for name, each in by_measure.items() if len(each.logs) > 1},
        ratios={(measure, name): scaling.effective_ratio(scaling.cells_of(scaling.pair_table(first, second, measure, cost)))
                for measure in by_measure for cost, name in COSTS.items()},
        matches=[(math.exp(cells.log_costs[1, i]), scaling.equal_cost(cells, i)) for i in range(len(cells.logs))],
        laws={name: scaling.power_law(each) for name, each in by_measure.items()},
        correlation=cells.correlation(),
    )  # fmt: skip


def noise_answer(
    clean: pd.DataFrame,
    noisy: pd.DataFrame,
    subject: str,
    arms: tuple[str, str] = ARMS,
    measures: tuple[str, str] = ("error", "error"),
    wrong: tuple[WrongAnswers, WrongAnswers] | None = None,
) -> Answer | None:
    """How much noise changes the log ratio of the arms' errors: below 0, the second arm suffers less. None without common pairs.

    Args:
        clean, noisy: run tables of the two conditions.
        measures: of the two, as pair_table takes them.
        wrong: what runs of the clean and of the noisy table answered wrongly, for the secondary interval.
    """
    (clean_0, clean_1), (noisy_0, noisy_1) = ([table[table["model"] == arm] for arm in arms] for table in (clean, noisy))
    of_clean, of_noisy = scaling.pair_table(clean_0, clean_1, measures[0]), scaling.pair_table(noisy_0, noisy_1, measures[1])
    pairs = scaling.interaction_pairs(of_clean, of_noisy)
    if pairs.empty:
        return None
    cells = scaling.cells_of(pairs)
    weights = scaling.level_weights(cells)
    baseline = _wrong_answers(wrong[0], clean_0, clean_1, pairs) if wrong else None
    answers = _wrong_answers(wrong[1], noisy_0, noisy_1, pairs) if wrong else None
    new_images = None
    if baseline and answers and all(one.shape == other.shape for one, other in zip(baseline, answers, strict=True)):
        new_images = scaling.crossed_bootstrap(answers, weights, baseline)
    spreads = [null_spread(scaling.cells_of(each), stack) for each, stack in ((of_clean, baseline), (of_noisy, answers))]
    return Answer(
        "noise", subject, arms, scaling.contrast(cells, weights), int(cells.counts.sum()), int(cells.counts.max()),
        flips=scaling.sign_flips(cells, weights), new_images=new_images,
        null_half=scaling.null_range(weights, cells.counts, math.hypot(*(spread for spread, _ in spreads))), null_source=spreads[0][1],
    )  # fmt: skip


def decide(answers: Sequence[Answer]) -> list[Answer]:
    """The verdicts of a family of answers, with Holm's correction over it."""
    corrected = holm([answer.estimate.p for answer in answers])
    asked = sum(not math.isnan(p) for p in corrected)
    pairs = zip(answers, corrected, strict=True)
    return [dataclasses.replace(answer, p_holm=p, questions=asked, verdict=_verdict(answer.estimate, p)) for answer, p in pairs]


def _verdict(estimate: Estimate, p_holm: float) -> str:
    if not estimate.df:
        return "no interval"
    if p_holm < ALPHA:
        return "better" if estimate.value < 0 else "worse"
    low, high = estimate.interval
    return "equivalent" if estimate.se and math.log(1 - MARGIN) < low and high < math.log(1 + MARGIN) else "undecided"


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's step-down correction; nan stays nan and is not counted."""
    known = sorted((p, i) for i, p in enumerate(ps) if not math.isnan(p))
    corrected = [math.nan] * len(ps)
    highest = 0.0
    for rank, (p, i) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - rank) * p))
        corrected[i] = highest
    return corrected


# ----------------------------------------------------------------------------------------------------------- one seed

_ASSUMED = f"assuming that a run's error scatters by {100 * ASSUMED_SPREAD / math.sqrt(2):.0f} % from seed to seed"


def null_spread(cells: Cells, wrong: list[np.ndarray] | None) -> tuple[float, str]:
    """What a pair's log ratio scatters by if the arms do not differ, and how that is known.

    With one seed two parts add up: chance over the test images on which the two disagree, as in McNemar's test, where predictions are
    there; and an assumed scatter of whole runs.
    """
    if cells.df:
        return cells.pair_spread(), "from the spread between seeds"
    if wrong is None:
        return ASSUMED_SPREAD, _ASSUMED
    variances = []
    for cell in wrong:
        disagreed = float((abs(cell[1] - cell[0]) ** 2).sum(axis=-1).mean())
        variances.append((disagreed + 1) / max(1.0, float(cell.sum(axis=-1).mean())) ** 2)
    return math.sqrt(float(np.mean(variances)) + ASSUMED_SPREAD**2), f"{_ASSUMED}, and that chance decides images on which the two disagree"


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


def left_out(table: pd.DataFrame, arms: tuple[str, str] = ARMS) -> list[str]:
    """Runs of two arms that enter no pair, and why; also those that are not there although others of their size or seed are."""
    table = table[table["model"].isin(arms)]
    done = {(run.model, run.size, run.seed) for run in table.itertuples() if run.status == "done"}
    there = {(run.model, run.size, run.seed): run.status for run in table.itertuples()}
    phrases = []
    for size, seed, arm in itertools.product(dict.fromkeys(table["size"]), dict.fromkeys(sorted(table["seed"])), arms):
        name = f"{MODEL_TITLES.get(arm, arm)} {size} seed {seed}"
        partner = arms[1 - arms.index(arm)]
        if (arm, size, seed) not in there:
            phrases.append(f"{name} failed or was not trained")
        elif there[arm, size, seed] != "done":
            phrases.append(f"{name} {there[arm, size, seed]}")
        elif (partner, size, seed) not in done:
            phrases.append(f"{name} has no partner")
    return phrases


# ---------------------------------------------------------------------------------------------------------- sentences


def sentence(answer: Answer) -> str:
    """The answer for a person: verdict, number, interval, and what else decides how to take it."""
    first, second = (MODEL_TITLES.get(arm, arm) for arm in answer.arms)
    better = {"level": f"{second} has a lower error than {first} at these sizes",
              "trend": f"{second} scales better with depth than {first}",
              "noise": f"{second} is better suited to noise than {first}"}[answer.question]  # fmt: skip
    worse = {"level": f"{second} has a higher error than {first} at these sizes",
             "trend": f"{second} scales worse with depth than {first}",
             "noise": f"{second} is worse suited to noise than {first}"}[answer.question]  # fmt: skip
    same = {"level": f"{second} and {first} are equivalent at these sizes", "trend": f"{second} and {first} scale alike with depth",
            "noise": f"noise hits {second} and {first} alike"}[answer.question]  # fmt: skip
    undecided = {"level": f"whether {second} or {first} has the lower error is undecided",
                 "trend": f"whether {second} scales better than {first} is undecided",
                 "noise": f"whether {second} is better suited to noise than {first} is undecided"}[answer.question]  # fmt: skip
    claim = {"better": better, "worse": worse, "equivalent": same}.get(answer.verdict, undecided)
    number = f"{_WHAT[answer.question]} {percent(answer.estimate.value)}"
    if answer.verdict == "no interval":
        low, high = percent(-answer.null_half), percent(answer.null_half)
        return (
            f"On {answer.subject}, {claim}: {number}, no interval (1 seed). No effect at all would produce {low} to {high}, "
            f"{answer.null_source}."
        )
    low, high = (percent(end) for end in answer.estimate.interval)
    test = f"p {p_value(answer.p_holm)} after Holm, {answer.pairs} pairs"
    text = f"On {answer.subject}, {claim}: {number} (95 % interval {low} to {high}; {test})."
    if answer.verdict == "equivalent":
        text += f" The interval lies within +-{100 * MARGIN:.0f} %."
    if answer.verdict == "undecided":
        less, more = (percent(sign * answer.estimate.detectable(questions=answer.questions)) for sign in (-1, 1))
        text += f" True values of {less} or {more} would have been found with a probability of 80 %."
        if answer.estimate.p < ALPHA:
            text += " Taken alone the interval excludes 0; as one of several questions it does not suffice."
    if answer.verdict in ("better", "worse") and answer.new_images and answer.new_images[0] <= 0 <= answer.new_images[1]:
        low, high = (percent(end) for end in answer.new_images)
        text += f" This holds for these test images; for new ones too it is not certain ({low} to {high})."
    return text


_WHAT = {"level": "difference in error", "trend": "change of the difference from the smallest to the largest size",
         "noise": "change of the difference under noise"}  # fmt: skip


def percent(log_ratio: float) -> str:
    """A log ratio as a relative change: -0.02 -> "-2.0 %"."""
    return f"{100 * math.expm1(log_ratio):+.1f} %"


def p_value(p: float) -> str:
    """Two digits, and never 0: "= 0.012", "< 0.001"."""
    return "unknown" if math.isnan(p) else f"= {p:.2g}" if p >= 1e-3 else "< 0.001"
