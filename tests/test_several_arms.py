"""More than two architectures: each is compared with the first, all questions are one family, and every place names whom it means."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tables import study_table

from diffvit.errors import UserError
from diffvit.protocol import ARMS
from study.grid import find_grid
from study.report.analysis import Analysis, analyse
from study.report.document import Heading, Table, to_html, to_markdown
from study.report.first import first_screen
from study.report.noise_figures import in_common
from study.report.page import page
from study.report.paper import latex_tables
from study.report.power import power_rows
from study.report.verdict import holm

pytestmark = pytest.mark.usefixtures("made_up_starts")

MINE, ARMS_OF_THREE = "Mine-12345678", (*ARMS, "Mine-12345678")


def of_three(level: float = 0.0, mine: float = -0.1, **options) -> pd.DataFrame:
    """A run table of both arms and of a third one, which shares the baseline's runs."""
    table, third = study_table(level, **options), study_table(mine, **options)
    third = third[third["model"] == ARMS[1]].replace({"model": {ARMS[1]: MINE}})
    return pd.concat([table, third.assign(run_id=third["run_id"] + MINE)], ignore_index=True)


def reported(table: pd.DataFrame, arms: tuple[str, ...] = ARMS_OF_THREE, **options) -> Analysis:
    return analyse(table, None, arms, **options)


def test_each_arm_is_compared_with_the_first_and_holm_is_over_all() -> None:
    table = of_three(level=-0.02, spread=0.015)
    answers = reported(table).answers
    assert [(answer.question, answer.arms) for answer in answers] == [
        (question, (ARMS[0], arm)) for arm in ARMS_OF_THREE[1:] for question in ("level", "trend")
    ]
    assert [answer.p_holm for answer in answers] == pytest.approx(list(holm(np.asarray([answer.estimate.p for answer in answers]))))
    alone = [reported(table, pair).answers for pair in (ARMS, (ARMS[0], MINE))]
    for one, many in zip([*alone[0], *alone[1]], answers, strict=True):
        assert one.estimate == many.estimate and many.questions == 4 and many.p_holm >= one.p_holm
    assert max(many.p_holm / one.p_holm for one, many in zip(alone[1], answers[2:], strict=True)) > 1.5  # the correction costs something


def test_what_diverged_of_one_arm_says_nothing_of_another() -> None:
    """Half of the differential runs died: the other arm's verdict stands, and only the sentence of the first names them."""
    table = of_three(level=-0.1)
    table.loc[(table["model"] == ARMS[1]) & (table["seed"] == 0), "status"] = "diverged"
    differential, _, mine, _ = reported(table).answers
    assert "diverged" in differential.beside and "diverged" not in mine.beside
    assert mine.verdict == "better" and mine.with_diverged is None and differential.with_diverged is not None


def test_noise_is_asked_once_for_each_arm_and_looks_are_counted_apart(tmp_path: Path) -> None:
    table = pd.concat([of_three(), of_three(overrides="input_noise=0.1", seed=1)], ignore_index=True)
    looks = tmp_path / "looks.json"
    analysis = reported(table, looks=looks)
    assert [answer.arms[1] for answer in analysis.answers if answer.question == "noise"] == list(ARMS_OF_THREE[1:])
    assert len(set(analysis.noise_sources.values())) == 1 and {answer.questions for answer in analysis.answers} == {6}
    # The same two arms alone were asked this before: no new look.
    assert [answer.look for answer in reported(table, ARMS, looks=looks).answers] == [1, 1, 1]


def test_the_page_names_whom_it_means_everywhere(tmp_path: Path) -> None:
    noisy = of_three(overrides="label_noise=0.4", seed=1)
    rates = [of_three(overrides=f"lr={rate}", seed=seed) for seed, rate in enumerate((0.001, 0.003), 2)]
    table = pd.concat([of_three(), noisy, *rates], ignore_index=True).assign(val_accuracy=0.5)
    control = table[table["model"] == MINE].replace({"model": {MINE: "vit_classic_wide_heads"}})
    table = pd.concat([table, control.assign(run_id=control["run_id"] + "c")], ignore_index=True)
    analysis = reported(table)
    heading, _, findings, _ = first_screen(analysis, "")
    assert heading.text == f"Do Differential ViT and {MINE} scale better than Classic ViT, and does noise change it?"
    assert f"CIFAR-100: does {MINE} have a lower error?" in [row.question for row in findings.rows]
    assert "◂ better" in findings.axis
    blocks = page(analysis, [], "")
    text = to_markdown(blocks, tmp_path)
    assert f"Negative numbers favour Differential ViT and {MINE}." in text and f"false training labels, {MINE}" in text
    assert " for Differential ViT, " in text.partition("Each at its own best")[2].partition("\n")[0]
    titles = [block.text for block in blocks if isinstance(block, Heading)]
    assert {"Differential ViT against Classic ViT", f"{MINE} against Classic ViT"} <= set(titles)
    (controls,) = [block for block in blocks if isinstance(block, Table) and (block.caption or "").startswith("Controls")]
    assert [row[0].partition(" on ")[0] for row in controls.rows] == ["Classic ViT, wide heads against Classic ViT"] * 4
    assert sorted(curve.figure for curve in analysis.choices) == [f"CIFAR-100_{MINE}_choices", "CIFAR-100_choices"]
    assert to_html(blocks, "report") and latex_tables(analysis).count(MINE) >= 2 + 3


