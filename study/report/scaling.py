"""Two architectures compared: contrasts of log errors over paired seeds, with t intervals. docs/statistics.md explains each method.

For a data set, size i and seed j, d_ij is the log of the second arm's measure (error or cross-entropy) minus the first's. Runs of one
seed see the same batches in the same order, so a pair differs in its architecture only. Then

    level = mean over sizes of d                       log ratio at the sizes measured; below 0, the second arm is better
    trend = change of d from smallest to largest size  from the least-squares line over log parameters; below 0, it scales better
    ratio = parameters that the second arm needs for the first one's error, as a share of the first's

are linear contrasts of cell means. Their variance is pooled within cells, their intervals are Student's with seeds - 1 degrees of
freedom a cell, summed. What is asked of which measure, and by what rule it is answered, stands in verdict.py.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import optimize, stats

LEVEL = 0.95

# Sign flips are all tried up to so many pairs, and drawn at random beyond.
_EXACT_PAIRS = 14
_DRAWS = 10_000


@dataclass(frozen=True)
class Estimate:
    """A value on the log scale, its 95 % interval, and the two-sided p value of "it is 0".

    Without degrees of freedom (one seed) there is a value only; the rest is nan.
    """

    value: float
    se: float
    df: int

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end."""
        half = _t(0.5 + LEVEL / 2, self.df) * self.se if self.df else math.nan
        return self.value - half, self.value + half

    @property
    def p(self) -> float:
        """Of a t test against 0."""
        if not self.df:
            return math.nan
        if self.se == 0:  # on few test images, seeds can agree by chance: no spread to judge by
            return 1.0
        return float(2 * stats.t.sf(abs(self.value / self.se), self.df))

    def detectable(self, power: float = 0.8, questions: int = 1) -> float:
        """How far from 0 a true value must be to be found with this probability.

        Args:
            questions: size of the family; Bonferroni's bound, which Holm's correction never exceeds.
        """
        return (_t(1 - (1 - LEVEL) / 2 / questions, self.df) + _t(power, self.df)) * self.se if self.df else math.nan


@functools.cache
def _t(probability: float, df: int) -> float:
    return float(stats.t.ppf(probability, df))


@dataclass(frozen=True)
class Cells:
    """Two arms' log measures, paired by seed, size by size.

    Attributes:
        log_costs: [2, sizes], natural log of what a model of each arm costs: parameters, FLOPs or hours.
        logs: for each size [2, seeds], natural log of the measure.
    """

    log_costs: np.ndarray
    logs: Sequence[np.ndarray]

    @property
    def counts(self) -> np.ndarray:
        """Pairs in each cell. [sizes]"""
        return np.asarray([cell.shape[1] for cell in self.logs])

    @property
    def df(self) -> int:
        """Degrees of freedom within cells."""
        return int((self.counts - 1).sum())

    @property
    def means(self) -> np.ndarray:
        """Mean log measure of each arm. [2, sizes]"""
        return np.stack([cell.mean(axis=1) for cell in self.logs], axis=1)

    @property
    def x(self) -> np.ndarray:
        """Log cost of a size, the mean of both arms. [sizes]"""
        return self.log_costs.mean(axis=0)

    def covariance(self) -> np.ndarray:
        """Of the two arms within cells, pooled over cells: what seeds do. [2, 2], nan for one seed."""
        centred = np.concatenate([cell - cell.mean(axis=1, keepdims=True) for cell in self.logs], axis=1)
        return centred @ centred.T / self.df if self.df else np.full((2, 2), np.nan)

    def pair_spread(self) -> float:
        """Standard deviation of a pair's log ratio within cells; nan for one seed."""
        covariance = self.covariance()
        return math.sqrt(max(0.0, covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])) if self.df else math.nan

    def correlation(self) -> float:
        """Of the two arms within pairs; nan where one of them does not vary."""
        covariance = self.covariance()
        scale = math.sqrt(covariance[0, 0] * covariance[1, 1])
        return float(covariance[0, 1] / scale) if scale else math.nan


def pair_table(first: pd.DataFrame, second: pd.DataFrame, measure: str = "error", cost: str = "parameters") -> pd.DataFrame:
    """Pairs of runs of two arms from rows of run tables that have one run a size and seed: log_0, log_1, cost_0, cost_1 by (size, seed).

    Runs that are not done, and those whose partner is missing, are left out.

    Args:
        measure: "error" of the test set, "cross-entropy" there; "evaluated error" and "corrupted error", what evaluate found.
        cost: "parameters", "forward_flops", or "seconds" of training, of all workers together.

    Raises:
        ValueError: a size and seed twice in an arm: such pairs would be no pairs.
    """
    arms = [_measured(arm, measure, cost) for arm in (first, second)]
    if not all(arm.index.is_unique for arm in arms):
        raise ValueError("an arm has more than one run of a size and seed")
    return arms[0].join(arms[1], how="inner", lsuffix="_0", rsuffix="_1")


