"""Are the intervals of study/report/scaling.py what they claim? Simulated studies whose truth is known, and real runs that do not differ.

    python -m bench.calibration              simulations: coverage, false positives, power, the effective-parameter ratio
    python -m bench.calibration --control    and ten seeds of one architecture on digits, split five against five (minutes)

A simulated study has two arms, three sizes at the real parameter counts and n paired seeds; a run's log error is its arm's curve plus
Gaussian noise of 1.5 %, a third of whose variance is shared by a pair. Exit code 1 if a bar is missed.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import math
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd

from diffvit.ledger.spec import RunSpec
from study.report import scaling, verdict
from study.report.scaling import Cells, Estimate

# Parameters of CIFAR-100's models, classic and differential (docs/design.md).
PARAMETERS = np.asarray([[9_753_956, 24_759_396, 50_031_716], [9_756_260, 24_765_348, 50_043_812]], dtype=float)
SLOPE = 0.17
SPREAD = 0.015
SHARED = 1 / 3
SEEDS = (1, 3, 5)
# The difference in error that power is stated for.
EFFECT = 0.03

# The bars: coverage in percent, false positives at most, power at least.
COVERAGE = (93.0, 97.0)
FALSE_POSITIVES = 6.0
POWER = 80.0


@dataclass(frozen=True)
class World:
    """How a simulated study comes about.

    Attributes:
        level: log ratio of the second arm's error to the first's, at the middle size; trend: its change over the range of sizes.
        noise: draws standard noise of a shape. cell_spreads: of the three sizes.
        bend: curvature of both arms' true curves: log error is not a line over log parameters.
    """

    level: float = 0.0
    trend: float = 0.0
    noise: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray] = lambda chance, shape: chance.standard_normal(shape)
    cell_spreads: tuple[float, float, float] = (SPREAD, SPREAD, SPREAD)
    bend: float = 0.0

    def truth(self) -> np.ndarray:
        """True log errors. [2, sizes]"""
        x = np.log(PARAMETERS).mean(axis=0)
        x = x - x.mean()
        curve = math.log(0.5) - SLOPE * x + self.bend * x**2
        along = x / np.ptp(x)
        return np.stack([curve, curve + self.level + self.trend * along])

    def study(self, chance: np.random.Generator, seeds: int) -> Cells:
        """One study."""
        truth = self.truth()
        logs = []
        for i, spread in enumerate(self.cell_spreads):
            own, shared = self.noise(chance, (2, seeds)), self.noise(chance, (1, seeds))
            logs.append(truth[:, i, None] + spread * (math.sqrt(1 - SHARED) * own + math.sqrt(SHARED) * shared))
        return Cells(np.log(PARAMETERS), logs)


def heavy_tails(chance: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Student's t with 3 degrees of freedom, scaled to unit variance."""
    return chance.standard_t(3, shape) / math.sqrt(3)


