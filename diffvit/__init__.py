"""Differential and classic Vision Transformers, and the loop that trains both alike."""

from __future__ import annotations

from typing import Any

from diffvit.machine.host import lend_home

__version__ = "0.1.0"
__all__ = ["from_pretrained"]

# Before any library looks for a home.
LENT_HOME = lend_home()


def __getattr__(name: str) -> Any:
    # Imported where it is used: the command line must start without it.
    if name == "from_pretrained":
        from diffvit.utils import from_pretrained

        return from_pretrained
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
