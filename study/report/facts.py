"""Answers for programs: what JSON has of a verdict."""

from __future__ import annotations

import math
from typing import Any

from study.report.sentences import sentence
from study.report.verdict import Answer


def answer_facts(answer: Answer) -> dict[str, Any]:
    """The answer's names, numbers and sentence; None for what is not known.

    `change` and `interval` are relative: -0.02 is an error 2 % lower, for the question of noise the odds of one.
    """
    low, high = answer.estimate.interval_at(answer.alpha)
    return {
        "question": answer.question, "subject": answer.subject, "arms": list(answer.arms), "verdict": answer.verdict,
        "change": _relative(answer.estimate.value), "interval": [_relative(low), _relative(high)] if answer.estimate.known else None,
        "p": _known(answer.p_holm), "pairs": answer.pairs, "seeds": answer.seeds, "sentence": sentence(answer),
    }  # fmt: skip


def _relative(log_ratio: Any) -> float | None:
    return _known(math.expm1(log_ratio))


def _known(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None
