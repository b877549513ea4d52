"""Storages off this machine: objects that are whole or not there, and leases that one machine has at a time."""

from __future__ import annotations

import errno
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from diffvit.errors import StorageError, UserError
from diffvit.keeping.lease import Lease, take_lease
from diffvit.keeping.runs import fetch_run, push_run, settle_run
from diffvit.keeping.saving import Every, Saving
from diffvit.keeping.storage import Storage, open_storage
from diffvit.ledger.files import RunFiles
from diffvit.ledger.spec import RunSpec
from diffvit.ledger.verify import verify_run
from diffvit.train import train


@pytest.fixture(params=["path", "s3", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "s3":
        return open_storage(request.getfixturevalue("s3"))
    return open_storage(f"memory://{tmp_path.name}" if request.param == "memory" else str(tmp_path / "deep/storage"))


def test_an_object_is_whole_or_not_there(storage: Storage, tmp_path: Path) -> None:
    storage.check()
    local, back = tmp_path / "local", tmp_path / "back"
    local.write_bytes(bytes(range(256)) * 100)
    assert storage.read("a/b") is None and not storage.get("a/b", back) and storage.names("a") == []
    storage.put("a/b", local)
    storage.put("a/c.log", local, length=1000)
    assert storage.get("a/b", back) and back.read_bytes() == local.read_bytes()
    assert storage.read("a/c.log") == local.read_bytes()[:1000]
    assert storage.names("a") == ["a/b", "a/c.log"] and storage.names("a", ".log") == ["a/c.log"]
    assert storage.has("a/b") and not storage.has("a/d")

    back.unlink()
    storage.overwrite("a/b", b"what a writer left that died before the marker")
    assert storage.read("a/b") is None and not storage.get("a/b", back) and not back.exists()
    storage.put("a/b", b"again")
    assert storage.read("a/b") == b"again"
    storage.overwrite("a/c.log.ok", b"{")
    assert storage.read("a/c.log") is None and not storage.get("a/c.log", back)
    storage.remove("a/b")
    storage.remove("a/b")  # it may be gone already
    assert storage.read("a/b") is None and not storage.has("a/b")


def test_a_lease_is_held_until_it_runs_out(storage: Storage) -> None:
    first = take_lease(storage, "run", "one", seconds=1.0)
    assert isinstance(first, Lease)
    busy = take_lease(storage, "run", "two", seconds=1.0)
    assert isinstance(busy, str) and "may be taken over at" in busy
    assert isinstance(take_lease(storage, "another run", "two", seconds=1.0), Lease)
    assert first.renew()
    time.sleep(1.2)
    second = take_lease(storage, "run", "two", seconds=60.0)
    assert isinstance(second, Lease)
    assert not first.renew()  # it has been taken over
    first.release()
    assert second.renew()
    own = take_lease(storage, "run", "two", seconds=60.0)  # the same ledger, whose lock the caller holds
    assert isinstance(own, Lease) and not second.renew()
    own.release()
    assert isinstance(take_lease(storage, "run", "three", seconds=60.0), Lease)


def test_who_comes_back_late_neither_renews_nor_gives_back_a_later_lease_of_its_number(storage: Storage) -> None:
    late = take_lease(storage, "run", "late", seconds=0.0)
    assert isinstance(late, Lease)
    second = take_lease(storage, "run", "second", seconds=60.0)
    assert isinstance(second, Lease)
    second.release()
    third = take_lease(storage, "run", "third", seconds=60.0)
    assert isinstance(third, Lease) and third.number == late.number
    assert not late.renew()
    late.release()
    assert third.renew()


@pytest.mark.parametrize("storage", ["path", "s3"], indirect=True)
def test_of_many_who_want_a_lease_one_gets_it(storage: Storage) -> None:
    outcomes = []
    for round_ in range(5):
        barrier = threading.Barrier(8)

        def take(owner: int, round_: int = round_, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            outcomes.append(take_lease(storage, f"run{round_}", f"owner{owner}", seconds=60.0))

        threads = [threading.Thread(target=take, args=(owner,)) for owner in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sum(isinstance(outcome, Lease) for outcome in outcomes) == 5
    assert len(outcomes) == 40


def test_a_lease_that_a_dying_writer_left_half_written_does_not_block(storage: Storage) -> None:
    storage.overwrite(".state/run/lease/000003", b'{"owner": "o')
    lease = take_lease(storage, "run", "two", seconds=60.0)
    assert isinstance(lease, Lease) and lease.number == 4


def test_an_ended_run_travels_whole(storage: Storage, tmp_path: Path) -> None:
    spec = RunSpec.of("vit_classic", "0.1M", "digits", overrides={"max_steps": 2})
    result = train(spec, tmp_path / "a", device="cpu")
    here, there = (RunFiles.of(tmp_path / name, spec, result.run_id) for name in "ab")
    assert not fetch_run(storage, there)
    push_run(storage, here, result)
    storage.remove(f"vit_classic/{here.predictions.name}")
    assert not fetch_run(storage, there) and not there.result.exists()  # not all of it is there
    push_run(storage, here, result)
    assert fetch_run(storage, there)
    assert verify_run(there.result) == []


def test_a_run_that_is_sent_late_leaves_nothing_under_way(storage: Storage, tmp_path: Path) -> None:
    spec = RunSpec.of("vit_classic", "0.1M", "digits", overrides={"max_steps": 2})
    run_id = train(spec, tmp_path / "a", device="cpu").run_id
    here, there = (RunFiles.of(tmp_path / name, spec, run_id) for name in "ab")
    assert isinstance(take_lease(storage, run_id, "a", 600.0), Lease)
    storage.put(f".state/{run_id}/000000001.state", b"half of it")
    settle_run(storage, here)
    settle_run(storage, there)
    assert verify_run(there.result) == []
    assert not storage.ls(f".state/{run_id}/lease") and not storage.names(f".state/{run_id}")


@pytest.mark.parametrize("url", ["gibberish://bucket/x", "gs://bucket/x"])
def test_a_storage_that_is_not_known(url: str) -> None:
    with pytest.raises(UserError, match="cannot be opened"):
        open_storage(url)


def test_a_linked_folder_of_a_storage_is_followed_and_one_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path / "storage"))
    (tmp_path / "storage").mkdir()
    (tmp_path / "big").mkdir()
    (tmp_path / "storage/vit_classic").symlink_to(tmp_path / "big")
    storage.put("vit_classic/a", b"content")
    assert storage.names("vit_classic") == ["vit_classic/a"] and storage.read("vit_classic/a") == b"content"
    (tmp_path / "big").rename(tmp_path / "away")
    for act in (lambda: storage.names("vit_classic"), lambda: storage.put("vit_classic/b", b"content")):
        with pytest.raises(StorageError, match=r"vit_classic is a link to .*big, which is not there"):
            act()


def test_a_storage_that_does_not_let_us_write(s3_port: int, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="s3://no-such-bucket/x failed"):
        open_storage("s3://no-such-bucket/x").check()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="failed"):
        open_storage(str(tmp_path / "file/storage")).check()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", Every(seconds=90)), ("0.5s", Every(seconds=0.5)), ("2m", Every(seconds=120)), ("1h", Every(3600)), ("500steps", Every(steps=500)), ("1 step", Every(steps=1))],
)  # fmt: skip
def test_intervals(text: str, expected: Every) -> None:
    assert Every.parse(text) == expected
    assert Every.parse(str(expected)) == expected


