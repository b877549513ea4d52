"""The storage that boxes share: finished runs exchanged, shards kept alive, the runs of lost boxes taken over."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from diffvit.errors import StorageError
from diffvit.keeping.saving import is_on_hub
from diffvit.ledger.files import RunFiles
from study.options import StudyOptions
from study.plan import PlannedRun
from study.text import say


def here_or(runs: list[PlannedRun], every: list[PlannedRun]) -> list[PlannedRun]:
    """The runs, and those of others that have ended here."""
    ids = {run.run_id for run in runs}
    return [run for run in every if run.run_id in ids or run.ended]


def share_of(runs: list[PlannedRun], options: StudyOptions) -> list[PlannedRun]:
    """This box's runs."""
    if not options.shard:
        return runs
    from study.shard import shares

    return shares(runs, options.shard.of)[options.shard.number - 1]


@contextlib.contextmanager
def alive(options: StudyOptions, runs: list[PlannedRun]) -> Iterator[Callable[[], None]]:
    """With a shard and a storage: while the block runs, other boxes see that this one lives. Yields what to call if work is left undone."""
    if not (options.shard and options.saving.storage):
        yield lambda: None
        return
    from diffvit.keeping.storage import open_storage
    from study.shard import sign_of_life

    storage = open_storage(options.saving.storage)
    warn = lambda text: say(f"warning: {text}")  # noqa: E731
    with sign_of_life(storage, runs, options.shard, options.checkpoints, options.saving.lease_seconds, warn) as undone:
        yield undone


def left_by_others(options: StudyOptions, runs: list[PlannedRun], tried: list[PlannedRun]) -> list[PlannedRun]:
    """Runs of other boxes that this one takes over, having ended its own."""
    if not (options.shard and options.saving.storage):
        return []
    from diffvit.keeping.storage import open_storage
    from study.shard import stranded

    try:
        found = stranded(open_storage(options.saving.storage), runs, options.shard, options.checkpoints)
    except StorageError as error:
        say(f"warning: {error.message} What other boxes left undone is not looked for.")
        return []
    ids = {run.run_id for run in tried}
    found = [run for run in found if run.run_id not in ids]
    if found:
        say(f"{len(found)} runs were left undone by other boxes; taking them over")
    return found


def publish_card(options: StudyOptions, unsent: list[str]) -> None:
    """On the hub: the model card, and what could not be sent, with the command that sends it later."""
    if is_on_hub(options.saving.storage):
        from study.hub import publish

        publish(str(options.saving.storage), options.checkpoints, lambda text: say(f"warning: {text}"))
        if unsent:
            say(f"warning: {len(unsent)} runs are not on the hub yet: {'; '.join(unsent)}\nhint: send them later with {options.command}")


def check_storage(options: StudyOptions) -> None:
    """Raises UserError where the storage cannot be used, before anything that takes long: data may have to be downloaded."""
    if options.saving.storage:
        from diffvit.keeping.storage import open_storage

        open_storage(options.saving.storage).check()


def exchange(options: StudyOptions, runs: list[PlannedRun], strict: bool = True) -> list[str]:
    """With a storage: brings ended runs that are only there, and sends those that are only here.

    Args:
        strict: a storage that does not answer is an error.

    Returns:
        Titles of the runs that could not be exchanged.
    """
    if not options.saving.storage:
        return []
    from diffvit.keeping.runs import settle_run
    from diffvit.keeping.storage import open_storage

    storage, unsent = open_storage(options.saving.storage), []
    for run in runs:
        try:
            settle_run(storage, RunFiles.of(options.checkpoints, run.spec, str(run.run_id)))
        except StorageError:
            if strict:
                raise
            unsent.append(run.spec.title)
    return unsent
