"""Re-reads every file of a run and names what is damaged."""

from __future__ import annotations

from pathlib import Path

from diffvit.errors import UserError
from diffvit.findings.kept import read_evaluations
from diffvit.ledger.disk import file_sha256
from diffvit.ledger.files import RunFiles
from diffvit.ledger.log import read_rows
from diffvit.ledger.results import Result, read_result, was_changed
from diffvit.ledger.spec import hash_of_identity
from diffvit.ledger.weights import load_weights
from diffvit.user_models import UntrustedError


def verify_run(path: Path) -> list[str]:
    """Re-reads all files of an ended run and returns what is wrong with them, a sentence each.

    Checked are the result's own checksum, the SHA-256 of every file, the run_id against what it is a hash of, the weights' header and
    shapes against the result, and the steps in the log.

    Args:
        path: the run's result file.
    """
    try:
        result = read_result(path)
    except UserError as error:
        return [error.message]
    if result is None:
        return [f"{path} is gone."]
    files = result.files(path.parent.parent)
    wrong = []
    if files.result != path:
        wrong.append(f"{path} has the result of another run, {files.result.name}.")
    if was_changed(path):
        wrong.append(f"{path} was changed after it was written.")
    if result.run_id != hash_of_identity(result.identity):
        wrong.append(f"{path} has a run_id that does not belong to its identity.")
    for name, expected in result.sha256.items():
        file = path.parent / name
        if not file.is_file():
            wrong.append(f"{file} is missing.")
        elif file_sha256(file) != expected:
            wrong.append(f"{file} was changed after it was written.")
    try:
        read_evaluations(files)
    except UserError as error:
        wrong.append(error.message)
    if not wrong:
        wrong += [*_verify_log(files, result), *(_verify_weights(files, result) if result.status == "done" else [])]
    return wrong


def _verify_log(files: RunFiles, result: Result) -> list[str]:

    try:
        read_rows(files.log, result.steps)
    except UserError as error:
        return [error.message]
    return []


def _verify_weights(files: RunFiles, result: Result) -> list[str]:
    try:
        model, facts = load_weights(files.weights)
    except UntrustedError:  # its hash is that of the result, and its model cannot be built here
        return []
    except UserError as error:
        return [error.message]
    wrong = [key for key in ("run_id", "model", "size", "dataset", "seed", "precision") if facts[key] != getattr(result, key)]
    if facts["fingerprint"] != result.identity["fingerprint"]:
        wrong.append("fingerprint")
    if model.count_parameters() != result.parameters:
        wrong.append("parameters")
    return [f"{files.weights} and the result differ in {', '.join(wrong)}."] if wrong else []
