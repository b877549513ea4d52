from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from hub.server import Fault, HubServer, Repo
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import BadRequestError, HfHubHTTPError, RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

NAME = "user/study"


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.fixture
def api(hub: HubServer) -> HfApi:
    return HfApi()


@pytest.fixture
def repo(hub: HubServer) -> Repo:
    return hub.create(NAME, private=True)


def post(hub: HubServer, path: str, **more: Any):
    return huggingface_hub.get_session().post(hub.url + path, headers={"Authorization": "Bearer hf_write"}, **more)


def test_a_small_and_a_large_file_make_the_round_trip(hub: HubServer, api: HfApi, tmp_path: Path):
    url = api.create_repo(NAME, private=True)
    assert (url.repo_id, api.create_repo(NAME, private=True, exist_ok=True)) == (NAME, url)
    with pytest.raises(HfHubHTTPError, match="already created"):
        api.create_repo(NAME)

    large = noise(3_000_000)
    (tmp_path / "weights.bin").write_bytes(large)
    api.upload_file(path_or_fileobj=b"step,loss\n", path_in_repo="logs/a.csv", repo_id=NAME)
    commit = api.upload_file(path_or_fileobj=tmp_path / "weights.bin", path_in_repo="weights.bin", repo_id=NAME, commit_message="weights")
    assert {**hub.repo(NAME).files(), ".gitattributes": b""} == {".gitattributes": b"", "logs/a.csv": b"step,loss\n", "weights.bin": large}

    info = api.repo_info(NAME, files_metadata=True)
    assert (info.sha, info.private) == (commit.oid, True)
    told = {each.rfilename: each for each in info.siblings}
    assert told["weights.bin"].lfs.sha256 == hashlib.sha256(large).hexdigest()
    assert told["logs/a.csv"].blob_id == hashlib.sha1(b"blob 10\0step,loss\n").hexdigest()
    assert api.file_exists(NAME, "weights.bin") and not api.file_exists(NAME, "missing")
    for path, content in {"weights.bin": large, "logs/a.csv": b"step,loss\n"}.items():
        assert Path(hf_hub_download(NAME, path)).read_bytes() == content
    # No token goes to the storage, and none into the record.
    assert [each.authenticated for each in hub.asked("*", "^/storage/")] == [False, False]
    assert {each.path for each in hub.requests if each.host == "hub" and not each.authenticated} <= {"/api/agent-harnesses"}
    assert "hf_write" not in repr(hub.requests)


def test_folders_go_up_and_come_down(hub: HubServer, repo: Repo, api: HfApi, tmp_path: Path):
    files = {
        "a.txt": b"a",
        "runs/1/log.csv": b"1",
        "runs/1/weights.safetensors": noise(2_000_000),
        "runs/2/weights.pt": noise(4_000_000, 1),
        "no text": b"\0",
    }
    for path, content in files.items():
        (tmp_path / "up" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "up" / path).write_bytes(content)
    api.upload_folder(repo_id=NAME, folder_path=tmp_path / "up")
    files[".gitattributes"] = repo.files()[".gitattributes"]
    assert repo.files() == files
    assert {path for path, file in repo.resolve("main").files.items() if file.lfs} == {
        "runs/1/weights.safetensors",
        "runs/2/weights.pt",
        "no text",
    }

    told = {each.path: each for each in api.list_repo_tree(NAME, recursive=True)}
    assert {path: each.size for path, each in told.items() if path in files} == {path: len(content) for path, content in files.items()}
    assert set(told) - set(files) == {"runs", "runs/1", "runs/2"}
    assert [each.path for each in api.list_repo_tree(NAME, "runs")] == ["runs/1", "runs/2"]
    assert {path: Path(hf_hub_download(NAME, path)).read_bytes() for path in files} == files

    api.upload_folder(repo_id=NAME, folder_path=tmp_path / "up")
    assert len(repo.history()) == 2 and len(hub.asked("PUT", "")) == 3  # nothing is new
    api.delete_file("a.txt", repo_id=NAME)
    assert "a.txt" not in repo.files()
    with pytest.raises(RemoteEntryNotFoundError):
        api.delete_file("a.txt", repo_id=NAME)


