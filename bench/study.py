"""What Ray and its dashboard cost: the built-in study of twelve runs, with and without dashboard, against bare loops that train the same
runs on the same number of processes.

    python -m bench.study

The bare loops are a pool of processes with one thread each, longest run first, and do the same work on their runs: train, evaluate, write
the files. Start-up is the time from the command to the first run's log file; the makespan is from there to the last result file. The
bars: the study's start-up and makespan together are at most 1.25 times the bare loops' makespan, and 15 seconds; its makespan is at most
1.05 times that of the study without dashboard.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from bench.timing import Bar, finish, json_option, spread, table
from diffvit.ledger.files import result_paths
from diffvit.ledger.results import read_result
from diffvit.ledger.spec import RunSpec
from diffvit.machine.host import cpus
from study.grid import find_grid

ROOT = Path(__file__).resolve().parents[1]

# The bars.
MAKESPAN = 1.25
START_UP_SECONDS = 15.0
DASHBOARD = 1.05
HELP_SECONDS = 0.5


def bare_loops(specs: list[RunSpec], checkpoints: Path, slots: int) -> None:
    """Trains the runs in `slots` processes."""
    longest_first = sorted(specs, key=lambda spec: -spec.protocol.depths[spec.size])
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(slots, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for done in [pool.submit(_train, spec, checkpoints) for spec in longest_first]:
            done.result()


def _train(spec: RunSpec, checkpoints: Path) -> None:
    from diffvit.train import train

    train(spec, checkpoints, device="cpu")


def study(checkpoints: Path, epochs: int | None, dashboard: bool = True) -> None:
    """The command."""
    command = [sys.executable, "run.py", "study", "--grid", "digits", "--checkpoints", str(checkpoints), "--address", "local"]
    command += ["--dashboard", str(dashboard).lower()]
    command += ["--epochs", str(epochs)] if epochs else []
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")


def phases(work: Callable[[Path], None]) -> dict[str, Any]:
    """Start-up, makespan and end, in seconds, of something that trains runs into an empty folder."""
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(1) as pool:
        checkpoints = Path(folder)
        start = time.time()
        done = pool.submit(work, checkpoints)
        first = None
        while first is None and not done.done():
            time.sleep(0.02)
            first = time.time() if any(checkpoints.glob("*/*_training.log")) else None
        done.result()
        end = time.time()
        paths = result_paths(checkpoints)
        results = [read_result(path) for path in paths]
        last = max(path.stat().st_mtime for path in paths)
        assert first is not None
        return {
            "start_up": first - start, "makespan": last - first, "end": end - last, "whole": end - start,
            "accuracies": {result.run_id: result.test_accuracy for result in results if result},
        }  # fmt: skip


@click.command()
@click.option("--rounds", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--epochs", type=click.IntRange(min=1), help="Fewer than the protocol's, for a trial of this benchmark.")
@json_option
def main(rounds: int, epochs: int | None, json_path: Path | None) -> None:
    """Time the built-in study and bare loops."""
    slots = cpus()
    specs = find_grid("digits").runs(overrides={"epochs": epochs})
    found: dict[str, list[dict[str, Any]]] = {"study": [], "no dashboard": [], "bare loops": []}
    for number in range(rounds):
        actions: dict[str, Callable[[Path], None]] = {
            "study": lambda folder: study(folder, epochs),
            "no dashboard": lambda folder: study(folder, epochs, dashboard=False),
            "bare loops": lambda folder: bare_loops(specs, folder, slots),
        }
        for name in list(actions) if number % 2 == 0 else reversed(list(actions)):
            found[name].append(phases(actions[name]))
        ours, bare = found["study"][-1], found["bare loops"][-1]
        if ours["accuracies"] != bare["accuracies"] or len(specs) != len(bare["accuracies"]):
            raise click.ClickException("the study and the bare loops did not come to the same accuracies")
    helps = [_seconds_of_help() for _ in range(5)]

    table(
        f"{len(specs)} runs on {slots} slots; the accuracies of study and bare loops are the same",
        ("", "start-up", "makespan", "table and figures", "whole"),
        [
            (name, *(spread(np.asarray([phase[key] for phase in found[name]])) for key in ("start_up", "makespan", "end", "whole")))
            for name in found
        ],
    )
    click.echo(f"run.py --help   {spread(np.asarray(helps))}\n")
    pairs = list(zip(found["study"], found["bare loops"], strict=True))
    dashboard = [ours["makespan"] / bare["makespan"] for ours, bare in zip(found["study"], found["no dashboard"], strict=True)]
    more = [ours["start_up"] + ours["makespan"] - MAKESPAN * bare["makespan"] for ours, bare in pairs]
    bars = [
        Bar(
            "the study's makespan over that of bare loops, worst round",
            max(ours["makespan"] / bare["makespan"] for ours, bare in pairs),
            MAKESPAN,
        ),
        Bar(f"seconds beyond {MAKESPAN} times the bare loops' makespan, start-up included, worst round", max(more), START_UP_SECONDS),
        Bar("the study's makespan over that without dashboard, median", float(np.median(dashboard)), DASHBOARD),
        Bar("seconds of run.py --help, median", float(np.median(helps)), HELP_SECONDS),
    ]
    finish({"slots": slots, "rounds": found, "help_seconds": helps}, bars, torch.device("cpu"), json_path)


def _seconds_of_help() -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "run.py", "--help"], cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
