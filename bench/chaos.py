"""Kills a study's processes at random and lets the same command carry on; then compares with a study that was left alone.

    python -m bench.chaos --kills 20

Twelve runs save their states every two seconds. A kill is due when the study's progress passes one of N random marks. It hits a
process that trains, one that is just writing a state, or any process at all: the study itself, Ray's head and raylet, the dashboard. A
study that ends is started again by the same command. At the end weights are compared byte for byte, logs line by line and
tables cell by cell. The exit code is 1 if anything differs.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click
import psutil

from diffvit.ledger.files import result_paths
from diffvit.ledger.log import read_log
from diffvit.ledger.verify import verify_run
from study.grid import read_grid
from study.table import run_table

ROOT = Path(__file__).resolve().parents[1]
GRID = "datasets: [digits, digits-noisy]\noverrides: {{epochs: {epochs}}}\n"
SAVE_EVERY = "2s"

# Of the kills, at least so many hit a process that trains; of these, at least three one that is writing a state.
TRAINER_SHARE = 0.5
WRITER_SHARE = 0.2

# What the clock and the machine decide, in logs and in tables.
_CLOCK_OF_LOGS = ["seconds"]
_CLOCK_OF_TABLES = ["seconds", "images_per_second", "started", "finished"]


class Study:
    """The same command in a folder, started again whenever it ends before its work does."""

    def __init__(self, folder: Path, epochs: int):
        self.folder, self.starts = folder, 0
        folder.mkdir(parents=True)
        (folder / "chaos.yaml").write_text(GRID.format(epochs=epochs))
        self.process: subprocess.Popen | None = None

    @property
    def checkpoints(self) -> Path:
        """Its ledger."""
        return self.folder / "checkpoints"

    def start(self) -> None:
        """The command."""
        self.starts += 1
        command = f"study --grid chaos.yaml --address local --save_every {SAVE_EVERY}"
        with open(self.folder / "study.log", "a", encoding="utf-8") as log:
            log.write(f"--- start {self.starts}: run.py {command}\n")
            log.flush()
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "run.py"), *shlex.split(command)],
                cwd=self.folder, stdout=log, stderr=log, env={**os.environ, "DIFFVIT_RESTARTS": "0"},
            )  # fmt: skip

    def keep_going(self) -> int | None:
        """Starts the command again if it has ended early. Returns its exit code once all runs have ended."""
        assert self.process
        code = self.process.poll()
        if code is None:
            return None
        if code == 0:
            return code
        self.start()
        return None

    def steps_logged(self) -> int:
        """Steps in the logs of all runs, the study's progress."""
        return sum(path.read_bytes().count(b"\n") for path in self.checkpoints.glob("*/*_training.log"))

    def family(self) -> list[psutil.Process]:
        """Its processes."""
        assert self.process
        with contextlib.suppress(psutil.Error):
            me = psutil.Process(self.process.pid)
            return [me, *me.children(recursive=True)]
        return []

    def trainers(self) -> dict[str, int]:
        """run_id -> pid, of the runs that are training and have saved a state."""
        found = {}
        for process in self.family():
            with contextlib.suppress(psutil.Error):
                if "ImplicitFunc" not in " ".join(process.cmdline()):
                    continue
                for file in process.open_files():
                    if file.path.endswith("_training.log"):
                        found[Path(file.path).name.split("_")[1]] = process.pid
        return {run_id: pid for run_id, pid in found.items() if any(self._states(run_id))}

    def all_have_states(self) -> bool:
        """Whether no run would have to begin again if everything were killed now."""
        logs = {path.name.split("_")[1] for path in self.checkpoints.glob("*/*_training.log")}
        ended = {path.name.split("_")[1] for path in result_paths(self.checkpoints)}
        return all(any(self._states(run_id)) for run_id in logs - ended)

    def _states(self, run_id: str) -> list[Path]:
        return list((self.checkpoints / ".state" / run_id).glob("*.state"))

    def kill_writer(self, patience: float) -> bool:
        """Kills a training process while it writes a state. Returns whether it was caught in the middle."""
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            pids = self.trainers()
            look_again = time.monotonic() + 1.0
            while pids and time.monotonic() < look_again:
                for run_id, pid in pids.items():
                    with contextlib.suppress(OSError):
                        folder = self.checkpoints / ".state" / run_id
                        if any(name.endswith(".aside") for name in os.listdir(folder)):
                            os.kill(pid, 9)
                            _wait_for_death(pid)
                            return any(name.endswith(".aside") for name in os.listdir(folder))
            if not pids:
                time.sleep(0.05)
                self.keep_going()
        return False