def test_revisions(repo: Repo, api: HfApi):
    first = repo.commit({"a": b"1"}, "first")
    api.create_branch(NAME, branch="runs/1")
    api.create_branch(NAME, branch="runs/1", exist_ok=True)
    second = api.upload_file(path_or_fileobj=b"2", path_in_repo="a", repo_id=NAME, revision="runs/1", commit_message="second").oid
    assert repo.branches == {"main": first, "runs/1": second}
    for revision, content in {"runs/1": b"2", "main": b"1", second: b"2", second[:8]: b"2"}.items():
        assert Path(hf_hub_download(NAME, "a", revision=revision)).read_bytes() == content
    api.super_squash_history(NAME, branch="runs/1", commit_message="one")
    assert [each.title for each in repo.history("runs/1")] == ["one"] and repo.files("runs/1")["a"] == b"2"
    assert api.revision_exists(NAME, first) and not api.revision_exists(NAME, second)


def test_a_commit_on_an_old_parent_is_refused(repo: Repo, api: HfApi):
    old = api.repo_info(NAME).sha
    new = api.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id=NAME, parent_commit=old).oid
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as refused:
        api.upload_file(path_or_fileobj=b"2", path_in_repo="a", repo_id=NAME, parent_commit=old)
    assert refused.value.response.status_code == 412
    assert repo.files()["a"] == b"1" and repo.resolve("main").oid == new


def test_who_may_do_what(hub: HubServer, repo: Repo, api: HfApi):
    public = hub.create("user/open")
    for each in (repo, public):
        each.commit({"a": b"1"})
    reads, wrong, nobody = (HfApi(token=token) for token in ("hf_read", "hf_wrong", False))
    assert reads.file_exists(NAME, "a") and nobody.file_exists("user/open", "a")
    for private in (lambda: nobody.repo_info(NAME), lambda: nobody.list_repo_files(NAME)):
        with pytest.raises(RepositoryNotFoundError) as missing:
            private()
        assert missing.value.response.status_code == 401

    def upload(api: HfApi, name: str) -> int:
        with pytest.raises(HfHubHTTPError) as refused:
            api.upload_file(path_or_fileobj=b"2", path_in_repo="a", repo_id=name)
        return refused.value.response.status_code

    assert [upload(each, "user/open") for each in (reads, wrong, nobody)] == [403, 401, 401]
    assert [upload(each, NAME) for each in (reads, wrong, nobody)] == [403, 401, 401]
    for refused in (lambda: wrong.repo_info("user/open"), lambda: reads.create_repo("user/new"), lambda: api.create_repo("other/new")):
        with pytest.raises(HfHubHTTPError) as error:
            refused()
        assert error.value.response.status_code in (401, 403)
    assert repo.files()["a"] == public.files()["a"] == b"1"


def test_what_is_missing_says_so(repo: Repo, api: HfApi):
    with pytest.raises(RepositoryNotFoundError):
        api.repo_info("user/missing")
    with pytest.raises(RevisionNotFoundError):
        api.repo_info(NAME, revision="missing")
    with pytest.raises(RevisionNotFoundError):
        api.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id=NAME, revision="missing")
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download(NAME, "missing")
    with pytest.raises(RemoteEntryNotFoundError):
        list(api.list_repo_tree(NAME, "missing"))
    assert not api.repo_exists("user/missing")


@pytest.mark.parametrize("path", ["../evil", "/etc/passwd", "a/../b", "a//b", ".git/config", "a\\b", ""])
def test_a_path_that_git_refuses_is_refused(hub: HubServer, repo: Repo, path: str):
    lines = [
        '{"key": "header", "value": {"summary": "evil"}}',
        '{"key": "file", "value": {"path": "%s", "content": "", "encoding": "base64"}}',
    ]
    answer = post(hub, f"/api/models/{NAME}/commit/main", content="\n".join(lines) % path.replace("\\", "\\\\"))
    assert answer.status_code == 400 and "Invalid path" in answer.json()["error"]
    assert len(repo.history()) == 1


