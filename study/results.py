"""Output of finished runs: the table, its CSV files, the figures and the report."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from diffvit.errors import UserError, first_line
from diffvit.findings.kept import read_evaluations
from diffvit.ledger.disk import check_writable
from diffvit.ledger.files import RunFiles
from diffvit.ledger.spec import RunSpec, parse_overrides
from diffvit.protocol import ARMS
from study.grid import GRIDS, Grid, find_grid, named_after
from study.table import files_of, missing_runs, other_tokens, run_table, step_table, write_csv, write_step_csv
from study.text import STDOUT, put_json, runs_table, say, short_model

if TYPE_CHECKING:
    from study.options import StudyOptions


# Options of `study` that `report` takes too.
_OF_REPORT = ("--grid", "--dataset", "--model", "--epochs", "--checkpoints", "--data_root")


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
        print(table_text(table))
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
    gone = [path for files, run in zip(files_of_table(options.checkpoints, table), table.itertuples(), strict=True)
            for path in kept_files(files, run.status) if not path.is_file()]  # fmt: skip
    if gone:
        say(f"warning: files of finished runs are gone: {', '.join(map(str, gone))}")
        say("hint: delete the _result.json of such a run, and the same command trains it again.")
    return drawn, verdict


def _draw(options: StudyOptions, table: pd.DataFrame) -> bool:
    """Draw the figures. Returns False where that failed, after printing why: a figure must not fail finished training."""
    out = options.checkpoints / "figures"
    try:
        from study.report.figures import draw_figures

        draw_figures(table, step_table(options.checkpoints, table), out, options.grid.prefix)
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        say(f"error: the figures could not be drawn: {reason}\nhint: the same command draws them again: {options.command}")
        return False
    say(f"figures  {out}")
    return True


def _say_findings(options: StudyOptions, table: pd.DataFrame) -> list[dict[str, Any]]:
    """Print the verdict's sentences and what to do next. As the report, this is a look at the questions, and counted.

    Returns:
        The verdict as JSON has it.
    """
    from study.report.analysis import analyse
    from study.report.facts import answer_facts
    from study.report.sentences import sentence

    folder = options.checkpoints / _report_name([options.grid], options.epochs, named=bool(options.grid.prefix))
    facts: list[dict[str, Any]] = []
    try:
        answers = analyse(table, options.checkpoints, options.grid.arms, looks=folder / "looks.json").answers
        facts = list(map(answer_facts, answers))
        lines = ["", *map(sentence, answers)]
        if answers and not any(answer.estimate.known for answer in answers):
            lines.append("next     --seeds 3 on the same command gives intervals")
        lines.append(f"next     {_report_command(options.command)}")
    except Exception as error:  # figures and words must not fail finished training
        lines = [f"note: no verdict could be formed: {type(error).__name__}: {first_line(error)}"]
    say("\n".join(lines))
    return facts


def _report_command(study: str) -> str:
    """The `report` of the runs that a `study` command line names."""
    words = shlex.split(study.partition(" (with the secret")[0])
    start = words.index("study") if "study" in words else len(words)
    kept = [word for before, word in zip(words[start:], words[start + 1 :], strict=False)
            if word.partition("=")[0] in _OF_REPORT or before in _OF_REPORT]  # fmt: skip
    named = {word.partition("=")[0] for word in kept}
    if "--model" in named and "--grid" not in named:  # which has no default in `report`
        kept = ["--grid", "digits", *kept]
    return shlex.join([*words[:start], "report", *kept])


def kept_files(files: RunFiles, status: str) -> list[Path]:
    """The files that an ended run must have."""
    return [files.weights, files.log, files.predictions, files.result] if status == "done" else [files.log, files.result]


def table_text(table: pd.DataFrame) -> str:
    """The run table for a person: outcome only, flags below. The CSV has all columns."""
    losses = ("train loss", "val loss", "test loss")
    header = ("model", "size", "data set", "seed", "run_id", "steps", *losses, "test accuracy", "overrides")
    rows = [
        (
            short_model(run.model), run.size, run.dataset, str(run.seed), run.run_id, f"{run.steps:,}",
            *(("", "", "", "diverged") if run.status == "diverged" else
              (f"{run.train_loss:.4f}", f"{run.val_loss:.4f}", f"{run.test_loss:.4f}", f"{100 * run.test_accuracy:.2f} %")),
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
    text = runs_table(header, rows, numbers=("steps", *losses, "test accuracy"), shared=("data set", "seed", "steps", "overrides"))
    return "\n".join([text, *(f"note: {phrase}" for phrase in other_tokens(table)), *flags, *diverged])


def plot_grid(
    checkpoints: Path,
    grid: str | None,
    out: Path | None = None,
    epochs: int | None = None,
    dataset: str | None = None,
    models: Sequence[str] = (),
    data_root: str | None = None,
) -> list[Path]:
    """Draw the finished runs of a grid, or of the built-in grids that have any. Returns the files.

    Args:
        out: None: where a study draws. dataset, models, data_root: as find_grid takes them.

    Raises:
        UserError: there is nothing to draw, or the folder cannot be written.
    """
    from study.report.figures import draw_figures

    table, grids = _finished(checkpoints, grid, epochs, dataset, data_root, models)
    out = out or checkpoints / "figures"
    check_writable(out)
    return draw_figures(table, step_table(checkpoints, table), out, grids[0].prefix if grid else "")


def _report_name(grids: Sequence[Grid], epochs: int | None, named: bool) -> str:
    """The report's folder in the checkpoints folder: built-in grids share one, a grid file that is named has its own."""
    return named_after(f"{grids[0].prefix if named else ''}report", grids, epochs)


