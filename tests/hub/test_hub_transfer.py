"""Upload and download against a stand-in hub, by the real client: hashes, conflicts, faults, hostile listings, and no token in any message."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from hub.server import HubServer

from diffvit.errors import StorageError, UserError
from diffvit.hub.account import Account, find_account, find_token, parse_repository
from diffvit.hub.client import Hub, HubRefusesError, is_safe_name
from diffvit.utils import download, upload

NAME = "user/study"


@pytest.fixture
def to_hub(hub: HubServer) -> Hub:
    return Hub(Account(NAME, "hf_write"), pauses=(0.01, 0.01, 0.01))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as a ledger has it: a small file, a large one, and hidden ones."""
    made = tmp_path / "made"
    (made / "vit_classic").mkdir(parents=True)
    (made / "vit_classic/a_training.log").write_text("step,loss\n1,2.5\n")
    (made / "vit_classic/a.safetensors").write_bytes(os.urandom(300_000))
    (made / ".state").mkdir()
    (made / ".state/secret").write_text("not to be sent")
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_goes_and_comes_back(hub: HubServer, to_hub: Hub, folder: Path, tmp_path: Path) -> None:
    sent = upload(folder, "runs", to_hub)
    assert sent.moved == ("runs/vit_classic/a.safetensors", "runs/vit_classic/a_training.log") and sent.bytes == 300_016
    assert hub.repo(NAME).private
    brought = download("runs", tmp_path / "back", to_hub)
    assert set(brought.moved) == set(sent.moved)
    assert contents(tmp_path / "back") == {name: content for name, content in contents(folder).items() if not name.startswith(".")}


