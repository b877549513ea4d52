"""Leases: which of several machines may train a run. A lease is a numbered object; the highest number holds."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import time
import uuid
from dataclasses import dataclass
from typing import Any, Literal

from diffvit.checks import fault, parse_json, real, record, text
from diffvit.keeping.base import Storage
from diffvit.keeping.runs import state_folder

# What clocks of two machines may differ by: a lease is taken over only so long after it has run out, or after a tenth of its length
# where that is less.
_CLOCK_SKEW = 30.0


@dataclass
class Lease:
    """The right to train a run for a while, renewed by who has it.

    A lease is a numbered object. Who takes a run over creates the next number, which only one can; who has a lower one has lost it.
    """

    storage: Storage
    folder: str
    number: int
    owner: str
    seconds: float

    def renewal(self) -> dict[str, bytes] | None:
        """The object that extends it to its full length from now, name -> content; None where another machine has taken the run over."""
        leases = _numbers(self.storage, self.folder)
        if max(leases, default=0) != self.number or not self._is_ours(leases[self.number]):
            return None
        return {self._name(self.number): _lease_content(self.owner, self.seconds)}

    def renew(self) -> bool:
        """Extend it to its full length from now; False where another machine has taken the run over."""
        renewal = self.renewal()
        for name, content in (renewal or {}).items():
            self.storage.overwrite(name, content)
        return renewal is not None

    def expire(self) -> None:
        """Let it expire now, which tells others that the work is undone and free to take."""
        self.storage.overwrite(self._name(self.number), _lease_content(self.owner, 0.0))

    def names(self) -> list[str]:
        """Object names of this lease and of those before it; none once it is gone, since numbers begin anew then."""
        leases = _numbers(self.storage, self.folder)
        if not self._is_ours(leases.get(self.number, b"")):
            return []
        return [self._name(number) for number in leases if number <= self.number]

    def release(self) -> None:
        """Give it back: remove it and those before it."""
        self.storage.commit({}, self.names())

    def _is_ours(self, content: bytes) -> bool:
        """Whether a lease with our number is ours: numbers begin anew once all leases were given back."""
        return _parse_lease(content)["owner"] == self.owner

    def _name(self, number: int) -> str:
        return f"{self.folder}/{number:06d}"


def take_lease(storage: Storage, run_id: str, owner: str, seconds: float) -> Lease | str:
    """The lease of a run, or a sentence that says who has it until when.

    Args:
        owner: a name that no other copy of the ledger has. A lease of the same owner is taken over at once: whoever calls this holds the
            run's local lock, so the process that had the lease is dead.
    """
    folder = f"{state_folder(run_id)}/lease"
    newest, held = _newest(storage, folder)
    until = _runs_out(held)
    if newest and held["owner"] != owner and time.time() < until:
        when = time.strftime("%H:%M:%S", time.gmtime(until))
        return f"{held['host']} has it, and unless it gives a sign of life it may be taken over at {when} UTC"
    lease = Lease(storage, folder, newest + 1, owner, seconds)
    if not storage.create(lease._name(lease.number), _lease_content(owner, seconds)):
        return "another machine has just taken it"
    return lease


def lease_state(storage: Storage, run_id: str) -> Literal["none", "live", "expired"]:
    """Whether there is a lease of a run, and whether it has run out."""
    newest, held = _newest(storage, f"{state_folder(run_id)}/lease")
    if not newest:
        return "none"
    return "live" if time.time() < _runs_out(held) else "expired"


def _newest(storage: Storage, folder: str) -> tuple[int, dict[str, Any]]:
    """Number and facts of the newest lease in a folder; 0 where there is none."""
    leases = _numbers(storage, folder)
    newest = max(leases, default=0)
    held = _parse_lease(leases.get(newest, b""))
    if newest and not held["owner"]:  # perhaps it is being written
        time.sleep(1)
        held = _parse_lease(_numbers(storage, folder).get(newest, b""))
    return newest, held


def _runs_out(held: dict[str, Any]) -> float:
    """The time after which another machine may take it, in seconds since the epoch."""
    return held["expires"] + min(_CLOCK_SKEW, 0.1 * held["seconds"])


def _lease_content(owner: str, seconds: float) -> bytes:
    facts = {"owner": owner, "host": socket.gethostname(), "seconds": seconds, "expires": time.time() + seconds, "nonce": uuid.uuid4().hex}
    return json.dumps(facts).encode()


# Times that a clock can show.
_TIME = real(0, 1e11)
_LEASE = record({"owner": text(), "host": text(), "seconds": _TIME, "expires": _TIME})


def _parse_lease(content: bytes) -> dict[str, Any]:
    """A lease's facts; one that cannot be read, of a writer that died over it, has run out."""
    with contextlib.suppress(ValueError):
        facts = parse_json(content)
        if not fault(_LEASE, facts):
            return facts
    return {"owner": "", "host": "an unknown machine", "seconds": 0.0, "expires": 0.0}


def _numbers(storage: Storage, folder: str) -> dict[int, bytes]:
    """Number -> content of the leases in a folder."""
    return {int(name): content for name, content in storage.entries(folder).items() if re.fullmatch("[0-9]{6,12}", name)}
