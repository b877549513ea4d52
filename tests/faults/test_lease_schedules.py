"""Drawn schedules of machines that want one run: crashes, lost answers, pauses, partitions and wrong clocks at every storage operation.

A schedule is drawn from its number: no threads, no sleeping, the same every time. Machines run the real keeper, lease, transfer and
storage code; time, the local states and the file system below the storage are stand-ins. While one machine pauses within an operation,
others act. SCHEDULES=50000 in the environment draws so many.

A storage without conditional writes leaves one gap: a machine that is suspended between its look at the lease and the write that
follows, until another has taken the run over and ended it. Schedules pause there only for one short action of another machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import random
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from diffvit.errors import RunIsBusyError, StorageError
from diffvit.keeping import keeper as keeper_module
from diffvit.keeping.base import MARKER
from diffvit.keeping.keeper import RunKeeper
from diffvit.keeping.runs import fetch_run, settle_run
from diffvit.keeping.saving import Saving
from diffvit.keeping.storage import open_storage
from diffvit.ledger.files import RunFiles
from diffvit.ledger.log import LogPosition
from diffvit.ledger.results import Result, write_result
from diffvit.ledger.spec import RunSpec
from diffvit.train import train

SCHEDULES = int(os.environ.get("SCHEDULES", "200"))
LEASE = 10.0
STEPS = 4
ACTIONS = 24
SPEC = RunSpec.of("vit_classic", "0.1M", "digits", overrides={"max_steps": 1})


class Crash(BaseException):
    """The machine's process dies here."""


class Broken(BaseException):
    """What must hold does not; no handler of errors may take it for one of the storage's."""


