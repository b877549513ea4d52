"""The verdict for a terminal: a line a question, and what its numbers mean."""

from __future__ import annotations

import math
from collections.abc import Sequence

from diffvit.protocol import model_title
from study.report.sentences import between, level_of_intervals, notes, p_value, percent
from study.report.verdict import Answer
from study.text import columns

_QUESTIONS = {"level": "lower error", "trend": "better scaling", "noise": "less lost by noise"}
_MEANING = {
    "level": "lower error: over all sizes",
    "trend": "better scaling: how that changes from the smallest to the largest size",
    "noise": "less lost by noise: how noise changes it, in odds of an error",
}


def brief(answers: Sequence[Answer]) -> str:
    """A family's answers as a table, by architecture and data set; empty where there are none. The page has them in sentences."""
    if not answers:
        return ""
    known = any(answer.estimate.known for answer in answers)
    rows = [("  question", "verdict", "difference", *(("p", level_of_intervals(answers)) if known else ("no effect gives",)))]
    header, *lines = columns([*rows, *(_row(answer, known) for answer in answers)], right=(2,)).split("\n")
    text: list[str] = []
    above: tuple[str, ...] = ()
    for answer, line in zip(answers, lines, strict=True):
        first, second = map(model_title, answer.arms)
        if above[:1] != (second,):
            text += ["", f"{second} against {first}: negative numbers favour {second}", header]
        if above != (second, answer.subject):
            text.append(f"{answer.subject}:")
        above = (second, answer.subject)
        text.append(line)
    return "\n".join([*text[1:], *_legend(answers), *filter(None, map(_noted, answers))])


def _legend(answers: Sequence[Answer]) -> list[str]:
    """What the questions and columns mean."""
    asked = dict.fromkeys(answer.question for answer in answers)
    lines = [f"({'; '.join(_MEANING[question] for question in asked)})"]
    if any(answer.estimate.known for answer in answers):
        lines.append(f"(p: after Holm's correction over {max(answer.questions for answer in answers)} questions)")
    for source in dict.fromkeys(answer.null_source for answer in answers if not answer.estimate.known and answer.null_source):
        lines.append(f"(no effect gives: what chance alone would produce, {source})")
    return lines


def _row(answer: Answer, known: bool) -> tuple[str, ...]:
    """A line of the table. `known`: whether any answer has an interval."""
    start = f"  {_QUESTIONS[answer.question]}", answer.verdict, "" if math.isnan(answer.estimate.value) else percent(answer.estimate.value)
    no_effect = "" if math.isnan(answer.null_half) else between((-answer.null_half, answer.null_half))
    if not known:
        return *start, no_effect
    p = "" if math.isnan(answer.p_holm) else p_value(answer.p_holm).removeprefix("= ")
    interval = between(answer.estimate.interval_at(answer.alpha)) if answer.estimate.known else f"none; no effect gives {no_effect}"
    return *start, p, interval


def _noted(answer: Answer) -> str:
    """What else decides how to take an answer, or nothing."""
    said = [f"{text[0].upper()}{text[1:]}." for text in (answer.blocked, answer.beside) if text] + notes(answer)
    return f"{answer.subject}, {_QUESTIONS[answer.question]}: {' '.join(said)}" if said else ""
