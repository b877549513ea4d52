"""What the runs say: comparisons, answers and findings, as numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from diffvit.errors import UserError
from diffvit.findings.kept import outdated, read_evaluations
from diffvit.findings.robustness import summarise
from diffvit.ledger.spec import overrides_title, parse_overrides
from diffvit.protocol import ARMS, Protocol, model_title, protocol_of
from study.predictions import with_predictions
from study.report import compare, verdict
from study.report.caveats import at_chance, losses_left_out, same_images, with_remarks, with_sensitivity
from study.report.choices import SpecificationCurve, specification_curves, with_choices
from study.report.compare import ArmComparison, pairs_of
from study.report.looks import count_looks
from study.report.noise import NoiseQuestion, label_questions, noise_questions
from study.report.sentences import listed
from study.report.verdict import Answer
from study.table import all_overrides, comparable, conditions, file_stem, files_of, wrong_answers


@dataclass(frozen=True)
class Subject:
    """The runs of one data set under one condition.

    Attributes:
        name: for sentences, with all overrides. stem: what the names of its figures begin with. condition: as table.conditions names it,
            "" for the plain one. base: the data set's condition of reference. whole: the table with runs that may not be compared too.
    """

    name: str
    stem: str
    dataset: str
    condition: str
    table: pd.DataFrame
    base: bool
    whole: pd.DataFrame | None = None

    @property
    def overrides(self) -> set[str]:
        """Names of the overrides that make the condition."""
        return {part.partition("=")[0] for part in self.condition.split()}

    @property
    def protocol(self) -> Protocol:
        """The data set's, with all overrides of these runs."""
        return protocol_of(self.dataset).with_overrides(parse_overrides(self.table["overrides"].iloc[0]))

    def adds(self, override: str, base: Subject) -> bool:
        """Whether the condition is that of `base`, which has no noise, and this override, nothing else."""
        own = {part for part in self.condition.split() if part.partition("=")[0] == override}
        without_noise = not base.overrides & {"input_noise", "label_noise"}
        return bool(own) and without_noise and set(self.condition.split()) - own == set(base.condition.split())


def subjects(table: pd.DataFrame, arms: Sequence[str] = ARMS) -> list[Subject]:
    """The data sets and conditions of a run table, by number of overrides.

    Each data set's base is the plain condition, or the one of fewest overrides, that has a run of the arms.
    """
    groups = table.groupby(["dataset", pd.Series(conditions(table), index=table.index)], sort=False)
    order = list(dict.fromkeys(table["dataset"]))
    with_arms = set(table[table["model"].isin(arms)]["dataset"])
    parts: list[Subject] = []
    for (dataset, condition), runs in sorted(groups, key=lambda item: (order.index(item[0][0]), len(item[0][1].split()), item[0][1])):
        overrides = all_overrides(runs[:1])[0]
        name = f"{dataset} ({overrides_title(dataset, overrides)})" if overrides else str(dataset)
        asked = dataset not in with_arms or bool(runs["model"].isin(arms).any())
        base = asked and not any(part.dataset == dataset and part.base for part in parts)
        parts.append(Subject(name, file_stem(str(dataset), overrides), dataset, condition, runs, base))
    return parts