@pytest.mark.parametrize("text", ["", "0", "-1", "0steps", "1.5steps", "10x", "s", "1e9"])
def test_what_is_not_an_interval(text: str) -> None:
    with pytest.raises(UserError, match="not an interval"):
        Every.parse(text)


def test_states_are_saved_by_steps_or_by_seconds() -> None:
    assert [Every(steps=3).over(1e9, step) for step in (2, 3)] == [False, True]
    assert [Every(seconds=3).over(seconds, 10**9) for seconds in (2.9, 3.0)] == [False, True]
    assert Saving().every == Every(seconds=60)


@pytest.mark.parametrize("rehearse", [False, True])
def test_the_storage_is_checked_before_data_are_loaded(cli, monkeypatch: pytest.MonkeyPatch, rehearse: bool) -> None:
    monkeypatch.setattr("study.main.load_fingerprints", lambda *_, **__: pytest.fail("data are loaded"))
    monkeypatch.setattr("study.main.connect_cluster", lambda *_: pytest.fail("Ray is started"))
    outcome = cli("study", "--storage", "/dev/null/there", *(["--rehearse"] if rehearse else []))
    assert outcome.code != 0 and "/dev/null/there" in outcome.err, outcome.err


def test_what_is_overwritten_while_it_is_read_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As s3fs says it of a lease that is renewed between the opening and the reading."""
    storage = open_storage(str(tmp_path / "storage"))
    storage.check()
    storage.overwrite("lease/000001", b"renewed")
    opened, faults = storage._fs.open, [errno.EBUSY, errno.EBUSY]

    def busy(*arguments: Any) -> Any:
        if faults:
            raise OSError(faults.pop(), "the file no longer exists")
        return opened(*arguments)

    monkeypatch.setattr(storage._fs, "open", busy)
    assert storage.entries("lease") == {"000001": b"renewed"} and not faults
    faults += [errno.EBUSY] * 3
    with pytest.raises(StorageError, match="no longer exists"):
        storage.entries("lease")
