"""Runs that are stopped on their way."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from diffvit.ledger.spec import RunSpec
from diffvit.loop.fit import Stopped
from diffvit.train import train


def stop_after(steps: int, spec: RunSpec, checkpoints: Path, **options: Any) -> int:
    """Train on the CPU for so many steps more; the state after the last is saved. Returns the step that was reached."""
    asked = itertools.count(1)  # after each step
    with pytest.raises(Stopped) as stopped:
        train(spec, checkpoints, device="cpu", should_stop=lambda: next(asked) >= steps, **options)
    return stopped.value.step
