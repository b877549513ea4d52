"""The ledger as pandas tables: a row per run, per step, per test image."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd

from diffvit.errors import UserError, first_line
from diffvit.ledger.disk import write_atomically
from diffvit.ledger.files import RunFiles
from diffvit.ledger.log import STEP_COLUMNS, LogRows, read_rows
from diffvit.ledger.results import Result, read_results
from diffvit.ledger.spec import RunSpec, overrides_text, overrides_title
from diffvit.protocol import PROTOCOLS

# The run table's: what tables have of a result, and what _flags finds.
COLUMNS = (*Result.columns(), "flags")

# What should be alike for all runs of a cell (one size of one data set); recorded, and no part of a run's identity.
_SHOULD_AGREE = (
    "fingerprint",
    "precision",
    "device",
    "device_name",
    "threads",
    "workers",
    "micro_batch",
    "fused",
    "compiled",
    "torch",
    "diffvit",
    "git_commit",
)

# What runs that differ in their seed only have in common.
CELL_AND_MODEL = ["dataset", "overrides", "size", "model"]


def run_table(checkpoints: Path, grid: Iterable[RunSpec] | None = None) -> pd.DataFrame:
    """One row an ended run, columns as in COLUMNS. A run that diverged has no accuracies and no losses.

    Args:
        grid: if given, only runs of these cells: the same model, size, data set and protocol, at any seed and precision.

    Raises:
        UserError: a damaged result file.
    """
    results = read_results(checkpoints)
    if grid is not None:
        cells = {cell_key(spec.identity("")) for spec in grid}
        results = [result for result in results if cell_key(result.identity) in cells]
    table = pd.DataFrame([_row(result) for result in results], columns=list(COLUMNS))
    for name in ("train_loss", "val_loss_last_batch", "val_loss", "val_accuracy", "test_loss", "test_accuracy", "memorised", "recovered"):
        table[name] = table[name].astype(float)
    table["false_labels"] = table["false_labels"].astype("Int64")  # whole numbers, and gaps for runs without label noise
    table = table.sort_values(["dataset", "overrides", "parameters", "model", "seed", "run_id"], ignore_index=True)
    cell_of = {result.run_id: cell_key({**result.identity, "model": ""}) for result in results}
    table["flags"] = _flags(table, [cell_of[run_id] for run_id in table["run_id"]])
    return table


def missing_runs(checkpoints: Path, specs: Iterable[RunSpec]) -> list[RunSpec]:
    """Those of the runs that have not ended here, at whatever precision and on whatever version of the data. Raises UserError."""
    ended = {(cell_key(result.identity), result.seed) for result in read_results(checkpoints)}
    return [spec for spec in specs if (cell_key(spec.identity("")), spec.seed) not in ended]


def seeds_of_study(table: pd.DataFrame) -> list[int]:
    """The seeds of a run table of which two architectures have a run of one cell, in order; where it has one architecture, all.

    So a run that `train` added by itself makes no seed of the study.
    """
    cell = [name for name in CELL_AND_MODEL if name != "model"]
    models = table.groupby([*cell, "seed"])["model"].nunique()
    enough = min(2, table["model"].nunique())
    return sorted({int(key[-1]) for key, count in models.items() if count >= enough})


def seeds_from_zero(table: pd.DataFrame) -> int:
    """The `--seeds` of a study with a run table's runs: how many of its seeds follow on each other from 0."""
    return sum(1 for number, seed in enumerate(seeds_of_study(table)) if seed == number)


def cell_key(identity: dict[str, Any]) -> str:
    """The key of a cell and architecture: a run's identity without seed, precision and the data's version."""
    return repr([(key, _sorted(identity[key])) for key in ("semantics", "model", "size", "dataset", "protocol")])


def _sorted(value: Any) -> Any:
    return sorted(value.items()) if isinstance(value, dict) else value


def _row(result: Result) -> dict[str, Any]:
    as_text = {"overrides": overrides_text(result.overrides), "notes": "; ".join(result.notes)}
    row = {**result.versions, **vars(result), "fingerprint": result.identity["fingerprint"], **as_text}
    return {column: row.get(column) for column in COLUMNS}


# Overrides that change what is learnt from, not only how: they name a condition even where all runs share them.
_ALWAYS_NAMED = ("label_noise", "input_noise")


def file_stem(name: str, overrides: str) -> str:
    """The stem of file names about `name` under overrides: "digits_epochs-3"."""
    return "_".join([name, *overrides.replace("=", "-").split()])


