"""How the hub's client makes requests: with bounded waits, with the pauses that the hub asks for, and quietly.

The only file that changes settings of huggingface_hub for the whole process.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

# Seconds without a byte after which a connection counts as dead: of one that only asks, and of one that sends, whose commit may take
# long. The client itself would wait forever.
_SILENCE_ASKING, _SILENCE_SENDING = 30.0, 120.0


class DamagedTransferError(Exception):
    """A file's content is not what the hub listed."""


def status_of(error: BaseException) -> int | None:
    """The HTTP status that made the client raise an error."""
    return getattr(getattr(error, "response", None), "status_code", None)


def is_missing(error: BaseException) -> bool:
    """Whether the hub says that a repository, a branch or a file is not there."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, LocalEntryNotFoundError):  # the client could not ask, and has none itself
        return False
    # A wrong token and a missing repository look alike but for the status.
    return isinstance(error, (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError)) and status_of(error) != 401


def is_transient(error: BaseException) -> bool:
    """Whether another attempt may succeed: the network, the hub's own faults, its rate limit, a transfer that was cut."""
    from huggingface_hub.errors import FileMetadataError, LocalEntryNotFoundError

    status = status_of(error)
    if status is not None:
        return status in (408, 425, 429) or status >= 500
    if isinstance(error, (ConnectionError, TimeoutError, FileMetadataError, LocalEntryNotFoundError, DamagedTransferError)):
        return True
    # httpx, httpx2, requests: which one the client uses changes with its version.
    if type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"):
        return True
    return isinstance(error, OSError) and "consistency check failed" in str(error).lower()


_ASKED = "x-diffvit-asked-pause"


def asked_pause(error: BaseException) -> float:
    """Seconds that the hub asks to wait."""
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    try:
        return max(0.0, float(headers.get(_ASKED, 0)))
    except (TypeError, ValueError):
        return 0.0


def bound_waits() -> None:
    """Have the client give up on a silent hub, and leave the pauses that the hub asks for, up to an hour, to us."""
    from huggingface_hub import constants, set_client_factory
    from huggingface_hub.utils import _http

    if "HF_HUB_DISABLE_XET" not in os.environ:
        constants.HF_HUB_DISABLE_XET = True  # Xet's transfers cannot be bounded; the hub takes and gives the same files over HTTP
    with _hooking:
        make = _http._GLOBAL_CLIENT_FACTORY
        if not isinstance(make, _BoundedClients):  # the client makes itself anew after a fault, so hooks on the one there is are not enough
            set_client_factory(_BoundedClients(make))


_hooking = threading.Lock()


class _BoundedClients:
    """A factory of the client's connections to the hub, with our hooks added."""

    def __init__(self, make: Callable[[], Any]):
        self._make = make

    def __call__(self) -> Any:
        client = self._make()
        hooks = client.event_hooks
        client.event_hooks = {
            "request": [*hooks.get("request", []), _bound_silence],
            "response": [*hooks.get("response", []), _take_over_pause],
        }
        return client


def _bound_silence(request: Any) -> None:
    """Bound every wait that has no bound; many calls of the client have none."""
    asked = request.extensions.get("timeout") or {}
    bound = _SILENCE_ASKING if request.method in ("GET", "HEAD") else _SILENCE_SENDING
    bounds = {"connect": _SILENCE_ASKING, "read": bound, "write": bound, "pool": bound}
    asked = {name: value for name, value in asked.items() if value is not None}
    request.extensions = {**request.extensions, "timeout": {**bounds, **asked}}


def _take_over_pause(response: Any) -> None:
    """Move the pause that a response asks for to a header that the client does not read."""
    asked = [response.headers.pop("retry-after", "0")]
    asked += re.findall(r"t=(\d+)", response.headers.pop("ratelimit", ""))
    if response.status_code in (429, 503):
        response.headers[_ASKED] = max(asked, key=lambda text: float(text) if text.isdigit() else 0.0)


@contextlib.contextmanager
def offline_client() -> Iterator[None]:
    """Inside the block, the client uses its cache only."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def quiet_client(unless: bool = False) -> Iterator[None]:
    """Hide the client's progress bars inside the block."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if unless or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
