"""How long tables of a large ledger take, and how much memory: a grid of 1,000 runs, and their logs of 5,000 steps each.

    python -m bench.scale                                   1,000 runs x 5,000 steps, three rounds (minutes, and 0.4 GB of temporary disk)
    python -m bench.scale --json docs/results/scale.json    and the outcome as JSON

One run is trained for a few steps; its result is what the ledger's other results are made of, so that they have all that real ones
have. Their logs are written by the training log itself, and their weights are a few bytes, which no table reads. Beside the grid's runs
the ledger has some of another grid. Each task is a fresh process, measured from its start to its end, its largest resident memory with
it, after one round that only checks that its outcome is right. The ledger has just been written or read, so files come from the page
cache. Exit code 1 if a bar is missed.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import click

from diffvit.machine.host import cpus, memory_bytes

# Nothing heavy is imported here: a child's largest memory, as the kernel counts it, is never below that of the process that starts it.

ROOT = Path(__file__).resolve().parents[1]
GIGABYTE = 1e9

# Runs for each seed of the grid: two data sets x five conditions x two sizes x two models.
RUNS_A_SEED = 40
# Runs of the ledger that are not the grid's.
STRANGERS = 40
# Each so manyth run has diverged.
DIVERGED_EVERY = 50


@dataclass(frozen=True)
class Task:
    """Something that a user does with a ledger.

    Attributes:
        title: for the printed table.
        command: from a ledger's folder and its grid file to a process's command line.
        seconds: what it may take in the slowest round; None where there is no bar. bytes: the same of resident memory.
    """

    title: str
    command: Callable[[Path], list[str]]
    seconds: float | None = None
    bytes: float | None = None


def _function(name: str) -> Callable[[Path], list[str]]:
    """A function of this file as a process of its own."""
    return lambda folder: [sys.executable, "-c", f"from bench import scale; scale.{name}({str(folder)!r})"]


def _list_command(folder: Path) -> list[str]:
    return [sys.executable, "run.py", "list", "--grid", str(folder / "grid.yaml"), "--checkpoints", str(folder / "checkpoints")]


TASKS = {
    "table": Task("expand the grid, match, tabulate", _function("tabulate"), 10, GIGABYTE),
    "list": Task("run.py list --grid FILE", _list_command, 10, GIGABYTE),
    "steps": Task("read the step log", _function("read_steps"), 20, GIGABYTE),
    "csv": Task("write both tables as CSV", _function("write_tables")),
}


# ------------------------------------------------------------------------------------------- what the children do


def make(folder: str, runs: int, steps: int) -> None:
    """Write grid.yaml and checkpoints/ into a folder, and facts.json about them and this machine."""
    import dataclasses

    import yaml

    from diffvit.ledger.files import RunFiles
    from diffvit.ledger.results import read_result
    from diffvit.train import train
    from study.grid import find_grid
    from study.plan import load_fingerprints

    place = Path(folder)
    content = {
        "sizes": ["small", "large"],
        "datasets": ["digits", "digits-noisy"],
        "seeds": runs // RUNS_A_SEED,
        # Both data sets have 40 steps an epoch.
        "overrides": {"epochs": math.ceil(steps / 40), "max_steps": steps},
        "conditions": [{}, {"lr": 0.001}, {"lr": 0.01}, {"label_noise": 0.2}, {"input_noise": 0.35}],
    }
    (place / "grid.yaml").write_text(yaml.safe_dump(content))
    specs = find_grid(str(place / "grid.yaml")).runs()
    fingerprints = load_fingerprints(specs, None, required=True)
    real = dataclasses.replace(specs[0], overrides={"max_steps": 3, "label_noise": 0.2})
    train(real, place / "real", device="cpu")
    files = RunFiles.of(place / "real", real, real.run_id(fingerprints[real.dataset]))
    template = read_result(files.result)
    assert template is not None
    strangers = [dataclasses.replace(spec, overrides={**spec.overrides, "dropout": 0.3}) for spec in specs[:STRANGERS]]
    accuracies = {}
    for number, spec in enumerate([*specs, *strangers]):
        run_id = spec.run_id(fingerprints[spec.dataset])
        diverged = number % DIVERGED_EVERY == DIVERGED_EVERY - 1
        ours = RunFiles.of(place / "checkpoints", spec, run_id)
        of_spec = (fingerprints[spec.dataset], template, files.predictions.read_bytes(), number, steps if number < runs else 1, diverged)
        accuracies[run_id] = _write_run(ours, spec, *of_spec)
    ids = [spec.run_id(fingerprints[spec.dataset]) for spec in specs]
    facts = {
        "machine": f"{template.device_name}, {cpus()} CPU cores",
        "fields": sorted(template.content()),
        "runs": len(ids),
        "diverged": sum(accuracies[run_id] is None for run_id in ids),
        "accuracies": {run_id: accuracies[run_id] for run_id in ids},
        "log_bytes": sum(path.stat().st_size for path in (place / "checkpoints").glob("*/*_training.log")),
    }
    (place / "facts.json").write_text(json.dumps(facts))


def _write_run(
    files: Any, spec: Any, fingerprint: str, template: Any, predictions: bytes, number: int, steps: int, diverged: bool
) -> float | None:
    """All files of an ended run. Returns its test accuracy, None where it diverged."""
    import dataclasses

    import numpy as np

    from diffvit.ledger.disk import file_sha256
    from diffvit.ledger.log import Step, TrainingLog
    from diffvit.ledger.results import write_result
    from diffvit.protocol import images_in_steps

    protocol = spec.protocol
    chance = np.random.default_rng(number)
    losses = 2.3 * np.exp(-np.arange(steps) / (steps / 3)) + 0.05 * chance.random((3, steps))
    if diverged:
        losses[0, -1] = math.nan
    facts = {"run_id": files.run_id, "model": spec.model, "size": spec.size, "dataset": spec.dataset, "seed": spec.seed, "steps": steps}
    with TrainingLog(files.log, facts, ["synthetic: written by bench.scale"]) as log:
        rows = zip(*losses.tolist(), chance.random((2, steps)).tolist()[0], strict=True)
        log.write(
            Step(step, (step - 1) // 40 + 1, protocol.learning_rate(step, steps), train, val, accuracy, norm, 0.01 * step)
            for step, (train, val, norm, accuracy) in enumerate(rows, start=1)
        )
        accuracy = None if diverged else 0.5 + number / 10_000
        log.note("loss is not a number" if accuracy is None else f"test_accuracy={accuracy:.6f} test_loss=1.000000 test_images=359")
    written = [files.log]
    if not diverged:
        files.weights.write_bytes(b"weights, which no table reads")
        files.predictions.write_bytes(predictions)
        written = [files.weights, files.log, files.predictions]
    outcome: dict[str, Any] = {
        **spec.names(files.run_id),
        "overrides": dict(spec.overrides),
        "identity": spec.identity(fingerprint),
        "depth": protocol.depths[spec.size],
        # About what the models of these sizes have; alike for all runs of a cell.
        "parameters": 50_000 * protocol.depths[spec.size] + (10 if spec.model == "vit_differential" else 0),
        "steps": steps,
        "images": images_in_steps(protocol.images[0], protocol.batch_size, steps),
        "seconds": round(0.01 * steps, 3),
        "false_labels": protocol.false_labels() if protocol.label_noise else None,
        "test_accuracy": accuracy,
        "sha256": {path.name: file_sha256(path) for path in written},
    }
    if not protocol.label_noise:
        outcome |= {"memorised": None, "recovered": None}
    if diverged:
        unknown = ("train_loss", "val_loss_last_batch", "val_loss", "val_accuracy", "test_loss", "test_images", "memorised", "recovered")
        outcome |= {"status": "diverged", **dict.fromkeys(unknown), "diverged": {"step": steps, "message": "loss is not a number"}}
    write_result(files, dataclasses.replace(template, **outcome))
    return accuracy


def _table(folder: str) -> Any:
    from study.grid import find_grid
    from study.table import run_table

    return run_table(Path(folder) / "checkpoints", find_grid(str(Path(folder) / "grid.yaml")).runs())


def tabulate(folder: str) -> None:
    """The run table of the grid; prints what can be checked of it."""
    table = _table(folder)
    done = table[table["status"] == "done"].set_index("run_id")["test_accuracy"]
    print(json.dumps({"runs": len(table), "flags": int((table["flags"] != "").sum()), "accuracies": done.to_dict()}))


def read_steps(folder: str) -> None:
    """The step table of the grid; prints what can be checked of it."""
    from study.table import step_table

    table = _table(folder)
    steps = step_table(Path(folder) / "checkpoints", table)
    last = steps.iloc[-1]
    print(
        json.dumps(
            {
                "rows": len(steps), "runs": int(steps["run_id"].nunique()), "sum": int(steps["step"].sum()),
                "not_numbers": int(steps["train_loss"].isna().sum()), "last": [last["run_id"], int(last["step"]), float(last["seconds"])],
                "last_run": table["run_id"].iloc[-1],
            }
        )
    )  # fmt: skip


def write_tables(folder: str) -> None:
    """Both tables of the grid as CSV, as `study` writes them; prints what can be checked of them."""
    from study.table import write_csv, write_step_csv

    table = _table(folder)
    write_csv(table, Path(folder) / "runs.csv")
    write_step_csv(Path(folder) / "checkpoints", table, Path(folder) / "steps.csv")
    print("{}")


# ------------------------------------------------------------------------------------------------------ measuring


class Usage(NamedTuple):
    """What a process took.

    Attributes:
        seconds: from its start to its end; cpu_seconds: of computing, which other work on the machine hardly changes.
        peak_bytes: the largest resident memory. printed: its standard output.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    printed: str


