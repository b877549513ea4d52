"""Two architectures compared: contrasts of log errors over paired seeds, with intervals. docs/statistics.md explains each method.

For a data set, size i and seed j, d_ij is the log of the second arm's measure (error or cross-entropy) minus the first's. Runs of one
seed see the same batches in the same order, so a pair differs in its architecture only. Then

    level = mean over sizes of d                       log ratio at the sizes measured; below 0, the second arm is better
    trend = change of d from smallest to largest size  from the least-squares line over log parameters; below 0, it scales better
    ratio = parameters that the second arm needs for the first one's error, as a share of the first's

are linear contrasts of cell means. Each cell has a variance of its own (Welch 1947). What is asked of which measure, and by what rule it
is answered, stands in verdict.py. Everything up to the contrasts takes many studies at once, along leading dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import optimize, special, stats

LEVEL = 0.95

# The weight of the case that the size with the fewest pairs decides everything; chosen in simulation, with power against validity.
DOMINATED = 0.175

# A standard error below this is rounding in floating-point numbers.
_NO_SPREAD = 1e-9


@dataclass(frozen=True)
class Estimate:
    """A value on the log scale, its interval, and the two-sided p value of "it is 0"; or those of many studies. [...]

    A standardised value t has p = (1 - DOMINATED) P(|t_df| > |t|) + DOMINATED P(|t_least| > |t|), and intervals are that test turned
    round. Without degrees of freedom (one pair in a cell) there is a value only; the rest is nan.

    Attributes:
        df: Welch's degrees of freedom. least: those of the smallest cell; None: df.
    """

    value: Any
    se: Any
    df: Any
    least: int | None = None

    @classmethod
    def none(cls) -> Estimate:
        """Neither a value nor an interval."""
        return cls(math.nan, math.nan, 0, 0)

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return bool(np.all(self.df))

    @property
    def interval(self) -> tuple[Any, Any]:
        """Lower and upper end of the 95 % interval."""
        return self.interval_at(1 - LEVEL)

    def interval_at(self, alpha: float) -> tuple[Any, Any]:
        """Lower and upper end of the interval that leaves out `alpha`."""
        half = self._quantile(alpha) * self.se if self.known else math.nan
        return self.value - half, self.value + half

    @property
    def p(self) -> Any:
        """Of the test against 0; 1 where there is no spread to judge by."""
        return self.p_of(0.0)

    def p_of(self, true: float) -> Any:
        """Of the test against a true value: below alpha outside interval_at(alpha)."""
        if not self.known:
            return math.nan
        se = np.asarray(self.se)
        p = self._two_sided(np.abs(self.value - true) / np.maximum(se, _NO_SPREAD))
        return np.where(se < _NO_SPREAD, 1.0, p)[()]

    def _two_sided(self, distance: Any) -> Any:
        least = self.df if self.least is None else self.least
        return 2 * ((1 - DOMINATED) * special.stdtr(self.df, -distance) + DOMINATED * special.stdtr(least, -distance))

    def _quantile(self, alpha: float) -> Any:
        """The distance from 0 whose p is alpha, by bisection between the quantiles of both distributions."""
        least = self.df if self.least is None else self.least
        low, high = (special.stdtrit(np.asarray(df, float), 1 - alpha / 2) + np.zeros(np.shape(self.df)) for df in (self.df, least))
        for _ in range(40):
            middle = (low + high) / 2
            far = self._two_sided(middle) < alpha
            low, high = np.where(far, low, middle), np.where(far, middle, high)
        return high[()]

    def detectable(self, power: float = 0.8, alpha: float = 1 - LEVEL) -> float:
        """How far from 0 a true value must be to be found with this probability by a test at `alpha`."""
        if not self.known:
            return math.nan
        bound = self._quantile(alpha)
        return float(optimize.brentq(lambda far: stats.nct.sf(bound, self.df, far) - power, 0, 3 * bound + 50)) * self.se


@dataclass(frozen=True)
class Cells:
    """Two arms' log measures, paired by seed, size by size.

    Attributes:
        log_costs: [2, sizes], natural log of what a model of each arm costs: parameters, FLOPs or hours.
        logs: for each size [..., 2, seeds], natural log of the measure.
        rounding: variance of one run's log measure that whole answers on few test images cannot show; None: 0. [2, sizes]
    """

    log_costs: np.ndarray
    logs: Sequence[np.ndarray]
    rounding: np.ndarray | None = None

    @property
    def counts(self) -> np.ndarray:
        """Pairs in each cell. [sizes]"""
        return np.asarray([cell.shape[-1] for cell in self.logs])

    @property
    def known(self) -> bool:
        """Whether every cell has a spread: two pairs at least."""
        return bool((self.counts > 1).all())

    @property
    def means(self) -> np.ndarray:
        """Mean log measure of each arm. [..., 2, sizes]"""
        return np.stack([cell.mean(axis=-1) for cell in self.logs], axis=-1)

    @property
    def x(self) -> np.ndarray:
        """Log cost of a size, the mean of both arms. [sizes]"""
        return self.log_costs.mean(axis=0)

    def covariance(self) -> np.ndarray:
        """Of the two arms within cells, pooled over cells: what seeds do. [2, 2], nan for one seed."""
        centred = np.concatenate([cell - cell.mean(axis=1, keepdims=True) for cell in self.logs], axis=1)
        df = int((self.counts - 1).sum())
        return centred @ centred.T / df if df else np.full((2, 2), np.nan)

    def pair_spread(self) -> float:
        """Standard deviation of a pair's log ratio within cells, pooled over cells; nan for one seed."""
        covariance = self.covariance()
        return math.sqrt(np.maximum(0.0, covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]))

    def correlation(self) -> float:
        """Of the two arms within pairs; nan where one of them does not vary."""
        covariance = self.covariance()
        scale = math.sqrt(covariance[0, 0] * covariance[1, 1])
        return float(covariance[0, 1] / scale) if scale else math.nan


