"""The repositories of the stand-in hub: files, commits, branches, and what is told of them, true or not."""

from __future__ import annotations

import base64
import binascii
import fnmatch
import hashlib
import re
import secrets
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

import yaml

# A new repository of the real hub begins with such a file, too.
LFS_ENDINGS = ["bin", "bz2", "ckpt", "gz", "npy", "npz", "onnx", "parquet", "pkl", "pt", "pth", "safetensors", "tar", "tgz", "xz", "zip"]
LFS_THRESHOLD = 10_000_000  # longer files have to be LFS
ATTRIBUTES = "".join(f"*.{ending} filter=lfs diff=lfs merge=lfs -text\n" for ending in LFS_ENDINGS).encode()


class HubError(Exception):
    """An answer that is not a success."""

    def __init__(self, status: int, message: str, code: str | None = None, **more: Any):
        super().__init__(message)
        self.status, self.message, self.code, self.more = status, message, code, more
        self.headers: dict[str, str] = {}


def missing_revision(revision: str) -> HubError:
    return HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")


def missing_entry(path: str) -> HubError:
    return HubError(404, f"Entry not found: {path}", "EntryNotFound")


def blob_oid(content: bytes) -> str:
    """The name of a blob in git."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class File:
    """The content of a file, kept in git or as LFS."""

    content: bytes = field(repr=False)
    lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n".encode()

    @cached_property
    def oid(self) -> str:
        return blob_oid(self.pointer if self.lfs else self.content)


@dataclass(frozen=True)
class Lie:
    """What is told of a path instead of the truth; None: the truth, if there is such a file."""

    content: bytes | None
    size: int | None
    sha256: str | None
    oid: str | None


@dataclass(frozen=True)
class Entry:
    """A file as lists and HEAD tell of it; `content` is what a download gets."""

    path: str
    content: bytes = field(repr=False)
    size: int
    oid: str
    sha256: str | None
    pointer_size: int = 0

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid


@dataclass(frozen=True, eq=False)
class Commit:
    oid: str
    parent: Commit | None = field(repr=False)
    title: str
    message: str
    author: str
    date: str
    files: dict[str, File] = field(repr=False)


@dataclass
class Repo:
    """A repository: branches lead to commits, which never change."""

    name: str
    user: str
    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    announced: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.lock = threading.RLock()
        self.created = _now()
        self._commits: dict[str, Commit] = {}
        self._lies: dict[str, Lie] = {}
        self._append("main", {".gitattributes": File(ATTRIBUTES, lfs=False)}, "initial commit")

    @property
    def namespace(self) -> str:
        return self.name.split("/")[0]

    # What tests ask and do.

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """The content of the files of a revision, by path."""
        return {path: file.content for path, file in sorted(self.resolve(revision).files.items())}

    def history(self, revision: str = "main") -> list[Commit]:
        """The commits of a revision, the newest first."""
        return list(_with_ancestors(self.resolve(revision)))

    def commit(self, files: dict[str, bytes], message: str = "a commit", branch: str = "main", delete: Iterable[str] = ()) -> str:
        """Add and delete files past HTTP; returns the id of the commit."""
        with self.lock:
            head = self._head(branch).files
            added = {path: File(content, self.is_lfs(path, content[:512], len(content))) for path, content in files.items()}
            self.objects |= {file.sha256: file.content for file in added.values() if file.lfs}
            return self._append(branch, {path: file for path, file in head.items() if path not in set(delete)} | added, message).oid

    def lie(
        self, path: str, *, content: bytes | None = None, size: int | None = None, sha256: str | None = None, oid: str | None = None
    ) -> None:
        """Tell something else of a path, in lists and HEAD: of a file that is there, or of one that is not, under any path.

        `content` is what a download gets, whatever is told of it: the size and hash of a file that is there stay its own.
        """
        self._lies = {**self._lies, path: Lie(content, size, sha256, oid)}

    def tell_the_truth(self) -> None:
        self._lies = {}

    # What the server asks.

    def resolve(self, revision: str) -> Commit:
        """The commit of a branch, or of (the beginning of) an id."""
        with self.lock:
            oid = self.branches.get(revision)
            if oid is None and re.fullmatch("[0-9a-f]{7,40}", revision):
                oid = next((each for each in self._commits if each.startswith(revision)), None)
            if oid is None:
                raise missing_revision(revision)
            return self._commits[oid]

    def entries(self, commit: Commit) -> dict[str, Entry]:
        """What is told of the files of a commit, by path."""
        lies = self._lies
        paths = sorted(commit.files.keys() | lies.keys())
        return {path: _entry(path, commit.files.get(path), lies.get(path)) for path in paths}

    def entry(self, commit: Commit, path: str) -> Entry | None:
        """What is told of one path of a commit; None: it is not there."""
        file, lie = commit.files.get(path), self._lies.get(path)
        return _entry(path, file, lie) if file or lie else None

    def is_lfs(self, path: str, sample: bytes, size: int, branch: str = "main") -> bool:
        """Whether a file has to be LFS: by .gitattributes, by its size, or because it is no text."""
        attributes = self.resolve(branch).files.get(".gitattributes")
        lines = attributes.content.decode().splitlines() if attributes else []
        patterns = [line.split()[0] for line in lines if "filter=lfs" in line.split()]
        name = path.rsplit("/", 1)[-1]
        named = any(fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(path, pattern) for pattern in patterns)
        return size > 0 and (named or size > LFS_THRESHOLD or b"\0" in sample)

    # What the server does.

    def apply(self, branch: str, lines: list[dict[str, Any]]) -> Commit:
        """Make the commit that the lines of a request describe."""
        header = next((line["value"] for line in lines if line["key"] == "header"), None)
        if not header or not header.get("summary"):
            raise HubError(400, "A commit needs a summary")
        with self.lock:
            head = self._head(branch)
            parent = header.get("parentCommit")
            if parent and not head.oid.startswith(parent):
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            files = dict(head.files)
            for line in lines:
                self._apply_line(files, line["key"], line["value"])
            check_tree(files)
            return self._append(branch, files, header["summary"], header.get("description", ""))

    def _apply_line(self, files: dict[str, File], key: str, value: dict[str, Any]) -> None:
        if key == "header":
            return
        path = value["path"]
        check_path(path)
        if key == "file":
            files[path] = self._regular_file(path, value)
        elif key == "lfsFile":
            files[path] = self._lfs_file(path, value)
        elif key == "deletedFile":
            if path not in files:
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            del files[path]
        else:
            raise HubError(400, f"Unknown operation {key}")

    def _regular_file(self, path: str, value: dict[str, Any]) -> File:
        if value.get("encoding") not in ("base64", "utf-8", None):
            raise HubError(400, f"Unknown encoding of {path}")
        try:
            content = base64.b64decode(value["content"], validate=True) if value.get("encoding") == "base64" else value["content"].encode()
        except binascii.Error as error:
            raise HubError(400, f"The content of {path} is not base64") from error
        if len(content) > LFS_THRESHOLD:
            raise HubError(400, f"{path} is too large for a regular file: send it as LFS")
        if path == "README.md":
            errors, _ = check_card(content.decode(errors="replace"))
            if errors:
                raise HubError(400, "Invalid metadata in README.md", errors=[{"message": each} for each in errors])
        return File(content, lfs=False)

    def _lfs_file(self, path: str, value: dict[str, Any]) -> File:
        content = self.objects.get(value["oid"])
        if value.get("algo") != "sha256" or content is None:
            raise HubError(400, f"Your push was rejected because an LFS pointer pointed to a file that does not exist: {path}")
        if value.get("size") not in (None, len(content)):
            raise HubError(400, f"The size of {path} is not that of its LFS object")
        return File(content, lfs=True)

    def announce(self, oid: str, size: int) -> bool:
        """Note an LFS object that is about to come; False: it is there already."""
        if not re.fullmatch("[0-9a-f]{64}", oid):
            raise HubError(422, f"{oid} is not a SHA-256")
        with self.lock:
            if oid in self.objects:
                return False
            self.announced[oid] = size
            return True

    def receive(self, oid: str, content: bytes) -> None:
        """Keep an LFS object, if it is what was announced."""
        with self.lock:
            if self.announced.get(oid) != len(content) or hashlib.sha256(content).hexdigest() != oid:
                raise HubError(400, f"BadDigest: {len(content)} bytes are not the object {oid} that was announced")
            self.objects[oid] = content

    def create_branch(self, branch: str, start: str | None) -> None:
        if branch.startswith("refs/") or re.fullmatch("[0-9a-f]{40}", branch):
            raise HubError(400, f"Invalid reference for a branch: {branch}")
        with self.lock:
            if branch in self.branches:
                raise HubError(409, f"Reference already exists: {branch}")
            self.branches[branch] = self.resolve(start or "main").oid

    def squash(self, branch: str, message: str) -> None:
        """Make one commit of a branch; commits that no reference leads to any more are gone."""
        with self.lock:
            self._append(branch, self._head(branch).files, message, root=True)
            heads = [self._commits[oid] for oid in set(self.branches.values())]
            self._commits = {each.oid: each for head in heads for each in _with_ancestors(head)}

    def _head(self, branch: str) -> Commit:
        if branch not in self.branches:
            raise missing_revision(branch)
        return self._commits[self.branches[branch]]

    def _append(self, branch: str, files: dict[str, File], title: str, message: str = "", root: bool = False) -> Commit:
        parent = self._commits[self.branches[branch]] if branch in self.branches and not root else None
        oid = secrets.token_hex(20)  # a name like git's, which a clock and a parent make as unpredictable
        commit = Commit(oid, parent, title, message, self.user, _now(), files)
        self._commits[oid] = commit
        self.branches[branch] = oid
        return commit


def _with_ancestors(commit: Commit) -> Iterator[Commit]:
    each: Commit | None = commit
    while each:
        yield each
        each = each.parent


def _entry(path: str, file: File | None, lie: Lie | None) -> Entry:
    lie = lie or Lie(None, None, None, None)
    true = file or File(lie.content or b"", lfs=lie.sha256 is not None)
    return Entry(
        path,
        true.content if lie.content is None else lie.content,
        len(true.content) if lie.size is None else lie.size,
        lie.oid or true.oid,
        lie.sha256 or (true.sha256 if true.lfs else None),
        len(true.pointer) if true.lfs else 0,
    )


def check_path(path: str) -> None:
    """Refuse a path that git would refuse, or that leads out of the repository."""
    parts = path.split("/")
    if any(part in ("", ".", "..", ".git") or len(part.encode()) > 255 for part in parts) or re.search(r"[\x00-\x1f\\]", path):
        raise HubError(400, f"Invalid path: {path!r}")


def check_tree(files: Iterable[str]) -> None:
    """Refuse a path that is a file and a folder."""
    paths = set(files)
    for path in paths:
        parts = path.split("/")
        for length in range(1, len(parts)):
            if "/".join(parts[:length]) in paths:
                raise HubError(400, f"{'/'.join(parts[:length])} is a file and a folder")


def card_metadata(card: str) -> Any:
    """The metadata at the head of a README.md; None: there is none."""
    match = re.match(r"---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", card, re.DOTALL)
    return yaml.safe_load(match[1]) if match else None


def check_card(card: str) -> tuple[list[str], list[str]]:
    """What is wrong with the metadata of a README.md: errors, and warnings."""
    try:
        metadata = card_metadata(card)
    except yaml.YAMLError as error:
        return [f"YAML: {error}"], []
    if metadata is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(metadata, dict):
        return ["the metadata must be a mapping"], []
    errors = [
        f'"{name}" must be a string'
        for name in ("library_name", "pipeline_tag", "license_name")
        if not isinstance(metadata.get(name, ""), str)
    ]
    for name in ("license", "language", "tags", "datasets", "metrics", "base_model"):
        value = metadata.get(name, [])
        if not all(isinstance(each, str) for each in (value if isinstance(value, list) else [value])):
            errors.append(f'"{name}" must be a string or a list of strings')
    return errors + _index_errors(metadata.get("model-index", [])), []


def _index_errors(index: Any) -> list[str]:
    if not isinstance(index, list) or not all(isinstance(model, dict) and isinstance(model.get("name"), str) for model in index):
        return ['"model-index" must be a list of models with a name']
    errors = []
    for model in index:
        for result in model.get("results", [None]) or [None]:
            parts = result if isinstance(result, dict) else {}
            task, dataset, metrics = parts.get("task") or {}, parts.get("dataset") or {}, parts.get("metrics") or []
            if not task.get("type") or not dataset.get("type") or not dataset.get("name"):
                errors.append(f'"model-index": a result of {model["name"]} lacks its task, or its data set')
            if not metrics or not all(isinstance(each, dict) and each.get("type") and "value" in each for each in metrics):
                errors.append(f'"model-index": a result of {model["name"]} lacks its metrics')
    return errors


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
