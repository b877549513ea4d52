"""The page's first screen: what was asked of what, and a line a question."""

from __future__ import annotations

import itertools
import math
import re

import pandas as pd

from diffvit.protocol import in_order, model_title
from study.report.analysis import Analysis, Subject
from study.report.document import Block, Contents, Facts, Finding, Findings, Heading
from study.report.figures import millions
from study.report.interval import MARKS, OPEN, axis_picture, half_width, interval_picture, kind_of
from study.report.sentences import relative, sentence
from study.report.verdict import MARGIN, Answer
from study.table import CELL_AND_MODEL

_QUESTIONS = {"level": "a lower error?", "trend": "scales better with depth?", "noise": "loses less by noise?"}
_OF_SEVERAL = {
    "level": "does {} have a lower error?", "trend": "does {} scale better with depth?", "noise": "does {} lose less by noise?"
}  # fmt: skip

_KEY = (
    f"{MARKS['better']} better, {MARKS['equivalent']} equivalent, {MARKS['worse']} worse, {OPEN} open. Line: the interval; dotted: what no "
    f"effect at all would produce. Band: the margin of ±{100 * MARGIN:.0f} %."
)


def first_screen(analysis: Analysis, command: str, price: float | None = None) -> list[Block]:
    """Title, facts, the questions with their answers, and links to the sections.

    Args:
        command: lines that reproduce the runs. price: dollars an hour of one GPU.
    """
    half, several = half_width(analysis.answers), analysis.several
    title = (
        f"{'Do' if several else 'Does'} {analysis.challengers} scale better than {model_title(analysis.arms[0])}, and does noise change it?"
    )
    rows = [_finding(answer, half, several) for answer in analysis.answers]
    compared = {(comparison.subject, comparison.arms) for comparison in analysis.comparisons}
    for part, pair in itertools.product(analysis.subjects, analysis.pairs):
        if part.base and (part.name, pair) not in compared:
            rows.append(Finding("open", OPEN, "no answer", part.name, _nothing_to_compare(part, pair)))
    for pair in analysis.pairs:
        if pair not in analysis.noise_sources:
            asked = _asked("noise", pair, several)
            text = "Whether noise changes the difference has not been measured here."
            rows.append(Finding("open", OPEN, "not measured", asked[0].upper() + asked[1:], text))
    axis = axis_picture(half, "" if several else analysis.challengers) if analysis.answers else ""
    return [Heading(title, 1), _facts(analysis.table, command, price), Findings(rows, axis, _KEY), Contents()]


def _asked(question: str, arms: tuple[str, str], several: bool) -> str:
    """A question in words, with the architecture that it is about where there are several."""
    return _OF_SEVERAL[question].format(model_title(arms[1])) if several else _QUESTIONS[question]


def _finding(answer: Answer, half: float, several: bool) -> Finding:
    number = "" if math.isnan(answer.estimate.value) else relative(answer.estimate, answer.alpha)
    kind, question = kind_of(answer), f"{answer.subject}: {_asked(answer.question, answer.arms, several)}"
    return Finding(kind, MARKS.get(kind, OPEN), answer.verdict, question, sentence(answer), number, interval_picture(answer, half))


def _nothing_to_compare(part: Subject, arms: tuple[str, str]) -> str:
    ended = []
    for arm in arms:
        statuses = part.table[part.table["model"] == arm]["status"]
        ended.append(f"{model_title(arm)}: {(statuses == 'done').sum()} done, {(statuses == 'diverged').sum()} diverged")
    return f"On {part.name}, the two architectures have no finished run of one size and seed in common ({'; '.join(ended)})."


def _facts(table: pd.DataFrame, command: str, price: float | None) -> Facts:
    """What was asked, of what, when and with what."""
    studies = [line for line in command.splitlines() if " study " in line]
    models = map(model_title, in_order(table["model"]))
    datasets: dict[str, list[str]] = {}  # of the same sizes
    for dataset, runs in table.groupby("dataset", sort=False):
        sizes = dict.fromkeys(millions(count) for count in sorted(runs.groupby("size")["parameters"].min()))
        datasets.setdefault(", ".join(sizes), []).append(str(dataset))
    of = "; ".join(f"{' and '.join(names)} ({sizes} parameters)" for sizes, names in datasets.items())
    seeds = table.groupby(CELL_AND_MODEL)["seed"].nunique()
    fewest = f"{seeds.min()} to " if seeds.min() < seeds.max() else ""
    diverged = int((table["status"] == "diverged").sum())
    runs_are = f"{len(table)}, {fewest}{counted(seeds.max(), 'seed')} a model and size" + (f"; {diverged} diverged" if diverged else "")
    times = sorted(str(time)[:16].replace("T", " ") for what in ("started", "finished") for time in table[what].dropna())
    commits = dict.fromkeys(re.sub(r"\b([0-9a-f]{10})[0-9a-f]+", r"\1", commit) for commit in _values(table, "git_commit"))
    versions = [f"{what} {'/'.join(_values(table, what))}" for what in ("torch", "diffvit") if _values(table, what)]
    rows = [
        ("asked", "; ".join(f"`{line}`" for line in studies)), ("of", f"{', '.join(models)}, on {of}"), ("runs", runs_are),
        ("when", f"{times[0]} to {times[-1]} UTC" if times else ""),
        ("cost", _cost(table, price)),
        ("code", ", ".join([*([f"commit {' and '.join(commits)}"] if commits else []), *versions, *_values(table, "precision")])),
    ]  # fmt: skip
    return Facts([(name, text) for name, text in rows if text])


def hours(table: pd.DataFrame) -> str:
    """The training time of all runs: "7.4 GPU hours"; on other devices, hours."""
    spent, on_gpu = _hours_of_runs(table)
    parts = {"GPU hours": spent[on_gpu], "hours": spent[~on_gpu]}
    return " and ".join(f"{part.sum():.3g} {kind}" for kind, part in parts.items() if len(part))


def _hours_of_runs(table: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
    """Each run's hours of training, of all its workers, and whether they were on GPUs."""
    spent = table["seconds"] * table["workers"].fillna(1).astype(float) / 3600
    return spent, table["device"].fillna("").astype(str).str.startswith("cuda")


def _cost(table: pd.DataFrame, price: float | None) -> str:
    spent, on_gpu = _hours_of_runs(table)
    dollars = f"; training cost about ${price * spent[on_gpu].sum():,.2f} at ${price:g} a GPU hour" if price and on_gpu.any() else ""
    return f"{hours(table)} on {', '.join(_values(table, 'device_name')) or 'unknown devices'}{dollars}"


def counted(number: int, noun: str) -> str:
    """ "1 seed", "3 seeds"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _values(table: pd.DataFrame, column: str) -> list[str]:
    return sorted({str(value) for value in table[column].dropna()})
