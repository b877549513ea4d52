"""What is asked, and by what rule it is answered. The rule was written down before any data were there.

Three questions, on the test error, each with one number (see scaling.py):

    level   is one architecture better at the sizes measured?
    trend   does one scale better with depth?
    noise   does noise change the difference of the two? On log-odds, and on every other scale of scaling.SCALES too

    better / worse         p < 0.05 after Holm's correction over all questions of the report; noise: on every scale, in one direction
    equivalent             else, if the 95 % interval lies within +-2 %; noise: on every relative scale
    depends on the scale   else, if p < 0.05 on log-odds alone
    undecided              else; the sentence says what would have been found
    no interval            a size with one pair: the sentence says what no effect at all would produce
    no verdict             a trend with a size without a pair; noise of which no pair has finished both with noise and without

Runs that diverged are an outcome: where a verdict changes when they count as chance level, it is "undecided: runs diverged", unless they
are the losing arm's alone and move the number further the same way. A second
look at more seeds spends a part of 1 % more (looks.py). Cross-entropy, ratios, slopes, power laws and everything else are exploratory:
shown with intervals, and no verdict.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from study.report import scaling
from study.report.scaling import Cells, Estimate

# Relative error within which two architectures count as equivalent.
MARGIN = 0.02
ALPHA = 1 - scaling.LEVEL
# What all looks after the first one may spend together.
LATER = 0.01

# What a run's log error scatters by where nothing in the ledger says it, and a pair's, unpaired.
ASSUMED_RUN_SPREAD = 0.03
ASSUMED_SPREAD = ASSUMED_RUN_SPREAD * math.sqrt(2)

DIVERGED = "undecided: runs diverged"


@dataclass(frozen=True)
class Answer:
    """One question's number and verdict.

    Attributes:
        question: "level", "trend" or "noise". subject: the data set, with the condition where there are several.
        estimate: on log error; noise: on log-odds. scales: noise: on the other scales.
        unknown: why there is no interval. blocked: why there can be no verdict.
        runs: the run_ids that it rests on. look: which look at the question this is.
        p_holm: corrected over the family and for the look; nan without an interval or blocked. questions: how many the family has.
        flips: p of the sign-flip test. new_images: interval of the crossed bootstrap, where predictions are there.
        null_half, null_source: without an interval, half of the range that no effect would produce, and where its spread comes from.
        beside: what the sentence says beside its number. remarks: sentences on what else decides how to take it.
        with_diverged: the number where diverged runs count as chance level.
    """

    question: str
    subject: str
    arms: tuple[str, str]
    estimate: Estimate
    pairs: int
    seeds: int
    scales: dict[str, Estimate] = field(default_factory=dict)
    unknown: str = ""
    blocked: str = ""
    runs: tuple[str, ...] = ()
    look: int = 1
    verdict: str = ""
    p_holm: float = math.nan
    questions: int = 1
    flips: float = math.nan
    new_images: tuple[float, float] | None = None
    null_half: float = math.nan
    null_source: str = ""
    beside: str = ""
    remarks: tuple[str, ...] = ()
    with_diverged: Estimate | None = None

    @property
    def key(self) -> tuple[str, str, tuple[str, str]]:
        """Which question it answers."""
        return self.question, self.subject, self.arms

    @property
    def alpha(self) -> float:
        """What this look may spend."""
        return alpha_of(self.look)


def alpha_of(look: int) -> float:
    """What a look at a question may spend: 5 % the first, half of what is left of one per cent each later one."""
    return ALPHA if look == 1 else LATER / 2 ** (look - 1)


def decide(answers: Sequence[Answer]) -> list[Answer]:
    """The verdicts of a family of answers, with Holm's correction over it."""
    families = [{"primary": answer.estimate, **answer.scales} for answer in answers]
    corrected, words = verdicts(families, [answer.alpha for answer in answers], [bool(answer.blocked) for answer in answers])
    asked = int((~np.isnan(corrected)).sum())
    return [
        dataclasses.replace(answer, p_holm=float(p), questions=asked, verdict=str(word))
        for answer, p, word in zip(answers, corrected, words, strict=True)
    ]


