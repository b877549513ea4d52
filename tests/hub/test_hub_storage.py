"""A repository on the hub as a storage: objects, leases, and what faults cost."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from hub.server import HubServer

from diffvit.errors import StorageError, UserError
from diffvit.keeping.hub import STATE_BRANCH, HubStorage
from diffvit.keeping.lease import Lease, lease_state, take_lease
from diffvit.keeping.storage import Storage, open_storage

NAME = "user/study"
URL = f"hf://{NAME}"


@pytest.fixture
def storage(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> Storage:
    monkeypatch.setattr("diffvit.keeping.hub._PAUSES", (0.01, 0.01))
    opened = open_storage(URL)
    opened.check()
    return opened


def test_objects(storage: Storage, tmp_path: Path) -> None:
    large = tmp_path / "large.state"
    large.write_bytes(bytes(range(256)) * 1000)
    storage.put("vit_classic/a.log", b"one")
    storage.put(".state/run/000000010.state", large)
    storage.put(".state/run/000000010.log", large, 100)
    assert storage.read("vit_classic/a.log") == b"one" and storage.read("vit_classic/b.log") is None
    assert storage.has("vit_classic/a.log") and not storage.has("vit_classic/a") and not storage.has("nowhere/a")
    assert storage.names(".state/run", ".state") == [".state/run/000000010.state"] and storage.names("nowhere") == []
    assert storage.get(".state/run/000000010.log", tmp_path / "log") and (tmp_path / "log").read_bytes() == large.read_bytes()[:100]
    assert storage.get(".state/run/000000010.state", tmp_path / "back") and (tmp_path / "back").read_bytes() == large.read_bytes()
    assert not storage.get("nowhere/a", tmp_path / "none") and not (tmp_path / "none").exists()
    assert storage.ls(".state") == ["run"]
    storage.remove(".state/run/000000010.state")
    storage.remove(".state/run/000000010.state")
    assert storage.names(".state/run") == [".state/run/000000010.log"]
    storage.remove_all()
    assert storage.ls(".state") == [] and storage.read("vit_classic/a.log") is None


def test_what_is_under_way_is_kept_apart(hub: HubServer, storage: Storage) -> None:
    storage.put("vit_classic/a.log", b"one")
    commits = len(hub.repo(NAME).history())
    for number in range(3):
        storage.put(".state/run/000000001.log", str(number).encode())
    assert len(hub.repo(NAME).history()) == commits
    assert not any(name.startswith(".state") for name in hub.repo(NAME).files())
    storage.tidy()
    assert len(hub.repo(NAME).history(STATE_BRANCH)) > 3  # something is under way
    storage.remove(".state/run/000000001.log")
    storage.tidy()
    assert len(hub.repo(NAME).history(STATE_BRANCH)) == 1


def test_a_state_and_its_log_are_one_commit(hub: HubServer, storage: Storage, tmp_path: Path) -> None:
    storage.put(".state/run/000000001.state", b"old")
    commits = len(hub.repo(NAME).history(STATE_BRANCH))
    (tmp_path / "log").write_bytes(b"12345")
    storage.commit({".state/run/2.log": (tmp_path / "log", 3), ".state/run/2.state": b"new"}, [".state/run/000000001.state"])
    assert len(hub.repo(NAME).history(STATE_BRANCH)) == commits + 1
    assert storage.names(".state/run") == [".state/run/2.log", ".state/run/2.state"] and storage.read(".state/run/2.log") == b"123"


def test_of_several_who_want_a_lease_at_once_one_gets_it(storage: Storage) -> None:
    won: list[bool] = []
    threads = [
        threading.Thread(target=lambda name=name: won.append(open_storage(URL).create(".state/run/lease/000001", name.encode())))
        for name in ("a", "b", "c", "d")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == [False, False, False, True]
    assert storage.read(".state/run/lease/000001") in (b"a", b"b", b"c", b"d")


def test_leases(storage: Storage) -> None:
    lease = take_lease(storage, "run", "me", 60)
    assert isinstance(lease, Lease) and lease_state(storage, "run") == "live"
    assert "may be taken over" in str(take_lease(storage, "run", "you", 60))
    assert lease.renew()
    lease.expire()
    assert lease_state(storage, "run") == "expired"
    taken = take_lease(storage, "run", "you", 60)
    assert isinstance(taken, Lease) and not lease.renew() and taken.renew()
    taken.release()
    assert lease_state(storage, "run") == "none"


def test_a_folder_in_a_repository(hub: HubServer, storage: Storage) -> None:
    inside = open_storage(f"{URL}/.rehearsal-1")
    inside.put("vit_classic/a.log", b"one")
    inside.put(".state/run/1.log", b"two")
    assert inside.names("vit_classic") == ["vit_classic/a.log"] and storage.names("vit_classic") == []
    inside.remove_all()
    assert not inside.ls(".state") and not inside.names("vit_classic")


def test_a_conflict_is_tried_again(hub: HubServer, storage: Storage) -> None:
    fault = hub.faults.add("POST", "commit", status=412, times=2)
    storage.put("vit_classic/a.log", b"one")
    assert fault.hits == 2 and storage.read("vit_classic/a.log") == b"one"


@pytest.mark.parametrize("status", [500, 502, 503, 504, 429])
def test_faults_that_pass(hub: HubServer, storage: Storage, status: int) -> None:
    hub.faults.add("POST", "commit", status=status, times=1, headers={"Retry-After": "0"})
    storage.put("vit_classic/a.log", b"one")
    assert storage.read("vit_classic/a.log") == b"one"


def test_a_hub_that_fails_is_a_storage_that_fails(hub: HubServer, storage: Storage, tmp_path: Path) -> None:
    hub.stop()
    for action in (
        lambda: storage.put("a", b""), lambda: storage.read("a"), lambda: storage.names("a"), lambda: storage.remove("a"),
        lambda: storage.create("a", b""), lambda: storage.has("a"), storage.check, lambda: take_lease(storage, "run", "me", 60),
    ):  # fmt: skip
        with pytest.raises(StorageError) as failed:
            action()
        assert "hf_write" not in str(failed.value)


def test_a_damaged_object_is_brought_again(hub: HubServer, storage: Storage, tmp_path: Path) -> None:
    storage.put("vit_classic/a.log", b"whole content")
    fault = hub.faults.add("GET", "resolve", corrupt=3, times=1)
    assert storage.read("vit_classic/a.log") == b"whole content" and fault.hits == 1


def test_a_repository_that_is_gone_is_made_again(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = open_storage("hf://user/another")
    assert isinstance(fresh, HubStorage)
    fresh.put(".state/run/1.log", b"one")
    assert fresh.read(".state/run/1.log") == b"one" and hub.repo("user/another").private


@pytest.mark.parametrize("url", ["hf://user", "hf://", "hf://user/name/../../x", "hf://a/b/c//d"])
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(UserError):
        open_storage(url)


def test_a_token_is_needed(hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="HF_TOKEN"):
        open_storage(URL).check()


def test_a_lease_that_is_renewed_while_it_is_read(hub: HubServer, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffvit.keeping.hub._SQUASH_EVERY", 3)  # and its commit forgotten
    lease = take_lease(storage, "run", "me", 60)
    assert isinstance(lease, Lease)
    over, failed = threading.Event(), []

    def read() -> None:
        while not over.is_set():
            try:
                assert lease_state(open_storage(URL), "run") == "live"
            except BaseException as error:
                failed.append(error)
                return

    thread = threading.Thread(target=read)
    thread.start()
    for _ in range(20):
        assert lease.renew()
    over.set()
    thread.join()
    assert not failed


def test_the_history_of_states_is_forgotten_at_times(hub: HubServer, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffvit.keeping.hub._SQUASH_EVERY", 5)
    for number in range(13):
        storage.commit({".state/run/1.state": str(number).encode()})
    assert len(hub.repo(NAME).history(STATE_BRANCH)) <= 5
    assert storage.read(".state/run/1.state") == b"12"


def test_a_state_renews_the_lease_in_the_same_commit(hub: HubServer, storage: Storage) -> None:
    lease = take_lease(storage, "run", "me", 60)
    assert isinstance(lease, Lease)
    before = storage.entries(".state/run/lease")
    commits = len(hub.repo(NAME).history(STATE_BRANCH))
    storage.commit({".state/run/1.state": b"state"}, (), lease.renewal())
    assert len(hub.repo(NAME).history(STATE_BRANCH)) == commits + 1
    assert storage.entries(".state/run/lease") != before and lease.renew()
    storage.commit({}, [".state/run/1.state", *lease.names()])
    assert len(hub.repo(NAME).history(STATE_BRANCH)) == commits + 3 and not storage.ls(".state")
