"""Is the report's rule what it claims? Simulated studies whose truth is known, judged by the functions that the report calls.

    python -m bench.calibration              false verdicts, power, coverage, with Monte-Carlo errors, as Markdown
    python -m bench.calibration --control    and ten seeds of one architecture on digits, split five against five (minutes)

Exit code 1 if a bar is missed. What a simulated study is: bench/worlds.py.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd

from bench.control import control
from bench.images import bootstrap_coverage, one_seed
from bench.worlds import (
    NOISES,
    PARAMETERS,
    SLOPE,
    World,
    first_seeds,
    heavy_tails,
    interaction,
    noise_scales,
    occasional_failures,
)  # fmt: skip
from study.report import compare, curves, scaling, verdict
from study.report.analysis import analyse
from study.report.scaling import Cells, Estimate
from study.table import COLUMNS

# The bars, in percent.
FALSE, EQUIVALENT, COVERAGE, RATIO_COVERAGE = 6.0, 5.0, 93.0, 93.0
POWER = {3: 55.0, 5: 93.0}
EFFECT = math.log(0.98)
CLAIMS = ["better", "worse"]


@dataclasses.dataclass(frozen=True)
class Row:
    """One simulated share.

    Attributes:
        kind: what is counted. share: in percent. bar: what it may be at most, or with `least` at least; nan: it is shown only.
    """

    kind: str
    world: str
    share: float
    studies: int
    bar: float = math.nan
    least: bool = False

    @property
    def error(self) -> float:
        """Monte-Carlo standard error, in points."""
        return math.sqrt(self.share * (100 - self.share) / self.studies)

    @property
    def holds(self) -> bool:
        """Whether the bar is met."""
        return math.isnan(self.bar) or (self.share >= self.bar if self.least else self.share <= self.bar)


def counted(kind: str, world: str, hits: np.ndarray, bar: float = math.nan, least: bool = False) -> Row:
    """A row of how many studies were hit."""
    return Row(kind, world, 100 * float(np.mean(hits)), len(hits), bar, least)


def level_and_trend(cells: Cells) -> list[dict[str, Estimate]]:
    """The questions of one data set."""
    return [{"level": scaling.level(cells)}, {"trend": scaling.trend(cells)}]


def claims(questions: Sequence[dict[str, Estimate]], look: int = 1) -> np.ndarray:
    """Which verdicts are "better" or "worse". [questions, studies]"""
    _, words = verdict.verdicts(questions, [verdict.alpha_of(look)] * len(questions))
    return np.isin(words, CLAIMS)


FALSE_WORLDS = {
    "3 seeds": World(),
    "2 seeds": World(seeds=(2, 2, 2)),
    "5 seeds": World(seeds=(5, 5, 5)),
    "3 seeds, heavy tails (t, 3 df)": World(noise=heavy_tails),
    "3 seeds, 1 run in 20 fails by 5 spreads": World(noise=occasional_failures),
    "3 seeds, one arm's spread tripled": World(arms=(1, 3)),
    "3 seeds, both true curves bend": World(bend=0.05),
    "3 seeds, spread 1:2:3": World(spreads=(1, 2, 3)),
    "3 seeds, spread 1:1:5": World(spreads=(1, 1, 5)),
    "3 seeds, spread 1:5:1": World(spreads=(1, 5, 1)),
    "3 seeds, spread 5:1:1": World(spreads=(5, 1, 1)),
    "5 seeds, spread 1:1:5": World(seeds=(5, 5, 5), spreads=(1, 1, 5)),
    "2 seeds, spread 1:1:5": World(seeds=(2, 2, 2), spreads=(1, 1, 5)),
    "seeds 3,3,1, spread 1:1:2": World(seeds=(3, 3, 1), spreads=(1, 1, 2)),
    "seeds 3,3,1, spread 1:1:3": World(seeds=(3, 3, 1), spreads=(1, 1, 3)),
    "seeds 5,5,1, spread 1:1:2": World(seeds=(5, 5, 1), spreads=(1, 1, 2)),
    "seeds 5,5,1, spread 1:1:3": World(seeds=(5, 5, 1), spreads=(1, 1, 3)),
    "seeds 5,5,2, spread 1:1:3": World(seeds=(5, 5, 2), spreads=(1, 1, 3)),
    "seeds 5,5,2, spread 1:1:5": World(seeds=(5, 5, 2), spreads=(1, 1, 5)),
    "seeds 10,10,2, spread 1:1:5": World(seeds=(10, 10, 2), spreads=(1, 1, 5)),
    "seeds 5,3,2, spread 1:2:3": World(seeds=(5, 3, 2), spreads=(1, 2, 3)),
    "seeds 3,3,2, spread 1:1:3": World(seeds=(3, 3, 2), spreads=(1, 1, 3)),
    "seeds 5,5,3, spread 1:1:3": World(seeds=(5, 5, 3), spreads=(1, 1, 3)),
    "seeds 10,10,3, spread 1:1:5": World(seeds=(10, 10, 3), spreads=(1, 1, 5)),
}

# Shown without a bar: how far the rule bends where a size of two seeds scatters most by far.
BEYOND = ("seeds 5,5,2, spread 1:1:5", "seeds 10,10,2, spread 1:1:5")


def false_verdicts(chance: np.random.Generator, studies: int) -> list[Row]:
    """Any "better" or "worse" where there is no effect."""
    kind = "any false better or worse"
    rows = []
    for name, world in FALSE_WORLDS.items():
        bar = math.nan if name in BEYOND else FALSE
        rows.append(counted(kind, name, claims(level_and_trend(world.draw(chance, studies))).max(axis=0), bar))
    for name in ("3 seeds", "3 seeds, spread 1:1:5", "5 seeds, spread 1:1:5", "seeds 5,5,2, spread 1:1:3"):
        first, second, noisy = (FALSE_WORLDS[name].draw(chance, studies) for _ in range(3))
        noise = {"noise": scaling.level(interaction(first, noisy))}
        wrong = claims([*level_and_trend(first), *level_and_trend(second), noise]).max(axis=0)
        rows.append(counted(kind, f"{name}, five questions", wrong, FALSE))
    for name, others in itertools.product(("3 seeds", "3 seeds, spread 1:1:5", "seeds 5,5,2, spread 1:1:3"), (2, 4)):
        compared = FALSE_WORLDS[name].draw_arms(others, chance, studies)
        questions = [question for cells in compared for question in level_and_trend(cells)]
        rows.append(counted(kind, f"{name}, {others} architectures against the first", claims(questions).max(axis=0), FALSE))
    for looks in ((3, 5), range(2, 11)):
        cells = World(seeds=(max(looks),) * 3).draw(chance, studies)
        each = [claims(level_and_trend(first_seeds(cells, seeds)), look) for look, seeds in enumerate(looks, start=1)]
        at = "3, then 5" if len(looks) == 2 else "each of 2 to 10"
        rows.append(counted(kind, f"read after {at} seeds", np.max(each, axis=(0, 1)), FALSE))
    return rows


def growing_family(chance: np.random.Generator, studies: int) -> list[Row]:
    """Reports after one data set, a second one and noise, or after each of four architectures, each the first look; no effect."""
    rows = []
    for name in ("3 seeds", "3 seeds, spread 1:5:1", "3 seeds, spread 1:1:5"):
        first, second, noisy = (FALSE_WORLDS[name].draw(chance, studies) for _ in range(3))
        families = [level_and_trend(first), level_and_trend(second), [{"noise": scaling.level(interaction(first, noisy))}]]
        wrong = [claims(sum(families[:asked], [])).max(axis=0) for asked in (1, 2, 3)]
        rows.append(counted("any false better or worse", f"{name}, reports of 2, 4 and 5 questions", np.max(wrong, axis=0)))
        families = [level_and_trend(cells) for cells in FALSE_WORLDS[name].draw_arms(4, chance, studies)]
        wrong = [claims(sum(families[:asked], [])).max(axis=0) for asked in (1, 2, 3, 4)]
        rows.append(counted("any false better or worse", f"{name}, a report after each of 4 architectures", np.max(wrong, axis=0)))
    return rows


def noise_verdicts(chance: np.random.Generator, studies: int) -> list[Row]:
    """The question about noise, where noise treats both arms alike and the second is 5 % better on clean images; and its power."""
    rows = []
    for name, under_noise in NOISES.items():
        for error in (0.05, 0.30, 0.55):
            scales = compare.noise_estimates(noise_scales(error, math.log(0.95), 0.0, under_noise, chance, studies))
            where = f"noise: {name}; clean error {error:.2f}, 5 % lower for one"
            rows.append(counted("any false better or worse", where, claims([scales])[0], FALSE))
    for effect in (0.98, 0.95):
        scales = compare.noise_estimates(noise_scales(0.30, 0.0, math.log(effect), NOISES["errors x 1.5"], chance, studies))
        rows.append(counted("power", f"noise: errors x 1.5, for one arm x {1.5 * effect:.3f}; 3 seeds", claims([scales])[0]))
    return rows


def power(chance: np.random.Generator, studies: int) -> list[Row]:
    """How often a level of -2 % is found, of the two questions of one data set."""
    rows = []
    for seeds in ((2, 2, 2), (3, 3, 3), (5, 5, 5), (5, 3, 2), (5, 5, 2), (5, 5, 3)):
        found = claims(level_and_trend(World(seeds=seeds, level=EFFECT).draw(chance, studies)))[0]
        bar = POWER.get(seeds[0], math.nan) if len(set(seeds)) == 1 else math.nan
        rows.append(counted("power", f"level of -2 %, seeds {','.join(map(str, seeds))}", found, bar, least=True))
    for seeds, others in itertools.product(((3, 3, 3), (5, 5, 5), (5, 5, 2)), (2, 4)):
        first, *alike = World(seeds=seeds).draw_arms(others, chance, studies)
        better = Cells(first.log_costs, [cell + np.asarray([[0.0], [EFFECT]]) for cell in first.logs])
        found = claims([question for cells in (better, *alike) for question in level_and_trend(cells)])[0]
        rows.append(counted("power", f"level of -2 % of one of {others} architectures, seeds {','.join(map(str, seeds))}", found))
    cells = World(seeds=(5, 5, 5), level=EFFECT).draw(chance, studies)
    rows.append(counted("power", "level of -2 %, 5 seeds as the second look", claims(level_and_trend(cells), look=2)[0]))
    return rows


def equivalence(chance: np.random.Generator, studies: int) -> list[Row]:
    """How often a level at the very margin is called equivalent."""
    rows = []
    for seeds in (3, 5):
        for spread, spreads in ((0.002, (1, 1, 1)), (0.005, (1, 1, 1)), (0.01, (1, 1, 1)), (0.003, (1, 1, 5))):
            world = World(seeds=(seeds,) * 3, level=math.log(1 - verdict.MARGIN), spread=spread, spreads=spreads)
            _, words = verdict.verdicts(level_and_trend(world.draw(chance, studies)))
            where = f"level at the margin, {seeds} seeds, {100 * spread:.1f} % x {':'.join(map(str, spreads))}"
            rows.append(counted('false "equivalent"', where, words[0] == "equivalent", EQUIVALENT))
    return rows


def coverage(chance: np.random.Generator, studies: int) -> list[Row]:
    """How often the 95 % interval holds a true level of -2 % and trend of 3 %."""
    rows = []
    for name in ("3 seeds", "5 seeds", "3 seeds, spread 1:1:5", "3 seeds, heavy tails (t, 3 df)", "seeds 5,5,2, spread 1:1:3"):
        world = dataclasses.replace(FALSE_WORLDS[name], level=EFFECT, trend=0.03)
        cells = world.draw(chance, studies)
        for question, estimate, true in (("level", scaling.level(cells), EFFECT), ("trend", scaling.trend(cells), 0.03)):
            low, high = estimate.interval
            bar = COVERAGE if len(set(world.seeds)) == 1 else math.nan
            rows.append(counted("coverage", f"{question}, {name}", (low <= true) & (true <= high), bar, least=True))
    return rows


def ratio_coverage(true_ratio: float, studies: int, seeds: int, chance: np.random.Generator) -> list[Row]:
    """How often the interval of the effective-parameter ratio holds the true one, and excludes 1."""
    # The second arm has the first one's error at true_ratio times its parameters: its curve is the first one's, shifted.
    world = World(seeds=(seeds,) * 3, level=SLOPE * math.log(true_ratio))
    ratios = [curves.effective_ratio(world.draw(chance)) for _ in range(studies)]
    ends = np.asarray([(each.low, each.high) for each in ratios])
    where = f"cost ratio {true_ratio}, {seeds} seeds"
    return [
        counted("coverage", where, (ends[:, 0] <= true_ratio) & (true_ratio <= ends[:, 1]), RATIO_COVERAGE, least=True),
        counted("power", f"{where}: 1 is excluded", (ends[:, 1] < 1) | (ends[:, 0] > 1)),
    ]


def divergence(chance: np.random.Generator, studies: int, share: float = 0.3) -> list[Row]:
    """Equal arms, of which the second one's worst runs diverge and are dropped: whole reports, from run tables on."""
    wrong, dropped = [], []
    for _ in range(studies):
        table = run_table_of(World().draw(chance), gone=share)
        answers = analyse(table, None).answers
        wrong.append(any(answer.verdict in CLAIMS for answer in answers))
        comparison = compare.compare(table, "CIFAR-100")
        plain = verdict.decide(comparison.answers) if comparison else []
        dropped.append(any(answer.verdict in CLAIMS for answer in plain))
    what = f"3 seeds, the worst {100 * share:.0f} % of one arm's runs diverge"
    return [
        counted("any false better or worse", what, np.asarray(wrong), FALSE),
        counted("any false better or worse", f"{what}, and nothing is said of it", np.asarray(dropped)),
    ]