def report_grid(
    checkpoints: Path, grid: str | None, out: Path | None = None, epochs: int | None = None, dataset: str | None = None,
    models: Sequence[str] = (), data_root: str | None = None, price: float | None = None,
) -> list[Path]:  # fmt: skip
    """Write the report of a grid's finished runs, or of the built-in grids' that have any. Returns the files.

    Args:
        out: None: report in the checkpoints folder, with a grid file's name and the overrides in its name.
        dataset, models, data_root: as find_grid takes them. price: dollars an hour of one GPU.

    Raises:
        UserError: nothing is finished, the folder cannot be written, or a price is given for runs of which none was on a GPU.
    """
    from study.report.write import write_report

    table, grids = _finished(checkpoints, grid, epochs, dataset, data_root, models)
    if price is not None and not table["device"].astype(str).str.startswith("cuda").any():
        raise UserError("--price is of a GPU's hour, and none of these runs was on a GPU.", "leave --price out.")
    out = out or checkpoints / _report_name(grids, epochs, named=grid is not None)
    check_writable(out)
    arms = grids[0].arms if grid else ARMS
    return write_report(checkpoints, table, out, _commands(checkpoints, grid, epochs, dataset, models, data_root), arms, price)


def verdict_json(
    checkpoints: Path,
    grid: str | None,
    out: Path | None = None,
    epochs: int | None = None,
    dataset: str | None = None,
    models: Sequence[str] = (),
    data_root: str | None = None,
) -> list[dict[str, Any]]:
    """The verdict of the report of these arguments, as JSON has it."""
    from study.report.analysis import analyse
    from study.report.facts import answer_facts

    table, grids = _finished(checkpoints, grid, epochs, dataset, data_root, models)
    out = out or checkpoints / _report_name(grids, epochs, named=grid is not None)
    arms = grids[0].arms if grid else ARMS
    return list(map(answer_facts, analyse(table, checkpoints, arms, looks=out / "looks.json").answers))


def _commands(
    checkpoints: Path, grid: str | None, epochs: int | None, dataset: str | None, models: Sequence[str], data_root: str | None
) -> list[str]:
    """The commands that reproduce these runs. Without a grid: of each built-in one that adds runs to those before it."""
    commands: list[str] = []
    seen: set[str] = set()
    for name in [grid] if grid else list(GRIDS):
        specs = find_grid(name, dataset, data_root, models).runs(overrides={"epochs": epochs})
        runs = run_table(checkpoints, specs)
        if set(runs["run_id"]) <= seen:
            continue
        seen |= set(runs["run_id"])
        values = [("--grid", name), ("--dataset", dataset), *(("--model", model) for model in models), ("--epochs", epochs)]
        options = shlex.join(text for option, value in values if value is not None for text in (option, str(value)))
        more_seeds = {spec.seed for spec in specs} == {0} and int(runs["seed"].max()) > 0
        commands.append(f"uv run run.py study {options}" + (f" --seeds {int(runs['seed'].max()) + 1}" if more_seeds else ""))
        kinds = {kind for files in files_of_table(checkpoints, runs) for kind in read_evaluations(files)}
        if kinds:
            commands.append(f"uv run run.py evaluate {options} " + " ".join(f"--{kind}" for kind in sorted(kinds)))
    return [*commands, "uv run run.py report" + (f" {options}" if grid else "")]


def files_of_table(checkpoints: Path, table: pd.DataFrame) -> list[RunFiles]:
    """The files of each row of a run table."""
    return [files_of(checkpoints, run) for run in table.itertuples()]


def finished_checkpoints(
    checkpoints: Path,
    grid: str,
    epochs: int | None = None,
    dataset: str | None = None,
    data_root: str | None = None,
    models: Sequence[str] = (),
) -> list[Path]:
    """The weights of a grid's finished runs. Raises UserError where there are none."""
    table, _ = _finished(checkpoints, grid, epochs, dataset, data_root, models)
    done = table[table["status"] == "done"]
    if done.empty:
        raise UserError(f"all finished runs of {grid} have diverged.", "there are no weights to evaluate.")
    return [files.weights for files in files_of_table(checkpoints, done)]


def _finished(
    checkpoints: Path, grid: str | None, epochs: int | None, dataset: str | None, data_root: str | None = None, models: Sequence[str] = ()
) -> tuple[pd.DataFrame, list[Grid]]:
    """The run table of a grid, or of all built-in ones, and those grids; UserError where none of its runs is finished."""
    check_dataset(grid, dataset)
    if models and grid is None:
        raise UserError("--model is given without --grid.", "it says which architectures of a grid's runs are meant.")
    grids = [find_grid(grid, dataset, data_root, models)] if grid else list(GRIDS.values())
    specs = [spec for each in grids for spec in each.runs(overrides={"epochs": epochs})]
    table = run_table(checkpoints, specs)
    if table.empty:
        name = f"the grid {grid}" if grid else "a built-in grid"
        raise UserError(
            f"{checkpoints} has no finished run of {name}.", "`run.py list` shows the runs there are; `run.py study` trains a grid."
        )
    return table, grids


def check_dataset(grid: str | None, dataset: str | None) -> None:
    """Raises UserError for a data set that is given without a grid."""
    if dataset is not None and grid is None:
        raise UserError("--dataset is given without --grid.", "--dataset goes with --grid noise, lr, controls or choices.")
