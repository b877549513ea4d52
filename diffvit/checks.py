"""Parsing and validation of untrusted files: bounded reads, and schemas that are checked before anything uses a value.

A check is a function that returns None for a valid value, and otherwise what is wrong and where: "steps is -1".
"""

from __future__ import annotations

import codecs
import contextlib
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffvit.errors import UserError, shown

Check = Callable[[Any], str | None]

_LARGEST = 1e300
_DEEPEST = 50

# A part of a file's name, and text that can be printed and encoded: no control characters, and no halves of surrogate pairs.
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
HEX = r"[0-9a-f]{64}"
_TEXT = r"[^\x00-\x1f\x7f-\x9f\ud800-\udfff]*"


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError, also for one that is nested too deeply."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    check_depth(value, _DEEPEST)
    return value


def read_json(path: Path, most: int) -> Any:
    """The value of a JSON file of at most `most` bytes. Raises ValueError or OSError."""
    return parse_json(read_bytes(path, most))


def read_bytes(path: Path, most: int) -> bytes:
    """A file's content. Raises ValueError where it is longer than `most` bytes, without reading the rest."""
    with open(path, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it is longer than {most:,} bytes")
    return content


# Byte order marks of other encodings; UTF-32 before UTF-16, whose mark begins UTF-32's.
_OTHER_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip


def read_text(path: Path, most: int) -> str:
    """The text of a file in UTF-8, with or without a mark at its beginning. Raises ValueError or OSError."""
    content = read_bytes(path, most)
    for mark, encoding in _OTHER_ENCODINGS.items():
        if content.startswith(mark):
            raise ValueError(f"it is in {encoding} and must be in UTF-8")
    if b"\0" in content:
        raise ValueError("it has null bytes, as UTF-16 has, and must be text in UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line} is not in UTF-8, but perhaps in Latin-1 or Windows-1252") from None


def usable_path(given: str | Path) -> Path:
    """A user's path with ~ expanded; the file or folder may be missing.

    Raises:
        UserError: the path is a broken link, cannot be accessed, or has a name that cannot be printed.
    """
    try:
        if not str(given).isprintable():
            raise ValueError("it has characters that cannot be printed")
        path = Path(given).expanduser()
        with contextlib.suppress(FileNotFoundError):
            if not path.exists() and path.is_symlink():
                raise ValueError(f"it is a link to {shown(str(path.readlink()))}, which is not there or is a link to itself")
            path.stat()
        return path
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).rstrip(".")
        raise UserError(f"{shown(str(given))} cannot be read and cannot be written: {reason}.", "give another path.") from None


def check_depth(value: Any, deepest: int) -> None:
    """Raises ValueError for lists and dicts nested deeper than `deepest`: printing or comparing them would fail."""
    level = [value]
    for _ in range(deepest + 1):
        inside = [each for each in level if isinstance(each, (list, dict))]
        if not inside:
            return
        level = [each for container in inside for each in (container.values() if isinstance(container, dict) else container)]
    raise ValueError("it is nested too deeply")


# ---------------------------------------------------------------------------------------------------------- checks


def fault(check: Check, value: Any) -> str | None:
    """What is wrong with a value as a sentence's end, such as "its steps is -1"; None where nothing is."""
    wrong = check(value)
    return wrong and (f"its {wrong[1:]}" if wrong.startswith(".") else f"it{wrong}")


def _leaf(fits: Callable[[Any], bool]) -> Check:
    return lambda value: None if fits(value) else f" is {shown(value)}"


def whole(low: int = 0, high: int = 2**53) -> Check:
    """A whole number."""
    return _leaf(lambda value: type(value) is int and low <= value <= high)


def real(low: float = -_LARGEST, high: float = _LARGEST, infinite: bool = False) -> Check:
    """A number; with `infinite`, also NaN and infinity."""
    fits = _leaf(lambda value: type(value) in (int, float) and low <= value <= high)
    return any_of(fits, _leaf(lambda value: type(value) is float and not math.isfinite(value))) if infinite else fits


def text(pattern: str = _TEXT, longest: int = 1000) -> Check:
    """Text that fits the pattern."""
    return _leaf(lambda value: isinstance(value, str) and len(value) <= longest and re.fullmatch(pattern, value) is not None)


def one_of(*values: Any) -> Check:
    """One of these, of the same type."""
    return _leaf(lambda value: any(type(value) is type(each) and value == each for each in values))


def maybe(check: Check) -> Check:
    """None, or a value that passes the check."""
    return lambda value: None if value is None else check(value)


def any_of(*checks: Check) -> Check:
    """A value that passes one of the checks."""
    return _leaf(lambda value: any(check(value) is None for check in checks))


def list_of(check: Check, fewest: int = 0, most: int = 10_000) -> Check:
    """A list of `fewest` to `most` entries that pass the check."""

    def wrong(value: Any) -> str | None:
        if not isinstance(value, list) or not fewest <= len(value) <= most:
            return f" is {shown(value)}"
        return next((f"[{i}]{wrong_at}" for i, each in enumerate(value) if (wrong_at := check(each))), None)

    return wrong


def dict_of(key: Check, check: Check, most: int = 1000) -> Check:
    """A dict whose keys and values pass the checks."""

    def wrong(value: Any) -> str | None:
        if not isinstance(value, dict) or len(value) > most:
            return f" is {shown(value)}"
        for name, each in value.items():
            if key(name):
                return f" has the name {shown(name)}"
            if wrong_at := check(each):
                return f".{name}{wrong_at}"
        return None

    return wrong


def record(required: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    """A dict with required and optional keys; others are ignored."""

    def wrong(value: Any) -> str | None:
        if not isinstance(value, dict):
            return f" is {shown(value)}"
        for name, check in {**(optional or {}), **required}.items():
            if name in value:
                if wrong_at := check(value[name]):
                    return f".{name}{wrong_at}"
            elif name in required:
                return f" has no {name}"
        return None

    return wrong
