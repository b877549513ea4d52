"""What a storage off this machine can do. It has the same layout as the checkpoints folder; leases say which machine trains a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path

# The end of the names that a storage keeps for itself.
MARKER = ".ok"

# The most that `read` brings into memory: results are a few kilobytes.
LONGEST_READ = 4 * 1024**2

# What an object is made of: bytes, a file, or a file's first so many bytes.
Content = bytes | Path | tuple[Path, int]


class Storage(ABC):
    """Objects, each whole or not there, and leases. All methods raise StorageError where the storage does not answer or let us in."""

    url: str

    @abstractmethod
    def check(self) -> None:
        """Find out whether objects can be written, read and removed."""

    @abstractmethod
    def commit(self, puts: Mapping[str, Content], removes: Iterable[str] = (), leases: Mapping[str, bytes] | None = None) -> None:
        """Store objects in the order given, write leases, and then remove objects. What is not there is removed already.

        Raises:
            FileNotFoundError: one of the files is not there.
        """

    def put(self, name: str, content: bytes | Path, length: int | None = None) -> None:
        """Store bytes, or a file or its first `length` bytes. Raises FileNotFoundError for a file that is not there."""
        self.commit({name: content if length is None or isinstance(content, bytes) else (content, length)})

    def remove(self, name: str) -> None:
        """Remove an object, if it is there."""
        self.commit({}, [name])

    @abstractmethod
    def remove_all(self) -> None:
        """Remove everything under the URL, leases too."""

    def tidy(self) -> None:  # noqa: B027 (most keep nothing)
        """Make room, where a storage keeps what was removed."""

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """A small object's content; None where it is not there, not whole or not small."""

    @abstractmethod
    def has(self, name: str) -> bool:
        """Whether an object is there."""

    @abstractmethod
    def get(self, name: str, path: Path) -> bool:
        """Copy an object to a file, which is replaced in one step; False where it is not there or not whole."""

    @abstractmethod
    def names(self, folder: str, suffix: str = "") -> list[str]:
        """Names of the objects in a folder that end in `suffix`, sorted; each begins with the folder's."""

    @abstractmethod
    def ls(self, folder: str) -> list[str]:
        """Names of all that is in a folder, markers and folders too."""

    # For leases

    @abstractmethod
    def create(self, name: str, content: bytes) -> bool:
        """Write a lease that must not exist; False where it does. Of several who try at once, one succeeds."""

    @abstractmethod
    def overwrite(self, name: str, content: bytes) -> None:
        """Write a lease."""

    @abstractmethod
    def entries(self, folder: str) -> dict[str, bytes]:
        """Name -> content, or its beginning, of the leases in a folder; of one that goes while this looks, nothing."""
