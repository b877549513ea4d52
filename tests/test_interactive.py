"""Loss curves that can be zoomed: every run in them, one script in the page, nothing sent anywhere, and nothing without Plotly."""

from __future__ import annotations

import base64
import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
from test_figures import _tables

from study.report import interactive
from study.report.document import Heading, Scripted, to_html, to_markdown
from study.report.figures import batch_lengths, running_mean, smoothing_window


def test_every_run_can_be_switched_off_and_is_what_its_log_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("plotly")
    runs, steps = _tables(("digits",), seeds=2)
    runs = runs[runs["model"].isin(["vit_classic", "vit_differential"])]
    steps.loc[(steps["run_id"] == runs["run_id"].iloc[0]) & (steps["step"] == 7), "train_loss"] = np.inf
    heading, _, *figures = interactive.curves_section(runs, steps)
    assert isinstance(heading, Heading) and all(isinstance(figure, Scripted) for figure in figures)
    assert [figure.caption for figure in figures] == ["digits: training loss per batch", "digits: validation loss per batch"]
    assert [bool(figure.script) for figure in figures] == [True, False]
    call = re.search(r"Plotly\.newPlot\(\s*\"curves-2\",\s*(\[.*?\]),\s*(\{.*\}),\s*(\{[^{}]*\})\s*\)", figures[0].html, re.DOTALL)
    assert call
    traces, layout, config = map(json.loads, call.groups())
    assert config["showSendToCloud"] is False and len(traces) == 2 * len(runs)
    for run, smooth, raw in zip(runs.itertuples(), traces[::2], traces[1::2], strict=True):
        curve = steps[steps["run_id"] == run.run_id].set_index("step")["train_loss"].replace(np.inf, np.nan)
        mean = running_mean(curve, smoothing_window(200), batch_lengths("digits", "", "train_loss", curve.index))
        for trace, expected in ((smooth, mean), (raw, curve)):
            drawn = np.frombuffer(base64.b64decode(trace["y"]["bdata"]), np.float32)
            np.testing.assert_allclose(drawn, expected, rtol=1e-6)
            assert trace["x0"] == trace["dx"] == 1 and trace["name"].endswith(f"M, seed {run.seed}")
        assert (smooth["visible"], raw["visible"]) == (True, False)
    shown = [button["args"][0]["visible"] for button in layout["updatemenus"][0]["buttons"]]
    assert [sum(each) for each in shown] == [len(runs)] * 2 and all(a != b for a, b in zip(*shown, strict=True))

    assert "digits: training loss per batch: in report.html" in to_markdown([heading, *figures], tmp_path)
    assert to_html([heading, *figures], "t").count("Plotly.newPlot(") >= 2
    monkeypatch.setattr(interactive, "_MOST_POINTS", 2 * 2 * len(steps) // 3)
    (_, _, thinned, _) = interactive.curves_section(runs, steps)
    assert "one step in 3" in thinned.caption and '"dx":3' in thinned.html


def test_without_plotly_the_page_has_no_script(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "plotly" else found(name, *more))
    assert interactive.curves_section(*_tables(("digits",))) == []
