"""What the predictions of finished models say beside their accuracy: balance, calibration, and whether the figures are plausible."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from diffvit.protocol import model_title
from study.report.analysis import Analysis, Subject
from study.report.document import Block, Heading, Items, Paragraph, Table
from study.report.figures import millions

# Balanced accuracy of a frozen, randomly initialised ViT-S/16 under a trained linear head: kaiko's eva, whose test images are ours.
_NOTHING_LEARNT = {"BACH": 0.41}

# Test accuracy that plain ViTs from scratch without a strong recipe have in the literature, from, to; and what none of them reaches.
_EXPECTED = {"CIFAR-100": (0.35, 0.50, 0.60)}


def predictions_section(analysis: Analysis) -> list[Block]:
    """Balanced accuracy and calibration of every cell, and a sentence for what should not be taken at face value."""
    blocks: list[Block] = []
    for part in analysis.subjects:
        done = part.table[part.table["status"] == "done"]
        if warnings := [*_learnt_nothing(part, done), *_implausible(part, done), *_near_duplicates(part, done)]:
            blocks.append(Items(warnings))
        if done["balanced_accuracy"].notna().any():
            blocks.append(_table(part.name, done))
    return [Heading("What the predictions are worth"), Paragraph(_TEXT), *blocks] if blocks else []


_TEXT = (
    "Balanced accuracy is the mean over classes of the share classified correctly; the majority answer gives every image the commonest "
    "class. Calibration error (ECE, 15 bins of equal width) is the mean gap between a model's confidence in its answers and "
    "their accuracy, its interval from resampled test images; few images make it large by chance, so what a perfectly calibrated model of "
    "the same confidences would show stands beside it. The Brier score runs from 0 (certain and right) to 2 (certain and wrong). Each "
    "figure is of one run, then the mean over seeds."
)


def _table(name: str, done: pd.DataFrame) -> Table:
    rows, doubles = [], int(done["near_duplicates"].fillna(0).max())
    for (parameters, model), cell in done.groupby(["parameters", "model"]):
        means = cell.mean(numeric_only=True)
        ece = f"{_percent(means['ece'])} ({_percent(means['ece_low'], '')} to {_percent(means['ece_high'], '')})"
        measured = [ece, _percent(means["ece_by_chance"]), f"{means['brier']:.3f}"] if means.notna()["ece"] else [""] * 3
        shares = [_percent(means[column]) for column in ("test_accuracy", "balanced_accuracy")]
        errors = [_percent(1 - means[column]) for column in ("test_accuracy", "distinct_accuracy")] if doubles else []
        rows.append([f"{model_title(str(model))}, {millions(parameters)}", *shares, *errors, *measured])
    errors = ["error", "error without near-duplicates"] if doubles else []
    header = ["model", "accuracy", "balanced accuracy", *errors, "ECE (95 % interval)", "ECE by chance", "Brier score"]
    return Table(header, rows, f"{name}: the majority answer has {_percent(done['majority_answer'].mean())} accuracy")


def _near_duplicates(part: Subject, done: pd.DataFrame) -> list[str]:
    """How many test images resemble training images, or that this is not known."""
    if part.dataset != "CIFAR-100" or done.empty:
        return []
    judged = "of 10,000 test images Barz and Denzler (arXiv 1902.00423) judged 891 by eye to have near-duplicates in training"
    if done["near_duplicates"].isna().any():
        return [f"{part.name}: {judged}, which flatters all accuracies; predictions of some runs do not say which."]
    return [f"{part.name}: {done['near_duplicates'].max():,.0f} of the test images used here have near-duplicates in training; {judged}."]


def _learnt_nothing(part: Subject, done: pd.DataFrame) -> list[str]:
    """A sentence for runs that are no better than a constant answer, or than a network that was never trained."""
    sentences = []
    constant = done[done["test_accuracy"] <= done["majority_answer"]]
    if len(constant):
        share = _percent(constant["majority_answer"].iloc[0])
        sentences.append(f"{part.name}: {_runs(constant)} learnt nothing: always giving the commonest class has {share} accuracy.")
    if part.dataset in _NOTHING_LEARNT:
        bar = _NOTHING_LEARNT[part.dataset]
        below = done[done["balanced_accuracy"] <= bar]
        source = (
            f"a frozen, randomly initialised ViT-S/16 under a linear head has {bar:.2f} balanced accuracy on these images (kaiko's eva)"
        )
        if len(below):
            sentences.append(f"{part.name}: {_runs(below)} learnt nothing that counts: {source}.")
        elif len(done):
            sentences.append(f"{part.name}: for comparison, {source}; a run at or below it would have learnt nothing.")
    return sentences


def _implausible(part: Subject, done: pd.DataFrame) -> list[str]:
    """What accuracies to expect, and which runs are above the plausible."""
    if part.dataset not in _EXPECTED or done.empty:
        return []
    low, high, highest = _EXPECTED[part.dataset]
    sentences = [f"{part.name}: plain ViTs from scratch without augmentation have {100 * low:.0f} to {100 * high:.0f} % in the literature."]
    above = done[done["test_accuracy"] > highest]
    if len(above):
        doubt = "look for test images in training before believing them"
        sentences.append(
            f"{part.name}: {_runs(above)} above {100 * highest:.0f} % accuracy, which this protocol should not reach: {doubt}."
        )
    return sentences


def _runs(runs: pd.DataFrame) -> str:
    """Which runs, by cell."""
    cells: Sequence[str] = [
        f"{model_title(str(model))} {millions(parameters)} ({len(cell)} run{'s' if len(cell) > 1 else ''})"
        for (parameters, model), cell in runs.groupby(["parameters", "model"])
    ]
    return ", ".join(cells)


def _percent(share: float, unit: str = " %") -> str:
    return f"{100 * share:.1f}{unit}" if share == share else ""
