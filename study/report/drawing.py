"""Matplotlib as the figures need it: whatever the user's settings are, the same data give the same files.

Modules that draw import this one before matplotlib, whose import a backend that is not installed or a damaged settings file would end.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from diffvit.ledger.disk import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E4E7EB",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.edgecolor": "#8A94A0",
    "svg.fonttype": "none",
    "svg.hashsalt": "diffvit",
}


def _import_matplotlib() -> None:
    """Without the user's settings and what it says about them; then these are set again, for figures of the user's own."""
    log = logging.getLogger("matplotlib")
    level = log.level
    log.setLevel(logging.ERROR)  # else a few lines where its folder cannot be written
    try:
        with mock.patch.dict(os.environ, MATPLOTLIBRC=os.devnull):
            os.environ.pop("MPLBACKEND", None)
            import matplotlib.figure
        with contextlib.suppress(Exception):
            matplotlib.rc_file(matplotlib.matplotlib_fname())
        with contextlib.suppress(KeyError, ValueError):
            matplotlib.rcParams["backend"] = os.environ["MPLBACKEND"]
    finally:
        log.setLevel(level)


if "matplotlib" not in sys.modules:
    _import_matplotlib()


@contextlib.contextmanager
def our_style() -> Iterator[None]:
    """Figures that are made and saved within look as ours do: nothing in them is the user's setting."""
    from matplotlib import rc_context, rcParamsDefault

    settings: dict[Any, Any] = {key: value for key, value in rcParamsDefault.items() if key != "backend"}
    with rc_context(settings | _STYLE):
        yield


def save(figure: Figure, stem: Path) -> Iterable[Path]:
    """PNG and SVG, without a date, so that the same data give the same file."""
    png, svg = stem.with_name(stem.name + ".png"), stem.with_name(stem.name + ".svg")
    write_atomically(png, lambda file: figure.savefig(file, format="png", dpi=160))
    write_atomically(svg, lambda file: figure.savefig(file, format="svg", metadata={"Date": None}))
    return [png, svg]
