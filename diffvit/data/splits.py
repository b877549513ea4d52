"""Stratified splits that depend on labels and a salt only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diffvit.protocol import stable_seed


def mixed(rows: np.ndarray) -> np.ndarray:
    """Rows in an order that looks random and is always the same."""
    return np.asarray(sorted(rows.tolist(), key=lambda row: stable_seed("mixed", row)), dtype=np.int64)


def split_rows(labels: np.ndarray, fractions: Sequence[float], salt: str) -> list[np.ndarray]:
    """Row numbers of stratified parts, disjoint and sorted; each class is cut at rounded cumulative fractions.

    The order within a class is that of a hash of the row number, so that the split is the same for ever.
    """
    parts: list[list[np.ndarray]] = [[] for _ in fractions]
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        rows = np.asarray(sorted(rows.tolist(), key=lambda row: stable_seed("split", salt, row)))
        cuts = np.rint(np.cumsum(fractions)[:-1] * len(rows)).astype(int)
        for part, chunk in zip(parts, np.split(rows, cuts), strict=True):
            part.append(chunk)
    return [np.sort(np.concatenate(part)) for part in parts]
