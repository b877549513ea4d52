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


# Kind of findings -> "module:function", which takes a checkpoint and how to compute. The module says their VERSION and checks them.
KINDS = {"corruptions": "diffvit.findings.robustness:evaluate_corruptions", "attention": "diffvit.findings.attention:evaluate_attention"}


def read_evaluations(files: RunFiles) -> dict[str, Any]:
    """Findings about a finished run: kind -> findings. Those of another version are left out (see outdated).

    Raises:
        UserError: the file is damaged.
    """
    return {kind: findings for kind, findings in _read(files).items() if not _is_outdated(kind, findings)}


def outdated(files: RunFiles) -> list[str]:
    """The kinds of findings that another version of this program made: they are not compared with today's. Raises UserError."""
    return [kind for kind, findings in _read(files).items() if _is_outdated(kind, findings)]


def _read(files: RunFiles) -> dict[str, Any]:
    try:
        content = read_json(files.evaluations, _LONGEST_EVALUATIONS)
        if content["checksum"] != checksum(content):
            raise ValueError("it was changed after it was written")
        return _check(content["findings"])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{files.evaluations} is damaged: {error}.", "delete it and evaluate again.") from error


def _check(findings: Any) -> dict[str, Any]:
    """Findings that each kind's module takes for its own (by its wrong_findings), or of another version. Raises ValueError."""
    if not isinstance(findings, dict) or not set(findings) <= set(KINDS):
        raise ValueError("it has findings of no kind that is known")
    for kind, found in findings.items():
        if not _is_outdated(kind, found) and (wrong := fault(_module(kind).wrong_findings, found)):
            raise ValueError(f"of the {kind}, {wrong}")
    return findings


def _is_outdated(kind: str, findings: Any) -> bool:
    version = findings.get("version", 1) if isinstance(findings, dict) else None
    return type(version) is int and version != _module(kind).VERSION


def _module(kind: str) -> Any:
    return importlib.import_module(KINDS[kind].partition(":")[0])


def add_evaluation(files: RunFiles, kind: str, findings: Mapping[str, Any]) -> None:
    """Keep findings about a finished run, in place of older ones of their kind."""
    content = {"run_id": files.run_id, "findings": {**_read(files), kind: dict(findings)}}
    write_atomically(files.evaluations, (json.dumps({**content, "checksum": checksum(content)}, indent=1) + "\n").encode())


def findings_of(
    files: RunFiles, kinds: Sequence[str], *, again: bool = False, limit: int | None = None, **how: Any
) -> dict[str, dict[str, Any]]:
    """Findings of some kinds about a finished run, from the ledger where it has them; new ones are kept there.

    Args:
        again: evaluate even what is known.
        limit: the first so many test images only; findings about a part are not kept.
        how: data_root, batch_size, device, on_progress, as the kinds' functions take them.

    Raises:
        UserError: the checkpoint, the data or what is kept are missing or damaged.
    """
    kept = read_evaluations(files)  # also where it is not used: a damaged file ends the command before the work
    known = {} if again or limit is not None else kept
    if limit is not None:
        how["limit"] = limit
    findings = {}
    for kind in kinds:
        if kind not in known:
            known[kind] = getattr(_module(kind), KINDS[kind].partition(":")[2])(files.weights, **how)
            if limit is None:
                add_evaluation(files, kind, known[kind])
        findings[kind] = known[kind]
    return findings
