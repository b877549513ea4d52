"""The Hugging Face hub: the account, files sent and brought, and a trained model by its name.

    hub = Hub(find_account())                   credentials from the environment or from .env
    upload(Path("checkpoints"), "", hub)        what the hub does not have yet
    download("vit_classic", Path("here"), hub)  what is not here yet
    from_pretrained("user/repo", model="vit_classic", size="10B", dataset="CIFAR-100")

The client is huggingface_hub. What this adds: files are compared by their hashes before and after a transfer, nothing different is
overwritten unasked, what fails for a while is tried again, names and sizes in a listing are believed only after a look, and the token
is in no message.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import io
import os
import re
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from diffvit.checks import parse_json, read_text
from diffvit.errors import StorageError, UserError, redacted, shown
from diffvit.ledger import LONGEST_RESULT, listed, readable

if TYPE_CHECKING:
    from diffvit.vit import VisionTransformer

_T = TypeVar("_T")

# Hubs, by address, whose last call failed.
_failing: set[str] = set()

# Pauses in seconds between attempts at a call that fails for a while; a hub that asks for a longer one gets it, up to five minutes.
PATIENT = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
_LONGEST_PAUSE = 300.0

# Seconds without a byte after which a connection counts as dead: of one that only asks, and of one that sends, whose commit may take
# long. The client itself would wait forever.
_SILENCE_ASKING, _SILENCE_SENDING = 30.0, 120.0

# A commit takes so many files or bytes at most, so that an interrupted upload does not begin anew.
_COMMIT_FILES = 50
_COMMIT_BYTES = 2 * 1024**3

_MOST_FILES = 100_000
_LONGEST_ENV = 100_000
_HIDDEN = "."


class HubRefusesError(StorageError):
    """The hub answers, and says no: trying again does not help."""

    exit_code = 2


# --------------------------------------------------------------------------------------------------------- account


@dataclass(frozen=True)
class Account:
    """Where on the hub, `user/name`, and the token that lets one in; None: what is public."""

    repository: str
    token: str | None = field(default=None, repr=False)


def find_account() -> Account:
    """HF_REPOSITORY and HF_TOKEN, from the environment or, where that has not, from .env in the working directory.

    Raises:
        UserError: one is missing or not in its form.
    """
    found = {name: _setting(name) for name in ("HF_TOKEN", "HF_REPOSITORY")}
    missing = [name for name, value in found.items() if not value]
    if missing:
        raise UserError(
            f"the hub needs {' and '.join(missing)}, and neither the environment nor .env has {'it' if len(missing) == 1 else 'them'}.",
            "write them into .env (see .env.example).",
        )
    return Account(parse_repository(found["HF_REPOSITORY"]), find_token())


def find_token() -> str | None:
    """HF_TOKEN from the environment or .env; None where it is in neither. Raises UserError for one that is not in its form."""
    token = _setting("HF_TOKEN")
    if token and not re.fullmatch(r"[\x21-\x7e]{1,1000}", token):
        raise UserError("HF_TOKEN is not a token: it has a space or a special character.", "copy it again; it is one word.")
    return token or None


def _setting(name: str) -> str:
    if found := os.environ.get(name):
        return found.strip()
    found, near = "", None
    try:
        for line, key, value, whole in _env_lines():
            if key == name and not whole:
                raise UserError(f"line {line} of .env, which is for {name}, cannot be read.", "write it as .env.example shows.")
            if key == name and value and found and value != found:
                raise UserError(f".env has {name} a second time in line {line}, with another value.", "take one of both out.")
            if key == name:
                found = found or value
            elif _is_misspelt(key, name):
                raise UserError(f".env has {shown(key)} in line {line}, which nothing reads.", f"did you mean {name}?")
            elif re.fullmatch(_ALIASES[name], key):
                near = near or key
    except (OSError, ValueError) as error:
        raise UserError(f"the file .env cannot be read: {error}.", "write it as plain text in UTF-8 (see .env.example).") from None
    if near and not found:
        raise UserError(f".env has {shown(near)}, which is not read here, and no {name}.", f"did you mean {name}?")
    return found


# What other tools call these settings. Such a name is theirs where ours is there too.
_ALIASES = {
    "HF_TOKEN": "(HF|HUGGING_?FACE)(_HUB)?(_API|_ACCESS|_USER|_READ|_WRITE)?_(TOKEN|KEY)",
    "HF_REPOSITORY": "(HF|HUGGING_?FACE)(_HUB|_MODEL)?_REPO(SITORY)?(_ID|_NAME|_URL)?",
}


def _is_misspelt(key: str, name: str) -> bool:
    """Whether a name is one of ours but for a few letters; GH_TOKEN is not, and HF_TOKEN_OLD is meant as it stands."""
    letters = key.upper()
    if letters == name:
        return True
    return letters.startswith(("HF", "HUG")) and name not in letters and difflib.SequenceMatcher(None, letters, name).ratio() > 0.85


def _env_lines() -> Iterator[tuple[int, str, str, bool]]:
    """Line, name and value of what .env says, and whether it is whole; where it is not, the name is its first word."""
    from dotenv.parser import parse_stream

    try:
        text = read_text(Path(".env"), _LONGEST_ENV)
    except FileNotFoundError:
        return
    for binding in parse_stream(io.StringIO(text)):
        said = binding.original.string
        line = binding.original.line + len(said[: len(said) - len(said.lstrip())].splitlines())
        if whole := binding.value is not None:
            yield line, binding.key or "", binding.value.strip(), whole
        elif first := re.match(r"\s*(?:export\s+)?[\"']?(\w+)", said):
            yield line, first[1], "", whole


def check_env_file() -> None:
    """Raises UserError for a DIFFVIT_ name in .env that is not in the environment: from there alone it is read.

    A file that cannot be read is not an error here: it may be another tool's.
    """
    with contextlib.suppress(OSError, ValueError):
        for line, key, _, _ in _env_lines():
            if key.upper().startswith("DIFFVIT_") and not os.environ.get(key):
                raise UserError(
                    f".env has {shown(key)} in line {line}, which is read from the environment only.", f"export {key} in the shell."
                )


def parse_repository(text: str) -> str:
    """`user/name` from that, a link to the repository's page, or an address to clone it from. Raises UserError."""
    scheme, _, address = text.strip().rpartition("://")
    place = re.sub(r"^[\w.-]+@", "", address)  # without the user's name, or git's
    user = address.removesuffix(place)
    if "/" not in place:  # perhaps a token, so it is not shown
        raise UserError(
            "what is given as the repository has no / and is not a model repository on the hub.",
            f"give user/name; if HF_REPOSITORY and HF_TOKEN are swapped, swap them. {_WHERE_TOKENS_BELONG}",
        )
    if redacted(user) != user or ("@" in place and redacted(f"://{place}") != f"://{place}"):
        raise UserError("the address of the repository has a password or token in it.", f"give user/name. {_WHERE_TOKENS_BELONG}")
    hosts = [r"(?:www\.)?(?:huggingface\.co|hf\.co)", *([re.escape(_address(own))] if (own := os.environ.get("HF_ENDPOINT")) else [])]
    path = re.sub(rf"^(?:{'|'.join(hosts)})(?::\d+(?=/))?[:/]", "", place, flags=re.IGNORECASE)
    linked = path != place
    parts = (re.split("[?#]", path)[0] if linked else path).strip("/").removesuffix(".git").split("/")
    if kind := _OTHER_KINDS.get(parts[0]):
        raise UserError(f"{shown(text)} is {kind} on the hub, and not a model repository.", "give user/name of a model repository.")
    if linked and parts[2:3] and parts[2] in _PAGES:
        if parts[3:4] not in ([], ["main"]):
            raise UserError(f"{shown(text)} is not the branch main.", "give user/name; files are sent to and come from main.")
        parts = parts[:2]
    known = linked or (not user and scheme.lower() in ("", "hf"))
    named = all(re.fullmatch(r"[A-Za-z0-9]([\w.-]{0,94}[\w])?", part, re.ASCII) and ".." not in part for part in parts)
    if not (known and named and len(parts) == 2):
        raise UserError(f"{shown(text)} is not a model repository on the hub.", "give user/name, or the link of its page.")
    return "/".join(parts)


