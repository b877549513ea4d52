"""Resume states: what an unfinished run needs to go on as if nothing had happened.

A run's states lie in checkpoints/.state/{run_id}/, one file each, named by step. A file is written aside, flushed and renamed, and
ends with the SHA-256 of what precedes: a truncated or changed file is recognised, reported and passed over for the one
before. Two are kept. The folder goes when the run ends.

Batches and dropout depend on a step's number only (train.py), so a state holds no random generator and no position in the data but
the step itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickletools
import re
import shutil
import uuid
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch

from diffvit.errors import UserError
from diffvit.ledger.disk import lock_file, sweep_asides, write_atomically, write_exclusively

# How many states are kept, here and in a remote storage.
KEPT = 2

# Raise it when the content of a state changes: states of other versions are passed over.
_FORMAT = 2
_DIGEST_BYTES = 32
_NAME = re.compile(r"[0-9]{9,12}\.state")


class _HashingWriter(io.RawIOBase):
    """Passes bytes on to a file and hashes them: a large state is never held twice.

    An error is kept until `finish`: torch's writer ends the process when one is raised under it.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        self._error: OSError | None = None
        self._digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        if self._error is None:
            try:
                self._file.write(data)
                self._digest.update(data)
            except OSError as error:
                self._error = error
        return len(data)

    def writable(self) -> bool:
        return True

    def finish(self) -> None:
        """Ends the file with its hash. Raises the OSError of any write."""
        if self._error:
            raise self._error
        self._file.write(self._digest.digest())


class StateFolder:
    """The resume states of one run.

    Args:
        checkpoints: the ledger.
        on_warning: hears of damaged files.
    """

    def __init__(self, checkpoints: Path, run_id: str, on_warning: Callable[[str], None] | None = None):
        self.path = Path(checkpoints) / ".state" / run_id
        self._warn = on_warning or (lambda text: None)

    def save(self, step: int, content: dict[str, Any]) -> Path:
        """Keep `content` (tensors, numbers, strings, and dicts and lists of them) as the state after `step`. Returns its file."""

        def write(file: BinaryIO) -> None:
            hashing = _HashingWriter(file)
            torch.save({"format": _FORMAT, **content}, cast(IO[bytes], hashing))
            hashing.finish()

        path = self.file(step)
        write_atomically(path, write)
        files = self._files()
        # A later one could not be used: else the run would have gone on from it.
        kept = [each for each in files if each <= path][:KEPT]
        for other in files:
            if other not in kept:
                other.unlink(missing_ok=True)
        return path

    def load(self, usable: Callable[[dict[str, Any]], bool] = lambda content: True) -> dict[str, Any] | None:
        """The newest state that is whole and usable, on the CPU; None where there is none."""
        for path in self._files():
            content, wrong = _read(path)
            if content is not None and usable(content):
                return content
            self._warn(f"the resume state {path} {wrong or 'does not fit the log of its run'}; the one before is used")
        return None

    def file(self, step: int) -> Path:
        """Where the state after a step lies."""
        return self.path / f"{step:09d}.state"

    def steps(self) -> list[int]:
        """Steps of the states there are, newest first, damaged ones too."""
        return [int(path.stem) for path in self._files()]

    def damaged(self) -> list[str]:
        """A sentence for each state that cannot be used."""
        return [f"{path} {wrong}." for path in self._files() if (wrong := _read(path)[1])]

    def remove(self) -> None:
        """Forget the run's states: it has ended."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _files(self) -> list[Path]:
        return sorted((path for path in self.path.glob("*.state") if _NAME.fullmatch(path.name)), reverse=True)

    @contextlib.contextmanager
    def lock(self) -> Iterator[bool]:
        """Whether this process may train the run. The kernel gives the lock back when its holder dies, however it dies.

        `remove` takes the lock's file away too. Whoever waits for it there finds the run done when it has it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not lock_file(handle, self.path):
                yield False
                return
            sweep_asides(self.path, "")
            yield True
        finally:
            os.close(handle)


def _read(path: Path) -> tuple[dict[str, Any] | None, str]:
    """A state's content, or None and what is wrong with the file."""
    try:
        stored = path.read_bytes()
    except OSError as error:
        return None, f"cannot be read: {error.strerror}"
    payload, digest = memoryview(stored)[:-_DIGEST_BYTES], stored[-_DIGEST_BYTES:]
    if hashlib.sha256(payload).digest() != digest:
        return None, "is damaged"
    try:
        _check_pickle(payload)
        content = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
        version = content["format"]
    except Exception:  # the hash fits whatever somebody wrote, and torch raises errors of many kinds
        return None, "is damaged"
    return (content, "") if type(version) is int and version == _FORMAT else (None, "was written by another version")


# All that `save` makes a pickle of: numbers, text, lists, dicts and tensors.
_OPCODES = {
    "PROTO", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE",
    "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_DICT", "SETITEM", "SETITEMS",
    "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "GLOBAL", "REDUCE", "BUILD", "BINPERSID",
}  # fmt: skip
_GLOBALS = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", *(f"torch {kind}Storage" for kind in ("Float", "Double", "Long"))}


def _check_pickle(payload: memoryview) -> None:
    """Raises where loading would do more than to make tensors, numbers and text, or would make more of them than the file has bytes."""
    with zipfile.ZipFile(io.BytesIO(payload)) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("it is compressed")
        pickles = [name for name in archive.namelist() if name.endswith(".pkl")]
        for opcode, argument, _ in pickletools.genops(archive.read(pickles[0])):
            if opcode.name not in _OPCODES or (opcode.name == "GLOBAL" and argument not in _GLOBALS):
                raise ValueError(f"it has {opcode.name} {argument}")
    if len(pickles) != 1:
        raise ValueError("it has several pickles")


def folder_id(checkpoints: Path) -> str:
    """A name for this copy of the ledger that moves with it and that no other has: who holds its locks holds its leases."""
    path = Path(checkpoints) / ".state" / "folder"
    if not path.is_file():
        write_exclusively(path, uuid.uuid4().hex.encode())
    name = path.read_bytes()[:100].decode(errors="replace")
    if not re.fullmatch("[0-9a-f]{32}", name):
        raise UserError(f"{path} is damaged.", "delete it: it holds a name for this folder, and nothing else.")
    return name