def _wait_for_death(pid: int) -> None:
    with contextlib.suppress(psutil.Error):
        psutil.Process(pid).wait(10)


def _name(process: psutil.Process) -> str:
    """A short name for what a process is."""
    with contextlib.suppress(psutil.Error):
        line = " ".join(process.cmdline())
        for part, name in {
            "run.py": "study", "raylet/raylet": "raylet", "gcs_server": "gcs", "ImplicitFunc": "trainer", "dashboard": "dashboard",
            "Dashboard": "dashboard", "Agent": "agent", "StopFlag": "stop flag", "monitor": "monitor", "ray::IDLE": "idle worker",
        }.items():  # fmt: skip
            if part in line:
                return name
        return process.name()
    return "gone"


def disturb(study: Study, kills: int, steps: int, chance: random.Random) -> tuple[Counter, int]:
    """Runs the study to its end under fire. Returns how often what was hit, and how many states were being written then."""
    marks = sorted(chance.uniform(0.02, 0.95) * steps for _ in range(kills))
    wanted_trainers, wanted_writers = round(TRAINER_SHARE * kills), max(3, round(WRITER_SHARE * kills))
    # Which kills are aimed: the writers among the trainers, in random order.
    aims = ["writer"] * wanted_writers + ["trainer"] * (wanted_trainers - wanted_writers)
    aims += ["any"] * (kills - len(aims))
    chance.shuffle(aims)
    aims = aims[:kills]
    hit: Counter = Counter()
    writers = 0
    study.start()
    while study.keep_going() is None:
        if not aims or study.steps_logged() < marks[kills - len(aims)]:
            time.sleep(0.2)
            continue
        aim = aims[-1]
        if aim == "writer":
            if study.kill_writer(patience=120):
                hit["trainer"] += 1
                writers += 1
                aims.pop()
                click.echo(f"kill {kills - len(aims)}: a trainer that was writing a state", err=True)
            continue
        time.sleep(chance.uniform(0, 2))
        if not study.all_have_states():
            continue
        family = study.family()
        pids = set(study.trainers().values())
        victims = [process for process in family if process.pid in pids] if aim == "trainer" else family
        if not victims:
            continue
        victim = chance.choice(victims)
        name = _name(victim)
        with contextlib.suppress(psutil.Error):
            victim.kill()
            hit[name] += 1
            aims.pop()
            click.echo(f"kill {kills - len(aims)}: {name}", err=True)
    return hit, writers


def compare(ours: Path, theirs: Path) -> dict[str, Any]:
    """What differs between two ledgers."""
    lost = differing = 0
    for path in sorted(theirs.glob("*/*_training.log")):
        other = ours / path.relative_to(theirs)
        there, here = (read_log(each).drop(columns=_CLOCK_OF_LOGS).round(12) for each in (path, other))
        merged = there.merge(here, how="outer", indicator=True)
        lost += int((merged["_merge"] != "both").sum()) + abs(len(here) - len(there)) + int(here["step"].duplicated().sum())
    for path in sorted(theirs.glob("*/*.safetensors")):
        other = ours / path.relative_to(theirs)
        differing += not other.is_file() or other.read_bytes() != path.read_bytes()
    tables = [run_table(folder).drop(columns=_CLOCK_OF_TABLES) for folder in (ours, theirs)]
    damaged = [wrong for path in result_paths(ours) for wrong in verify_run(path)]
    return {"lost_lines": lost, "differing_weights": differing, "table_differs": not tables[0].equals(tables[1]), "damaged": damaged}


