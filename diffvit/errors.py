"""Errors with a sentence for the user and a hint what to do next; secrets are redacted."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable

# What looks like a secret: the userinfo of an address, with a scheme or without (git's own is none); a token of the hub (in a path
# only a long one: folders may be called hf_…) or of another service; what is given under the name of one.
_SECRETS = [
    re.compile(pattern)
    for pattern in (
        r"(?<=://)(?!git@)(?:[^\s/:@]*:\S*|[^\s/]*)(?=@)",
        r"(?<![\w/:.+%-])[\w.+%-]+:[^\s/:@'\"]+(?=@[\w.-])",
        r"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{20,}",
        r"(?<![A-Za-z0-9/])hf_(?!(?:tokens?|repo\w*|cache|home|hub\w*|transfer|xet|data\w*|models?|dir|path|endpoint)\b)\w+",
        r"(?<![A-Za-z0-9])(?:(?:api_org_|gh[pousr]_|github_pat_|sk-)\w{10,}|(?:AKIA|ASIA)[A-Z0-9]{8,}|AIza[\w-]{20,})",
        r"(?i)(?<=bearer )[^\s'\"]+",
        r"(?i)(?<=[?&;])(?P<name>(?:sig|key|pwd)=)[^\s&;,'\"]+",
        r"(?i)(?P<name>(?:token|secret|passw(?:or)?d|signature|credential|(?:access|account|api)[_-]?key)[\w.-]*=)[^\s&;,'\"]+",
    )
]
HIDDEN = "***"


def redacted(text: str, *secrets: str | None) -> str:
    """The text with *** in place of these secrets and of whatever looks like one. All output goes through it."""
    for secret in filter(None, secrets):
        text = text.replace(secret, HIDDEN)
    for pattern in _SECRETS:
        text = pattern.sub(lambda found: found.groupdict().get("name", "") + HIDDEN, text)
    return text


class DiffvitError(Exception):
    """The base of diffvit's errors: the command line prints `error: …` and `hint: …`. It shows no secrets.

    Args:
        message: one sentence that says what is wrong.
        hint: one sentence that says what to do about it.

    Attributes:
        exit_code: what the command line exits with.
    """

    exit_code = 2

    def __init__(self, message: str, hint: str):
        self.message, self.hint = redacted(message), redacted(hint)
        super().__init__(self.message)

    def __reduce__(self):
        # Exceptions are rebuilt from their args when they cross processes; ours has two.
        return (type(self), (self.message, self.hint))

    def __str__(self) -> str:
        return f"{self.message} (hint: {self.hint})"


class UserError(DiffvitError):
    """Bad input."""


class StorageError(DiffvitError):
    """A disk or storage failed during the work: it is full, or does not answer. A retry may help."""

    exit_code = 1


class RunIsBusyError(DiffvitError):
    """Another process, here or on another machine, trains this run."""


def first_line(error: BaseException) -> str:
    """The first non-empty line of an error's text, at most 300 characters of it; its class name where there is none."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= 300 else f"{line[:300]} …"


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not in a list, with the nearest ones first."""
    known = list(known)
    near = difflib.get_close_matches(name[:100], known, n=1, cutoff=0.5) if isinstance(name, str) else []
    listed = ", ".join(known)
    hint = f"did you mean {near[0]}? Known: {listed}." if near else f"known: {listed}."
    return UserError(f"there is no {kind} named {shown(name)}.", hint)


class _Short(reprlib.Repr):
    maxstring = maxother = maxlong = 100
    maxlevel = 3

    def repr_str(self, x: str, level: int) -> str:
        return super().repr_str(redacted(x), level)  # before it is cut: a part of a secret does not look like one


_short = _Short()


def shown(value: object) -> str:
    """A value for a message: on one line, without secrets, at most 200 characters, however long or deeply nested it is."""
    try:
        text = redacted(_short.repr(value))
    except ValueError:  # Python writes no number of more than 4300 digits
        return "a number of very many digits"
    return text if len(text) <= 200 else text[:199] + "…"