def _measured(arm: pd.DataFrame, measure: str, cost: str) -> pd.DataFrame:
    """Log measure and cost of the runs that are done, by size and seed."""
    arm = arm[arm["status"] == "done"]
    if measure == "cross-entropy":
        log = np.log(arm["test_loss"].astype(float))
    elif measure in ("evaluated error", "corrupted error"):
        log = log_error(1 - arm[measure.replace(" ", "_")], arm["evaluated_images"])
    else:
        log = log_error(arm["test_accuracy"], arm["test_images"])
    costs = arm[cost].astype(float) * (arm["workers"].astype(float).fillna(1) if cost == "seconds" else 1)
    frame = pd.DataFrame({"size": arm["size"], "seed": arm["seed"], "log": log, "cost": costs})
    return frame.replace([np.inf, -np.inf], np.nan).dropna().set_index(["size", "seed"])


def cells_of(pairs: pd.DataFrame) -> Cells:
    """The pairs as cells, smallest cost first; sizes without a pair are not there."""
    groups = [cell for _, cell in pairs.groupby("size")]
    groups.sort(key=lambda cell: cell["cost_0"].mean())
    costs = np.asarray([[cell["cost_0"].mean(), cell["cost_1"].mean()] for cell in groups]).reshape(-1, 2).T
    return Cells(np.log(costs), [cell[["log_0", "log_1"]].to_numpy().T for cell in groups])


def interaction_pairs(clean: pd.DataFrame, noisy: pd.DataFrame) -> pd.DataFrame:
    """Pairs whose "arms" are the log ratios of two pair tables: their contrast says how noise changes the difference of the arms."""
    both = clean.join(noisy, how="inner", lsuffix="_clean", rsuffix="_noisy")
    ratios = {f"log_{i}": both[f"log_1_{kind}"] - both[f"log_0_{kind}"] for i, kind in enumerate(("clean", "noisy"))}
    return pd.DataFrame({**ratios, "cost_0": both["cost_0_clean"], "cost_1": both["cost_1_clean"]})


def log_error(accuracy: pd.Series, images: pd.Series) -> pd.Series:
    """Log share of wrong answers; half an answer is added to each side, so that a perfect model has a finite one."""
    return np.log(((1 - accuracy.astype(float)) * images + 0.5) / (images + 1.0))


# -------------------------------------------------------------------------------------------------------- contrasts


def contrast(cells: Cells, weights: np.ndarray) -> Estimate:
    """Sum over sizes of weight times mean difference (second arm less first). weights: [sizes]"""
    means = cells.means
    se = cells.pair_spread() * math.sqrt(float((weights**2 / cells.counts).sum()))
    return Estimate(float(weights @ (means[1] - means[0])), se, cells.df)


def level(cells: Cells) -> Estimate:
    """Mean log ratio over the sizes; every size counts the same."""
    return contrast(cells, level_weights(cells))


def trend(cells: Cells) -> Estimate:
    """Change of the log ratio from the smallest to the largest size. Needs two sizes."""
    return contrast(cells, trend_weights(cells))


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


@dataclass(frozen=True)
class Line:
    """log measure = intercept - slope * log(cost / middle) of one arm; `middle` is the geometric mean of both arms' costs."""

    slope: Estimate
    intercept: Estimate
    middle: float


def line(cells: Cells, arm: int) -> Line:
    """The least-squares line through one arm's cell means. The slope over the measured range is not a power law's exponent."""
    x = cells.log_costs[arm]
    middle = float(cells.x.mean())
    weights = slope_weights(x)
    y = cells.means[arm]
    at_middle = np.full(len(x), 1 / len(x)) + weights * (middle - x.mean())
    spread = cells.covariance()[arm, arm]
    errors = [math.sqrt(spread * float((each**2 / cells.counts).sum())) if cells.df else math.nan for each in (weights, at_middle)]
    return Line(Estimate(-float(weights @ y), errors[0], cells.df), Estimate(float(at_middle @ y), errors[1], cells.df), math.exp(middle))


# ------------------------------------------------------------------------------------------------ effective parameters


