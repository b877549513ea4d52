"""Verdicts: the rule, its sentences, and what enters a comparison."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from tables import study_table

from diffvit.protocol import ARMS
from study.report import compare, sentences, verdict
from study.report.analysis import analyse, subjects
from study.report.document import Findings
from study.report.page import page
from study.report.verdict import Answer, Estimate
from study.table import seeds_from_zero, seeds_of_study


def _sentences(table: pd.DataFrame) -> dict[str, tuple[str, str]]:
    return {answer.question: (answer.verdict, sentences.sentence(answer)) for answer in analyse(table, None).answers}


def test_a_better_arm_is_called_better() -> None:
    found = _sentences(study_table(level=-0.05, trend=-0.08, spread=0.008))
    assert found["level"][0] == found["trend"][0] == "better"
    assert "Differential ViT has a lower error than Classic ViT at these sizes" in found["level"][1]
    assert "Differential ViT scales better with depth than Classic ViT" in found["trend"][1]
    number, low, high = map(float, re.findall(r"([-+]\d+\.\d) %", found["level"][1])[:3])
    assert low < number < high < 0 and number == pytest.approx(-4.9, abs=1)


def test_a_worse_arm_is_called_worse() -> None:
    found = _sentences(study_table(level=0.05, trend=0.08, spread=0.008))
    assert found["level"][0] == found["trend"][0] == "worse"
    assert "higher error" in found["level"][1] and "scales worse" in found["trend"][1]


def test_arms_within_the_margin_are_called_equivalent() -> None:
    found = _sentences(study_table(spread=0.003, seeds=5))
    assert found["level"][0] == found["trend"][0] == "equivalent"
    assert "equivalent at these sizes" in found["level"][1] and "scale alike" in found["trend"][1]
    assert all("lies within ±2 %" in text for _, text in found.values())


def test_where_nothing_can_be_said_the_sentence_says_what_would_have_been_found() -> None:
    table = study_table(spread=0.05)
    answer = next(each for each in analyse(table, None).answers if each.question == "level")
    text = sentences.sentence(answer)
    assert answer.verdict == "undecided" and "is undecided" in text
    size = float(
        re.search(r"A true value below -\d+\.\d % or above \+(\d+\.\d) % would have been found with a probability of 80 %", text)[1]
    )
    # At that difference, the power is what the sentence claims.
    # Two questions: the interval must exclude 0 at a level of 2.5 %, which is asked of the distribution itself.
    noncentrality = math.log1p(size / 100) / answer.estimate.se
    low, high = answer.estimate.interval_at(0.025)
    bound = (high - low) / 2 / answer.estimate.se
    assert answer.questions == 2 and stats.nct.sf(bound, answer.estimate.df, noncentrality) == pytest.approx(0.8, abs=0.02)


def test_one_seed_has_no_interval_and_says_what_no_effect_would_produce() -> None:
    for verdict_, text in _sentences(study_table(level=-0.02, seeds=1)).values():
        assert verdict_ == "no interval" and "no interval (1 seed)" in text and "is undecided" in text
        low, high = map(float, re.search(r"No effect at all would produce ([-+]\d+\.\d) % to ([-+]\d+\.\d) %", text).groups())
        assert low < 0 < high


def test_holms_correction() -> None:
    assert verdict.holm(np.asarray([0.01, 0.04, 0.03])) == pytest.approx([0.03, 0.06, 0.06])
    assert verdict.holm(np.asarray([0.5, 0.9])) == pytest.approx([1.0, 1.0])
    families = verdict.holm(np.asarray([[0.01, 0.5], [0.04, math.nan], [0.03, 0.02]]))
    assert families[:, 0] == pytest.approx([0.03, 0.06, 0.06]) and families[:, 1] == pytest.approx([0.5, math.nan, 0.04], nan_ok=True)
    corrected = verdict.holm(np.asarray([0.02, math.nan, 0.03]))
    assert corrected[0] == pytest.approx(0.04) and math.isnan(corrected[1]) and corrected[2] == pytest.approx(0.04)


def test_a_finding_that_does_not_survive_the_correction_is_undecided() -> None:
    estimate = Estimate(-0.05, 0.02, 6)
    assert estimate.interval[1] < 0 and estimate.p < 0.05
    alone = Answer("level", "digits", ARMS, estimate, 9, 3)
    (decided,) = verdict.decide([alone])
    assert decided.verdict == "better"
    many = verdict.decide([alone, *[Answer("trend", "digits", ARMS, Estimate(0.0, 0.02, 6), 9, 3)] * 4])
    assert many[0].verdict == "undecided" and "Taken alone the 95 % interval excludes 0" in sentences.sentence(many[0])


def test_noise_that_hurts_one_arm_more_is_found() -> None:
    clean, noisy = study_table(spread=0.005), study_table(level=-0.1, spread=0.005, overrides="input_noise=0.1", seed=1)
    analysis = analyse(pd.concat([clean, noisy], ignore_index=True), None)
    noise = next(answer for answer in analysis.answers if answer.question == "noise")
    assert noise.verdict == "better" and noise.scales["log error"].value == pytest.approx(-0.1, abs=0.02)
    assert (
        "Differential ViT loses less by noise than Classic ViT" in sentences.sentence(noise)
        and "trained on noisy images" in analysis.noise_sources[ARMS]
    )
    # The noisy condition is no question of its own: it is in the one above.
    assert [answer.question for answer in analysis.answers] == ["level", "trend", "noise"]


def test_noise_is_resampled_over_images_with_clean_answers_as_the_baseline() -> None:
    table = study_table(level=-0.1, spread=0.005, images=400)
    table["evaluated_error"], table["corrupted_error"] = 1 - table["test_accuracy"], (1 - table["test_accuracy"]) * 1.5
    table["evaluated_images"] = 400
    difficulty = np.random.default_rng(0).random(400)

    def wrong(share: float):
        return lambda run: (difficulty < (1 - run.test_accuracy) * share).astype(np.float32)

    answer = compare.noise_answer(table, table, "CIFAR-100", ARMS, ("evaluated error", "corrupted error"), (wrong(1.0), wrong(1.5)))
    assert answer is not None and answer.scales["log error"].value == pytest.approx(0, abs=0.01)
    assert answer.new_images is not None and answer.new_images[0] < answer.estimate.value < answer.new_images[1] < -0.05  # log-odds
    assert "points, a relative corruption error of 0.9" in answer.beside
    assert compare.noise_answer(table, table, "CIFAR-100", ARMS, ("evaluated error", "corrupted error")).new_images is None


@pytest.mark.parametrize("errors", [(0.05, 0.1), (0.55, 0.7)])
def test_one_seed_says_what_no_effect_of_noise_would_produce(errors: tuple[float, float]) -> None:
    chance = np.random.default_rng(0)
    table = study_table(seeds=1, images=10**9)
    held = []
    for _ in range(50):
        clean, noisy = (table.assign(test_accuracy=1 - error * np.exp(0.03 * chance.standard_normal(len(table)))) for error in errors)
        answer = compare.noise_answer(clean, noisy, "CIFAR-100")
        held.append(abs(answer.estimate.value) <= answer.null_half)
    assert np.mean(held) > 0.85  # 95 %, but for three standard errors


def test_noise_compares_a_size_with_itself_even_where_another_is_missing() -> None:
    clean, noisy = study_table(trend=0.3, spread=0.005), study_table(trend=0.3, spread=0.005, seed=1)
    answer = compare.noise_answer(clean, noisy[noisy["size"] != "10B"], "twin")
    assert answer is not None and answer.pairs == 6 and answer.estimate.value == pytest.approx(0, abs=0.02)


def test_a_cell_that_was_trained_twice_is_not_counted_twice() -> None:
    table, again = study_table(spread=0.02), study_table(spread=0.02, seed=1)
    again["precision"], again["run_id"] = "fp32", again["run_id"] + "again"
    analysis = analyse(pd.concat([table, again.iloc[:6]], ignore_index=True), None)
    assert [answer.pairs for answer in analysis.answers] == [9, 9]
    assert any("6 runs of CIFAR-100 in fp32" in phrase for phrase in analysis.left_out)
    with pytest.raises(ValueError, match="more than one run of a size and seed"):
        compare.compare(pd.concat([table, again], ignore_index=True), "CIFAR-100")


def test_no_spread_between_seeds_is_no_proof() -> None:
    (decided,) = verdict.decide([Answer("level", "digits", ARMS, Estimate(-0.1, 0.0, 2), 3, 3)])
    assert decided.verdict == "undecided"


def test_a_loss_that_is_not_finite_leaves_the_error_alone() -> None:
    table = study_table()
    table.loc[0, "test_loss"] = np.inf
    comparison = compare.compare(table, "CIFAR-100")
    assert comparison is not None
    assert comparison.cells["error"].counts.sum() == 9 and comparison.cells["cross-entropy"].counts.sum() == 8
    table["test_loss"] = np.nan
    assert list(compare.compare(table, "CIFAR-100").cells) == ["error"]
    assert page(analyse(table, None), [], "")


def test_predictions_of_another_length_leave_the_secondary_interval_out() -> None:
    table = study_table()
    lengths = itertools.cycle((10, 11))
    comparison = compare.compare(table, "CIFAR-100", wrong_of=lambda run: np.ones(next(lengths), np.float32))
    assert comparison is not None and comparison.answers[0].new_images is None


def test_an_arm_that_always_diverged_is_named_in_the_opening() -> None:
    table = study_table()
    table.loc[table["model"] == "vit_differential", "status"] = "diverged"
    analysis = analyse(table, None)
    (findings,) = [block for block in page(analysis, [], "") if isinstance(block, Findings)]
    assert "Differential ViT: 0 done, 9 diverged" in findings.rows[0].sentence and findings.rows[0].verdict == "no answer"
    assert "CIFAR-100: Differential ViT 10B seed 0 diverged" in analysis.left_out


def test_without_a_plain_condition_the_first_one_answers() -> None:
    table = pd.concat([study_table(overrides="epochs=5"), study_table(overrides="epochs=8", seed=1)], ignore_index=True)
    assert [answer.subject for answer in analyse(table, None).answers] == ["CIFAR-100 (epochs=5)"] * 2


def test_false_labels_never_become_the_question_about_noise() -> None:
    analysis = analyse(pd.concat([study_table(), study_table(overrides="label_noise=0.4", seed=1)], ignore_index=True), None)
    assert [answer.question for answer in analysis.answers] == ["level", "trend"] and analysis.noise_sources == {}
    assert [what for what, _ in analysis.other_noise] == ["CIFAR-100 (label_noise=0.4): false training labels"]


def test_noise_is_compared_with_a_base_that_differs_in_nothing_else() -> None:
    heads, blurred = study_table(level=-0.2, spread=0.004, overrides="heads=16"), study_table(overrides="input_noise=0.1", spread=0.004)
    labels = study_table(overrides="label_noise=0.2", seed=1)
    analysis = analyse(pd.concat([heads, blurred, labels], ignore_index=True), None)
    assert [answer.question for answer in analysis.answers] == ["level", "trend"] and not analysis.other_noise
    both = study_table(overrides="heads=16 input_noise=0.1", seed=1)
    assert "trained on noisy images" in analyse(pd.concat([heads, both, labels], ignore_index=True), None).noise_sources[ARMS]
    weaker, stronger = (study_table(overrides=f"input_noise={noise}", spread=0.004) for noise in (0.05, 0.1))
    assert analyse(pd.concat([weaker, stronger], ignore_index=True), None).noise_sources == {}


def test_conditions_are_told_apart_and_the_plain_one_is_the_base() -> None:
    table = pd.concat([study_table(), study_table(overrides="label_noise=0.2"), study_table(overrides="label_noise=0.4 input_noise=0.1")])
    parts = subjects(table)
    assert [(part.name, part.base) for part in parts] == [
        ("CIFAR-100", True), ("CIFAR-100 (label_noise=0.2)", False), ("CIFAR-100 (input_noise=0.1, label_noise=0.4)", False)]  # fmt: skip
    epochs = subjects(study_table(overrides="epochs=5"))
    assert epochs[0].base and epochs[0].name == "CIFAR-100 (epochs=5)"  # a trial says that it is one, though all runs share it


def test_diverged_runs_are_named_and_their_partners_left_out() -> None:
    table = study_table()
    gone = (table["model"] == "vit_differential") & (table["size"] == "50B") & (table["seed"] == 1)
    table.loc[gone, "status"] = "diverged"
    comparison = compare.compare(table, "CIFAR-100")
    assert comparison is not None and comparison.answers[0].pairs == 8
    assert compare.left_out(table) == ["Classic ViT 50B seed 1 has no partner", "Differential ViT 50B seed 1 diverged"]
    assert "Differential ViT 50B seed 1 failed or was not trained" in compare.left_out(table[~gone])


def test_a_run_that_was_trained_beside_the_study_makes_no_seed_of_it() -> None:
    table = study_table()
    with_one = pd.concat([table, table[:1].assign(seed=5, run_id="beside")], ignore_index=True)
    assert seeds_of_study(with_one) == [0, 1, 2] and seeds_of_study(table[:0]) == [] and seeds_from_zero(with_one) == 3
    assert compare.left_out(with_one) == ["Classic ViT 10B seed 5 has no partner"]
    with_pair = pd.concat([table, table[:2].assign(seed=5, run_id="beside")], ignore_index=True)
    assert seeds_of_study(with_pair) == [0, 1, 2, 5] and seeds_from_zero(with_pair) == 3
    alone = table[table["model"] == "vit_classic"]
    assert seeds_of_study(alone) == [0, 1, 2]


def test_runs_that_failed_are_missing_however_many_they_are() -> None:
    table = study_table()
    left = table[(table["seed"] < 2) | (table["size"] == "10B")]
    assert seeds_of_study(left) == [0, 1, 2] and sum("failed or was not trained" in phrase for phrase in compare.left_out(left)) == 4


def test_architectures_that_share_nothing_are_not_compared() -> None:
    table = study_table()
    assert compare.compare(table[table["model"] == "vit_classic"], "CIFAR-100") is None
    assert compare.compare(table[(table["model"] == "vit_classic") | (table["size"] == "99B")], "CIFAR-100") is None


def _diverge(table: pd.DataFrame, rows: pd.Series) -> pd.DataFrame:
    table.loc[rows, "status"] = "diverged"
    table.loc[rows, ["test_accuracy", "test_loss", "test_images"]] = np.nan
    return table


def test_a_size_without_a_pair_says_nothing_of_the_trend() -> None:
    table = study_table(level=-0.1, trend=-0.2, spread=0.005)
    table = _diverge(table, (table["model"] == "vit_differential") & (table["size"] == "50B"))
    found = _sentences(table)
    assert found["trend"][0] == "no verdict" and found["level"][0] == verdict.DIVERGED
    assert "cannot be said (50B has no pair of finished, comparable runs)" in found["trend"][1]
    for _, text in found.values():
        opening = text[: text.index(". ")]
        assert "diverged: 0 of 9 runs of Classic ViT and 3 of 9 runs of Differential ViT (3 at 50B)" in text and "%" in opening
        assert "With diverged runs counted at chance level: +" in text


def test_an_answer_that_is_blocked_has_no_p_and_costs_the_others_nothing() -> None:
    table = study_table(level=-0.1, trend=-0.2, spread=0.005)
    level, trend = analyse(table[(table["size"] != "50B") | (table["model"] == "vit_classic")], None).answers
    assert trend.verdict == "no verdict" and math.isnan(trend.p_holm) and " p " not in sentences.sentence(trend)
    assert level.questions == 1 and level.p_holm == pytest.approx(level.estimate.p)


def test_a_trend_of_one_size_that_is_left_is_still_asked() -> None:
    table = study_table(level=-0.08, spread=0.006)
    analysis = analyse(_diverge(table, (table["model"] == "vit_differential") & (table["size"] != "10B")), None)
    assert analysis.answers[1].verdict == "no verdict" and page(analysis, [], "")
    text = sentences.sentence(analysis.answers[1])
    assert "cannot be said (25B and 50B have no pair of finished, comparable runs)" in text and "nan" not in text


@pytest.mark.parametrize(("column", "value"), [("test_images", 9000), ("precision", "fp32")])
def test_a_size_that_may_not_be_compared_says_nothing_of_the_trend(column: str, value: object) -> None:
    table = study_table(trend=-0.2, spread=0.005)
    table.loc[table["size"] == "50B", column] = value
    assert "cannot be said (50B has no pair of finished, comparable runs)" in _sentences(table)["trend"][1]


def test_what_is_compared_with_noise_does_not_depend_on_how_its_runs_ended() -> None:
    clean = study_table(dataset="digits", images=360, spread=0.004)
    blurred = study_table(dataset="digits", overrides="input_noise=0.35", images=360, spread=0.004, seed=5)
    twin = study_table(dataset="digits-noisy", level=-0.1, images=360, spread=0.004, seed=7)
    blurred = _diverge(blurred, blurred["model"] == "vit_differential")
    analysis = analyse(pd.concat([clean, blurred, twin], ignore_index=True), None)
    noise, text = analysis.answers[-1], sentences.sentence(analysis.answers[-1])
    assert "trained on noisy images" in analysis.noise_sources[ARMS] and noise.verdict == "no verdict" and "nan" not in text
    assert "cannot be said (no pair of runs has finished both with noise and without); diverged: 0 of 18 runs of Classic" in text
    assert "9 of 18 runs of Differential ViT" in text and "With diverged runs counted at chance level: +" in text
    assert analysis.other_noise[0][1].verdict == "" and analysis.other_noise[0][0].startswith("digits-noisy") and page(analysis, [], "")


def test_clean_runs_that_diverged_are_named_beside_noise() -> None:
    clean, noisy = study_table(spread=0.03), study_table(spread=0.03, overrides="input_noise=0.1", seed=3)
    clean = _diverge(clean, (clean["model"] == "vit_differential") & (clean["seed"] == 0))
    text = sentences.sentence(analyse(pd.concat([clean, noisy], ignore_index=True), None).answers[-1])
    assert "diverged: 0 of 18 runs of Classic ViT and 3 of 18 runs of Differential ViT" in text


def test_no_interval_at_chance_level_is_said_to_be_none() -> None:
    table = study_table(level=-0.08, spread=0.006)
    table = table[(table["size"] != "50B") | (table["seed"] == 0)].copy()
    text = _sentences(_diverge(table, (table["size"] == "50B") & (table["model"] == "vit_differential")))["level"][1]
    assert re.search(r"counted at chance level: \+[\d.]+ % \(no interval\)", text) and "nan" not in text


@pytest.mark.parametrize(
    ("level", "loser", "winner"), [(0.08, "vit_differential", "vit_classic"), (-0.08, "vit_classic", "vit_differential")]
)
def test_runs_of_the_losing_arm_that_diverged_leave_a_verdict(level: float, loser: str, winner: str) -> None:
    def verdict_of_level(*gone: str) -> str:
        table = study_table(level=level, spread=0.004)
        return _sentences(_diverge(table, table["model"].isin(gone) & (table["size"] == "25B") & (table["seed"] == 0)))["level"][0]

    assert verdict_of_level(loser) == verdict_of_level() == ("worse" if level > 0 else "better")
    assert verdict_of_level(winner) == verdict.DIVERGED


def test_runs_that_diverged_take_a_verdict_back() -> None:
    table = study_table(level=-0.1, trend=-0.2, spread=0.005, seeds=6)
    assert {verdict_ for verdict_, _ in _sentences(table).values()} == {"better"}
    table = _diverge(table, (table["model"] == "vit_differential") & (table["seed"] % 2 == 0))
    assert {verdict_ for verdict_, _ in _sentences(table).values()} == {verdict.DIVERGED}
    # Both arms of one pair in six: what counting them as alike leaves of the level is still a level.
    both = study_table(level=-0.1, spread=0.005, seeds=6)
    assert _sentences(_diverge(both, both["seed"] == 5))["level"][0] == "better"


@pytest.mark.parametrize(
    ("under_noise", "expected"),
    [(lambda e: 1 / (1 + (1 - e) / (math.e * e)), "undecided"), (lambda e: 0.5 + 0.5 * e, "depends on the scale"),
     (lambda e: 1.5 * e, "depends on the scale"), (lambda e: e + 0.1, None)],
)  # fmt: skip
def test_noise_that_hits_both_alike_is_no_verdict_on_any_scale(under_noise, expected: str | None) -> None:
    clean = study_table(level=math.log(0.95), spread=0.004)
    noisy = study_table(level=math.log(0.95), spread=0.004, overrides="input_noise=0.1", seed=1)
    noisy["test_accuracy"] = 1 - under_noise(1 - noisy["test_accuracy"])
    noise = analyse(pd.concat([clean, noisy], ignore_index=True), None).answers[-1]
    assert noise.question == "noise" and noise.verdict in ([expected] if expected else ["undecided", "equivalent", "depends on the scale"])
    text = sentences.sentence(noise)
    assert re.search(r"under noise Differential ViT is more accurate than Classic ViT \([\d.]+ against [\d.]+ %\)", text)
    assert ("On other scales: log error" in text) == (noise.verdict == "depends on the scale")
    contrary = noise.verdict != "depends on the scale" and any(each.value * noise.estimate.value < 0 for each in noise.scales.values())
    assert ("Other scales point the other way: " in text) == contrary


def test_who_loses_less_but_is_still_worse_is_said_to_be() -> None:
    clean = study_table(level=0.3, spread=0.004)
    noisy = study_table(level=0.1, spread=0.004, overrides="input_noise=0.1", seed=1)
    noisy["test_accuracy"] = 1 - 1.4 * (1 - noisy["test_accuracy"])
    text = sentences.sentence(analyse(pd.concat([clean, noisy], ignore_index=True), None).answers[-1])
    assert "Differential ViT loses less by noise than Classic ViT" in text
    assert "under noise Differential ViT is less accurate than Classic ViT" in text
    assert re.search(r"; lost by noise 1\d\.\d against \d\d\.\d points[.;]", text)


def test_an_interval_without_a_practical_end_is_said_in_words() -> None:
    (decided,) = verdict.decide([Answer("level", "digits", ARMS, Estimate(0.5, 5.0, 1.0, 1), 2, 2, look=8)])
    assert "interval -100.0 % to over +1000 %; p = 1 after Holm" in sentences.sentence(decided)


def test_a_difference_within_the_margin_is_called_small() -> None:
    answer = Answer("level", "digits", ARMS, Estimate(-0.004, 0.0002, 6), 9, 3)
    (decided,) = verdict.decide([answer])
    assert decided.verdict == "better" and "at these sizes, by less than the margin of 2 %: " in sentences.sentence(decided)
    (large,) = verdict.decide([Answer("level", "digits", ARMS, Estimate(-0.04, 0.0002, 6), 9, 3)])
    assert "margin" not in sentences.sentence(large)


def test_arms_trained_differently_are_named_in_the_sentence() -> None:
    table = study_table()
    table["micro_batch"] = 64
    table.loc[(table["model"] == "vit_differential") & (table["size"] == "50B"), ["device_name", "micro_batch"]] = ["another GPU", 32]
    text = _sentences(table)["level"][1]
    assert "the arms of 3 of 9 pairs had different devices (a GPU and another GPU)" in text
    assert "the arms of 3 of 9 pairs had different micro-batches (64 and 32)" in text
    assert "had different" not in _sentences(study_table())["level"][1]


def test_what_cannot_be_used_is_named() -> None:
    table = study_table()
    table.loc[0, "test_loss"], table.loc[1, "test_loss"] = 0.0, np.inf
    table.loc[2, "test_images"], table.loc[3, "test_loss"] = 64, np.nan
    analysis = analyse(table, None)
    said = "; ".join(analysis.left_out)
    assert "test loss 0 of Classic ViT 10B seed 0 (not its error)" in said and "test loss inf of Differential ViT 10B seed 0" in said
    assert "test loss nan of Differential ViT 10B seed 1 (not its error)" in said
    assert "1 runs that were not tested on 10,000 images as most were" in said and analysis.answers[0].pairs == 8


def test_the_level_at_equal_cost_stands_beside_the_verdict() -> None:
    # Equal at equal parameters; the differential arm takes 17 % more FLOPs, which the slope of -0.17 makes 2.7 % of the error.
    text = _sentences(study_table(spread=0.002))["level"][1]
    number = re.search(
        r"Parameters are equal here; at equal FLOPs \+(\d\.\d) % \(\+[\d.]+ % to \+[\d.]+ %\) and at equal training time", text
    )
    assert number and float(number[1]) == pytest.approx(2.7, abs=0.4)


def test_where_larger_is_not_better_it_is_said_why_no_level_stands_at_equal_cost() -> None:
    table = study_table(spread=0.002)
    table["test_accuracy"] = table["test_accuracy"] - table["parameters"] / 1e8  # the error grows with size
    text = _sentences(table)["level"][1]
    assert "Parameters are equal here; over both architectures the error does not fall with size, so nothing can be said at equal" in text
    one_size = _sentences(table[table["size"] == "10B"])["level"][1]
    assert "equal FLOPs" not in one_size


def test_one_seed_says_whether_no_effect_explains_it() -> None:
    assert "the value lies inside." in _sentences(study_table(level=-0.01, seeds=1))["level"][1]
    assert "the value lies outside." in _sentences(study_table(level=-0.4, seeds=1))["level"][1]


def test_a_size_with_one_pair_has_no_verdict() -> None:
    table = study_table(level=-0.1, trend=-0.2, spread=0.005)
    for verdict_, text in _sentences(table[(table["size"] != "50B") | (table["seed"] == 0)]).values():
        assert verdict_ == "no interval" and "no interval (1 pair only at 1 of 3 sizes)" in text


def test_runs_without_a_mistake_promise_nothing() -> None:
    table = study_table(images=359)
    table["test_accuracy"] = 1.0
    for verdict_, text in _sentences(table).values():
        assert verdict_ == "undecided" and "-0.0 %" not in text.replace("size +0.0 %", "")
    laws = compare.compare(table, "digits").laws
    assert laws["error"] is None  # the fit ends at a bound
