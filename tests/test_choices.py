"""The specification curve: every combination of choices once, sorted, and said in one sentence."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pandas as pd
import pytest
from tables import study_table

from study.report.analysis import Analysis, analyse
from study.report.choices import curve_sentence, draw_choices
from study.report.document import Figures, Table, to_markdown
from study.report.page import page
from study.report.sentences import sentence
from study.table import COLUMNS

pytestmark = pytest.mark.usefixtures("made_up_starts")

CONDITIONS = [
    " ".join(filter(None, each))
    for each in itertools.product(("", "residual_scale=False"), ("lr=3.33e-05", "", "lr=0.0003"), ("", "heads=16"))
]


def _analysis(levels: list[float], seeds: int = 3, more: str = "") -> Analysis:
    conditions = [*CONDITIONS, more] if more else CONDITIONS
    tables = [study_table(level, overrides=text, seeds=seeds, spread=0.004, seed=number)
              for number, (text, level) in enumerate(zip(conditions, levels, strict=False))]  # fmt: skip
    runs = pd.concat(tables, ignore_index=True)
    return analyse(runs.assign(val_accuracy=runs["test_accuracy"]), None)


def test_the_curve_has_every_choice_once_and_its_sentence_counts() -> None:
    analysis = _analysis([-0.05] * 10 + [0.0, 0.10, -0.9], more="label_noise=0.2")
    (curve,) = analysis.choices
    specs = curve.specs
    assert len(specs) == len({tuple(each.chosen.values()) for each in specs}) == 24  # noise is another question
    values = [float(each.level.value) for each in specs]
    assert values == sorted(values) and sum(each.protocol for each in specs) == 1
    assert {tuple(sorted({each.chosen[name] for each in specs})) for name in specs[0].chosen} == {
        ("off", "on"), ("0.0001", "0.0003", "3.33e-05"), ("16", "8"), ("FLOPs", "parameters")
    }  # fmt: skip
    kinds = [each.kind for each in specs]
    text = curve_sentence(curve)
    assert "Under 24 combinations" in text and f"lower error in {sum(value < 0 for value in values)}" in text
    assert f"{kinds.count('lower')} significantly lower and {kinds.count('higher')} significantly higher" in text
    assert kinds.count("lower") >= 10 and kinds.count("higher") >= 1


def test_a_verdict_that_other_choices_turn_says_so() -> None:
    turned, steady = (_analysis([-0.10] * 11 + [last]) for last in (0.10, -0.10))
    for analysis, expected in ((turned, True), (steady, False)):
        level, trend = (sentence(answer) for answer in analysis.answers[:2])
        assert ("Its sign depends on choices" in level) == expected and "choices" not in trend
    assert "never significantly higher" in curve_sentence(steady.choices[0])


def test_one_seed_gives_a_curve_without_intervals() -> None:
    assert "with one seed, none has an interval" in curve_sentence(_analysis([-0.05] * 12, seeds=1).choices[0])


def test_what_diverged_is_neither_hidden_nor_left_out() -> None:
    """The choice under which an arm diverges is what the curve is there to show."""
    analysis = _analysis([-0.05] * 12)
    runs = analysis.table
    of_arm = (runs["model"] == "vit_differential") & runs["overrides"].str.contains("lr=0.0003")
    runs.loc[of_arm & (runs["overrides"] != "lr=0.0003 heads=16"), "status"] = "diverged"
    (curve,) = analyse(runs[[column for column in COLUMNS if column in runs]], None).choices
    specs = curve.specs
    dead = [each for each in specs if each.diverged]
    assert len(dead) == 3 and all(math.isnan(each.level.value) and each.diverged == "Differential ViT: 9 of 9" for each in dead)
    assert specs[-3:] == dead or {id(each) for each in specs[-3:]} == {id(each) for each in dead}
    text = curve_sentence(curve)
    assert (
        "Under 3 of them runs diverged, so that 3 have nothing to compare" in text and "lower error in 18 and the higher one in 0" in text
    )


@pytest.mark.parametrize("conditions", [1, 2])
def test_fewer_than_three_conditions_are_no_curve(conditions: int) -> None:
    assert _analysis([-0.05] * conditions).choices == []


def test_the_page_shows_the_curve_and_all_rows(tmp_path: Path) -> None:
    analysis = _analysis([-0.05] * 11 + [0.10])
    drawn = draw_choices(analysis.choices, tmp_path)
    assert [path.name for path in drawn] == ["CIFAR-100_choices.png", "CIFAR-100_choices.svg"] and all(
        path.stat().st_size for path in drawn
    )
    blocks = page(analysis, drawn, "command")
    (table,) = [block for block in blocks if isinstance(block, Table) and "every combination" in (block.caption or "")]
    assert len(table.rows) == 24 and sum("the protocol" in row for row in table.rows) == 1
    assert any(isinstance(block, Figures) and block.files[0][0] == drawn[0] for block in blocks)
    assert "Would other choices say the same?" in to_markdown(blocks, tmp_path)
