"""Figures of what diffvit/findings/attention.py finds: maps of single images, and numbers over depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import study.report.drawing  # noqa: F401  (first: it sees to how matplotlib is imported)

# isort: split
import numpy as np
import pandas as pd
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import Stroke
from matplotlib.ticker import FuncFormatter, MaxNLocator

from diffvit.findings.attention import picture_pixels
from diffvit.protocol import in_order, model_title
from study.report.figures import add_caption, millions, model_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_RIGHT, _WRONG = ("✓", "#2E6B3E"), ("✗", "#A02C2C")
_CELL = 1.55  # inches along a side of an image
_NAME_LETTERS = 16


def attention_pictures(findings_by_model: Mapping[str, Mapping[str, Any]], title: str) -> Figure:
    """A row a test image: the image, its object outlined, and each model's last map of it, with the class it predicts.

    All maps share one colour scale, on which 1 is what a patch would get were attention uniform: a model's maps, whose sum
    depends on its lambda, are so comparable with another's. Signed where a map is.

    Args:
        findings_by_model: model -> what evaluate_attention found, of models that saw the same data.
        title: of the figure.

    Raises:
        ValueError: the models have no picture in common.
    """
    by_row = {model: {picture["row"]: picture for picture in findings["pictures"]} for model, findings in findings_by_model.items()}
    models = in_order(by_row)
    rows = [row for row in by_row[models[0]] if all(row in pictures for pictures in by_row.values())]
    if not rows or not all(
        np.array_equal(picture_pixels(by_row[model][row]), picture_pixels(by_row[models[0]][row])) for model in models for row in rows
    ):
        raise ValueError("the models were not shown the same pictures")
    maps = {(model, row): _relative(by_row[model][row]["last_map"]) for model in models for row in rows}
    scale, colours, extend = _scale(list(maps.values()))

    figure = Figure(figsize=(_CELL * (1 + len(models)) + 1.3, (_CELL + 0.28) * len(rows) + 1.0), layout="constrained")
    cells = figure.subplots(len(rows), 1 + len(models), squeeze=False)
    for row, (image_axes, *map_axes) in zip(rows, cells, strict=True):
        picture = by_row[models[0]][row]
        pixels = picture_pixels(picture)
        _picture_axes(image_axes, picture["box"], outline="white", halo="black")
        image_axes.imshow(pixels, cmap="gray" if pixels.ndim == 2 else None, vmin=0, vmax=255, extent=(0, 1, 1, 0))
        image_axes.set_xlabel(f"true: {_short(picture['true'])}", fontsize=9)
        for model, axes in zip(models, map_axes, strict=True):
            answer = by_row[model][row]
            mark, colour = _RIGHT if answer["predicted"] == answer["true"] else _WRONG
            _picture_axes(axes, answer["box"], outline="black", halo="white")
            axes.imshow(maps[model, row], cmap=colours, norm=scale, extent=(0, 1, 1, 0), interpolation="nearest")
            axes.set_xlabel(f"{mark} {_short(answer['predicted'])}", fontsize=9, color=colour)
    for axes, name in zip(cells[0], ("test image", *map(model_title, models)), strict=True):
        axes.set_title(name, fontsize=9.5, loc="center", fontweight="bold")
    bar = figure.colorbar(ScalarMappable(scale, colours), ax=cells, extend=extend, shrink=min(1.0, 3.5 / len(rows)), aspect=30, pad=0.03)
    bar.set_label("class token's attention to a patch\n(1: were it uniform)", fontsize=9)
    figure.suptitle(title, fontsize=11.5, fontweight="bold", x=0.01, ha="left")
    add_caption(figure, "last layer, mean over heads; outlined: the object;\nunder each map: the predicted class, right (✓) or wrong (✗)")
    return figure


def attention_curves(runs: pd.DataFrame, findings: Mapping[str, Mapping[str, Any]], name: str) -> Figure:
    """Entropy and share of attention on the object over relative depth: a column a size, a line an architecture.

    A run is a thin line where an architecture has several at a size, and their mean the thick one. The level of uniform attention is
    drawn thin and grey.

    Args:
        runs: rows of a run table. findings: run_id -> what evaluate_attention found, for all of them.
        name: of the data set, for the title.

    Raises:
        ValueError: no runs.
    """
    if runs.empty:
        raise ValueError("there is nothing to draw")
    sizes = [of_size for _, of_size in sorted(runs.groupby("size"), key=lambda of_size: of_size[1]["parameters"].min())]
    models = in_order(runs["model"])
    example = findings[runs["run_id"].iloc[0]]
    measures = [
        ("entropy", "entropy (nats)"),
        *((background, f"share on object (%),\n{_behind(background)}") for background in example["layers"][0]["signal_share"]),
    ]

    figure = Figure(figsize=(2.6 * max(2, len(sizes)) + 1.2, 2.0 * len(measures) + 1.1), layout="constrained")
    cells = figure.subplots(len(measures), len(sizes), sharex=True, sharey="row", squeeze=False)
    for (measure, label), of_measure in zip(measures, cells, strict=True):
        for of_size, axes in zip(sizes, of_measure, strict=True):
            _draw_measure(axes, measure, models, [(run.model, findings[run.run_id]) for run in of_size.itertuples()])
        of_measure[0].set_ylabel(label)
    for of_size, axes in zip(sizes, cells[0], strict=True):
        depth = len(findings[of_size["run_id"].iloc[0]]["layers"])
        axes.set_title(f"{millions(of_size['parameters'].min())}, {depth} layers", fontsize=10, loc="center")
    for axes in cells[-1]:
        axes.set_xlabel("depth (0: first layer, 1: last)")
        axes.set_xlim(-0.04, 1.04)
        axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    lines = {line.get_label(): line for axes in cells.flat for line in axes.lines if not str(line.get_label()).startswith("_")}
    # The title is the legend's: constrained layout would put a legend outside on top of a title of the figure.
    legend = figure.legend(lines.values(), lines.keys(), loc="outside upper left", ncols=2, frameon=False, handlelength=3, fontsize=9,
                           title=f"Attention of the class token on {name}", alignment="left")  # fmt: skip
    legend.get_title().set(fontsize=11.5, fontweight="bold")
    images = min(findings[run_id]["images"] for run_id in runs["run_id"])
    seeds = int(runs.groupby(["model", "size"]).size().max())
    add_caption(figure, f"over the patches, mean over heads and {images:,} test images; {_seeds(seeds)}")
    return figure


def _draw_measure(axes: Axes, measure: str, models: Sequence[str], of_size: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    uniform = of_size[0][1]["uniform_entropy"] if measure == "entropy" else 100 * of_size[0][1]["signal_area"]
    axes.axhline(uniform, color="#5B6570", linewidth=0.9, linestyle=(0, (1, 1.5)), label="uniform attention")
    for model in models:
        curves = [
            [layer["entropy"] if measure == "entropy" else 100 * layer["signal_share"][measure] for layer in findings["layers"]]
            for of, findings in of_size
            if of == model
        ]
        if not curves:
            continue
        style = model_style(model)
        layers = len(curves[0])
        depth = np.linspace(0, 1, layers) if layers > 1 else np.array([1.0])
        for curve in curves if len(curves) > 1 else []:
            axes.plot(depth, curve, color=style["color"], linewidth=0.6, alpha=0.5)
        # Markers for a shallow model; in a deep one they would hide the line.
        axes.plot(
            depth, np.mean(curves, axis=0), linewidth=1.8, markersize=5, markevery=-(-layers // 12), label=model_title(model), **style
        )
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _behind(background: str) -> str:
    return {"noise": "noise around it", "images": "other images around it"}.get(background, background)


def _seeds(seeds: int) -> str:
    return "1 seed" if seeds == 1 else f"thin: {seeds} seeds, thick: their mean"


def _relative(attention: Sequence[Sequence[float]]) -> np.ndarray:
    """A map in multiples of what each patch would get of its absolute attention, were that uniform. [rows, columns]"""
    values = np.asarray(attention)
    total = np.abs(values).mean()
    return values / total if total else values


def _scale(maps: Sequence[np.ndarray]) -> tuple[Normalize, str, str]:
    """Colour scale, colour map and which ends of it are cut off: around 0 where any map is negative, else from 0 up."""
    values = np.concatenate([of_image.ravel() for of_image in maps])
    # A few patches of very much attention shall not make all others pale.
    limit = max(float(np.quantile(np.abs(values), 0.995)), 1.0)
    above, below = values.max() > limit, values.min() < -limit
    extend = {(True, True): "both", (True, False): "max", (False, True): "min", (False, False): "neither"}[bool(above), bool(below)]
    if values.min() < 0:
        return Normalize(-limit, limit), "RdBu_r", extend
    return Normalize(0, limit), "YlOrBr", extend


def _picture_axes(axes: Axes, box: Sequence[float], outline: str, halo: str) -> None:
    """No ticks, and the object's outline."""
    top, left, bottom, right = box
    frame = Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=outline, linewidth=1.0, zorder=3, clip_on=False)
    frame.set_path_effects([Stroke(linewidth=2.4, foreground=halo), Stroke(linewidth=1.0, foreground=outline)])
    axes.add_patch(frame)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    axes.spines[:].set_visible(False)


def _short(name: str) -> str:
    return name if len(name) <= _NAME_LETTERS else name[: _NAME_LETTERS - 1] + "…"
