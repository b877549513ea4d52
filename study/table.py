"""The ledger as pandas tables: one row a run, one row a step, one row a test image."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from diffvit.ledger import RunFiles, RunSpec, read_results, write_atomically
from diffvit.log import read_log

# Order of the run table's columns; identity first, outcome, then where it ran.
COLUMNS = (
    "run_id", "model", "size", "dataset", "seed", "precision", "overrides", "fingerprint",
    "depth", "parameters", "forward_flops", "steps", "images", "seconds", "images_per_second",
    "train_loss", "val_loss_last_batch", "val_loss", "val_accuracy", "test_loss", "test_accuracy", "test_images",
    "device", "device_name", "threads", "workers", "micro_batch", "attention", "deterministic",
    "python", "torch", "diffvit", "git_commit", "started", "finished", "notes", "flags",
)  # fmt: skip

# What should be alike for all runs of a cell (one size of one data set); recorded, and no part of a run's identity.
_SHOULD_AGREE = ("precision", "device", "device_name", "threads", "workers", "micro_batch", "attention", "torch", "diffvit", "git_commit")


def run_table(checkpoints: Path, grid: Iterable[RunSpec] | None = None) -> pd.DataFrame:
    """One row a finished run, columns as in COLUMNS.

    Args:
        grid: if given, only runs of these cells: the same model, size, data set and protocol, at any seed and precision.

    Raises:
        UserError: a damaged result file.
    """
    results = read_results(checkpoints)
    if grid is not None:
        cells = {_cell_key(spec.identity("")) for spec in grid}
        results = [result for result in results if _cell_key(result["identity"]) in cells]
    table = pd.DataFrame([_row(result) for result in results], columns=list(COLUMNS))
    table = table.sort_values(["dataset", "parameters", "model", "seed", "run_id"], ignore_index=True)
    table["flags"] = _flags(table)
    return table


def _cell_key(identity: dict[str, Any]) -> str:
    return repr([(key, _sorted(identity[key])) for key in ("semantics", "model", "size", "dataset", "protocol")])


def _sorted(value: Any) -> Any:
    return sorted(value.items()) if isinstance(value, dict) else value


def _row(result: dict[str, Any]) -> dict[str, Any]:
    row = {**result, **result["versions"], "fingerprint": result["identity"]["fingerprint"]}
    row["overrides"] = " ".join(f"{name}={value}" for name, value in result["overrides"].items())
    row["notes"] = "; ".join(result["notes"])
    return {column: row.get(column) for column in COLUMNS}


def _flags(table: pd.DataFrame) -> list[str]:
    """For each run, what differs between the runs of its cell although it should not."""
    flags = pd.Series("", index=table.index)
    comparable = table.assign(attention=table["attention"].astype(str).str.split(",").str[0])
    for _, cell in comparable.groupby(["dataset", "size", "overrides"], dropna=False):
        differing = [
            f"{column}: {' / '.join(map(str, values))}"
            for column in _SHOULD_AGREE
            if len(values := cell[column].drop_duplicates().sort_values(key=lambda s: s.astype(str))) > 1
        ]
        if differing:
            flags[cell.index] = "runs of this cell differ in " + ", ".join(differing)
    return flags.tolist()


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """The table as CSV, replacing the file in one step."""
    write_atomically(path, table.to_csv(index=False).encode())


def files_of(checkpoints: Path, run: Any) -> RunFiles:
    """The files of a row of the run table."""
    return RunFiles(Path(checkpoints), run.model, run.run_id, run.size, run.dataset)


def step_table(checkpoints: Path, table: pd.DataFrame) -> pd.DataFrame:
    """The long form: one row a step of every run, with the run's id, model, size, data set and seed in front."""
    parts = [_with_run(read_log(files_of(checkpoints, run).log), run) for run in table.itertuples()]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def prediction_table(checkpoints: Path, table: pd.DataFrame) -> pd.DataFrame:
    """One row a test image of every run: label, predicted label, loss, probability of the true label."""
    parts = [_with_run(pd.read_csv(files_of(checkpoints, run).predictions), run) for run in table.itertuples()]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def _with_run(frame: pd.DataFrame, run: Any) -> pd.DataFrame:
    for place, name in enumerate(("run_id", "model", "size", "dataset", "seed")):
        frame.insert(place, name, getattr(run, name))
    return frame