_WHERE_TOKENS_BELONG = "A token belongs into HF_TOKEN; one that others may have seen should be revoked on the hub."
_OTHER_KINDS = {"datasets": "a data set", "spaces": "a space", "buckets": "a bucket"}
# Of a repository, under an address that names a branch next.
_PAGES = ("tree", "blob", "resolve", "raw", "commits")


def _address(url: str) -> str:
    """A URL without its scheme, userinfo and last slash."""
    return re.sub(r"^([a-z]+://)?([^/]*@)?", "", url.strip(), flags=re.IGNORECASE).rstrip("/")


# ------------------------------------------------------------------------------------------------------------- hub


@dataclass(frozen=True)
class HubFile:
    """A file as the hub lists it.

    Attributes:
        sha256: of large files (LFS); None for others, which have git's hash.
    """

    name: str
    size: int
    git: str
    sha256: str | None

    def is_like(self, path: Path) -> bool:
        """Whether a file here has the same content."""
        if not path.is_file() or path.stat().st_size != self.size:
            return False
        if self.sha256:
            return _hash(hashlib.sha256(), path) == self.sha256
        return _hash(hashlib.sha1(f"blob {self.size}\0".encode(), usedforsecurity=False), path) == self.git


class Hub:
    """A repository on the hub.

    Args:
        pauses: in seconds, before each further attempt at a call that fails for a while.
        on_retry: hears why a call is tried again.
        bars: show the client's progress bars.
        longest_pause: of those that the hub asks for, in seconds.

    Its methods raise HubRefusesError where the hub says no, and StorageError where it does not answer, or not rightly, to the last attempt.
    """

    def __init__(
        self, account: Account, pauses: Sequence[float] = PATIENT, on_retry: Callable[[str], None] | None = None, bars: bool = False,
        longest_pause: float = _LONGEST_PAUSE,
    ):  # fmt: skip
        from huggingface_hub import HfApi
        from huggingface_hub.utils import logging

        from diffvit import __version__

        logging.set_verbosity_error()  # it tries again by itself at times; who waits hears of it from us

        self.account, self.pauses, self._on_retry, self._bars = account, tuple(pauses), on_retry, bars
        self._longest_pause = longest_pause
        # False, and not None: the client would look for a token elsewhere.
        self.api = HfApi(
            endpoint=os.environ.get("HF_ENDPOINT") or None,
            token=account.token or False,
            library_name="diffvit",
            library_version=__version__,
        )

    @property
    def repository(self) -> str:
        return self.account.repository

    def call(self, action: Callable[[], _T]) -> _T:
        """What the client returns. Missing files, branches and conflicts (409, 412) raise the client's own errors."""
        for pause in (*self.pauses, None):
            try:
                _bound_waits()
                if self.api.endpoint in _failing:
                    self._ask_once()
                found = action()
                _failing.discard(self.api.endpoint)
                return found
            except Exception as error:
                status = status_of(error)
                ours = isinstance(error, UserError) or (type(error).__module__ == "builtins" and isinstance(error, OSError))
                if ours and not _is_transient(error):  # of this machine's files and disk
                    raise
                if status in (409, 412) or is_missing(error):
                    raise
                reason = self.reason(error)
                if not _is_transient(error):
                    raise self._refusal(status, reason) from None
                _failing.add(self.api.endpoint)
                if pause is None:
                    raise StorageError(
                        f"the hub does not answer for {self.repository}: {reason}.",
                        "try again later; what is there already is not sent again.",
                    ) from None
                pause = min(max(pause, _asked_pause(error)), self._longest_pause)
                if self._on_retry:
                    self._on_retry(f"the hub failed: {reason}; trying again in {pause:.0f} s")
                time.sleep(pause)
        raise AssertionError

    def _ask_once(self) -> None:
        """Finds out in one request whether the hub works again; most of the client's calls try it by themselves for half a minute."""
        from huggingface_hub.errors import HfHubHTTPError

        try:
            self.api.repo_info(self.repository)
        except HfHubHTTPError as error:
            if _is_transient(error):
                raise  # whatever else it says, it answers

    def _refusal(self, status: int | None, reason: str) -> HubRefusesError:
        if status == 401:
            return HubRefusesError(
                f"the hub does not let us in to {self.repository}.", "check HF_TOKEN and HF_REPOSITORY; tokens expire, and can be revoked."
            )
        if status == 403:
            return HubRefusesError(f"the token may not do that in {self.repository}: {reason}.", "HF_TOKEN needs write access to it.")
        return HubRefusesError(f"the hub refuses: {reason}.", "check HF_REPOSITORY and HF_TOKEN.")

    def reason(self, error: Exception) -> str:
        """What an error says, in a line, without the token or the client's advice."""
        text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        server = getattr(error, "server_message", None)
        text = f"{text.rstrip('.: ')}: {server}" if server and server not in text else text
        return redacted(" ".join(text.split()).rstrip("."), self.account.token)[:300]

    def ensure(self) -> None:
        """Makes the repository, private, where it is missing."""
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            self.call(lambda: self.api.repo_info(self.repository))
        except RepositoryNotFoundError:
            self.call(lambda: self.api.create_repo(self.repository, private=True, exist_ok=True))

    def head(self, revision: str = "main") -> str:
        """The newest commit of a branch. Raises the client's errors for missing repositories and branches."""
        sha = self.call(lambda: self.api.repo_info(self.repository, revision=revision)).sha
        if not isinstance(sha, str) or not re.fullmatch(r"[0-9a-f]{40}", sha):
            raise StorageError(f"the hub names no commit of {self.repository}.", "try again later.")
        return sha

    def files(self, folder: str = "", revision: str = "main", recursive: bool = True) -> dict[str, HubFile]:
        """Name -> file of a folder. Empty where the folder, the branch or the repository is not there. Names are safe to use as paths.

        A commit that is not there raises the client's error: its branch may have been given another history since it was looked up.
        """
        from huggingface_hub.errors import RevisionNotFoundError

        try:
            listed = self.call(
                lambda: _first(self.api.list_repo_tree(self.repository, folder or None, recursive=recursive, revision=revision))
            )
        except Exception as error:
            if is_missing(error) and not (isinstance(error, RevisionNotFoundError) and re.fullmatch("[0-9a-f]{40}", revision)):
                return {}
            raise
        if len(listed) > _MOST_FILES:
            raise StorageError(f"{self.repository} lists more than {_MOST_FILES} files.", "choose a folder with fewer.")
        return {each.name: each for each in map(_checked_file, listed) if each is not None}

    def commit(
        self, puts: Mapping[str, Any], removes: Iterable[str], message: str, revision: str = "main", parent: str | None = None
    ) -> None:
        """Puts files, name -> path, bytes or open file, and removes others, in one step."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        removes = list(removes)

        def send() -> None:
            operations: list[Any] = [
                CommitOperationAdd(path_in_repo=name, path_or_fileobj=_source(content)) for name, content in puts.items()
            ]
            operations += [CommitOperationDelete(path_in_repo=name, is_folder=False) for name in removes]
            if operations:
                self.api.create_commit(
                    self.repository, operations, commit_message=message, revision=revision, parent_commit=parent, num_threads=2
                )

        with _quiet(unless=self._bars):
            self.call(send)

    def bring(self, file: HubFile, folder: Path, revision: str = "main") -> Path:
        """Brings a file to a folder that keeps what was brought of an interrupted one. Returns its path there; its hash is right."""

        def fetch() -> Path:
            with _quiet(unless=self._bars):
                # A cache of its own: from the user's it would take a damaged file.
                brought = self.api.hf_hub_download(
                    self.repository, file.name, revision=revision, local_dir=folder, cache_dir=folder / ".cache" / "hub"
                )
                path = Path(brought)
            if not file.is_like(path):
                path.unlink(missing_ok=True)
                shutil.rmtree(folder / ".cache", ignore_errors=True)  # what the client knows of it is wrong
                raise _DamagedTransferError(f"{file.name} came damaged")
            return path

        return self.call(fetch)


class _DamagedTransferError(Exception):
    """What came is not what was listed."""


def _first(listing: Iterable[Any]) -> list[Any]:
    """One more than may be, so that a listing without an end ends."""
    found = []
    for each in listing:
        found.append(each)
        if len(found) > _MOST_FILES:
            break
    return found


def _checked_file(entry: Any) -> HubFile | None:
    """A listed file; None for a folder. Raises StorageError for one that nobody honest lists."""
    name = entry.path
    if not hasattr(entry, "blob_id"):
        return None
    lfs, git = entry.lfs, entry.blob_id
    sha256, size = (lfs.sha256, lfs.size) if lfs else (None, entry.size)
    wrong = (
        not is_safe_name(name)
        or type(size) is not int
        or not 0 <= size < 2**50
        or not re.fullmatch(r"[0-9a-f]{40,64}", str(git))
        or (sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", str(sha256)))
    )
    if wrong:
        raise StorageError(f"the hub lists a file that cannot be: {shown(name)}.", "do not trust this repository.")
    return HubFile(name, size, git, sha256)


def is_safe_name(name: Any) -> bool:
    """Whether a name is a relative path without steps upwards or special characters, on every system."""
    if not isinstance(name, str) or not 0 < len(name) <= 1000 or re.search(r'[\x00-\x1f\x7f\ud800-\udfff\\:*?"<>|]', name):
        return False
    # Windows drops dots and spaces at a part's end, so that ".. " is ".." there, and takes some names for devices.
    return all(part and part[-1] not in ". " and len(part.encode()) <= 255 and not _DEVICE.fullmatch(part) for part in name.split("/"))


_DEVICE = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])\s*(\..*)?", re.IGNORECASE)


def _hash(digest: Any, path: Path) -> str:
    with open(path, "rb") as file:
        while chunk := file.read(1024**2):
            digest.update(chunk)
    return digest.hexdigest()


def _source(content: Any) -> Any:
    """Content as the client takes it, from its start."""
    if hasattr(content, "seek"):
        content.seek(0)
    return str(content) if isinstance(content, Path) else content


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


def _is_transient(error: BaseException) -> bool:
    """Whether another attempt may succeed: the network, the hub's own faults, its rate limit, a transfer that was cut."""
    from huggingface_hub.errors import FileMetadataError, LocalEntryNotFoundError

    status = status_of(error)
    if status is not None:
        return status in (408, 425, 429) or status >= 500
    if isinstance(error, (ConnectionError, TimeoutError, FileMetadataError, LocalEntryNotFoundError, _DamagedTransferError)):
        return True
    # httpx, httpx2, requests: which one the client uses changes with its version.
    if type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"):
        return True
    return isinstance(error, OSError) and "consistency check failed" in str(error).lower()