def all_overrides(table: pd.DataFrame) -> list[str]:
    """For each run, its overrides without those that equal the protocol, such as "epochs=3 label_noise=0.2"; "" for none.

    File names of figures have them, so that runs under other overrides do not overwrite a figure.
    """
    return [" ".join(effective_overrides(run.dataset, run.overrides)) for run in table.itertuples()]


def other_tokens(table: pd.DataFrame) -> list[str]:
    """A phrase for each data set and condition in which models have other tokens than the protocol's."""
    titles = dict.fromkeys(zip(table["dataset"], map(overrides_title, table["dataset"], all_overrides(table)), strict=True))
    return [f"{dataset}: {title}" for dataset, title in titles if "not the protocol's" in title]


def conditions(table: pd.DataFrame) -> list[str]:
    """For each run, the overrides that tell it from other runs of its data set, such as "label_noise=0.2"; "" for a plain one.

    Overrides that equal the protocol, and those that all runs of the data set share, are left out; noise in training is always
    named.
    """
    of_runs = [overrides.split() for overrides in all_overrides(table)]
    shared: dict[str, set[str]] = {}
    for dataset, parts in zip(table["dataset"], of_runs, strict=True):
        shared[dataset] = shared.get(dataset, set(parts)) & set(parts)
    return [
        " ".join(part for part in parts if part not in shared[dataset] or part.partition("=")[0] in _ALWAYS_NAMED)
        for dataset, parts in zip(table["dataset"], of_runs, strict=True)
    ]


def comparable(table: pd.DataFrame, arms: Sequence[str]) -> tuple[pd.DataFrame, list[str]]:
    """The runs of a table that may be compared, and a phrase for those that may not.

    Runs of one cell in several precisions, or on several versions of the data, would be counted as pairs of each other: of each data set
    only the kind that has most runs of the arms is kept; where it has none of theirs, most runs.
    """
    kinds = pd.Series(list(zip(table["precision"].map(str), table["fingerprint"].map(str), strict=True)), index=table.index, dtype=object)
    most = {dataset: of_arms(kinds[runs.index], runs, arms).value_counts().index[0] for dataset, runs in table.groupby("dataset")}
    keep = kinds == table["dataset"].map(most)
    left = table[~keep].groupby(["dataset", "precision", "fingerprint"]).size()
    return table[keep], [f"{count} runs of {dataset} in {precision} on data {data}" for (dataset, precision, data), count in left.items()]


def of_arms(values: pd.Series, runs: pd.DataFrame, arms: Sequence[str]) -> pd.Series:
    """What the arms' runs have of some values, so that controls decide nothing; of a table without a run of theirs, all values."""
    theirs = values[runs["model"].isin(arms)].dropna()
    return theirs if len(theirs) else values


def effective_overrides(dataset: str, overrides: str | None) -> list[str]:
    """The parts, in order of name, of a run's overrides as text, without those that equal the data set's protocol."""
    protocol = PROTOCOLS.get(dataset)

    def changes(part: str) -> bool:
        name, _, value = part.partition("=")
        return value != str(getattr(protocol, name, None))

    return sorted(filter(changes, (overrides or "").split()))


def _flags(table: pd.DataFrame, cells: list[str]) -> list[str]:
    """For each run, the fields that should agree within its cell and do not.

    Args:
        cells: for each run, what names its cell: data set, size and protocol.
    """
    flags = pd.Series("", index=table.index)
    for _, cell in table.groupby(pd.Series(cells, index=table.index)):
        differing = [f"{column}: {_listed(cell[column])}" for column in _SHOULD_AGREE if cell[column].astype(str).nunique() > 1]
        # Each architecture computes attention in a form of its own.
        if cell.groupby("model")["attention"].nunique().max() > 1:
            differing.append(f"attention: {_listed(cell['attention'])}")
        if differing:
            flags[cell.index] = "runs of this cell differ in " + ", ".join(differing)
    return flags.tolist()


def _listed(values: pd.Series) -> str:
    return " / ".join(sorted(values.astype(str).unique()))


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """The table as CSV, replacing the file in one step."""
    write_atomically(path, table.to_csv(index=False).encode())


def files_of(checkpoints: Path, run: Any) -> RunFiles:
    """The files of a row of the run table."""
    return RunFiles(Path(checkpoints), run.model, run.run_id, run.size, run.dataset)


