"""A machine that vanishes with its disk, two machines that want the same run, and a storage that does not answer."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults.processes import assert_same_ledgers, ending, finish, kill_all, run_py, states, study, wait_until, weights
from runs import stop_after
from s3 import Gate

from diffvit.dataset import load
from diffvit.errors import RunIsBusyError, StorageError
from diffvit.keeping.lease import Lease, _lease_content, take_lease
from diffvit.keeping.objects import ObjectStorage
from diffvit.keeping.runs import settle_run
from diffvit.keeping.saving import Every, Saving
from diffvit.keeping.storage import Storage, open_storage
from diffvit.ledger.files import RunFiles
from diffvit.ledger.log import Step
from diffvit.ledger.spec import RunSpec
from diffvit.ledger.verify import verify_run
from diffvit.train import train

SPEC = RunSpec.of("vit_differential", "0.1M", "digits", overrides={"epochs": 3})
# Long enough for a storage to be looked at meanwhile.
LONG = RunSpec.of("vit_differential", "0.1M", "digits", overrides={"epochs": 12})
TRAIN = ("train", "--model", LONG.model, "--size", LONG.size, "--dataset", LONG.dataset, "--epochs", "12", "--device", "cpu")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the undisturbed run."""
    return _undisturbed(tmp_path_factory, SPEC)


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of LONG."""
    return _undisturbed(tmp_path_factory, LONG)


def _undisturbed(paths: pytest.TempPathFactory, spec: RunSpec) -> Path:
    folder = paths.mktemp("whole")
    train(spec, folder / "checkpoints", device="cpu")
    return folder


def _remote_states(storage: Storage) -> list[str]:
    return [name for run in storage.ls(".state") for name in storage.names(f".state/{run}", ".state")]


def test_another_machine_takes_over_from_one_that_vanished_with_its_disk(
    tmp_path: Path, s3: str, long: Path, cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, first, second, third = open_storage(s3), *(tmp_path / name for name in ("first", "second", "third"))
    for folder in (first, second, third):
        folder.mkdir()
    command = (*TRAIN, "--storage", s3, "--save_every", "0.2s", "--sync_every", "0.5s", "--lease", "4s")
    process = run_py(first, *command)
    monkeypatch.chdir(second)
    with ending(process):
        wait_until(lambda: len(_remote_states(storage)) == 2, process)
        busy = cli(*command)
        assert busy.code == 2, busy.err
        assert "another machine trains the run" in busy.err and "may be taken over at" in busy.err
    shutil.rmtree(first)
    time.sleep(5)  # the lease runs out
    outcome = cli(*command)
    assert outcome.code == 0, outcome.err
    assert_same_ledgers(second, long)
    log = next(second.glob("checkpoints/*/*.log"))
    resumed = [line for line in log.read_text().splitlines() if line.startswith("# resumed after step")]
    assert len(resumed) == 1 and int(resumed[0].split()[4].rstrip(";")) > 1
    # The storage has the whole run, and nothing else: a third machine finds it done.
    assert not _remote_states(storage) and not storage._fs.find(f"{storage._root}/.state")
    monkeypatch.chdir(third)
    assert "done already" in cli(*command).err
    assert_same_ledgers(third, long)


def test_a_stopped_run_leaves_its_newest_state_and_no_lease(tmp_path: Path, s3: str, whole: Path) -> None:
    for box, reached in (("one", 40), ("two", 80)):
        stop_after(40, SPEC, tmp_path / box / "checkpoints", saving=Saving(storage=s3))
        assert max(int(Path(name).stem) for name in _remote_states(open_storage(s3))) == reached
    train(SPEC, tmp_path / "three" / "checkpoints", device="cpu", saving=Saving(storage=s3))
    assert_same_ledgers(tmp_path / "three", whole)


def test_a_damaged_state_in_the_storage_is_passed_over(tmp_path: Path, whole: Path) -> None:
    url = str(tmp_path / "storage")
    for _ in range(2):
        stop_after(30, SPEC, tmp_path / "one/checkpoints", saving=Saving(storage=url))
    newest = max((tmp_path / "storage").glob(".state/*/*.state"))
    content = bytearray(newest.read_bytes())
    content[1000] ^= 1
    newest.write_bytes(content)
    warnings: list[str] = []
    train(SPEC, tmp_path / "two/checkpoints", device="cpu", saving=Saving(storage=url), on_warning=warnings.append)
    assert any("damaged" in warning for warning in warnings)
    log = next((tmp_path / "two").glob("checkpoints/*/*.log")).read_text()
    assert "# resumed after step 30;" in log
    assert_same_ledgers(tmp_path / "two", whole)


@pytest.mark.parametrize("damaged", [".state", ".log"])
def test_a_damaged_state_in_the_storage_does_no_harm_to_ours(tmp_path: Path, whole: Path, damaged: str) -> None:
    url = str(tmp_path / "storage")
    stop_after(20, SPEC, tmp_path / "ours/checkpoints")
    stop_after(30, SPEC, tmp_path / "other/checkpoints", saving=Saving(storage=url))  # another box's, with a log of its own
    next((tmp_path / "storage").glob(f".state/*/*{damaged}")).write_bytes(b"damaged")
    log = next((tmp_path / "ours").glob("checkpoints/*/*.log"))
    before = log.read_text()
    train(SPEC, tmp_path / "ours/checkpoints", device="cpu", saving=Saving(storage=url))
    assert log.read_text().startswith(f"{before}# resumed after step 20;")
    assert_same_ledgers(tmp_path / "ours", whole)


def test_who_was_silent_for_too_long_gives_way(tmp_path: Path) -> None:
    url = str(tmp_path / "storage")
    taken: list[Lease] = []

    def on_steps(steps: list[Step], total: int) -> None:
        if not taken:  # another machine, for which this one has been dead for long
            storage = open_storage(url)
            lease = Lease(storage, f".state/{storage.ls('.state')[0]}/lease", 2, "another machine", 60.0)
            assert storage.create(f"{lease.folder}/000002", _lease_content("another machine", 60.0)) and lease.renew()
            taken.append(lease)

    saving = Saving(every=Every(steps=1), storage=url, lease_seconds=0.9)
    with pytest.raises(RunIsBusyError, match="taken over"):
        train(SPEC, tmp_path / "checkpoints", device="cpu", saving=saving, on_steps=on_steps)
    assert taken[0].renew()
    with pytest.raises(RunIsBusyError, match="another machine trains"):
        train(SPEC, tmp_path / "checkpoints", device="cpu", saving=saving)


@pytest.fixture
def gated(s3: str, s3_port: int, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Gate]:
    """A storage behind a gate."""
    gate = Gate(s3_port)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{gate.port}")
    return s3, gate


def test_a_storage_that_falls_silent_costs_no_work(tmp_path: Path, gated: tuple[str, Gate], long: Path, cli) -> None:
    url, gate = gated
    options = ("--storage", url, "--save_every", "0.2s", "--sync_every", "0.3s", "--lease", "3s")
    process = run_py(tmp_path, *TRAIN, *options)
    with ending(process):
        wait_until(lambda: states(tmp_path), process)
        gate.shut()
        errors, heard = "", False
        for line in process.stderr or ():  # until it has noticed, which the client's own attempts may put off beyond the last step
            errors += line
            if "Training continues, and tries again." in line and not heard:
                heard = True
                gate.open()
        assert process.wait(timeout=200) == 0, errors
    assert heard and "failed: " in errors
    assert_same_ledgers(tmp_path, long)
    shutil.move(tmp_path / "checkpoints", tmp_path / "elsewhere")
    assert "done already" in cli(*TRAIN, *options).err


def test_a_run_that_need_not_wait_for_its_storage_joins_it_later(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = str(tmp_path / "storage")
    silent = _fall_silent(monkeypatch)
    with pytest.raises(StorageError, match="not now"):
        train(SPEC, tmp_path / "waits/checkpoints", device="cpu", saving=Saving(storage=url))
    warnings: list[str] = []

    def on_steps(steps: list[Step], total: int) -> None:
        silent.clear()
        if steps[-1].step < total:
            wait_until(lambda: list(Path(url).glob(".state/*/lease/*")))

    saving = Saving(every=Every(steps=1), storage=url, sync_every=0.2, lease_seconds=0.9, needs_storage=False)
    train(SPEC, tmp_path / "goes/checkpoints", device="cpu", saving=saving, on_warning=warnings.append, on_steps=on_steps)
    assert any("is trained without it until it answers" in warning for warning in warnings)
    assert_same_ledgers(tmp_path / "goes", whole)
    assert not _remote_states(open_storage(url)) and not [path for path in Path(url).glob(".state/**/*") if path.is_file()]
    train(SPEC, tmp_path / "third/checkpoints", device="cpu", saving=Saving(storage=url), on_steps=lambda *_: pytest.fail("it was there"))
    assert_same_ledgers(tmp_path / "third", whole)


def _end_elsewhere(whole: Path, other: Path, url: str) -> None:
    """Another machine has trained the run and sent it."""
    shutil.copytree(whole / "checkpoints", other)
    settle_run(open_storage(url), RunFiles.of(other, SPEC, SPEC.run_id(load("digits").fingerprint)))


def _contents(url: str) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path(url).rglob("*") if path.is_file()}


@pytest.mark.parametrize("how", ["trains it", "has ended it"])
def test_who_began_without_the_storage_gives_way(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    url = str(tmp_path / "storage")
    if how == "trains it":
        assert isinstance(take_lease(open_storage(url), SPEC.run_id(load("digits").fingerprint), "another machine", 600.0), Lease)
    else:
        _end_elsewhere(whole, tmp_path / "other", url)
    silent = _fall_silent(monkeypatch)
    before = _contents(url)
    saving = Saving(every=Every(steps=1), storage=url, lease_seconds=0.9, needs_storage=False)
    with pytest.raises(RunIsBusyError):
        train(SPEC, tmp_path / "checkpoints", device="cpu", saving=saving, on_steps=lambda *_: (silent.clear(), time.sleep(0.1)))
    assert _contents(url) == before


def test_a_result_that_could_not_be_looked_at_is_not_replaced(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = str(tmp_path / "storage")
    _end_elsewhere(whole, tmp_path / "other", url)
    before = _contents(url)

    def fail(*_: object) -> None:
        raise StorageError("not now.", "later.")

    monkeypatch.setattr("diffvit.keeping.keeper.fetch_run", fail)  # with the lease in hand
    saving = Saving(every=Every(steps=1), storage=url, lease_seconds=0.9, needs_storage=False)
    with pytest.raises(RunIsBusyError):
        train(SPEC, tmp_path / "checkpoints", device="cpu", saving=saving, on_steps=lambda *_: time.sleep(0.1))
    assert _contents(url) == before


def _fall_silent(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """While the event is set, no storage lists a folder, finds an object or reads its marker."""
    silent = threading.Event()
    silent.set()

    def unless_silent(real: Callable) -> Callable:
        def method(self: Storage, *arguments: str) -> Any:
            if silent.is_set():
                raise StorageError("not now.", "later.")
            return real(self, *arguments)

        return method

    for name in ("ls", "has", "_marker"):
        monkeypatch.setattr(ObjectStorage, name, unless_silent(getattr(ObjectStorage, name)))
    return silent


@pytest.mark.slow
def test_a_run_that_could_not_be_sent_is_sent_by_the_same_study(tmp_path: Path, gated: tuple[str, Gate]) -> None:
    url, gate = gated
    grid = "datasets: [digits]\nmodels: [vit_differential]\nsizes: [small]\noverrides: {epochs: 6}\n"
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    options = ("--storage", url, "--save_every", "0.2s", "--sync_every", "0.3s")
    process = study(first, *options, grid=grid)
    with ending(process):
        wait_until(lambda: states(first), process)
        gate.shut()
        _, errors = process.communicate(timeout=400)
    assert process.returncode == 1 and len(weights(first)) == 1, errors
    assert "could not be reached" in errors and "Traceback" not in errors

    refused = study(first, *options, grid=grid)
    with ending(refused):
        _, errors = refused.communicate(timeout=100)
    assert refused.returncode == 1 and "error: the storage" in errors and "hint: " in errors and "Traceback" not in errors

    gate.open()
    assert "all 1 runs are done already" in finish(study(first, *options, grid=grid))
    assert "all 1 runs are done already" in finish(study(second, *options, grid=grid))
    assert weights(first) == weights(second)


@pytest.mark.slow
def test_a_group_of_workers_need_not_wait_for_its_storage_either(tmp_path: Path) -> None:
    grid = "datasets: [digits]\nmodels: [vit_classic]\nsizes: [small]\noverrides: {epochs: 2}\n"
    run_id = RunSpec.of("vit_classic", "small", "digits", overrides={"epochs": 2}).run_id(load("digits").fingerprint)
    storage = tmp_path / "storage"
    (storage / ".state").mkdir(parents=True)
    (storage / ".state" / run_id).write_text("in the way of a lease")
    process = study(tmp_path, "--workers", "2", "--storage", str(storage), grid=grid)
    with ending(process):
        _, errors = process.communicate(timeout=400)
    assert process.returncode == 1 and "could not be reached" in errors and "Traceback" not in errors, errors
    assert len(list(tmp_path.glob(f"checkpoints/*/*{run_id}*_result.json"))) == 1


@pytest.mark.slow
def test_two_machines_share_a_study_and_one_vanishes(tmp_path: Path, s3: str) -> None:
    grid = "datasets: [digits]\nsizes: [small, medium]\noverrides: {epochs: 4}\n"
    plain, first, second = (tmp_path / name for name in ("plain", "first", "second"))
    for folder in (plain, first, second):
        folder.mkdir()
    finish(study(plain, grid=grid))
    options = ("--storage", s3, "--save_every", "0.3s", "--sync_every", "1s", "--lease", "10s")
    one = study(first, *options, grid=grid)
    with ending(one):
        wait_until(lambda: _remote_states(open_storage(s3)), one)
        two = study(second, *options, grid=grid)
        with ending(two):
            wait_until(lambda: states(second) or weights(second), two)
            kill_all(one)
            shutil.rmtree(first)
            finish(two, seconds=500)
    assert len(weights(second)) == 4
    assert_same_ledgers(second, plain)
    for path in second.glob("checkpoints/*/*_result.json"):
        assert verify_run(path) == []
    assert not open_storage(s3)._fs.find(f"{open_storage(s3)._root}/.state")
