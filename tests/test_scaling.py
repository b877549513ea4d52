"""The statistics: against values known by other means, and against simulated truth."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from scipy import optimize, stats

from bench.calibration import PARAMETERS, WORLDS, World, coverage, missed, one_seed, ratio_coverage, split_all_ways
from study.report import scaling
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


def test_contrasts_are_those_of_a_linear_model_with_a_mean_for_each_size(logs: np.ndarray) -> None:
    cells = _cells(_table(logs), "cross-entropy")
    differences = (logs[1] - logs[0]).ravel()
    design = np.repeat(np.eye(3), 4, axis=0)
    means, residual, *_ = np.linalg.lstsq(design, differences, rcond=None)
    variance = residual[0] / (12 - 3)
    for name, estimate in (("level", scaling.level(cells)), ("trend", scaling.trend(cells))):
        weights = scaling.level_weights(cells) if name == "level" else scaling.trend_weights(cells)
        assert estimate.value == pytest.approx(weights @ means)
        assert estimate.se == pytest.approx(math.sqrt(variance * weights @ weights / 4))
        assert estimate.df == 9


def test_a_trend_is_the_change_over_the_range_of_sizes() -> None:
    x = np.log(PARAMETERS).mean(axis=0)
    change = -0.1 * (x - x[0]) / np.ptp(x)
    logs = np.zeros((2, 3, 2))
    logs[1] = change[:, None]
    cells = _cells(_table(logs - 1), "cross-entropy")
    assert scaling.trend(cells).value == pytest.approx(-0.1)
    first, second = scaling.line(cells, 0), scaling.line(cells, 1)
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
    assert math.isfinite(level.value) and level.df == 0
    assert all(math.isnan(value) for value in (*level.interval, level.p, level.detectable()))
    assert scaling.effective_ratio(_cells(_table(logs[:, :, :1] - 0.2 * np.arange(3)[:, None]))).note == "no interval (1 seed)"


def test_a_perfect_model_has_a_finite_log_error() -> None:
    assert scaling.log_error(pd.Series([1.0]), pd.Series([359])).iloc[0] == pytest.approx(math.log(0.5 / 360))


@pytest.mark.parametrize("true_ratio", [0.65, 1.0, 1.4])
def test_the_ratio_is_exact_where_nothing_is_random(true_ratio: float) -> None:
    x = np.log(PARAMETERS)
    logs = -0.2 * np.stack([x[0], x[1] - math.log(true_ratio)])
    tiny = 1e-9 * np.random.default_rng(0).standard_normal((2, 3, 3))
    table = _table(logs[:, :, None] + tiny + 2)
    ratio = scaling.effective_ratio(_cells(table, "cross-entropy"))
    assert ratio.value == pytest.approx(true_ratio, rel=1e-6) and ratio.low <= ratio.value <= ratio.high
    seconds = scaling.cells_of(
        scaling.pair_table(*(table[table["model"] == m] for m in ("vit_classic", "vit_differential")), "error", "forward_flops")
    )
    assert scaling.effective_ratio(seconds).value == pytest.approx(true_ratio, rel=1e-2)
    matched = scaling.equal_cost(_cells(table, "cross-entropy"), 1)
    assert matched == pytest.approx(PARAMETERS[1, 1] / true_ratio, rel=1e-6)


def test_the_ratio_says_why_there_is_none() -> None:
    x = np.log(PARAMETERS)
    far = np.stack([-0.2 * x[0], -0.2 * x[1] - 1.0])[:, :, None] + np.zeros((2, 3, 2))
    assert "outside the measured range" in scaling.effective_ratio(_cells(_table(far + 2), "cross-entropy")).note
    flat = 0.05 * np.random.default_rng(1).standard_normal((2, 3, 3))
    flat += 0.005 * np.asarray([0, -1, -2])[:, None]  # a slope that noise drowns
    ratio = scaling.effective_ratio(_cells(_table(flat - 1), "cross-entropy"))
    assert "cannot be told from 0" in ratio.note and math.isnan(ratio.value)
    rising = np.stack([0.2 * x[0], 0.2 * x[1]])[:, :, None] + np.zeros((2, 3, 2))
    assert "larger models are not better" in scaling.effective_ratio(_cells(_table(rising - 5), "cross-entropy")).note
    assert scaling.equal_cost(_cells(_table(far + 2), "cross-entropy"), 2) is None


def test_a_power_law_is_found_again() -> None:
    x = np.log(PARAMETERS)
    middle = x.mean()
    true = 0.1 + np.stack([0.4 * np.exp(-0.5 * (x[0] - middle)), 0.3 * np.exp(-0.7 * (x[1] - middle))])
    law = scaling.power_law(Cells(x, [np.log(true[:, i, None]) for i in range(3)]))
    assert law is not None and law.df == 1
    assert law.floor == pytest.approx(0.1, rel=1e-2)
    assert law.exponents == pytest.approx((0.5, 0.7), rel=2e-2) and law.scales == pytest.approx((0.4, 0.3), rel=2e-2)
    assert scaling.power_law(Cells(x[:, :2], [np.zeros((2, 1))] * 2)) is None


def test_sign_flips_count_all_ways_and_agree_with_draws() -> None:
    chance = np.random.default_rng(2)
    few = Cells(np.log(PARAMETERS[:, :1]), [np.stack([np.zeros(5), np.asarray([0.1, 0.2, 0.3, 0.4, 0.5])])])
    assert scaling.sign_flips(few, np.ones(1)) == pytest.approx(2 / 32)
    many = [chance.standard_normal((2, 5)) + np.asarray([[0.0], [0.3]]) for _ in range(3)]
    weights = np.full(3, 1 / 3)
    drawn = scaling.sign_flips(Cells(np.log(PARAMETERS), many), weights)
    differences = np.concatenate([cell[1] - cell[0] for cell in many])
    exact = np.mean([abs(np.dot(s, differences)) >= abs(differences.sum()) - 1e-12 for s in itertools.product((1, -1), repeat=15)])
    assert drawn == pytest.approx(exact, abs=0.02)


def test_the_crossed_bootstrap_draws_seeds_as_pairs() -> None:
    # Every image of a run is answered alike, so that images add nothing; of two pairs a quarter of the draws takes one twice.
    shares = np.asarray([[0.4, 0.4], [0.2, 0.3]])
    answers = [np.repeat(shares[:, :, None], 50, axis=2)]
    low, high = scaling.crossed_bootstrap(answers, np.ones(1))
    logs = np.log((50 * shares + 0.5) / 51)
    assert (low, high) == pytest.approx(tuple(sorted(logs[1] - logs[0])), abs=1e-5)


def test_the_crossed_bootstrap_draws_the_same_images_for_all_runs_and_sizes() -> None:
    chance = np.random.default_rng(4)
    images, alike = (chance.random(300) < 0.3).astype(np.float32), np.full(300, 0.3, np.float32)
    one, other = np.stack([alike, images])[:, None], np.stack([images, alike])[:, None]
    spread = scaling.crossed_bootstrap([one], np.ones(1))
    assert spread[1] - spread[0] > 0.2
    # What an image does to one size, it does against the other.
    assert scaling.crossed_bootstrap([one, other], np.full(2, 0.5)) == pytest.approx((0, 0), abs=1e-6)
    assert scaling.crossed_bootstrap([one], np.ones(1), baseline=[one]) == pytest.approx((0, 0), abs=1e-6)


def test_the_interval_of_the_ratio_is_the_test_turned_round() -> None:
    chance = np.random.default_rng(8)
    x = np.log(PARAMETERS)
    spreads = np.asarray([[0.02], [0.05]])  # the arms scatter differently, and together
    logs = [np.stack([-0.2 * x[0, i], -0.2 * (x[1, i] + 0.3)])[:, None] + spreads * chance.standard_normal((2, n))
            + 0.03 * chance.standard_normal(n) for i, n in enumerate((3, 5, 4))]  # fmt: skip
    cells = Cells(x, logs)
    weights = scaling.slope_weights(cells.x)

    def distance(log_ratio: float) -> float:
        """|t| of "difference - slope log ratio" less its bound, from the residuals of this very contrast."""
        coefficients = [np.asarray([-1 / 3, 1 / 3]) + log_ratio * weights[i] * np.asarray([0.5, 0.5]) for i in range(3)]
        value = sum(c @ log.mean(axis=1) for c, log in zip(coefficients, logs, strict=True))
        residuals = np.concatenate([log - log.mean(axis=1, keepdims=True) for log in logs], axis=1)
        covariance = residuals @ residuals.T / cells.df
        variance = sum(c @ covariance @ c / log.shape[1] for c, log in zip(coefficients, logs, strict=True))
        return abs(value) - stats.t.ppf(0.975, cells.df) * math.sqrt(variance)

    ratio = scaling.effective_ratio(cells)
    shift = float((x[1] - x[0]).mean())
    middle = math.log(ratio.value) - shift
    low, high = (optimize.brentq(distance, middle, end) for end in (middle - 2, middle + 2))
    assert (ratio.low, ratio.high) == pytest.approx((math.exp(low + shift), math.exp(high + shift)), rel=1e-6)


def test_power_is_what_simulation_says() -> None:
    weights, spread, effect = np.full(3, 1 / 3), 0.02, 0.02
    chance = np.random.default_rng(5)
    found = 0
    for _ in range(2000):
        differences = effect + spread * chance.standard_normal((3, 3))
        cells = Cells(np.log(PARAMETERS), [np.stack([np.zeros(3), row]) for row in differences])
        found += scaling.level(cells).p < 0.05
    assert scaling.power(effect, spread, weights, 3) == pytest.approx(found / 2000, abs=0.03)
    assert math.isnan(scaling.power(effect, spread, weights, 1))
    assert scaling.power(effect, 1e-9, weights, 2) == 1.0
    level = Estimate(0.0, spread / 3, 6)
    assert scaling.power(level.detectable(), spread, weights, 3) == pytest.approx(0.8, abs=0.02)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    chance = np.random.default_rng(6)
    for seeds in (3, 5):
        for row in coverage(World(level=-0.02, trend=0.03), seeds, 600, chance):
            assert 92.5 <= row["coverage"] <= 97.5
    assert ratio_coverage(0.65, 200, 3, chance)["coverage"] >= 91
    assert one_seed(0.03, 300, 359, chance)["held"] >= 91


def test_the_bars_of_the_calibration_can_be_missed() -> None:
    row = {"contrast": "level", "seeds": 3, "coverage": 85.0, "excludes_0": 15.0}
    worlds = {name: [row] for name in WORLDS}
    outcome = {"no_effect": worlds, "effect": [{**row, "excludes_0": 50.0}], "ratio": [
        {"true_ratio": 0.65, "seeds": 3, "bend": 0.0, "coverage": 80.0, "excludes_1": 99.0}]}  # fmt: skip
    assert len(missed(outcome)) == len(WORLDS) * 2 + 1 + 1


def test_a_crippled_arm_is_found_and_an_equal_one_is_not() -> None:
    chance = np.random.default_rng(7)
    logs = [math.log(0.05) + 0.1 * chance.standard_normal(6) for _ in range(3)]
    found = split_all_ways([100_000, 200_000, 400_000], logs, [log + 0.6 for log in logs])
    assert found["splits"] == 10 and found["crippled_found"] == 100
    assert found["crippled_error_ratio"] == pytest.approx(math.exp(0.6))
