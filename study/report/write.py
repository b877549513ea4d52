"""The report's files: figures, HTML and Markdown."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from diffvit.ledger.disk import write_atomically
from diffvit.protocol import ARMS, model_title
from study.report.analysis import Analysis, analyse
from study.report.attention_figures import attention_curves, attention_pictures
from study.report.choices import draw_choices
from study.report.document import to_html, to_markdown
from study.report.drawing import our_style, save
from study.report.figures import draw_figures
from study.report.interactive import curves_section
from study.report.noise_figures import in_common, noise_figure
from study.report.page import page
from study.report.verdict import Answer
from study.table import step_table


def write_report(
    checkpoints: Path, table: pd.DataFrame, out: Path, commands: Sequence[str], arms: Sequence[str] = ARMS, price: float | None = None
) -> tuple[list[Path], list[Answer]]:
    """Analyse finished runs, draw their figures and write report.html, report.md and looks.json, which counts the looks.

    Args:
        table: a run table that is not empty. out: a folder. commands: lines that reproduce its runs.
        price: dollars an hour of one GPU. arms: the architectures that are compared, the baseline first.

    Returns:
        The page in both forms, and its answers.
    """
    analysis = analyse(table, checkpoints, arms, looks=out / "looks.json")
    steps = step_table(checkpoints, table)
    figures = draw_figures(table, steps, out / "figures", arms=arms) + _draw_findings(analysis, out / "figures")
    figures += draw_choices(analysis.choices, out / "figures")
    blocks = page(analysis, figures, "\n".join(commands), curves_section(table, steps), price)
    html, markdown = out / "report.html", out / "report.md"
    write_atomically(html, to_html(blocks, f"{analysis.challengers} against {model_title(arms[0])}").encode())
    write_atomically(markdown, to_markdown(blocks, out).encode())
    return [html, markdown], analysis.answers


def _draw_findings(analysis: Analysis, out: Path) -> list[Path]:
    """Figures of what `evaluate` found."""
    corrupted = analysis.findings_of("corruptions")
    attended = analysis.findings_of("attention")
    written: list[Path] = []
    with our_style():
        for part in analysis.subjects:
            stem = part.stem
            if part.table["run_id"].isin(list(corrupted)).any():
                written += save(noise_figure(part.table, corrupted, part.name), out / f"{stem}_noise")
            runs = part.table[part.table["run_id"].isin(list(attended))]
            if len(runs):
                written += save(attention_curves(runs, attended, part.name), out / f"{stem}_attention")
            if len(shared := in_common(runs)):
                with contextlib.suppress(ValueError):  # models that were shown different pictures have none to compare
                    pictures = attention_pictures(_side_by_side(shared, attended), f"{part.name}: where the largest models look")
                    written += save(pictures, out / f"{stem}_attention_maps")
    return written


def _side_by_side(runs: pd.DataFrame, attended: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Model -> findings, of the largest size and first seed of runs that the models have in common."""
    largest = runs.sort_values(["parameters", "seed"], ascending=[False, True]).iloc[0]
    chosen = runs[(runs["size"] == largest["size"]) & (runs["seed"] == largest["seed"])]
    return {str(run.model): attended[str(run.run_id)] for run in chosen.itertuples()}
