"""What `evaluate` found, and what noise in training did: the sections on noise and on where attention goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from diffvit.data.corruptions import CORRUPTIONS
from diffvit.findings.robustness import summarise
from diffvit.protocol import model_title
from study.report.analysis import Analysis, Subject
from study.report.document import Block, Figures, Heading, Paragraph, Table
from study.report.figures import with_wilson
from study.report.sentences import between, relative


def noise_section(analysis: Analysis, figures: Sequence[Path]) -> list[Block]:
    """Other noise than the question's, false labels, and errors on corrupted test images.

    Args:
        figures: PNG files among these are shown, by the names that write.py gives.
    """
    blocks: list[Block] = []
    if analysis.other_noise:
        rows = []
        for what, answer in analysis.other_noise:
            resampled = between(answer.new_images) if answer.new_images else ""
            of = f"{what}, {model_title(answer.arms[1])}" if analysis.several else what
            rows.append([of, relative(answer.estimate), resampled, str(answer.pairs)])
        change = "change of the difference in odds of an error (95 % interval)"
        header = ["compared with clean", change, "seeds and images resampled (95 % interval)", "pairs"]
        blocks.append(Table(header, rows, "Other noise, exploratory"))
    labels = analysis.table[analysis.table["memorised"].notna()] if "memorised" in analysis.table else analysis.table.iloc[:0]
    if len(labels):
        rows = [
            [f"{model_title(model)}, {size}", str(overrides), f"{cell['false_labels'].mean():.0f}",
             *(f"{100 * cell[column].mean():.1f} %" for column in ("memorised", "recovered")),
             with_wilson(cell["test_accuracy"].mean(), cell["test_images"].min())]
            for (overrides, size, model), cell in labels.groupby(["overrides", "size", "model"], sort=False)
        ]  # fmt: skip
        header = ["model", "condition", "false labels", "memorised", "true label given", "clean test accuracy (95 % interval)"]
        blocks.append(Table(header, rows, "False training labels: what the final model answers for their images", left=2))
    evaluated = analysis.findings_of("corruptions")
    for part in analysis.subjects:
        runs = part.table[part.table["run_id"].isin(list(evaluated))]
        if runs.empty:
            continue
        names = [row["corruption"] for row in summarise(next(iter(evaluated.values())))]
        baseline = analysis.arms[0]
        lost = {key: _lost([evaluated[run_id] for run_id in cell["run_id"]]) for key, cell in runs.groupby(["size", "model"])}
        rows = []
        for (_, model), cell in runs.groupby(["parameters", "model"]):
            size = cell["size"].iloc[0]
            relative_mce = (
                f"{np.mean(lost[size, model] / lost[size, baseline]):.2f}"
                if (size, baseline) in lost and (lost[size, baseline] > 0).all()
                else ""
            )
            by_corruption = [{row["corruption"]: row for row in summarise(evaluated[run_id])} for run_id in cell["run_id"]]
            errors = [100 * float(np.mean([run[name]["error"] for run in by_corruption])) for name in names]
            clean = errors[names.index("clean")]
            to_clean = f"{errors[names.index('mean')] / clean:.2f}" if clean else ""
            title = f"{model_title(model)}, {cell['parameters'].iloc[0] / 1e6:.3g} M"
            rows.append([title, *(f"{error:.1f}" for error in errors), to_clean, relative_mce])
        caption = (
            f"{part.name}: error in % on corrupted test images, mean over severities and seeds; the five's mean also relative to clean; "
            "relative mCE: what the five add to the clean error, over what they add for "
            f"{model_title(baseline)} (Hendrycks and Dietterich 2019){_not_evaluated(part, runs)}"
        )
        blocks.append(Table(["model", *names, "mean / clean", "relative mCE"], rows, caption))
        drawn = [path for path in figures if path.name == f"{part.stem}_noise.png"]
        blocks += [Figures([(path, f"{part.name}: error under corruption, by severity") for path in drawn])] if drawn else []
    bach = _BACH if "BACH" in set(analysis.table["dataset"]) else ""
    return [Heading("Noise"), Paragraph(_NOISE_AXES.format(bach)), *blocks] if blocks else []


def _not_evaluated(part: Subject, runs: pd.DataFrame) -> str:
    """What a caption says where `evaluate` has not seen all finished runs, so that rows may be means over fewer seeds."""
    finished = int((part.table["status"] == "done").sum())
    return f"; {finished - len(runs)} of {finished} finished runs were not evaluated" if len(runs) < finished else ""


def _lost(evaluations: Sequence[dict[str, Any]]) -> np.ndarray:
    """What each of the five corruptions adds to the clean error, mean over runs. [5]"""
    by_run = [{row["corruption"]: row["error"] for row in summarise(each)} for each in evaluations]
    return np.mean([[errors[name] - errors["clean"] for name in CORRUPTIONS] for errors in by_run], axis=0)


_NOISE_AXES = (
    "Noise in images and noise in labels are different things. {}Corruptions have CIFAR-C's constants, which are for 32 pixels; in larger "
    "images noise has larger grains in proportion, and blur is wider by the square root of that."
)
_BACH = (
    "BACH is a case of the first: large images whose label rests on a small part, with the rest, stain and scanner as noise; its labels "
    "were agreed on by pathologists. "
)


def attention_section(analysis: Analysis, figures: Sequence[Path]) -> list[Block]:
    """Where attention goes, by data set; arguments as noise_section."""
    attended = analysis.findings_of("attention")
    blocks: list[Block] = []
    for part in analysis.subjects:
        runs = part.table[part.table["run_id"].isin(list(attended))]
        if runs.empty:
            continue
        rows = []
        for (_, model), cell in runs.groupby(["parameters", "model"]):
            cells = _attention_cells([attended[run_id] for run_id in cell["run_id"]])
            rows.append([f"{model_title(str(model))}, {cell['parameters'].iloc[0] / 1e6:.3g} M", *cells])
        first = attended[runs["run_id"].iloc[0]]
        header = ["model", "lambda", "entropy", "on object, noise", "on object, images", "logits top-1", "median", "hidden top-1", "median"]
        uniform = f"uniform attention: entropy {first['uniform_entropy']:.2f} nats, {100 * first['signal_area']:.0f} % on the object"
        blocks.append(
            Table(
                header,
                rows,
                f"{part.name}: mean over layers and seeds, {first['images']} test images; {uniform}{_not_evaluated(part, runs)}",
            )
        )
        stem = part.stem
        titles = {f"{stem}_attention": "entropy and share on the object, over depth", f"{stem}_attention_maps": "the last layer's maps"}
        blocks.append(
            Figures([(path, f"{part.name}: {titles[path.stem]}") for path in figures if path.suffix == ".png" and path.stem in titles])
        )
    return [Heading("Where attention goes"), Paragraph(_ATTENTION), *blocks] if blocks else []


_ATTENTION = (
    "From the exact maps of every layer: entropy of the class token's attention over the patches; the share of it that falls on the object "
    "when the image is pasted at a random place before noise or before other images; and the largest (top-1) and median absolute attention "
    "logits and hidden states. Differential maps have negative parts, so shares and entropies are those of absolute values."
)


def _attention_cells(findings: Sequence[dict[str, Any]]) -> list[str]:
    """Means over layers and runs; of top-1 the largest."""
    layers = [layer for of_run in findings for layer in of_run["layers"]]
    lambdas = [layer["lambda"] for layer in layers if layer["lambda"] is not None]
    cells = [f"{np.mean(lambdas):.2f}" if lambdas else "none", f"{np.mean([layer['entropy'] for layer in layers]):.2f}"]
    cells += [f"{100 * np.mean([layer['signal_share'][background] for layer in layers]):.1f} %" for background in ("noise", "images")]
    for what in ("attention_logits", "hidden_states"):
        cells += [f"{max(layer[what]['top1'] for layer in layers):.1f}", f"{np.mean([layer[what]['median'] for layer in layers]):.2f}"]
    return cells
