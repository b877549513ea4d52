"""Simulated test images: answers image by image, for the methods that look at images."""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.worlds import PARAMETERS
from study.report import resampling, scaling, verdict
from study.report.scaling import Cells


def answers_of_a_study(chance: np.random.Generator, seeds: int, images: int, scatter: float, taste: float) -> list[np.ndarray]:
    """Which answers are wrong, image by image, in a study without an effect. For each size [2, seeds, images]

    An image has a difficulty, and a run answers it rightly with a probability that falls with it.

    Args:
        scatter: of a run's skill between seeds, on the logit scale; 0.03 is about 1 % of the error.
        taste: how far an architecture finds an image harder than the other one does, at all sizes alike.
    """
    difficulty = 2.0 * chance.standard_normal(images) + taste * chance.standard_normal((2, 1, images))
    sizes = []
    for i in range(3):
        skill = 0.25 * i + scatter * chance.standard_normal((2, seeds, 1))
        sizes.append((chance.random((2, seeds, images)) >= 1 / (1 + np.exp(difficulty - skill))).astype(np.float32))
    return sizes


def bootstrap_coverage(seeds: int, studies: int, images: int, chance: np.random.Generator) -> dict[str, Any]:
    """The crossed bootstrap against new seeds *and* new test images, and the t interval beside it, in percent."""
    covered = {"crossed bootstrap": 0, "t interval": 0}
    for _ in range(studies):
        answers = answers_of_a_study(chance, seeds, images, scatter=0.03, taste=0.5)
        cells = _cells_of_answers(answers)
        low, high = resampling.crossed_bootstrap(answers, scaling.level_weights(cells), draws=500, seed=int(chance.integers(2**31)))
        covered["crossed bootstrap"] += low <= 0 <= high
        low, high = scaling.level(cells).interval
        covered["t interval"] += low <= 0 <= high
    return {"seeds": seeds, "images": images, "studies": studies, **{name: 100 * count / studies for name, count in covered.items()}}


def one_seed(scatter: float, studies: int, images: int, chance: np.random.Generator) -> dict[str, Any]:
    """How often a study of one seed without an effect falls in the range that the report prints for it, in percent.

    Args:
        scatter: of a run's skill, on the logit scale.
    """
    held = 0
    for _ in range(studies):
        answers = answers_of_a_study(chance, 1, images, scatter, taste=0.0)
        cells = _cells_of_answers(answers)
        half = scaling.null_range(scaling.level_weights(cells), cells.counts, verdict.null_spread(cells, answers)[0])
        held += abs(scaling.level(cells).value) <= half
    # What this scatter does to a run's error, where a test set has no end.
    many = [answers_of_a_study(chance, 100, 20_000, scatter, taste=0.0)[1].mean(axis=2) for _ in range(2)]
    spread = float(np.mean([np.log(errors).std(axis=1).mean() for errors in many]))
    return {"scatter": scatter, "images": images, "studies": studies, "spread_of_a_run": 100 * spread, "held": 100 * held / studies}


def _cells_of_answers(answers: list[np.ndarray]) -> Cells:
    return Cells(np.log(PARAMETERS), [np.log((each.sum(axis=2) + 0.5) / (each.shape[2] + 1)) for each in answers])
