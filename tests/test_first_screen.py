"""The page's first screen: a line a question, whose picture has the interval where the axis says, and what was asked of what."""

from __future__ import annotations

import math
import re

import pandas as pd
import pytest
from tables import study_table

from study.report.analysis import analyse
from study.report.document import Contents, Facts, Findings, Heading
from study.report.first import first_screen
from study.report.interval import axis_picture, half_width, interval_picture
from study.report.sentences import sentence
from study.report.verdict import MARGIN

BETTER, WORSE, EQUIVALENT = {"level": -0.12, "spread": 0.008}, {"level": 0.12, "spread": 0.008}, {"spread": 0.003, "seeds": 5}


@pytest.mark.parametrize(
    ("options", "verdict", "kind", "mark", "shape"),
    [
        (BETTER, "better", "better", "▲", "l7 12h-14z"),
        (WORSE, "worse", "worse", "▼", "l7 -12h-14z"),
        (EQUIVALENT, "equivalent", "equivalent", "■", "h11v11h-11z"),
        ({"spread": 0.05}, "undecided", "open", "○", "<circle"),
        ({"seeds": 1}, "no interval", "open", "○", "<circle"),
    ],
)
def test_a_verdict_has_a_colour_and_a_shape_and_its_whole_sentence(options: dict, verdict: str, kind: str, mark: str, shape: str) -> None:
    analysis = analyse(study_table(**options), None)
    heading, facts, findings, contents = first_screen(analysis, "uv run run.py study --grid full")
    assert isinstance(heading, Heading) and isinstance(facts, Facts) and isinstance(findings, Findings) and isinstance(contents, Contents)
    first, *_, noise = findings.rows
    assert (first.verdict, first.kind, first.mark, first.sentence) == (verdict, kind, mark, sentence(analysis.answers[0]))
    assert shape in first.picture and mark in findings.key and noise.verdict == "not measured" and not noise.picture
    assert ("stroke-dasharray" in first.picture) == (verdict == "no interval")  # what no effect would produce


def test_intervals_lie_where_the_axis_says() -> None:
    answers = analyse(pd.concat([study_table(**BETTER), study_table(seed=2, dataset="digits", images=359, spread=0.02)]), None).answers
    half = half_width(answers)

    def expected(value: float) -> float:
        return 160 + 146 * value / half

    for answer in answers:
        picture = interval_picture(answer, half)
        low, high = (float(x) for x in re.search(r"M([\d.]+) 13H([\d.]+)", picture).groups())
        assert (low, high) == pytest.approx([expected(end) for end in answer.estimate.interval], abs=0.06)
        band = [float(x) for x in re.search(r'<rect x="([\d.]+)" y="0" width="([\d.]+)"', picture).groups()]
        assert band == pytest.approx([expected(math.log(1 - MARGIN)), 146 * math.log((1 + MARGIN) / (1 - MARGIN)) / half], abs=0.11)
    for x, sign, percent in re.findall(r'<text x="([\d.]+)" y="29"[^>]*>([−+])(\d+) %<', axis_picture(half, "Differential ViT")):
        assert float(x) == pytest.approx(expected(math.log1p((-1 if sign == "−" else 1) * int(percent) / 100)), abs=0.06)


def test_what_is_beyond_the_axis_ends_in_an_arrow() -> None:
    answers = analyse(study_table(spread=2.0), None).answers
    half = half_width(answers)
    low, high = answers[1].estimate.interval
    assert low < -half and high > half
    picture = interval_picture(answers[1], half)
    assert picture.count("l-9 -5v10z") == picture.count("l9 -5v10z") == 1 and "8V18" not in picture
    assert all(0 <= float(x) <= 320 for x in re.findall(r"M([\d.]+) ", picture))


def test_the_facts_are_those_of_the_runs() -> None:
    table = pd.concat([study_table(), study_table(dataset="digits", seeds=1)], ignore_index=True)
    table.loc[0, "status"], table["device"], table["git_commit"] = "diverged", "cuda", "5569e65316678df5f87cfec0be6f28cf8acd9d8b+"
    table["started"], table["finished"] = "2026-11-27T22:03:49+00:00", "2026-11-28T05:13:00+00:00"
    analysis, command = analyse(table, None), "uv run run.py study --grid full --seeds 3\nuv run run.py report"
    facts = dict(first_screen(analysis, command)[1].rows)
    assert facts["asked"] == "`uv run run.py study --grid full --seeds 3`"
    assert facts["of"] == "Classic ViT, Differential ViT, on CIFAR-100 and digits (9.75 M, 24.8 M, 50 M parameters)"
    assert facts["runs"] == "24, 1 to 3 seeds a model and size; 1 diverged"
    assert facts["when"] == "2026-11-27 22:03 to 2026-11-28 05:13 UTC"
    assert facts["cost"] == f"{table['seconds'].sum() / 3600:.3g} GPU hours on a GPU" and "commit 5569e65316+" in facts["code"]
    priced = dict(first_screen(analysis, command, price=2.5)[1].rows)["cost"]
    assert priced == f"{facts['cost']}; training cost about ${2.5 * table['seconds'].sum() / 3600:,.2f} at $2.5 a GPU hour"
