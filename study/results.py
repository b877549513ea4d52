"""What a study leaves at its end: the table, its CSV files, the figures, and what was found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from diffvit.errors import first_line
from diffvit.ledger.files import RunFiles
from diffvit.ledger.spec import RunSpec, parse_overrides
from study.commands.following import of_same_runs, with_seeds
from study.finished import report_name
from study.table import files_of, missing_runs, other_tokens, run_table, step_table, write_csv, write_step_csv
from study.text import STDOUT, put_json, runs_table, say, short_model, show

if TYPE_CHECKING:
    from study.options import StudyOptions


def report_results(options: StudyOptions, specs: list[RunSpec], draw: bool, judge: bool = False) -> bool:
    """Print the table, or JSON; write it as CSV; draw the figures. Returns False where the figures failed, after printing why.

    The table has all seeds and precisions of the cells, so that a study with fewer of them removes nothing.

    Args:
        judge: print the verdict too, if no run is missing: a look at a part of them would have to be paid for.
    """
    table = run_table(options.checkpoints, specs)
    drawn, answers = (True, []) if table.empty else _report(options, specs, table, draw, judge)
    if options.json_to:
        missing = [spec.title for spec in missing_runs(options.checkpoints, specs)]
        put_json({"grid": options.grid.name, "runs": _rows(table), "missing": missing, "verdict": answers}, options.json_to)
    return drawn


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The run table for JSON: overrides as objects, and null for what is not there."""
    rows = json.loads(table.to_json(orient="records"))
    return [{**row, "overrides": parse_overrides(row["overrides"])} for row in rows]


def _report(options: StudyOptions, specs: list[RunSpec], table: pd.DataFrame, draw: bool, judge: bool) -> tuple[bool, list[dict[str, Any]]]:
    """As report_results, of a table that is not empty; with the verdict as JSON has it."""
    from study.predictions import with_predictions  # torch comes with it

    if options.json_to != STDOUT:
        show(table_text(table))
    runs, steps = (options.checkpoints / f"{options.name}_{what}.csv" for what in ("runs", "steps"))
    if draw:  # on a stop, nothing that takes long
        table = with_predictions(table, options.checkpoints)
    write_csv(table, runs)
    write_step_csv(options.checkpoints, table, steps)
    say(f"\ntable    {runs}")
    if options.tracker:
        failures = {note for notes in table["notes"] for note in notes.split("; ") if note.startswith(options.tracker)}
        for failure in sorted(failures):
            say(f"warning: {failure}")
    drawn = not draw or _draw(options, table)
    judged = judge and draw and drawn and not missing_runs(options.checkpoints, specs)
    verdict = _say_findings(options, table) if judged else []
    kept = [kept_files(files_of(options.checkpoints, run), run.status) for run in table.itertuples()]
    gone = [path for paths in kept for path in paths if not path.is_file()]
    if gone:
        say(f"warning: files of finished runs are gone: {', '.join(map(str, gone))}")
        say("hint: delete the _result.json of such a run, and the same command trains it again.")
    return drawn, verdict


def _draw(options: StudyOptions, table: pd.DataFrame) -> bool:
    """Draw the figures. Returns False where that failed, after printing why: a figure must not fail finished training."""
    out = options.checkpoints / "figures"
    try:
        from study.report.figures import draw_figures

        draw_figures(table, step_table(options.checkpoints, table), out, options.grid.prefix, options.grid.arms)
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        say(f"error: the figures could not be drawn: {reason}\nhint: the same command draws them again: {options.command}")
        return False
    say(f"figures  {out}")
    return True


def _say_findings(options: StudyOptions, table: pd.DataFrame) -> list[dict[str, Any]]:
    """Print the verdict and what to do next. As the report, this is a look at the questions, and counted.

    Returns:
        The verdict as JSON has it.
    """
    from study.report.analysis import analyse
    from study.report.brief import brief
    from study.report.facts import answer_facts

    folder = options.checkpoints / report_name([options.grid], options.epochs, named=bool(options.grid.prefix))
    facts: list[dict[str, Any]] = []
    try:
        answers = analyse(table, options.checkpoints, options.grid.arms, looks=folder / "looks.json").answers
        facts = list(map(answer_facts, answers))
        lines = ["", brief(answers), ""] if answers else [""]
        if answers and {answer.seeds for answer in answers} == {1}:
            lines.append(f"next     for intervals: {with_seeds(options.command, 3)}")
        elif any(answer.verdict == "undecided" for answer in answers):
            lines.append(f"next     for the seeds that such a study needs: {of_same_runs(options.command, 'power')}")
        lines.append(f"next     for the page: {of_same_runs(options.command, 'report')}")
    except Exception as error:  # figures and words must not fail finished training
        lines = [f"note: no verdict could be formed: {type(error).__name__}: {first_line(error)}"]
    say("\n".join(lines))
    return facts


def kept_files(files: RunFiles, status: str) -> list[Path]:
    """The files that an ended run must have."""
    return [files.weights, files.log, files.predictions, files.result] if status == "done" else [files.log, files.result]


def table_text(table: pd.DataFrame) -> str:
    """The run table for a person: outcome only, flags below. The CSV has all columns."""
    losses = ("train", "val", "test")
    header = ("model", "size", "data set", "seed", "run_id", "steps", *losses, "acc.", "overrides")
    rows = [
        (
            short_model(run.model), run.size, run.dataset, str(run.seed), run.run_id, f"{run.steps:,}",
            *(("", "", "", "diverged") if run.status == "diverged" else
              (f"{run.train_loss:.3f}", f"{run.val_loss:.3f}", f"{run.test_loss:.3f}", f"{100 * run.test_accuracy:.2f} %")),
            run.overrides,
        )
        for run in table.itertuples()
    ]  # fmt: skip
    flags = [f"flag: {dataset}: {flag}" for dataset, flag in table[["dataset", "flags"]].drop_duplicates().itertuples(index=False) if flag]
    diverged = [
        f"note: {f'{run.model} {run.size} {run.dataset} seed {run.seed} {run.overrides}'.rstrip()}: {run.notes}"
        for run in table.itertuples()
        if run.status == "diverged"
    ]
    text = runs_table(header, rows, numbers=("steps", *losses, "acc."), shared=("data set", "seed", "steps", "overrides"))
    return "\n".join(
        [
            "train (last batch), val, test: losses in nats; acc.: test accuracy",
            text,
            *(f"note: {phrase}" for phrase in other_tokens(table)),
            *flags,
            *diverged,
        ]
    )
