"""Secondary methods: sign flips and the crossed bootstrap. docs/statistics.md says what each is good for."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from study.report.scaling import LEVEL, SCALES, Cells

# Sign flips are all tried up to so many pairs, and drawn at random beyond.
_EXACT_PAIRS = 14
_DRAWS = 10_000


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
    answers: Sequence[np.ndarray], weights: np.ndarray, baseline: Sequence[np.ndarray] | None = None, scale: str = "log error",
    draws: int = 2000, seed: int = 0,
) -> tuple[float, float]:  # fmt: skip
    """95 % percentile interval of a contrast of errors on a scale of scaling.SCALES when seeds and test images are both samples.

    Seeds are drawn with replacement within cells, a pair as a whole; images over the whole test set, the same for all runs; sizes never.

    Args:
        answers: for each size [2, seeds, images], what of an image's answers was wrong: 0, 1, or a share where it was asked several times.
        baseline: the same of another condition, whose difference is taken off.
    """
    chance = np.random.default_rng(seed)
    images = answers[0].shape[-1]
    picks = chance.multinomial(images, np.full(images, 1 / images), size=draws).astype(np.float32)
    values = np.zeros(draws)
    for i, weight in enumerate(weights):
        differences = _differences(answers[i], picks, scale)
        if baseline is not None:
            differences -= _differences(baseline[i], picks, scale)
        drawn = chance.integers(differences.shape[1], size=differences.shape)
        values += weight * np.take_along_axis(differences, drawn, axis=1).mean(axis=1)
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _differences(cell: np.ndarray, picks: np.ndarray, scale: str) -> np.ndarray:
    """Error of the second arm less the first's on a scale, by draw and pair. [2, seeds, images], [draws, images] -> [draws, seeds]"""
    arms, seeds, images = cell.shape
    errors = (cell.reshape(arms * seeds, images).astype(np.float32) @ picks.T + 0.5) / (images + 1)
    first, second = SCALES[scale][0](errors).reshape(arms, seeds, -1)
    return (second - first).T
