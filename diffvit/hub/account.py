"""Which repository on the hub, and the token for it: from the environment or .env."""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from diffvit.checks import read_text
from diffvit.errors import UserError, redacted, shown

_LONGEST_ENV = 100_000


@dataclass(frozen=True)
class Account:
    """A repository on the hub, `user/name`, and the token for it; None for a public one."""

    repository: str
    token: str | None = field(default=None, repr=False)


def find_account() -> Account:
    """HF_REPOSITORY and HF_TOKEN, from the environment or, where that has not, from .env in the working directory.

    Raises:
        UserError: one is missing or not in its form.
    """
    settings = {name: _setting(name) for name in ("HF_TOKEN", "HF_REPOSITORY")}
    missing = [name for name, value in settings.items() if not value]
    if missing:
        raise UserError(
            f"the hub needs {' and '.join(missing)}, and neither the environment nor .env has {'it' if len(missing) == 1 else 'them'}.",
            "write them into .env (see .env.example).",
        )
    return Account(parse_repository(settings["HF_REPOSITORY"]), find_token())


def find_token() -> str | None:
    """HF_TOKEN from the environment or .env; None where it is in neither. Raises UserError for one that is not in its form."""
    token = _setting("HF_TOKEN")
    if token and not re.fullmatch(r"[\x21-\x7e]{1,1000}", token):
        raise UserError("HF_TOKEN is not a token: it has a space or a special character.", "copy it again; it is one word.")
    return token or None


def find_repository() -> str | None:
    """HF_REPOSITORY as user/name, from the environment or .env; None where it is in neither. Raises UserError as parse_repository."""
    given = _setting("HF_REPOSITORY")
    return parse_repository(given) if given else None


def _setting(name: str) -> str:
    if setting := os.environ.get(name):
        return setting.strip()
    setting, near = "", None
    try:
        for line, key, value, whole in _env_lines():
            if key == name and not whole:
                raise UserError(f"line {line} of .env, which is for {name}, cannot be read.", "write it as .env.example shows.")
            if key == name and value and setting and value != setting:
                raise UserError(f".env has {name} a second time in line {line}, with another value.", "remove one of the two.")
            if key == name:
                setting = setting or value
            elif _is_misspelt(key, name):
                raise UserError(f".env has {shown(key)} in line {line}, which nothing reads.", f"did you mean {name}?")
            elif re.fullmatch(_ALIASES[name], key):
                near = near or key
    except (OSError, ValueError) as error:
        raise UserError(f"the file .env cannot be read: {error}.", "write it as plain text in UTF-8 (see .env.example).") from None
    if near and not setting:
        raise UserError(f".env has {shown(near)}, which is not read here, and no {name}.", f"did you mean {name}?")
    return setting


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


# Settings that diffvit reads from the environment only, and the names of those that libraries read there.
_OWN_SETTINGS = ("DIFFVIT_CACHE", "DIFFVIT_COMMIT", "DIFFVIT_DATA", "DIFFVIT_STORAGE")
_OF_LIBRARIES = re.compile(
    r"(AWS|AZURE|CUDA|FSSPEC|MLFLOW|RAY|WANDB)_\w+|GOOGLE_(APPLICATION|CLOUD)_\w+|HF_(HOME|ENDPOINT|(HUB|DATASETS|XET)_\w+)|\w+_PROXY"
)


def check_env_file(on_warning: Callable[[str], None] = lambda text: None) -> None:
    """Check the names in .env that are not in the environment too.

    A file that cannot be read is not an error here: it may be another tool's.

    Args:
        on_warning: called with a sentence for each setting of a library, which only the environment can carry.

    Raises:
        UserError: a misspelt setting, or a DIFFVIT_ one, which is read from the environment only.
    """
    with contextlib.suppress(OSError, ValueError):
        for line, key, _, _ in _env_lines():
            if os.environ.get(key):
                continue
            says = f".env has {shown(key)} in line {line}, which"
            if key.upper().startswith("DIFFVIT_"):
                raise UserError(f"{says} is read from the environment only.", f"export {key} in the shell.")
            if name := next((name for name in _ALIASES if key != name and _is_misspelt(key, name) and not os.environ.get(name)), None):
                raise UserError(f"{says} nothing reads.", f"did you mean {name}?")
            if near := difflib.get_close_matches(key.upper(), _OWN_SETTINGS, n=1, cutoff=0.85):
                raise UserError(
                    f"{says} nothing reads.", f"did you mean {near[0]}? It is read from the environment: export it in the shell."
                )
            if _OF_LIBRARIES.fullmatch(key.upper()) and not any(re.fullmatch(alias, key.upper()) for alias in _ALIASES.values()):
                on_warning(f"{says} is read from the environment only: export {key} in the shell")


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