def verdicts(
    questions: Sequence[Mapping[str, Estimate]], alphas: Sequence[float] | None = None, blocked: Sequence[bool] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Corrected p values, and verdicts, of a family of questions; or of many families at once. [questions, ...]

    Args:
        questions: for each the primary estimate, then the same on other scales, all of which must agree.
        alphas: what the look at each may spend. blocked: which have no verdict whatever the numbers say.
    """
    alphas = alphas or [ALPHA] * len(questions)
    blocked = blocked or [False] * len(questions)
    shape = np.broadcast_shapes(*(np.shape(next(iter(scales.values())).value) for scales in questions), ())
    weights = [ALPHA / alpha for alpha in alphas]
    agreed, alone = (
        holm(np.stack([np.broadcast_to(math.nan if no else np.minimum(1, weight * p(scales)), shape)
                       for scales, weight, no in zip(questions, weights, blocked, strict=True)]))
        for p in (_p_on_all, lambda scales: next(iter(scales.values())).p)
    ) if questions else (np.empty(0), np.empty(0))  # fmt: skip
    words = []
    for scales, alpha, no, p, p_alone in zip(questions, alphas, blocked, agreed, alone, strict=True):
        primary = next(iter(scales.values()))
        rules = [(no, "no verdict"), (not primary.known, "no interval"), ((p < ALPHA) & (np.asarray(primary.value) < 0), "better"),
                 (p < ALPHA, "worse"), (_equivalent(scales, alpha), "equivalent"), (p_alone < ALPHA, "depends on the scale")]  # fmt: skip
        words.append(np.select([np.broadcast_to(holds, shape) for holds, _ in rules], [word for _, word in rules], "undecided"))
    return agreed, np.asarray(words)


def _p_on_all(scales: Mapping[str, Estimate]) -> np.ndarray:
    """The largest p over the scales, an intersection-union test; 1 where they differ in direction."""
    ps = np.max([each.p for each in scales.values()], axis=0)
    signs = np.sign([each.value for each in scales.values()])
    return np.where((signs == signs[0]).all(axis=0) | np.isnan(ps), ps, 1.0)


def _equivalent(scales: Mapping[str, Estimate], alpha: float) -> np.ndarray:
    """Whether the intervals on all relative scales lie within the margin: both of its ends are rejected, from within."""
    low, high = math.log(1 - MARGIN), math.log(1 + MARGIN)
    relative = [each for name, each in scales.items() if name != "points"]
    return np.all(
        [(low < each.value) & (each.value < high) & (each.p_of(low) < alpha) & (each.p_of(high) < alpha) for each in relative], axis=0
    )


def holm(ps: np.ndarray) -> np.ndarray:
    """Holm's step-down correction along the first dimension; nan stays nan and is not counted. [questions, ...]"""
    order = np.argsort(ps, axis=0)
    known = (~np.isnan(ps)).sum(axis=0)
    ranks = np.arange(len(ps)).reshape(-1, *[1] * (ps.ndim - 1))
    ordered = np.minimum(1, np.take_along_axis(ps, order, axis=0) * np.maximum(known - ranks, 1))
    corrected = np.empty_like(ps)
    np.put_along_axis(corrected, order, np.maximum.accumulate(ordered, axis=0), axis=0)
    return corrected


# ------------------------------------------------------------------------------------------------------ without an interval

_ASSUMED = f"assuming that a run's error scatters by {100 * ASSUMED_RUN_SPREAD:.0f} % from seed to seed"


def null_spread(cells: Cells, wrong: list[np.ndarray] | None, error: float = 0.0) -> tuple[float, str]:
    """What a pair's log ratio scatters by if the arms do not differ, and how that is known.

    With one seed two parts add up: chance over the test images on which the two disagree, as in McNemar's test, where predictions are
    there; and an assumed scatter of whole runs. Both are of log error; log-odds scatter by 1 / (1 - error) as much.

    Args:
        error: the mean error where the cells are on log-odds; 0 where they are on log error.
    """
    if (cells.counts > 1).any():
        return cells.pair_spread(), "from the spread between seeds"
    if wrong is None:
        return ASSUMED_SPREAD / (1 - error), _ASSUMED
    variances = []
    for cell in wrong:
        disagreed = float((abs(cell[1] - cell[0]) ** 2).sum(axis=-1).mean())
        variances.append((disagreed + 1) / max(1.0, float(cell.sum(axis=-1).mean())) ** 2)
    spread = math.sqrt(float(np.mean(variances)) + ASSUMED_SPREAD**2) / (1 - error)
    return spread, f"{_ASSUMED}, and that chance decides images on which the two disagree"
