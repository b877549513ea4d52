"""What the runs say: comparisons, answers and findings, as numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
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
from study.report.choices import Specification, specifications, with_choices
from study.report.compare import ArmComparison
from study.report.looks import count_looks
from study.report.noise import label_questions, noise_questions
from study.report.scaling import Estimate
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


def subjects(table: pd.DataFrame) -> list[Subject]:
    """The data sets and conditions of a run table, each data set's base first: the plain condition, or the one of fewest overrides."""
    groups = table.groupby(["dataset", pd.Series(conditions(table), index=table.index)], sort=False)
    order = list(dict.fromkeys(table["dataset"]))
    found: list[Subject] = []
    for (dataset, condition), runs in sorted(groups, key=lambda item: (order.index(item[0][0]), len(item[0][1].split()), item[0][1])):
        overrides = all_overrides(runs[:1])[0]
        name = f"{dataset} ({overrides_title(dataset, overrides)})" if overrides else str(dataset)
        base = not any(part.dataset == dataset for part in found)
        found.append(Subject(name, file_stem(str(dataset), overrides), dataset, condition, runs, base))
    return found


@dataclass(frozen=True)
class Analysis:
    """All that the report says, as numbers.

    Attributes:
        comparisons: of each subject's two arms. answers: the family, with verdicts. noise_source: what the noise answer compares.
        other_noise: (what is compared, answer) for the exploratory ones. controls: (title, estimate, pairs) of other architectures
            against the first arm. findings: run_id -> what `evaluate` found. left_out: runs that enter no comparison, a phrase each.
        choices: data set -> its specification curve.
    """

    table: pd.DataFrame
    subjects: list[Subject]
    comparisons: dict[str, ArmComparison]
    answers: list[Answer]
    noise_source: str
    other_noise: list[tuple[str, Answer]]
    controls: list[tuple[str, Estimate, int]]
    findings: dict[str, dict[str, Any]]
    left_out: list[str]
    choices: dict[str, list[Specification]]
    arms: tuple[str, str] = ARMS

    @property
    def stems(self) -> dict[str, str]:
        """Data set -> what the names of its base's figures begin with."""
        return {part.dataset: part.stem for part in self.subjects if part.base}


def analyse(table: pd.DataFrame, checkpoints: Path | None, arms: tuple[str, str] = ARMS, looks: Path | None = None) -> Analysis:
    """Compare the arms of a run table's subjects and answer the questions.

    Args:
        checkpoints: the ledger, for predictions and for what `evaluate` found; None: the table only.
        looks: the file that counts the looks at each question; None: this is the first one.
    """
    whole = table.groupby([table["dataset"], pd.Series(all_overrides(table), index=table.index)])
    table, left_out = comparable(table)
    table = with_predictions(table, checkpoints)
    findings, more_left_out = _findings(table, checkpoints)
    left_out += more_left_out
    corrupted = pd.DataFrame([_errors_found(findings.get(run_id, {})) for run_id in table["run_id"]], table.index, _FOUND)
    table = pd.concat([table, corrupted], axis=1)
    parts = []
    for part in subjects(table):
        kept, phrases = same_images(part.table)
        parts.append(dataclasses.replace(part, table=kept, whole=whole.get_group((part.dataset, all_overrides(kept[:1])[0]))))
        left_out += [f"{part.name}: {phrase}" for phrase in [*phrases, *compare.left_out(kept, arms), *losses_left_out(kept)]]
    wrong_of = (lambda run: wrong_answers(checkpoints, run)) if checkpoints else None
    comparisons = {part.name: found for part in parts if (found := compare.compare(part.table, part.name, arms, wrong_of, part.whole))}
    noise = noise_questions(parts, arms, wrong_of, findings)
    family = [answer for part in parts if part.base and part.name in comparisons for answer in comparisons[part.name].answers]
    family += [question.answer(arms) for question in noise[:1]]
    if looks:
        family = count_looks(looks, family)
    tables = {(question, part.name): [part.table] for part in parts for question in ("level", "trend")}
    tables |= {("noise", question.subject): question.tables for question in noise[:1]}
    decided = with_remarks(with_sensitivity(verdict.decide(family), _at_chance(parts, arms), tables), tables)
    more = [(each.what, each.answer(arms)) for each in [*noise[1:], *label_questions(parts)]]
    controls = []
    for part in parts:
        for model in part.table["model"].unique():
            if model not in arms and (other := compare.compare(part.table, part.name, (arms[0], model))):
                title = f"{model_title(model)} against {model_title(arms[0])} on {part.name}"
                controls.append((title, other.answers[0].estimate, other.answers[0].pairs))
    choices = specifications(parts, comparisons, arms)
    answers = with_choices(decided, parts, choices)
    return Analysis(table, parts, comparisons, answers, noise[0].what if noise else "", [each for each in more if each[1].pairs],
                    controls, findings, left_out, choices, arms)  # fmt: skip


def _at_chance(parts: Sequence[Subject], arms: tuple[str, str]) -> list[Answer]:
    """The family's answers where runs that diverged count as finished at chance level."""
    parts = [dataclasses.replace(part, table=at_chance(part.table, protocol_of(part.dataset).classes)) for part in parts]
    found = [compare.compare(part.table, part.name, arms, whole=part.whole) for part in parts if part.base]
    noise = [question.answer(arms) for question in noise_questions(parts, arms, None, {})[:1]]
    return [answer for comparison in found if comparison for answer in comparison.answers] + noise


def _findings(table: pd.DataFrame, checkpoints: Path | None) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """run_id -> what `evaluate` found, by kind; and a phrase for findings with warnings, which are not used."""
    found: dict[str, dict[str, Any]] = {}
    left_out = []
    for run in table.itertuples() if checkpoints else []:
        files = files_of(Path(str(checkpoints)), run)
        kinds = read_evaluations(files)
        if "attention" in kinds and len(kinds["attention"]["layers"]) != run.depth:
            raise UserError(f"{files.evaluations} is of a model of another depth.", "delete it and evaluate again.")
        found[run.run_id] = {kind: findings for kind, findings in kinds.items() if not findings["warnings"]}
        left_out += [f"{kind} of the run {run.run_id}: of another version of diffvit, evaluate again" for kind in outdated(files)]
        left_out += [f"{kind} of the run {run.run_id}: {each['warnings'][0]}" for kind, each in kinds.items() if each["warnings"]]
    return found, left_out


_FOUND = ["evaluated_error", "corrupted_error", "evaluated_images"]


def _errors_found(findings: dict[str, Any]) -> list[float]:
    """A run's error on clean images, its mean error under the five corruptions, both of the same evaluation, and its images."""
    if "corruptions" not in findings:
        return [math.nan] * 3
    errors = {row["corruption"]: row["error"] for row in summarise(findings["corruptions"])}
    return [errors["clean"], errors["mean"], findings["corruptions"]["images"]]