def test_a_grid_file_lists_arms_and_controls(tmp_path: Path) -> None:
    path = tmp_path / "three.yaml"
    path.write_text("models: [classic, differential, vit_differential_v2]\ncontrols: [vit_classic_wide_heads]\ndatasets: [digits]\n")
    grid = find_grid(str(path))
    assert grid.arms == (*ARMS, "vit_differential_v2") and len(grid.runs()) == 4 * 3
    assert find_grid("controls").arms == ARMS and {spec.model for spec in find_grid("controls").runs()} > set(ARMS)
    assert {spec.model for spec in find_grid("controls", models=ARMS).runs()} == set(ARMS)


def test_power_counts_the_questions_of_all_arms(tmp_path: Path) -> None:
    two, three = (power_rows(tmp_path, find_grid("digits", models=models).runs(), 0.02, models)
                  for models in (ARMS, (*ARMS, "vit_differential_v2")))  # fmt: skip
    assert three[0]["questions"] == 2 * two[0]["questions"] and three[0]["power"][5] < two[0]["power"][5]


def test_controls_decide_nothing_about_the_arms(tmp_path: Path) -> None:
    """More controls than arms, in another precision, on other test images, and under a plainer protocol."""
    table = study_table(level=-0.1)
    controls = pd.concat([table[table["model"] == ARMS[0]].replace({"model": {ARMS[0]: f"vit_{number}"}}) for number in range(5)])
    controls["run_id"] += controls["model"]
    expected = [answer.estimate for answer in reported(table, ARMS).answers]
    for odd in ({"precision": "fp32"}, {"test_images": 9000}, {"fingerprint": "other"}):
        assert [
            answer.estimate for answer in reported(pd.concat([table, controls.assign(**odd)], ignore_index=True), ARMS).answers
        ] == expected
    trial = pd.concat([table.assign(overrides="lr=0.001"), controls], ignore_index=True)
    assert [answer.subject for answer in reported(trial, ARMS).answers] == ["CIFAR-100 (lr=0.001)"] * 2


def test_an_arm_without_runs_is_named_and_draws_nothing(tmp_path: Path) -> None:
    rates = [study_table(overrides=f"lr={rate}", seed=seed) for seed, rate in enumerate((0.001, 0.003))]
    noisy = study_table(overrides="input_noise=0.1", seed=5)
    table = pd.concat([study_table(), noisy, *rates], ignore_index=True).assign(val_accuracy=0.5)
    analysis = reported(table)
    _, _, findings, _ = first_screen(analysis, "")
    open_rows = {row.question: row.verdict for row in findings.rows if row.verdict in ("no answer", "not measured")}
    assert open_rows == {"CIFAR-100": "no answer", f"Does {MINE} lose less by noise?": "not measured"}
    assert [curve.arms[1] for curve in analysis.choices] == [ARMS[1]]
    text = to_markdown(page(analysis, [], ""), tmp_path)
    assert f"### {MINE} against" not in text and "for Differential ViT, is CIFAR-100 (input_noise=0.1): trained on noisy" in text


def test_a_control_that_diverged_is_not_silent(tmp_path: Path) -> None:
    table = of_three()
    table.loc[(table["model"] == MINE) & (table["seed"] > 0), "status"] = "diverged"
    text = to_markdown(page(reported(table, ARMS), [], ""), tmp_path)
    assert f"| {MINE} against Classic ViT on CIFAR-100 | " in text and f"{MINE}: 6 of 9" in text


@pytest.mark.parametrize(
    ("models", "controls", "said"),
    [
        ("[classic]", "[differential]", "only one of its models"),
        ("[classic, differential]", "[vit_differential]", "in models and in controls"),
        ("[classic, differential]", "0", "controls in .* is 0"),
    ],
)
def test_controls_that_cannot_be_are_refused(tmp_path: Path, models: str, controls: str, said: str) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(f"models: {models}\ncontrols: {controls}\ndatasets: [digits]\n")
    with pytest.raises(UserError, match=said):
        find_grid(str(path))
    path.write_text(f"models: {models}\ncontrols: []\ndatasets: [digits]\n")
    assert find_grid(str(path)).arms == ARMS


def test_model_makes_arms_of_controls_and_one_alone_is_compared_with_the_baseline() -> None:
    everything = find_grid("controls").trained
    assert find_grid("controls", models=everything).arms == everything
    assert find_grid("digits", models=["vit_differential_v2"]).arms == (ARMS[0], "vit_differential_v2")
    assert find_grid("digits", models=["differential"]).arms == ARMS
    assert len(find_grid("controls", models=[*everything[::-1]]).prefix) < 100


def test_the_same_two_the_other_way_round_are_the_same_question(tmp_path: Path) -> None:
    few, looks = of_three()[lambda runs: runs["seed"] < 2], tmp_path / "looks.json"
    assert [answer.look for answer in reported(few, (ARMS[0], MINE), looks=looks).answers] == [1, 1]
    assert [answer.look for answer in reported(of_three(), (MINE, ARMS[0]), looks=looks).answers] == [2, 2]


def test_the_noise_figure_leaves_out_who_shares_nothing() -> None:
    runs = of_three()
    runs.loc[runs["model"] == MINE, "seed"] += 3
    assert set(in_common(runs)["model"]) == set(ARMS) and len(in_common(runs)) == 18 and len(in_common(of_three())) == 27
    assert in_common(runs.iloc[:0]).empty
