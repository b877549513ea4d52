"""A study on boxes that share nothing but a storage: each trains its share, and what one leaves undone another takes over.

The share follows from the grid alone. A box renews a lease in the storage while it lives; the unfinished runs of one that fell silent, or
was stopped, are taken over by any box that has finished its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffvit.errors import StorageError, UserError, shown
from diffvit.keeping.base import Storage
from diffvit.keeping.lease import Lease, lease_state, take_lease
from diffvit.keeping.state import folder_id
from diffvit.ledger.files import RunFiles
from diffvit.ledger.spec import RunSpec
from diffvit.repeat import Repeater
from study.plan import PlannedRun


@dataclass(frozen=True)
class Shard:
    """The `number`-th of `of` shares, counted from 1."""

    number: int
    of: int

    @staticmethod
    def parse(text: str) -> Shard:
        """From "2/4". Raises UserError."""
        match = re.fullmatch(r"\s*(\d{1,4})\s*/\s*(\d{1,4})\s*", text)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise UserError(f"--shard is {shown(text)}.", "give the number of this box and how many there are, such as 2/4.")
        return Shard(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


def shares(runs: Sequence[PlannedRun], of: int) -> list[list[PlannedRun]]:
    """The runs in `of` parts of about equal cost: each next dearest run goes to the part that has least.

    Done runs count too: all boxes must compute the same parts. Raises UserError for fewer runs than parts.
    """
    if of > len(runs):
        raise UserError(f"the grid has {len(runs)} runs and --shard makes {of} parts of it.", f"give at most {len(runs)}.")
    parts: list[list[PlannedRun]] = [[] for _ in range(of)]
    costs = [0.0] * of
    for run in sorted(runs, key=lambda run: -run.train_flops):  # of equal ones, as the grid has them
        least = costs.index(min(costs))
        parts[least].append(run)
        costs[least] += run.train_flops
    return parts


def own_share(runs: list[PlannedRun], shard: Shard | None) -> list[PlannedRun]:
    """The runs of this box: all of them without a shard. Raises UserError for fewer runs than boxes."""
    return shares(runs, shard.of)[shard.number - 1] if shard else runs


@contextlib.contextmanager
def sign_of_life(storage: Storage, runs: Sequence[PlannedRun], shard: Shard, checkpoints: Path, seconds: float,
                 warn: Callable[[str], None]) -> Iterator[Callable[[], None]]:  # fmt: skip
    """Hold the lease of a shard while the block runs, so that other boxes see that it is being trained.

    Args:
        seconds: a box counts as dead so long after its last renewal.

    Yields:
        A function to call where the block ends with work undone, so that others need not wait.
    """
    undone = threading.Event()
    lease = take_lease(storage, _name(runs, shard), folder_id(checkpoints), seconds)
    if not isinstance(lease, Lease):
        warn(f"another box trains shard {shard}: {lease}; each run is still trained by one of both")
        yield undone.set
        return

    def renew() -> float:
        with contextlib.suppress(StorageError):
            lease.renew()
        return seconds / 3

    try:
        with Repeater("sign-of-life", renew, seconds / 3):
            yield undone.set
    except BaseException:
        undone.set()
        raise
    finally:
        with contextlib.suppress(StorageError):  # else it runs out by itself
            lease.expire() if undone.is_set() else lease.release()


def stranded(storage: Storage, runs: Sequence[PlannedRun], shard: Shard, checkpoints: Path) -> list[PlannedRun]:
    """Runs of other shares that are not done and that nobody trains: their box fell silent, was stopped, or left a state behind."""
    found = []
    for number, part in enumerate(shares(runs, shard.of), start=1):
        if number == shard.number:
            continue
        silent = lease_state(storage, _name(runs, Shard(number, shard.of))) == "expired"
        for run in part:
            files = RunFiles.of(checkpoints, run.spec, str(run.run_id))
            if files.result.is_file() or storage.has(f"{files.model}/{files.result.name}"):
                continue
            lease = lease_state(storage, files.run_id)
            if lease == "expired" or (lease == "none" and (silent or storage.names(f".state/{files.run_id}", ".state"))):
                found.append(run)
    return found


def forget_shards(storage: Storage, runs: Sequence[PlannedRun] | Sequence[RunSpec]) -> None:
    """Remove the shards' leases once all runs are done. Where the storage fails, they stay."""
    prefix = _prefix(runs)
    with contextlib.suppress(StorageError):
        for folder in storage.ls(".state"):
            if folder.startswith(prefix):
                storage.commit({}, [f".state/{folder}/lease/{name}" for name in storage.entries(f".state/{folder}/lease")])


def _name(runs: Sequence[PlannedRun], shard: Shard) -> str:
    """The shard's name in the storage, which does not depend on the precision that a box trains in."""
    return f"{_prefix(runs)}-{shard.number}-of-{shard.of}"


def _prefix(runs: Sequence[PlannedRun] | Sequence[RunSpec]) -> str:
    titles = sorted((run.spec if isinstance(run, PlannedRun) else run).title for run in runs)
    return f"shard-{hashlib.sha256('; '.join(titles).encode()).hexdigest()[:10]}"