def occasional_failures(chance: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """One run in twenty ends five standard deviations worse."""
    return chance.standard_normal(shape) + 5 * (chance.random(shape) < 0.05)


WORLDS = {
    "Gaussian": World(),
    "heavy tails (t, 3 df)": World(noise=heavy_tails),
    "spread grows 1:2:3 with size": World(cell_spreads=(0.5 * SPREAD, SPREAD, 1.5 * SPREAD)),
    "curved truth": World(bend=0.05),
    "1 run in 20 fails by 5 spreads": World(noise=occasional_failures),
}

CONTRASTS: dict[str, Callable[[Cells], Estimate]] = {"level": scaling.level, "trend": scaling.trend}


def coverage(world: World, seeds: int, studies: int, chance: np.random.Generator) -> list[dict[str, Any]]:
    """How often each interval holds the truth, and excludes 0, in percent. One seed has no interval, and so excludes nothing."""
    truth = {"level": world.level, "trend": world.trend}
    cells = [world.study(chance, seeds) for _ in range(studies)]
    rows = []
    for name, contrast in CONTRASTS.items():
        if seeds == 1:
            excluded = [not math.isnan(contrast(each).p) for each in cells]
            rows.append({"contrast": name, "seeds": seeds, "coverage": None, "excludes_0": 100 * float(np.mean(excluded))})
            continue
        intervals = np.asarray([contrast(each).interval for each in cells])
        rows.append(
            {
                "contrast": name,
                "seeds": seeds,
                "coverage": 100 * float(np.mean((intervals[:, 0] <= truth[name]) & (truth[name] <= intervals[:, 1]))),
                "excludes_0": 100 * float(np.mean((intervals[:, 0] > 0) | (intervals[:, 1] < 0))),
            }
        )
    rows += [_slopes(world, cells, seeds)] if seeds > 1 else []
    return rows


def _slopes(world: World, cells: list[Cells], seeds: int) -> dict[str, Any]:
    """Coverage of one architecture's own slope over the measured range; with a curved truth, of the best line through it."""
    x = np.log(PARAMETERS[0])
    truth = -float(scaling.slope_weights(x) @ world.truth()[0])
    intervals = np.asarray([scaling.line(each, 0).slope.interval for each in cells])
    inside = (intervals[:, 0] <= truth) & (truth <= intervals[:, 1])
    return {"contrast": "slope", "seeds": seeds, "coverage": 100 * float(inside.mean()), "excludes_0": None}


def ratio_coverage(true_ratio: float, studies: int, seeds: int, chance: np.random.Generator, bend: float = 0.0) -> dict[str, Any]:
    """How often the interval of the effective-parameter ratio holds the true one, and excludes 1, in percent."""
    # The second arm has the first one's error at true_ratio times its parameters: its curve is the first one's, shifted.
    x = np.log(PARAMETERS)
    middle = x.mean()

    def curve(log_cost: np.ndarray) -> np.ndarray:
        return math.log(0.5) - SLOPE * (log_cost - middle) + bend * (log_cost - middle) ** 2

    truth = np.stack([curve(x[0]), curve(x[1] - math.log(true_ratio))])
    covered = excluded = without = 0
    for _ in range(studies):
        noise = World().study(chance, seeds)
        plain = World().truth()
        cells = Cells(x, [log - plain[:, i, None] + truth[:, i, None] for i, log in enumerate(noise.logs)])
        ratio = scaling.effective_ratio(cells)
        if math.isnan(ratio.low):
            without += 1
            continue
        covered += ratio.low <= true_ratio <= ratio.high
        excluded += not ratio.low <= 1 <= ratio.high
    return {
        "true_ratio": true_ratio, "seeds": seeds, "bend": bend, "studies": studies,
        "coverage": 100 * covered / studies, "excludes_1": 100 * excluded / studies, "no_interval": 100 * without / studies,
    }  # fmt: skip


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
        low, high = scaling.crossed_bootstrap(answers, scaling.level_weights(cells), draws=500, seed=int(chance.integers(2**31)))
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


def percentile_bootstrap(seeds: int, studies: int, chance: np.random.Generator, draws: int = 1000) -> dict[str, Any]:
    """What the usual way, pairs resampled within cells, covers of a level of 0, in percent: the reason not to use it for a verdict."""
    covered = 0
    for _ in range(studies):
        differences = np.stack([cell[1] - cell[0] for cell in World().study(chance, seeds).logs])
        drawn = chance.integers(seeds, size=(draws, *differences.shape))
        means = np.take_along_axis(differences[None].repeat(draws, axis=0), drawn, axis=2).mean(axis=(1, 2))
        low, high = np.quantile(means, [0.025, 0.975])
        covered += low <= 0 <= high
    return {"seeds": seeds, "studies": studies, "coverage": 100 * covered / studies}


# ----------------------------------------------------------------------------------------------------- real runs

CONTROL_SIZES = ("0.1M", "0.2M", "0.4M")


def control(folder: Path, seeds: int = 10) -> dict[str, Any]:
    """Ten seeds of the classic ViT on digits, split five against five in all ways; and the same runs with one attention head masked.

    Args:
        folder: a ledger, in which runs that are done are not done again.
    """
    from study.table import run_table

    specs = [RunSpec.of("vit_classic", size, "digits", seed) for size in CONTROL_SIZES for seed in range(seeds)]
    with concurrent.futures.ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(_train_one, spec, folder) for spec in reversed(specs)]  # longest first
        for number, _ in enumerate(concurrent.futures.as_completed(jobs), start=1):
            click.echo(f"{number} of {len(jobs)} runs", err=True)
        for job in jobs:
            job.result()
    table = run_table(folder, specs)
    logs, masked = [], []
    for size in CONTROL_SIZES:
        of_size = table[table["size"] == size].sort_values("seed")
        logs.append(scaling.log_error(of_size["test_accuracy"], of_size["test_images"]).to_numpy())
        accuracies = pd.Series([_accuracy_without_a_head(folder, run) for run in of_size.itertuples()], index=of_size.index)
        masked.append(scaling.log_error(accuracies, of_size["test_images"]).to_numpy())
    parameters = [int(table[table["size"] == size]["parameters"].iloc[0]) for size in CONTROL_SIZES]
    runs = {"parameters": parameters, "log_errors": _listed(logs), "log_errors_masked": _listed(masked)}
    return {"runs": len(specs), **split_all_ways(parameters, logs, masked), **runs}