def _run(command: list[str]) -> Usage:
    """Runs a command to its end."""
    # A GPU would make `list` look for runs in bf16.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {process.returncode}")
    return Usage(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), printed)


def mistakes(name: str, printed: str, folder: Path, facts: dict[str, Any], steps: int) -> list[str]:
    """What is wrong with what a task printed or wrote, a sentence each."""
    runs = facts["runs"]
    done = {run_id: accuracy for run_id, accuracy in facts["accuracies"].items() if accuracy is not None}
    if name == "list":
        *lines, last = printed.splitlines()
        listed = {cell for line in lines for cell in line.split() if cell in facts["accuracies"]}
        seen = [
            (last, f"{len(done)} of {runs} runs done"),
            (sum(line.startswith(("done ", "diverged ")) for line in lines), runs),
            (listed, set(facts["accuracies"])),
            (sum(line.startswith("missing") for line in lines), 0),
        ]
    elif name == "csv":
        rows, head, last = _lines_of(folder / "steps.csv")
        cells = last.split(",")
        seen = [(rows, runs * steps + 1), (head[:12], "run_id,model"), (len(cells), 13), (cells[5], str(steps))]
        seen += [(_lines_of(folder / "runs.csv")[0], runs + 1)]
    else:
        said = json.loads(printed)
        if name == "table":
            seen = [(said["runs"], runs), (said["flags"], 0), (said["accuracies"], done)]
        else:
            seen = [
                (said["rows"], runs * steps), (said["runs"], runs), (said["sum"], runs * steps * (steps + 1) // 2),
                (said["not_numbers"], facts["diverged"]), (said["last"], [said["last_run"], steps, round(0.01 * steps, 3)]),
            ]  # fmt: skip
    return [f"{name}: {str(got)[:200]} instead of {str(wanted)[:200]}" for got, wanted in seen if got != wanted]


def _lines_of(path: Path) -> tuple[int, str, str]:
    """How many lines a file has, the first and the last."""
    count, first, line = 0, "", ""
    with open(path, encoding="utf-8") as file:
        for count, line in enumerate(file, start=1):  # noqa: B007 (the last ones are the answer)
            first = first or line
    return count, first.rstrip("\n"), line.rstrip("\n")


def measure(folder: Path, runs: int, steps: int, rounds: int) -> dict[str, Any]:
    """Make a ledger in an empty folder, check each task's outcome, then time all tasks in turn, `rounds` times."""
    click.echo(f"writing {runs:,} runs with {steps:,} steps each", err=True)
    making = _run([sys.executable, "-c", f"from bench import scale; scale.make({str(folder)!r}, {runs}, {steps})"]).seconds
    facts = json.loads((folder / "facts.json").read_text())
    wrong = []
    for name, task in TASKS.items():
        wrong += mistakes(name, _run(task.command(folder)).printed, folder, facts, steps)
    measured: dict[str, list[Usage]] = {name: [] for name in TASKS}
    load = os.getloadavg()[0]
    for number in range(rounds if not wrong else 0):
        click.echo(f"round {number + 1} of {rounds}", err=True)
        for name, task in TASKS.items():
            measured[name].append(_run(task.command(folder)))
    return {
        "runs": facts["runs"],
        "steps": steps,
        "rounds": rounds,
        "machine": facts["machine"],
        "memory_of_machine": memory_bytes(),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("numpy", "pandas", "pyarrow", "torch")},
        },
        "load_before": round(load, 2),
        "fields_of_a_result": len(facts["fields"]),
        "diverged": facts["diverged"],
        "log_bytes": facts["log_bytes"],
        "making_seconds": round(making, 1),
        "wrong": wrong,
        "tasks": {
            name: {
                "title": task.title, "bar_seconds": task.seconds, "bar_bytes": task.bytes,
                **{kind: [round(getattr(usage, kind), 3) for usage in measured[name]] for kind in ("seconds", "cpu_seconds", "peak_bytes")},
            }
            for name, task in TASKS.items()
        },
    }  # fmt: skip


