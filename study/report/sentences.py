"""Answers in words: verdict, number, interval, and what else decides how to take them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from diffvit.protocol import model_title
from study.report.scaling import Estimate
from study.report.verdict import ALPHA, DIVERGED, LATER, MARGIN, Answer

_CLAIMS = {
    "level": {
        "better": "{second} has a lower error than {first} at these sizes",
        "worse": "{second} has a higher error than {first} at these sizes",
        "equivalent": "{second} and {first} are equivalent at these sizes",
        "": "whether {second} or {first} has the lower error is undecided",
    },
    "trend": {
        "better": "{second} scales better with depth than {first}",
        "worse": "{second} scales worse with depth than {first}",
        "equivalent": "{second} and {first} scale alike with depth",
        "no verdict": "whether {second} scales better than {first} cannot be said",
        "": "whether {second} scales better than {first} is undecided",
    },
    "noise": {
        "better": "{second} loses less by noise than {first}",
        "worse": "{second} loses more by noise than {first}",
        "equivalent": "{second} and {first} lose alike by noise",
        "depends on the scale": "whether {second} loses less by noise than {first} depends on the scale",
        "no verdict": "whether {second} loses less by noise than {first} cannot be said",
        "": "whether {second} loses less by noise than {first} is undecided",
    },
}
_NUMBERS = {
    "level": "difference in error",
    "trend": "change of the difference from the smallest to the largest size",
    "noise": "change of the difference in the odds of an error under noise",
}


def sentence(answer: Answer) -> str:
    """The answer for a person: the verdict first."""
    first, second = (model_title(arm) for arm in answer.arms)
    claims = _CLAIMS[answer.question]
    claim = claims.get(answer.verdict, claims[""]).format(first=first, second=second)
    if within := _within_margin(answer):
        claim += f", {within}"
    reason = f" ({answer.blocked})" if answer.blocked else ""
    text = f"On {answer.subject}, {claim}{reason}"
    if not math.isnan(answer.estimate.value):
        text += f": {_NUMBERS[answer.question]} {percent(answer.estimate.value)}{_certainty(answer)}"
    text += f"; {answer.beside}." if answer.beside else "."
    return " ".join([text, *_expected(answer), *notes(answer), *answer.remarks])


def level_of_intervals(answers: Sequence[Answer]) -> str:
    """What a column of the answers' intervals is called: "95 % interval", or "interval" where later looks have wider ones than others."""
    levels = {f"{100 * (1 - answer.alpha):.4g} % " for answer in answers if answer.estimate.known} or {f"{100 * (1 - ALPHA):.0f} % "}
    return f"{levels.pop() if len(levels) == 1 else ''}interval"


def _within_margin(answer: Answer) -> str:
    """That a difference is a small one, where it surely is."""
    low, high = answer.estimate.interval_at(answer.alpha)
    small = answer.verdict in ("better", "worse") and math.log(1 - MARGIN) < low and high < math.log(1 + MARGIN)
    return f"by less than the margin of {100 * MARGIN:.0f} %" if small else ""


def beside_the_number(answer: Answer) -> list[str]:
    """What else is said of an answer that is shown with its verdict and numbers, a sentence each."""
    unknown = "" if answer.estimate.known or answer.seeds == 1 or answer.blocked else f"no interval ({answer.unknown})"
    diverged = "counting the runs that diverged would change the verdict" if answer.verdict == DIVERGED else ""
    phrases = [text for text in (answer.blocked, diverged, _within_margin(answer), unknown, answer.beside) if text]
    decided = answer.remarks if answer.verdict in ("better", "worse", "equivalent") else ()
    return [*(f"{text[0].upper()}{text[1:]}." for text in phrases), *notes(answer), *decided]


def _certainty(answer: Answer) -> str:
    """Interval and p value, or why there is none."""
    if not answer.estimate.known:
        return f", no interval ({answer.unknown})"
    low, high = (percent(end) for end in answer.estimate.interval_at(answer.alpha))
    level = f"{100 * (1 - answer.alpha):.4g} % interval {low} to {high}"
    if answer.blocked:
        return f" ({level}; {answer.pairs} pairs)"
    look = f" and for look {answer.look}" if answer.look > 1 else ""
    return f" ({level}; p {p_value(answer.p_holm)} after Holm{look}, {answer.pairs} pairs)"


