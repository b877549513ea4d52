"""The verdict for a terminal: a line a question, and what its numbers mean."""

from __future__ import annotations

import math
from collections.abc import Sequence

from diffvit.protocol import model_title
from study.report.sentences import beside_the_number, between, level_of_intervals, p_value, percent
from study.report.verdict import Answer
from study.text import columns

_QUESTIONS = {"level": "lower error", "trend": "better scaling", "noise": "less lost by noise"}
_MEANING = {
    "level": "lower error: over all sizes",
    "trend": "better scaling: how that changes from the smallest to the largest size",
    "noise": "less lost by noise: how noise changes it, in odds of an error",
}


def brief(answers: Sequence[Answer]) -> str:
    """A family's answers as a table, by architecture and data set. The page has them in sentences."""
    known = any(answer.estimate.known for answer in answers)
    rows = [("  question", "verdict", "difference", *(("p", level_of_intervals(answers)) if known else ("no effect gives",)))]
    header, *lines = columns([*rows, *(_row(answer, known) for answer in answers)], right=(2,)).split("\n")
    text: list[str] = []
    above: tuple[str, ...] = ()
    for answer, line in zip(answers, lines, strict=True):
        first, second = map(model_title, answer.arms)
        if above[:1] != (second,):
            text += [f"{second} against {first}: negative numbers favour {second}", header]
        if above != (second, answer.subject):
            text.append(f"{answer.subject}:")
        above = (second, answer.subject)
        text.append(line)
    several = len({answer.arms for answer in answers}) > 1
    return "\n".join([*text, *_legend(answers), *(_noted(answer, said, several) for answer in answers if (said := _said(answer, known)))])


def _row(answer: Answer, known: bool) -> tuple[str, ...]:
    """A line of the table. `known`: whether any answer has an interval."""
    value = "" if math.isnan(answer.estimate.value) else percent(answer.estimate.value)
    start = f"  {_QUESTIONS[answer.question]}", answer.verdict.partition(":")[0], value
    if not known:
        return *start, _no_effect(answer)
    p = "" if math.isnan(answer.p_holm) else p_value(answer.p_holm).removeprefix("= ")
    return *start, p, between(answer.estimate.interval_at(answer.alpha)) if answer.estimate.known else "none"


def _no_effect(answer: Answer) -> str:
    """What no effect at all would produce, as far as that is known."""
    return "" if math.isnan(answer.null_half) else between((-answer.null_half, answer.null_half))


def _legend(answers: Sequence[Answer]) -> list[str]:
    """What the questions and columns mean."""
    asked = dict.fromkeys(answer.question for answer in answers)
    lines = [f"({'; '.join(_MEANING[question] for question in asked)})"]
    if any(answer.verdict == "undecided" for answer in answers):
        lines.append("(undecided: the page says what would have been found)")
    known = [answer for answer in answers if answer.estimate.known]
    questions = max((answer.questions for answer in known), default=1)
    corrections = [f"Holm's correction over {questions} questions"] if questions > 1 else []
    corrections += ["that for a later look"] if any(answer.look > 1 for answer in known) else []
    if corrections:
        lines.append(f"(p: after {' and '.join(corrections)})")
    for source in dict.fromkeys(answer.null_source for answer in answers if not answer.estimate.known and answer.null_source):
        lines.append(f"(no effect gives: what chance alone would produce, {source})")
    return lines


def _said(answer: Answer, known: bool) -> list[str]:
    """What else decides how to take an answer."""
    no_effect = "" if answer.estimate.known or not known else _no_effect(answer)
    return [*([f"No effect gives {no_effect}."] if no_effect else []), *beside_the_number(answer)]


def _noted(answer: Answer, said: Sequence[str], several: bool) -> str:
    whom = f"{model_title(answer.arms[1])} on " if several else ""
    return f"{whom}{answer.subject}, {_QUESTIONS[answer.question]}: {' '.join(said)}"
