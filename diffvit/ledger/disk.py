"""Files on a disk that may be full, read-only, shared or dying: atomic writes, locks, links, faults as sentences."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from glob import escape as glob_escape
from pathlib import Path
from typing import BinaryIO

from diffvit.errors import StorageError, UserError


def check_writable(folder: Path) -> None:
    """Raises UserError where files cannot be made in `folder`, which is created if missing."""
    if error := write_fault(folder):
        raise UserError(
            f"the folder {folder} cannot be written: {error.strerror}.", "choose another one, or change its permissions."
        ) from error


def write_fault(folder: Path) -> OSError | None:
    """Why files cannot be made in `folder`, which is created if missing; None where they can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn unreadable files and broken links into a UserError that names them. FileNotFoundError is left to the caller.

    Args:
        path: what is read inside the block; links may also stand in place of the folders that it is in.
    """
    try:
        yield
    except OSError as error:
        if wrong := broken_link(path):
            raise UserError(wrong, MEND_LINK) from None
        if isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise
        raise UserError(f"{path} cannot be read: {error.strerror}.", "change its permissions, or move it elsewhere.") from error


MEND_LINK = "repair or remove the link; if a disk is not mounted, mount it."


def broken_link(path: Path) -> str | None:
    """A sentence where a path, or a folder that it is in, is a link that leads nowhere; None where there is none."""
    for link in (path, *path.parents):
        if os.path.islink(link):
            try:
                os.stat(link)
            except FileNotFoundError:
                return f"{link} is a link to {os.readlink(link)}, which is not there."
            except OSError as error:
                if error.errno == errno.ELOOP:
                    return f"{link} is a link that leads in a circle."
    return None


def listed(folder: Path) -> list[Path]:
    """A folder's entries, sorted by name; none where it is missing. Raises UserError as `readable` does."""
    try:
        with readable(folder):
            return sorted(folder / name for name in os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


def lock_file(descriptor: int, folder: Path) -> bool:
    """Take an open file's kernel lock; False where another process has it. Raises UserError where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UserError(
            f"the file system of {folder} has no locks that work ({error.strerror}), without which two processes could train one run.",
            "keep --checkpoints on a local disk and give the shared place as --storage; or mount it with locks (Lustre: -o flock).",
        ) from error
    return True


def check_lockable(folder: Path) -> None:
    """Raises UserError where files in `folder` cannot be locked."""
    with tempfile.TemporaryFile(dir=folder) as file:
        lock_file(file.fileno(), folder)


# Errors of a disk or a file system, not of the program.
_FAULTS_OF_DISKS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EIO,
    errno.ESTALE,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTCONN,
}


@contextlib.contextmanager
def disk_faults(place: Path) -> Iterator[None]:
    """Turn a full, read-only or failing disk into a StorageError that names the folder, and a broken link into a UserError."""
    try:
        yield
    except OSError as error:
        if isinstance(error.filename, str) and (wrong := broken_link(Path(error.filename))):
            raise UserError(wrong, MEND_LINK) from None
        if error.errno not in _FAULTS_OF_DISKS:
            raise
        raise StorageError(
            f"{error.filename or place} cannot be written: {error.strerror}.",
            "make room or repair the folder; nothing finished is lost, and the same command resumes.",
        ) from error


def write_atomically(path: Path, content: bytes | Callable[[BinaryIO], None]) -> None:
    """Write a temporary file, flush it, rename it: a reader sees the old file or the whole new one.

    Args:
        content: the bytes, or a function that writes them to the open file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(prefix=f".{path.name}.", suffix=_ASIDE, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            file.flush()
            flush_to_disk(file.fileno())
        with _unless_unsupported():
            os.chmod(aside, 0o666 & ~_umask())
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
    with _unless_unsupported():
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            flush_to_disk(folder)
        finally:
            os.close(folder)


def write_exclusively(path: Path, content: bytes) -> bool:
    """Write a small file that must not exist; False where it does. Of several who try at once, one succeeds."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}{_ASIDE}")
    write_atomically(aside, content)
    try:
        with _unless_unsupported():
            os.link(aside, path)  # with its content in one step, and unlike a rename only where nothing is
            return True
        with open(path, "xb", buffering=0) as file:  # without hard links: a reader may see it empty for a moment
            file.write(content)
            flush_to_disk(file.fileno())
        return True
    except FileExistsError:
        return False
    finally:
        aside.unlink(missing_ok=True)


def flush_to_disk(descriptor: int) -> None:
    """os.fsync, where the file system has it."""
    with _unless_unsupported():
        os.fsync(descriptor)


# Errors of calls that a file system (exFAT, SMB, FUSE) does not support.
_UNSUPPORTED = {errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY}


@contextlib.contextmanager
def _unless_unsupported() -> Iterator[None]:
    """Ignore what the file system does not support; where content is at stake, another call fails."""
    try:
        yield
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


_ASIDE = ".aside"


def sweep_asides(folder: Path, stem: str) -> None:
    """Remove temporary files that killed writers of `stem` left. Nobody may be writing them."""
    for aside in folder.glob(f".{glob_escape(stem)}*{_ASIDE}"):
        aside.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
