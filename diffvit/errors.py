"""What a user can put right: a sentence, and what to do next."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. The command line prints it as `error: …` and `hint: …` and exits with `exit_code`.

    Args:
        message: one sentence that says what is wrong.
        hint: one sentence that says what to do about it.
    """

    exit_code = 2

    def __init__(self, message: str, hint: str):
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self):
        # Exceptions are rebuilt from their args when they cross processes; ours has two.
        return (type(self), (self.message, self.hint))

    def __str__(self) -> str:
        return f"{self.message} (hint: {self.hint})"


class StorageError(UserError):
    """A place for files failed in the middle of the work: a full disk, a storage that does not answer. Trying again may help."""

    exit_code = 1


class RunIsBusyError(UserError):
    """Another process, here or on another machine, trains this run."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not in a list, with the nearest ones first."""
    known = list(known)
    near = difflib.get_close_matches(name[:100], known, n=1, cutoff=0.5) if isinstance(name, str) else []
    listed = ", ".join(known)
    hint = f"did you mean {near[0]}? Known: {listed}." if near else f"known: {listed}."
    return UserError(f"there is no {kind} named {shown(name)}.", hint)


_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 100
_short.maxlevel = 3


def shown(value: object) -> str:
    """A value that somebody gave, for a message: on one line and never long, however long or deeply nested the value is."""
    try:
        text = _short.repr(value)
    except ValueError:  # Python writes no number of more than 4300 digits
        return "a number of very many digits"
    return text if len(text) <= 200 else text[:199] + "…"
