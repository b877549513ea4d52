"""A stand-in for the Hugging Face hub on loopback: what huggingface_hub asks of it for diffvit: models, without Xet and pull requests.

Two ports, as the real hub has two hosts: the hub itself, and the storage of LFS objects, which takes signed addresses and no token.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import os
import re
import secrets
import threading
from typing import Any
from urllib.parse import quote, unquote, urlencode

import yaml
from hub.repos import Commit, Entry, HubError, Repo, card_metadata, check_card, missing_entry, missing_revision
from hub.wire import Answer, Call, Fault, Faults, Listener, Request, as_json, ranged

__all__ = ["Fault", "Faults", "HubError", "HubServer", "Repo", "Request"]


class HubServer:
    """The hub. As a context manager it runs until the end of the block; `start` and `stop` keep ports and contents.

    Args:
        tokens: The role of each token: "read" or "write". All belong to `user`.
    """

    def __init__(self, tokens: dict[str, str], user: str = "user"):
        self.tokens, self.user = dict(tokens), user
        self.faults = Faults()
        self.requests: list[Request] = []
        self.errors: list[str] = []  # of the server itself: there should be none
        self.stopping = threading.Event()
        self._repos: dict[str, Repo] = {}
        self._lock = threading.RLock()
        self._secret = secrets.token_bytes(16)
        self._ports = {"hub": 0, "storage": 0}
        self._listeners: list[Listener] = []

    def __enter__(self) -> HubServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listen: on the ports of the last time, if there was one."""
        self.stopping.clear()
        for host in self._ports:
            listener = Listener(self, host, self._ports[host])
            self._ports[host] = listener.server_address[1]
            self._listeners.append(listener)
            threading.Thread(target=listener.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Refuse new connections and cut those there are."""
        self.stopping.set()
        for listener in self._listeners:
            listener.shutdown()
            listener.server_close()
            listener.cut_connections()
        self._listeners.clear()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._ports['hub']}"

    @property
    def storage_url(self) -> str:
        return f"http://127.0.0.1:{self._ports['storage']}"

    def environment(self, token: str | None, home: str | os.PathLike[str]) -> dict[str, str]:
        """What the environment of a process that is to use this hub needs. `home`: a folder for its cache."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": os.path.join(home, "hub"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            **({"HF_TOKEN": token} if token else {}),
        }

    def repo(self, name: str) -> Repo:
        """A repository, to look at and to change past HTTP."""
        with self._lock:
            return self._repos[name]

    def names(self) -> list[str]:
        """The repositories that have been made."""
        with self._lock:
            return list(self._repos)

    def create(self, name: str, *, private: bool = False) -> Repo:
        """Make a repository past HTTP."""
        with self._lock:
            if name in self._repos:
                raise HubError(409, "You already created this model repo", url=f"{self.url}/{name}")
            repo = self._repos[name] = Repo(name, self.user, private)
            return repo

    def asked(self, method: str, path: str) -> list[Request]:
        """The requests so far with this method ("*": any), in whose path a regular expression is found."""
        return [each for each in list(self.requests) if method in ("*", each.method) and re.search(path, each.path)]

    # Routes.

    def answer(self, call: Call) -> Answer:
        """What comes of a request."""
        if call.host == "storage":
            return self._storage(call)
        if call.token is not None and call.token not in self.tokens:
            raise HubError(401, "Invalid credentials in Authorization header")
        match (call.method, *call.parts):
            case ("GET", "api", "agent-harnesses"):  # the client asks it once a process, without a token
                return as_json({"standardEnvVars": [], "harnesses": {}})
            case ("POST", "api", "validate-yaml"):
                errors, warnings = check_card(call.json()["content"])
                told = {"errors": [{"message": each} for each in errors], "warnings": [{"message": each} for each in warnings]}
                return as_json(told, 400 if errors else 200)
            case ("POST", "api", "repos", "create"):
                return self._create(call)
            case (_, "api", "models", namespace, name, *rest):
                return self._api(call, f"{namespace}/{name}", rest)
            case (_, *rest):
                return self._pages(call, rest)
        raise HubError(404, "Not found")

    def _create(self, call: Call) -> Answer:
        value = call.json()
        name = f"{value.get('organization') or self.user}/{value['name']}"
        self._check_write(call, name)
        if not re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", name):
            raise HubError(400, f"Invalid name: {name}")
        self.create(name, private=bool(value.get("private")) or value.get("visibility") == "private")
        return as_json({"url": f"{self.url}/{name}", "name": name, "id": name})

    def _check_write(self, call: Call, name: str) -> None:
        if call.token is None:
            # Over HTTPS the client takes any such 401 for a missing repository; over HTTP it needs the code.
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        if self.tokens[call.token] != "write" or name.split("/")[0] != self.user:
            raise HubError(403, f"You don't have the rights to write to {name} with this token")

    def _find(self, call: Call, name: str, write: bool = False) -> Repo:
        """The repository, if this request may know of it and may do what it wants."""
        with self._lock:
            repo = self._repos.get(name)
        own = call.token is not None and name.split("/")[0] == self.user
        if repo is None or (repo.private and not own):
            raise HubError(404 if call.token else 401, "Repository not found", "RepoNotFound")
        if write:
            self._check_write(call, name)
        return repo

    def _api(self, call: Call, name: str, rest: list[str]) -> Answer:
        repo = self._find(call, name, write=call.method != "GET")
        match (call.method, *rest):
            case ("GET",):
                return self._info(call, repo, repo.resolve("main"))
            case ("GET", "revision", revision):
                return self._info(call, repo, repo.resolve(revision))
            case ("GET", "tree", revision, *path):
                return self._tree(call, repo, repo.resolve(revision), "/".join(path))
            case ("POST", "preupload", revision):
                return self._preupload(call, repo, revision)
            case ("POST", "commit", revision):
                return self._commit(call, repo, revision)
            case ("POST", "branch", branch):
                repo.create_branch(branch, (call.json() if call.body else {}).get("startingPoint"))
            case ("POST", "super-squash", branch):
                repo.squash(branch, call.json().get("message") or "Super-squash")
            case _:
                raise HubError(404, "Not found")
        return as_json({"success": True})

    def _pages(self, call: Call, parts: list[str]) -> Answer:
        match (call.method, *parts):
            case ("GET" | "HEAD", namespace, name, "resolve", revision, *path) if path:
                repo = self._find(call, f"{namespace}/{name}")
                return self._resolve(call, repo, repo.resolve(revision), "/".join(path))
            case ("POST", namespace, git, "info", "lfs", "objects", action) if git.endswith(".git"):
                repo = self._find(call, f"{namespace}/{git.removesuffix('.git')}", write=True)
                return self._lfs_batch(call, repo) if action == "batch" else self._lfs_verify(call, repo)
        raise HubError(404, "Not found")

    # Reading.

    def _info(self, call: Call, repo: Repo, commit: Commit) -> Answer:
        entries = repo.entries(commit).values()
        siblings: list[dict[str, Any]] = [{"rfilename": each.path} for each in entries]
        if call.flag("blobs"):
            siblings = [_with_blob(sibling, each) for sibling, each in zip(siblings, entries, strict=True)]
        card = commit.files.get("README.md")
        metadata = None
        with contextlib.suppress(yaml.YAMLError):
            metadata = card_metadata(card.content.decode(errors="replace")) if card else None
        told = {
            "_id": hashlib.sha1(repo.name.encode()).hexdigest()[:24],
            "id": repo.name,
            "modelId": repo.name,
            "author": repo.namespace,
            "sha": commit.oid,
            "lastModified": commit.date,
            "createdAt": repo.created,
            "private": repo.private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": list((metadata or {}).get("tags") or []) if isinstance(metadata, dict) else [],
            "cardData": metadata if isinstance(metadata, dict) else None,
            "siblings": siblings,
        }
        wanted = {"_id", "id", *call.query.get("expand", [])}
        return as_json({key: value for key, value in told.items() if wanted == {"_id", "id"} or key in wanted})

    def _tree(self, call: Call, repo: Repo, commit: Commit, folder: str) -> Answer:
        entries = repo.entries(commit)
        start = folder.strip("/") + "/" if folder.strip("/") else ""
        inside = [path for path in entries if path.startswith(start)]
        if start and not inside:
            raise missing_entry(folder)
        folders = {path[: each.start()] for path in inside for each in re.finditer("/", path) if each.start() > len(start)}
        paths = sorted({*inside, *folders})
        if not call.flag("recursive"):
            paths = [path for path in paths if "/" not in path[len(start) :]]
        return as_json([self._told(entries, path) for path in paths])

    def _told(self, entries: dict[str, Entry], path: str) -> dict[str, Any]:
        entry = entries.get(path)
        if entry:
            told: dict[str, Any] = {"type": "file", "oid": entry.oid, "size": entry.size, "path": path}
            if entry.sha256:
                told["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size}
        else:
            inside = "".join(f"{each.path} {each.oid}\n" for each in entries.values() if each.path.startswith(path + "/"))
            told = {"type": "directory", "oid": hashlib.sha1(inside.encode()).hexdigest(), "size": 0, "path": path}
        return told

    def _resolve(self, call: Call, repo: Repo, commit: Commit, path: str) -> Answer:
        entry = repo.entry(commit, path)
        told = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if entry is None:
            error = missing_entry(path)
            error.headers = told
            raise error
        if not entry.sha256:
            told |= {"ETag": f'"{entry.etag}"', "X-Linked-Size": str(entry.size)}
            return ranged(call, entry.content, told)
        storage = f"/storage/download/{repo.name}/{commit.oid}/{quote(path, safe='')}"
        told |= {"X-Linked-ETag": f'"{entry.etag}"', "X-Linked-Size": str(entry.size), "ETag": f'"{entry.oid}"'}
        return Answer(302, f"Found. Redirecting to {storage}".encode(), {**told, "Location": self._signed(self.storage_url, storage)})

    # Writing.

    def _preupload(self, call: Call, repo: Repo, revision: str) -> Answer:
        if revision not in repo.branches:
            raise missing_revision(revision)
        head = repo.resolve(revision)
        told = []
        for each in call.json()["files"]:
            lfs = repo.is_lfs(each["path"], base64.b64decode(each["sample"]), each["size"], revision)
            there = head.files.get(each["path"])
            oid = None if there is None else there.sha256 if there.lfs else there.oid
            told.append({"path": each["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid})
        return as_json({"files": told, "commitOid": head.oid})

    def _commit(self, call: Call, repo: Repo, revision: str) -> Answer:
        if call.flag("create_pr"):
            raise HubError(400, "This stand-in has no pull requests")
        try:
            lines = [json.loads(line) for line in call.body.splitlines() if line.strip()]
            commit = repo.apply(revision, lines)
        except (ValueError, KeyError, TypeError) as error:
            raise HubError(400, f"Malformed commit: {error!r}") from error
        return as_json(
            {"success": True, "commitOid": commit.oid, "commitUrl": f"{self.url}/{repo.name}/commit/{commit.oid}", "hookOutput": ""}
        )

    def _lfs_batch(self, call: Call, repo: Repo) -> Answer:
        value = call.json()
        if value.get("operation") != "upload" or value.get("hash_algo", "sha256") != "sha256":
            raise HubError(422, "Only uploads, by SHA-256")
        branch = (value.get("ref") or {}).get("name")
        if branch and branch not in repo.branches:
            raise missing_revision(branch)
        return as_json({"transfer": "basic", "objects": [self._lfs_object(repo, each["oid"], each["size"]) for each in value["objects"]]})

    def _lfs_object(self, repo: Repo, oid: str, size: int) -> dict[str, Any]:
        if not repo.announce(oid, size):
            return {"oid": oid, "size": size}
        upload = {"href": self._signed(self.storage_url, f"/storage/upload/{repo.name}/{oid}")}
        verify = f"{self.url}/{repo.name}.git/info/lfs/objects/verify"
        return {"oid": oid, "size": size, "authenticated": True, "actions": {"upload": upload, "verify": {"href": verify}}}

    def _lfs_verify(self, call: Call, repo: Repo) -> Answer:
        value = call.json()
        content = repo.objects.get(value["oid"])
        if content is None or len(content) != value["size"]:
            raise HubError(404 if content is None else 422, f"The object {value['oid']} is not there, or has another size")
        return as_json({})

    # Storage.

    def _storage(self, call: Call) -> Answer:
        if call.token is not None:
            raise HubError(400, "Only one auth mechanism allowed: the address is signed, a token must not be sent")
        self._check_signature(call)
        match (call.method, *call.parts):
            case ("PUT", "storage", "upload", namespace, name, oid):
                self.repo(f"{namespace}/{name}").receive(oid, call.body)
                return Answer(headers={"ETag": f'"{oid}"'})
            case ("GET" | "HEAD", "storage", "download", namespace, name, commit, path):
                repo = self.repo(f"{namespace}/{name}")
                entry = repo.entry(repo.resolve(commit), path)
                if entry is None:
                    raise HubError(404, "NoSuchKey")
                return ranged(call, entry.content, {"ETag": f'"{entry.etag}"', "Accept-Ranges": "bytes"})
        raise HubError(404, "NoSuchKey")

    def _signature(self, path: str) -> str:
        # Of the unquoted path: a client may quote it in another way.
        return hmac.new(self._secret, unquote(path).encode(), "sha256").hexdigest()

    def _signed(self, base: str, path: str) -> str:
        return f"{base}{path}?{urlencode({'signature': self._signature(path)})}"

    def _check_signature(self, call: Call) -> None:
        if not hmac.compare_digest(call.query.get("signature", [""])[0], self._signature(call.raw_path)):
            raise HubError(403, "SignatureDoesNotMatch")


def _with_blob(sibling: dict[str, Any], entry: Entry) -> dict[str, Any]:
    lfs = {"lfs": {"sha256": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size}} if entry.sha256 else {}
    return {**sibling, "size": entry.size, "blobId": entry.oid, **lfs}
