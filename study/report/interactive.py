"""Loss curves that can be zoomed and switched off run by run, by Plotly, where that is installed (the extra `interactive`).

Plotly's script goes into the page once, 4.8 MB, so that nothing is loaded when the page is read.
"""

from __future__ import annotations

import importlib.util
import math
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from diffvit.protocol import model_title
from study.report.document import Block, Heading, Paragraph, Scripted
from study.report.figures import LOSSES, batch_lengths, millions, running_mean, shade, smoothing_window
from study.table import all_overrides

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

# In all curves of a page, 5.3 bytes each; beyond, only every other step is drawn, or every third, ….
_MOST_POINTS = 1_000_000
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")


def curves_section(runs: pd.DataFrame, steps: pd.DataFrame) -> list[Block]:
    """A figure for each loss of each data set and condition; none where Plotly is missing.

    Args:
        runs: a run table, steps: its step table (see table.py).
    """
    if importlib.util.find_spec("plotly") is None or runs.empty:
        return []
    from plotly.io import to_html
    from plotly.offline import get_plotlyjs

    every = math.ceil(2 * len(LOSSES) * len(steps) / _MOST_POINTS)
    by_run = dict(iter(steps.groupby("run_id", observed=True)))
    blocks: list[Block] = [Heading("Loss curves to zoom"), Paragraph(_TEXT)]
    script = get_plotlyjs()
    for (dataset, overrides), of in runs.groupby(["dataset", pd.Series(all_overrides(runs), index=runs.index)], sort=False):
        for loss, name in LOSSES.items():
            figure = _figure(of, by_run, loss, str(overrides), every)
            title = f"{dataset}{f' ({overrides})' if overrides else ''}: {name} loss per batch"
            html = to_html(figure, _CONFIG, include_plotlyjs=False, full_html=False, div_id=f"curves-{len(blocks)}")
            blocks.append(Scripted(html, f"{title}{f', one step in {every}' if every > 1 else ''}", script))
            script = ""
    return blocks


_CONFIG = {"displaylogo": False, "responsive": True, "showSendToCloud": False}  # a click must not send results anywhere
_TEXT = (
    "Colours and dashes are architectures; the larger a model, the darker. Drag to zoom, double-click for the whole. A click on a run "
    "switches it off or on, a double-click leaves it alone. Without scripts, the figures above show the same curves, with sizes in colours."
)


def _figure(runs: pd.DataFrame, by_run: dict[str, pd.DataFrame], loss: str, overrides: str, every: int) -> Figure:
    """Every run twice: its running mean, and each batch, of which buttons show one kind."""
    from plotly.graph_objects import Figure, Scattergl

    dataset, models = runs["dataset"].iloc[0], list(dict.fromkeys(runs["model"]))
    traces = []
    for run in runs.itertuples():
        steps = by_run[run.run_id].set_index("step")[loss].replace([np.inf, -np.inf], np.nan)
        smooth = running_mean(steps, smoothing_window(len(steps)), batch_lengths(dataset, overrides, loss, steps.index))
        line = {"color": shade(run.model, dataset, run.size), "dash": _DASHES[models.index(run.model) % len(_DASHES)], "width": 1.4}
        for curve, shown in ((smooth, True), (steps, False)):
            traces.append(Scattergl(
                x0=int(curve.index[0]) if len(curve) else 1, dx=every, y=curve.to_numpy(np.float32)[::every], mode="lines", line=line,
                visible=shown, name=f"{millions(run.parameters)}, seed {run.seed}", legendgroup=run.model,
                legendgrouptitle_text=model_title(run.model), hovertemplate=f"{model_title(run.model)}<br>step %{{x}}: %{{y:.4g}}",
            ))  # fmt: skip
    buttons = [{"label": label, "method": "restyle", "args": [{"visible": [(i % 2 == 0) == mean for i in range(len(traces))]}]}
               for label, mean in (("running mean", True), ("each batch", False))]  # fmt: skip
    figure, most = Figure(traces), int(runs["model"].value_counts().max())
    place = {"type": "buttons", "direction": "right", "x": 0, "y": 1.02, "xanchor": "left", "yanchor": "bottom"}
    figure.update_layout(
        template="plotly_white", height=430 + 19 * most, margin={"l": 60, "r": 10, "t": 75, "b": 45},
        legend={"groupclick": "toggleitem", "orientation": "h", "y": -45 / 310, "yanchor": "top"},  # below, so that a phone has room
        xaxis={"title": "training step"}, yaxis={"title": "cross-entropy (nats)", "type": "log", "dtick": "D2"},
        updatemenus=[{**place, "buttons": buttons}],
    )  # fmt: skip
    return figure
