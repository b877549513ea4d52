"""The statistics: against values known by other means, and against simulated truth."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import optimize, special, stats
from tables import study_table

from bench import calibration
from bench.control import split_all_ways
from bench.images import one_seed
from bench.worlds import PARAMETERS, World, noise_scales
from diffvit.ledger.spec import overrides_text
from study.grid import read_grid
from study.report import compare, curves, power, resampling, scaling
from study.report.analysis import analyse
from study.report.scaling import Cells, Estimate


def _table(log_errors: np.ndarray, images: int = 10_000) -> pd.DataFrame:
    """A run table of [arms, sizes, seeds] log errors."""
    rows = []
    for arm, size, seed in np.ndindex(log_errors.shape):
        error = math.exp(log_errors[arm, size, seed])
        rows.append({
            "model": ("vit_classic", "vit_differential")[arm], "size": f"{size}", "seed": seed, "status": "done",
            "parameters": PARAMETERS[arm, size], "forward_flops": 2 * PARAMETERS[arm, size], "seconds": 60.0 * (1 + arm),
            "test_accuracy": 1 - error, "test_loss": 3 * error, "test_images": images,
        })  # fmt: skip
    return pd.DataFrame(rows)


def _cells(table: pd.DataFrame, measure: str = "error", cost: str = "parameters") -> Cells:
    arms = (table[table["model"] == model] for model in ("vit_classic", "vit_differential"))
    return scaling.cells_of(scaling.pair_table(*arms, measure, cost))


@pytest.fixture
def logs() -> np.ndarray:
    return math.log(0.4) + 0.05 * np.random.default_rng(3).standard_normal((2, 3, 4))


def test_with_one_size_the_level_is_a_paired_t_test(logs: np.ndarray) -> None:
    cells = _cells(_table(logs[:, :1]), "cross-entropy")
    expected = stats.ttest_rel(logs[1, 0], logs[0, 0])
    level = scaling.level(cells)
    assert level.p == pytest.approx(expected.pvalue) and level.df == 3
    assert level.interval == pytest.approx(tuple(expected.confidence_interval(0.95)))


def _judged(parts: np.ndarray, seeds: np.ndarray) -> tuple[float, float, int]:
    """Standard error and both degrees of freedom, written out from the variances of the parts. parts: [sizes]"""
    df = seeds - 1
    welch = parts.sum() ** 2 / sum(part**2 / (n + 2) for part, n in zip(parts, df, strict=True)) - 2
    return math.sqrt(parts.sum()), min(max(welch, df.min()), len(df) * (df.min() + 2) - 2), df.min()


def _p(t: float, df: float, least: int) -> float:
    return float(2 * (0.825 * stats.t.sf(abs(t), df) + 0.175 * stats.t.sf(abs(t), least)))


def test_each_size_has_a_variance_of_its_own(logs: np.ndarray) -> None:
    cells = _cells(_table(logs), "cross-entropy")
    differences = logs[1] - logs[0]
    for estimate, weights in (
        (scaling.level(cells), scaling.level_weights(cells)),
        (scaling.trend(cells), scaling.trend_weights(cells)),
    ):
        assert estimate.value == pytest.approx(weights @ differences.mean(axis=1))
        se, df, least = _judged(weights**2 * differences.var(axis=1, ddof=1) / 4, np.full(3, 4))
        assert (estimate.se, estimate.df, estimate.least) == pytest.approx((se, df, least))
        assert estimate.p == pytest.approx(_p(estimate.value / se, df, least))
        low, high = estimate.interval
        assert _p((high - estimate.value) / se, df, least) == pytest.approx(0.05) and estimate.value - low == pytest.approx(
            high - estimate.value
        )


def test_many_studies_are_judged_as_each_alone() -> None:
    cells = World(seeds=(5, 3, 2), spreads=(1, 2, 3)).draw(np.random.default_rng(1), 7)
    for contrast in (scaling.level, scaling.trend):
        together = contrast(cells)
        for i in range(7):
            alone = contrast(Cells(cells.log_costs, [cell[i] for cell in cells.logs]))
            assert (together.value[i], together.p[i], together.interval[0][i]) == pytest.approx((alone.value, alone.p, alone.interval[0]))


def test_a_size_with_one_pair_leaves_no_interval(logs: np.ndarray) -> None:
    cells = Cells(np.log(PARAMETERS), [logs[:, 0], logs[:, 1], logs[:, 2, :1]])
    for estimate in (scaling.level(cells), scaling.trend(cells), curves.line(cells, 0).slope):
        assert math.isfinite(estimate.value) and not estimate.known and math.isnan(estimate.p)
    assert scaling.why_no_interval(cells) == "1 pair only at 1 of 3 sizes"


def test_whole_answers_on_few_images_are_no_proof() -> None:
    # The classic arm makes no error of 132, the differential one exactly one, in every run: the trend is 0 up to rounding.
    logs = np.log(np.asarray([1e-9, 1 / 132]))[:, None, None] + np.zeros((2, 3, 3))
    trend = scaling.trend(_cells(_table(logs, images=132)))
    assert abs(trend.value) < 1e-12 and trend.se > 0.1 and trend.p > 0.99
    # Nor is it a level of +200 %, however many the seeds and sizes are.
    for seeds in (3, 10):
        assert scaling.level(_cells(_table(np.repeat(logs[:, :, :1], seeds, axis=2), images=132))).p > 0.05
    # Where there is a spread, the floor is far below it.
    assert 0 < _cells(_table(0 * logs - 1, images=10_000)).rounding.max() < 1e-6


def test_a_level_at_equal_cost_moves_along_the_slope() -> None:
    x = np.log(PARAMETERS)
    logs = (-0.2 * x)[:, :, None] + 1e-6 * np.random.default_rng(0).standard_normal((2, 3, 3)) + 2
    table = _table(logs)
    table.loc[table["model"] == "vit_differential", "forward_flops"] *= 1.169
    level = scaling.level_at_equal_cost(_cells(table, "cross-entropy", "forward_flops"))
    assert level is not None and level.value == pytest.approx(0.2 * math.log(1.169), abs=1e-3)
    assert scaling.level_at_equal_cost(_cells(_table(-logs), "cross-entropy")) is None


def test_a_trend_is_the_change_over_the_range_of_sizes() -> None:
    x = np.log(PARAMETERS).mean(axis=0)
    change = -0.1 * (x - x[0]) / np.ptp(x)
    logs = np.zeros((2, 3, 2))
    logs[1] = change[:, None]
    cells = _cells(_table(logs - 1), "cross-entropy")
    assert scaling.trend(cells).value == pytest.approx(-0.1)
    first, second = curves.line(cells, 0), curves.line(cells, 1)
    assert first.slope.value == pytest.approx(0, abs=1e-12)
    assert second.slope.value == pytest.approx(0.1 / np.ptp(np.log(PARAMETERS[1])), rel=1e-3)


def test_runs_without_a_partner_are_left_out(logs: np.ndarray) -> None:
    table = _table(logs)
    lost = (table["model"] == "vit_classic") & (table["size"] == "1") & (table["seed"] == 2)
    diverged = (table["model"] == "vit_differential") & (table["size"] == "2")
    table.loc[diverged, "status"] = "diverged"
    cells = _cells(table[~lost], "cross-entropy")
    assert cells.counts.tolist() == [4, 3]
    assert np.allclose(cells.logs[1], np.delete(logs[:, 1], 2, axis=1) + math.log(3))


def test_one_seed_gives_a_value_and_no_interval(logs: np.ndarray) -> None:
    level = scaling.level(_cells(_table(logs[:, :, :1])))
    assert math.isfinite(level.value) and not level.known
    assert all(math.isnan(value) for value in (*level.interval, level.p, level.detectable()))
    assert curves.effective_ratio(_cells(_table(logs[:, :, :1] - 0.2 * np.arange(3)[:, None]))).note == "no interval (1 seed)"


def test_a_perfect_model_has_a_finite_log_error() -> None:
    assert scaling.log_error(pd.Series([1.0]), pd.Series([359])).iloc[0] == pytest.approx(math.log(0.5 / 360))


@pytest.mark.parametrize("true_ratio", [0.65, 1.0, 1.4])
def test_the_ratio_is_exact_where_nothing_is_random(true_ratio: float) -> None:
    x = np.log(PARAMETERS)
    logs = -0.2 * np.stack([x[0], x[1] - math.log(true_ratio)])
    tiny = 1e-9 * np.random.default_rng(0).standard_normal((2, 3, 3))
    table = _table(logs[:, :, None] + tiny + 2)
    ratio = curves.effective_ratio(_cells(table, "cross-entropy"))
    assert ratio.value == pytest.approx(true_ratio, rel=1e-6) and ratio.low <= ratio.value <= ratio.high
    seconds = scaling.cells_of(
        scaling.pair_table(*(table[table["model"] == m] for m in ("vit_classic", "vit_differential")), "error", "forward_flops")
    )
    assert curves.effective_ratio(seconds).value == pytest.approx(true_ratio, rel=1e-2)
    matched = curves.equal_cost(_cells(table, "cross-entropy"), 1)
    assert matched == pytest.approx(PARAMETERS[1, 1] / true_ratio, rel=1e-6)


def test_the_ratio_says_why_there_is_none() -> None:
    x = np.log(PARAMETERS)
    far = np.stack([-0.2 * x[0], -0.2 * x[1] - 1.0])[:, :, None] + np.zeros((2, 3, 2))
    assert "outside the measured range" in curves.effective_ratio(_cells(_table(far + 2), "cross-entropy")).note
    flat = 0.05 * np.random.default_rng(2).standard_normal((2, 3, 3))
    flat += 0.005 * np.asarray([0, -1, -2])[:, None]  # a slope that noise drowns
    ratio = curves.effective_ratio(_cells(_table(flat - 1), "cross-entropy"))
    assert "cannot be told from 0" in ratio.note and math.isnan(ratio.value)
    middle, bend = x.mean(axis=0), np.asarray([0.0, 0.1, 0.0])
    nearly_flat = bend - (scaling.slope_weights(middle) @ bend + 1e-5) * middle
    bent = nearly_flat[:, None] + np.asarray([0.0, 0.02])[:, None, None]
    assert "cannot be told from 0" in curves.effective_ratio(_cells(_table(bent - 1), "cross-entropy")).note
    rising = np.stack([0.2 * x[0], 0.2 * x[1]])[:, :, None] + np.zeros((2, 3, 2))
    assert "larger models are not better" in curves.effective_ratio(_cells(_table(rising - 5), "cross-entropy")).note
    assert curves.equal_cost(_cells(_table(far + 2), "cross-entropy"), 2) is None


def test_a_power_law_is_found_again() -> None:
    x = np.log(PARAMETERS)
    middle = x.mean()
    true = 0.1 + np.stack([0.4 * np.exp(-0.5 * (x[0] - middle)), 0.3 * np.exp(-0.7 * (x[1] - middle))])
    law = curves.power_law(Cells(x, [np.log(true[:, i, None]) for i in range(3)]))
    assert law is not None and law.df == 1
    assert law.floor == pytest.approx(0.1, rel=1e-2)
    assert law.exponents == pytest.approx((0.5, 0.7), rel=2e-2) and law.scales == pytest.approx((0.4, 0.3), rel=2e-2)
    assert curves.power_law(Cells(x[:, :2], [np.zeros((2, 1))] * 2)) is None
    straight = -0.17 * (x - middle) + 0.003 * np.random.default_rng(1).standard_normal(x.shape)
    assert curves.power_law(Cells(x, [straight[:, i, None] for i in range(3)])) is None  # no floor


def test_sign_flips_count_all_ways_and_agree_with_draws() -> None:
    chance = np.random.default_rng(2)
    few = Cells(np.log(PARAMETERS[:, :1]), [np.stack([np.zeros(5), np.asarray([0.1, 0.2, 0.3, 0.4, 0.5])])])
    assert resampling.sign_flips(few, np.ones(1)) == pytest.approx(2 / 32)
    many = [chance.standard_normal((2, 5)) + np.asarray([[0.0], [0.3]]) for _ in range(3)]
    weights = np.full(3, 1 / 3)
    drawn = resampling.sign_flips(Cells(np.log(PARAMETERS), many), weights)
    differences = np.concatenate([cell[1] - cell[0] for cell in many])
    exact = np.mean([abs(np.dot(s, differences)) >= abs(differences.sum()) - 1e-12 for s in itertools.product((1, -1), repeat=15)])
    assert drawn == pytest.approx(exact, abs=0.02)


def test_the_crossed_bootstrap_draws_seeds_as_pairs() -> None:
    # Every image of a run is answered alike, so that images add nothing; of two pairs a quarter of the draws takes one twice.
    shares = np.asarray([[0.4, 0.4], [0.2, 0.3]])
    answers = [np.repeat(shares[:, :, None], 50, axis=2)]
    low, high = resampling.crossed_bootstrap(answers, np.ones(1))
    logs = np.log((50 * shares + 0.5) / 51)
    assert (low, high) == pytest.approx(tuple(sorted(logs[1] - logs[0])), abs=1e-5)
    odds = special.logit((50 * shares + 0.5) / 51)
    on_odds = resampling.crossed_bootstrap(answers, np.ones(1), scale="log-odds")
    assert on_odds == pytest.approx(tuple(sorted(odds[1] - odds[0])), abs=1e-5)


def test_the_crossed_bootstrap_draws_the_same_images_for_all_runs_and_sizes() -> None:
    chance = np.random.default_rng(4)
    images, alike = (chance.random(300) < 0.3).astype(np.float32), np.full(300, 0.3, np.float32)
    one, other = np.stack([alike, images])[:, None], np.stack([images, alike])[:, None]
    spread = resampling.crossed_bootstrap([one], np.ones(1))
    assert spread[1] - spread[0] > 0.2
    # What an image does to one size, it does against the other.
    assert resampling.crossed_bootstrap([one, other], np.full(2, 0.5)) == pytest.approx((0, 0), abs=1e-6)
    assert resampling.crossed_bootstrap([one], np.ones(1), baseline=[one]) == pytest.approx((0, 0), abs=1e-6)


def test_the_interval_of_the_ratio_is_the_test_turned_round() -> None:
    chance = np.random.default_rng(8)
    x = np.log(PARAMETERS)
    spreads = np.asarray([[0.02], [0.05]])  # the arms scatter differently, and together
    logs = [np.stack([-0.2 * x[0, i], -0.2 * (x[1, i] + 0.3)])[:, None] + spreads * chance.standard_normal((2, n))
            + 0.03 * chance.standard_normal(n) for i, n in enumerate((3, 5, 4))]  # fmt: skip
    cells = Cells(x, logs)
    weights = scaling.slope_weights(cells.x)

    def distance(log_ratio: float) -> float:
        """p of "difference - slope log ratio" less 0.05, from the residuals of this very contrast."""
        coefficients = [np.asarray([-1 / 3, 1 / 3]) + log_ratio * weights[i] * np.asarray([0.5, 0.5]) for i in range(3)]
        sums = [c @ log for c, log in zip(coefficients, logs, strict=True)]
        seeds = np.asarray([len(each) for each in sums])
        se, df, least = _judged(np.asarray([each.var(ddof=1) for each in sums]) / seeds, seeds)
        return _p(sum(each.mean() for each in sums) / se, df, least) - 0.05

    ratio = curves.effective_ratio(cells)
    shift = float((x[1] - x[0]).mean())
    middle = math.log(ratio.value) - shift
    low, high = (optimize.brentq(distance, middle, end) for end in (middle - 2, middle + 2))
    assert (ratio.low, ratio.high) == pytest.approx((math.exp(low + shift), math.exp(high + shift)), rel=1e-6)


def test_power_counts_holms_correction() -> None:
    log_costs = np.log(PARAMETERS).mean(axis=0)
    spread = 0.015 * math.sqrt(2 * (1 - 1 / 3))
    alone, of_two, of_five = (power.power("level", math.log(0.98), spread, log_costs, 3, family) for family in (1, 2, 5))
    assert of_five < of_two < alone
    (row,) = [row for row in calibration.power(np.random.default_rng(0), 4000) if row.world == "level of -2 %, seeds 3,3,3"]
    assert 100 * of_two == pytest.approx(row.share, abs=3)
    assert power.power("noise", math.log(0.98), spread, log_costs, 3, 2) < of_two
    for error in (0.3, 0.55):  # as the bench's own world, which knows nothing of this one, with all four scales
        under = lambda true: special.expit(special.logit(true) + math.log(1.5) + np.asarray([[0.0], [math.log(0.94)]]))  # noqa: E731
        scales = compare.noise_estimates(noise_scales(error, 0.0, 0.0, under, np.random.default_rng(0), 4000))
        expected = calibration.claims([scales])[0].mean()
        assert 0.2 < expected < 0.95 and power.power("noise", math.log(0.94), spread, log_costs, 3, 1, error) == pytest.approx(
            expected, abs=0.04
        )
    odds = 0.2 / 0.8 * 1.5
    assumed, same, wider = (power.power("noise", math.log(0.94), spread, log_costs, 3, 1, 0.2, each)
                            for each in (None, (spread, odds / (1 + odds)), (2 * spread, odds / (1 + odds))))  # fmt: skip
    assert assumed == same > wider + 0.1
    assert power.assumed_spread("BACH") > math.sqrt(2) * 0.086 > power.assumed_spread("CIFAR-100")


def test_an_interval_finds_what_it_says_it_would() -> None:
    level = Estimate(0.0, 0.01, 6.0, 2)
    distance = level.detectable(alpha=0.025)
    assert stats.nct.sf((level.interval_at(0.025)[1]) / 0.01, 6, distance / 0.01) == pytest.approx(0.8, abs=1e-3)
    # With one degree of freedom the bound is 254 standard errors, and the spread is |z| of a normal z.
    far, bound = Estimate(0.0, 0.01, 1.0, 1).detectable(alpha=0.0025) / 0.01, stats.t.isf(0.0025 / 2, 1)
    z = abs(np.random.default_rng(0).standard_normal((2, 200_000)))
    assert np.mean(z[0] + far > bound * z[1]) == pytest.approx(0.8, abs=0.01)


def test_no_effect_is_seldom_called_one() -> None:
    for row in calibration.false_verdicts(np.random.default_rng(6), 4000):
        assert row.share <= 7 or math.isnan(row.bar), row  # 6 % and three Monte-Carlo errors
        assert row.share == 0 or ",1, spread" not in row.world
    for row in calibration.noise_verdicts(np.random.default_rng(6), 1000):
        assert row.share <= 6 if "false" in row.kind else row.share > 30, row


def test_effects_are_found_and_intervals_cover() -> None:
    chance = np.random.default_rng(6)
    rows = [*calibration.power(chance, 3000), *calibration.equivalence(chance, 1000), *calibration.coverage(chance, 3000)]
    assert not [row for row in rows if not (row.holds or abs(row.share - row.bar) < 3 * row.error)]
    assert one_seed(0.03, 300, 359, chance)["held"] >= 91
    assert calibration.ratio_coverage(0.65, 60, 3, chance)[0].share >= 88


def test_the_bars_of_the_calibration_can_be_missed() -> None:
    row = calibration.counted("power", "", np.arange(10) < 5, 50.0, least=True)
    assert row.holds and row.error == pytest.approx(math.sqrt(50 * 50 / 10))
    assert not calibration.counted("power", "", np.arange(10) < 4, 50.0, least=True).holds
    assert not calibration.counted("any false", "", np.arange(10) < 1, 6.0).holds


def test_a_crippled_arm_is_found_and_an_equal_one_is_not() -> None:
    chance = np.random.default_rng(7)
    logs = [math.log(0.05) + 0.1 * chance.standard_normal(6) for _ in range(3)]
    found = split_all_ways([100_000, 200_000, 400_000], logs, [log + 0.6 for log in logs])
    assert found["splits"] == 10 and found["crippled_found"] == 100
    assert found["crippled_error_ratio"] == pytest.approx(math.exp(0.6))


@pytest.mark.parametrize(
    ("grid", "asked"),
    [
        ("datasets: [digits, digits-noisy]", "digits-noisy"),
        ("datasets: [digits, digits-noisy]\noverrides: {lr: 0.001}", "digits-noisy"),
        ("datasets: [digits, digits-noisy]\noverrides: {input_noise: 0.1}", "digits-noisy"),
        ("datasets: [digits, digits-noisy]\noverrides: {digits-noisy: {epochs: 5}}", None),
        ("datasets: [digits]\nconditions: [{lr: 0.001}, {lr: 0.001, input_noise: 0.1}]", "digits"),
        ("datasets: [digits]\nconditions: [{lr: 0.001}, {lr: 0.01, input_noise: 0.1}]", None),
        ("datasets: [digits, digits-noisy]\nconditions: {digits: [{}, {input_noise: 0.1}]}", "digits"),
        ("datasets: [digits, CIFAR-100]\nsizes: [small]", None),
    ],
)
def test_power_asks_about_noise_on_the_data_set_that_the_report_names(grid: str, asked: str | None, tmp_path: Path) -> None:
    (tmp_path / "some.yaml").write_text(grid)
    specs = read_grid(tmp_path / "some.yaml").runs()
    conditions = dict.fromkeys((spec.dataset, overrides_text(spec.overrides)) for spec in specs)
    tables = [study_table(dataset=dataset, overrides=overrides, images=359 if "digits" in dataset else 10_000, seed=i)
              for i, (dataset, overrides) in enumerate(conditions)]  # fmt: skip
    answers = {answer.question: answer.subject for answer in analyse(pd.concat(tables, ignore_index=True), None).answers}
    assert answers.get("noise", "none").partition(" ")[0] == (asked or "none")
    ask = power._asked_about_noise(specs)[1]
    assert ask == asked if asked else ask in ("digits", "CIFAR-100")  # of test images that `evaluate` would corrupt