def must(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Broken(otherwise)


class Machine:
    """A box with a clock and a folder; `keeper` is there while a process trains the run."""

    def __init__(self, world: World, name: str, skew: float):
        self.world, self.name, self.skew = world, name, skew
        self.keeper: RunKeeper | None = None
        self.step = self.generation = self.operations = 0
        self.fault: tuple[int, str] | None = None
        self.cut_off = self.acting = self.joining = self.holds = self.paused = self.unfenced = False
        self.storage = open_storage(world.url)
        self.storage._fs = FaultyFiles(self.storage._fs, self)

        self.files = self._files()

    def _files(self) -> RunFiles:
        return RunFiles.of(self.world.folder / f"{self.name}{self.generation}", SPEC, self.world.run_id)

    def die(self, with_its_disk: bool = False) -> None:
        self.keeper = None
        self.generation += with_its_disk
        self.files = self._files()

    # What a process does

    def enter(self) -> None:
        keeper = RunKeeper(self.files, Saving(storage="sim", lease_seconds=LEASE, needs_storage=self.world.draw.random() < 0.7))
        self.joining = True
        with contextlib.suppress(RunIsBusyError, StorageError):
            keeper.__enter__()
            if keeper.result is None:
                state = keeper.load_state(lambda state: True)
                self.step = state["step"] if state else 0
                self.files.folder.mkdir(parents=True, exist_ok=True)
                log = self.files.log.read_bytes()[: state["log"][0]] if state else b""
                self.files.log.write_bytes(log)
                self.keeper = keeper
            else:
                keeper.__exit__(None, None, None)

    def train(self) -> None:
        assert self.keeper
        self.world.now += 0.2 * LEASE
        if self.keeper.lost:
            self.leave()
        elif self.step < STEPS:
            self.step += 1
            with open(self.files.log, "ab") as file:
                file.write(f"{self.name}{self.generation} {self.step}\n".encode())
            content = self.files.log.read_bytes()
            log = SimpleNamespace(position=lambda: LogPosition(len(content), hashlib.sha256(content).hexdigest()))
            self.keeper.save({"step": self.step}, log)  # type: ignore[arg-type]

    def renew(self) -> None:
        assert self.keeper and self.keeper._uploader
        self.keeper._uploader._try(self.keeper._uploader._renew)

    def send(self) -> None:
        assert self.keeper and self.keeper._uploader
        self.keeper._uploader._try(self.keeper._uploader._send)

    def finish(self) -> None:
        assert self.keeper
        if self.step == STEPS and not self.keeper.lost:
            files = self.files
            for path in (files.weights, files.predictions):
                path.write_bytes(
                    f"{path.suffix} of {self.name}{self.generation} {uuid.UUID(int=self.world.draw.getrandbits(128))}".encode()
                )
            digests = {path.name: _sha256(path.read_bytes()) for path in (files.weights, files.log, files.predictions)}
            result = dataclasses.replace(self.world.template, sha256=digests, finished=str(self.world.now))
            write_result(files, result)
            self.keeper.finish(result)
            self.leave()

    def leave(self) -> None:
        assert self.keeper
        keeper, self.keeper = self.keeper, None
        keeper.__exit__(None, None, None)

    def settle(self) -> None:
        """What the next command does with a run that is finished here."""
        self.unfenced = True
        with contextlib.suppress(StorageError):
            settle_run(self.storage, self.files)

    def able(self) -> list[Callable[[], None]]:
        if self.keeper is None:
            ended = self.files.result.is_file()
            return [self.settle] if ended else [self.enter]
        work = [self.finish] * 3 if self.step == STEPS else [self.train] * 3
        return [*work, self.renew, self.renew, self.send, self.send, self.leave]

    def act(self, action: Callable[[], None]) -> None:
        """Do it, with a fault at one of its storage operations or none."""
        draw = self.world.draw
        self.acting, self.operations, self.holds, self.paused = True, 0, False, False
        kinds = ["crash before", "crash after", "fails", "answer lost", "pause before", "pause after"]
        self.fault = (draw.randint(1, draw.choice((4, 16))), draw.choice(kinds)) if draw.random() < 0.5 else None
        self.world.history.append(f"{self.world.now:7.1f} {self.name}{self.generation} {action.__name__} {self.fault or ''}")
        try:
            with self.world.at(self):
                action()
        except Crash:
            self.die()
        finally:
            self.acting = self.joining = self.unfenced = False

    def operate(self, path: str, action: Callable[[], Any], writes: bool) -> Any:
        """One storage operation: a point at which everything can go wrong."""
        self.operations += 1
        kind = self.fault[1] if self.fault and self.fault[0] == self.operations else ""
        if kind == "pause before":
            self.pause(before_look=path.endswith("/lease"))
        if kind == "crash before":
            raise Crash
        if self.cut_off or kind == "fails":
            raise OSError("the storage is away")
        if writes:
            # Once the run's result is in the storage its states are nobody's, and whoever sent it removes them.
            is_left_over = self.world.result is not None and "/.state/" in path and "/lease/" not in path
            allowed = self.holds or self.joining or self.unfenced or self.world.is_over(path) or is_left_over
            must(allowed, f"{self.name} writes {path} without the lease")
        found = action()
        if path.endswith("/lease"):
            self.holds = self.world.holder() == self.owner()
            self.paused = False
        if writes:
            self.world.check()
        if kind == "crash after":
            raise Crash
        if kind == "answer lost":
            raise OSError("the answer is lost")
        if kind == "pause after":
            self.pause(before_look=False)
        return found

    def owner(self) -> str:
        path = self.files.checkpoints / ".state/folder"
        return path.read_text() if path.is_file() else "?"

    def pause(self, before_look: bool) -> None:
        if self.world.short:
            return
        if before_look or (self.joining and self.keeper is None):
            self.world.others_act(self.world.draw.randint(1, 12))
        elif not self.paused:
            self.paused = self.world.short = True
            self.world.others_act(1)
            self.world.short = False


class FaultyFiles:
    """What a storage asks of its file system, each as one operation of a machine."""

    def __init__(self, files: Any, machine: Machine):
        self.files, self.machine = files, machine

    def open(self, path: str, mode: str) -> Any:
        if mode == "rb":
            return io.BytesIO(self.machine.operate(path, lambda: self.files.cat_file(path), writes=False))
        return self._written(path, mode)

    @contextlib.contextmanager
    def _written(self, path: str, mode: str) -> Iterator[io.BytesIO]:
        content = io.BytesIO()
        yield content

        def write() -> None:
            with self.files.open(path, mode) as file:
                file.write(content.getvalue())

        self.machine.operate(path, write, writes=mode == "wb")

    def ls(self, path: str, detail: bool) -> list[str]:
        return self.machine.operate(path, lambda: self.files.ls(path, detail=detail), writes=False)

    def exists(self, path: str) -> bool:
        return self.machine.operate(path, lambda: self.files.exists(path), writes=False)

    def cat_file(self, path: str) -> bytes:
        return self.machine.operate(path, lambda: self.files.cat_file(path), writes=False)

    def rm_file(self, path: str) -> None:
        self.machine.operate(path, lambda: self.files.rm_file(path), writes=True)

    def pipe_file(self, path: str, content: bytes) -> None:
        self.machine.operate(path, lambda: self.files.pipe_file(path, content), writes=True)


class World:
    """All machines, the storage they share, and the time."""

    def __init__(self, url: str, folder: Path, template: Result, number: int):
        self.url, self.folder, self.template, self.run_id = url, folder, template, template.run_id
        self.draw = random.Random(number)
        self.now = 1e9
        self.short = False
        self.history: list[str] = []
        self.result: bytes | None = None
        self.storage = open_storage(url)
        self.current: Machine | None = None
        skews = (0.0, 0.0, 0.0, 0.4, -0.4, 5.0, -5.0, 100.0, -100.0)
        self.machines = [Machine(self, name, self.draw.choice(skews)) for name in "abc"]

    @contextlib.contextmanager
    def at(self, machine: Machine) -> Iterator[None]:
        before, self.current = self.current, machine
        try:
            yield
        finally:
            self.current = before

    def clock(self) -> float:
        return self.now + (self.current.skew if self.current else 0.0)

    def sleep(self, seconds: float) -> None:
        """A pause between two attempts: all may happen meanwhile."""
        self.now += seconds
        if not self.short and self.draw.random() < 0.5:
            self.others_act(self.draw.randint(1, 6))

    def others_act(self, times: int) -> None:
        """Let machines act that do not act already."""
        for _ in range(times):
            free = [machine for machine in self.machines if not machine.acting]
            if not free:
                return
            self.now += self.draw.choice((0.1, 1.0)) if self.short else self.draw.choice((0.1, 1.0, LEASE / 3, 2 * LEASE))
            machine = self.draw.choice(free)
            event = self.draw.random()
            if event < 0.04:
                machine.die(with_its_disk=self.draw.random() < 0.5)
            elif event < 0.08:
                machine.cut_off = not machine.cut_off
            else:
                able = [action for action in machine.able() if not self.short or action.__name__ not in ("finish", "settle")]
                if able:
                    machine.act(self.draw.choice(able))

    def holder(self) -> str:
        """The owner of the highest lease."""
        path = self.storage._path(f".state/{self.run_id}/lease")
        with contextlib.suppress(FileNotFoundError):
            names = self.storage._fs.ls(path, detail=False)
            return json.loads(self.storage._fs.cat_file(max(names)))["owner"] if names else ""
        return ""

    def is_over(self, path: str) -> bool:
        """Whether a path is of a lease that a higher one has taken the place of, or that is gone."""
        folder, _, name = path.removesuffix(MARKER).rpartition("/")
        with contextlib.suppress(FileNotFoundError):
            return folder.endswith("/lease") and f"{folder}/{name}".lstrip("/") < max(self.storage._fs.ls(folder, detail=False)).lstrip("/")
        return folder.endswith("/lease")

    def check(self) -> None:
        """A result that was there once is there for ever, and is the same, with its own files."""
        stem = f"{SPEC.model}/{self.machines[0].files.stem}"
        result = self._whole(f"{stem}_result.json")
        must(self.result is None or result is not None, "a finished run is lost")
        if result is None:
            return
        must(self.result in (None, result), "a run has two results")
        self.result = result
        for name, digest in json.loads(result)["sha256"].items():
            content = self._whole(f"{SPEC.model}/{name}")
            must(content is not None and _sha256(content) == digest, f"{name} is not the result's")

    def _whole(self, name: str) -> bytes | None:
        files = self.storage._fs
        try:
            content, marker = (files.cat_file(self.storage._path(each)) for each in (name, name + MARKER))
        except FileNotFoundError:
            return None
        return content if json.loads(marker)["sha256"] == _sha256(content) else None

    def end(self) -> None:
        """All machines die. After a time one comes that has no faults: it finds the run, or trains it to its end."""
        for machine in self.machines:
            machine.die()
        self.now += 1000.0
        last, reader = Machine(self, "last", 0.0), Machine(self, "reader", 0.0)
        with self.at(last):
            last.enter()
            while last.keeper:
                last.train()
                last.finish()
        assert self.result is not None, "the run could not be taken over"
        reader.joining = True
        assert fetch_run(reader.storage, reader.files) and reader.files.result.read_bytes() == self.result
        last.settle()
        left = self.storage._fs.find(self.storage._path(".state"))
        assert not left, f"left under way: {left}"


class LocalStates:
    """The states on a machine's disk, without torch. The lock is free: a machine has one process at a time."""

    def __init__(self, checkpoints: Path, run_id: str, on_warning: Callable[[str], None] | None = None):
        self.path = checkpoints / ".state" / run_id
        self.path.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def lock(self) -> Iterator[bool]:
        yield True

    def file(self, step: int) -> Path:
        return self.path / f"{step:09d}.state"

    def save(self, step: int, content: dict[str, Any]) -> Path:
        self.file(step).write_text(json.dumps(content))
        return self.file(step)

    def load(self, usable: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
        states = (json.loads(path.read_text()) for path in sorted(self.path.glob("*.state"), reverse=True))
        return next((state for state in states if usable(state)), None)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A real run's result."""
    return train(SPEC, tmp_path_factory.mktemp("real"), device="cpu")


@pytest.fixture
def play(template: Result, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """Plays the schedule of a number at a URL."""
    worlds: list[World] = []
    clock = SimpleNamespace(
        time=lambda: worlds[-1].clock(), monotonic=lambda: worlds[-1].now, sleep=lambda seconds: worlds[-1].sleep(seconds),
        strftime=time.strftime, gmtime=time.gmtime,
    )  # fmt: skip
    for module in ("keeping.keeper", "keeping.lease", "keeping.objects", "repeat"):
        monkeypatch.setattr(f"diffvit.{module}.time", clock)
    monkeypatch.setattr(keeper_module, "StateFolder", LocalStates)
    monkeypatch.setattr(keeper_module, "open_storage", lambda url: worlds[-1].current.storage)
    monkeypatch.setattr(keeper_module.StateUploader, "start", lambda self: None)
    monkeypatch.setattr(keeper_module.StateUploader, "join", lambda self: None)
    monkeypatch.setattr(os, "fsync", lambda handle: None)

    def run(url: str, number: int) -> None:
        # In memory where there is such a disk: a schedule takes a tenth of a second otherwise.
        folder = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
        worlds[:] = [World(f"{url}/{number}", folder, template, number)]
        world = worlds[0]
        try:
            world.others_act(ACTIONS)
            world.end()
        except (Exception, Broken) as error:
            raise AssertionError("\n".join([f"schedule {number}: {error}", *world.history])) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    return run


@pytest.mark.parametrize("numbers", [range(SCHEDULES), pytest.param(range(SCHEDULES, 10 * SCHEDULES), marks=pytest.mark.slow)])
def test_schedules_of_machines_that_want_one_run(play: Callable[[str, int], None], numbers: range) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    for number in numbers:
        play("memory://schedules", number)
        MemoryFileSystem.store.clear()
        MemoryFileSystem.pseudo_dirs[:] = [""]


def test_schedules_on_s3(play: Callable[[str, int], None], s3: str) -> None:
    for number in range(max(1, SCHEDULES // 1000)):
        play(s3, number)
