"""Curves of the error over cost: each arm's line, the cost ratio at equal error with Fieller's interval, and a power law. Exploratory."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import optimize

from study.report.scaling import Cells, Estimate, combine, level_weights, slope_weights, why_no_interval


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
    at_middle = np.full(len(x), 1 / len(x)) + weights * (middle - x.mean())
    of_arm = np.eye(2)[arm][:, None]
    return Line(combine(cells, -of_arm * weights), combine(cells, of_arm * at_middle), math.exp(middle))


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
    if abs(difference / slope) > 10:  # a ratio of 20,000: no seeds are needed to say so
        return Ratio(math.nan, note="the slope cannot be told from 0")
    value = math.exp(difference / slope + shift)
    if not cells.known:
        return Ratio(value, note=f"no interval ({why_no_interval(cells)})")
    interval = _fieller(cells, difference / slope)
    if interval is None:
        return Ratio(math.nan, note="the slope cannot be told from 0")
    return Ratio(value, math.exp(interval[0] + shift), math.exp(interval[1] + shift))


def _fieller(cells: Cells, log_ratio: float) -> tuple[float, float] | None:
    """All r around log_ratio at which "difference - slope r" is not rejected; None where they have no end: the slope may be 0."""
    equal, weights = level_weights(cells), slope_weights(cells.x)
    if combine(cells, np.stack([weights, weights]) / 2).interval[1] >= 0:
        return None

    def margin(r: float) -> float:
        """Below 0 where r is not rejected."""
        at_r = combine(cells, np.stack([-equal, equal]) + r * weights / 2)
        return max(at_r.interval[0], -at_r.interval[1])

    if margin(log_ratio) >= 0:  # runs that do not scatter at all: rounding decides
        return log_ratio, log_ratio
    ends = []
    for sign in (-1, 1):
        step = next((step for step in 0.01 * 2.0 ** np.arange(12) if margin(log_ratio + sign * step) > 0), None)
        if step is None:
            return None
        ends.append(optimize.brentq(margin, log_ratio, log_ratio + sign * step, xtol=1e-10))
    return ends[0], ends[1]


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
    """Fitted to cell means on the log scale. None where there are fewer means than parameters, or the fit ends at a bound."""
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
    bounds = np.asarray([[-30, -20, -20, 0, 0], [lowest, 20, 20, 5, 5]])
    fits = [optimize.least_squares(residuals, start, bounds=(bounds[0], bounds[1])) for start in starts]
    best = min(fits, key=lambda fit: fit.cost)
    no_floor = best.x[0] < math.log(1e-6)  # measured: without one, fits end at 1e-8 or below
    if not best.success or no_floor or (np.abs(best.x[1:] - bounds[:, 1:]) < 1e-3).any():
        return None
    floor, *scales_and_exponents = best.x
    return PowerLaw(math.exp(floor), tuple(np.exp(scales_and_exponents[:2])), tuple(scales_and_exponents[2:]), df)
