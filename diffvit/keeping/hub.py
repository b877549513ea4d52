"""A repository on the Hugging Face hub as a storage: hf://user/name, with the layout of the checkpoints folder.

A commit is one step, and the hub checks the hash of what it takes, so that objects need no markers. States and leases (.state) are in
a branch of their own, so the repository's page shows results only. Of several who create a lease at once one succeeds: a commit names its
parent, and the hub takes it only if that is still the newest.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from diffvit.errors import StorageError, UserError
from diffvit.hub.account import Account, find_token, parse_repository
from diffvit.hub.client import Hub, HubFile, is_safe_name
from diffvit.hub.http import is_missing, status_of
from diffvit.keeping.base import LONGEST_READ, Content, Storage
from diffvit.keeping.saving import HUB_SCHEME
from diffvit.ledger.disk import write_atomically

STATE_BRANCH = "diffvit-state"

# Seconds between attempts at a call, and the longest that the hub may ask for: callers retry too.
_PAUSES = (1.0,)
_LONGEST_PAUSE = 10.0
_CREATE_TRIES = 20
_READ_TRIES = 5

# States are large and stay in their branch's history, which is squashed every so many commits.
_SQUASH_EVERY = 20


class HubStorage(Storage):
    """Raises UserError for a URL that is not hf://user/name, or has more than a folder of plain names after it."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        user, _, rest = self.url.removeprefix(HUB_SCHEME).partition("/")
        name, _, folder = rest.partition("/")
        if folder and not is_safe_name(folder):
            raise UserError(f"the storage {url} cannot be.", "give hf://user/name.")
        self._folder = f"{folder}/" if folder else ""
        self.hub = Hub(Account(parse_repository(f"{user}/{name}"), find_token()), _PAUSES, longest_pause=_LONGEST_PAUSE)
        self._state_commits = 0

    def check(self) -> None:
        if not self.hub.account.token:
            raise UserError(
                "the hub needs HF_TOKEN, and neither the environment nor .env has it.", "write it into .env (see .env.example)."
            )
        self.hub.ensure()
        self._ensure_branch()  # which also needs write access

    def commit(self, puts: Mapping[str, Content], removes: Iterable[str] = (), leases: Mapping[str, bytes] | None = None) -> None:
        removes, puts = list(removes), {**puts, **(leases or {})}
        for branch in ("main", STATE_BRANCH):
            with contextlib.ExitStack() as stack:
                ours = {name: _opened(content, stack) for name, content in puts.items() if _branch(name) == branch}
                dropped = [name for name in removes if _branch(name) == branch]
                if ours or dropped:
                    self._commit(ours, dropped, branch)

    def _commit(self, puts: Mapping[str, Any], removes: list[str], branch: str, parent: str | None = None) -> None:
        names = [*puts, *removes]
        if not names:
            return
        message = f"{'add' if puts else 'remove'} {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}"
        for attempt in range(_CREATE_TRIES):
            listed = set(self._listing(removes, branch)) if removes else set()
            dropped = [self._folder + name for name in removes if self._folder + name in listed]
            if not puts and not dropped:
                return
            try:
                self.hub.commit({self._folder + name: content for name, content in puts.items()}, dropped, message, branch, parent)
                self._squash_at_times(branch)
                return
            except StorageError:
                raise
            except Exception as error:
                if is_missing(error) and attempt == 0:  # the repository or its branch
                    self.check()
                elif status_of(error) not in (409, 412) or parent or attempt == _CREATE_TRIES - 1:
                    raise self._failure(error) from error
                else:
                    time.sleep(random.uniform(0.1, 1.0))

    def read(self, name: str) -> bytes | None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "object"
            return path.read_bytes() if self.get(name, path) and path.stat().st_size <= LONGEST_READ else None

    def has(self, name: str) -> bool:
        return self._folder + name in self._listing([name], _branch(name))

    def get(self, name: str, path: Path) -> bool:
        for attempt in range(_READ_TRIES):
            head = None
            try:
                # Of one commit: a lease may be renewed between listing and bringing.
                head = self.hub.head(_branch(name))
                file = self._listing([name], head).get(self._folder + name)
                if file is not None:
                    self._get(file, path, head)
                return file is not None
            except StorageError:
                raise
            except Exception as error:
                if head is None and is_missing(error):
                    return False  # no repository or branch
                if not is_missing(error) or attempt == _READ_TRIES - 1:
                    raise self._failure(error) from error  # else the commit was forgotten meanwhile
        raise AssertionError

    def _get(self, file: HubFile, path: Path, commit: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # On the same disk, and where nothing looks for files of a ledger.
        with (
            tempfile.TemporaryDirectory(prefix=".hub-", dir=path.parent) as folder,
            open(self.hub.bring(file, Path(folder), commit), "rb") as source,
        ):
            write_atomically(path, lambda target: shutil.copyfileobj(source, target, 8 * 1024**2))

    def names(self, folder: str, suffix: str = "") -> list[str]:
        return sorted(f"{folder}/{name}" for name in self._files_in(folder) if name.endswith(suffix))

    def remove_all(self) -> None:
        for branch in ("main", STATE_BRANCH):
            names = [name.removeprefix(self._folder) for name in self.hub.files(self._folder.rstrip("/"), branch)]
            self._commit({}, names, branch)

    def create(self, name: str, content: bytes) -> bool:
        branch = _branch(name)
        for _ in range(_CREATE_TRIES):
            try:
                head = self.hub.head(branch)
                if self._folder + name in self.hub.files(os.path.dirname(self._folder + name), head, recursive=False):
                    return False
                self.hub.commit({self._folder + name: content}, (), f"add {name}", branch, parent=head)
                return True
            except StorageError:
                raise
            except Exception as error:
                if is_missing(error):
                    self.check()
                elif status_of(error) not in (409, 412):
                    raise self._failure(error) from error
            time.sleep(random.uniform(0.1, 1.0))
        raise StorageError(f"too many write to {self.url} at once.", "try again.")

    def overwrite(self, name: str, content: bytes) -> None:
        self.commit({name: content})

    def entries(self, folder: str) -> dict[str, bytes]:
        return {name: self.read(f"{folder}/{name}") or b"" for name in self._files_in(folder)}

    def ls(self, folder: str) -> list[str]:
        inside = self._folder + folder
        files = self.hub.files(inside, _branch(folder))
        return sorted({name.removeprefix(f"{inside}/").partition("/")[0] for name in files})

    def tidy(self) -> None:
        """Squash the history of the states' branch, if no run is under way."""
        if not self.hub.files(f"{self._folder}.state", STATE_BRANCH):
            self._squash()

    # How

    def _files_in(self, folder: str) -> list[str]:
        files = self.hub.files(self._folder + folder, _branch(folder), recursive=False)
        return [os.path.basename(name) for name in files]

    def _listing(self, names: Iterable[str], revision: str) -> dict[str, Any]:
        """The files in the objects' folders, by name."""
        folders = {os.path.dirname(self._folder + name) for name in names}
        return {name: file for folder in folders for name, file in self.hub.files(folder, revision, recursive=False).items()}

    def _squash_at_times(self, branch: str) -> None:
        if branch == STATE_BRANCH:
            self._state_commits += 1
            if self._state_commits % _SQUASH_EVERY == 0:
                self._squash()

    def _squash(self) -> None:
        with contextlib.suppress(Exception):  # it costs room and nothing else
            self.hub.api.super_squash_history(self.hub.repository, branch=STATE_BRANCH)

    def _ensure_branch(self) -> None:
        try:
            self.hub.call(lambda: self.hub.api.create_branch(self.hub.repository, branch=STATE_BRANCH, exist_ok=True))
        except StorageError:
            raise
        except Exception as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> StorageError:
        return StorageError(
            f"the storage {self.url} failed: {self.hub.reason(error)}.", "check its address, your access to it, and the network."
        )


def _branch(name: str) -> str:
    return STATE_BRANCH if name.startswith(".") else "main"


def _opened(content: Content, stack: contextlib.ExitStack) -> Any:
    """Content that stays readable where its file is removed meanwhile."""
    if isinstance(content, tuple):
        path, length = content
        with open(path, "rb") as file:
            return file.read(length)
    return stack.enter_context(open(content, "rb")) if isinstance(content, Path) else content
