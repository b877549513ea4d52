"""A live table of runs, on a terminal or where nothing can be redrawn. It goes to stderr."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from diffvit.ledger.spec import RunSpec, overrides_text
from study.live.progress import RunProgress, seconds_left
from study.plan import PlannedRun
from study.text import clock, folded, same_everywhere, short_model

_BAR_WIDTH = 12
_NAMES = ("model", "size", "data set", "seed", "overrides")
_NUMBERS = ("step", "train loss", "val loss", "images/s", "test")
# Columns that a narrow terminal does without, the first one first.
_DISPENSABLE = ("images/s", "train loss", "val loss")


class Board:
    """Draws how far runs are while the block runs; who uses it changes `rows`.

    Args:
        runs: all of them; those that have ended already are shown so.
        timed: say the time since the board was made.

    Attributes:
        rows: title -> progress of the run.
        note: what the summary ends with instead of the time left.
    """

    def __init__(self, runs: Sequence[PlannedRun], console: Console | None = None, timed: bool = True):
        self.console = console or Console(file=sys.stderr)
        self.rows = {run.spec.title: RunProgress(run, f"{run.status} before" if run.status else "waiting") for run in runs}
        self.note = ""
        self._names = {title: _names(row.run.spec) for title, row in self.rows.items()}
        # Model and size are columns always.
        self._same = same_everywhere({name: [of_run[name] for of_run in self._names.values()] for name in _NAMES}, _NAMES[2:])
        self.began = time.monotonic()
        self._timed = timed
        self._slots = 1
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live = Live(console=self.console, get_renderable=self.draw, refresh_per_second=2, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def say(self, line: str) -> None:
        """Print a line; it is folded on a terminal."""
        width = self.console.width if self.console.is_terminal else None
        self.console.print(folded(line, width), highlight=False, markup=False, soft_wrap=True)

    def draw(self) -> Group:
        """The summary, what all runs share, and as many rows as the terminal is high: running runs, then those that ended last.

        The others are a line: "12 done before; 21 waiting; not shown: 3 done".
        """
        rows = list(self.rows.values())
        shown = [row for row in rows if row.state in ("training", "stopped")]
        shown += sorted((row for row in rows if row.ended), key=lambda row: row.ended, reverse=True)
        shown = shown[: max(1, self.console.height - 3)]
        while True:
            picture = self._picture(shown, rows)
            lines = self.console.render_lines(picture, self.console.options.update(height=None), pad=False)
            if len(shown) < 2 or (too_many := len(lines) + 1 - self.console.height) <= 0:
                return picture
            # A row with long overrides takes several lines, so fewer rows than lines go at a time.
            del shown[max(1, len(shown) - max(1, too_many // 3)) :]

    def _picture(self, shown: list[RunProgress], rows: list[RunProgress]) -> Group:
        parts: list[Any] = [Text(self.summary(), style="bold")]
        if title := ", ".join(filter(None, self._same.values())):
            parts.append(Text(title, style="dim"))
        if shown:
            parts.append(self._table(shown))
        hidden = Counter(row.state for row in rows if row not in shown)
        texts = [f"{hidden.pop(state)} {state}" for state in sorted(hidden) if state == "waiting" or state.endswith("before")]
        texts += ["not shown: " + ", ".join(f"{count} {state}" for state, count in hidden.items())] if hidden else []
        if texts:
            parts.append(Text("; ".join(texts), style="dim"))
        return Group(*parts)

    def _table(self, rows: list[RunProgress]) -> Table:
        """The rows, without the columns that are least needed where the terminal is narrow."""
        unlimited = self.console.options.update(width=10_000)
        for number in range(len(_DISPENSABLE) + 1):
            table = self._with_columns(rows, without=_DISPENSABLE[:number])
            if self.console.measure(table, options=unlimited).maximum <= self.console.width:
                break
        return table

    def _with_columns(self, rows: list[RunProgress], without: Sequence[str]) -> Table:
        table = Table(box=None, pad_edge=False, header_style="bold")
        cells = [self._cells(row) for row in rows]
        headers = [header for header in cells[0] if header not in without]
        for header in headers:
            layout: dict[str, Any] = {"justify": "right"} if header in _NUMBERS else {}
            if header == "progress":
                layout["min_width"] = _BAR_WIDTH
            table.add_column(header, no_wrap=header != "overrides", overflow="fold", **layout)
        for row, of_row in zip(rows, cells, strict=True):
            table.add_row(*(of_row[header] for header in headers), style="dim" if row.state == "done" else None)
        return table

    def _cells(self, row: RunProgress) -> dict[str, Any]:
        spec, steps = row.run.spec, row.run.steps
        bar: Any = Text(row.phase.partition(" ")[0] or row.state, style="red" if row.state in ("failed", "diverged") else "")
        if row.state == "training" and not row.phase:
            bar = ProgressBar(total=steps, completed=row.step, width=_BAR_WIDTH)
        return {
            **{name: text for name, text in self._names[spec.title].items() if name not in self._same},
            "progress": bar, "step": f"{row.step}/{steps}",
            "train loss": _number(row.train_loss, ".4f"), "val loss": _number(row.val_loss, ".4f"), "images/s": _number(row.pace, ",.0f"),
            "test": "" if row.accuracy is None else f"{100 * row.accuracy:.1f} %",
        }  # fmt: skip

    def summary(self) -> str:
        """How many runs have ended, and the time left."""
        rows = list(self.rows.values())
        finished = sum(row.state.startswith("done") for row in rows)
        text = f"{finished} of {len(rows)} runs done"
        for state in ("diverged", "failed"):
            if count := sum(row.state.startswith(state) for row in rows):
                text += f", {count} {state}"
        if count := sum(row.phase == "compiling" for row in rows):
            text += f", {count} compiling"
        if self._timed:
            text += f", {clock(int(time.monotonic() - self.began))} elapsed"
        if self.note:
            return f"{text}, {self.note}"
        if not any(row.state in ("waiting", "stopped", "training") for row in rows):
            return text
        self._slots = max(self._slots, sum(row.state == "training" for row in rows))  # a slot may be free for a moment
        left = seconds_left(rows, self._slots)
        return text + (", estimating the time left" if left is None else f", about {clock(left)} left")


def _names(spec: RunSpec) -> dict[str, str]:
    """What a run is called, a text a column."""
    values = (short_model(spec.model), spec.size, spec.dataset, str(spec.seed), overrides_text(spec.overrides))
    return dict(zip(_NAMES, values, strict=True))


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
