"""What commands make of finished runs: figures, the report, its verdict, and which weights there are."""

from __future__ import annotations

import functools
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from diffvit.errors import UserError
from diffvit.findings.kept import read_evaluations
from diffvit.ledger.disk import check_writable
from diffvit.ledger.files import in_ledger, listing_hint
from diffvit.ledger.spec import parse_overrides
from diffvit.protocol import ARMS, MODELS, PROTOCOLS
from study.grid import GRIDS, Grid, find_grid, named_after
from study.table import files_of, run_table, seeds_from_zero, step_table

if TYPE_CHECKING:
    from study.report.verdict import Answer


@dataclass(frozen=True)
class FinishedRuns:
    """The finished runs of a grid in a ledger.

    Attributes:
        grid: a name or file; None: the built-in grids that have any.
        epochs: of a trial, instead of the grid's.
        dataset, models, data_root: as find_grid takes them.

    Raises:
        UserError: what goes with a grid is given without one.
    """

    checkpoints: Path
    grid: str | None = None
    epochs: int | None = None
    dataset: str | None = None
    models: Sequence[str] = ()
    data_root: str | None = None

    def __post_init__(self) -> None:
        check_of_grid(self.grid, dataset=self.dataset, model=self.models)

    @functools.cached_property  # a file is read once, and its data looked at
    def grids(self) -> list[Grid]:
        """The grid, or the built-in ones. Raises UserError."""
        return [find_grid(self.grid, self.dataset, self.data_root, self.models)] if self.grid else list(GRIDS.values())

    def table(self) -> pd.DataFrame:
        """The run table. Raises UserError where no run is finished."""
        specs = [spec for each in self.grids for spec in each.runs(overrides={"epochs": self.epochs})]
        table = run_table(self.checkpoints, specs)
        if table.empty:
            name = f"the grid {self.grid}" if self.grid else "a built-in grid"
            trains = f"`{in_ledger(['study', *self._options(self.grid)], self.checkpoints)}` trains {'it' if self.grid else 'one'}."
            if not self.checkpoints.is_dir():
                raise UserError(f"there is no folder {self.checkpoints}, and so no finished run of {name}.", trains)
            hint = f"{listing_hint(self.checkpoints)} {trains}"
            raise UserError(f"{self.checkpoints} has no finished run of {name}.", hint)
        return table

    def weights(self) -> list[Path]:
        """The runs' weights. Raises UserError where there are none."""
        table = self.table()
        done = table[table["status"] == "done"]
        if done.empty:
            raise UserError(f"all finished runs of {self.grid} have diverged.", "there are no weights to evaluate.")
        return [files_of(self.checkpoints, run).weights for run in done.itertuples()]

    def plot(self, out: Path | None = None) -> list[Path]:
        """Draw the runs. Returns the files.

        Args:
            out: None: where a study draws.

        Raises:
            UserError: there is nothing to draw, or the folder cannot be written.
        """
        from study.report.figures import draw_figures

        table, out = self.table(), out or self.checkpoints / "figures"
        check_writable(out)
        return draw_figures(table, step_table(self.checkpoints, table), out, self.grids[0].prefix if self.grid else "", self._arms)

    def report(self, out: Path | None = None, price: float | None = None) -> tuple[list[Path], list[Answer]]:
        """Write the report. Returns its files and its answers.

        Args:
            out: None: report in the checkpoints folder, with a grid file's name and the overrides in its name.
            price: dollars an hour of one GPU.

        Raises:
            UserError: nothing is finished, the folder cannot be written, or a price is given for runs of which none was on a GPU.
        """
        from study.report.write import write_report

        table = self.table()
        out = out or self.checkpoints / report_name(self.grids, self.epochs, named=self.grid is not None)
        if price is not None and not table["device"].astype(str).str.startswith("cuda").any():
            raise UserError("--price is of a GPU's hour, and none of these runs was on a GPU.", "leave --price out.")
        check_writable(out)
        return write_report(self.checkpoints, table, out, self._commands(), self._arms, price)

    @property
    def _arms(self) -> tuple[str, ...]:
        return self.grids[0].arms if self.grid else ARMS

    def _options(self, grid: str | None) -> list[str]:
        """The options that choose the runs."""
        values = [("--grid", grid), ("--dataset", self.dataset), *(("--model", model) for model in self.models), ("--epochs", self.epochs)]
        return [text for option, value in values if value is not None for text in (option, str(value))]

    def _commands(self) -> list[str]:
        """The commands that reproduce these runs. Without a grid: of each built-in one that adds runs to those before it."""
        commands: list[str] = []
        seen: set[str] = set()
        for name, grid in [(self.grid, self.grids[0])] if self.grid else GRIDS.items():
            specs = grid.runs(overrides={"epochs": self.epochs})
            runs = run_table(self.checkpoints, specs)
            if set(runs["run_id"]) <= seen:
                continue
            seen |= set(runs["run_id"])
            options = shlex.join(self._options(name))
            asked: dict[str, set[int]] = {}
            for spec in specs:
                asked.setdefault(spec.dataset, set()).add(spec.seed)
            first, seeds = next(iter(asked.values())), seeds_from_zero(runs)
            more = seeds > len(first) and all(of == set(range(len(first))) for of in asked.values())
            commands.append(f"uv run run.py study {options}" + (f" --seeds {seeds}" if more else ""))
            beside = [run for run in runs.itertuples() if run.seed not in (range(seeds) if more else asked[run.dataset])]
            commands += [command for command in map(_train_command, beside) if command not in commands]
            kinds = {kind for run in runs.itertuples() for kind in read_evaluations(files_of(self.checkpoints, run))}
            if kinds:
                commands.append(f"uv run run.py evaluate {options} " + " ".join(f"--{kind}" for kind in sorted(kinds)))
        return [*commands, "uv run run.py report" + (f" {options}" if self.grid else "")]


def _train_command(run: Any) -> str:
    """The command that trained a run beside a study, or a comment where the ledger's names are not those that were given."""
    if run.model not in MODELS or run.dataset not in PROTOCOLS:
        return f"# beside it: {run.model} {run.size} {run.dataset} seed {run.seed} {run.overrides}".rstrip()
    names = {name: str(getattr(run, name)) for name in ("model", "size", "dataset", "seed")}
    values = {**names, **{name: json.dumps(value) for name, value in parse_overrides(run.overrides).items()}}
    return f"uv run run.py train {shlex.join(text for name, value in values.items() for text in (f'--{name}', value))}"


def report_name(grids: Sequence[Grid], epochs: int | None, named: bool) -> str:
    """The report's folder in the checkpoints folder: built-in grids share one, a grid file that is named has its own."""
    return named_after(f"{grids[0].prefix if named else ''}report", grids, epochs)


def check_of_grid(grid: str | None, **options: Any) -> None:
    """Raises UserError where options that choose among a grid's runs are given without a grid."""
    given = [name for name, value in options.items() if value not in (None, (), [])]
    if given and grid is None:
        what = "--dataset goes with --grid noise, lr, controls or choices." if given[0] == "dataset" else "it chooses among a grid's runs."
        raise UserError(f"--{given[0]} is given without --grid.", what)