_ASKED = "x-diffvit-asked-pause"


def _asked_pause(error: BaseException) -> float:
    """Seconds that the hub asks to wait."""
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    try:
        return max(0.0, float(headers.get(_ASKED, 0)))
    except (TypeError, ValueError):
        return 0.0


def _bound_waits() -> None:
    """Makes the client give up on a silent hub, and leave it to us to wait as long as the hub asks: that may be an hour."""
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
    """Makes the client's connections to the hub, with our hooks."""

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
    """A bound for every wait that has none; many calls of the client ask for none."""
    asked = request.extensions.get("timeout") or {}
    bound = _SILENCE_ASKING if request.method in ("GET", "HEAD") else _SILENCE_SENDING
    bounds = {"connect": _SILENCE_ASKING, "read": bound, "write": bound, "pool": bound}
    asked = {name: value for name, value in asked.items() if value is not None}
    request.extensions = {**request.extensions, "timeout": {**bounds, **asked}}


def _take_over_pause(response: Any) -> None:
    """Moves the pause that a response asks for to where the client does not look."""
    asked = [response.headers.pop("retry-after", "0")]
    asked += re.findall(r"t=(\d+)", response.headers.pop("ratelimit", ""))
    if response.status_code in (429, 503):
        response.headers[_ASKED] = max(asked, key=lambda text: float(text) if text.isdigit() else 0.0)


