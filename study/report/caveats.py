"""What a reader must know beside a number: runs that diverged, arms trained differently, numbers that could not be used."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import pandas as pd

from diffvit.protocol import LIKE_CLASSIC, model_title
from study.report.verdict import DIVERGED, Answer, decide
from study.table import CELL_AND_MODEL, of_arms

# An answer's key -> the tables of all runs that it rests on
TablesOfAnswers = Mapping[tuple[str, str, tuple[str, str]], Sequence[pd.DataFrame]]

# What should be alike for both arms of a pair, in words.
_ALIKE = {"device_name": "devices", "precision": "precisions", "micro_batch": "micro-batches"}


def at_chance(table: pd.DataFrame, classes: int) -> pd.DataFrame:
    """A run table in which runs that diverged have finished at chance level, clean and corrupted."""
    table = table.copy()
    gone = table["status"] == "diverged"
    chance = 1 / classes
    accuracies = {"test_accuracy": chance, "test_images": None}
    errors = {"evaluated_images": None, "corrupted_error": 1 - chance, "evaluated_error": 1 - chance}
    for column, value in {"status": "done", **accuracies, **errors}.items():
        known = table[column].dropna()
        if gone.any() and len(known):
            table.loc[gone, column] = known.max() if value is None else value
    return table


def with_sensitivity(answers: Sequence[Answer], at_chance_level: Sequence[Answer], tables: TablesOfAnswers) -> list[Answer]:
    """Decided answers; a verdict that counting diverged runs as chance level would change is none, unless it would only be stronger.

    Args:
        at_chance_level: the answers of the same family with these runs, not decided.
    """
    looks = {answer.key: answer.look for answer in answers}
    others = [dataclasses.replace(each, look=looks.get(each.key, 1)) for each in at_chance_level]
    by_question = {each.key: each for each in decide(others)}
    checked = []
    for answer in answers:
        other = by_question.get(answer.key)
        if other is not None and other.pairs != answer.pairs:
            changed = answer.verdict in ("better", "worse", "equivalent") and other.verdict != answer.verdict
            changed = changed and not _confirmed(answer, other, tables[answer.key])
            verdict = DIVERGED if changed else answer.verdict
            answer = dataclasses.replace(answer, with_diverged=other.estimate, verdict=verdict)
        checked.append(answer)
    return checked


def _confirmed(answer: Answer, other: Answer, tables: Sequence[pd.DataFrame]) -> bool:
    """Whether the losing arm's runs alone diverged, and counting them moves the number further in the verdict's direction.

    Where its runs diverged, its spread grows with them, so that what is plain would not be significant.
    """
    losing = {"better": answer.arms[0], "worse": answer.arms[1]}.get(answer.verdict)
    gone = {model for table in tables for model in table.loc[table["status"] == "diverged", "model"] if model in answer.arms}
    value, counted = float(answer.estimate.value), float(other.estimate.value)
    return gone == {losing} and value * counted > 0 and abs(counted) >= abs(value)


def with_remarks(answers: Sequence[Answer], tables: TablesOfAnswers) -> list[Answer]:
    """The answers with what their sentences say of their runs: how many diverged, and what differed between the arms."""
    told = []
    for answer in answers:
        runs = pd.concat([table.assign(part=i) for i, table in enumerate(tables[answer.key])])
        phrases = (answer.beside, _diverged(runs, answer.arms), _arms_differ(runs, answer.arms))
        told.append(dataclasses.replace(answer, beside="; ".join(filter(None, phrases))))
    return told


def diverged_counts(table: pd.DataFrame, arms: Sequence[str]) -> str:
    """ "Differential ViT: 2 of 9", for the arms of which any run diverged."""
    counts = []
    for arm in arms:
        statuses = table[table["model"] == arm]["status"]
        if dead := int((statuses == "diverged").sum()):
            counts.append(f"{model_title(arm)}: {dead} of {len(statuses)}")
    return ", ".join(counts)


def _diverged(table: pd.DataFrame, arms: tuple[str, str]) -> str:
    runs = [table[table["model"] == arm] for arm in arms]
    if not any((of_arm["status"] == "diverged").any() for of_arm in runs):
        return ""
    phrases = []
    for arm, of_arm in zip(arms, runs, strict=True):
        gone = of_arm[of_arm["status"] == "diverged"].groupby("size", sort=False).size()
        where = " (" + ", ".join(f"{count} at {size}" for size, count in gone.items()) + ")" if len(gone) else ""
        phrases.append(f"{gone.sum()} of {len(of_arm)} runs of {model_title(arm)}{where}")
    return f"diverged: {' and '.join(phrases)}"


def _arms_differ(table: pd.DataFrame, arms: tuple[str, str]) -> str:
    """In which devices, precisions or micro-batches the runs of a pair differ."""
    done = table[(table["status"] == "done") & table["model"].isin(arms)]
    first, second = (done[done["model"] == arm].set_index(["part", "size", "seed"])[list(_ALIKE)] for arm in arms)
    first, second = first.align(second, join="inner", axis=0)
    phrases = []
    for column, name in _ALIKE.items():
        one, other = (each[column].dropna().astype(str) for each in (first, second))
        one, other = one.align(other, join="inner")
        if differ := int((one != other).sum()):
            values = " and ".join(dict.fromkeys([*one[one != other], *other[one != other]]))
            phrases.append(f"the arms of {differ} of {len(first)} pairs had different {name} ({values})")
    return "; ".join(phrases)


def same_images(table: pd.DataFrame, arms: Sequence[str]) -> tuple[pd.DataFrame, list[str]]:
    """The runs that were tested on as many images as most of the arms', with those that diverged; and a phrase for the others."""
    if table["test_images"].nunique() < 2:
        return table, []
    usual = of_arms(table["test_images"], table, arms).mode().max()
    other = table["test_images"].notna() & (table["test_images"] != usual)
    return table[~other], [f"{int(other.sum())} runs that were not tested on {int(usual):,} images as most were"]


def losses_left_out(table: pd.DataFrame) -> list[str]:
    """A phrase for each finished run whose test loss has no logarithm."""
    done = table[table["status"] == "done"]
    losses = done["test_loss"].astype(float)
    runs = done[~((losses > 0) & (losses < float("inf")))].itertuples()
    return [f"test loss {run.test_loss:g} of {model_title(run.model)} {run.size} seed {run.seed} (not its error)" for run in runs]


def equal_parameters(table: pd.DataFrame) -> str:
    """Whether the architectures are of one size, from the parameters of each size's models."""
    counts = table.groupby(CELL_AND_MODEL)["parameters"].first()
    ratios = counts / counts.groupby(["dataset", "overrides", "size"]).transform("min")
    if ratios.max() <= 1 + LIKE_CLASSIC:
        return (
            f"Parameters are equal within {100 * LIKE_CLASSIC:.0f} %; FLOPs and training time are not. The table of costs above says what "
            "each comes to at equal error, where that can be said."
        )
    _, _, size, model = ratios.idxmax()
    more = f"{model_title(str(model))} has {100 * (ratios.max() - 1):.1f} % more than the smallest at {size}"
    return f"Parameters are not equal: {more}. An answer on sizes by name mixes the idea with its size; the table of costs above does not."
