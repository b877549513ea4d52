"""The user's figures: loss per batch, accuracy over size, and both architectures in one picture. PNG and SVG.

For each data set: training and validation loss per step for each architecture, all sizes in one plot; test accuracy over
model size for each architecture; and one overlay of all. Figures of one kind share their axes. Runs under overrides have
figures of their own, whose names and titles say them. Colours differ in lightness too, so that grey prints work, and
lines are named at their end.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from study.report.drawing import our_style, save

# isort: split
import numpy as np
import pandas as pd
from matplotlib.colors import LinearSegmentedColormap, to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from diffvit.ledger.spec import overrides_title, parse_overrides
from diffvit.protocol import ARMS, images_in_steps, in_order, model_title, protocol_of
from study.report import curves, scaling
from study.report.compare import pairs_of
from study.table import all_overrides, comparable, file_stem
from study.text import short_model

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Sizes: one hue, which no architecture has, light to dark. Architectures: a lightness of their own each, so that the common forms of colour
# blindness and grey prints tell them apart.
_SIZE_COLOURS = LinearSegmentedColormap.from_list("sizes", ["#C77BD9", "#8E35A3", "#450B54"])
_MODEL_STYLES: dict[str, dict[str, Any]] = {
    "vit_classic": {"color": "#1F3A6E", "marker": "o", "linestyle": "-"},
    "vit_differential": {"color": "#E07B39", "marker": "s", "linestyle": (0, (5, 1.5))},
    "vit_classic_wide_heads": {"color": "#8DB6DB", "marker": "^", "linestyle": (0, (6, 1.5, 1, 1.5))},
    "vit_classic_sub_norm": {"color": "#2E8B8B", "marker": "P", "linestyle": (0, (1, 1.2))},
    "vit_differential_v2": {"color": "#9C3432", "marker": "v", "linestyle": (0, (2, 1))},
}
# Own architectures: of each list, the entry that the hash in their name chooses, so that few of them look alike.
_OWN_STYLES: dict[str, list[Any]] = {
    "color": ["#6B7A89", "#B58900", "#5C8A3A", "#C2185B", "#0E8A8A"],
    "marker": ["D", "X", "*", "h", "P", "v", "<"],
    "linestyle": [":", (0, (4, 1, 1, 1)), (0, (3, 1))],
}
LOSSES = {"train_loss": "training", "val_loss": "validation"}


def draw_figures(runs: pd.DataFrame, steps: pd.DataFrame, out: Path, prefix: str = "", arms: Sequence[str] = ARMS) -> list[Path]:
    """All figures of all data sets in the tables.

    Args:
        runs: a run table, steps: its step table (see table.py).
        out: folder for {data set}_{what}.png and .svg, or {data set}_{overrides}_{what} (see file_stem in table.py); created if missing.
        prefix: what their names begin with. arms: the architectures that are compared, the baseline first.

    Returns:
        The files written.
    """
    out.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    with our_style():
        for (dataset, overrides), of_dataset in runs.groupby(["dataset", pd.Series(all_overrides(runs), index=runs.index)], sort=False):
            figures: dict[str, Figure] = {}
            models = in_order(of_dataset["model"])
            have_accuracy = []
            for model in models:
                of_model = of_dataset[of_dataset["model"] == model]
                for loss in LOSSES:
                    figures[f"{model}_{loss}"] = loss_figure(of_model, steps, loss, overrides, of_dataset)
                if (of_model["status"] == "done").any():
                    have_accuracy.append(model)
                    figures[f"{model}_scaling"] = scaling_figure(of_model, of_dataset, overrides)
            if len(have_accuracy) > 1:
                figures["scaling_overlay"] = scaling_figure(of_dataset, overrides=overrides, arms=arms)
            for name, figure in figures.items():
                written += save(figure, out / f"{prefix}{file_stem(str(dataset), str(overrides))}_{name}")
    return written


def loss_figure(runs: pd.DataFrame, steps: pd.DataFrame, loss: str, overrides: str = "", scale_like: pd.DataFrame | None = None) -> Figure:
    """Loss per batch of one architecture on one data set: the raw curves thin, their running mean over steps and seeds on top.

    Args:
        overrides: of the runs, as text; a second line of the title.
        scale_like: runs whose losses set both ranges, so that two figures can be compared.
    """
    model, dataset = runs["model"].iloc[0], runs["dataset"].iloc[0]
    figure, axes = _axes()
    ends, window = [], 1
    for size, of_size in runs.groupby("size", sort=False):
        colour = size_colour(dataset, size)
        curves = steps[steps["run_id"].isin(of_size["run_id"])].pivot(index="step", columns="run_id", values=loss)
        curves = curves.replace([np.inf, -np.inf], np.nan)
        for run_id in curves:
            axes.plot(curves.index, curves[run_id], color=colour, linewidth=0.5, alpha=0.4)
        window = smoothing_window(len(curves))
        smooth = running_mean(curves.mean(axis=1), window, batch_lengths(dataset, overrides, loss, curves.index))
        axes.plot(smooth.index, smooth, color=colour, linewidth=2.0)
        drawn = smooth.dropna()
        diverged = int((of_size["status"] == "diverged").sum())
        of_several = f"{diverged} of {len(of_size)} " if len(of_size) > 1 else ""
        name = millions(of_size["parameters"].iloc[0]) + (f" ({of_several}diverged)" if diverged else "")
        if len(drawn):
            ends.append((drawn.index[-1], drawn.iloc[-1], name, colour))
    shown = steps if scale_like is None else steps[steps["run_id"].isin(scale_like["run_id"])]
    losses = shown[loss].where((shown[loss] > 0) & (shown[loss] < np.inf))
    if losses.notna().any():
        axes.set_ylim(losses.min() / 1.1, losses.max() * 1.1)
    _log_loss_axis(axes)
    axes.set_xlim(0, shown["step"].max())
    axes.set_xlabel("training step (one batch each)")
    axes.set_ylabel("cross-entropy (nats), log scale")
    axes.set_title(f"{model_title(model)} on {dataset}: {LOSSES[loss]} loss per batch" + _second_line(dataset, overrides))
    _name_ends(axes, ends)
    seeds = runs["seed"].nunique()
    batch = "each step's own batch, before its update" if loss == "train_loss" else "one validation batch after each step"
    thin, thick = (f", {seeds} seeds", " and all seeds") if seeds > 1 else ("", "")
    mean = f"running mean over {window} steps{thick}, batches weighted by their images"
    add_caption(figure, f"thin: {batch}{thin}\nthick: {mean}")
    return figure


def scaling_figure(runs: pd.DataFrame, scale_like: pd.DataFrame | None = None, overrides: str = "", arms: Sequence[str] = ARMS) -> Figure:
    """Test accuracy in % over model size in millions of parameters, a line an architecture, with 95 % Wilson intervals.

    Runs that diverged have no accuracy and are named in the caption.

    Args:
        scale_like: runs whose accuracies set the vertical range, so that two figures can be compared.
        overrides: a second line of the title. arms: the architectures that are compared, the baseline first.
    """
    dataset = runs["dataset"].iloc[0]
    diverged = runs[runs["status"] == "diverged"]
    runs = runs[runs["status"] == "done"]
    figure, axes = _axes()
    ends = []
    models = list(dict.fromkeys(runs["model"]))
    several = len(models) > 1
    for model, of_model in runs.groupby("model", sort=False):
        style = model_style(str(model))
        cells = of_model.groupby("parameters")
        mean = 100 * cells["test_accuracy"].mean()
        # Architectures have nearly the same sizes: intervals side by side, not on top of each other.
        x = np.asarray(mean.index, dtype=float) / 1e6 * (1 + 0.012 * (2 * models.index(model) - (len(models) - 1)))
        low, high = np.asarray(
            [wilson(100 * accuracy, n) for accuracy, n in zip(cells["test_accuracy"].mean(), cells["test_images"].min(), strict=True)]
        ).T
        axes.plot(x, mean, linewidth=2.0, markersize=7, **style)
        axes.vlines(x, low, high, color=style["color"], linewidth=1.2, alpha=0.75)
        if of_model["seed"].nunique() > 1:
            scatter_x = [x[list(mean.index).index(p)] for p in of_model["parameters"]]
            axes.scatter(scatter_x, 100 * of_model["test_accuracy"], s=14, color=style["color"], alpha=0.5, linewidths=0)
        if not several:
            for i, value in enumerate(mean):
                axes.annotate(f"{value:.1f}", (x[i], value), textcoords="offset points", xytext=(7, 6), fontsize=9, color="#30363D")
        ends.append((x[-1], mean.iloc[-1], model_title(model), style["color"]))
    _size_axis(axes, runs)
    axes.set_ylabel("test accuracy (%)")
    title = model_title(models[0]) if not several else "Both architectures" if len(models) == 2 else f"{len(models)} architectures"
    axes.set_title(f"{title} on {dataset}: test accuracy over model size" + _second_line(dataset, overrides))
    axes.set_ylim(*_accuracy_range(runs if scale_like is None else scale_like[scale_like["status"] == "done"]))
    if several:
        right = max(x for x, *_ in ends)  # beside all intervals, on top of none
        _name_ends(axes, [(right, *end) for _, *end in ends])
    seeds = int(runs.groupby(["model", "parameters"])["seed"].nunique().min())
    images = int(runs["test_images"].min())
    note = "no interval over seeds (1 seed)" if seeds == 1 else f"dots: {seeds} seeds"
    caption = f"bars: 95 % interval (Wilson, {images:,} test images); {note}; only depth varies"
    if len(diverged):
        named = ", ".join(f"{model_title(run.model)} {millions(run.parameters)} seed {run.seed}" for run in diverged.itertuples())
        caption += f"\ndiverged, and so without an accuracy: {named}"
    add_caption(figure, (_draw_match(axes, runs, arms) if several else "") + caption)
    return figure


def _draw_match(axes: Axes, runs: pd.DataFrame, arms: Sequence[str]) -> str:
    """An arrow from the size that the baseline would need to an arm of the same error, and what it means.

    Of the first arm that has a size with one within the measured range, the size nearest the middle; "" for none.
    """
    runs, _ = comparable(runs, arms)
    for pair in pairs_of(arms):
        pairs = scaling.pair_table(*(runs[runs["model"] == arm] for arm in pair))
        cells = scaling.cells_of(pairs) if len(pairs) else None
        if text := _draw_arrow(axes, cells, pair) if cells is not None and len(cells.logs) > 1 else "":
            return text
    return ""


def _draw_arrow(axes: Axes, cells: scaling.Cells, arms: tuple[str, str]) -> str:
    """The arrow of two arms and what it means; "" for none."""
    middle = (len(cells.logs) - 1) / 2
    for i in sorted(range(len(cells.logs)), key=lambda i: abs(i - middle)):
        equal = curves.equal_cost(cells, i)
        if equal is not None:
            parameters, accuracy = math.exp(cells.log_costs[1, i]), 100 * (1 - math.exp(cells.means[1, i]))
            axes.annotate("", (parameters / 1e6, accuracy), (equal / 1e6, accuracy), arrowprops={"arrowstyle": "->", "color": "#30363D"})
            share = f"{parameters / equal:.2f} of its parameters"
            first, second = map(short_model, arms)
            return f"arrow: {parameters / 1e6:.3g} M {second} has the error of {equal / 1e6:.3g} M {first}, {share}\n"
    return ""


def _second_line(dataset: str, overrides: str) -> str:
    return f"\n{overrides_title(dataset, overrides)}" if overrides else ""


def _axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    return figure, figure.subplots()


def _log_loss_axis(axes: Axes) -> None:
    """A log axis with plain numbers, closer together where the range is short."""
    axes.set_yscale("log", nonpositive="mask")
    low, high = axes.get_ylim()
    steps = (1,) if high / low > 1e4 else (1, 3) if high / low > 100 else (1, 2, 5) if high / low > 8 else (1, 1.5, 2, 3, 4, 5, 6, 8)
    axes.yaxis.set_major_locator(LogLocator(subs=steps))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _size_axis(axes: Axes, runs: pd.DataFrame) -> None:
    """A log axis of millions of parameters, ticked where the models are."""
    sizes = runs.groupby("size", sort=False)["parameters"].mean().sort_values() / 1e6
    axes.set_xscale("log")
    axes.set_xticks(sizes.to_list(), [f"{value:.3g}" for value in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(sizes.iloc[0] * 0.85, sizes.iloc[-1] * 1.18)
    axes.set_xlabel("model size (million parameters), log scale")


def _accuracy_range(runs: pd.DataFrame) -> tuple[float, float]:
    intervals = [wilson(100 * accuracy, n) for accuracy, n in zip(runs["test_accuracy"], runs["test_images"], strict=True)]
    low, high = min(low for low, _ in intervals), max(high for _, high in intervals)
    margin = 0.08 * (high - low)
    return max(0.0, low - margin), min(100.0, high + margin) if high < 100 else 100.0


def wilson(percent: float, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a share, both in percent."""
    z, p = 1.959964, percent / 100
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return 100 * (centre - half), 100 * (centre + half)