def split_all_ways(parameters: Sequence[int], logs: list[np.ndarray], masked: list[np.ndarray]) -> dict[str, Any]:
    """How often two halves of the same runs are found different, and half of them from the crippled other half, in percent.

    "by the rule" is what a report of these two questions would say, Holm's correction included; "level" and "trend" are each alone.

    Args:
        parameters: of the sizes. logs, masked: log errors of each size, intact and crippled. [seeds]
    """
    x = np.log([parameters, parameters])
    seeds = range(len(logs[0]))
    halves = [list(half) for half in itertools.combinations(seeds, len(seeds) // 2) if 0 in half]
    different = dict.fromkeys([*CONTRASTS, "by the rule"], 0)
    crippled = 0
    for half in halves:
        rest = [seed for seed in seeds if seed not in half]
        same = Cells(x, [np.stack([log[half], log[rest]]) for log in logs])
        ps = {name: contrast(same).p for name, contrast in CONTRASTS.items()}
        for name, p in ps.items():
            different[name] += p < 0.05
        different["by the rule"] += min(verdict.holm(list(ps.values()))) < 0.05
        worse = Cells(x, [np.stack([log[half], other[rest]]) for log, other in zip(logs, masked, strict=True)])
        crippled += scaling.level(worse).p < 0.05
    return {
        "splits": len(halves),
        "found_different": {name: 100 * count / len(halves) for name, count in different.items()},
        "crippled_found": 100 * crippled / len(halves),
        "crippled_error_ratio": float(np.exp(np.mean([other - log for log, other in zip(logs, masked, strict=True)]))),
        "spread": float(np.sqrt(np.mean([log.var(ddof=1) for log in logs]))),
    }


def _train_one(spec: RunSpec, folder: Path) -> None:
    import torch

    from diffvit.train import train

    torch.set_num_threads(1)
    train(spec, folder, device="cpu")


def _accuracy_without_a_head(folder: Path, run: Any) -> float:
    """Test accuracy of a trained model when the first head of its first layer is not heard."""
    import torch

    from diffvit.data.batches import Prepare
    from diffvit.dataset import load
    from diffvit.evaluation import evaluate
    from diffvit.ledger.weights import load_weights
    from study.table import files_of

    model, facts = load_weights(files_of(folder, run).weights)
    attention: Any = model.blocks[0].attn
    with torch.no_grad():
        attention.proj.weight[:, : attention.proj.in_features // attention.heads] = 0
    prepare = Prepare(facts["protocol"].image_size, facts["mean"], facts["std"])
    return evaluate(model, load("digits").test, prepare=prepare, batch_size=64).accuracy


def _listed(logs: list[np.ndarray]) -> list[list[float]]:
    return [log.round(6).tolist() for log in logs]


# ------------------------------------------------------------------------------------------------------------ printing


def simulate(studies: int, seed: int) -> dict[str, Any]:
    """All simulations."""
    chance = np.random.default_rng(seed)
    without = {name: [row for n in SEEDS for row in coverage(world, n, studies, chance)] for name, world in WORLDS.items()}
    effect = World(level=math.log(1 - EFFECT), trend=math.log(1 - EFFECT) * 2)
    return {
        "studies": studies,
        "no_effect": without,
        "effect": [row for n in SEEDS if n > 1 for row in coverage(effect, n, studies, chance)],
        "ratio": [ratio_coverage(0.65, 500, n, chance, bend) for bend in (0.0, 0.05) for n in SEEDS if n > 1],
        "percentile_bootstrap": [percentile_bootstrap(n, studies, chance) for n in SEEDS if n > 1],
        "one_seed": [one_seed(scatter, studies, images, chance) for images in (359, 2000) for scatter in (0.03, 0.1)],
        "new_images": [bootstrap_coverage(n, 200, images, chance) for images in (2000, 132) for n in SEEDS if n > 1],
    }


def missed(outcome: dict[str, Any]) -> list[str]:
    """The bars that an outcome misses, a sentence each."""
    wrong = []
    low, high = COVERAGE
    for world in WORLDS:
        for row in outcome["no_effect"][world]:
            where = f"{world}, {row['contrast']}, {row['seeds']} seeds"
            if row["coverage"] is not None and not low <= row["coverage"] <= high:
                wrong.append(f"{where}: coverage {row['coverage']:.1f} %")
            if row["excludes_0"] is not None and row["excludes_0"] > FALSE_POSITIVES:
                wrong.append(f"{where}: {row['excludes_0']:.2f} % false positives")
    wrong += [
        f"{row['contrast']}, {row['seeds']} seeds: power {row['excludes_0']:.1f} %"
        for row in outcome["effect"]
        if row["excludes_0"] is not None and row["excludes_0"] < POWER
    ]
    wrong += [
        f"ratio {row['true_ratio']}, {row['seeds']} seeds: covered {row['coverage']:.1f} %, 1 excluded {row['excludes_1']:.1f} %"
        for row in outcome["ratio"]
        if not row["bend"] and (row["coverage"] < low or row["excludes_1"] < POWER)
    ]
    return wrong


def _print(outcome: dict[str, Any]) -> None:
    click.echo(f"{outcome['studies']:,} simulated studies a row; 95 % intervals; percent")
    click.echo(f"\n{'no true effect':<32} {'contrast':<8} {'seeds':>5} {'coverage':>9} {'false positives':>16}")
    for world, rows in outcome["no_effect"].items():
        for row in rows:
            held = f"{row['coverage']:.1f}" if row["coverage"] is not None else "none"
            false = "" if row["excludes_0"] is None else f"{row['excludes_0']:.2f}"
            click.echo(f"{world:<32} {row['contrast']:<8} {row['seeds']:>5} {held:>9} {false:>16}")
    click.echo(f"\ntrue effect: level {-100 * EFFECT:.0f} %, trend {100 * ((1 - EFFECT) ** 2 - 1):.1f} % over the range of sizes")
    for row in outcome["effect"]:
        if row["excludes_0"] is not None:
            click.echo(f"{'':<32} {row['contrast']:<8} {row['seeds']:>5} {row['coverage']:>9.1f} {row['excludes_0']:>10.1f} power")
    click.echo("\neffective-parameter ratio")
    for row in outcome["ratio"]:
        bend = ", curved truth" if row["bend"] else ""
        click.echo(
            f"  true {row['true_ratio']}{bend}, {row['seeds']} seeds, {row['studies']} tables: "
            f"covered {row['coverage']:.1f}, excludes 1 {row['excludes_1']:.1f}, no interval {row['no_interval']:.1f}"
        )
    click.echo("\nfor comparison, a percentile bootstrap of the seeds (level)")
    for row in outcome["percentile_bootstrap"]:
        click.echo(f"  {row['seeds']} seeds: covered {row['coverage']:.1f}")
    click.echo("\none seed, no effect: how often the range that the report prints holds")
    for row in outcome["one_seed"]:
        click.echo(f"  {row['images']} images, a run's true error scatters by {row['spread_of_a_run']:.1f} %: {row['held']:.1f}")
    click.echo("\nno effect, against new seeds and new test images together (level)")
    for row in outcome["new_images"]:
        click.echo(
            f"  {row['images']} images, {row['seeds']} seeds, {row['studies']} studies: "
            f"crossed bootstrap {row['crossed bootstrap']:.1f}, t interval {row['t interval']:.1f}"
        )


def _print_control(outcome: dict[str, Any]) -> None:
    click.echo(
        f"{outcome['runs']} real runs, {outcome['splits']} splits: found different "
        + ", ".join(f"{name} {share:.1f} %" for name, share in outcome["found_different"].items())
    )
    click.echo(
        f"spread between seeds {100 * outcome['spread']:.1f} % of the error; with a head masked the error is "
        f"{outcome['crippled_error_ratio']:.2f} times as large, found in {outcome['crippled_found']:.1f} % of the splits"
    )


@click.command()
@click.option("--studies", type=click.IntRange(min=10), default=2000, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--control", "with_control", is_flag=True, help="Also train ten seeds of one architecture and split them (minutes).")
@click.option("--folder", type=click.Path(path_type=Path), help="Where these runs are kept. [default: a temporary folder]")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the outcome there.")
def main(studies: int, seed: int, with_control: bool, folder: Path | None, json_path: Path | None) -> None:
    """Simulate studies and say what the intervals are worth."""
    outcome = simulate(studies, seed)
    _print(outcome)
    wrong = missed(outcome)
    if with_control:
        with tempfile.TemporaryDirectory() as temporary:
            outcome["control"] = control((folder or Path(temporary)).resolve())
        click.echo()
        _print_control(outcome["control"])
        if outcome["control"]["found_different"]["by the rule"] > 8:
            wrong.append("real runs that do not differ are found different in more than 8 % of the splits")
        if outcome["control"]["crippled_found"] < 100:
            wrong.append("the crippled arm is not always found")
    if json_path:
        json_path.write_text(json.dumps(outcome, indent=1) + "\n")
    click.echo("\nall bars are met" if not wrong else "\nmissed:\n  " + "\n  ".join(wrong))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
