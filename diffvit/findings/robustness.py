"""A finished model's accuracy on noisy, blurred and cluttered test images.

Every model sees the same noise: it is drawn from the data and the condition, never from a run's seed, and for fixed blocks
of rows of the test set, so that neither the batch size nor a limit changes an image.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffvit.checks import list_of, one_of, real, record, text, whole
from diffvit.data.corruptions import BACKGROUNDS, CORRUPTIONS, VERSION, clutter, corrupt
from diffvit.dataset import Dataset, ImageSet
from diffvit.evaluation import data_warnings, evaluate, open_checkpoint
from diffvit.protocol import stable_seed

_BLOCK_ROWS = 64
_CLUTTER = "clutter-"

# Every condition, as (corruption, severity): unchanged images, five corruptions at five severities, two kinds of clutter.
CONDITIONS: tuple[tuple[str, int], ...] = (
    ("clean", 0),
    *((corruption, severity) for corruption, levels in CORRUPTIONS.items() for severity in range(1, len(levels) + 1)),
    *((_CLUTTER + background, 0) for background in BACKGROUNDS),
)


_CONDITION = record(
    {
        "corruption": text(), "severity": whole(), "accuracy": real(0, 1), "loss": real(infinite=True),
        "right": text("[A-Za-z0-9+/]*={0,2}", 2**24),
    }
)  # fmt: skip
_KEPT = record(
    {
        "version": one_of(VERSION), "images": whole(1, 10**8), "warnings": list_of(text()),
        "conditions": list_of(_CONDITION, len(CONDITIONS), len(CONDITIONS)),
    }
)  # fmt: skip


def wrong_findings(found: Any) -> str | None:
    """Check findings of evaluate_corruptions that were read from a file (see checks.py)."""
    if wrong := _KEPT(found):
        return wrong
    if [(each["corruption"], each["severity"]) for each in found["conditions"]] != list(CONDITIONS):
        return " has other conditions"
    packed = math.ceil(found["images"] / 8)
    if any(len(each["right"]) != 4 * math.ceil(packed / 3) for each in found["conditions"]):
        return " does not say of each image whether it was classified correctly"
    return None


def evaluate_corruptions(
    checkpoint: Path,
    *,
    data_root: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    device: torch.device,
    on_progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure a checkpoint's accuracy and loss on its test set under each of CONDITIONS.

    Args:
        limit: the first so many test images only.
        on_progress: called with a line after each condition.

    Returns:
        A dict that JSON can hold: "version", "images", "warnings" and "conditions", each with its "corruption", "severity" (0 for clean
        images and clutter), "accuracy", "loss" in nats, and "right": which images were classified correctly, as right_answers reads it.

    Raises:
        UserError: the checkpoint or the data are missing or damaged.
    """
    model, facts, data, prepare = open_checkpoint(checkpoint, data_root, device)
    conditions = []
    for number, (corruption, severity) in enumerate(CONDITIONS, start=1):
        images = corrupted_test_set(data, corruption, severity, limit)
        outcome = evaluate(model, images, prepare=prepare, batch_size=batch_size, precision=facts["precision"])
        right = (outcome.labels == outcome.predicted).numpy()
        conditions.append(
            {
                "corruption": corruption,
                "severity": severity,
                "accuracy": outcome.accuracy,
                "loss": outcome.loss,
                "right": base64.b64encode(np.packbits(right).tobytes()).decode(),
            }
        )
        if on_progress:
            named = f"{corruption} {severity}" if severity else corruption
            on_progress(f"{number}/{len(CONDITIONS)}  {named}: accuracy {100 * outcome.accuracy:.1f} %")
    return {"version": VERSION, "images": len(outcome.labels), "warnings": data_warnings(facts, data), "conditions": conditions}


def corrupted_test_set(data: Dataset, corruption: str, severity: int, limit: int | None = None) -> ImageSet:
    """The first `limit` test images, or all, under a condition.

    The images behind cluttered ones come from the validation split: no model was trained on them, and no test image is its
    own background.
    """
    if corruption == "clean":
        return data.test.head(limit)
    rows = len(data.test) if limit is None else min(limit, len(data.test))
    blocks = []
    for first in range(0, rows, _BLOCK_ROWS):
        # A whole block even where the limit cuts it: an image's noise depends on the shape that is drawn.
        pixels = data.test.pixels[first : first + _BLOCK_ROWS]
        generator = torch.Generator().manual_seed(stable_seed("corruption", data.fingerprint, corruption, severity, first))
        if corruption.startswith(_CLUTTER):
            blocks.append(clutter(pixels, corruption.removeprefix(_CLUTTER), generator, data.val.pixels)[0])
        else:
            blocks.append(corrupt(pixels, corruption, severity, generator))
    return ImageSet(torch.cat(blocks), data.test.labels[: len(blocks) * _BLOCK_ROWS]).head(rows)


def right_answers(condition: Mapping[str, Any], images: int) -> np.ndarray:
    """True for each image that a model classified correctly under a condition of evaluate_corruptions. bool [images]"""
    packed = np.frombuffer(base64.b64decode(condition["right"]), dtype=np.uint8)
    return np.unpackbits(packed, count=images).astype(bool)


def summarise(findings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Summarise findings of evaluate_corruptions, a row a corruption: clean, the five, their mean, and each kind of clutter.

    Returns:
        Rows of "corruption"; "error", a share, and "loss" in nats, both means over severities; and "relative_error", the error over
        that on clean images, None where that is 0. The row "mean" is over the five corruptions, without clutter.
    """
    errors: dict[str, list[float]] = {}
    losses: dict[str, list[float]] = {}
    for condition in findings["conditions"]:
        names = [condition["corruption"], *(["mean"] if condition["corruption"] in CORRUPTIONS else [])]
        for name in names:
            errors.setdefault(name, []).append(1 - condition["accuracy"])
            losses.setdefault(name, []).append(condition["loss"])
    clean = errors["clean"][0]
    return [
        {
            "corruption": name,
            "error": float(np.mean(errors[name])),
            "loss": float(np.mean(losses[name])),
            "relative_error": float(np.mean(errors[name])) / clean if clean else None,
        }
        for name in ("clean", *CORRUPTIONS, "mean", *(_CLUTTER + background for background in BACKGROUNDS))
    ]


def summary_lines(findings: Mapping[str, Any]) -> list[str]:
    """A readable table of the findings, a line a corruption."""
    lines = [f"  {'':<16} {'error':>8} {'loss':>8} {'relative':>9}"]
    for row in summarise(findings):
        relative = f"{row['relative_error']:.2f}" if row["relative_error"] is not None else ""
        lines.append(f"  {row['corruption']:<16} {100 * row['error']:>6.2f} % {row['loss']:>8.4f} {relative:>9}")
    return lines