# Error shares on the scales of the question about noise: the value, and its derivative. On each of them less is better.
SCALES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "log-odds": (lambda error: np.log(error / (1 - error)), lambda error: 1 / (error * (1 - error))),
    "log error": (np.log, lambda error: 1 / error),
    "log accuracy": (lambda error: -np.log(1 - error), lambda error: 1 / (1 - error)),
    "points": (lambda error: error, np.ones_like),
}


def pair_table(
    first: pd.DataFrame, second: pd.DataFrame, measure: str = "error", cost: str = "parameters", scale: str = "log error"
) -> pd.DataFrame:
    """Pairs of runs of two arms from rows of run tables that have one run a size and seed, by (size, seed).

    Columns, of each arm: log_0, log_1; cost_0, cost_1; and rounding_0, rounding_1, the variance that counting whole answers leaves.
    Runs that are not done, and those whose partner is missing, are left out.

    Args:
        measure: "error" of the test set, "cross-entropy" there; "evaluated error" and "corrupted error", what evaluate found.
        cost: "parameters", "forward_flops", or "seconds" of training, of all workers together.
        scale: of an error, as in SCALES; a cross-entropy is taken as its logarithm.

    Raises:
        ValueError: a size and seed twice in an arm: such pairs would be no pairs.
    """
    arms = [_measured(arm, measure, cost, scale) for arm in (first, second)]
    if not all(arm.index.is_unique for arm in arms):
        raise ValueError("an arm has more than one run of a size and seed")
    return arms[0].join(arms[1], how="inner", lsuffix="_0", rsuffix="_1")


def _measured(arm: pd.DataFrame, measure: str, cost: str, scale: str) -> pd.DataFrame:
    """Measure on its scale, its rounding and the cost of the runs that are done, by size and seed."""
    arm = arm[arm["status"] == "done"]
    if measure == "cross-entropy":
        log, rounding = np.log(arm["test_loss"].astype(float).where(lambda loss: loss > 0)), 0.0
    else:
        evaluated = measure != "error"
        images = arm["evaluated_images" if evaluated else "test_images"].astype(float)
        errors = error_share(arm[measure.replace(" ", "_")] if evaluated else 1 - arm["test_accuracy"].astype(float), images)
        to_scale, derivative = SCALES[scale]
        # A count says where its expectation lies to half an answer: a variance of 1/12 (Sheppard 1898).
        log, rounding = to_scale(errors), (derivative(errors) / (images + 1)) ** 2 / 12
    costs = arm[cost].astype(float) * (arm["workers"].astype(float).fillna(1) if cost == "seconds" else 1)
    frame = pd.DataFrame({"size": arm["size"], "seed": arm["seed"], "log": log, "cost": costs, "rounding": rounding})
    return frame.replace([np.inf, -np.inf], np.nan).dropna().set_index(["size", "seed"])


def cells_of(pairs: pd.DataFrame) -> Cells:
    """The pairs as cells, smallest cost first; sizes without a pair are not there."""
    groups = [cell for _, cell in pairs.groupby("size")]
    groups.sort(key=lambda cell: cell["cost_0"].mean())
    costs, rounding = (
        np.asarray([[cell[f"{what}_0"].mean(), cell[f"{what}_1"].mean()] for cell in groups]).reshape(-1, 2).T
        for what in ("cost", "rounding")
    )
    return Cells(np.log(costs), [cell[["log_0", "log_1"]].to_numpy().T for cell in groups], rounding)


