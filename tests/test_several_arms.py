"""More than two architectures: each is compared with the first, all questions are one family, and every place names whom it means."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tables import study_table

from diffvit.protocol import ARMS
from study.grid import find_grid
from study.report.analysis import Analysis, analyse
from study.report.document import Heading, Table, to_html, to_markdown
from study.report.first import first_screen
from study.report.page import page
from study.report.paper import latex_tables
from study.report.power import power_rows
from study.report.verdict import holm

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
    assert len(analysis.noise_sources) == 1 and {answer.questions for answer in analysis.answers} == {6}
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
    (controls,) = [block for block in blocks if isinstance(block, Table) and block.caption == "Other architectures"]
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
