"""Objects on a path, NFS or any fsspec URL such as s3://bucket/folder as a storage.

Objects have no rename, so each is followed by a marker, `{name}.ok`, with its length and SHA-256: an object without a marker that fits
it is not there.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import fsspec

from diffvit.checks import HEX, fault, parse_json, record, text, whole
from diffvit.errors import StorageError, UserError, first_line, redacted
from diffvit.keeping.base import LONGEST_READ, MARKER, Content, Storage
from diffvit.ledger.disk import MEND_LINK, broken_link, write_atomically, write_exclusively

_CHUNK = 8 * 1024**2

# Markers and leases are shorter.
_LONGEST_NOTE = 4096
_MARKER = record({"bytes": whole(), "sha256": text(HEX)})


class ObjectStorage(Storage):
    """Objects under a URL, each valid once its marker is there.

    Raises:
        UserError: the URL's file system is not known here, or does not take a key that is in the URL.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        protocol = fsspec.utils.get_protocol(url)
        if protocol in ("s3", "s3a", "gs", "gcs") and "@" in url and redacted(url) != url:  # they would take it for the bucket's name
            raise UserError(
                f"the storage {url} has a key in its address, where {protocol} does not look for it.",
                "give the key in the environment, for S3 as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.",
            )
        self._is_path = protocol in ("file", "local")
        # Listings must be true now, not as they were when first asked for.
        options: dict[str, Any] = {"auto_mkdir": True} if self._is_path else {"use_listings_cache": False}
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.url, **options)
        except Exception as error:  # of many kinds, by file system
            raise UserError(
                f"the storage {url} cannot be opened: {first_line(error)}.",
                "give a path or a URL that fsspec knows; s3:// needs `pip install s3fs`.",
            ) from error

    def check(self) -> None:
        name, content = f".state/check-{uuid.uuid4().hex}", b"diffvit"
        self.put(name, content)
        if self.read(name) != content:
            raise StorageError(f"the storage {self.url} does not give back what was written.", "choose another --storage.")
        self.remove(name)

    def commit(self, puts: Mapping[str, Content], removes: Iterable[str] = (), leases: Mapping[str, bytes] | None = None) -> None:
        for name, content in puts.items():  # one after the other
            self._put(name, *(content if isinstance(content, tuple) else (content,)))
        for name, content in (leases or {}).items():
            self.overwrite(name, content)
        for name in removes:
            self._remove(name)

    def _put(self, name: str, content: bytes | Path, length: int | None = None) -> None:
        """Store bytes, or a file or its first `length` bytes; the marker last."""
        digest, size = hashlib.sha256(), 0
        with io.BytesIO(content) if isinstance(content, bytes) else open(content, "rb") as source, self._faults(missing_too=True):
            with self._open_to_write(name) as target:
                while chunk := source.read(_CHUNK if length is None else min(_CHUNK, length - size)):
                    target.write(chunk)
                    digest.update(chunk)
                    size += len(chunk)
            with self._open_to_write(name + MARKER) as target:
                target.write(json.dumps({"bytes": size, "sha256": digest.hexdigest()}).encode())

    def read(self, name: str) -> bytes | None:
        marker = self._marker(name)
        if marker is None or marker["bytes"] > LONGEST_READ:
            return None
        with self._faults():
            try:
                content = self._beginning(name, marker["bytes"] + 1)
            except (FileNotFoundError, ValueError):
                return None
        is_whole = len(content) == marker["bytes"] and hashlib.sha256(content).hexdigest() == marker["sha256"]
        return content if is_whole else None

    def _marker(self, name: str) -> dict[str, Any] | None:
        """The content of an object's marker; None where there is none that is valid."""
        with self._faults():
            try:
                marker = parse_json(self._beginning(name + MARKER, _LONGEST_NOTE))
            except (FileNotFoundError, ValueError):
                return None
        return None if fault(_MARKER, marker) else marker

    def _beginning(self, name: str, length: int) -> bytes:
        """At most so many bytes of an object."""
        for tries_left in (2, 1, 0):
            try:
                with self._fs.open(self._path(name), "rb") as file:
                    return file.read(length)
            except OSError as error:  # s3fs: it was overwritten, as leases are, since it was opened
                if error.errno != errno.EBUSY or not tries_left:
                    raise
        raise AssertionError

    def has(self, name: str) -> bool:
        with self._faults():
            return all(self._fs.exists(self._path(each)) for each in (name, name + MARKER))

    def get(self, name: str, path: Path) -> bool:
        marker = self._marker(name)
        if marker is None:
            return False
        with self._faults():
            try:
                source = self._fs.open(self._path(name), "rb")
            except (FileNotFoundError, ValueError):
                return False
        if getattr(source, "size", None) not in (None, marker["bytes"]):  # known without reading it
            source.close()
            return False
        digest, left = hashlib.sha256(), marker["bytes"]

        def write(file: IO[bytes]) -> None:
            nonlocal left
            while True:
                with self._faults():
                    chunk = source.read(_CHUNK)
                left -= len(chunk)
                if left < 0:  # a disk may be shorter than what somebody put there
                    raise _DamagedError
                if not chunk:
                    break
                digest.update(chunk)
                file.write(chunk)
            if left or digest.hexdigest() != marker["sha256"]:
                raise _DamagedError

        try:
            with contextlib.closing(source):
                write_atomically(path, write)
        except _DamagedError:
            return False
        return True

    def names(self, folder: str, suffix: str = "") -> list[str]:
        ending = suffix + MARKER
        return sorted(f"{folder}/{name.removesuffix(MARKER)}" for name in self.ls(folder) if name.endswith(ending))

    def _remove(self, name: str) -> None:
        """Remove an object: its marker first, so that it is never there by half."""
        for each in (name + MARKER, name):
            with self._faults(), contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(self._path(each))

    def remove_all(self) -> None:
        with self._faults(), contextlib.suppress(FileNotFoundError):
            self._fs.rm(self._root, recursive=True)

    # Leases have no markers: each is one small write

    def create(self, name: str, content: bytes) -> bool:
        path = self._path(name)
        with self._faults(missing_too=True):
            try:
                if self._is_path:
                    return write_exclusively(Path(path), content)
                try:
                    with self._fs.open(path, "xb") as file:
                        file.write(content)
                except (ValueError, NotImplementedError):  # a file system that cannot create exclusively: the last writer wins
                    self._fs.pipe_file(path, content, mode="create")
                    time.sleep(2)
                return self._fs.cat_file(path) == content
            except FileExistsError:
                return False

    def overwrite(self, name: str, content: bytes) -> None:
        with self._faults(missing_too=True):
            if self._is_path:
                write_atomically(Path(self._path(name)), content)
            else:
                self._fs.pipe_file(self._path(name), content)

    def entries(self, folder: str) -> dict[str, bytes]:
        contents = {}
        for name in self.ls(folder):
            if not name.endswith(MARKER):
                contents[name] = b""
                with self._faults(), contextlib.suppress(FileNotFoundError):
                    contents[name] = self._beginning(f"{folder}/{name}", _LONGEST_NOTE)
        return contents

    def ls(self, folder: str) -> list[str]:
        with self._faults():
            try:
                return [path.rsplit("/", 1)[-1] for path in self._fs.ls(self._path(folder), detail=False)]
            except FileNotFoundError:
                self._check_links(self._path(folder))
                return []

    # How

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _open_to_write(self, name: str) -> Any:
        return self._fs.open(self._path(name), "wb")

    def _check_links(self, path: Any) -> None:
        """Raises StorageError for a folder of a path's storage that is a link and leads nowhere: what is in it is not missing."""
        if self._is_path and isinstance(path, str) and (wrong := broken_link(Path(path))):
            raise StorageError(f"the storage {self.url} failed: {wrong}", MEND_LINK)

    @contextlib.contextmanager
    def _faults(self, missing_too: bool = False) -> Iterator[None]:
        """Translate a backend's errors into StorageError, but for missing (unless `missing_too`) and existing objects."""
        try:
            yield
        except (FileExistsError, ValueError, NotImplementedError, StorageError) as error:
            self._check_links(getattr(error, "filename", None))
            raise
        except Exception as error:
            if isinstance(error, FileNotFoundError) and not missing_too:
                raise
            raise StorageError(
                f"the storage {self.url} failed: {first_line(error)}.", "check its address, your access to it, and the network."
            ) from error


class _DamagedError(Exception):
    """An object does not match its marker."""