def test_an_lfs_object_must_be_there_and_be_what_was_announced(hub: HubServer, repo: Repo, api: HfApi):
    oid = hashlib.sha256(b"content").hexdigest()
    lines = '{"key": "header", "value": {"summary": "a"}}\n{"key": "lfsFile", "value": {"path": "a.bin", "algo": "sha256", "oid": "%s", "size": %d}}'
    assert post(hub, f"/api/models/{NAME}/commit/main", content=lines % (oid, 7)).status_code == 400
    batch = post(hub, f"/{NAME}.git/info/lfs/objects/batch", json={"operation": "upload", "objects": [{"oid": oid, "size": 7}]}).json()
    actions = batch["objects"][0]["actions"]
    put = huggingface_hub.get_session().put
    for wrong in (b"another", b"content, and more"):
        assert put(actions["upload"]["href"], content=wrong).status_code == 400
    assert post(hub, f"/{NAME}.git/info/lfs/objects/verify", json={"oid": oid, "size": 7}).status_code == 404
    assert put(actions["upload"]["href"].replace("signature=", "signature=0"), content=b"content").status_code == 403
    assert put(actions["upload"]["href"], content=b"content", headers={"Authorization": "Bearer hf_write"}).status_code == 400
    assert put(actions["upload"]["href"], content=b"content").status_code == 200
    assert post(hub, f"/{NAME}.git/info/lfs/objects/verify", json={"oid": oid, "size": 7}).status_code == 200
    assert post(hub, f"/api/models/{NAME}/commit/main", content=lines % (oid, 8)).status_code == 400
    assert post(hub, f"/api/models/{NAME}/commit/main", content=lines % (oid, 7)).status_code == 200
    assert repo.files()["a.bin"] == b"content"


def test_the_metadata_of_a_card_are_checked(repo: Repo, api: HfApi):
    def upload(card: str) -> None:
        api.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id=NAME)

    upload("---\nlicense: mit\ntags: [vision]\n---\n# A card\n")
    assert api.model_info(NAME).card_data.license == "mit"
    for wrong, why in {"license: [": "YAML", "tags: {a: 1}": "tags", "model-index:\n- name: a\n  results: [{}]": "model-index"}.items():
        with pytest.raises(ValueError, match=why):
            upload(f"---\n{wrong}\n---\n")
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        upload("# A card\n")
    line = '{"key": "file", "value": {"path": "README.md", "content": "---\\nlicense: [\\n---\\n", "encoding": "utf-8"}}'
    with pytest.raises(BadRequestError, match="Invalid metadata"):
        huggingface_hub.utils.hf_raise_for_status(
            huggingface_hub.get_session().post(
                f"{api.endpoint}/api/models/{NAME}/commit/main",
                content='{"key": "header", "value": {"summary": "a"}}\n' + line,
                headers={"Authorization": "Bearer hf_write"},
            )
        )


def test_a_cut_download_goes_on_where_it_was_cut(hub: HubServer, repo: Repo, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1 << 16)  # less than a whole chunk is thrown away
    content = noise(3_000_000)
    repo.commit({"weights.bin": content})
    hub.faults.add("GET", "^/storage/", times=2, cut=1_000_000)
    assert Path(hf_hub_download(NAME, "weights.bin")).read_bytes() == content
    ranges = [each.range for each in hub.asked("GET", "^/storage/")]
    assert ranges == [None, f"bytes={1_000_000 // 65536 * 65536}-", f"bytes={1_000_000 // 65536 * 65536 * 2}-"]


