"""Output: text for a person with aligned columns, numbers and times, JSON for programs, and messages on stderr."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import click
from rich.cells import cell_len

from diffvit.errors import redacted
from diffvit.ledger.disk import write_atomically


def columns(rows: Sequence[tuple[str, ...]], right: Any = ()) -> str:
    """Aligned text; no colour, no lines, so that it can be read anywhere and cut by any tool."""
    widths = [max(cell_len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        spaces = [" " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)]
        cells = (space + cell if i in right else cell + space for i, (cell, space) in enumerate(zip(row, spaces, strict=True)))
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def runs_table(
    header: tuple[str, ...], rows: Sequence[tuple[str, ...]], numbers: Collection[str] = (), shared: Collection[str] = ()
) -> str:
    """Runs as aligned text that fits a terminal: columns without any text go, and `shared` ones that say the same of all runs go on top.

    A line of its own precedes the runs of each condition, where there are several.

    Args:
        header: "overrides" is one of them, and no column.
        numbers: headers of columns that are aligned right.
    """
    values = dict(zip(header, zip(*rows, strict=True), strict=True))
    alike = same_everywhere(values, shared) if len(rows) > 1 else {}
    conditions = values.pop("overrides")
    kept = [name for name, texts in values.items() if name not in alike and any(texts)]
    body = zip(*(values[name] for name in kept), strict=True)
    first, *lines = columns([tuple(kept), *body], right=[number for number, name in enumerate(kept) if name in numbers]).split("\n")
    if "overrides" not in alike and any(conditions):
        new = [number == 0 or conditions[number - 1] != condition for number, condition in enumerate(conditions)]
        lines = [
            f"{condition or 'as in the protocol'}:\n{line}" if begins else line
            for line, condition, begins in zip(lines, conditions, new, strict=True)
        ]
    title = ", ".join(filter(None, alike.values()))
    return "\n".join([*([title] if title else []), first, *lines])


# How a column that says the same of all runs is called in the title; others by their header and value.
_TITLES = {"data set": "{}", "overrides": "{}", "state": "all {}", "from": "times from: {}"}


def same_everywhere(values: Mapping[str, Sequence[str]], names: Collection[str]) -> dict[str, str]:
    """Of these columns, those that tell no run from another, and what a title says instead, such as "seed 0"."""
    alike = {name: values[name][0] for name in names if len(set(values[name])) == 1}
    return {name: _TITLES.get(name, f"{name} {{}}").format(text) if text else "" for name, text in alike.items()}


def short_model(name: str) -> str:
    """An architecture's name for a table: "classic" for vit_classic."""
    return name.removeprefix("vit_")


def terminal_width(stream: TextIO) -> int | None:
    """Columns of the terminal that a stream writes to, or what COLUMNS says; None where it is a pipe or a file."""
    if not stream.isatty():
        return None
    try:
        given = max(0, int(os.environ.get("COLUMNS", 0)))
    except ValueError:
        given = 0
    try:
        return given or os.get_terminal_size(stream.fileno()).columns or None
    except (OSError, ValueError):  # a stream without a descriptor
        return None


# Longer lines are hard to read.
_WIDEST = 100
# Never broken: commands, which are copied, and a number with its unit.
_WHOLE = re.compile(
    r"`[^`]*`|(?<=: )(?:uv|pip|python3? \S*\.py|run\.py) .*|\b(?:uv run|python3?) (?:\S+ )*run\.py .*|"
    r"\d (?=%|(?:s|min|h|GB|points|nats)\b)"
)
# Columns stand two spaces apart, prose is what the last of them has.
_LAST_COLUMN = re.compile(r"(?: *\S+(?: \S+)*  +)*(?=\S)")


# Stands behind a character that a terminal shows two columns wide, while lines are folded.
_FILLER = "\1"


def folded(text: str, width: int | None) -> str:
    """Lines that fit a width, folded between words; further lines of a last column begin below it.

    A word, a command and a row whose last column begins beyond the middle are never broken.

    Args:
        width: of the terminal; None folds nothing.
    """
    if width is None:
        return text
    wide = text if text.isascii() else "".join(each + _FILLER * (cell_len(each) - 1) for each in text)
    return "\n".join(_folded(line, min(width, _WIDEST)) for line in wide.split("\n")).replace(_FILLER, "")


def _folded(line: str, width: int) -> str:
    if len(line) <= width:
        return line
    before = _LAST_COLUMN.match(line)
    start = before.end() if before else 0
    if start > width // 2:
        return line
    if not start:  # its own indentation, or below a first word
        start = len(line) - len(line.lstrip())
    prose = _WHOLE.sub(lambda whole: whole[0].replace(" ", "\0"), line[start:])
    below = " " * (start or 2)
    lines = textwrap.wrap(prose, width, initial_indent=" " * start, subsequent_indent=below, break_long_words=False, break_on_hyphens=False)
    return (line[:start] + "\n".join(lines)[start:]).replace("\0", " ")


def runner() -> str:
    """What runs `run.py` here."""
    return "uv run" if "UV" in os.environ or "UV_RUN_RECURSION_DEPTH" in os.environ else "python"


def for_terminal(text: str, stream: TextIO) -> str:
    """A text as its stream shows it: folded on a terminal, and with commands that can be copied."""
    return folded(re.sub(r"`(?=run\.py )", f"`{runner()} ", text), terminal_width(stream))


def say(text: str) -> None:
    """Print a message to stderr, without secrets."""
    print(for_terminal(redacted(text), sys.stderr), file=sys.stderr, flush=True)


def show(text: str) -> None:
    """Print a result to stdout."""
    print(for_terminal(text, sys.stdout), flush=True)


def warn(text: str) -> None:
    """Print a warning to stderr, in yellow on a terminal, without secrets."""
    click.secho(for_terminal(redacted(f"warning: {text}"), sys.stderr), err=True, fg="yellow")


# In place of a path: print it.
STDOUT = Path("-")


def put(text: Callable[[], str], value: Callable[[], Any], json_to: Path | None) -> None:
    """Print a result's text; or its JSON; or the text, with the JSON in a file."""
    if json_to != STDOUT:
        show(text())
    if json_to:
        put_json(value(), json_to)


def put_json(value: Any, to: Path) -> None:
    """Print JSON, or write it to a file, in one step."""
    content = json.dumps(value, indent=1)
    if to == STDOUT:
        print(content, flush=True)
    else:
        write_atomically(to, f"{content}\n".encode())


def significant(value: float) -> str:
    """Three significant digits, without an exponent where that can be read."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
        return f"{value:,.{digits}f}"
    return f"{value:.2e}"


def flops_unit(flops: Sequence[float]) -> tuple[float, str]:
    """The unit for a column of FLOPs: the smallest in which the largest has at most four digits before the point."""
    most = max(flops, default=0.0)
    return next(((unit, name) for unit, name in ((1e9, "GFLOP"), (1e12, "TFLOP"), (1e15, "PFLOP")) if most < 1e4 * unit), (1e18, "EFLOP"))


def clock(seconds: float, with_hours: bool = False) -> str:
    """h:mm:ss; m:ss below an hour, unless a table wants the hours."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours or with_hours else f"{minutes}:{rest:02}"


def duration(seconds: float) -> str:
    """In the two largest units that it has."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {seconds % 60:.0f} s"
    return f"{int(seconds // 3600):,} h {int(seconds % 3600 // 60)} min"