@dataclass(frozen=True)
class Ratio:
    """Cost at which the second arm has the first one's error, as a share of the first one's cost; below 1, the second is cheaper.

    Attributes:
        low, high: 95 % interval; nan where there is none, and `note` says why.
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    note: str = ""


def effective_ratio(cells: Cells) -> Ratio:
    """The ratio over the measured range, both arms sharing a slope, with Fieller's interval.

    With log measure = a - b log cost, equal measures mean log ratio = (difference of the lines) / b. The interval holds every ratio r for
    which "difference - b log r = 0", a linear contrast of cell means, is not rejected: it needs no approximation for a quotient.
    """
    if len(cells.logs) < 2:
        return Ratio(math.nan, note="needs two sizes")
    first, second = cells.means
    if max(first.min(), second.min()) > min(first.max(), second.max()):
        return Ratio(math.nan, note="outside the measured range")
    weights = slope_weights(cells.x)
    slope = -float(weights @ (first + second) / 2)
    # The arms' costs at one size differ a little: what the second one's mean cost is above the first one's counts too.
    shift = float((cells.log_costs[1] - cells.log_costs[0]).mean())
    difference = float((second - first).mean())
    if slope <= 0:
        return Ratio(math.nan, note="larger models are not better")
    value = math.exp(difference / slope + shift)
    if not cells.df:
        return Ratio(value, note="no interval (1 seed)")
    interval = _fieller(cells, difference, slope, weights)
    if interval is None:
        return Ratio(math.nan, note="the slope cannot be told from 0")
    return Ratio(value, math.exp(interval[0] + shift), math.exp(interval[1] + shift))


def _fieller(cells: Cells, difference: float, slope: float, weights: np.ndarray) -> tuple[float, float] | None:
    """All r with |difference - slope r| <= t SE(r), where SE(r)^2 is quadratic in r; None where that is not an interval."""
    covariance = cells.covariance()
    of_difference = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    of_mean = (covariance[0, 0] + covariance[1, 1] + 2 * covariance[0, 1]) / 4
    of_both = (covariance[1, 1] - covariance[0, 0]) / 2
    equal, n = level_weights(cells), cells.counts
    # difference - slope r = sum over cells of equal * (second - first) + r * weights * (first + second) / 2
    constant, linear, quadratic = (
        of_difference * float((equal**2 / n).sum()),
        2 * of_both * float((equal * weights / n).sum()),
        of_mean * float((weights**2 / n).sum()),
    )
    t2 = _t(0.5 + LEVEL / 2, cells.df) ** 2
    a, b, c = slope**2 - t2 * quadratic, -2 * slope * difference - t2 * linear, difference**2 - t2 * constant
    if a <= 0:
        return None
    root = math.sqrt(max(0.0, b * b - 4 * a * c))  # below 0 by rounding only: the estimate itself is within
    return (-b - root) / (2 * a), (-b + root) / (2 * a)


def equal_cost(cells: Cells, size: int) -> float | None:
    """The first arm's cost at the second arm's mean measure in a size, between measured sizes on log-log lines.

    None outside them, and where a larger model of the first arm is not always better: several sizes would then have that measure.
    """
    x, y = cells.log_costs[0], cells.means[0]
    if not (np.diff(y) < 0).all():
        return None
    target = cells.means[1][size]
    for i in range(len(x) - 1):
        if y[i + 1] <= target <= y[i]:
            return float(math.exp(x[i] + (target - y[i]) / (y[i + 1] - y[i]) * (x[i + 1] - x[i])))
    return None


# -------------------------------------------------------------------------------------------------------- power law


@dataclass(frozen=True)
class PowerLaw:
    """measure = floor + scale * cost ^ -exponent for each arm, with one floor for both.

    Attributes:
        scales, exponents: of the two arms; scales at the middle of the measured costs.
        df: cell means less parameters. With 0 the curve goes through every point, whatever the truth.
    """

    floor: float
    scales: tuple[float, float]
    exponents: tuple[float, float]
    df: int


def power_law(cells: Cells) -> PowerLaw | None:
    """Fitted to cell means on the log scale. None where there are fewer means than parameters, or nothing fits."""
    df = cells.means.size - 5
    if df < 0:
        return None
    x = cells.log_costs - cells.x.mean()
    y = cells.means

    def residuals(values: np.ndarray) -> np.ndarray:
        floor, scales, exponents = values[0], values[1:3, None], values[3:5, None]
        return (np.log(np.exp(floor) + np.exp(scales - exponents * x)) - y).ravel()

    lowest = float(y.min())
    starts = [np.asarray([lowest - down, *y.mean(axis=1), 0.3, 0.3]) for down in (0.1, 0.7, 3.0)]
    fits = [optimize.least_squares(residuals, start, bounds=([-30, -20, -20, 0, 0], [lowest, 20, 20, 5, 5])) for start in starts]
    best = min(fits, key=lambda fit: fit.cost)
    floor, *scales_and_exponents = best.x
    return PowerLaw(math.exp(floor), tuple(np.exp(scales_and_exponents[:2])), tuple(scales_and_exponents[2:]), df) if best.success else None


# --------------------------------------------------------------------------------------------------- secondary methods


def sign_flips(cells: Cells, weights: np.ndarray, seed: int = 0) -> float:
    """Two-sided p of a contrast if which arm of a pair is which were tossed: no distribution is assumed.

    The smallest p that n pairs can give is 2 / 2^n.
    """
    differences = np.concatenate([weight / cell.shape[1] * (cell[1] - cell[0]) for weight, cell in zip(weights, cells.logs, strict=True)])
    n = len(differences)
    if n <= _EXACT_PAIRS:
        signs = np.asarray(list(itertools.product((1, -1), repeat=n)))
        return float(np.mean(abs(signs @ differences) >= abs(differences.sum()) - 1e-12))
    signs = np.random.default_rng(seed).choice((1, -1), size=(_DRAWS, n))
    return float((1 + (abs(signs @ differences) >= abs(differences.sum()) - 1e-12).sum()) / (1 + _DRAWS))


def crossed_bootstrap(
    answers: Sequence[np.ndarray], weights: np.ndarray, baseline: Sequence[np.ndarray] | None = None, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of a contrast of log errors when seeds and test images are both samples.

    Seeds are drawn with replacement within cells, a pair as a whole; images over the whole test set, the same for all runs; sizes never.

    Args:
        answers: for each size [2, seeds, images], what of an image's answers was wrong: 0, 1, or a share where it was asked several times.
        baseline: the same of another condition, whose log ratio is taken off.
    """
    chance = np.random.default_rng(seed)
    images = answers[0].shape[-1]
    picks = chance.multinomial(images, np.full(images, 1 / images), size=draws).astype(np.float32)
    values = np.zeros(draws)
    for i, weight in enumerate(weights):
        ratios = _log_ratios(answers[i], picks)
        if baseline is not None:
            ratios -= _log_ratios(baseline[i], picks)
        drawn = chance.integers(ratios.shape[1], size=ratios.shape)
        values += weight * np.take_along_axis(ratios, drawn, axis=1).mean(axis=1)
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _log_ratios(cell: np.ndarray, picks: np.ndarray) -> np.ndarray:
    """Log error ratio of each pair on each draw of images. [2, seeds, images], [draws, images] -> [draws, seeds]"""
    arms, seeds, images = cell.shape
    logs = np.log((cell.reshape(arms * seeds, images).astype(np.float32) @ picks.T + 0.5) / (images + 1)).reshape(arms, seeds, -1)
    return (logs[1] - logs[0]).T


