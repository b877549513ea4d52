"""Findings about finished models, by kind, kept beside the run's result."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from diffvit.checks import fault, read_json
from diffvit.errors import UserError
from diffvit.ledger.disk import write_atomically
from diffvit.ledger.files import RunFiles
from diffvit.ledger.results import checksum

_LONGEST_EVALUATIONS = 64 * 1024**2


def read_evaluations(files: RunFiles) -> dict[str, Any]:
    """What was found out about a finished run later: kind ("corruptions", "attention") -> findings. Empty where there is nothing.

    Raises:
        UserError: the file is damaged.
    """
    try:
        content = read_json(files.evaluations, _LONGEST_EVALUATIONS)
        if content["checksum"] != checksum(content):
            raise ValueError("it was changed after it was written")
        return check_findings(content["findings"])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{files.evaluations} is damaged: {error}.", "delete it and evaluate again.") from error


def add_evaluation(files: RunFiles, kind: str, findings: Mapping[str, Any]) -> None:
    """Keep findings about a finished run, in place of older ones of their kind."""
    content = {"run_id": files.run_id, "findings": {**read_evaluations(files), kind: dict(findings)}}
    write_atomically(files.evaluations, (json.dumps({**content, "checksum": checksum(content)}, indent=1) + "\n").encode())


# What else can be found out about a finished model: kind -> "module:function", which takes a checkpoint and how to compute.
KINDS = {"corruptions": "diffvit.findings.robustness:evaluate_corruptions", "attention": "diffvit.findings.attention:evaluate_attention"}


def check_findings(findings: Any) -> dict[str, Any]:
    """What was kept of a run, if each kind's module takes it for its own (by its wrong_findings). Raises ValueError."""
    if not isinstance(findings, dict) or not set(findings) <= set(KINDS):
        raise ValueError("it has findings of no kind that is known")
    for kind, found in findings.items():
        if wrong := fault(importlib.import_module(KINDS[kind].partition(":")[0]).wrong_findings, found):
            raise ValueError(f"of the {kind}, {wrong}")
    return findings


def findings_of(
    files: RunFiles, kinds: Sequence[str], *, again: bool = False, limit: int | None = None, **how: Any
) -> dict[str, dict[str, Any]]:
    """Findings of some kinds about a finished run. They are kept in the ledger, and are not found out twice.

    Args:
        again: find out even what is known.
        limit: the first so many test images only; findings about a part are not kept.
        how: data_root, batch_size, device, on_progress, as the kinds' functions take them.

    Raises:
        UserError: the checkpoint, the data or what is kept are missing or damaged.
    """
    kept = read_evaluations(files)  # also where it is not used: what is damaged shall be known before the work
    known = {} if again or limit is not None else kept
    if limit is not None:
        how["limit"] = limit
    found = {}
    for kind in kinds:
        if kind not in known:
            module, _, name = KINDS[kind].partition(":")
            known[kind] = getattr(importlib.import_module(module), name)(files.weights, **how)
            if limit is None:
                add_evaluation(files, kind, known[kind])
        found[kind] = known[kind]
    return found