def test_files_travel_over_http(hub: HubServer, to_hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Xet, which the stand-in does not have, would be taken first.
    monkeypatch.delenv("HF_HUB_DISABLE_XET", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    upload(folder, "", to_hub)
    assert hub.asked("POST", "lfs/objects/batch") and not hub.asked("*", "xet")
    download(".", tmp_path / "back", to_hub)
    assert contents(tmp_path / "back")["vit_classic/a.safetensors"] == contents(folder)["vit_classic/a.safetensors"]


def test_a_file_goes_and_comes_back(to_hub: Hub, folder: Path, tmp_path: Path) -> None:
    upload(folder / "vit_classic/a_training.log", ".", to_hub)
    download("a_training.log", tmp_path / "back", to_hub)
    assert contents(tmp_path / "back") == {"a_training.log": b"step,loss\n1,2.5\n"}


def test_what_is_there_is_not_moved_again(hub: HubServer, to_hub: Hub, folder: Path, tmp_path: Path) -> None:
    first = upload(folder, "", to_hub)
    commits = len(hub.repo(NAME).history())
    again = upload(folder, "", to_hub)
    assert (again.moved, again.skipped, again.bytes) == ((), tuple(sorted(first.moved)), 0)
    assert len(hub.repo(NAME).history()) == commits
    download("vit_classic", tmp_path / "back", to_hub)
    asked = len(hub.asked("GET", "resolve"))
    assert len(download("vit_classic", tmp_path / "back", to_hub).skipped) == 2
    assert len(hub.asked("GET", "resolve")) == asked


def test_something_different_there_is_not_overwritten(hub: HubServer, to_hub: Hub, folder: Path) -> None:
    upload(folder, "", to_hub)
    before = hub.repo(NAME).files()
    (folder / "vit_classic/a_training.log").write_text("other")
    (folder / "vit_classic/new.log").write_text("new")
    with pytest.raises(UserError, match=r"vit_classic/a_training\.log on user/study is different") as refused:
        upload(folder, "", to_hub)
    assert "--force" in refused.value.hint and hub.repo(NAME).files() == before
    assert set(upload(folder, "", to_hub, force=True).moved) == {"vit_classic/a_training.log", "vit_classic/new.log"}
    assert hub.repo(NAME).files()["vit_classic/a_training.log"] == b"other"


def test_something_different_here_is_not_overwritten(to_hub: Hub, folder: Path, tmp_path: Path) -> None:
    upload(folder, "", to_hub)
    back = tmp_path / "back"
    (back / "vit_classic").mkdir(parents=True)
    (back / "vit_classic/a_training.log").write_text("mine")
    with pytest.raises(UserError, match="is different here"):
        download("vit_classic", back / "vit_classic", to_hub)
    assert contents(back) == {"vit_classic/a_training.log": b"mine"}
    download("vit_classic", back / "vit_classic", to_hub, force=True)
    assert contents(back)["vit_classic/a_training.log"] == b"step,loss\n1,2.5\n"


@pytest.mark.parametrize(
    "fault",
    [
        {"method": "*", "path": "api|git", "status": 503, "times": 2},
        {"method": "POST", "path": "commit", "status": 500, "times": 2},
        {"method": "POST", "path": "commit", "status": 429, "times": 1, "headers": {"Retry-After": "0"}},
        {"method": "POST", "path": "commit", "lose": True, "times": 1},
        {"method": "POST", "path": "commit", "cut_request": 10, "times": 1},
        {"method": "POST", "path": "preupload", "status": 429, "times": 1, "headers": {"Retry-After": "0"}},
        {"method": "POST", "path": "objects/batch", "lose": True, "times": 1},
        {"method": "POST", "path": "verify", "cut": 0, "times": 1},
        {"method": "PUT", "path": ".", "cut_request": 100_000, "times": 1},
        {"method": "PUT", "path": ".", "cut_request": 100_000, "times": 1, "reset": True},
        {"method": "PUT", "path": ".", "status": 502, "times": 1},
    ],
    ids=str,
)
def test_an_upload_gets_through_faults(hub: HubServer, to_hub: Hub, folder: Path, fault: dict) -> None:
    added = hub.faults.add(fault.pop("method"), fault.pop("path"), **fault)
    upload(folder, "", to_hub)
    assert added.hits
    files = hub.repo(NAME).files()
    assert all(files[name] == content for name, content in contents(folder).items() if not name.startswith("."))


@pytest.mark.parametrize("fault", [{"cut": 100_000}, {"status": 503}, {"corrupt": 1000}, {"cut": 100_000, "reset": True}])
def test_a_download_gets_through_faults(hub: HubServer, to_hub: Hub, folder: Path, tmp_path: Path, fault: dict) -> None:
    upload(folder, "", to_hub)
    added = hub.faults.add("GET", r"safetensors|[0-9a-f]{64}", times=1, **fault)
    download("vit_classic", tmp_path / "back", to_hub)
    assert added.hits == 1
    assert contents(tmp_path / "back") == contents(folder / "vit_classic")


def test_a_download_that_gave_up_is_carried_on(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    impatient = Hub(Account(NAME, "hf_write"), pauses=())
    upload(folder, "", impatient)
    hub.faults.add("GET", r"[0-9a-f]{64}|a\.safetensors", cut=100_000)
    with pytest.raises(StorageError):
        download("vit_classic", tmp_path / "back", impatient)
    hub.faults.clear()
    assert "a.safetensors" not in contents(tmp_path / "back")
    download("vit_classic", tmp_path / "back", impatient)
    assert contents(tmp_path / "back") == contents(folder / "vit_classic")


def test_a_hub_that_stays_silent_is_told_of(hub: HubServer, to_hub: Hub, folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    patient = Hub(Account(NAME, "hf_write"), pauses=(0.01, 0.02), on_retry=said.append)
    hub.stop()
    with pytest.raises(StorageError, match="does not answer") as silent:
        upload(folder, "", patient)
    assert len(said) == 2 and "trying again" in said[0] and silent.value.exit_code == 1
    hub.start()
    upload(folder, "", patient)


@pytest.mark.parametrize(("token", "sentence"), [("hf_nonsense", "does not let us in"), (None, "."), ("hf_read", "may not")])
def test_tokens_that_do_not_suffice(hub: HubServer, to_hub: Hub, folder: Path, token: str | None, sentence: str) -> None:
    upload(folder, "", to_hub)
    (folder / "new").write_text("new")
    with pytest.raises(HubRefusesError, match=sentence) as refused:
        upload(folder, "", Hub(Account(NAME, token), pauses=()))
    assert refused.value.exit_code == 2 and "HF_TOKEN" in refused.value.hint
    assert "new" not in hub.repo(NAME).files()


def test_the_token_is_in_no_message(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "hf_write"
    account = Account(NAME, secret)
    assert secret not in repr(account)
    said: list[str] = []
    hub.faults.add("*", ".", status=500, headers={"X-Error-Message": f"you sent {secret}"})
    with pytest.raises(StorageError) as failed:
        upload(folder, "", Hub(account, pauses=(0.0,), on_retry=said.append))
    assert said and all(secret not in text for text in [*said, str(failed.value)])
    assert "***" in said[0]
    assert failed.value.__cause__ is None and failed.value.__suppress_context__


@pytest.mark.parametrize("name", ["../../evil", "/etc/evil", "a/../../evil", "a//b", "C:\\evil", "a\x00b", "", "a\nb", "x" * 2000])
def test_names_that_lead_elsewhere(name: str) -> None:
    assert not is_safe_name(name)


LISTED = "runs/vit_classic/a_training.log"


@pytest.mark.parametrize(
    ("name", "lie"),
    [
        ("runs/../../evil", {"content": b"evil"}),
        ("/tmp/evil", {"content": b"evil"}),
        ("runs/vit_classic/../../../evil", {"content": b"evil"}),
        ("runs/C:\\evil", {"content": b"evil"}),
        (LISTED, {"size": 2**60}),
        (LISTED, {"size": -1}),
        (LISTED, {"oid": "nonsense"}),
    ],
    ids=str,
)
def test_a_hostile_listing_writes_nothing(hub: HubServer, to_hub: Hub, folder: Path, tmp_path: Path, name: str, lie: dict) -> None:
    upload(folder, "runs", to_hub)
    hub.repo(NAME).lie(name, **lie)
    before = contents(tmp_path)
    with pytest.raises(StorageError, match="cannot be"):
        download("", tmp_path / "back", to_hub)
    assert contents(tmp_path) == before


def test_a_hash_that_lies_is_found_out(hub: HubServer, to_hub: Hub, folder: Path, tmp_path: Path) -> None:
    upload(folder, "runs", to_hub)
    hub.repo(NAME).lie(LISTED, oid="0" * 40)
    with pytest.raises(StorageError, match="came damaged"):
        download(LISTED, tmp_path / "back", to_hub)
    assert "a_training.log" not in contents(tmp_path / "back")


def test_a_file_larger_than_the_disk_is_not_begun(hub: HubServer, to_hub: Hub, folder: Path, tmp_path: Path) -> None:
    upload(folder, "runs", to_hub)
    hub.repo(NAME).lie(LISTED, size=2**49)
    with pytest.raises(UserError, match="left") as full:
        download("runs", tmp_path / "back", to_hub)
    assert "make room" in full.value.hint and not hub.asked("GET", "resolve")


def test_what_is_missing(to_hub: Hub, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no repository user/study"):
        download("runs", tmp_path / "back", to_hub)
    with pytest.raises(UserError, match="no file or folder"):
        upload(folder / "nowhere", "", to_hub)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no files"):
        upload(tmp_path / "empty", "", to_hub)
    upload(folder, "runs", to_hub)
    with pytest.raises(UserError, match="has no other") as missing:
        download("other", tmp_path / "back", to_hub)
    assert "runs" in missing.value.hint and not (tmp_path / "back").exists()
    with pytest.raises(UserError, match="not a path"):
        download("../x", tmp_path / "back", to_hub)


@pytest.mark.parametrize(
    "text",
    [
        "user/repo", " user/repo ", "https://huggingface.co/user/repo", "huggingface.co/user/repo/", "https://hf.co/user/repo",
        "https://huggingface.co/user/repo/tree/main", "huggingface.co/user/repo/tree/main/folder", "https://huggingface.co/user/repo.git",
        "https://huggingface.co/user/repo.git/", "https://user@huggingface.co/user/repo", "git@hf.co:user/repo.git", "git@hf.co:user/repo",
        "ssh://git@hf.co/user/repo", "ssh://git@hf.co:22/user/repo.git", "hf://user/repo", "hf://user/repo/", "HTTPS://HuggingFace.co/user/repo",
        "https://www.huggingface.co/user/repo?library=x#files", "https://mirror.example:8443/hub/user/repo.git", "mirror.example:8443/hub/user/repo",
    ],
)  # fmt: skip
def test_repositories_that_are_understood(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example:8443/hub/")
    assert parse_repository(text) == "user/repo"


@pytest.mark.parametrize(
    "text",
    [
        "", "repo", "a/b/c", "https://huggingface.co/datasets/user/repo", "../repo", "user/..", "user/re po", "http://elsewhere/user/repo",
        "git@elsewhere:user/repo", "git@user/repo", "ftp://user/repo", "hf://user", "https://huggingface.co/user", "user/.git",
    ],
)  # fmt: skip
def test_repositories_that_are_not(text: str) -> None:
    with pytest.raises(UserError, match="not a model repository"):
        parse_repository(text)


@pytest.mark.parametrize(("text", "kind"), [
    ("https://huggingface.co/datasets/user/x", "is a data set"), ("datasets/user/x", "is a data set"), ("hf://datasets/user/x", "is a data set"),
    ("git@hf.co:datasets/user/x.git", "is a data set"), ("https://hf.co/spaces/user/x", "is a space"),
    ("https://huggingface.co/user/x/tree/dev", "is not the branch main"),
])  # fmt: skip
def test_links_to_something_else_are_told_apart(text: str, kind: str) -> None:
    with pytest.raises(UserError, match=kind):
        parse_repository(text)


@pytest.mark.parametrize(
    "address", ["https://user:{}@huggingface.co/user/repo", "https://{}@hf.co/user/repo.git", "user:{}@hf.co/user/repo"]
)
def test_a_repository_with_a_token_in_its_address_is_refused_without_showing_it(cli, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    monkeypatch.setenv("HF_REPOSITORY", address.format("hf_other"))
    for arguments in (("upload", ".", "."), ("study", "--upload", "true")):
        refused = cli(*arguments)
        assert refused.code == 2 and "hf_other" not in refused.err + refused.out
        assert "password or token" in refused.err and "HF_TOKEN" in refused.err and "revoked" in refused.err


@pytest.mark.parametrize("token", ["hf_other", "ABCDEFGHIJKLMNOP"])
def test_swapped_settings_are_told_without_showing_them(cli, monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    monkeypatch.setenv("HF_TOKEN", "user/repo")
    monkeypatch.setenv("HF_REPOSITORY", token)
    refused = cli("upload", ".", ".")
    assert (
        refused.code == 2
        and "HF_REPOSITORY and HF_TOKEN are swapped" in refused.err
        and token not in refused.err
        and "user/repo" not in refused.err
    )


def test_the_environment_wins_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="HF_TOKEN and HF_REPOSITORY") as missing:
        find_account()
    assert ".env" in missing.value.hint
    Path(".env").write_text("HF_TOKEN=hf_file$HOME\nHF_REPOSITORY=https://huggingface.co/user/file\n")
    assert find_account() == Account("user/file", "hf_file$HOME")
    monkeypatch.setenv("HF_REPOSITORY", "user/environment")
    monkeypatch.setenv("HF_TOKEN", "")
    assert find_account() == Account("user/environment", "hf_file$HOME")
    monkeypatch.setenv("HF_TOKEN", "two words")
    with pytest.raises(UserError, match="not a token") as bad:
        find_account()
    assert "two words" not in str(bad.value)
    monkeypatch.setenv("HF_TOKEN", "hf_first\nsecond")
    with pytest.raises(UserError, match="not a token") as bad:
        find_token()
    assert "first" not in str(bad.value) and "second" not in str(bad.value)


def test_the_commands(hub: HubServer, cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_REPOSITORY", NAME)
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    sent = cli("upload", str(folder), "runs")
    assert sent.code == 0 and "sent 2 files, 300,016 bytes, to user/study; 0 already there" in sent.out
    assert "0 files" in cli("upload", str(folder), "runs").out
    brought = cli("download", "runs", "back")
    assert brought.code == 0 and "fetched 2 files" in brought.out and "a.safetensors" in brought.err
    (folder / "vit_classic/a_training.log").write_text("other")
    refused = cli("upload", str(folder), "runs")
    assert refused.code == 2 and "error: runs/vit_classic/a_training.log" in refused.err and "hint: --force" in refused.err
    assert cli("upload", str(folder), "runs", "--force").code == 0
    refused = cli("download", "runs", "back")
    assert refused.code == 2 and "--force" in refused.err
    assert cli("download", "runs", "back", "--force").code == 0
    assert Path("back/vit_classic/a_training.log").read_text() == "other"
    monkeypatch.setenv("HF_TOKEN", "hf_wrong_one")
    refused = cli("upload", str(folder), "runs")
    assert refused.code == 2 and "hf_wrong_one" not in refused.err + refused.out


def test_the_hub_is_not_waited_for_longer_than_that(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may ask for an hour, before which the client's own attempts would wait too."""
    slept: list[float] = []
    monkeypatch.setattr("diffvit.repeat.time", SimpleNamespace(sleep=slept.append))
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=slept.append))
    hub.faults.add("*", "api", status=429, headers={"Retry-After": "3600", "RateLimit": '"api";r=0;t=1800'})
    with pytest.raises(StorageError):
        upload(folder, "", Hub(Account(NAME, "hf_write"), pauses=(1.0, 2.0), longest_pause=10.0))
    assert [pause for pause in slept if pause == 10.0] == [10.0, 10.0] and max(slept) <= 10.0


@pytest.mark.parametrize("silent", [("POST", "commit"), ("GET", "api/models/user/study$"), ("GET", "tree"), ("*", ".")], ids=str)
def test_a_hub_that_never_answers_is_given_up(
    hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch, silent: tuple[str, str]
) -> None:
    monkeypatch.setattr("diffvit.hub.http._SILENCE_ASKING", 0.3)
    monkeypatch.setattr("diffvit.hub.http._SILENCE_SENDING", 0.3)
    hub.create(NAME)
    fault = hub.faults.add(*silent, hang=30.0)
    for _ in range(2):  # a hub that has failed is asked in another way
        with pytest.raises(StorageError, match="does not answer"):
            upload(folder, "", Hub(Account(NAME, "hf_write"), pauses=()))
    assert fault.hits
    hub.faults.clear()
    upload(folder, "", Hub(Account(NAME, "hf_write"), pauses=()))


def test_waits_stay_bounded_when_the_client_makes_itself_anew(hub: HubServer, to_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.create(NAME)
    to_hub.head()
    huggingface_hub.close_session()  # as the client does after a connection that failed
    monkeypatch.setattr("diffvit.hub.http._SILENCE_ASKING", 0.3)
    hub.faults.add("GET", "api", hang=30.0)
    with pytest.raises(Exception, match="timed out"):
        to_hub.api.repo_info(NAME)


def test_linked_folders_and_files_are_sent(hub: HubServer, to_hub: Hub, folder: Path, tmp_path: Path) -> None:
    big = tmp_path / "big"
    big.mkdir()
    (folder / "vit_classic").rename(big / "vit_classic")
    (folder / "vit_classic").symlink_to("../big/vit_classic")
    (folder / "again").symlink_to(big)  # leaves the folder, and leads to the same files
    (folder / "one.log").symlink_to(big / "vit_classic/a_training.log")
    sent = upload(folder, "runs", to_hub)
    names = {f"{inside}vit_classic/{name}" for inside in ("", "again/") for name in ("a.safetensors", "a_training.log")}
    assert set(sent.moved) == {f"runs/{name}" for name in {*names, "one.log"}} == set(hub.repo(NAME).files()) - {".gitattributes"}
    assert hub.repo(NAME).files()["runs/vit_classic/a.safetensors"] == (big / "vit_classic/a.safetensors").read_bytes()
    upload(folder / "vit_classic", "linked", to_hub)
    assert "linked/a.safetensors" in hub.repo(NAME).files()


def test_what_is_left_out_is_said(hub: HubServer, cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_REPOSITORY", NAME)
    (folder / "vit_classic/.DS_Store").write_text("hidden")
    (folder / "notes/empty").mkdir(parents=True)
    (folder / ".gone").symlink_to("nowhere")
    sent = cli("upload", str(folder), ".")
    assert sent.code == 0 and "sent 2 files" in sent.out
    for name in (".state (hidden)", "vit_classic/.DS_Store (hidden)", "notes/empty (empty)", ".gone (hidden)"):
        assert name in sent.err.partition("not sent: ")[2]
    (folder / ".env").write_text("HF_TOKEN=hf_write\n")
    refused = cli("upload", str(folder / ".env"), ".")
    assert refused.code == 2 and "hidden" in refused.err and ".env" not in hub.repo(NAME).files()


def _socket(path: Path) -> None:
    with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as listening:  # the path to one may have 107 characters at most
        listening.bind(path.name)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda path: path.symlink_to("nowhere"), "is a link to nowhere, which is not there"),
        (lambda path: path.symlink_to(path.name), "is a link that leads in a circle"),
        (lambda path: path.symlink_to("."), "is a link to a folder that it is in itself"),
        (lambda path: path.symlink_to(".."), "is a link to a folder that it is in itself"),
        (os.mkfifo, "is a pipe, a socket or a device"),
        (_socket, "is a pipe, a socket or a device"),
        (lambda path: path.symlink_to("/dev/zero"), "is a pipe, a socket or a device"),
        (lambda path: path.with_name("it\\b").write_text("x"), "not every system can keep"),
        (lambda path: path.with_name("it\udcff").write_text("x"), "not every system can keep"),
        (lambda path: path.with_name("it.").mkdir(), "not every system can keep"),
    ],
)  # fmt: skip
def test_what_cannot_be_sent_is_refused_by_name_and_nothing_is_sent(
    hub: HubServer, to_hub: Hub, folder: Path, make: Callable[[Path], object], sentence: str
) -> None:
    make(folder / "vit_classic/it")
    with pytest.raises(UserError, match=sentence) as refused:
        upload(folder, "", to_hub)
    assert re.search(r"vit_classic/it |'it.* in .*vit_classic ", refused.value.message) and not hub.requests


@pytest.mark.parametrize("call", ["os.listdir", "open"])
def test_a_folder_or_file_that_cannot_be_read_is_refused_by_name(
    to_hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    real = os.listdir if call == "os.listdir" else open

    def denied(path: Any, *more: Any) -> Any:
        if str(path).endswith(("vit_classic", ".safetensors")):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *more)

    monkeypatch.setattr(call if call == "os.listdir" else "builtins.open", denied)
    with pytest.raises(UserError, match=r"vit_classic(/a.safetensors)? cannot be read: Permission denied"):
        upload(folder, "", to_hub)


def test_a_name_too_long_with_its_folder_is_not_sent(to_hub: Hub, folder: Path) -> None:
    with pytest.raises(UserError, match="not every system can keep"):
        upload(folder, "/".join(["d" * 245] * 4), to_hub)


def test_files_come_into_a_folder_on_another_disk(to_hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upload(folder, "runs", to_hub)
    back, big = tmp_path / "back", tmp_path / "big"
    back.mkdir()
    big.mkdir()
    (back / "vit_classic").symlink_to(big)
    rename = os.replace

    def is_big(path: Any) -> bool:
        return Path(path).resolve().is_relative_to(big)

    def replace(source: Any, target: Any) -> None:
        if is_big(source) != is_big(target):
            raise OSError(errno.EXDEV, "Invalid cross-device link", str(source))
        rename(source, target)

    monkeypatch.setattr("diffvit.utils.os.replace", replace)
    monkeypatch.setattr("diffvit.utils.shutil.disk_usage", lambda path: SimpleNamespace(free=10**9 if is_big(path) else 0))
    download("runs", back, to_hub)
    assert contents(big) == contents(folder / "vit_classic")


def test_what_is_in_the_way(to_hub: Hub, folder: Path, tmp_path: Path) -> None:
    upload(folder, "", to_hub)
    (tmp_path / "one").mkdir()
    (tmp_path / "one/vit_classic").write_text("a file")
    (tmp_path / "two/vit_classic/a.safetensors").mkdir(parents=True)
    (tmp_path / "three").mkdir()
    (tmp_path / "three/vit_classic").symlink_to("nowhere")
    for back in (tmp_path / name for name in ("one", "two", "three")):
        before = contents(back)
        with pytest.raises(UserError, match="in the way"):
            download("", back, to_hub, force=True)
        assert contents(back) == before


def test_a_disk_that_is_full_is_no_fault_of_the_hub(to_hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upload(folder, "", to_hub)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("diffvit.utils.os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        download("", tmp_path / "back", to_hub)