def _expected(answer: Answer) -> list[str]:
    """What no effect would have produced, or what would have been found."""
    said = []
    if not answer.estimate.known and not math.isnan(answer.estimate.value):
        low, high = percent(-answer.null_half), percent(answer.null_half)
        where = "inside" if abs(answer.estimate.value) <= answer.null_half else "outside"
        said.append(f"No effect at all would produce {low} to {high}, {answer.null_source}; the value lies {where}. One pair of a size "
                    "gives no verdict, wherever it lies.")  # fmt: skip
    if answer.verdict == "equivalent":
        said.append(f"The interval lies within ±{100 * MARGIN:.0f} %.")
    if answer.verdict == "undecided":
        distance = answer.estimate.detectable(alpha=answer.alpha / answer.questions)
        if distance > math.log(10):
            said.append("Only a tenfold difference or more would have been found with a probability of 80 %.")
        elif distance >= 0.0005:
            ends = f"below {percent(-distance)} or above {percent(distance)}"
            said.append(f"A true value {ends} would have been found with a probability of 80 %.")
    return said


def notes(answer: Answer) -> list[str]:
    """What else decides how to take the verdict, a sentence each."""
    said = []
    if answer.verdict == "undecided" and answer.estimate.p < ALPHA:
        said.append("Taken alone the 95 % interval excludes 0; as one of several questions or looks it does not suffice.")
    if answer.verdict == "depends on the scale":
        others = ", ".join(f"{name} {_on_scale(name, each.value)} (p {p_value(each.p)})" for name, each in answer.scales.items())
        said.append(f"On other scales: {others}.")
    elif contrary := [
        f"{name} {_on_scale(name, each.value)}" for name, each in answer.scales.items() if each.value * answer.estimate.value < 0
    ]:
        said.append(f"Other scales point the other way: {', '.join(contrary)}.")
    if answer.verdict in ("better", "worse") and answer.new_images and answer.new_images[0] <= 0 <= answer.new_images[1]:
        low, high = (percent(end) for end in answer.new_images)
        said.append(f"This holds for these test images; for new ones too it is not certain ({low} to {high}).")
    if answer.with_diverged and not math.isnan(answer.with_diverged.value):
        said.append(f"With diverged runs counted at chance level: {relative(answer.with_diverged, answer.alpha)}.")
    if answer.look > 1:
        said.append(f"This is look {answer.look} at this question: it may spend {100 * answer.alpha:.3g} % where the first one "
                    f"had {100 * ALPHA:.0f}, and all later ones have {100 * LATER:.0f} together.")  # fmt: skip
    return said


def _on_scale(name: str, value: float) -> str:
    return f"{100 * value:+.2f}" if name == "points" else percent(value)


def listed(names: Sequence[str]) -> str:
    """ "A", "A and B", "A, B and C"."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def percent(log_ratio: float) -> str:
    """A log ratio as a relative change: -0.02 -> "-2.0 %"; 3 -> "over +1000 %"."""
    return "over +1000 %" if log_ratio > math.log(11) else f"{100 * math.expm1(log_ratio):+.1f} %"


def relative(estimate: Estimate, alpha: float = ALPHA) -> str:
    """A relative change with its interval, of 95 %, or the one that leaves out `alpha`."""
    if not estimate.known:
        return f"{percent(estimate.value)} (no interval)"
    return f"{percent(estimate.value)} ({between(estimate.interval_at(alpha))})"


def between(ends: tuple[float, float]) -> str:
    """An interval of log ratios as relative changes: "-5.1 % to -1.2 %"."""
    return f"{percent(ends[0])} to {percent(ends[1])}"


def p_value(p: float) -> str:
    """Two digits, and never 0: "= 0.012", "< 0.001"."""
    return "unknown" if math.isnan(p) else f"= {p:.2g}" if p >= 1e-3 else "< 0.001"