def run_table_of(cells: Cells, gone: float = 0.0) -> pd.DataFrame:
    """A run table of one study on CIFAR-100.

    Args:
        gone: share of the second arm's runs, those that are worst for their size, that diverged.
    """
    rows = []
    for i, (size, logs) in enumerate(zip(("10B", "25B", "50B"), cells.logs, strict=True)):
        for arm, seed in np.ndindex(logs.shape):
            rows.append({
                "run_id": f"{size}{arm}{seed}", "status": "done", "model": ("vit_classic", "vit_differential")[arm], "size": size,
                "dataset": "CIFAR-100", "overrides": "", "seed": seed, "parameters": PARAMETERS[arm, i], "flags": "", "precision": "bf16",
                "forward_flops": PARAMETERS[arm, i], "seconds": PARAMETERS[arm, i] / 1e4, "fingerprint": "f", "test_images": 10_000,
                "test_loss": 1.0, "test_accuracy": 1 - math.exp(logs[arm, seed]),
            })  # fmt: skip
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    if gone:
        worse = (1 - table["test_accuracy"]) / (1 - table["test_accuracy"]).groupby(table["size"]).transform("mean")
        worst = worse[table["model"] == "vit_differential"].nlargest(round(gone * len(table) / 2)).index
        table.loc[worst, "status"] = "diverged"
        table.loc[worst, ["test_accuracy", "test_loss", "test_images"]] = math.nan
    return table


