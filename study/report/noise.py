"""The question about noise: which runs can be compared with which, and which comparison is the question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from diffvit.data.corruptions import CORRUPTIONS
from diffvit.findings.robustness import right_answers
from study.report import compare
from study.report.compare import WrongAnswers
from study.report.scaling import Estimate
from study.report.verdict import Answer
from study.table import all_overrides

if TYPE_CHECKING:
    from study.report.analysis import Subject


@dataclass(frozen=True)
class NoiseQuestion:
    """Runs without noise and with it, and how they are compared.

    Attributes:
        what: what "with noise" means, in words. clean, noisy, measures, wrong: as compare.noise_answer takes them.
    """

    what: str
    subject: str
    clean: pd.DataFrame
    noisy: pd.DataFrame
    measures: tuple[str, str] = ("error", "error")
    wrong: tuple[WrongAnswers, WrongAnswers] | None = None

    @property
    def tables(self) -> list[pd.DataFrame]:
        """The tables of all runs that the answer rests on."""
        return [self.clean] if self.clean is self.noisy else [self.clean, self.noisy]

    def has_runs(self, arms: tuple[str, str]) -> bool:
        """Whether both arms have runs, diverged ones too, with noise and without."""
        return all(set(arms) <= set(table["model"]) for table in self.tables)

    def answer(self, arms: tuple[str, str]) -> Answer:
        """The answer, not decided; blocked where no pair of finished runs is there with noise and without."""
        answer = compare.noise_answer(self.clean, self.noisy, self.subject, arms, self.measures, self.wrong)
        why = "no pair of runs has finished both with noise and without"
        return answer or Answer("noise", self.subject, arms, Estimate.none(), 0, 0, blocked=why)


def noise_questions(
    parts: Sequence[Subject], arms: tuple[str, str], wrong_of: WrongAnswers | None, findings: dict[str, dict[str, Any]]
) -> list[NoiseQuestion]:
    """The comparisons of which both arms have runs, diverged ones too; the first is the study's question about noise.

    The order was fixed beforehand: training on noisy images; else a noisy twin of the data set; else corrupted test images; of several
    data sets, the one with most test images. What the runs came to, diverged or not, changes nothing about which is the first.
    """
    parts = sorted(parts, key=lambda part: -part.table["test_images"].fillna(0).max())
    base = {part.dataset: part for part in parts if part.base}
    of_predictions = (wrong_of, wrong_of) if wrong_of else None
    candidates: list[NoiseQuestion] = []
    for part in parts:
        if part.adds("input_noise", base[part.dataset]):
            what = f"{part.name}: trained on noisy images, tested on clean ones"
            candidates.append(NoiseQuestion(what, part.name, base[part.dataset].table, part.table, wrong=of_predictions))
    for dataset, part in base.items():
        twin = base.get(f"{dataset}-noisy")
        if twin and all_overrides(twin.table[:1]) == all_overrides(part.table[:1]):
            what = f"{twin.name}: noise in training and test images"
            candidates.append(NoiseQuestion(what, twin.name, part.table, twin.table, wrong=of_predictions))
    under = (_wrong_under(["clean"], findings), _wrong_under(list(CORRUPTIONS), findings)) if wrong_of else None
    for part in base.values():
        known = part.table["corrupted_error"].notna()
        evaluated = part.table[known | ((part.table["status"] == "diverged") & known.any())]
        what = f"{part.name}: test images under five corruptions"
        candidates.append(NoiseQuestion(what, part.name, evaluated, evaluated, ("evaluated error", "corrupted error"), under))
    return [question for question in candidates if question.has_runs(arms)]


def label_questions(parts: Sequence[Subject]) -> list[NoiseQuestion]:
    """False training labels against true ones: another axis, and exploratory."""
    base = {part.dataset: part for part in parts if part.base}
    return [
        NoiseQuestion(f"{part.name}: false training labels", part.name, base[part.dataset].table, part.table)
        for part in parts
        if part.adds("label_noise", base[part.dataset])
    ]


def _wrong_under(corruptions: Sequence[str], findings: dict[str, dict[str, Any]]) -> WrongAnswers:
    """Run -> for each test image, the share of its answers under these corruptions that were wrong."""

    def of_run(run: Any) -> np.ndarray:
        evaluated = findings[run.run_id]["corruptions"]
        asked = [condition for condition in evaluated["conditions"] if condition["corruption"] in corruptions]
        return np.mean([~right_answers(condition, evaluated["images"]) for condition in asked], axis=0)

    return of_run
