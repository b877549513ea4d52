"""Resume states: what an unfinished run needs to go on as if nothing had happened.

A run's states lie in checkpoints/.state/{run_id}/, one file each, named by step. A file is written aside, flushed and renamed, and
ends with the SHA-256 of what precedes: a truncated or changed file is recognised, reported and passed over for the one
before. Two are kept. The folder goes when the run ends.

Batches and dropout depend on a step's number only (train.py), so a state holds no random generator and no position in the data but
the step itself.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch

from diffvit.ledger import write_atomically

_KEPT = 2
_DIGEST_BYTES = 32


class _HashingWriter(io.RawIOBase):
    """Passes bytes on to a file and hashes them: a large state is never held twice."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self._file.write(data)

    def writable(self) -> bool:
        return True


class StateFolder:
    """The resume states of one run.

    Args:
        checkpoints: the ledger.
        on_warning: hears of damaged files.
    """

    def __init__(self, checkpoints: Path, run_id: str, on_warning: Callable[[str], None] | None = None):
        self.path = Path(checkpoints) / ".state" / run_id
        self._warn = on_warning or (lambda text: None)

    def save(self, step: int, content: dict[str, Any]) -> None:
        """Keep `content` (tensors, numbers, strings, and dicts and lists of them) as the state after `step`."""

        def write(file: BinaryIO) -> None:
            hashing = _HashingWriter(file)
            torch.save(content, cast(IO[bytes], hashing))
            file.write(hashing.digest.digest())

        write_atomically(self.path / f"{step:09d}.state", write)
        for old in self._files()[_KEPT:]:
            old.unlink(missing_ok=True)

    def load(self, usable: Callable[[dict[str, Any]], bool] = lambda content: True) -> dict[str, Any] | None:
        """The newest state that is whole and usable, on the CPU; None where there is none."""
        for path in self._files():
            try:
                stored = path.read_bytes()
            except OSError as error:
                self._warn(f"the resume state {path} cannot be read: {error.strerror}")
                continue
            payload, digest = stored[:-_DIGEST_BYTES], stored[-_DIGEST_BYTES:]
            if hashlib.sha256(payload).digest() == digest:
                content = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
                if usable(content):
                    return content
                self._warn(f"the resume state {path} does not fit the run's log; the one before is used")
                continue
            self._warn(f"the resume state {path} is damaged; the one before is used")
        return None

    def steps(self) -> list[int]:
        """Steps of the states there are, newest first, damaged ones too."""
        return [int(path.stem) for path in self._files()]

    def remove(self) -> None:
        """Forget the run's states: it has ended."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _files(self) -> list[Path]:
        return sorted(self.path.glob("*.state"), reverse=True)

    @contextmanager
    def lock(self) -> Iterator[bool]:
        """Whether this process may train the run. The kernel gives the lock back when its holder dies, however it dies.

        `remove` takes the lock's file away too. Whoever waits for it there finds the run done when it has it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True
        finally:
            os.close(handle)
