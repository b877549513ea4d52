"""When and where the state of an unfinished run is kept. Pure data, without torch, so that the command line starts at once."""

from __future__ import annotations

import re
from dataclasses import dataclass

from diffvit.errors import UserError, shown


@dataclass(frozen=True)
class Every:
    """An interval of training: `seconds` or `steps`, whichever is given."""

    seconds: float | None = None
    steps: int | None = None

    @staticmethod
    def parse(text: str) -> Every:
        """From "90", "90s", "2m", "1h" or "500steps". Raises UserError."""
        match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{0,9})?|\.\d{1,9})\s*(s|m|h|steps?)?\s*", str(text).lower(), re.ASCII)
        number, unit = (float(match[1]), match[2] or "s") if match else (0.0, "")
        if unit.startswith("step") and number >= 1 and number == int(number):
            return Every(steps=int(number))
        seconds = number * {"s": 1, "m": 60, "h": 3600}.get(unit, 0)
        if 0 < seconds < 1e9:  # what a clock can wait
            return Every(seconds=seconds)
        raise UserError(f"{shown(text)} is not an interval.", "give a time such as 60s, 10m or 1h, or a number of steps such as 500steps.")

    def __str__(self) -> str:
        return f"{self.steps}steps" if self.steps is not None else f"{self.seconds:g}s"

    def over(self, seconds: float, steps: int) -> bool:
        """Whether an interval that began so many seconds and steps ago is over."""
        return steps >= self.steps if self.steps is not None else seconds >= (self.seconds or 0.0)


@dataclass(frozen=True)
class Saving:
    """How an unfinished run survives what happens to its process, disk and machine.

    Attributes:
        every: how often its state is saved on this machine; what a kill costs at most.
        storage: a path or fsspec URL off this machine, where states and finished runs are copied to; None: nowhere.
        sync_every: seconds between two copies of the state; what the loss of the machine costs at most.
        lease_seconds: how long after its last sign of life another machine may take a run over.
        needs_storage: a run does not begin while the storage does not answer. False: it begins without, and joins once it does.
    """

    every: Every = Every(seconds=60.0)
    storage: str | None = None
    sync_every: float = 600.0
    lease_seconds: float = 300.0
    needs_storage: bool = True


DEFAULT_SAVING = Saving()

HUB_SCHEME = "hf://"

# On the Hugging Face hub each renewal, three in this time, is a commit, of which the hub takes only so many an hour.
HUB_LEASE_SECONDS = 1800.0


def is_on_hub(storage: str | None) -> bool:
    """Whether a storage is a repository on the Hugging Face hub."""
    return (storage or "").startswith(HUB_SCHEME)