def percentile_bootstrap(seeds: int, studies: int, chance: np.random.Generator, draws: int = 1000) -> Row:
    """What the usual way, pairs resampled within cells, covers of a level of 0: the reason not to use it for a verdict."""
    covered = []
    for _ in range(studies):
        differences = np.stack([cell[1] - cell[0] for cell in World(seeds=(seeds,) * 3).draw(chance).logs])
        drawn = chance.integers(seeds, size=(draws, *differences.shape))
        means = np.take_along_axis(differences[None].repeat(draws, axis=0), drawn, axis=2).mean(axis=(1, 2))
        low, high = np.quantile(means, [0.025, 0.975])
        covered.append(low <= 0 <= high)
    return counted("coverage", f"for comparison: percentile bootstrap of seeds, {seeds} seeds", np.asarray(covered))


def simulate(studies: int, seed: int) -> dict[str, Any]:
    """All simulations; slow ones of fewer studies."""
    chance = np.random.default_rng(seed)
    few = max(10, studies // 200)
    parts: list[Callable[[np.random.Generator, int], list[Row]]] = [false_verdicts, noise_verdicts, equivalence, power, coverage]
    rows: list[Row] = []
    for part in parts:
        rows += part(chance, studies)
        click.echo(f"{part.__name__}: done", err=True)
    rows += divergence(chance, few)
    rows += [row for seeds in (3, 5) for row in ratio_coverage(0.65, 4 * few, seeds, chance)]
    rows += [percentile_bootstrap(seeds, few, chance) for seeds in (3, 5)]
    rows += growing_family(np.random.default_rng(seed), studies)
    return {
        "rows": rows,
        "one_seed": [one_seed(scatter, few, images, chance) for images in (359, 2000) for scatter in (0.03, 0.1)],
        "new_images": [bootstrap_coverage(seeds, few // 2, images, chance) for images in (2000, 132) for seeds in (3, 5)],
    }


def _print(outcome: dict[str, Any]) -> None:
    """Tables in Markdown, one a kind of rows."""
    for kind in dict.fromkeys(row.kind for row in outcome["rows"]):
        click.echo(f"\n| {kind} | percent | error | bar |\n|---|---:|---:|---:|")
        for row in (row for row in outcome["rows"] if row.kind == kind):
            bar = "" if math.isnan(row.bar) else f"at {'least' if row.least else 'most'} {row.bar:.0f}" + ("" if row.holds else ", MISSED")
            click.echo(f"| {row.world} | {row.share:.2f} | {row.error:.2f} | {bar} |")
    click.echo("\n| one seed, no effect: how often the range that the report prints holds | percent |\n|---|---:|")
    for each in outcome["one_seed"]:
        world = f"{each['images']:,} images, a run's true error scatters by {each['spread_of_a_run']:.1f} %"
        click.echo(f"| {world} | {each['held']:.1f} |")
    click.echo("\n| no effect, against new seeds and new test images together: level | studies | crossed bootstrap | t interval |")
    click.echo("|---|---:|---:|---:|")
    for each in outcome["new_images"]:
        shares = f"{each['crossed bootstrap']:.1f} | {each['t interval']:.1f}"
        click.echo(f"| {each['images']:,} images, {each['seeds']} seeds | {each['studies']} | {shares} |")


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
@click.option("--studies", type=click.IntRange(min=100), default=40_000, show_default=True, help="A row; slow rows have a 200th.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--control", "with_control", is_flag=True, help="Also train ten seeds of one architecture and split them (minutes).")
@click.option("--folder", type=click.Path(path_type=Path), help="Where these runs are kept. [default: a temporary folder]")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the outcome there.")
def main(studies: int, seed: int, with_control: bool, folder: Path | None, json_path: Path | None) -> None:
    """Simulate studies and say what the report's rule is worth."""
    outcome = simulate(studies, seed)
    _print(outcome)
    wrong = [f"{row.kind}: {row.world}: {row.share:.2f} %" for row in outcome["rows"] if not row.holds]
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
        rows = [{**dataclasses.asdict(row), "error": row.error, "bar": None if math.isnan(row.bar) else row.bar} for row in outcome["rows"]]
        json_path.write_text(json.dumps({**outcome, "rows": rows}, indent=1) + "\n")
    click.echo("\nall bars are met" if not wrong else "\nmissed:\n  " + "\n  ".join(wrong))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
