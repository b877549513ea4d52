"""The start of training, as text and as a section of the report: what the models are like before their first step."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from diffvit.errors import UserError
from diffvit.findings.start import start_rows
from diffvit.ledger.spec import RunSpec, overrides_text, parse_overrides
from diffvit.protocol import ARMS, model_title
from study.report.analysis import Analysis
from study.report.document import Block, Heading, Paragraph, Table
from study.text import columns, short_model

_HEADER = (
    "model", "size", "data set", "cosine", "attention: first", "middle", "last", "MLP: first", "middle", "last",
    "entropy: first", "middle", "last", "at most",
)  # fmt: skip

# Further apart than this, the arms do not start alike, and a difference between them may be one of their starts.
MOST_APART = 0.1


def start_text(rows: Sequence[Mapping[str, Any]], arms: Sequence[str] = ARMS) -> str:
    """The rows of findings/start.py for a terminal, a table for each data set and condition."""
    header = ("model", "size", "cosine", "attention rms", "MLP rms", "entropy")
    parts: dict[str, list[tuple[str, ...]]] = {}
    for row in rows:
        looked_at = f"{row['images']} images ({row['of']}) of {row['tokens']} tokens"
        title = f"{_condition(row)}: {looked_at}, entropy at most {row['uniform_entropy']:.2f}"
        triples = (" ".join(_of_layers(row, what)) for what in ("attention_rms", "mlp_rms", "entropy"))
        parts.setdefault(title, [header]).append((short_model(row["model"]), row["size"], f"{row['cosine']:.2f}", *triples))
    tables = [f"{title}\n{columns(cells, range(2, len(header)))}\n" for title, cells in parts.items()]
    return "\n".join([*tables, "rms, entropy: in the first, middle and last layer", *start_gaps(rows, arms)])


def start_section(analysis: Analysis) -> list[Block]:
    """A table of every cell that has a run, and whether the arms start alike."""
    specs = []
    for run in analysis.table.drop_duplicates(["model", "size", "dataset", "overrides"]).itertuples():
        with contextlib.suppress(UserError, ValueError):  # a run of another version may have what is unknown here
            specs.append(RunSpec.of(run.model, run.size, run.dataset, run.seed, overrides=parse_overrides(run.overrides)))
    try:
        rows = start_rows(specs, quick=True)
    except UserError as error:  # a folder of data that is there and has changed
        return [Heading("Before the first step"), Paragraph(f"Not measured: {error.message}")]
    if not rows:
        return []
    text = " ".join([_START, *start_gaps(rows, analysis.arms)])
    table = Table(_HEADER, [*map(_cells, rows)], "Models with their initial weights", left=3, closed=True)
    return [Heading("Before the first step"), Paragraph(text), table]


_START = (
    "Whether the architectures start alike: the cosine between an image's tokens after the last block, the root mean square of what "
    "attention and MLP add in the first, middle and last layer, and the entropy of the class token's attention over the patches in nats. "
    "Means over four images, of at most 8 x 8 patches; photographs stand in for data on the hub, and `run.py untrained` shows whole "
    "images. Tokens that are nearly alike before the first step train slowly, whatever the attention (arXiv 2206.03126)."
)


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    of_layers = [text for what in ("attention_rms", "mlp_rms", "entropy") for text in _of_layers(row, what)]
    return model_title(row["model"]), row["size"], _condition(row), f"{row['cosine']:.2f}", *of_layers, f"{row['uniform_entropy']:.2f}"


def _condition(row: Mapping[str, Any]) -> str:
    return " ".join(filter(None, (row["dataset"], overrides_text(row["overrides"]))))


def _of_layers(row: Mapping[str, Any], what: str) -> list[str]:
    return ["" if layer[what] is None else f"{layer[what]:.2f}" for layer in row["layers"]]


def start_gaps(rows: Sequence[Mapping[str, Any]], arms: Sequence[str] = ARMS) -> list[str]:
    """How far apart the arms' cosines are at most, each from the baseline's, and a sentence that names cells where that is too far."""
    cosines: dict[str, dict[str, float]] = {}
    for row in rows:
        cell = " ".join(filter(None, (row["dataset"], row["size"], overrides_text(row["overrides"]))))
        cosines.setdefault(cell, {})[row["model"]] = row["cosine"]
    gaps = {(cell, arm): abs(of[arms[0]] - of[arm]) for arm in arms[1:] for cell, of in cosines.items() if {arms[0], arm} <= set(of)}
    if not gaps:
        return []
    several = len(arms) > 2
    names = {(cell, arm): f"{cell}, {model_title(arm)}" if several else cell for cell, arm in gaps}
    far = ", ".join(f"{names[key]} ({gap:.2f})" for key, gap in gaps.items() if round(gap, 2) > MOST_APART)
    sentence = f"The {'' if several else 'two '}arms' cosines differ by at most {max(gaps.values()):.2f}."
    apart = f"They differ by more than {MOST_APART:g}, so there the tokens do not start alike, though all shared weights do: {far}."
    return [sentence, apart] if far else [sentence]
