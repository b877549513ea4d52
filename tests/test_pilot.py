"""The pilot: what is made of its runs says that they are not the protocol's, and the full study takes its spread."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from tables import study_table

from diffvit.ledger.spec import overrides_title
from study.grid import GRIDS
from study.report import power
from study.report.analysis import analyse
from study.report.card import card_text
from study.report.document import to_markdown
from study.report.figures import scaling_figure
from study.report.page import page
from study.results import table_text
from study.table import run_table

pytestmark = pytest.mark.usefixtures("made_up_starts")

SAID = "pilot: patches of 28, not the protocol's 8"
PILOT = study_table(overrides="patch_size=28", spread=0.05)


@pytest.mark.parametrize(
    ("dataset", "overrides", "title"),
    [
        ("CIFAR-100", "", ""),
        ("CIFAR-100", "patch_size=28", SAID),
        ("CIFAR-100", "epochs=5 lr=0.001 patch_size=28", f"{SAID}; epochs=5, lr=0.001"),
        ("CIFAR-100", "patch_size=16", "patches of 16, not the protocol's 8"),
        ("CIFAR-100", "image_size=112 patch_size=28", "images of 112, not the protocol's 224; patches of 28, not the protocol's 8"),
        ("BACH", "patch_size=32", "patches of 32, not the protocol's 16"),
        ("digits", "label_noise=0.2", "label_noise=0.2"),
        ("somebody's own", "patch_size=32", "patches of 32"),
    ],
)
def test_a_title_says_other_tokens_in_words(dataset: str, overrides: str, title: str) -> None:
    assert overrides_title(dataset, overrides) == title


def test_figure_table_card_and_report_say_that_they_are_the_pilots() -> None:
    assert scaling_figure(PILOT, overrides="patch_size=28").axes[0].get_title().endswith(f"\n{SAID}")
    assert f"note: CIFAR-100: {SAID}" in table_text(PILOT)
    card = card_text("somebody/results", PILOT, [], [])
    assert f"**CIFAR-100: {SAID}**." in card
    assert all(f", {SAID} (" in model["name"] for model in yaml.safe_load(card.split("---")[1])["model-index"])
    text = to_markdown(page(analyse(PILOT, None), [], ""), Path())
    assert f"CIFAR-100 ({SAID}): 65 tokens instead of 785. It shows how the architectures compare" in text
    own = card_text("somebody/results", PILOT.replace({"model": {"vit_classic": "Idea-12345678"}}), [], [])
    assert "trust=True)" in own and "look at it first" in own and "executes nothing" not in own
    assert "trust=True)" not in card and "executes nothing" in card
    usual = study_table()
    said = (table_text(usual), card_text("somebody/results", usual, [], []), scaling_figure(usual).axes[0].get_title())
    assert not any("not the protocol" in each for each in said)


def test_power_of_the_full_study_has_the_pilots_spread_until_it_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    own = run_table(Path("nowhere"))
    monkeypatch.setattr(power, "run_table", lambda _, specs: PILOT if specs[0].overrides else own)
    monkeypatch.setattr(power, "SEEDS", (2, 50))
    monkeypatch.setattr(power, "_STUDIES", 200)

    def said(grid: str = "full") -> tuple[dict[str, float], str]:
        rows = power.power_rows(Path("nowhere"), GRIDS[grid].runs(), 0.02)
        return {row["dataset"]: row["spread"] for row in rows}, power.power_text(rows, 0.02)

    spreads, text = said()
    assert spreads["CIFAR-100"] == said("pilot")[0]["CIFAR-100"] > 0.03 and "% from seed to seed (measured on 9 pairs of the pilot)" in text
    assert spreads["BACH"] == power.assumed_spread("BACH") and "BACH: " in text and "(assumed: no cell has two seeds yet)" in text
    own = study_table(spread=0.01)
    spreads, text = said()
    assert spreads["CIFAR-100"] < 0.02 and "(measured on 9 pairs)" in text
