"""The report: what the page says, in HTML and in Markdown, and how it looks in a browser."""

from __future__ import annotations

import base64
import html
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tables import study_table

from diffvit.train import train
from study.grid import find_grid
from study.report import sentences
from study.report.analysis import analyse
from study.report.document import Code, Contents, Facts, Figures, Finding, Findings, Heading, Items, Paragraph, Table, to_html, to_markdown
from study.report.page import page

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


pytestmark = pytest.mark.usefixtures("made_up_starts")


def _text(page_html: str) -> str:
    """What a person reads."""
    body = re.sub(r"<(style|script)\b.*?</\1>", "", page_html, flags=re.DOTALL)
    body = body.replace("\N{NO-BREAK SPACE}", " ").replace("\N{MINUS SIGN}", "-")
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


def _page(table: pd.DataFrame) -> str:
    return _text(to_html(page(analyse(table, None), [], "uv run run.py study"), "report"))


def test_every_place_says_the_same_hours_of_all_workers() -> None:
    table = study_table().assign(workers=2.0, device="cuda:0")
    assert _page(table).count(f"{2 * table['seconds'].sum() / 3600:.3g} GPU hours") == 3  # above, for a paper, and to reproduce it


@pytest.mark.parametrize(
    ("options", "claims"),
    [
        ({"level": -0.05, "trend": -0.08, "spread": 0.008}, ("has a lower error than", "scales better with depth than")),
        ({"spread": 0.003, "seeds": 5}, ("are equivalent at these sizes", "scale alike with depth")),
        ({"spread": 0.05}, ("is undecided", "would have been found with a probability of 80 %")),
        ({"seeds": 1}, ("no interval (1 seed)", "No effect at all would produce")),
    ],
)
def test_the_page_opens_with_the_verdict(options: dict, claims: tuple[str, str]) -> None:
    text = _page(study_table(**options))
    opening = text[: text.index("The rule, fixed before the data")]
    for claim in claims:
        assert claim in opening
    assert "Whether noise changes the difference has not been measured here." in opening


def test_the_page_names_what_it_does_not_show() -> None:
    table = study_table(dataset="BACH", images=132)
    table.loc[0, "status"], table["steps"], table["flags"] = "diverged", 400, "runs of this cell differ in device_name: a / b"
    text = _page(table)
    limits = text[text.index("What this does not show") :]
    assert "BACH: warm-up (500 steps) is not shorter than the run (400 steps)" in limits
    assert re.search(r"with 132 test images a single accuracy near \d+ % is uncertain by 8\.\d points", limits)
    assert "so that nothing is known of its spread" not in limits and "one seed for some model and size" in _page(study_table(seeds=1))
    assert "differential attention has 3 heads here" in limits
    assert "do not start alike, though all shared weights do: BACH 10B (0.32)" in text
    assert "differ in device_name: a / b" in limits and "--grid lr" in limits
    assert "Classic ViT 10B seed 0 diverged" in text and "(+1 diverged)" in text


def test_false_labels_and_other_conditions_have_their_place() -> None:
    noisy = study_table(overrides="label_noise=0.4", seed=1)
    noisy["false_labels"], noisy["memorised"], noisy["recovered"] = 18_000, 0.25, 0.5
    text = _page(pd.concat([study_table(), noisy], ignore_index=True))
    assert "CIFAR-100 (label_noise=0.4)" in text and "18000" in text and "25.0 %" in text and "50.0 %" in text
    assert "Noise in images and noise in labels are different things" in text


def test_each_arm_is_compared_at_its_own_best_learning_rate() -> None:
    # At the protocol's rate the differential arm is worse; at three times the rate it is better, and the classic one is not.
    plain, higher = study_table(level=0.1, spread=0.005), study_table(level=-0.1, spread=0.005, overrides="lr=0.0003", seed=1)
    plain["val_accuracy"] = np.where(plain["model"] == "vit_classic", 0.6, 0.5)
    higher["val_accuracy"] = np.where(higher["model"] == "vit_classic", 0.4, 0.7)
    higher.loc[higher["model"] == "vit_classic", "test_accuracy"] -= 0.2
    text = _page(pd.concat([plain, higher], ignore_index=True))
    section = text[text.index("Learning rates") :]
    for model, size, *accuracies in (("Classic ViT", "10B", 60, 40), ("Differential ViT", "50B", 50, 70)):
        cells = r" \([\d.]+ to [\d.]+\) ".join(f"{accuracy}.00 %" for accuracy in accuracies)
        assert re.search(f"{model}, {size} {cells}", section)
    number = re.search(r"chosen on the validation split: difference in test error ([-+]\d+\.\d) %", section)
    assert number and float(number[1]) == pytest.approx(-9.5, abs=1.5)
    assert "has a higher error than" in text[: text.index("The rule")]


