"""A stand-in for the Hugging Face hub on loopback: what huggingface_hub asks of it, without Xet and pull requests.

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

KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}


class HubServer:
    """The hub. As a context manager it runs until the end of the block; `start` and `stop` keep ports and contents.

    Args:
        tokens: The role of each token: "read" or "write". All belong to `user`.
        organizations: Namespaces besides `user` that the tokens may use.
        page_size: Entries on a page of a list; None: as many as the real hub gives.
        lfs_threshold: Longer files have to be LFS.
        part_size: Longer LFS objects come in parts of so many bytes; None: all in one.
    """

    def __init__(
        self,
        tokens: dict[str, str],
        *,
        user: str = "user",
        organizations: tuple[str, ...] = (),
        page_size: int | None = None,
        lfs_threshold: int = 10_000_000,
        part_size: int | None = None,
    ):
        self.tokens, self.user, self.namespaces = dict(tokens), user, {user, *organizations}
        self.page_size, self.lfs_threshold, self.part_size = page_size, lfs_threshold, part_size
        self.faults = Faults()
        self.requests: list[Request] = []
        self.errors: list[str] = []  # of the server itself: there should be none
        self.stopping = threading.Event()
        self._repos: dict[tuple[str, str], Repo] = {}
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

    def repo(self, name: str, kind: str = "model") -> Repo:
        """A repository, to look at and to change past HTTP."""
        with self._lock:
            return self._repos[kind, name]

    def create(self, name: str, *, kind: str = "model", private: bool = False) -> Repo:
        """Make a repository past HTTP."""
        with self._lock:
            if (kind, name) in self._repos:
                raise HubError(409, f"You already created this {kind} repo", url=self._page(kind, name))
            repo = self._repos[kind, name] = Repo(kind, name, self.user, private, self.lfs_threshold)
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
            case ("GET", "api", "whoami-v2"):
                return self._whoami(call)
            case ("GET", "api", "agent-harnesses"):  # the client asks it once a process, without a token
                return as_json({"standardEnvVars": [], "harnesses": {}})
            case ("POST", "api", "validate-yaml"):
                errors, warnings = check_card(call.json()["content"])
                told = {"errors": [{"message": each} for each in errors], "warnings": [{"message": each} for each in warnings]}
                return as_json(told, 400 if errors else 200)
            case ("POST", "api", "repos", "create"):
                return self._create(call)
            case ("DELETE", "api", "repos", "delete"):
                return self._delete(call)
            case (_, "api", plural, namespace, name, *rest) if plural in KINDS:
                return self._api(call, KINDS[plural], f"{namespace}/{name}", rest)
            case (_, plural, *rest) if plural in KINDS:
                return self._pages(call, KINDS[plural], rest)
            case (_, *rest):
                return self._pages(call, "model", rest)
        raise HubError(404, "Not found")

    def _whoami(self, call: Call) -> Answer:
        if call.token is None:
            raise HubError(401, "Invalid username or password.")
        token = {"displayName": "a token", "role": self.tokens[call.token]}
        organizations = [{"type": "org", "name": each} for each in sorted(self.namespaces - {self.user})]
        return as_json({"type": "user", "name": self.user, "orgs": organizations, "auth": {"type": "access_token", "accessToken": token}})

    def _create(self, call: Call) -> Answer:
        value = call.json()
        name = f"{value.get('organization') or self.user}/{value['name']}"
        self._check_write(call, name)
        if not re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", name):
            raise HubError(400, f"Invalid name: {name}")
        kind = value.get("type") or "model"
        self.create(name, kind=kind, private=bool(value.get("private")) or value.get("visibility") == "private")
        return as_json({"url": self._page(kind, name), "name": name, "id": name})

    def _delete(self, call: Call) -> Answer:
        value = call.json()
        name, kind = f"{value.get('organization') or self.user}/{value['name']}", value.get("type") or "model"
        self._find(call, kind, name, write=True)
        with self._lock:
            del self._repos[kind, name]
        return Answer()

    def _page(self, kind: str, name: str) -> str:
        return f"{self.url}/{'' if kind == 'model' else kind + 's/'}{name}"

    def _check_write(self, call: Call, name: str) -> None:
        if call.token is None:
            # Over HTTPS the client takes any such 401 for a missing repository; over HTTP it needs the code.
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        if self.tokens[call.token] != "write" or name.split("/")[0] not in self.namespaces:
            raise HubError(403, f"You don't have the rights to write to {name} with this token")

    def _find(self, call: Call, kind: str, name: str, write: bool = False) -> Repo:
        """The repository, if this request may know of it and may do what it wants."""
        with self._lock:
            repo = self._repos.get((kind, name))
        own = call.token is not None and name.split("/")[0] in self.namespaces
        if repo is None or (repo.private and not own):
            raise HubError(404 if call.token else 401, "Repository not found", "RepoNotFound")
        if write:
            self._check_write(call, name)
        return repo

    def _api(self, call: Call, kind: str, name: str, rest: list[str]) -> Answer:
        repo = self._find(call, kind, name, write=call.method != "GET" and rest[:1] != ["paths-info"])
        match (call.method, *rest):
            case ("GET",):
                return self._info(call, repo, repo.resolve("main"))
            case ("GET", "revision", revision):
                return self._info(call, repo, repo.resolve(revision))
            case ("GET", "tree", revision, *path):
                return self._tree(call, repo, repo.resolve(revision), "/".join(path))
            case ("POST", "paths-info", revision):
                return self._paths_info(call, repo, repo.resolve(revision))
            case ("POST", "preupload", revision):
                return self._preupload(call, repo, revision)
            case ("POST", "commit", revision):
                return self._commit(call, repo, revision)
            case ("GET", "commits", revision):
                return self._commits(call, repo, revision)
            case ("GET", "refs"):
                return self._refs(repo)
            case ("POST", "branch", branch):
                repo.create_branch(branch, (call.json() if call.body else {}).get("startingPoint"))
            case ("DELETE", "branch", branch):
                repo.delete_branch(branch)
            case ("POST", "tag", revision):
                repo.create_tag(call.json()["tag"], revision)
            case ("DELETE", "tag", tag):
                repo.delete_tag(tag)
            case ("POST", "super-squash", branch):
                repo.squash(branch, call.json().get("message") or "Super-squash")
            case ("PUT", "settings"):
                value = call.json()
                repo.private = value.get("private", value.get("visibility", "private" if repo.private else "public") == "private")
            case _:
                raise HubError(404, "Not found")
        return as_json({"success": True})

    def _pages(self, call: Call, kind: str, parts: list[str]) -> Answer:
        match (call.method, *parts):
            case ("GET" | "HEAD", namespace, name, "resolve", revision, *path) if path:
                repo = self._find(call, kind, f"{namespace}/{name}")
                return self._resolve(call, repo, repo.resolve(revision), "/".join(path))
            case ("POST", namespace, git, "info", "lfs", "objects", action) if git.endswith(".git"):
                repo = self._find(call, kind, f"{namespace}/{git.removesuffix('.git')}", write=True)
                return self._lfs_batch(call, repo) if action == "batch" else self._lfs_verify(call, repo)
            case ("POST", "lfs-multipart", oid) if kind == "model":
                return self._lfs_complete(call, oid)
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
        expand = call.flag("expand")
        page, headers = self._paginate(call, paths, 50 if expand else 1000)
        return as_json([self._told(repo, commit, entries, path, expand) for path in page], **headers)

    def _told(self, repo: Repo, commit: Commit, entries: dict[str, Entry], path: str, expand: bool) -> dict[str, Any]:
        entry = entries.get(path)
        if entry:
            told: dict[str, Any] = {"type": "file", "oid": entry.oid, "size": entry.size, "path": path}
            if entry.sha256:
                told["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size}
        else:
            inside = "".join(f"{each.path} {each.oid}\n" for each in entries.values() if each.path.startswith(path + "/"))
            told = {"type": "directory", "oid": hashlib.sha1(inside.encode()).hexdigest(), "size": 0, "path": path}
        if expand:
            last = repo.last_change(commit, lambda each: each == path or each.startswith(path + "/"))
            told["lastCommit"] = {"id": last.oid, "title": last.title, "date": last.date}
        return told

    def _paths_info(self, call: Call, repo: Repo, commit: Commit) -> Answer:
        form = call.form()
        entries = repo.entries(commit)
        expand = form.get("expand", ["false"])[0].lower() in ("true", "1")
        paths = [path if path in entries else path.strip("/") for path in form.get("paths", [])]
        known = [path for path in paths if path in entries or any(each.startswith(path + "/") for each in entries)]
        return as_json([self._told(repo, commit, entries, path, expand) for path in known])

    def _commits(self, call: Call, repo: Repo, revision: str) -> Answer:
        page, headers = self._paginate(call, repo.history(revision), 50)
        told = [
            {"id": each.oid, "title": each.title, "message": each.message, "authors": [{"user": each.author}], "date": each.date}
            for each in page
        ]
        return as_json(told, **headers)

    def _refs(self, repo: Repo) -> Answer:
        def told(names: dict[str, str], folder: str) -> list[dict[str, str]]:
            return [{"name": name, "ref": f"refs/{folder}/{name}", "targetCommit": oid} for name, oid in names.items()]

        return as_json(
            {"branches": told(dict(repo.branches), "heads"), "converts": [], "tags": told(dict(repo.tags), "tags"), "pullRequests": []}
        )

    def _paginate(self, call: Call, items: list[Any], size: int) -> tuple[list[Any], dict[str, str]]:
        size = self.page_size or min(int(call.query.get("limit", [size])[0]), size)
        start = int(call.query.get("cursor", ["0"])[0])
        if start + size >= len(items):
            return items[start:], {}
        following = urlencode({**call.query, "cursor": [start + size]}, doseq=True)
        return items[start : start + size], {"Link": f'<{self.url}{call.raw_path}?{following}>; rel="next"'}

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
        storage = f"/storage/download/{repo.kind}s/{repo.name}/{commit.oid}/{quote(path, safe='')}"
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
            {
                "success": True,
                "commitOid": commit.oid,
                "commitUrl": f"{self._page(repo.kind, repo.name)}/commit/{commit.oid}",
                "hookOutput": "",
            }
        )

    def _lfs_batch(self, call: Call, repo: Repo) -> Answer:
        value = call.json()
        if value.get("operation") != "upload" or value.get("hash_algo", "sha256") != "sha256":
            raise HubError(422, "Only uploads, by SHA-256")
        branch = (value.get("ref") or {}).get("name")
        if branch and branch not in repo.branches:
            raise missing_revision(branch)
        in_parts = "multipart" in value.get("transfers", [])
        told = [self._lfs_object(repo, each["oid"], each["size"], in_parts) for each in value["objects"]]
        return as_json({"transfer": "multipart" if in_parts and self.part_size else "basic", "objects": told})

    def _lfs_object(self, repo: Repo, oid: str, size: int, in_parts: bool) -> dict[str, Any]:
        if not repo.announce(oid, size):
            return {"oid": oid, "size": size}
        where = f"/storage/upload/{repo.kind}s/{repo.name}/{oid}"
        upload: dict[str, Any] = {"href": self._signed(self.storage_url, where)}
        if in_parts and self.part_size and size > self.part_size:
            numbers = range(1, -(-size // self.part_size) + 1)
            upload["href"] = self._signed(self.url, f"/lfs-multipart/{oid}", f"{repo.kind}s/{repo.name}")
            upload["header"] = {str(number): self._signed(self.storage_url, f"{where}/{number}") for number in numbers}
            upload["header"]["chunk_size"] = str(self.part_size)
        verify = f"{self._page(repo.kind, repo.name)}.git/info/lfs/objects/verify"
        return {"oid": oid, "size": size, "authenticated": True, "actions": {"upload": upload, "verify": {"href": verify}}}

    def _lfs_verify(self, call: Call, repo: Repo) -> Answer:
        value = call.json()
        content = repo.objects.get(value["oid"])
        if content is None or len(content) != value["size"]:
            raise HubError(404 if content is None else 422, f"The object {value['oid']} is not there, or has another size")
        return as_json({})

    def _lfs_complete(self, call: Call, oid: str) -> Answer:
        """The end of an upload in parts. Its address is signed: the client sends no token with it."""
        of = call.query.get("of", [""])[0]
        self._check_signature(call, of)
        plural, name = of.split("/", 1)
        repo = self.repo(name, KINDS[plural])
        told = {each["partNumber"]: each["etag"] for each in call.json()["parts"]}
        with repo.lock:
            parts = {number: repo.parts[oid, number] for number in sorted(told) if (oid, number) in repo.parts}
            if any(told[number].strip('"') != hashlib.md5(parts.get(number, b"")).hexdigest() for number in told):
                raise HubError(400, "InvalidPart")
            repo.receive(oid, b"".join(parts.values()))
            repo.parts = {key: part for key, part in repo.parts.items() if key[0] != oid}
        return as_json({"success": True})

    # Storage.

    def _storage(self, call: Call) -> Answer:
        if call.token is not None:
            raise HubError(400, "Only one auth mechanism allowed: the address is signed, a token must not be sent")
        self._check_signature(call)
        match (call.method, *call.parts):
            case ("PUT", "storage", "upload", plural, namespace, name, oid, *number):
                repo = self.repo(f"{namespace}/{name}", KINDS[plural])
                if number:
                    with repo.lock:
                        repo.parts[oid, int(number[0])] = call.body
                    return Answer(headers={"ETag": f'"{hashlib.md5(call.body).hexdigest()}"'})
                repo.receive(oid, call.body)
                return Answer(headers={"ETag": f'"{oid}"'})
            case ("GET" | "HEAD", "storage", "download", plural, namespace, name, commit, path):
                repo = self.repo(f"{namespace}/{name}", KINDS[plural])
                entry = repo.entry(repo.resolve(commit), path)
                if entry is None:
                    raise HubError(404, "NoSuchKey")
                return ranged(call, entry.content, {"ETag": f'"{entry.etag}"', "Accept-Ranges": "bytes"})
        raise HubError(404, "NoSuchKey")

    def _signature(self, path: str, of: str) -> str:
        # Of the unquoted path: a client may quote it in another way.
        return hmac.new(self._secret, f"{unquote(path)} {of}".encode(), "sha256").hexdigest()

    def _signed(self, base: str, path: str, of: str = "") -> str:
        return f"{base}{path}?{urlencode({'of': of, 'signature': self._signature(path, of)})}"

    def _check_signature(self, call: Call, of: str = "") -> None:
        if not hmac.compare_digest(call.query.get("signature", [""])[0], self._signature(call.raw_path, of)):
            raise HubError(403, "SignatureDoesNotMatch")


def _with_blob(sibling: dict[str, Any], entry: Entry) -> dict[str, Any]:
    lfs = {"lfs": {"sha256": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size}} if entry.sha256 else {}
    return {**sibling, "size": entry.size, "blobId": entry.oid, **lfs}
