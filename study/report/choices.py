"""The specification curve: the difference of the arms under every choice that could as well have been made.

Simonsohn, Simmons and Nelson (2020), Nature Human Behaviour 4, 1208-1214.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from study.report.drawing import our_style, save

# isort: split
import numpy as np
from matplotlib.figure import Figure

from diffvit.ledger.spec import parse_overrides
from diffvit.protocol import ARMS, model_title, protocol_of
from study.report.caveats import diverged_counts
from study.report.compare import ArmComparison
from study.report.document import Block, Figures, Heading, Paragraph, Table
from study.report.scaling import Estimate
from study.report.sentences import percent, relative
from study.report.verdict import Answer
from study.table import all_overrides

if TYPE_CHECKING:
    from study.report.analysis import Subject

# Overrides that are another question or a trial, not another choice.
_NO_CHOICES = {"label_noise", "input_noise", "max_steps", "epochs"}
_FEWEST = 3

_COLOURS = {"lower": "#1B7F5C", "higher": "#B0413E", "open": "#8A94A0"}


@dataclass(frozen=True)
class Specification:
    """One way to make every choice.

    Attributes:
        chosen: what was chosen, as text, by the name of the choice.
        level: the mean log ratio of the arms' errors over sizes; below 0 the second arm has the lower error. nan where the arms have no
            finished runs in common.
        protocol: whether these are the protocol's own choices, at equal parameters.
        diverged: how many of its runs did, by arm, as text; "" for none.
    """

    chosen: dict[str, str]
    level: Estimate
    protocol: bool
    diverged: str = ""

    @property
    def kind(self) -> str:
        """ "lower" or "higher" where the 95 % interval excludes no difference, else "open"."""
        low, high = self.level.interval if self.level.known else (-np.inf, np.inf)
        return "lower" if high < 0 else "higher" if low > 0 else "open"


@dataclass(frozen=True)
class SpecificationCurve:
    """Two arms on one data set under all choices.

    Attributes:
        figure: the name of its picture's files. specs: by level, lowest first.
    """

    dataset: str
    arms: tuple[str, str]
    figure: str
    specs: list[Specification]

    @property
    def levels(self) -> list[float]:
        """The levels, as log ratios, of those that have something to compare."""
        return [float(spec.level.value) for spec in self.specs if not math.isnan(spec.level.value)]


def specification_curves(parts: Sequence[Subject], comparisons: Sequence[ArmComparison], arms: tuple[str, str]) -> list[SpecificationCurve]:
    """The curves of two arms on all data sets that were trained under three conditions or more.

    Each condition is compared at equal parameters and at equal FLOPs.
    """
    by_subject = {each.subject: each for each in comparisons if each.arms == arms}
    curves = []
    for dataset in dict.fromkeys(part.dataset for part in parts):
        tried = [part for part in parts if part.dataset == dataset and not part.overrides & _NO_CHOICES
                 and part.table["model"].isin(arms).any()]  # fmt: skip
        if len(tried) < _FEWEST:
            continue
        overrides = [parse_overrides(part.condition) for part in tried]
        names = list(dict.fromkeys(name for condition in overrides for name in condition))
        usual = protocol_of(dataset)
        specs = []
        for part, own in zip(tried, overrides, strict=True):
            chosen = {name: _text(own.get(name, getattr(usual, name))) for name in names}
            at_equal: dict[str, Estimate | None] = {"parameters": Estimate(math.nan, math.nan, 0)}
            if comparison := by_subject.get(part.name):
                at_equal = {"parameters": comparison.answers[0].estimate, "FLOPs": comparison.equal_costs.get("FLOPs")}
            usual_choices = not any(all_overrides(part.table))
            specs += [Specification({**chosen, "compared at equal": cost}, level, usual_choices and cost == "parameters",
                                    diverged_counts(part.table, arms))
                      for cost, level in at_equal.items() if level]  # fmt: skip
        specs.sort(key=lambda spec: (math.isnan(spec.level.value), float(spec.level.value)))
        of_arm = "" if arms[1] == ARMS[1] else f"_{arms[1]}"
        stem = next(part.stem for part in parts if part.base and part.dataset == dataset)
        curve = SpecificationCurve(dataset, arms, f"{stem}{of_arm}_choices", specs)
        if curve.levels or any(spec.diverged for spec in specs):  # else an arm has no runs
            curves.append(curve)
    return curves


def _text(value: Any) -> str:
    return ("on" if value else "off") if isinstance(value, bool) else "none" if value is None else f"{value:g}"


def curve_sentence(curve: SpecificationCurve) -> str:
    """What the curve says in one sentence; signs and significance both."""
    specs, values = curve.specs, curve.levels
    lower, higher = sum(value < 0 for value in values), sum(value > 0 for value in values)
    kinds = [spec.kind for spec in specs]
    if not values:
        significant = "no two finished runs can be compared"
    elif not any(spec.level.known for spec in specs):
        significant = "with one seed, none has an interval"
    else:
        words = [f"{kinds.count(kind) or 'never'} significantly {kind}" for kind in ("lower", "higher")]
        significant = " and ".join(words).replace("never significantly lower and never", "never significantly lower or")
    dead = sum(bool(spec.diverged) for spec in specs)
    unpaired = len(specs) - len(values)
    text = (
        f"Under {len(specs)} combinations of choices, {model_title(curve.arms[1])} has the lower error in {lower} and the higher one in "
        f"{higher}; {significant}."
    )
    if values:
        text += f" The median difference is {percent(float(np.median(values)))}."
    if dead:
        nothing = f", so that {unpaired} have nothing to compare" if unpaired else ""
        text += f" Under {dead} of them runs diverged{nothing}: what is left of an arm are its better runs."
    return text


def with_choices(answers: Sequence[Answer], parts: Sequence[Subject], curves: Sequence[SpecificationCurve]) -> list[Answer]:
    """The answers, those about a level that other choices turn round with a sentence that says so."""
    datasets = {part.name: part.dataset for part in parts}
    levels = {(curve.dataset, curve.arms): curve.levels for curve in curves}
    told = []
    for answer in answers:
        values = levels.get((datasets.get(answer.subject, ""), answer.arms), [])
        turned = answer.question == "level" and values and min(values) < 0 < max(values)
        remark = (f"Its sign depends on choices that could have been others: from {percent(min(values))} to "
                  f"{percent(max(values))} under {len(values)} combinations of them.",) if turned else ()  # fmt: skip
        told.append(dataclasses.replace(answer, remarks=(*answer.remarks, *remark)))
    return told


def choices_section(curves: Sequence[SpecificationCurve], figures: Sequence[Path]) -> list[Block]:
    """Sentence, picture and table of each curve; the picture is the PNG file of its name among `figures`."""
    blocks: list[Block] = []
    for curve in curves:
        names = list(curve.specs[0].chosen)
        arm = model_title(curve.arms[1])
        alt = f"{arm} against {model_title(curve.arms[0])}: specification curve on {curve.dataset}"
        drawn = [(path, alt) for path in figures if path.name == f"{curve.figure}.png"]
        rows = [[*spec.chosen.values(), "nothing to compare" if math.isnan(spec.level.value) else relative(spec.level),
                 "the protocol" if spec.protocol else "", spec.diverged] for spec in curve.specs]  # fmt: skip
        blocks += [Paragraph(f"{curve.dataset}: {curve_sentence(curve)}"), *([Figures(drawn)] if drawn else [])]
        caption = f"{curve.dataset}, {arm}: every combination, lowest first"
        blocks.append(Table([*names, "difference in test error", "", "diverged"], rows, caption))
    text = (
        "Each choice of ours could have been another one. Below are all combinations that were trained, each with its own 95 % interval, "
        "which no correction widens: the verdict above stays the one that was fixed beforehand."
    )
    return [Heading("Would other choices say the same?"), Paragraph(text), *blocks] if blocks else []


def draw_choices(curves: Sequence[SpecificationCurve], out: Path) -> list[Path]:
    """The specification curves as PNG and SVG, under their names. Returns the files written."""
    with our_style():
        return [path for curve in curves for path in save(_drawn(curve), out / curve.figure)]


def _drawn(curve: SpecificationCurve) -> Figure:
    """Levels with intervals above, what was chosen for each below."""
    specs = curve.specs
    names = list(specs[0].chosen)
    options = [(name, value) for name in names for value in dict.fromkeys(spec.chosen[name] for spec in sorted(specs, key=_by_choice))]
    figure = Figure(figsize=(8.0, 3.4 + 0.24 * len(options)), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3.0, 0.24 * len(options) + 0.2]})
    above.axhline(0, color="#3C4650", linewidth=1.0)
    for x, spec in enumerate(specs):
        colour = _COLOURS[spec.kind]
        if spec.level.known:
            low, high = (100 * np.expm1(end) for end in spec.level.interval)
            above.plot([x, x], [low, high], color=colour, linewidth=1.6)
        marker = {"lower": "v", "higher": "^", "open": "o"}[spec.kind]
        above.plot(x, 100 * np.expm1(spec.level.value), marker=marker, color=colour, markersize=9 if spec.protocol else 6,
                   markeredgecolor="black" if spec.protocol else colour)  # fmt: skip
        for y, (name, value) in enumerate(options):
            taken = spec.chosen[name] == value
            below.plot(x, y, marker="s", markersize=5 if taken else 2, color=colour if taken else "#D5DAE0", linestyle="")
    above.set_ylabel("difference in test error (%)")
    first, second = map(model_title, curve.arms)
    above.set_title(f"{curve.dataset}: {second} against {first}, under every choice")
    above.tick_params(labelbottom=False)
    below.set_yticks(range(len(options)), [f"{name} {value}" for name, value in options], fontsize=8)
    below.set_xticks([])
    below.invert_yaxis()
    below.grid(visible=False)
    below.set_xlabel(f"below 0 {second} is better; bars: 95 % intervals; outlined and larger: the protocol's choices", fontsize=8.5)
    return figure


def _by_choice(spec: Specification) -> tuple[tuple[float, str], ...]:
    """Sorts specifications by what they chose: numbers by value."""
    keys = []
    for value in spec.chosen.values():
        try:
            keys.append((float(value), ""))
        except ValueError:
            keys.append((0.0, value))
    return tuple(keys)