def missed(outcome: dict[str, Any]) -> list[str]:
    """The bars that an outcome misses in any round, and what was wrong, a sentence each."""
    wrong = list(outcome["wrong"])
    for task in outcome["tasks"].values():
        for kind, unit, scale in (("seconds", "s", 1.0), ("bytes", "GB", GIGABYTE)):
            values, bar = task["seconds" if kind == "seconds" else "peak_bytes"], task[f"bar_{kind}"]
            if bar is not None and values and max(values) >= bar:
                wrong.append(f"{task['title']}: {max(values) / scale:.2f} {unit}, the bar is below {bar / scale:g} {unit}")
    return wrong


def _print(outcome: dict[str, Any]) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in outcome["versions"].items())
    click.echo(f"{outcome['machine']}, {outcome['memory_of_machine'] / GIGABYTE:.0f} GB; {versions}")
    click.echo(
        f"{outcome['runs']:,} runs x {outcome['steps']:,} steps ({outcome['log_bytes'] / 1e6:.0f} MB of logs), {outcome['rounds']} rounds, "
        f"each in a process of its own; load {outcome['load_before']:.1f} before"
    )
    click.echo(f"\n{'':<34} {'median':>8} {'min-max':>14} {'bar':>7} {'CPU':>8} {'peak memory':>12} {'bar':>7}")
    for task in outcome["tasks"].values():
        seconds = task["seconds"]
        if seconds:
            second_bar, byte_bar = task["bar_seconds"], task["bar_bytes"]
            cpu, peak = statistics.median(task["cpu_seconds"]), max(task["peak_bytes"]) / GIGABYTE
            click.echo(
                f"{task['title']:<34} {statistics.median(seconds):>6.2f} s {f'{min(seconds):.2f}-{max(seconds):.2f} s':>14} "
                f"{f'{second_bar:g} s' if second_bar else '':>7} {cpu:>6.2f} s {peak:>9.2f} GB "
                f"{f'{byte_bar / GIGABYTE:g} GB' if byte_bar else '':>7}".rstrip()
            )


@click.command()
@click.option("--runs", type=click.IntRange(min=RUNS_A_SEED), default=1000, show_default=True, help="A multiple of 40.")
@click.option("--steps", type=click.IntRange(min=2), default=5000, show_default=True, help="Steps in each run's log.")
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="How often each task is timed.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the outcome there.")
def main(runs: int, steps: int, rounds: int, json_path: Path | None) -> None:
    """Make a large ledger and say how long its tables take."""
    if runs % RUNS_A_SEED:
        raise click.BadParameter(f"{runs} is not a multiple of {RUNS_A_SEED}.", param_hint="--runs")
    with tempfile.TemporaryDirectory() as temporary:
        outcome = measure(Path(temporary), runs, steps, rounds)
    _print(outcome)
    if json_path:
        json_path.write_text(json.dumps(outcome, indent=1) + "\n")
    wrong = missed(outcome)
    click.echo("\nall bars are met" if not wrong else "\nmissed:\n  " + "\n  ".join(wrong))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