def test_both_forms_say_the_same_and_html_needs_nothing_else(tmp_path: Path) -> None:
    picture = tmp_path / "figures" / "a.png"
    picture.parent.mkdir()
    picture.write_bytes(b"\x89PNG")
    blocks = [
        Heading("A <title> & more", 1), Contents(), Facts([("asked", "now")]), Findings([Finding("better", "▲", "better", "q?", "a -2 %", "-2 %", "<svg/>")], "<svg/>"),
        Heading("Part 1: one"), Paragraph("on 2026-11-28 at -0.5 of 1e-05, see `run.py <x>`"), Items(["one", "two"]), Code("run.py study"),
        Table(["x", "y | z"], [["1", "-2"]], "numbers", closed=True), Figures([(picture, "a picture")]), Code("a,b", "rows", "rows.csv"),
    ]  # fmt: skip
    markdown, page_html = to_markdown(blocks, tmp_path), to_html(blocks, "t")
    opening = "# A <title> & more\n\n- [Part 1: one](#part-1-one)\n\n- asked: now\n\n- ▲ **better.** a −2 %\n\n## Part 1: one\n\n"
    assert markdown.startswith(opening + "on 2026-11-28 at −0.5 of 1e-05, see `run.py <x>`\n\n- one\n- two\n\n```\nrun.py study\n```")
    assert "| x | y / z |\n| --- | ---: |\n| 1 | −2 |" in markdown and "![a picture](figures/a.png)" in markdown
    assert "A &lt;title&gt; &amp; more" in page_html and "data:image/png;base64,iVBORw==" in page_html
    assert "at −0.5 of 1e-05, see <code>run.py &lt;x&gt;</code>" in page_html
    assert '<a href="#part-1-one">Part 1: one</a>' in page_html and '<h2 id="part-1-one">' in page_html and page_html.count("<svg/>") == 2
    link = re.search(r'download="rows.csv" href="data:text/plain;charset=utf-8;base64,([^"]+)"', page_html)
    assert link and base64.b64decode(link[1]) == b"a,b" and "rows: in report.html" in markdown
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", page_html) and "<script" not in page_html


def test_a_percentage_keeps_its_sign() -> None:
    assert [sentences.percent(value) for value in (-0.0202, 0.0, 0.1)] == ["-2.0 %", "+0.0 %", "+10.5 %"]


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_real_runs_become_a_page_that_fits_wide_and_narrow_screens(tmp_path: Path, cli) -> None:
    (tmp_path / "small.yaml").write_text("datasets: [digits, digits-noisy]\nsizes: [small, medium]\nseeds: 2\noverrides: {max_steps: 9}\n")
    for spec in find_grid("small.yaml").runs():
        train(spec, tmp_path / "checkpoints", device="cpu")
    for command in ("evaluate --grid small.yaml --corruptions --attention --device cpu", "report --grid small.yaml"):
        done = cli(*command.split())
        assert done.code == 0, done.err
    report = tmp_path / "checkpoints" / "small_report"
    assert done.out.split() == ["checkpoints/small_report/report.html", "checkpoints/small_report/report.md"]
    text = _text((report / "report.html").read_text())
    assert "On digits-noisy" in text and "pairs)" in text and "gaussian" in text and "Where attention goes" in text
    for link in re.findall(r"!\[[^]]*\]\(([^)]+)\)", (report / "report.md").read_text()):
        assert (report / link).is_file()
    for width in (1280, 400):
        # The page says itself how wide it is; a figure or table that is wider must scroll in its own box.
        probe = report / f"probe{width}.html"
        probe.write_text((report / "report.html").read_text() + "<script>document.title = document.documentElement.scrollWidth</script>")
        frame = report / f"frame{width}.html"
        frame.write_text(f'<iframe id="f" style="border:0;width:{width}px;height:3000px" src="{probe.name}"></iframe>')
        shot = report / f"shot{width}.png"
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files",
                 "--virtual-time-budget=5000"]  # fmt: skip
        seen = subprocess.run([str(BROWSER), *flags, f"--window-size={width},3000", f"--screenshot={shot}", f"file://{report / 'report.html'}"],
                              capture_output=True, timeout=120)  # fmt: skip
        assert seen.returncode == 0 and shot.stat().st_size > 20_000
        frame.write_text(frame.read_text() + "<script>f.onload = () => document.title = f.contentDocument.title</script>")
        dom = subprocess.run([str(BROWSER), *flags, "--window-size=1400,3100", "--dump-dom", f"file://{frame}"], capture_output=True, text=True,
                             timeout=120)  # fmt: skip
        title = re.search(r"<title>(\d+)</title>", dom.stdout)
        assert title and int(title[1]) <= width, f"the page is {title and title[1]} pixels wide on a screen of {width}"
    if kept := os.environ.get("DIFFVIT_KEEP_REPORT"):  # to look at it
        shutil.copytree(report, kept, dirs_exist_ok=True)
