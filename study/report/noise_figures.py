"""Error under corruption, an architecture a line: over severity for each corruption, and pooled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import study.report.drawing  # noqa: F401  (first: it sees to how matplotlib is imported)

# isort: split
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from diffvit.data.corruptions import CORRUPTIONS
from study.report.figures import add_caption, model_style, model_title


def noise_figure(runs: pd.DataFrame, findings: Mapping[str, Mapping[str, Any]], name: str) -> Figure:
    """Error in % over severity, a panel a corruption, means over sizes and seeds; severity 0 is the clean test set.

    Args:
        runs: rows of a run table; sizes and seeds that not all architectures have are left out.
        findings: run_id -> what evaluate_corruptions found; other runs are left out.
        name: of the data set, for the title.
    """
    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    panels = figure.subplots(2, 3, sharey=True, sharex=True).ravel()
    runs = runs[runs["run_id"].isin(list(findings))]
    # Means over other sizes or seeds would compare those.
    models = runs["model"].nunique()
    runs = runs[runs.groupby(["size", "seed"])["model"].transform("nunique") == models]
    for axes, corruption in zip(panels, CORRUPTIONS, strict=False):
        for model, of_model in runs.groupby("model", sort=False):
            curves = np.asarray([_errors(findings[run_id], corruption) for run_id in of_model["run_id"]])
            style = {**model_style(str(model)), "markersize": 4, "linewidth": 1.8, "label": model_title(str(model))}
            axes.plot(range(curves.shape[1]), 100 * curves.mean(axis=0), **style)
        axes.set_title(corruption, fontsize=10)
    for axes in panels[3:]:
        axes.set_xlabel("severity (0: clean)")
    for axes in panels[::3]:
        axes.set_ylabel("test error (%)")
    last = panels[len(CORRUPTIONS)]
    last.axis("off")
    last.legend(*panels[0].get_legend_handles_labels(), loc="center", frameon=False)
    figure.suptitle(f"{name}: test error under corruption", x=0.01, ha="left", fontsize=11.5, fontweight="bold")
    add_caption(figure, f"mean over {runs['size'].nunique()} sizes and {runs['seed'].nunique()} seeds; CIFAR-C's constants")
    return figure


def _errors(found: Mapping[str, Any], corruption: str) -> list[float]:
    """Clean error, then by severity."""
    own = sorted((each for each in found["conditions"] if each["corruption"] in ("clean", corruption)), key=lambda each: each["severity"])
    return [1 - each["accuracy"] for each in own]
