"""Text for a person: aligned columns, numbers, times, and messages on stderr."""

from __future__ import annotations

import math
import sys
from typing import Any

from diffvit.errors import redacted


def columns(rows: list[tuple[str, ...]], right: Any = ()) -> str:
    """Aligned text; no colour, no lines, so that it can be read anywhere and cut by any tool."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = (
        "  ".join(cell.rjust(width) if i in right else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def say(text: str) -> None:
    """Print a message to stderr, without secrets."""
    print(redacted(text), file=sys.stderr, flush=True)


def significant(value: float) -> str:
    """Three significant digits at least, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def clock(seconds: float) -> str:
    """h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def duration(seconds: float) -> str:
    """In the two largest units that it has."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {seconds % 60:.0f} s"
    return f"{int(seconds // 3600):,} h {int(seconds % 3600 // 60)} min"


def three_digits(value: float) -> str:
    """Three significant digits, without an exponent where that can be read."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
        return f"{value:,.{digits}f}"
    return f"{value:.2e}"
