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
from diffvit.protocol import model_title
from study.report.figures import add_caption, model_style


def noise_figure(runs: pd.DataFrame, findings: Mapping[str, Mapping[str, Any]], name: str) -> Figure:
    """Error in % over severity, a panel a corruption, means over sizes and seeds; severity 0 is the clean test set.

    Bars are one standard deviation over seeds, of the mean over sizes.

    Args:
        runs: rows of a run table; sizes and seeds that not all architectures have are left out.
        findings: run_id -> what evaluate_corruptions found; other runs are left out.
        name: of the data set, for the title.
    """
    figure = Figure(figsize=(8.4, 5.6), layout="constrained")
    panels = figure.subplots(2, 3, sharey=True).ravel()
    runs = in_common(runs[runs["run_id"].isin(list(findings))])
    models = runs["model"].nunique()
    for axes, corruption in zip(panels, CORRUPTIONS, strict=False):
        for place, (model, of_model) in enumerate(runs.groupby("model", sort=False)):
            curves = pd.DataFrame([_errors(findings[run_id], corruption) for run_id in of_model["run_id"]], of_model["seed"])
            by_seed = 100 * curves.groupby(level=0).mean()
            x = np.arange(by_seed.shape[1]) + 0.1 * (place - (models - 1) / 2)  # bars beside each other
            bars = by_seed.std() if len(by_seed) > 1 else None
            style = {**model_style(str(model)), "markersize": 3.5, "linewidth": 1.3, "label": model_title(str(model))}
            axes.errorbar(x, by_seed.mean(), yerr=bars, elinewidth=1, capsize=2, **style)
        axes.set_title(corruption, fontsize=10)
        axes.set_xticks(range(6))
        axes.set_xlabel("severity (0: clean)")
        axes.set_ylabel("test error (%)")
        axes.tick_params(labelleft=True)
    last = panels[len(CORRUPTIONS)]
    last.axis("off")
    last.legend(*panels[0].get_legend_handles_labels(), loc="center", frameon=False)
    figure.suptitle(f"{name}: test error under corruption", x=0.01, ha="left", fontsize=11.5, fontweight="bold")
    sizes, seeds = (runs[what].nunique() for what in ("size", "seed"))
    bars_are = "1 seed, so no bars" if seeds == 1 else f"bars: ± 1 standard deviation over {seeds} seeds"
    add_caption(figure, f"{f'mean over {sizes} sizes' if sizes > 1 else '1 size'}; {bars_are}; CIFAR-C's constants")
    return figure


def in_common(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs of sizes and seeds that all architectures have, since means over others would compare those.

    An architecture that shares none with the one that has most runs is left out.
    """
    cells = {model: set(zip(of_model["size"], of_model["seed"], strict=True)) for model, of_model in runs.groupby("model", sort=False)}
    most = max(cells.values(), key=len, default=set())
    kept = {model: own for model, own in cells.items() if own & most}
    shared = set.intersection(most, *kept.values())
    is_shared = [cell in shared for cell in zip(runs["size"], runs["seed"], strict=True)]
    return runs[runs["model"].isin(list(kept)) & np.asarray(is_shared, dtype=bool)]


def _errors(findings: Mapping[str, Any], corruption: str) -> list[float]:
    """Clean error, then by severity."""
    conditions = [condition for condition in findings["conditions"] if condition["corruption"] in ("clean", corruption)]
    return [1 - condition["accuracy"] for condition in sorted(conditions, key=lambda condition: condition["severity"])]