def test_ranges(hub: HubServer, repo: Repo):
    repo.commit({"a": b"0123456789", "b.bin": b"0123456789"})
    for path in ("a", "b.bin"):
        url = f"{hub.url}/{NAME}/resolve/main/{path}"
        for wanted, content in {"bytes=2-4": b"234", "bytes=8-": b"89", "bytes=-3": b"789", "bytes=5-99": b"56789"}.items():
            answer = huggingface_hub.get_session().get(url, headers={"Authorization": "Bearer hf_read", "Range": wanted})
            assert (answer.status_code, answer.content) == (206, content)
        answer = huggingface_hub.get_session().get(url, headers={"Authorization": "Bearer hf_read", "Range": "bytes=10-"})
        assert (answer.status_code, answer.headers["Content-Range"]) == (416, "bytes */10")


def test_a_commit_can_be_done_without_an_answer(hub: HubServer, repo: Repo, api: HfApi):
    hub.faults.add("POST", "/commit/", lose=True, times=1)
    with pytest.raises(Exception, match="disconnected"):
        api.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id=NAME)
    assert repo.files()["a"] == b"1"
    assert [each.status for each in hub.asked("POST", "/commit/")] == [None]


def test_a_hub_that_hangs(hub: HubServer, repo: Repo, api: HfApi):
    repo.commit({"a": b"1"})
    url = f"{hub.url}/{NAME}/resolve/main/a"
    hub.faults.add("HEAD", "/resolve/", hang=60, times=1)
    with pytest.raises(Exception, match="timed out"):
        api.get_hf_file_metadata(url=url, timeout=0.2)
    assert api.get_hf_file_metadata(url=url).size == 1


def test_which_requests_a_fault_hits():
    def hits(**what: Any) -> list[int]:
        fault = Fault("GET", "/a", **what)
        return [number for number in range(1, 11) if fault.strikes("GET", "/a/b")]

    assert (hits(times=2), hits(after=7), hits(every=4), hits(every=2, after=3, times=2)) == ([1, 2], [8, 9, 10], [4, 8], [5, 7])
    fault = Fault("PUT", "^/storage/.*bin$")
    assert [fault.strikes(*each) for each in (("GET", "/storage/a.bin"), ("PUT", "/a.bin"), ("PUT", "/storage/a.bin"))] == [
        False,
        False,
        True,
    ]


def test_lies(repo: Repo, api: HfApi):
    repo.commit({"weights.bin": b"true", "log.csv": b"true"})
    repo.lie("../../evil", content=b"evil")
    repo.lie("/etc/evil", content=b"evil", sha256="0" * 64)
    repo.lie("weights.bin", sha256="f" * 64, size=1 << 50)
    repo.lie("log.csv", content=b"another content")
    told = {each.path: each for each in api.list_repo_tree(NAME, recursive=True)}
    assert {"../../evil", "/etc/evil"} < told.keys()
    assert (told["weights.bin"].size, told["weights.bin"].lfs.sha256) == (1 << 50, "f" * 64)
    metadata = api.get_hf_file_metadata(url=f"{api.endpoint}/{NAME}/resolve/main/weights.bin")
    assert (metadata.size, metadata.etag) == (1 << 50, "f" * 64)
    assert told["log.csv"].size == 4
    answer = huggingface_hub.get_session().get(f"{api.endpoint}/{NAME}/resolve/main/log.csv", headers={"Authorization": "Bearer hf_read"})
    assert answer.content == b"another content"
    repo.tell_the_truth()
    assert set(api.list_repo_files(NAME)) == {".gitattributes", "log.csv", "weights.bin"}


def test_many_commits_at_once(hub: HubServer, repo: Repo, api: HfApi):
    from concurrent.futures import ThreadPoolExecutor

    def commit(number: int) -> None:
        operations = [CommitOperationAdd(f"{number}.txt", b"small"), CommitOperationAdd(f"{number}.bin", noise(100_000, number))]
        api.create_commit(NAME, operations, commit_message=str(number))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(commit, range(16)))
    assert len(repo.history()) == 17 and len(repo.files()) == 33


def test_a_child_process_finds_the_hub(repo: Repo):
    code = f"from huggingface_hub import upload_file; upload_file(path_or_fileobj=b'1', path_in_repo='a.bin', repo_id='{NAME}')"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "HF_HUB_DISABLE_XET": "1"})
    assert repo.files()["a.bin"] == b"1"
