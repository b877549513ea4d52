"""Results of ended runs: written once, read within bounds and held against a schema.

A run ends "done", or "diverged" where a loss or gradient was not a number: then there are only a log and a result.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffvit.checks import (
    HEX,
    NAME,
    any_of,
    dict_of,
    fault,
    list_of,
    maybe,
    one_of,
    read_json,
    real,
    record,
    text,
    whole,
)
from diffvit.errors import UserError
from diffvit.ledger.disk import readable, write_atomically
from diffvit.ledger.files import RunFiles, files_of_result, result_paths
from diffvit.ledger.spec import PRECISIONS


def write_result(files: RunFiles, result: Mapping[str, Any]) -> None:
    """Marks a run as ended: everything else is on disk when this is called."""
    write_atomically(files.result, (json.dumps({**result, "checksum": checksum(result)}, indent=1) + "\n").encode())


def checksum(result: Mapping[str, Any]) -> str:
    """SHA-256 over a result's content, its own checksum left out."""
    text = json.dumps({key: value for key, value in result.items() if key != "checksum"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


# A result is a few kilobytes, findings are below a megabyte.
LONGEST_RESULT = 4 * 1024**2

_NAMED = {"model": text(NAME), "size": text(NAME), "dataset": text(NAME)}
_VALUE = any_of(one_of(None, True, False), real(), text())
_IDENTITY = record({**_NAMED, "semantics": whole(), "fingerprint": text(), "protocol": dict_of(text(NAME), _VALUE, 100)})
_LOSS = real(infinite=True)  # a model can be lost between its last step and its test
_SHARE = real(0, 1)

# What tables, figures, the report and messages read of a result, which they trust.
_RESULT = record(
    {
        **_NAMED, "run_id": text(NAME), "seed": whole(0, 2**63 - 1), "status": one_of("done", "diverged"), "identity": _IDENTITY,
        "overrides": dict_of(text(NAME), real(0, 1e9), 100), "versions": dict_of(text(NAME), text(), 100),
        "notes": list_of(text(longest=10_000)), "finished": text(), "test_accuracy": maybe(_SHARE), "sha256": dict_of(text(), text(HEX), 3),
        "parameters": whole(1, 2**50), "steps": whole(1, 2**50), "images": whole(1), "seconds": real(0, 1e12),
        "images_per_second": real(0, 1e12),
    },
    {
        "precision": one_of(*PRECISIONS), "depth": whole(1, 1000), "forward_flops": whole(1), "train_loss": maybe(_LOSS),
        "val_loss_last_batch": maybe(_LOSS), "val_loss": maybe(_LOSS), "val_accuracy": maybe(_SHARE), "test_loss": maybe(_LOSS),
        "test_images": maybe(whole(1, 10**8)), "false_labels": maybe(whole()), "memorised": maybe(_SHARE), "recovered": maybe(_SHARE),
        "device": text(), "device_name": text(), "threads": whole(), "workers": whole(), "micro_batch": whole(), "attention": text(),
        **dict.fromkeys(("fused", "graphs", "compiled", "recompute", "deterministic"), one_of(True, False)),
        "git_commit": maybe(text()), "started": text(),
        "diverged": record({"step": whole(), "message": text(longest=10_000)}),
    },
)  # fmt: skip
_MEASURED = ("train_loss", "val_loss", "val_accuracy", "test_loss", "test_accuracy", "test_images")


def read_result(path: Path) -> dict[str, Any] | None:
    """A result file's content, or None where it is missing. What it has is of the types and within the bounds of _RESULT.

    Its names are plain ones, and those of its files are the run's own: they can be used as paths.

    Raises:
        UserError: it is damaged or cannot be read, or is a link that leads nowhere.
    """
    try:
        with readable(path):
            result = read_json(path, LONGEST_RESULT)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}.", "delete it, and the same command trains the run again.") from error
    if isinstance(result, dict):
        result.setdefault("status", "done")  # results of versions that knew no other end
    if wrong := fault(_RESULT, result) or _disagreement(result):
        raise UserError(f"{path} is not a result of diffvit: {wrong}.", "move it out of the checkpoints folder.")
    return result


def _disagreement(result: Mapping[str, Any]) -> str | None:
    """What does not go together in a result whose values are each as they should be."""
    files = files_of_result(Path(), result)
    for name in ("model", "size", "dataset"):
        if result[name] != result["identity"][name]:
            return f"it has another {name} in its identity"
    if not set(result["sha256"]) <= {files.weights.name, files.log.name, files.predictions.name}:
        return "it names files that are not its own"
    if result["status"] == "done" and any(result.get(name) is None for name in _MEASURED):
        return "it is done and was not measured"
    return None


def read_results(checkpoints: Path) -> list[dict[str, Any]]:
    """All ended runs under a checkpoints folder, in order of path. Raises UserError for a damaged one, or one under another's name."""
    results = []
    for path in result_paths(checkpoints):
        if (result := read_result(path)) is not None:
            if files_of_result(Path(checkpoints), result).result != path:
                raise UserError(f"{path} has the result of another run.", "move it out of the checkpoints folder.")
            results.append(result)
    return results
