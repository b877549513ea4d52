"""A repository on the hub: files listed, committed and brought.

The client is huggingface_hub. What this adds: files are compared by their hashes before and after a transfer, transient failures are
retried, names and sizes in a listing are checked, and the token is in no message.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from diffvit import __version__
from diffvit.errors import DiffvitError, StorageError, first_line, redacted, shown
from diffvit.hub.account import Account
from diffvit.hub.http import DamagedTransferError, asked_pause, bound_waits, is_missing, is_transient, quiet_client, status_of
from diffvit.repeat import PATIENT, retry

_T = TypeVar("_T")

# Hubs, by address, whose last call failed.
_failing: set[str] = set()

# Seconds; a hub that asks for a longer pause than ours gets it, up to this.
_LONGEST_PAUSE = 300.0

MOST_FILES = 100_000


class HubRefusesError(StorageError):
    """The hub refuses a request: a retry does not help."""

    exit_code = 2


@dataclass(frozen=True)
class HubFile:
    """A file as the hub lists it.

    Attributes:
        sha256: of large files (LFS); None for others, which have git's hash.
    """

    name: str
    size: int
    git: str
    sha256: str | None

    def is_like(self, path: Path) -> bool:
        """Whether a file here has the same content."""
        if not path.is_file() or path.stat().st_size != self.size:
            return False
        if self.sha256:
            return _hash(hashlib.sha256(), path) == self.sha256
        return _hash(hashlib.sha1(f"blob {self.size}\0".encode(), usedforsecurity=False), path) == self.git


class Hub:
    """A repository on the hub.

    Args:
        pauses: in seconds, before each further attempt at a call that failed transiently.
        on_retry: called with a sentence before a failed call is tried again.
        bars: show the client's progress bars.
        longest_pause: of those that the hub asks for, in seconds.

    Its methods raise HubRefusesError where the hub refuses, and StorageError where the last attempt gets no answer, or a wrong one.
    """

    def __init__(
        self, account: Account, pauses: Sequence[float] = PATIENT, on_retry: Callable[[str], None] | None = None, bars: bool = False,
        longest_pause: float = _LONGEST_PAUSE,
    ):  # fmt: skip
        from huggingface_hub import HfApi
        from huggingface_hub.utils import logging

        logging.set_verbosity_error()  # it retries by itself at times; on_retry says so

        self.account, self.pauses, self._on_retry, self._bars = account, tuple(pauses), on_retry, bars
        self._longest_pause = longest_pause
        # False, and not None: the client would look for a token elsewhere.
        self.api = HfApi(
            endpoint=os.environ.get("HF_ENDPOINT") or None,
            token=account.token or False,
            library_name="diffvit",
            library_version=__version__,
        )

    @property
    def repository(self) -> str:
        return self.account.repository

    def call(self, action: Callable[[], _T]) -> _T:
        """Call the client, with retries. Missing files, branches and conflicts (409, 412) raise the client's own errors."""
        try:
            return retry(lambda: self._attempt(action), self.pauses, is_transient, self._pause)
        except Exception as error:
            reason, status = self.reason(error), status_of(error)
            if is_transient(error):
                raise StorageError(
                    f"the hub does not answer for {self.repository}: {reason}.", "try again later; what is there already is not sent again."
                ) from None
            of_this_machine = isinstance(error, DiffvitError) or (type(error).__module__ == "builtins" and isinstance(error, OSError))
            if of_this_machine or status in (409, 412) or is_missing(error):
                raise
            raise self._refusal(status, reason) from None

    def _attempt(self, action: Callable[[], _T]) -> _T:
        bound_waits()
        try:
            if self.api.endpoint in _failing:
                self._ask_once()
            outcome = action()
        except Exception as error:
            if is_transient(error):
                _failing.add(self.api.endpoint)
            raise
        _failing.discard(self.api.endpoint)
        return outcome

    def _pause(self, error: Exception, pause: float) -> float:
        """The pause that the hub asks for, where that is longer."""
        pause = min(max(pause, asked_pause(error)), self._longest_pause)
        if self._on_retry:
            self._on_retry(f"the hub failed: {self.reason(error)}; trying again in {pause:.0f} s")
        return pause

    def _ask_once(self) -> None:
        """Find out in one request whether the hub works again; most of the client's calls try it by themselves for half a minute."""
        from huggingface_hub.errors import HfHubHTTPError

        try:
            self.api.repo_info(self.repository)
        except HfHubHTTPError as error:
            if is_transient(error):
                raise  # whatever else it says, it answers

    def _refusal(self, status: int | None, reason: str) -> HubRefusesError:
        if status == 401:
            return HubRefusesError(
                f"the hub does not let us in to {self.repository}.", "check HF_TOKEN and HF_REPOSITORY; tokens expire, and can be revoked."
            )
        if status == 403:
            return HubRefusesError(f"the token may not do that in {self.repository}: {reason}.", "HF_TOKEN needs write access to it.")
        return HubRefusesError(f"the hub refuses: {reason}.", "check HF_REPOSITORY and HF_TOKEN.")

    def reason(self, error: Exception) -> str:
        """What an error says, in a line, without the token or the client's advice."""
        text = first_line(error)
        server = getattr(error, "server_message", None)
        text = f"{text.rstrip('.: ')}: {server}" if server and server not in text else text
        return redacted(" ".join(text.split()).rstrip("."), self.account.token)[:300]

    def ensure(self) -> None:
        """Create the repository, private, where it is missing."""
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            self.call(lambda: self.api.repo_info(self.repository))
        except RepositoryNotFoundError:
            self.call(lambda: self.api.create_repo(self.repository, private=True, exist_ok=True))

    def head(self, revision: str = "main") -> str:
        """The newest commit of a branch. Raises the client's errors for missing repositories and branches."""
        sha = self.call(lambda: self.api.repo_info(self.repository, revision=revision)).sha
        if not isinstance(sha, str) or not re.fullmatch(r"[0-9a-f]{40}", sha):
            raise StorageError(f"the hub names no commit of {self.repository}.", "try again later.")
        return sha

    def files(self, folder: str = "", revision: str = "main", recursive: bool = True) -> dict[str, HubFile]:
        """Name -> file of a folder. Empty where the folder, the branch or the repository is not there. Names are safe to use as paths.

        A commit that is not there raises the client's error: its branch may have been rewritten since it was looked up.
        """
        from huggingface_hub.errors import RevisionNotFoundError

        try:
            listed = self.call(
                lambda: _first(self.api.list_repo_tree(self.repository, folder or None, recursive=recursive, revision=revision))
            )
        except Exception as error:
            if is_missing(error) and not (isinstance(error, RevisionNotFoundError) and re.fullmatch("[0-9a-f]{40}", revision)):
                return {}
            raise
        if len(listed) > MOST_FILES:
            raise StorageError(f"{self.repository} lists more than {MOST_FILES} files.", "choose a folder with fewer.")
        return {each.name: each for each in map(_checked_file, listed) if each is not None}

    def commit(
        self, puts: Mapping[str, Any], removes: Iterable[str], message: str, revision: str = "main", parent: str | None = None
    ) -> None:
        """Upload files, name -> path, bytes or open file, and remove others, in one commit."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        removes = list(removes)

        def send() -> None:
            operations: list[Any] = [
                CommitOperationAdd(path_in_repo=name, path_or_fileobj=_source(content)) for name, content in puts.items()
            ]
            operations += [CommitOperationDelete(path_in_repo=name, is_folder=False) for name in removes]
            if operations:
                self.api.create_commit(
                    self.repository, operations, commit_message=message, revision=revision, parent_commit=parent, num_threads=2
                )

        with quiet_client(unless=self._bars):
            self.call(send)

    def bring(self, file: HubFile, folder: Path, revision: str = "main") -> Path:
        """Download a file into a folder that keeps partial downloads. Returns its path there; its hash has been checked."""

        def fetch() -> Path:
            with quiet_client(unless=self._bars):
                # A cache of its own: from the user's it would take a damaged file.
                brought = self.api.hf_hub_download(
                    self.repository, file.name, revision=revision, local_dir=folder, cache_dir=folder / ".cache" / "hub"
                )
                path = Path(brought)
            if not file.is_like(path):
                path.unlink(missing_ok=True)
                shutil.rmtree(folder / ".cache", ignore_errors=True)  # what the client knows of it is wrong
                raise DamagedTransferError(f"{file.name} came damaged")
            return path

        return self.call(fetch)


def _first(listing: Iterable[Any]) -> list[Any]:
    """A listing as a list, cut one entry above the limit: it may have no end."""
    entries = []
    for each in listing:
        entries.append(each)
        if len(entries) > MOST_FILES:
            break
    return entries


def _checked_file(entry: Any) -> HubFile | None:
    """A listed file; None for a folder. Raises StorageError for a name, size or hash that is not possible."""
    name = entry.path
    if not hasattr(entry, "blob_id"):
        return None
    lfs, git = entry.lfs, entry.blob_id
    sha256, size = (lfs.sha256, lfs.size) if lfs else (None, entry.size)
    wrong = (
        not is_safe_name(name)
        or type(size) is not int
        or not 0 <= size < 2**50
        or not re.fullmatch(r"[0-9a-f]{40,64}", str(git))
        or (sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", str(sha256)))
    )
    if wrong:
        raise StorageError(f"the hub lists a file that cannot be: {shown(name)}.", "do not trust this repository.")
    return HubFile(name, size, git, sha256)


def is_safe_name(name: Any) -> bool:
    """Whether a name is a relative path without steps upwards or special characters, on every system."""
    if not isinstance(name, str) or not 0 < len(name) <= 1000 or re.search(r'[\x00-\x1f\x7f\ud800-\udfff\\:*?"<>|]', name):
        return False
    # Windows drops dots and spaces at a part's end, so that ".. " is ".." there, and takes some names for devices.
    return all(part and part[-1] not in ". " and len(part.encode()) <= 255 and not _DEVICE.fullmatch(part) for part in name.split("/"))


_DEVICE = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])\s*(\..*)?", re.IGNORECASE)


def _hash(digest: Any, path: Path) -> str:
    with open(path, "rb") as file:
        while chunk := file.read(1024**2):
            digest.update(chunk)
    return digest.hexdigest()


def _source(content: Any) -> Any:
    """Content as the client takes it, from its start."""
    if hasattr(content, "seek"):
        content.seek(0)
    return str(content) if isinstance(content, Path) else content
