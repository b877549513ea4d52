"""The verdict on a terminal: its numbers are the page's, it fits 80 columns, and nothing that decides how to take it is missing."""

from __future__ import annotations

import itertools
import re

import pandas as pd
import pytest

from study.report import verdict
from study.report.analysis import analyse
from study.report.brief import brief
from study.report.sentences import between, percent, sentence
from study.text import folded
from tests.tables import study_table

NOISY = study_table(overrides="input_noise=0.1", seed=1, level=0.1)


def _brief(table: pd.DataFrame, arms: tuple[str, ...] = ("vit_classic", "vit_differential")) -> tuple[list, str]:
    answers = analyse(table, None, arms).answers
    return answers, brief(answers)


@pytest.mark.parametrize("level", [-0.2, 0.0, 0.2])
def test_each_question_has_a_line_with_its_verdict_and_numbers(level: float) -> None:
    answers, text = _brief(pd.concat([study_table(level=level), NOISY], ignore_index=True))
    lines = [line for line in text.splitlines() if line.startswith("  ")][1:]
    assert [answer.question for answer in answers] == ["level", "trend", "noise"] and len(lines) == 3
    for answer, line in zip(answers, lines, strict=True):
        assert answer.verdict in line and percent(answer.estimate.value) in line and between(answer.estimate.interval) in line
    assert text.startswith("Differential ViT against Classic ViT: negative numbers favour Differential ViT\n")
    assert "Holm's correction over 3 questions" in text
    for answer in answers:  # all that the page says beside the numbers, but for what would have been found
        rest = sentence(answer).partition(" pairs)")[2]
        assert rest.startswith("; under noise") == (answer.question == "noise")
        for said in re.findall(r"[A-Z][^.]*\.(?=\s|$)", re.sub(r"(\d)\.(\d)", r"\1·\2", rest)):
            told = said.replace("·", ".")
            expected = (
                "would have been found" in told or "lies within" in told or (answer.verdict == "undecided" and told in answer.remarks)
            )
            assert expected or told in text, told


def test_a_difference_that_is_small_and_turns_at_equal_cost_is_said_to() -> None:
    answers, text = _brief(study_table(level=-0.01, spread=0.001))
    assert answers[0].verdict == "better" and "By less than the margin of 2 %. " in text and "at equal FLOPs +" in text


def test_with_one_seed_it_says_what_no_effect_gives_in_place_of_an_interval() -> None:
    answers, text = _brief(study_table(seeds=1))
    (line,) = [line for line in text.splitlines() if "lower error  " in line]
    assert "no interval" in line and line.endswith(between((-answers[0].null_half, answers[0].null_half)))
    assert "95 %" not in text and "Holm" not in text and "no effect gives: what chance alone would produce, assuming" in text


def test_a_question_without_an_interval_stands_beside_others_that_have_one() -> None:
    table = pd.concat([study_table(), study_table(dataset="BACH", seeds=1)], ignore_index=True)
    _, text = _brief(table)
    assert (
        text.count(" none\n") == 2 and text.count(": No effect gives -") == 2 and text.count("\nBACH:\n") == text.count("CIFAR-100:\n") == 1
    )


def test_diverged_runs_and_reasons_are_said() -> None:
    table = study_table(level=-0.1, trend=-0.2, spread=0.005)
    table.loc[(table["model"] == "vit_differential") & (table["size"] == "50B"), "status"] = "diverged"
    _, text = _brief(table)
    assert "50B has no pair of finished, comparable runs." in text
    assert "3 of 9 runs of Differential ViT (3 at 50B)" in text and "With diverged runs counted at chance level: +" in text


def test_each_architecture_has_a_part_of_its_own() -> None:
    table = study_table()
    third = table[table["model"] == "vit_differential"].assign(model="vit_differential_v2", run_id=lambda runs: runs["run_id"] + "v2")
    _, text = _brief(pd.concat([table, third], ignore_index=True), ("vit_classic", "vit_differential", "vit_differential_v2"))
    titles = [line for line in text.splitlines() if " against " in line]
    assert len(titles) == 2 and titles[1].startswith("Differential ViT V2 against Classic ViT")
    assert "\nDifferential ViT V2 on CIFAR-100, lower error: " in text


@pytest.mark.parametrize(("spread", "seeds"), itertools.product((0.003, 0.05, 0.2), (1, 3)))
def test_its_lines_fit_80_columns(spread: float, seeds: int) -> None:
    noisy = study_table(overrides="input_noise=0.1", seed=1, spread=spread, seeds=seeds)
    _, text = _brief(pd.concat([study_table(spread=spread, seeds=seeds), noisy], ignore_index=True))
    assert max(map(len, folded(text, 80).splitlines())) <= 80


def test_its_longest_verdicts_fit_80_columns() -> None:
    table = pd.concat([study_table(level=-0.1, spread=0.005), study_table(dataset="BACH", seeds=1)], ignore_index=True)
    table.loc[(table["model"] == "vit_differential") & (table["size"] == "50B") & (table["dataset"] != "BACH"), "status"] = "diverged"
    answers, text = _brief(table)
    assert (
        verdict.DIVERGED in [answer.verdict for answer in answers] and "Counting the runs that diverged would change the verdict." in text
    )
    assert max(map(len, folded(text, 80).splitlines())) <= 80
