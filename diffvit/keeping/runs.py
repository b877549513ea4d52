"""Transfer of runs: push and fetch finished ones, and find what unfinished ones left in the storage."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable
from pathlib import Path

from diffvit.errors import StorageError, UserError
from diffvit.keeping.base import MARKER, Storage
from diffvit.ledger.disk import write_atomically
from diffvit.ledger.files import RunFiles
from diffvit.ledger.results import Result, read_result


def push_run(storage: Storage, files: RunFiles, result: Result, removes: Iterable[str] = ()) -> None:
    """Copy an ended run to the storage, its result last, then remove other objects."""
    names = [*result.sha256, files.result.name]
    try:
        storage.commit({f"{files.model}/{name}": files.folder / name for name in names}, removes)
    except FileNotFoundError as error:
        raise StorageError(
            f"the run {files.run_id} cannot be copied to {storage.url}: {error.filename} is missing.",
            "`run.py list --verify` says what else is.",
        ) from error


def settle_run(storage: Storage, files: RunFiles) -> None:
    """Fetch an ended run that is only in the storage, or push one that is only here, and remove its states and leases there."""
    result = read_result(files.result)
    if result is None:
        fetch_run(storage, files)
        return
    leases = f"{state_folder(files.run_id)}/lease"
    under_way = [*leftovers(storage, files.run_id), *(f"{leases}/{name}" for name in storage.ls(leases))]
    if not storage.has(f"{files.model}/{files.result.name}"):
        push_run(storage, files, result, under_way)
    elif under_way:
        storage.commit({}, under_way)


def state_folder(run_id: str) -> str:
    """The storage's folder for an unfinished run's states and leases."""
    return f".state/{run_id}"


def leftovers(storage: Storage, run_id: str) -> list[str]:
    """All state objects of a run in the storage, partial ones too."""
    folder = state_folder(run_id)
    names = {name.removesuffix(MARKER) for name in storage.ls(folder)}
    return sorted(f"{folder}/{name}" for name in names if name.endswith((".state", ".log")))


def fetch_run(storage: Storage, files: RunFiles, remote: tuple[Result, bytes] | None = None) -> bool:
    """Fetch an ended run from the storage, its result last. False where the storage does not have all of it.

    Args:
        remote: its remote_result, where that is known already.
    """
    remote = remote or remote_result(storage, files)
    if remote is None:
        return False
    result, content = remote
    if not all(storage.get(f"{files.model}/{name}", files.folder / name) for name in result.sha256):
        return False
    write_atomically(files.result, content)  # the one that was looked at
    return True


def remote_result(storage: Storage, files: RunFiles) -> tuple[Result, bytes] | None:
    """The result that a storage has of a run, and its file's content; None where it has none.

    Raises:
        StorageError: it is not this run's result.
    """
    content = storage.read(f"{files.model}/{files.result.name}")
    if content is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        path.write_bytes(content)
        with contextlib.suppress(UserError):
            result = read_result(path)
            if result and result.files(files.checkpoints) == files:
                return result, content
    raise StorageError(f"{files.result.name} in {storage.url} is not a result of diffvit.", "remove it there.")
