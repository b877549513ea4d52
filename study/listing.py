"""What `run.py list` prints: the ledger's runs, or with --verify what is damaged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffvit.ledger.disk import listed
from diffvit.ledger.files import RunFiles, in_ledger, model_folders, result_paths
from diffvit.ledger.spec import overrides_text, parse_overrides
from diffvit.ledger.verify import verify_run
from diffvit.protocol import PROTOCOLS
from study.grid import find_grid
from study.plan import load_fingerprints, run_ids_of
from study.results import kept_files
from study.table import effective_overrides, files_of, run_table
from study.text import runs_table, short_model


def ledger_rows(
    checkpoints: Path,
    grid: str | None,
    seeds: int | None = None,
    epochs: int | None = None,
    data_root: str | None = None,
    dataset: str | None = None,
    models: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """A row for each finished run, and with a grid for each of its runs that is not done, by data set, overrides, size, model and seed.

    Args:
        dataset, models: as find_grid takes them.

    Raises:
        UserError: an unknown grid, or a damaged result file.
    """

    def cell(model: str, size: str, dataset: str, seed: int, overrides: str) -> tuple:
        return model, size, dataset, seed, *effective_overrides(dataset, overrides)

    specs = None
    if grid:
        from study.options import StudyOptions  # torch comes with it

        specs = StudyOptions(find_grid(grid, dataset, data_root, models), checkpoints, seeds, epochs).on(None).runs()
    table = run_table(checkpoints, specs)
    rows = []
    for run in table.itertuples():
        paths = kept_files(files_of(checkpoints, run), run.status)
        row = {"state": run.status, **{key: getattr(run, key) for key in ("run_id", "model", "size", "dataset", "seed", "overrides")}}
        row |= {"test_accuracy": run.test_accuracy if run.status == "done" else None, "finished": run.finished}
        rows.append(
            row | {"files": [str(path) for path in paths if path.is_file()], "missing": [str(path) for path in paths if not path.is_file()]}
        )
    if specs:
        fingerprints = load_fingerprints(specs, data_root, required=False)
        cells_done = {cell(*(row[key] for key in ("model", "size", "dataset", "seed", "overrides"))) for row in rows}
        ids_done = {row["run_id"] for row in rows}
        for spec in specs:
            # In whatever precision: the machine that trained may have another than this one. Without the data at hand, a run of the
            # cell counts; with them, only this very run.
            run_ids = list(run_ids_of(spec, fingerprints[spec.dataset]).values()) if spec.dataset in fingerprints else []
            of_spec = cell(spec.model, spec.size, spec.dataset, spec.seed, overrides_text(spec.overrides))
            if ids_done.intersection(run_ids) if run_ids else of_spec in cells_done:
                continue
            started = [run_id for run_id in run_ids if RunFiles.of(checkpoints, spec, run_id).log.is_file()]
            rows.append(
                {
                    "state": "unfinished" if started else "to do", "run_id": next(iter(started or run_ids), None),
                    "model": spec.model, "size": spec.size,
                    "dataset": spec.dataset, "seed": spec.seed, "overrides": overrides_text(spec.overrides),
                    "test_accuracy": None, "finished": None, "files": [], "missing": [],
                }
            )  # fmt: skip
    return [{**row, "overrides": parse_overrides(row["overrides"])} for row in sorted(rows, key=_place)]


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    """Where a row is listed: by data set, overrides, size, model and seed."""
    protocol = PROTOCOLS.get(row["dataset"])
    size = row["size"]
    number = protocol.sizes.index(size) if protocol and size in protocol.sizes else -1
    return row["dataset"], row["overrides"], number, size, row["model"], row["seed"]


def verify_ledger(checkpoints: Path) -> dict[str, Any]:
    """Re-read all files of all ended runs and the states of all others.

    Returns:
        "damaged": a sentence for each thing that is wrong; "summary": one for all.
    """
    from diffvit.keeping.state import StateFolder

    paths = result_paths(checkpoints)
    of_runs = [verify_run(path) for path in paths]
    unfinished = sorted({path.parent.name for path in checkpoints.glob(".state/*/*.state")})
    of_states = [wrong for run_id in unfinished for wrong in StateFolder(checkpoints, run_id).damaged()]
    bad = sum(map(bool, of_runs))
    summary = f"{len(paths) - bad} of {len(paths)} ended runs are whole, {len(unfinished)} unfinished runs have states"
    return {"damaged": [*(wrong for each in of_runs for wrong in each), *of_states], "summary": summary}


def _unfinished_notes(checkpoints: Path) -> list[str]:
    """A sentence where there are runs that have not ended: what they are stands in their grid."""
    files = [path for folder in model_folders(checkpoints) for path in listed(folder)]
    begun, ended = ({path.name.removesuffix(end) for path in files if path.name.endswith(end)} for end in ("_training.log", "_result.json"))
    of_grid = in_ledger(["list", "--grid", "GRID"], checkpoints)
    return [f"note: {count} unfinished; `{of_grid}` names those of a grid"] if (count := len(begun - ended)) else []


def ledger_text(rows: list[dict[str, Any]], checkpoints: Path, grid: str | None) -> str:
    """The ledger for a person."""
    if not rows:
        found = f"no finished runs in {checkpoints}" if checkpoints.is_dir() else f"there is no folder {checkpoints} yet"
        notes = _unfinished_notes(checkpoints) if grid is None else []
        return "\n".join([f"{found}; `{in_ledger(['study'], checkpoints)}` trains twelve runs", *notes])
    header = ("state", "model", "size", "data set", "seed", "run_id", "accuracy", "finished", "overrides")
    body = [
        (
            row["state"], short_model(row["model"]), row["size"], row["dataset"], str(row["seed"]), row["run_id"] or "",
            "" if row["test_accuracy"] is None else f"{100 * row['test_accuracy']:.2f} %", (row["finished"] or "")[5:16].replace("T", " "),
            overrides_text(row["overrides"]),
        )
        for row in rows
    ]  # fmt: skip
    missing = [f"missing: {path}" for row in rows for path in row["missing"]]
    states = Counter(row["state"] for row in rows)
    others = "".join(f", {count} {state}" for state, count in states.items() if state != "done")
    table = runs_table(header, body, numbers=("accuracy",), shared=("data set", "seed", "state", "overrides"))
    absent = ", ".join(dict.fromkeys(row["dataset"] for row in rows if not row["run_id"]))
    notes = [f"note: {absent}: data not here, so run_ids are not known"] if absent else []
    notes += _unfinished_notes(checkpoints) if grid is None else []
    return "\n".join([table, *missing, *notes, f"{states['done']} of {len(rows)} runs done{others}"])
