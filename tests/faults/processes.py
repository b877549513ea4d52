"""Starts the command line in processes of its own, finds out what they do, and kills them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pandas as pd
import psutil

from diffvit.ledger.files import RunFiles
from diffvit.ledger.log import read_log

ROOT = Path(__file__).resolve().parents[2]
# What a log says that does not depend on the clock.
COLUMNS = ["step", "epoch", "learning_rate", "train_loss", "val_loss", "val_accuracy", "grad_norm"]


def run_py(
    folder: Path, *arguments: str, limit_bytes: int | None = None, within: Sequence[str] = (), **environment: str
) -> subprocess.Popen:
    """`run.py …` in a folder. `limit_bytes`: no file may become longer. `within`: a command that runs it."""
    wrapper = [*within, *(["prlimit", f"--fsize={limit_bytes}"] if limit_bytes else [])]
    return subprocess.Popen(
        [*wrapper, sys.executable, str(ROOT / "run.py"), *arguments],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def study(
    folder: Path, *arguments: str, grid: str, dashboard: bool = False, within: Sequence[str] = (), **environment: str
) -> subprocess.Popen:
    """`run.py study` of a grid file with this content, on a Ray of its own."""
    (folder / "grid.yaml").write_text(grid)
    address = [] if "--address" in arguments else ["--address", "local"]
    options = [*address, "--dashboard", str(dashboard).lower()]
    return run_py(folder, "study", "--grid", "grid.yaml", *options, *arguments, within=within, **environment)


def states(folder: Path) -> list[Path]:
    """The resume states under a folder's ledger."""
    return sorted(folder.glob("checkpoints/.state/*/*.state"))


def wait_until(condition: Callable[[], object], process: subprocess.Popen | None = None, seconds: float = 200) -> None:
    """Waits for something to become true; fails if the process ends before, or time runs out."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def family(process: subprocess.Popen) -> list[psutil.Process]:
    """The process and all that it started, oldest first."""
    me = psutil.Process(process.pid)
    return [me, *me.children(recursive=True)]


def trainers(process: subprocess.Popen) -> list[psutil.Process]:
    """The processes of a study that train."""
    return [each for each in family(process) if "ImplicitFunc" in command_line(each)]


def command_line(process: psutil.Process) -> str:
    """What a process was started with or calls itself; nothing for one that has gone."""
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def trainer_of(process: subprocess.Popen, log: Path) -> psutil.Process | None:
    """The process of a study that has a run's log open."""
    for each in trainers(process):
        with contextlib.suppress(psutil.Error):
            if any(Path(file.path) == log for file in each.open_files()):
                return each
    return None


def kill_all(process: subprocess.Popen) -> None:
    """A power cut, as far as a program can make one."""
    for each in family(process) if process.poll() is None else []:
        with contextlib.suppress(psutil.Error):
            each.kill()
    process.communicate()


@contextlib.contextmanager
def ending(process: subprocess.Popen) -> Iterator[subprocess.Popen]:
    """Leaves nothing running behind a test that fails."""
    try:
        yield process
    finally:
        kill_all(process)


def finish(process: subprocess.Popen, seconds: float = 300) -> str:
    """Waits for a command that shall succeed; returns what it said."""
    with ending(process):
        out, err = process.communicate(timeout=seconds)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    return out + err


def weights(folder: Path) -> dict[str, bytes]:
    """Name -> bytes of all weights in a folder's ledger."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("checkpoints/*/*.safetensors"))}


def assert_same_logs(ours: Path, theirs: Path) -> None:
    """Both have each step once, in order, with the same numbers."""
    mine, other = read_log(ours), read_log(theirs)
    assert mine["step"].tolist() == list(range(1, len(mine) + 1))
    pd.testing.assert_frame_equal(mine[COLUMNS], other[COLUMNS], check_exact=True)


def assert_same_ledgers(ours: Path, theirs: Path) -> None:
    """Two folders' ledgers have the same runs, to the byte of their weights and the digit of their logs."""
    assert weights(ours) == weights(theirs)
    assert weights(ours)
    for log in sorted(ours.glob("checkpoints/*/*_training.log")):
        assert_same_logs(log, theirs / log.relative_to(ours))


def files_in(folder: Path, files: RunFiles) -> RunFiles:
    """The same run's files in another folder's ledger."""
    return RunFiles(folder, files.model, files.run_id, files.size, files.dataset)