def done_twice(checkpoints: Path) -> dict[str, Any]:
    """What the logs say of interruptions: steps that runs were resumed after, and work that was done twice."""
    text = "".join(path.read_text() for path in checkpoints.glob("*/*_training.log"))
    resumed = re.findall(r"# resumed after step (\d+); (\d+) steps, ([\d.]+) s done again", text)
    begun = re.findall(r"# begun again; (\d+) steps, ([\d.]+) s done again", text)
    return {
        "resumed_after": sorted(int(step) for step, _, _ in resumed),
        "begun_again": len(begun),
        "steps_twice": sum(int(steps) for _, steps, _ in resumed) + sum(int(steps) for steps, _ in begun),
        "seconds_twice": round(sum(float(seconds) for _, _, seconds in resumed) + sum(float(seconds) for _, seconds in begun), 1),
    }


@click.command()
@click.option("--kills", type=click.IntRange(min=1), default=20, show_default=True)
@click.option("--seed", type=int, help="Of the random moments and victims. [default: a new one]")
@click.option("--folder", type=click.Path(path_type=Path), help="Where both studies are kept. [default: a temporary folder]")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the outcome there.")
def main(kills: int, seed: int | None, folder: Path | None, json_path: Path | None) -> None:
    """Kill a random process of a study N times, and compare with an undisturbed one."""
    seed = random.SystemRandom().randrange(10**6) if seed is None else seed
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        outcome = _run(kills, seed, (folder or Path(temporary)).resolve())
    if json_path:
        json_path.write_text(json.dumps(outcome, indent=1) + "\n")
    click.echo(json.dumps({key: value for key, value in outcome.items() if key not in ("damaged", "resumed_after")}))
    for wrong in outcome["damaged"]:
        click.echo(wrong)
    click.echo(
        f"{kills} kills, {outcome['runs']} of {outcome['of']} runs, {outcome['lost_lines']} lost lines, "
        f"{outcome['differing_weights']} differing weights"
    )
    sys.exit(0 if outcome["passed"] else 1)


def _run(kills: int, seed: int, folder: Path) -> dict[str, Any]:
    epochs = max(8, kills // 2)  # long enough for every kill to find work that has just been saved
    plain, shaken = (Study(folder / name, epochs) for name in ("plain", "shaken"))
    specs = read_grid(plain.folder / "chaos.yaml").runs()
    steps = sum(spec.protocol.total_steps() for spec in specs)

    began = time.monotonic()
    plain.start()
    while plain.keep_going() is None:
        time.sleep(0.2)
    alone = time.monotonic() - began

    began = time.monotonic()
    hit, writers = disturb(shaken, kills, steps, random.Random(seed))
    disturbed = time.monotonic() - began

    outcome = {
        "kills": sum(hit.values()), "seed": seed, "hit": dict(hit), "while_a_state_was_written": writers, "starts": shaken.starts,
        "seconds_undisturbed": round(alone, 1), "seconds_disturbed": round(disturbed, 1),
        "runs": len(result_paths(shaken.checkpoints)), "of": len(specs),
        **done_twice(shaken.checkpoints), **compare(shaken.checkpoints, plain.checkpoints),
    }  # fmt: skip
    outcome["passed"] = (
        outcome["kills"] == kills
        and outcome["runs"] == outcome["of"] == len(specs)
        and not any(outcome[key] for key in ("lost_lines", "differing_weights", "table_differs", "damaged"))
        and min(outcome["resumed_after"], default=1) > 0
        and 3 * hit["trainer"] >= kills
        and writers >= min(3, kills)
    )
    if not outcome["passed"]:
        click.echo((shaken.folder / "study.log").read_text()[-5000:], err=True)
    return outcome


if __name__ == "__main__":
    main()
