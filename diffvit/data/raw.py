"""What a loader gives: a data set before its images are decoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Raw:
    """What a loader function returns: labels of all rows and their split are cheap, pixels are made on demand."""

    classes: Sequence[str]
    labels: np.ndarray
    rows: dict[str, np.ndarray]
    decode: Callable[[np.ndarray], np.ndarray]
    notes: list[str] = field(default_factory=list)
    cache_key: str | None = None


LOADERS: dict[str, Callable[[Path | None], Raw]] = {}
HUB_NAMES: dict[str, str] = {}


def loader(name: str, hub: str | None = None) -> Callable[[Callable[[Path | None], Raw]], Callable[[Path | None], Raw]]:
    """Marks the function that loads a data set; it takes the data root. `hub` is where the Hugging Face hub has it."""

    def mark(function: Callable[[Path | None], Raw]) -> Callable[[Path | None], Raw]:
        LOADERS[name] = function
        if hub:
            HUB_NAMES[name] = hub
        return function

    return mark