def interaction_pairs(clean: pd.DataFrame, noisy: pd.DataFrame) -> pd.DataFrame:
    """Pairs whose "arms" are the log ratios of two pair tables: their contrast says how noise changes the difference of the arms."""
    both = clean.join(noisy, how="inner", lsuffix="_clean", rsuffix="_noisy")
    pairs = {"cost_0": both["cost_0_clean"], "cost_1": both["cost_1_clean"]}
    for i, kind in enumerate(("clean", "noisy")):
        pairs[f"log_{i}"] = both[f"log_1_{kind}"] - both[f"log_0_{kind}"]
        pairs[f"rounding_{i}"] = both[f"rounding_0_{kind}"] + both[f"rounding_1_{kind}"]
    return pd.DataFrame(pairs)


def error_share(error: Any, images: Any) -> Any:
    """Share of wrong answers; half an answer is added to each side, so that a perfect model has a finite logarithm."""
    return (error * images + 0.5) / (images + 1.0)


def log_error(accuracy: pd.Series, images: pd.Series) -> pd.Series:
    """Log share of wrong answers."""
    return np.log(error_share(1 - accuracy.astype(float), images))


# -------------------------------------------------------------------------------------------------------- contrasts


def combine(cells: Cells, coefficients: np.ndarray) -> Estimate:
    """Sum over arms and sizes of coefficient times mean. coefficients: [2, sizes]

    Each cell's part has the variance of that sum over its own seeds and n - 1 degrees of freedom. It is not less than rounding to whole
    answers gives, which neither more seeds nor more sizes make smaller: what rounds alike in one rounds alike in all. Welch's degrees of
    freedom lie between those of the smallest cell and what equal parts of as many such cells would give.
    """
    value = (cells.means * coefficients).sum(axis=(-2, -1))
    if not cells.known:
        return Estimate(value, math.nan, 0, 0)
    sums = [np.einsum("a,...as->...s", each, cell) for each, cell in zip(coefficients.T, cells.logs, strict=True)]
    variances = np.stack([each.var(axis=-1, ddof=1) for each in sums], axis=-1)
    rounding = np.zeros(len(cells.logs)) if cells.rounding is None else (coefficients**2 * cells.rounding).sum(axis=0)
    parts = np.maximum(variances / cells.counts, rounding)
    total, df = np.maximum(parts.sum(axis=-1), np.sqrt(rounding).sum() ** 2), cells.counts - 1
    least = int(df.min())
    with np.errstate(invalid="ignore"):
        welch = total**2 / (parts**2 / (df + 2)).sum(axis=-1) - 2
    return Estimate(value, np.sqrt(total), np.clip(np.nan_to_num(welch), least, len(df) * (least + 2) - 2), least)


def contrast(cells: Cells, weights: np.ndarray) -> Estimate:
    """Sum over sizes of weight times mean difference (second arm less first). weights: [sizes]"""
    return combine(cells, np.stack([-weights, weights]))


def level(cells: Cells) -> Estimate:
    """Mean log ratio over the sizes; every size counts the same."""
    return contrast(cells, level_weights(cells))


def trend(cells: Cells) -> Estimate:
    """Change of the log ratio from the smallest to the largest size. Needs two sizes."""
    return contrast(cells, trend_weights(cells))


def level_at_equal_cost(cells: Cells) -> Estimate | None:
    """The level where the second arm has the first one's cost at every size, both sharing a slope; None where larger is not better.

    It is the level plus slope times log cost ratio, again a contrast of cell means. The costs are taken as known.
    """
    if len(cells.logs) < 2:
        return None
    equal, weights = level_weights(cells), slope_weights(cells.x)
    if not weights @ cells.means.mean(axis=0) < 0:
        return None
    dearer = float((cells.log_costs[1] - cells.log_costs[0]).mean())
    return combine(cells, np.stack([-equal, equal]) - dearer * weights / 2)


def level_weights(cells: Cells) -> np.ndarray:
    """[sizes], summing to 1."""
    return np.full(len(cells.logs), 1 / len(cells.logs))


def trend_weights(cells: Cells) -> np.ndarray:
    """[sizes], summing to 0: a least-squares slope over log cost, times the range of log cost."""
    return slope_weights(cells.x) * np.ptp(cells.x)


def slope_weights(x: np.ndarray) -> np.ndarray:
    """Weights of a least-squares slope over x. [sizes]"""
    centred = x - x.mean()
    return centred / (centred @ centred)


def why_no_interval(cells: Cells) -> str:
    """Why there is no interval: "1 seed", or which share of the sizes has one pair only."""
    alone = int((cells.counts == 1).sum())
    return "1 seed" if alone == len(cells.logs) else f"1 pair only at {alone} of {len(cells.logs)} sizes"


# ------------------------------------------------------------------------------------------------------------ planning


def null_range(weights: np.ndarray, counts: np.ndarray, spread: float) -> float:
    """Half of the range in which a contrast falls in 95 of 100 studies if there is no effect at all.

    Args:
        spread: standard deviation of a pair's log ratio.
    """
    return float(stats.norm.ppf(0.5 + LEVEL / 2)) * spread * math.sqrt(float((weights**2 / counts).sum()))
