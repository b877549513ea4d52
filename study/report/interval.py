"""Intervals against the margin as small SVG pictures that share an axis; a verdict's shape, and its kind, which colours it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from study.report.verdict import MARGIN, Answer

# Verdict -> its mark on a line of text; others are open.
MARKS = {"better": "▲", "equivalent": "■", "worse": "▼"}
OPEN = "○"

_COLOURS = {"better": "#1b7f5c", "equivalent": "#5b6570", "worse": "#b0413e", "open": "#5b6570"}
_SHAPES = {
    "better": '<path d="M{x} 6l7 12h-14z"/>',
    "equivalent": '<path d="M{x} 13m-5.5 -5.5h11v11h-11z"/>',
    "worse": '<path d="M{x} 20l7 -12h-14z"/>',
    "open": '<circle cx="{x}" cy="13" r="5.5" fill="#fff" stroke-width="2"/>',
}
_WIDTH, _HEIGHT, _EDGE = 320, 26, 14
_WIDEST = math.log(3)  # what is beyond is cut off, with an arrow
_TICKS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 1.5)


def kind_of(answer: Answer) -> str:
    """ "better", "equivalent", "worse", or "open" where there is no verdict."""
    return answer.verdict if answer.verdict in MARKS else "open"


def ends_of(answer: Answer) -> tuple[float, float]:
    """The ends of an answer's line, as log ratios: its interval; without one, what no effect at all would produce; nan for neither."""
    return answer.estimate.interval_at(answer.alpha) if answer.estimate.known else (-answer.null_half, answer.null_half)


def half_width(answers: Sequence[Answer]) -> float:
    """The log ratio at which the axis of some answers ends."""
    values = [abs(value) for answer in answers for value in (answer.estimate.value, *ends_of(answer)) if not math.isnan(value)]
    return min(_WIDEST, 1.08 * max([*values, 2.5 * MARGIN]))


def interval_picture(answer: Answer, half: float) -> str:
    """An answer's interval, dashed where it is what no effect would produce, its value by shape, and the margin as a band; SVG.

    Args:
        half: as half_width gives it.
    """
    colour, value, (low, high) = _COLOURS[kind_of(answer)], float(answer.estimate.value), ends_of(answer)
    parts = [_band(half)]
    if not math.isnan(low):
        dashes = "" if answer.estimate.known else ' stroke-dasharray="2 3"'
        parts.append(f'<path d="M{_x(low, half)} 13H{_x(high, half)}" stroke-width="2.5"{dashes}/>')
        parts += [_end(end, side, half) for end, side in ((low, -1), (high, 1))]
    if not math.isnan(value):
        parts.append(_SHAPES[kind_of(answer)].format(x=_x(value, half)))
    return _svg(_HEIGHT, f'<g stroke="{colour}" fill="{colour}">{"".join(parts[1:])}</g>', parts[0])


def axis_picture(half: float, second: str) -> str:
    """The axis above the pictures: which side favours whom, and ticks in percent; SVG.

    Args:
        second: the arm that is better below 0; "" where the rows have one each.
    """
    far = [sign * tick for sign in (-1, 1) for tick in _TICKS if tick < 1 or sign > 0]
    ticks = {side: max((tick for tick in far if tick * side > 0 and abs(math.log1p(tick)) <= half), key=abs) for side in (-1, 1)}
    labels = [(0.0, "0"), *((tick, f"{'−' if tick < 0 else '+'}{100 * abs(tick):.0f} %") for tick in ticks.values())]
    texts = [f'<text x="{_x(math.log1p(tick), half)}" y="29" text-anchor="middle">{label}</text>' for tick, label in labels]
    texts += [
        f'<text x="0" y="11">◂ {f"{second} " if second else ""}better</text>',
        f'<text x="{_WIDTH}" y="11" text-anchor="end">worse ▸</text>',
    ]
    return _svg(34, f'<g fill="#5b6570" font-size="11.5">{"".join(texts)}</g>')


def _band(half: float) -> str:
    """The margin, and a line at no difference."""
    low, high = _x(math.log1p(-MARGIN), half), _x(math.log1p(MARGIN), half)
    return (f'<rect x="{low}" y="0" width="{high - low:.1f}" height="{_HEIGHT}" fill="#e6eaf0"/>'
            f'<path d="M{_x(0, half)} 0V{_HEIGHT}" stroke="#8a94a0"/>')  # fmt: skip


def _end(value: float, side: int, half: float) -> str:
    """A line's end: a bar, or an arrow's head where the axis ends before it."""
    x = _x(value, half)
    return f'<path d="M{x} 8V18" stroke-width="1.5"/>' if abs(value) <= half else f'<path d="M{x + 10 * side} 13l{-9 * side} -5v10z"/>'


def _x(value: float, half: float) -> float:
    return round(_WIDTH / 2 + (_WIDTH / 2 - _EDGE) * max(-1.0, min(1.0, float(value) / half)), 1)


def _svg(height: int, *parts: str) -> str:
    body = "".join(reversed(parts))
    return f'<svg width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}" aria-hidden="true">{body}</svg>'