def with_wilson(accuracy: float, images: float) -> str:
    """An accuracy in percent with its 95 % Wilson interval over so many test images."""
    low, high = wilson(100 * accuracy, int(images))
    return f"{100 * accuracy:.2f} % ({low:.1f} to {high:.1f})"


def smoothing_window(steps: int) -> int:
    """Steps that a running mean is over: about a fortieth of the curve, an odd number."""
    return 2 * (steps // 80) + 1


def running_mean(curve: pd.Series, window: int, weights: np.ndarray) -> pd.Series:
    """A centred, weighted mean; over fewer values at the curve's ends."""
    known = pd.Series(weights, curve.index).where(curve.notna())
    total, weight = (each.rolling(window, center=True, min_periods=1).sum() for each in (curve * known, known))
    return total / weight


def batch_lengths(dataset: str, overrides: str, loss: str, steps: pd.Index) -> np.ndarray:
    """Images of each step's training or validation batch: the last one of an epoch has what is left."""
    protocol = protocol_of(dataset).with_overrides(parse_overrides(overrides))
    rows = protocol.images[0 if loss == "train_loss" else 1]
    return np.diff([images_in_steps(rows, protocol.batch_size, step) for step in (steps[0] - 1, *steps)]) if len(steps) else np.empty(0)


def _name_ends(axes: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Names at the lines' ends, moved apart where they would overlap."""
    cast(Figure, axes.figure).draw_without_rendering()  # fixes the scales, so that positions can be measured
    gap = 15.0  # pixels at 100 dpi: a line of text
    placed: list[float] = []
    for x, y, name, colour in sorted(ends, key=lambda end: end[1]):
        pixel = axes.transData.transform((x, y))[1]
        target = max(pixel, placed[-1] + gap) if placed else pixel
        placed.append(target)
        offset = (target - pixel) * 72 / axes.figure.dpi
        axes.annotate(name, (x, y), xytext=(8, offset), textcoords="offset points", va="center", color=colour, fontsize=9.5,
                      fontweight="bold", annotation_clip=False)  # fmt: skip


def add_caption(figure: Figure, text: str) -> None:
    """A line below everything: what the marks mean."""
    figure.supxlabel(text, fontsize=8, color="#5B6570", x=0.01, ha="left")


def size_colour(dataset: str, size: Any) -> str:
    """A size's colour where sizes are told apart."""
    sizes = protocol_of(dataset).sizes
    return to_hex(_SIZE_COLOURS(sizes.index(size) / max(1, len(sizes) - 1)))


def shade(model: str, dataset: str, size: Any) -> str:
    """An architecture's colour where sizes are told apart by lightness: the largest has the colour itself."""
    sizes = protocol_of(dataset).sizes
    white = 0.45 * (len(sizes) - 1 - sizes.index(size)) / max(1, len(sizes) - 1)
    red, green, blue = (white + (1 - white) * part for part in to_rgb(model_style(model)["color"]))
    return to_hex((red, green, blue))


def millions(parameters: float) -> str:
    """A number of parameters for a person."""
    return f"{parameters / 1e6:.3g} M"


def model_style(model: str) -> dict[str, Any]:
    """Colour, marker and line of an architecture."""
    chosen = zlib.crc32(model.encode())
    return dict(_MODEL_STYLES.get(model) or {name: values[chosen % len(values)] for name, values in _OWN_STYLES.items()})
