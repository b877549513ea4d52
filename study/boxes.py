"""The boxes of a study: how one shares runs with the others through a storage, which may be the hub."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from diffvit.errors import StorageError
from diffvit.keeping.runs import settle_run
from diffvit.keeping.saving import Saving, is_on_hub
from diffvit.keeping.storage import open_storage
from diffvit.ledger.files import RunFiles
from diffvit.ledger.spec import RunSpec
from study.plan import PlannedRun
from study.shard import Shard, forget_shards, sign_of_life, stranded
from study.text import say, warn


def boxes_of(saving: Saving, shard: Shard | None, checkpoints: Path) -> Boxes:
    """The boxes that share a storage; without one, this box alone. Raises UserError for a storage that is not known."""
    return SharedBoxes(saving, shard, checkpoints) if saving.storage else Boxes(checkpoints)


class Boxes:
    """A box without a storage: it exchanges nothing."""

    def __init__(self, checkpoints: Path):
        self.checkpoints = checkpoints

    def check(self) -> None:
        """Raises StorageError where the storage cannot be used, before anything that takes long: data may have to be downloaded."""

    def exchange(self, tried: list[PlannedRun], every: list[PlannedRun], strict: bool = True) -> list[str]:
        """Fetch ended runs that are only in the storage, and send those that are only here.

        Args:
            tried: this box's runs; of `every` other run only what has ended here is sent.
            strict: a storage that does not answer is an error.

        Returns:
            Titles of the runs that could not be exchanged.
        """
        return []

    @contextlib.contextmanager
    def alive(self, runs: list[PlannedRun]) -> Iterator[Callable[[], None]]:
        """While the block runs, show other boxes that this one is alive. Yields a function to call if work is left undone."""
        yield lambda: None

    def left_by_others(self, runs: list[PlannedRun], tried: list[PlannedRun]) -> list[PlannedRun]:
        """Runs of other boxes that this one takes over once its own have ended."""
        return []

    def collect(self, specs: Sequence[RunSpec]) -> list[str]:
        """Fetch all ended runs of these cells, whoever trained them. Returns the run_ids that were not here. Raises StorageError."""
        return []

    def publish(self) -> None:
        """On the hub: write the model card."""

    def report_unsent(self, titles: Iterable[str], command: str) -> list[tuple[str, str]]:
        """Say which runs are not on the hub yet. Returns (title, reason) where a run that was not exchanged is a failure."""
        return []

    def forget(self, specs: Sequence[RunSpec]) -> None:
        """Remove what only a study under way needs in the storage, once all runs are done."""


class SharedBoxes(Boxes):
    """Boxes that share a storage."""

    def __init__(self, saving: Saving, shard: Shard | None, checkpoints: Path):
        super().__init__(checkpoints)
        self._saving, self._shard = saving, shard
        self._storage = open_storage(str(saving.storage))

    def check(self) -> None:
        self._storage.check()

    def exchange(self, tried: list[PlannedRun], every: list[PlannedRun], strict: bool = True) -> list[str]:
        ids, unsent = {run.run_id for run in tried}, []
        for run in every:
            if run.run_id in ids or run.ended:
                try:
                    settle_run(self._storage, RunFiles.of(self.checkpoints, run.spec, str(run.run_id)))
                except StorageError:
                    if strict:
                        raise
                    unsent.append(run.spec.title)
        return unsent

    @contextlib.contextmanager
    def alive(self, runs: list[PlannedRun]) -> Iterator[Callable[[], None]]:
        if not self._shard:
            yield lambda: None
            return
        with sign_of_life(self._storage, runs, self._shard, self.checkpoints, self._saving.lease_seconds, warn) as undone:
            yield undone

    def left_by_others(self, runs: list[PlannedRun], tried: list[PlannedRun]) -> list[PlannedRun]:
        if not self._shard:
            return []
        try:
            left = stranded(self._storage, runs, self._shard, self.checkpoints)
        except StorageError as error:
            warn(f"{error.message} Unfinished runs of other boxes are not looked for.")
            return []
        ids = {run.run_id for run in tried}
        left = [run for run in left if run.run_id not in ids]
        if left:
            say(f"{len(left)} runs were left undone by other boxes; taking them over")
        return left

    def collect(self, specs: Sequence[RunSpec]) -> list[str]:
        from study.hub import collect

        return collect(self._storage, specs, self.checkpoints)

    def publish(self) -> None:
        if is_on_hub(self._saving.storage):
            from study.hub import publish

            publish(self._storage, self.checkpoints, warn)

    def report_unsent(self, titles: Iterable[str], command: str) -> list[tuple[str, str]]:
        titles = list(titles)
        if not is_on_hub(self._saving.storage):
            return [(title, f"the storage {self._saving.storage} could not be reached") for title in titles]
        if titles:
            warn(f"{len(titles)} runs are not on the hub yet: {'; '.join(titles)}\nhint: send them later with {command}")
        return []

    def forget(self, specs: Sequence[RunSpec]) -> None:
        forget_shards(self._storage, specs)
        self._storage.tidy()
