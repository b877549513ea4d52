"""Simulated studies whose truth is known, many at a time, in the form that the report's functions take."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from study.report import scaling
from study.report.scaling import Cells

# Parameters of CIFAR-100's models, classic and differential (docs/design.md).
PARAMETERS = np.asarray([[9_753_956, 24_759_396, 50_031_716], [9_756_260, 24_765_348, 50_043_812]], dtype=float)
SLOPE = 0.17
SPREAD = 0.015
SHARED = 1 / 3

Noise = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


def gaussian(chance: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal."""
    return chance.standard_normal(shape)


def heavy_tails(chance: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Student's t with 3 degrees of freedom, scaled to unit variance."""
    return chance.standard_t(3, shape) / math.sqrt(3)


def occasional_failures(chance: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """One run in twenty ends five standard deviations worse."""
    return chance.standard_normal(shape) + 5 * (chance.random(shape) < 0.05)


@dataclass(frozen=True)
class World:
    """How a simulated study comes about: a run's log error is its arm's curve plus noise, a third of whose variance a pair shares.

    Attributes:
        seeds: pairs of the three sizes. spreads: of the three sizes, as multiples of `spread`, a run's between seeds.
        level: log ratio of the second arm's error to the first's, at the middle size; trend: its change over the range of sizes.
        noise: draws standard noise of a shape. arms: what each arm's own noise is multiplied by.
        bend: curvature of both arms' true curves: log error is not a line over log parameters.
    """

    seeds: tuple[int, int, int] = (3, 3, 3)
    spreads: tuple[float, float, float] = (1, 1, 1)
    level: float = 0.0
    trend: float = 0.0
    noise: Noise = gaussian
    arms: tuple[float, float] = (1, 1)
    spread: float = SPREAD
    bend: float = 0.0

    def truth(self) -> np.ndarray:
        """True log errors. [2, sizes]"""
        x = np.log(PARAMETERS).mean(axis=0)
        x = x - x.mean()
        curve = math.log(0.5) - SLOPE * x + self.bend * x**2
        return np.stack([curve, curve + self.level + self.trend * x / np.ptp(x)])

    def draw(self, chance: np.random.Generator, *studies: int) -> Cells:
        """So many studies; none: one without leading dimensions."""
        return self.draw_arms(1, chance, *studies)[0]

    def draw_arms(self, others: int, chance: np.random.Generator, *studies: int) -> list[Cells]:
        """Studies of the first arm and `others` like the second one: the first with each of them."""
        of_arm = [0] + [1] * others
        truth, own_spread = self.truth()[of_arm], np.asarray(self.arms)[of_arm]
        logs = []
        for i, (seeds, times) in enumerate(zip(self.seeds, self.spreads, strict=True)):
            own, shared = self.noise(chance, (*studies, 1 + others, seeds)), self.noise(chance, (*studies, 1, seeds))
            noise = math.sqrt(1 - SHARED) * own * own_spread[:, None] + math.sqrt(SHARED) * shared
            logs.append(truth[:, i, None] + self.spread * times * noise)
        return [Cells(np.log(PARAMETERS), [cell[..., [0, other], :] for cell in logs]) for other in range(1, 1 + others)]


def first_seeds(cells: Cells, seeds: int) -> Cells:
    """The same studies when only so many seeds were done."""
    return Cells(cells.log_costs, [cell[..., :seeds] for cell in cells.logs])


def interaction(clean: Cells, noisy: Cells) -> Cells:
    """As scaling.interaction_pairs: cells whose "arms" are the differences without and with noise."""
    logs = [np.stack([cell[..., 1, :] - cell[..., 0, :] for cell in pair], axis=-2) for pair in zip(clean.logs, noisy.logs, strict=True)]
    return Cells(clean.log_costs, logs)


# What noise does to a share of errors, for both arms alike: it says nothing about an architecture.
NOISES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "odds of an error x e": lambda error: 1 / (1 + (1 - error) / (math.e * error)),
    "half the images unreadable": lambda error: 0.5 + 0.5 * error,
    "10 points more": lambda error: error + 0.1,
    "errors x 1.5": lambda error: 1.5 * error,
}


def noise_scales(
    error: float, level: float, effect: float, under_noise: Callable[[np.ndarray], np.ndarray], chance: np.random.Generator, studies: int
) -> dict[str, Cells]:
    """Studies of clean and noisy runs on the scales of the question about noise, with 3 seeds at each of 3 sizes.

    Args:
        error: of the first arm on clean images. level: log ratio of the second one's to it. effect: what noise does to the second arm's
            log error beyond `under_noise`.
    """
    true = error * np.exp([[0.0], [level]])
    shares = []
    for noisy in (False, True):
        of_arms = under_noise(true) * np.exp([[0.0], [effect]]) if noisy else true
        # Seeds scatter on log-odds, so that no share leaves 0 to 1; by the same share of the error in all worlds.
        odds = np.log(of_arms / (1 - of_arms))
        own, shared = gaussian(chance, (3, studies, 2, 3)), gaussian(chance, (3, studies, 1, 3))
        scatter = math.sqrt(1 - SHARED) * own + math.sqrt(SHARED) * shared
        shares.append(1 / (1 + np.exp(-(odds + SPREAD / (1 - of_arms) * scatter))))
    return {
        scale: interaction(*(Cells(np.log(PARAMETERS), list(to_scale(each))) for each in shares))
        for scale, (to_scale, _) in scaling.SCALES.items()
    }