@contextlib.contextmanager
def _quiet(unless: bool = False) -> Iterator[None]:
    """No progress bars of the client's inside."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if unless or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


# ----------------------------------------------------------------------------------------------- upload and download


@dataclass(frozen=True)
class Transfer:
    """What became of each file: names on the hub, in order.

    Attributes:
        left: what was not sent on purpose, and why: ".state (hidden)".
    """

    moved: tuple[str, ...]
    skipped: tuple[str, ...]
    bytes: int
    left: tuple[str, ...] = ()


# (bytes done, bytes in all, what is under way)
Progress = Callable[[int, int, str], None]


def upload(local: Path, hub_folder: str, hub: Hub, force: bool = False, on_progress: Progress | None = None) -> Transfer:
    """Send a file into a folder of the repository, or a folder's content, without what is hidden; the repository is made if missing.

    Links are followed: what they lead to is sent under the link's name.

    Args:
        hub_folder: "" or "." for the repository's top.
        force: replace files that are different there.

    Raises:
        UserError: there is nothing to send, something cannot be sent, or something different is there already; then nothing is sent.
        StorageError: the hub failed; what it has is not sent again.
    """
    folder = _hub_path(hub_folder)
    sources, left = _files_to_send(local, folder)
    hub.ensure()
    before = hub.files(folder)
    same = {name for name, path in sources.items() if name in before and before[name].is_like(path)}
    different = [name for name in sources if name in before and name not in same]
    if different and not force:
        raise UserError(f"{_some(different)} on {hub.repository} is different.", "--force replaces it; or choose another folder.")
    sizes = {name: path.stat().st_size for name, path in sources.items() if name not in same}
    done, total = 0, sum(sizes.values())
    for batch in _batches(sizes):
        if on_progress:
            on_progress(done, total, batch[0])
        hub.commit({name: sources[name] for name in batch}, (), f"upload {_some(batch)}")
        done += sum(sizes[name] for name in batch)
    if sizes:
        after = hub.files(folder)
        wrong = [name for name in sizes if name not in after or not after[name].is_like(sources[name])]
        if wrong:
            raise StorageError(f"{_some(wrong)} did not arrive as sent.", "send it again; if it changed meanwhile, wait until it does not.")
        if on_progress:
            on_progress(total, total, "")
    return Transfer(tuple(sizes), tuple(sorted(same)), total, tuple(left))


def download(hub_path: str, local: Path, hub: Hub, force: bool = False, on_progress: Progress | None = None) -> Transfer:
    """Bring a file, or a folder's content, to a local folder.

    Args:
        hub_path: "" or "." for the whole repository.
        force: replace files that are different here.

    Raises:
        UserError: there is no such file, or something different is here already; then nothing is brought.
        StorageError: the hub failed; the same call goes on where it was.
    """
    wanted = _hub_path(hub_path)
    try:
        commit = hub.head()
    except Exception as error:
        if is_missing(error):
            raise UserError(f"there is no repository {hub.repository} that this token can see.", "check HF_REPOSITORY.") from None
        raise
    found = hub.files(wanted, commit)
    inside = wanted
    if not found and wanted:  # a file, perhaps
        inside = wanted.rpartition("/")[0]
        found = {name: file for name, file in hub.files(inside, commit, recursive=False).items() if name == wanted}
    if not found:
        raise UserError(f"{hub.repository} has no {wanted or 'files'}.", _top_of(hub, commit))
    targets = {name: local / name.removeprefix(inside).lstrip("/") for name in found}
    same = {name for name, path in targets.items() if found[name].is_like(path)}
    in_the_way = [path for target in targets.values() for path in _in_the_way(target, local)]
    if in_the_way:
        raise UserError(f"{in_the_way[0]} is in the way.", "remove it, or choose another folder.")
    different = [str(path) for name, path in targets.items() if name not in same and (path.exists() or path.is_symlink())]
    if different and not force:
        raise UserError(f"{_some(different)} is different here.", "--force replaces it; or choose another folder.")
    missing = [name for name in found if name not in same]
    done, total = 0, sum(found[name].size for name in missing)
    local.mkdir(parents=True, exist_ok=True)
    _check_room({targets[name]: found[name].size for name in missing})
    for name in missing:
        if on_progress:
            on_progress(done, total, name)
        targets[name].parent.mkdir(parents=True, exist_ok=True)
        path = hub.bring(found[name], targets[name].parent / _STAGE, commit)
        os.replace(path, targets[name])
        done += found[name].size
    for folder in {target.parent for target in targets.values()}:
        shutil.rmtree(folder / _STAGE, ignore_errors=True)
    if on_progress and missing:
        on_progress(total, total, "")
    return Transfer(tuple(missing), tuple(sorted(same)), total)


# Where files are brought to first: beside where they go, since a folder may be a link to another disk.
_STAGE = ".diffvit-download"


def _check_room(sizes: Mapping[Path, int]) -> None:
    """Raises UserError where a disk has less room than the files that go there take."""
    disks: dict[int, tuple[Path, int]] = {}
    for path, size in sizes.items():
        folder = next(each for each in path.parents if each.is_dir())
        first, before = disks.get(folder.stat().st_dev, (folder, 0))
        disks[folder.stat().st_dev] = first, before + size
    for folder, size in disks.values():
        free = shutil.disk_usage(folder).free
        if size > free:
            raise UserError(f"what is brought to {folder} takes {size:,} bytes, and it has {free:,} left.", "make room.")


def _in_the_way(target: Path, local: Path) -> list[Path]:
    """A folder where a file shall be, or a file where a folder shall be."""
    folders = [folder for folder in target.parents if folder == local or local in folder.parents]
    return [*([target] if target.is_dir() else []), *(each for each in folders if os.path.lexists(each) and not each.is_dir())]


def _hub_path(text: str) -> str:
    path = text.strip().strip("/")
    if path in ("", "."):
        return ""
    path = path.removeprefix("./")
    if not is_safe_name(path):
        raise UserError(f"{shown(text)} is not a path in a repository.", "give a path such as vit_classic, or . for the top.")
    return path


def _files_to_send(local: Path, folder: str) -> tuple[dict[str, Path], list[str]]:
    """Name on the hub -> file, and what is left out with the reason. Raises UserError for what cannot be sent, by name."""
    if not os.path.lexists(local):
        raise UserError(f"there is no file or folder {local}.", "give one that is there.")
    if local.name.startswith(_HIDDEN) and not local.is_dir():
        raise UserError(f"{local} is hidden.", "what is hidden is not sent: it may hold secrets; copy it under another name.")
    left: list[str] = []
    inside = f"{folder}/" if folder else ""
    facts = _facts(local)
    sources = {}
    for name, path in _files_below(local, inside, facts, (), left) if stat.S_ISDIR(facts.st_mode) else [(inside + local.name, local)]:
        sources[_sendable(name, path)] = path
        if len(sources) > _MOST_FILES:
            raise UserError(f"{local} has more than {_MOST_FILES} files.", "send a folder with fewer.")
    if not sources:
        raise UserError(f"{local} has no files.", f"this is not sent: {', '.join(left)}." if left else "what is hidden is not sent.")
    return sources, left


def _files_below(folder: Path, inside: str, facts: os.stat_result, above: tuple[Any, ...], left: list[str]) -> Iterator[tuple[str, Path]]:
    """Name on the hub and path of the files in a folder, its links followed; what is left out is added to `left`."""
    if any(os.path.samestat(facts, each) for each in above):
        raise UserError(f"{folder} is a link to a folder that it is in itself.", "remove the link.")
    entries = listed(folder)
    if above and not entries:
        left.append(f"{folder} (empty)")
    for path in entries:
        if path.name.startswith(_HIDDEN):
            left.append(f"{path} (hidden)")
            continue
        found = _facts(path)
        if stat.S_ISDIR(found.st_mode):
            yield from _files_below(path, f"{_sendable(inside + path.name, path)}/", found, (*above, facts), left)
        else:
            yield inside + path.name, path


def _facts(path: Path) -> os.stat_result:
    """Of a folder, or of a file that can be read. Raises UserError for all else."""
    with readable(path):
        facts = path.stat()
        if not stat.S_ISDIR(facts.st_mode):
            if not stat.S_ISREG(facts.st_mode):
                raise UserError(f"{path} is a pipe, a socket or a device.", "only files can be sent; move it out of the folder.")
            with open(path, "rb"):
                pass
    return facts


def _sendable(name: str, path: Path) -> str:
    """A name that every system can keep."""
    if not is_safe_name(name):
        raise UserError(f"{shown(path.name)} in {path.parent} has a name that not every system can keep.", "rename it.")
    return name


def _batches(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    batch: list[str] = []
    for name in sizes:
        if batch and (len(batch) >= _COMMIT_FILES or sum(sizes[each] for each in batch) + sizes[name] > _COMMIT_BYTES):
            yield batch
            batch = []
        batch.append(name)
    if batch:
        yield batch


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _top_of(hub: Hub, commit: str) -> str:
    names = sorted({name.partition("/")[0] for name in hub.files("", commit)})
    return f"it has {', '.join(names[:10])}{', …' if len(names) > 10 else ''}." if names else "it is empty."


# --------------------------------------------------------------------------------------------------- trained models


def from_pretrained(
    repository: str, *, model: str, size: str, dataset: str, seed: int = 0, run_id: str | None = None, revision: str = "main"
) -> VisionTransformer:
    """A trained model from the hub, on the CPU in evaluation mode; nothing in its file is executed.

    Args:
        repository: `user/name` or its link. HF_TOKEN is used where it is set.
        seed, run_id: which run, where the repository has several of the cell; run_id goes before seed. Of several, one without overrides.

    Returns:
        The model. Its attribute `facts` has what its file's header says: "classes", "mean" and "std" of the pixels in 0-1, "protocol", …

    Raises:
        UserError: unknown names, no such model there, or a damaged file.
    """
    from diffvit.ledger import load_weights
    from diffvit.protocol import resolve_dataset, resolve_model, resolve_size

    dataset = resolve_dataset(dataset)
    model, size = resolve_model(model), resolve_size(size, dataset)
    hub = Hub(Account(parse_repository(repository), find_token()))
    try:
        commit = hub.head(revision)
    except Exception as error:
        if is_missing(error):
            raise UserError(
                f"there is no repository {hub.repository} that we can see.", "check its name; a private one needs HF_TOKEN."
            ) from None
        raise
    listed = hub.files(model, commit)
    pattern = re.compile(rf"{model}/model_([0-9a-f]+)_{re.escape(size)}_{re.escape(dataset)}\.safetensors")
    runs = {match[1]: file for file in listed.values() if (match := pattern.fullmatch(file.name))}
    chosen = _choose_run(hub, commit, runs, listed, seed, run_id, f"{model} {size} {dataset}")
    file = runs[chosen]
    with _quiet():
        path = Path(hub.call(lambda: hub.api.hf_hub_download(hub.repository, file.name, revision=commit)))
    if file.is_like(path):
        return load_weights(path)[0]
    with tempfile.TemporaryDirectory() as folder:  # the client's cache is damaged
        return load_weights(hub.bring(file, Path(folder), commit))[0]


def _choose_run(
    hub: Hub, commit: str, runs: Mapping[str, HubFile], listed: Mapping[str, HubFile], seed: int, run_id: str | None, cell: str
) -> str:
    if run_id is not None:
        if run_id not in runs:
            raise UserError(f"{hub.repository} has no run {run_id} of {cell}.", f"it has {', '.join(runs) or 'none'}.")
        return run_id
    if not runs:
        raise UserError(f"{hub.repository} has no {cell}.", "its page lists the models it has.")
    if len(runs) == 1:
        return next(iter(runs))
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for each, file in runs.items():
            result = listed.get(file.name.removesuffix(".safetensors") + "_result.json")
            if result and result.size <= LONGEST_RESULT:
                try:
                    content = parse_json(hub.bring(result, Path(folder), commit).read_bytes())
                    results[each] = (content["seed"], bool(content["overrides"]))
                except (ValueError, KeyError, TypeError):
                    continue
    fitting = [each for each, (of, _) in results.items() if of == seed]
    plain = [each for each in fitting if not results[each][1]]
    best = plain if len(plain) == 1 else fitting
    if len(best) != 1:
        raise UserError(
            f"{hub.repository} has {len(runs)} runs of {cell}, and not one of them alone has seed {seed}.",
            f"give run_id: {', '.join(runs)}.",
        )
    return best[0]
