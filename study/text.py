"""Output: text for a person with aligned columns, numbers and times, JSON for programs, and messages on stderr."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffvit.errors import redacted
from diffvit.ledger.disk import write_atomically


def columns(rows: list[tuple[str, ...]], right: Any = ()) -> str:
    """Aligned text; no colour, no lines, so that it can be read anywhere and cut by any tool."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = (
        "  ".join(cell.rjust(width) if i in right else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def runs_table(
    header: tuple[str, ...], rows: Sequence[tuple[str, ...]], numbers: Collection[str] = (), shared: Collection[str] = ()
) -> str:
    """Runs as aligned text that fits a terminal: columns without any text go, and `shared` ones that say the same of all runs go on top.

    Args:
        numbers: headers of columns that are aligned right.
    """
    values = dict(zip(header, zip(*rows, strict=True), strict=True))
    alike = same_everywhere(values, shared) if len(rows) > 1 else {}
    kept = [name for name, texts in values.items() if name not in alike and any(texts)]
    title = ", ".join(filter(None, alike.values()))
    body = zip(*(values[name] for name in kept), strict=True)
    table = columns([tuple(kept), *body], right=[number for number, name in enumerate(kept) if name in numbers])
    return f"{title}\n{table}" if title else table


def same_everywhere(values: Mapping[str, Sequence[str]], names: Collection[str]) -> dict[str, str]:
    """Of these columns, those that tell no run from another, and what a title says instead, such as "seed 0"."""
    alike = {name: values[name][0] for name in names if len(set(values[name])) == 1}
    return {name: text if name in ("data set", "overrides") or not text else f"{name} {text}" for name, text in alike.items()}


def short_model(name: str) -> str:
    """An architecture's name for a table: "classic" for vit_classic."""
    return name.removeprefix("vit_")


def say(text: str) -> None:
    """Print a message to stderr, without secrets."""
    print(redacted(text), file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Print a warning to stderr, without secrets."""
    say(f"warning: {text}")


# In place of a path: print it.
STDOUT = Path("-")


def put(text: Callable[[], str], value: Callable[[], Any], json_to: Path | None) -> None:
    """Print a result's text; or its JSON; or the text, with the JSON in a file."""
    if json_to != STDOUT:
        print(text(), flush=True)
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
