"""The user's cache folder, and JSON files in it that keep measurements. What cannot be read is measured again."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffvit.ledger.disk import write_atomically


def cache_folder() -> Path:
    """The folder of decoded images and measurements: $DIFFVIT_CACHE, or diffvit in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(os.environ.get("DIFFVIT_CACHE") or Path(base) / "diffvit"))


def read_cache(path: Path) -> dict[str, Any]:
    """The content of a cache file by key; empty where the file is missing or cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def recall(path: Path, key: str) -> dict[str, float]:
    """The numbers that a cache file has under a key, without impossible ones, such as negative times."""
    try:
        values = {name: float(value) for name, value in read_cache(path)[key].items()}
    except (ValueError, KeyError, AttributeError, TypeError):
        return {}
    return {name: value for name, value in values.items() if 0 <= value < math.inf}


def remember(path: Path, key: str, values: Mapping[str, Any]) -> OSError | None:
    """Add to a cache file; start anew where it is no JSON. Returns the error if the file, perhaps another user's, cannot be changed."""
    known = None
    try:
        with contextlib.suppress(FileNotFoundError, ValueError):
            known = json.loads(path.read_text(encoding="utf-8"))
        write_atomically(path, (json.dumps({**(known if isinstance(known, dict) else {}), key: values}, indent=1) + "\n").encode())
    except OSError as error:
        return error
    return None
