"""One run under way: the right to train it, its states here and in the storage, and their removal when it ends.

    with RunKeeper(files, saving) as keeper:      the lock and, if there is a storage, the lease are ours
        keeper.result                             the run's result, if it has ended already, here or in the storage
        keeper.load_state(fits)                   the newest state that fits the run, wherever it is
        keeper.save(state, log)                   a state, at once on disk and every `sync_every` seconds in the storage
        keeper.finish(result)                     to the storage; the states go

Copies to the storage are made by a thread of its own: training waits for the local disk only.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from diffvit.errors import RunIsBusyError, StorageError
from diffvit.keeping.base import Storage
from diffvit.keeping.lease import Lease, take_lease
from diffvit.keeping.runs import fetch_run, leftovers, push_run, state_folder
from diffvit.keeping.saving import Saving
from diffvit.keeping.state import KEPT, StateFolder, folder_id
from diffvit.keeping.storage import open_storage
from diffvit.ledger.disk import check_writable, sweep_asides
from diffvit.ledger.files import RunFiles
from diffvit.ledger.log import LogPosition, TrainingLog
from diffvit.ledger.results import Result, read_result
from diffvit.repeat import PATIENT, Repeater, retry

# Seconds after which a renewal that failed is tried again.
_RENEW_AGAIN = 60.0


class RunKeeper:
    """A context manager that holds the right to train a run and keeps its states.

    Args:
        on_warning: called with a warning about damaged states or a storage that does not answer.

    Raises:
        RunIsBusyError: on entry, where another process trains the run.
        UserError: on entry, where the folder cannot be written.
        StorageError: on entry, where the storage does not answer and the run is not to begin without it.
    """

    def __init__(self, files: RunFiles, saving: Saving, on_warning: Callable[[str], None] | None = None):
        self.result: Result | None = None
        self._files, self._saving = files, saving
        self._warn = on_warning or (lambda text: None)
        self._states = StateFolder(files.checkpoints, files.run_id, on_warning)
        self._storage: Storage | None = None
        self._uploader: StateUploader | None = None
        self._lease_given_back = False
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> RunKeeper:
        with contextlib.ExitStack() as stack:
            self._open(stack)
            self._stack = stack.pop_all()
        return self

    def _open(self, stack: contextlib.ExitStack) -> None:
        files = self._files
        self.result = read_result(files.result)
        if self.result is not None:
            return
        storage = open_storage(self._saving.storage) if self._saving.storage else None
        check_writable(files.folder)
        if not stack.enter_context(self._states.lock()):
            raise RunIsBusyError(
                f"another process is training the run {files.run_id}.", "let it finish; the same command then finds it done."
            )
        sweep_asides(files.folder, files.stem)
        if storage:
            self._storage = storage
            self._uploader = uploader = StateUploader(storage, files, self._saving, self._warn)
            stack.callback(self._give_back)
            with self._unless_needed():
                if refusal := uploader.join_others():
                    raise RunIsBusyError(
                        f"another machine trains the run {files.run_id}: {refusal}.",
                        "wait for it; the same command takes over or finds it done.",
                    )
                fetch_run(storage, files)
                uploader.looked = True
            uploader.start()
            stack.callback(uploader.stop)
        self.result = read_result(files.result)  # it may have ended while we came here

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, trace)

    @contextlib.contextmanager
    def _unless_needed(self) -> Iterator[None]:
        """Turn a StorageError inside into a warning, unless the run must not begin without its storage."""
        try:
            yield
        except StorageError as error:
            if self._saving.needs_storage:
                raise
            self._warn(f"{error.message} The run {self._files.run_id} is trained without it until it answers.")

    def _give_back(self) -> None:
        lease = self._uploader.lease if self._uploader else None
        if lease and not self._lease_given_back:
            with contextlib.suppress(StorageError):  # else it runs out by itself
                lease.release()

    @property
    def lost(self) -> bool:
        """Whether another machine has taken the run over, or has ended it, because our lease ran out."""
        return self._uploader is not None and self._uploader.lost

    def load_state(self, fits: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
        """The newest state that is whole and fits the run and its log, here or in the storage; None where there is none."""
        usable = lambda state: fits(state) and LogPosition(*state["log"]).fits(self._files.log)  # noqa: E731
        state = self._states.load(usable)
        if self._uploader and self._uploader.lease:
            with self._unless_needed():
                if self._fetch_states(newer_than=state["step"] if state else 0):
                    state = self._states.load(usable)
        return state

    def _fetch_states(self, newer_than: int) -> bool:
        """Copy the newest whole state in the storage, and its log, to this machine. False where none is newer than ours."""
        assert self._storage
        remote = state_folder(self._files.run_id)
        for name in reversed(self._storage.names(remote, ".state")):
            if not re.fullmatch(r"[0-9]{9,12}", Path(name).stem):
                continue
            step = int(Path(name).stem)
            if step <= newer_than:
                return False
            # The log last: it replaces the one that our own states fit.
            if self._storage.get(name, self._states.file(step)):
                if self._storage.get(f"{remote}/{step:09d}.log", self._files.log):
                    return True
                self._states.file(step).unlink()
            self._warn(f"the resume state {name} in {self._storage.url} is damaged; the one before is used")
        return False

    def save(self, state: dict[str, Any], log: TrainingLog) -> None:
        """Keep a state that goes with the log as it is now."""
        position = log.position()
        path = self._states.save(state["step"], {**state, "log": tuple(position)})
        if self._uploader:
            self._uploader.offer(_Parcel(state["step"], path, self._files.log, position.bytes))

    def finish(self, result: Result) -> None:
        """Copy the ended run, whose result is written here, to the storage and remove the states.

        A storage that does not answer never fails a finished run: the next command sends it. Where another machine has taken the run
        over meanwhile, nothing is sent.
        """
        if self._storage and self._uploader:
            self._uploader.rest()
            self._push(result)
            self._uploader.stop(send=False)
        self._states.remove()

    def _push(self, result: Result) -> None:
        storage, uploader, files = self._storage, self._uploader, self._files
        assert storage and uploader
        is_there = False

        def push() -> None:
            nonlocal is_there
            if not is_there:
                if not uploader.may_end():
                    self._warn(f"the run {files.run_id} is finished here, and not in the storage: another machine has taken it over.")
                    return
                push_run(storage, files, result)  # the lease is renewed meanwhile
                is_there = True
            self._lease_given_back = uploader.last(lambda lease: storage.commit({}, [*leftovers(storage, files.run_id), *lease.names()]))

        try:
            retry(push, PATIENT, lambda error: isinstance(error, StorageError))
        except StorageError as error:  # left to the next command
            what = "and its states stay in the storage" if is_there else "and not in the storage"
            self._warn(f"the run {files.run_id} is finished here, {what}: {error.message}")


@dataclass(frozen=True)
class _Parcel:
    """A state to upload: its file, and the part of the log that goes with it."""

    step: int
    state: Path
    log: Path
    log_bytes: int


class StateUploader(Repeater):
    """A thread that renews the lease, and copies the newest state to the storage every `sync_every` seconds.

    Attributes:
        lease: None until the storage has answered.
        looked: whether it was checked, since the lease was taken, that the run has not ended elsewhere.
        lost: whether another machine has the run, or has ended it.
    """

    def __init__(self, storage: Storage, files: RunFiles, saving: Saving, warn: Callable[[str], None]):
        super().__init__(f"upload-{files.run_id}", self._tick, pause=0.0)
        self.lease: Lease | None = None
        self.looked = self.lost = False
        self._storage, self._files, self._saving, self._warn = storage, files, saving, warn
        self._remote = state_folder(files.run_id)
        self._parcel: _Parcel | None = None
        self._sent = 0
        self._renewal = saving.lease_seconds / 3
        self._renew_at = time.monotonic() + min(self._renewal, _RENEW_AGAIN)
        self._send_at = time.monotonic() + saving.sync_every
        self._lock = threading.Lock()
        self._silent = self._resting = self._renewed = False

    def join_others(self) -> str | None:
        """Take the lease. Returns a sentence about the machine that has it; None where it is ours."""
        lease = take_lease(self._storage, self._files.run_id, folder_id(self._files.checkpoints), self._saving.lease_seconds)
        if not isinstance(lease, Lease):
            return lease
        self.lease, self._renew_at = lease, time.monotonic() + self._renewal
        return None

    def offer(self, parcel: _Parcel) -> None:
        """Make this the next state to upload."""
        self._parcel = parcel

    def rest(self) -> None:
        """Send no more states; only renew the lease."""
        with self._lock:
            self._resting = True

    def may_end(self) -> bool:
        """Renew the lease before the run's result is sent. False where the run is lost, or the storage has another result of it."""
        with self._lock:
            lease = self._held()
            if lease is not None:
                self.lost = not lease.renew()
            if not self.lost:
                result = self._storage.read(f"{self._files.model}/{self._files.result.name}")
                # Looked at again: a machine may have been suspended between its look at the lease and the renewal.
                self.lost = result not in (None, self._files.result.read_bytes()) or (lease is not None and lease.renewal() is None)
            return not self.lost

    def last(self, action: Callable[[Lease], None]) -> bool:
        """Run an action that gives the lease back, and renew it no more if that succeeds. False where the run is lost."""
        with self._lock:
            lease = self._held()
            if lease:
                action(lease)
            self.ending.set()
            return lease is not None

    def stop(self, send: bool = True) -> None:
        """End the thread, and send a state that was not sent yet, so that another machine can resume from it."""
        if self.ending.is_set():
            return
        super().stop()
        if send and not self._resting and not self.lost:
            self._try(self._send)

    def _tick(self) -> float | None:
        """Do what is due. Returns the seconds until something is due again; None once the run is lost."""
        if time.monotonic() >= self._send_at:
            sent = self._try(self._send)
            self._send_at = time.monotonic() + self._saving.sync_every
            if sent and self._renewed:  # it has renewed the lease too
                self._renew_at = time.monotonic() + self._renewal
        elif time.monotonic() >= self._renew_at:
            held = self._try(self._renew)
            self._renew_at = time.monotonic() + (self._renewal if held else min(self._renewal, _RENEW_AGAIN))
        return None if self.lost else max(0.0, min(self._renew_at, self._send_at) - time.monotonic())

    def _held(self) -> Lease | None:
        """The lease, taken now if the storage did not answer before; None where the run is lost."""
        if self.lease is None and not self.lost:
            self.lost = self.join_others() is not None
        if not self.looked and not self.lost:
            self.lost = self._storage.has(f"{self._files.model}/{self._files.result.name}")
            self.looked = True
        return None if self.lost else self.lease

    def _renew(self) -> None:
        fresh = self.lease is None
        lease = self._held()
        if lease and not fresh:
            self.lost = not lease.renew()

    def _send(self) -> None:
        parcel, self._renewed = self._parcel, False
        if parcel is None or parcel.step == self._sent or self._resting:
            return
        lease = self._held()
        renewal = lease.renewal() if lease else None
        if renewal is None:
            self.lost = True
            return
        name = f"{self._remote}/{parcel.step:09d}"
        names = self._storage.names(self._remote)
        kept = sorted({*(Path(each).stem for each in names if each.endswith(".state")), f"{parcel.step:09d}"})[-KEPT:]
        old = [each for each in names if Path(each).stem not in kept]
        try:
            # The log first: a state counts only with a log that fits it.
            self._storage.commit({f"{name}.log": (parcel.log, parcel.log_bytes), f"{name}.state": parcel.state}, old, renewal)
        except FileNotFoundError:  # a newer state has just taken its place here; it goes next time
            return
        self._sent, self._renewed = parcel.step, True

    def _try(self, action: Callable[[], None]) -> bool:
        """Run an action against the storage. On failure warn once and return False; the caller tries again at its next time."""
        try:
            with self._lock:
                if not self.ending.is_set() or threading.current_thread() is not self:
                    action()
            self._silent = False
            return True
        except Exception as error:
            if not self._silent:  # once for each time that it falls silent
                self._warn(f"{error.message if isinstance(error, StorageError) else error} Training continues, and tries again.")
            self._silent = True
            return False
