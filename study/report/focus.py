"""Whether training has made attention more focused than it was at the start, and what the negative parts of its maps do."""

from __future__ import annotations

import numpy as np

from diffvit.protocol import model_title
from study.report.analysis import Analysis
from study.report.document import Block, Paragraph, Table
from study.report.figures import millions


def focus_section(analysis: Analysis) -> list[Block]:
    """A table a data set of the entropy before and after training, the positive part's entropy and the negative mass."""
    blocks: list[Block] = []
    attended = analysis.findings_of("attention")
    for part in analysis.subjects:
        runs = part.table[part.table["run_id"].isin(list(attended))]
        rows = []
        for (parameters, model), cell in runs.groupby(["parameters", "model"]):
            layers = [layer for run_id in cell["run_id"] for layer in attended[run_id]["layers"]]
            start, end, positive, negative = (np.mean([layer[name] for layer in layers]) for name in _MEASURES)
            title = f"{model_title(str(model))}, {millions(parameters)}"
            rows.append([title, f"{start:.2f}", f"{end:.2f}", f"{end - start:+.2f}", f"{positive:.2f}", f"{100 * negative:.1f} %"])
        if rows:
            header = ["model", "entropy before training", "after", "change", "of the positive part", "negative mass"]
            blocks.append(Table(header, rows, f"{part.name}: entropy in nats, mean over layers and seeds"))
    return [Paragraph(_TEXT), *blocks] if blocks else []


_MEASURES = ("entropy_untrained", "entropy", "entropy_positive", "negative_mass")
_TEXT = (
    "A lower entropy than another architecture's is no evidence of focus: maps differ before the first step. What training did is the "
    "change. The negative mass is the share of absolute attention that is subtracted, 0 for a classic map."
)
