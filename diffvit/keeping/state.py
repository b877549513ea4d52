"""Resume states (checkpoints of an unfinished run), from which it resumes to the same bits.

A run's states lie in checkpoints/.state/{run_id}/, one file each, named by step: safetensors with a JSON header, and after it the
SHA-256 of what precedes. A file is written aside, flushed and renamed; a truncated or changed file is recognised, reported and
passed over for the one before. Two are kept. The folder goes when the run ends.

Batches and dropout depend on a step's number only (stepper.py), so a state holds no random generator and no position in the data
but the step itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch

from diffvit.checks import parse_json
from diffvit.errors import UserError
from diffvit.ledger.disk import lock_file, sweep_asides, write_atomically, write_exclusively

# How many states are kept, here and in a remote storage.
KEPT = 2

# Raise it when the content of a state changes: states of other versions are passed over.
_FORMAT = 3
_DIGEST_BYTES = 32
_NAME = re.compile(r"[0-9]{9,12}\.state")


class StateFolder:
    """The resume states of one run.

    Args:
        checkpoints: the ledger.
        on_warning: called with a sentence for each state that is passed over.
    """

    def __init__(self, checkpoints: Path, run_id: str, on_warning: Callable[[str], None] | None = None):
        self.path = Path(checkpoints) / ".state" / run_id
        self._warn = on_warning or (lambda text: None)

    def save(self, step: int, content: Mapping[str, Any]) -> Path:
        """Keep `content` as the state after `step`. Returns its file.

        Args:
            content: "tensors", a dict by name, and values that JSON has.
        """
        header = {"format": _FORMAT, **content}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in header.pop("tensors").items()}
        payload = safetensors.torch.save(tensors, {"diffvit": json.dumps(header)})
        path, digest = self.file(step), hashlib.sha256(payload).digest()
        write_atomically(path, lambda file: file.writelines((payload, digest)))
        files = self._files()
        # A later one could not be used: else the run would have gone on from it.
        kept = [each for each in files if each <= path][:KEPT]
        for other in files:
            if other not in kept:
                other.unlink(missing_ok=True)
        return path

    def load(self, usable: Callable[[dict[str, Any]], bool] = lambda content: True) -> dict[str, Any] | None:
        """The newest state that is whole and usable, its tensors on the CPU; None where there is none."""
        for path in self._files():
            content, wrong = _read(path)
            if content is not None and usable(content):
                return content
            self._warn(f"the resume state {path} {wrong or 'does not fit the log of its run'}; the one before is used")
        return None

    def file(self, step: int) -> Path:
        """The file of the state after a step."""
        return self.path / f"{step:09d}.state"

    def steps(self) -> list[int]:
        """Steps of the states there are, newest first, damaged ones too."""
        return [int(path.stem) for path in self._files()]

    def damaged(self) -> list[str]:
        """A sentence for each state that cannot be used."""
        return [f"{path} {wrong}." for path in self._files() if (wrong := _read(path)[1])]

    def remove(self) -> None:
        """Remove the run's states: it has ended."""
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
    """A state's content, or None and what is wrong with the file. Nothing is executed; no more is allocated than the file has."""
    try:
        with open(path, "rb") as file:
            payload = file.read(max(0, os.fstat(file.fileno()).st_size - _DIGEST_BYTES))
            digest = file.read()
    except OSError as error:
        return None, f"cannot be read: {error.strerror}"
    if hashlib.sha256(payload).digest() != digest:
        return None, "is damaged"
    try:
        tensors = safetensors.torch.load(payload)
        header = parse_json(payload[8 : 8 + int.from_bytes(payload[:8], "little")])
        content = parse_json(header["__metadata__"]["diffvit"])
        if content.pop("format") == _FORMAT:
            return {**content, "tensors": tensors}, ""
    except Exception:  # the hash fits whatever somebody wrote, and safetensors and torch raise errors of many kinds
        pass
    return None, "was written by another version"


def folder_id(checkpoints: Path) -> str:
    """A name for this copy of the ledger that moves with it and that no other has: who holds its locks holds its leases."""
    path = Path(checkpoints) / ".state" / "folder"
    if not path.is_file():
        write_exclusively(path, uuid.uuid4().hex.encode())
    name = path.read_bytes()[:100].decode(errors="replace")
    if not re.fullmatch("[0-9a-f]{32}", name):
        raise UserError(f"{path} is damaged.", "delete it: it holds a name for this folder, and nothing else.")
    return name
