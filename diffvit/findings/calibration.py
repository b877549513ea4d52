"""Whether a model's confidence is its accuracy: the expected calibration error of its answers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from diffvit.protocol import stable_seed

_BINS = 15
_DRAWS = 300


class Calibration(NamedTuple):
    """An expected calibration error, its 95 % interval, and the mean of what chance alone gives a perfectly calibrated model."""

    error: float
    low: float
    high: float
    by_chance: float


def calibration_error(right: np.ndarray, confidences: np.ndarray) -> float:
    """Expected calibration error over 15 bins of equal width (Guo et al. 2017, arXiv 1706.04599), 0 to 1.

    Args:
        right: 1 for each image answered rightly, else 0. confidences: probability of the answer. Both [images].
    """
    return _error(_bins(confidences), right - confidences)


def calibrate(right: np.ndarray, confidences: np.ndarray) -> Calibration:
    """The calibration error with an interval for new test images; arguments as calibration_error.

    Few images make the error larger than it is, and drawing images again does so once more: the usual percentile interval misses the
    truth nearly always where a model is well calibrated. So the ends of the bootstrap are moved by its own bias, and the interval begins
    at 0 where a calibrated model of these confidences would give as large an error in 1 of 40 draws.
    """
    chance = np.random.default_rng(stable_seed("calibration", len(right)))
    bins, gaps = _bins(confidences), right - confidences
    error = _error(bins, gaps)
    drawn, calibrated = np.empty(_DRAWS), np.empty(_DRAWS)
    for draw in range(_DRAWS):
        rows = chance.integers(len(gaps), size=len(gaps))
        drawn[draw] = _error(bins[rows], gaps[rows])
        calibrated[draw] = _error(bins, (chance.random(len(gaps)) < confidences) - confidences)
    highest = np.quantile(drawn, 0.975)
    low = max(0.0, 2 * error - highest) if error > np.quantile(calibrated, 0.975) else 0.0
    return Calibration(error, low, highest - (drawn.mean() - error), calibrated.mean())


def _bins(confidences: np.ndarray) -> np.ndarray:
    return np.minimum((confidences * _BINS).astype(int), _BINS - 1)


def _error(bins: np.ndarray, gaps: np.ndarray) -> float:
    return float(np.abs(np.bincount(bins, gaps, _BINS)).sum() / len(gaps))
