"""Which shares of a data sheet's peak and bandwidth fit measured cells: the constants of study/cost/forecast.py.

    python -m bench.fit_sheet docs/results/gpu/cells.json     what `python -m bench.cells --json` wrote; several files are fitted together

Least squares of the cells' relative errors. A cell's time is that of a whole run of its protocol, without its start.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from scipy.optimize import lsq_linear

from bench.timing import Bar, table
from diffvit.ledger.spec import RunSpec
from study.cost.devices import Sheet, find_sheet, sheet_of
from study.cost.forecast import SHARE_OF_BANDWIDTH, SHARE_OF_PEAK, least_seconds
from study.plan import plan_runs

# No share can be larger than what plain large kernels reach: 739 TFLOP/s and 4056 GB/s on an H200, measured.
MOST = (739 / 989, 4056 / 4800)

# The bars of a forecast, as relative errors.
OF_A_CELL, OF_THE_GRID = 0.30, 0.15

IN_FORCE = (SHARE_OF_PEAK["bf16"], SHARE_OF_BANDWIDTH)


@dataclass(frozen=True)
class Cell:
    """A measured cell.

    Attributes:
        seconds: of a whole run but for its start.
        products, moved: seconds of its products at the whole peak, and of its bytes at the whole bandwidth.
    """

    title: str
    gpu: str
    seconds: float
    products: float
    moved: float
    start: float


def read_cells(path: Path, gpu: str | None = None) -> list[Cell]:
    """The cells of a file of bench.cells at bf16.

    Args:
        gpu: a name in study.cost.devices.SHEETS; None: as the file says.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    device = content.get("machine", {}).get("device_name", "")
    sheet = find_sheet(gpu) if gpu else sheet_of(device)
    if sheet is None:
        raise click.ClickException(f"{path}: there is no data sheet of {device!r}; give --gpu")
    if content.get("toy"):
        raise click.ClickException(f"{path} is of toy size")
    return [_cell(row, sheet) for row in content["cells"]]


def _cell(row: dict[str, Any], sheet: Sheet) -> Cell:
    spec = RunSpec.of(row["model"], row["size"], row["dataset"], precision="bf16")
    if row["batch"] != spec.protocol.batch_size:
        raise click.ClickException(f"{spec.title} was measured at another batch than its protocol's")
    (run,) = plan_runs([spec], Path("nowhere"), {})
    _, val, test = spec.protocol.images
    seconds = run.steps * row["seconds_a_step"] + (val + test) * row["seconds_an_image_evaluated"]
    products, moved = (run.train_flops / run.forward_flops * each for each in least_seconds(sheet, run))
    return Cell(f"{row['model']} {row['size']} {row['dataset']}", sheet.name, seconds, products, moved, row["start_seconds"])


def fit(cells: Sequence[Cell]) -> tuple[float, float]:
    """The shares of peak and bandwidth."""
    times = np.array([(cell.products / cell.seconds, cell.moved / cell.seconds) for cell in cells])
    found = lsq_linear(times, np.ones(len(cells)), ([1 / share for share in MOST], np.inf)).x
    return float(1 / found[0]), float(1 / found[1])


def errors(cells: Sequence[Cell], shares: tuple[float, float]) -> tuple[list[float], float]:
    """Relative errors of a forecast by these shares: of each cell, and of their sum."""
    forecast = [cell.products / shares[0] + cell.moved / shares[1] for cell in cells]
    of_cells = [seconds / cell.seconds - 1 for seconds, cell in zip(forecast, cells, strict=True)]
    return of_cells, sum(forecast) / sum(cell.seconds for cell in cells) - 1


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--gpu", help="Name of the GPU's data sheet.  [default: as each file says]")
def main(files: tuple[Path, ...], gpu: str | None) -> None:
    """Fit a data sheet's shares to measured cells."""
    cells = [cell for path in files for cell in read_cells(path, gpu)]
    fitted = fit(cells)
    rows = []
    for name in dict.fromkeys(cell.gpu for cell in cells):
        some = [cell for cell in cells if cell.gpu == name]
        (by_fit, grid_by_fit), (by_now, grid_by_now) = errors(some, fitted), errors(some, IN_FORCE)
        for cell, one, other in zip(some, by_fit, by_now, strict=True):
            rows.append((cell.title, name, f"{cell.seconds / 3600:.3f}", f"{100 * one:+.0f} %", f"{100 * other:+.0f} %"))
        hours = sum(cell.seconds for cell in some) / 3600
        rows.append(("all", name, f"{hours:.3f}", f"{100 * grid_by_fit:+.0f} %", f"{100 * grid_by_now:+.0f} %"))
        for bar in _bars(name, by_now, grid_by_now):
            click.echo(str(bar))
    table("measured cells, and the error of a forecast", ("cell", "GPU", "hours", "fitted", "constants in force"), rows)
    click.echo(f"fitted: SHARE_OF_PEAK {fitted[0]:.3f}, SHARE_OF_BANDWIDTH {fitted[1]:.3f}; in force: {IN_FORCE[0]:g}, {IN_FORCE[1]:g}")
    starts = [cell.start for cell in cells]
    click.echo(
        f"start of a run: {starts[0]:.1f} s of the first, {statistics.median(starts[1:] or starts):.1f} s in the median of the others"
    )


def _bars(gpu: str, of_cells: Sequence[float], of_grid: float) -> list[Bar]:
    worst = max(map(abs, of_cells))
    return [
        Bar(f"{gpu}: largest error of a cell, constants in force", worst, OF_A_CELL),
        Bar(f"{gpu}: error of the grid, constants in force", abs(of_grid), OF_THE_GRID),
    ]


if __name__ == "__main__":
    main()