# ------------------------------------------------------------------------------------------------------------ planning


def null_range(weights: np.ndarray, counts: np.ndarray, spread: float) -> float:
    """Half of the range in which a contrast falls in 95 of 100 studies if there is no effect at all.

    Args:
        spread: standard deviation of a pair's log ratio.
    """
    return float(stats.norm.ppf(0.5 + LEVEL / 2)) * spread * math.sqrt(float((weights**2 / counts).sum()))


def power(effect: float, spread: float, weights: np.ndarray, seeds: int) -> float:
    """The probability that a contrast's interval excludes 0, if its true value is `effect`, with so many seeds in each cell.

    Args:
        effect: on the log scale. spread: standard deviation of a pair's log ratio.
    """
    df = len(weights) * (seeds - 1)
    if not df:
        return math.nan
    noncentrality = abs(effect) / (spread * math.sqrt(float((weights**2).sum()) / seeds)) if spread else math.inf
    if noncentrality > 30:  # beyond what the distribution's code can take, and 1 to all digits
        return 1.0
    bound = _t(0.5 + LEVEL / 2, df)
    chance = float(stats.nct.sf(bound, df, noncentrality) + stats.nct.cdf(-bound, df, noncentrality))
    # With many degrees of freedom its code can fail, where the normal distribution is as good.
    return chance if math.isfinite(chance) else float(stats.norm.sf(bound - noncentrality))