# The columns in front of a run's steps and predictions.
_RUN_COLUMNS = ("run_id", "model", "size", "dataset", "seed")


def step_table(checkpoints: Path, table: pd.DataFrame) -> pd.DataFrame:
    """The long form: one row a step of every run, with the run's id, model, size, data set and seed in front.

    The first four are categoricals: as text they would take more memory than all numbers.

    Raises:
        UserError: a log that cannot be read, is damaged, or has not the steps that the run's result says.
    """
    if table.empty:
        return pd.DataFrame()
    for run in table.itertuples():  # a result may say anything: memory is reserved only for steps that the log has bytes for
        _check_length(files_of(checkpoints, run).log, run.steps)
    counts = table["steps"].to_numpy(np.int64)
    ends = counts.cumsum()
    # Filled run after run: a list of tables would be held beside their sum.
    columns: dict[str, np.ndarray] = {}
    for end, count, (_, rows) in zip(ends, counts, _logs(checkpoints, table), strict=True):
        for name, values in rows.columns.items():
            if name not in columns:
                columns[name] = np.empty(ends[-1], values.dtype)
            columns[name][end - count : end] = values
    of_run = np.repeat(np.arange(len(table), dtype=np.int32), counts)
    front = {name: _labels(table[name], of_run) for name in _RUN_COLUMNS[:-1]}
    return pd.DataFrame({**front, "seed": table["seed"].to_numpy(np.int64)[of_run], **columns}, copy=False)


def write_step_csv(checkpoints: Path, table: pd.DataFrame, path: Path) -> None:
    """The step table as CSV, replacing the file in one step. Numbers stand as in the logs, and no more than one run is in memory.

    Raises:
        UserError: as step_table.
    """

    def write(file: BinaryIO) -> None:
        file.write(_csv_line([*_RUN_COLUMNS, *STEP_COLUMNS]) + b"\n")
        for run, rows in _logs(checkpoints, table):
            front = _csv_line([getattr(run, name) for name in _RUN_COLUMNS]) + b","
            file.write((front + rows.text[:-1].replace(b"\n", b"\n" + front) + b"\n") if rows.text else b"")

    write_atomically(path, write)


def _logs(checkpoints: Path, table: pd.DataFrame) -> Iterator[tuple[Any, LogRows]]:
    """Each run of a run table with the steps of its log, checked against the result."""
    for run in table.itertuples():
        yield run, read_rows(files_of(checkpoints, run).log, run.steps)


def _check_length(log: Path, steps: int) -> None:
    """Raises UserError for a log that is too short to have so many steps: each has a digit and a separator for each field."""
    if not log.is_file() or log.stat().st_size < 2 * len(STEP_COLUMNS) * steps:
        read_rows(log, steps)


def _labels(values: pd.Series, of_row: np.ndarray) -> pd.Categorical:
    """A run table's column of text, spread over the rows that belong to each run."""
    codes, names = pd.factorize(values, sort=True)  # groups and pivots in the order that text would have
    small = codes.astype(np.min_scalar_type(-len(names)))  # signed, as codes are
    return pd.Categorical.from_codes(small[of_row], names)


def _csv_line(cells: Iterable[Any]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(cells)
    return text.getvalue().encode()


def prediction_table(checkpoints: Path, table: pd.DataFrame) -> pd.DataFrame:
    """One row a test image of every run that is done: label, predicted label, loss, probability of the true label."""
    done = table[table["status"] == "done"]
    parts = [_with_run(_read_predictions(files_of(checkpoints, run).predictions), run) for run in done.itertuples()]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def wrong_answers(checkpoints: Path, run: Any) -> np.ndarray:
    """1 for each test image that a run (a row of the run table) answered wrongly, else 0. [images]"""
    path = files_of(checkpoints, run).predictions
    answers = _read_predictions(path)
    if not {"label", "predicted"} <= set(answers) or len(answers) != run.test_images:
        raise UserError(f"{path} is damaged.", "`list --verify` names what else is; delete the run's _result.json and train it again.")
    return (answers["label"] != answers["predicted"]).to_numpy(np.float32)


def _read_predictions(path: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(path, comment="#")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(
            f"{path} cannot be read: {reason}.", "delete the run's _result.json, and `study` or `train` trains it again."
        ) from error


def _with_run(frame: pd.DataFrame, run: Any) -> pd.DataFrame:
    for place, name in enumerate(_RUN_COLUMNS):
        frame.insert(place, name, getattr(run, name))
    return frame
