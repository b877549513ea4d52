"""The count of looks at a question: what a report read again must pay."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tables import study_table

from diffvit.errors import UserError
from study.report import sentences, verdict
from study.report.analysis import analyse
from study.report.brief import brief
from study.report.paper import latex_tables


def test_a_second_look_at_more_seeds_pays_and_a_second_report_of_the_same_does_not(tmp_path: Path) -> None:
    path = tmp_path / "report" / "looks.json"
    path.parent.mkdir()
    table = study_table(level=-0.05, spread=0.012, seeds=5)
    few = table[table["seed"] < 3]
    # One seed has no interval, and so is no look.
    assert [answer.look for answer in analyse(table[table["seed"] < 1], None, looks=path).answers] == [1, 1] and not path.exists()
    first, again, second = (analyse(each, None, looks=path).answers[0] for each in (few, few, table))
    assert first.look == again.look == 1 and first.verdict == again.verdict == "better" and first.p_holm == again.p_holm
    assert second.look == 2 and second.alpha == verdict.LATER / 2
    alone = analyse(table, None).answers[0]
    assert second.p_holm == pytest.approx(10 * alone.p_holm) and second.estimate == alone.estimate
    text = sentences.sentence(second)
    assert "99.5 % interval" in text and "This is look 2 at this question: it may spend 0.5 % where the first one had 5" in text
    # Columns of intervals say of which level they are, where that is one.
    looked = analyse(table, None, looks=path)
    assert "  99.5 % interval\n" in brief(looked.answers) and "& 99.5\\,\\% interval &" in latex_tables(looked)
    mixed = brief([first, *looked.answers[1:]])
    assert "  interval\n" in mixed and "% interval\n" not in mixed
    kept = json.loads(path.read_text())
    assert [(look["pairs"], look["seeds"]) for look in kept["level on CIFAR-100"]] == [(9, 3), (15, 5)]
    assert list(kept) == ["level on CIFAR-100", "trend on CIFAR-100"]


def test_a_second_look_at_two_seeds_says_that_little_could_be_found(tmp_path: Path) -> None:
    table = study_table(seeds=2, spread=0.002)
    large = (table["size"] == "50B") & (table["model"] == "vit_differential")
    table.loc[large, "test_accuracy"] += np.asarray([0.05, -0.05])
    analyse(table[table["size"] != "50B"], None, looks=tmp_path / "looks.json")
    texts = [sentences.sentence(answer) for answer in analyse(table, None, looks=tmp_path / "looks.json").answers]
    assert all("is undecided" in text and "Only a tenfold difference or more would have been found" in text for text in texts)


def test_an_answer_that_is_blocked_is_no_look(tmp_path: Path) -> None:
    path, table = tmp_path / "looks.json", study_table(trend=-0.12, spread=0.006)
    analyse(table[(table["size"] != "50B") | (table["model"] == "vit_classic")], None, looks=path)
    assert list(json.loads(path.read_text())) == ["level on CIFAR-100"]
    assert [answer.look for answer in analyse(table, None, looks=path).answers] == [2, 1]


def test_another_source_of_noise_is_another_look(tmp_path: Path) -> None:
    clean, twin = study_table(dataset="digits"), study_table(dataset="digits-noisy", seed=1)
    blurred = study_table(dataset="digits", overrides="input_noise=0.1", seed=2)
    first, second = (analyse(pd.concat(tables, ignore_index=True), None, looks=tmp_path / "looks.json").answers[-1]
                     for tables in ([clean, twin], [clean, twin, blurred]))  # fmt: skip
    assert (first.subject, first.look) == ("digits-noisy", 1) and (second.subject, second.look) == ("digits (input_noise=0.1)", 2)


def test_another_version_of_an_architecture_is_another_question(tmp_path: Path) -> None:
    for version in ("Idea-11111111", "Idea-22222222"):
        table = study_table(seed=int(version[-1])).replace({"model": {"vit_differential": version}})
        table["run_id"] += version
        answers = analyse(table, None, ("vit_classic", version), looks=tmp_path / "looks.json").answers
        assert [answer.look for answer in answers] == [1, 1]
    assert "level on CIFAR-100 of vit_classic and Idea-22222222" in json.loads((tmp_path / "looks.json").read_text())


def test_all_looks_together_spend_six_per_cent() -> None:
    assert verdict.alpha_of(1) == pytest.approx(0.05)
    assert sum(verdict.alpha_of(look) for look in range(1, 60)) == pytest.approx(0.06)


@pytest.mark.parametrize("content", ["", "[]", '{"level on CIFAR-100": [{"pairs": 9}]}', '{"level on CIFAR-100": 3}', "\ud800"])
def test_a_damaged_count_is_an_error_and_stays_as_it_is(tmp_path: Path, content: str) -> None:
    path = tmp_path / "looks.json"
    path.write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises(UserError, match=r"looks\.json is damaged"):
        analyse(study_table(), None, looks=path)
    assert path.read_bytes() == content.encode(errors="surrogatepass")
