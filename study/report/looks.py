"""How often each question was looked at: a file beside the report, so that a report read after every new seed pays for it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffvit.errors import UserError
from diffvit.ledger.disk import write_atomically
from diffvit.protocol import ARMS
from study.report.verdict import Answer

_HINT = "put back the file as the report wrote it; without it, the report does not know how often its questions were looked at."


def count_looks(path: Path, answers: Sequence[Answer]) -> list[Answer]:
    """The answers with the number of their looks, which the file keeps: for each question the runs and pairs of every look so far.

    The same runs are the same look, however often the report is written. Where no verdict is possible, without an interval or with an
    answer that is blocked, no look counts.

    Raises:
        UserError: a damaged file.
    """
    looks = _read(path)
    before = json.dumps(looks)
    counted = []
    for answer in answers:
        if answer.blocked or not answer.estimate.known:
            counted.append(answer)
            continue
        # What "with noise" means may change from report to report; that is another look at the same question.
        question = "noise" if answer.question == "noise" else f"{answer.question} on {answer.subject}"
        # Another architecture, or another version of one, is another question; the same two the other way round are not.
        names = [question if arms == ARMS else f"{question} of {' and '.join(arms)}" for arms in (answer.arms, answer.arms[::-1])]
        of_question = looks.setdefault(next((name for name in names if name in looks), names[0]), [])
        runs = hashlib.sha256(" ".join(sorted(answer.runs)).encode()).hexdigest()[:16]
        if runs not in [look["runs"] for look in of_question]:
            of_question.append({"runs": runs, "pairs": answer.pairs, "seeds": answer.seeds})
        number = [look["runs"] for look in of_question].index(runs) + 1
        counted.append(dataclasses.replace(answer, look=number))
    if json.dumps(looks) != before:
        write_atomically(path, (json.dumps(looks, indent=1) + "\n").encode())
    return counted


def _read(path: Path) -> dict[str, list[dict[str, Any]]]:
    if not path.is_file():
        return {}
    try:
        looks = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(look["runs"], str) for of_question in looks.values() for look in of_question):
            raise ValueError
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is damaged.", _HINT) from error
    return looks