@dataclass(frozen=True)
class Analysis:
    """All that the report says, as numbers.

    Attributes:
        comparisons: of each subject, of each pair of arms. answers: the family, with verdicts.
        noise_sources: what each pair's answer about noise compares. other_noise: (what is compared, answer) for the exploratory ones.
        controls: of other architectures with the baseline. findings: run_id -> what `evaluate` found.
        left_out: runs that enter no comparison, a phrase each. choices: the specification curves.
        arms: the architectures that are compared, the baseline first.
    """

    table: pd.DataFrame
    subjects: list[Subject]
    comparisons: list[ArmComparison]
    answers: list[Answer]
    noise_sources: dict[tuple[str, str], str]
    other_noise: list[tuple[str, Answer]]
    controls: list[ArmComparison]
    findings: dict[str, dict[str, Any]]
    left_out: list[str]
    choices: list[SpecificationCurve]
    arms: tuple[str, ...] = ARMS

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The baseline with each of the others."""
        return pairs_of(self.arms)

    @property
    def several(self) -> bool:
        """Whether more than one architecture is compared with the baseline."""
        return len(self.arms) > 2

    def findings_of(self, kind: str) -> dict[str, dict[str, Any]]:
        """What one kind of evaluation found: run_id -> findings, of the runs that have any."""
        return {run_id: findings[kind] for run_id, findings in self.findings.items() if kind in findings}

    @property
    def challengers(self) -> str:
        """All arms but the baseline, in words."""
        return listed([model_title(arm) for arm in self.arms[1:]])


def analyse(table: pd.DataFrame, checkpoints: Path | None, arms: Sequence[str] = ARMS, looks: Path | None = None) -> Analysis:
    """Compare the arms of a run table's subjects, each with the first, and answer the questions, which are one family.

    Args:
        checkpoints: the ledger, for predictions and for what `evaluate` found; None: the table only.
        arms: the architectures that are compared, the baseline first.
        looks: the file that counts the looks at each question; None: this is the first one.
    """
    whole = table.groupby([table["dataset"], pd.Series(all_overrides(table), index=table.index)])
    table, left_out = comparable(table, arms)
    table = with_predictions(table, checkpoints)
    findings, more_left_out = _findings(table, checkpoints)
    left_out += more_left_out
    corrupted = pd.DataFrame([_errors_found(findings.get(run_id, {})) for run_id in table["run_id"]], table.index, _FOUND)
    table = pd.concat([table, corrupted], axis=1)
    parts = []
    for part in subjects(table, arms):
        kept, phrases = same_images(part.table, arms)
        parts.append(dataclasses.replace(part, table=kept, whole=whole.get_group((part.dataset, all_overrides(kept[:1])[0]))))
        left_out += [f"{part.name}: {phrase}" for phrase in [*phrases, *compare.left_out(kept, arms), *losses_left_out(kept)]]
    wrong_of = (lambda run: wrong_answers(checkpoints, run)) if checkpoints else None
    pairs = pairs_of(arms)
    comparisons = _compare(parts, pairs, wrong_of)
    noise = {pair: noise_questions(parts, pair, wrong_of, findings) for pair in pairs}
    family = _family(parts, comparisons, noise)
    if looks:
        family = count_looks(looks, family)
    tables = {(question, part.name, pair): [part.table] for part in parts for question in ("level", "trend") for pair in pairs}
    tables |= {("noise", asked[0].subject, pair): asked[0].tables for pair, asked in noise.items() if asked}
    decided = verdict.decide(family)
    if (table["status"] == "diverged").any():
        decided = with_sensitivity(decided, _at_chance(parts, pairs), tables)
    decided = with_remarks(decided, tables)
    labels = label_questions(parts)
    more = [(each.what, each.answer(pair)) for pair in pairs for each in [*noise[pair][1:], *labels]]
    others = [model for model in dict.fromkeys(table["model"]) if model not in arms]
    choices = [curve for pair in pairs for curve in specification_curves(parts, comparisons, pair)]
    return Analysis(
        table, parts, comparisons, with_choices(decided, parts, choices),
        noise_sources={pair: asked[0].what for pair, asked in noise.items() if asked},
        other_noise=[each for each in more if each[1].pairs],
        controls=_compare(parts, [(arms[0], model) for model in others]),
        findings=findings, left_out=left_out, choices=choices, arms=tuple(arms),
    )  # fmt: skip


def _compare(
    parts: Sequence[Subject], pairs: Sequence[tuple[str, str]], wrong_of: compare.WrongAnswers | None = None
) -> list[ArmComparison]:
    """Every pair on every subject where they have runs in common."""
    comparisons = [compare.compare(part.table, part.name, pair, wrong_of, part.whole) for pair in pairs for part in parts]
    return [comparison for comparison in comparisons if comparison]


def _family(
    parts: Sequence[Subject], comparisons: Sequence[ArmComparison], noise: Mapping[tuple[str, str], Sequence[NoiseQuestion]]
) -> list[Answer]:
    """The answers that are corrected together: of each pair level and trend under each data set's condition of reference, and noise."""
    bases = {part.name for part in parts if part.base}
    answers: list[Answer] = []
    for pair, asked in noise.items():
        compared = [each for each in comparisons if each.arms == pair and each.subject in bases]
        answers += [answer for comparison in compared for answer in comparison.answers] + [question.answer(pair) for question in asked[:1]]
    return answers


def _at_chance(parts: Sequence[Subject], pairs: Sequence[tuple[str, str]]) -> list[Answer]:
    """The family's answers where runs that diverged count as finished at chance level."""
    parts = [dataclasses.replace(part, table=at_chance(part.table, protocol_of(part.dataset).classes)) for part in parts]
    bases = [part for part in parts if part.base]
    return _family(parts, _compare(bases, pairs), {pair: noise_questions(parts, pair, None, {}) for pair in pairs})


def _findings(table: pd.DataFrame, checkpoints: Path | None) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """run_id -> what `evaluate` found, by kind; and a phrase for findings with warnings, which are not used."""
    used: dict[str, dict[str, Any]] = {}
    left_out = []
    for run in table.itertuples() if checkpoints else []:
        files = files_of(Path(str(checkpoints)), run)
        kinds = read_evaluations(files)
        if "attention" in kinds and len(kinds["attention"]["layers"]) != run.depth:
            raise UserError(f"{files.evaluations} is of a model of another depth.", "delete it and evaluate again.")
        used[run.run_id] = {kind: findings for kind, findings in kinds.items() if not findings["warnings"]}
        left_out += [f"{kind} of the run {run.run_id}: of another version of diffvit, evaluate again" for kind in outdated(files)]
        left_out += [f"{kind} of the run {run.run_id}: {each['warnings'][0]}" for kind, each in kinds.items() if each["warnings"]]
    return used, left_out


_FOUND = ["evaluated_error", "corrupted_error", "evaluated_images"]


def _errors_found(findings: dict[str, Any]) -> list[float]:
    """A run's error on clean images, its mean error under the five corruptions, both of the same evaluation, and its images."""
    if "corruptions" not in findings:
        return [math.nan] * 3
    errors = {row["corruption"]: row["error"] for row in summarise(findings["corruptions"])}
    return [errors["clean"], errors["mean"], findings["corruptions"]["images"]]
