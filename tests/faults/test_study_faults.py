"""A study whose processes are killed: the workers, and everything at once."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from diffvit.ledger import read_results

ROOT = Path(__file__).resolve().parents[2]
GRID = "datasets: [digits]\nsizes: [small]\noverrides: {epochs: 8}\n"


def _start(folder: Path) -> subprocess.Popen:
    (folder / "two.yaml").write_text(GRID)
    command = [sys.executable, str(ROOT / "run.py"), "study", "--grid", "two.yaml", "--address", "local", "--save_every", "0.5"]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _states(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoints/.state/*/*.state"))


def _wait_for_states(folder: Path, process: subprocess.Popen, runs: int) -> None:
    deadline = time.monotonic() + 200
    while len({path.parent for path in _states(folder)}) < runs:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no states appeared"
        time.sleep(0.05)


def _trials(process: subprocess.Popen) -> list[psutil.Process]:
    """The processes that train."""
    return [each for each in psutil.Process(process.pid).children(recursive=True) if "ImplicitFunc" in " ".join(_command_line(each))]


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.mark.slow
def test_workers_then_everything_then_ctrl_c_and_the_same_command_finishes(tmp_path: Path) -> None:
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    assert _start(undisturbed).wait(300) == 0

    # The workers: the same study goes on by itself.
    process = _start(tmp_path)
    _wait_for_states(tmp_path, process, runs=2)
    trials = _trials(process)
    assert trials
    for trial in trials:
        trial.kill()

    # Everything at once.
    time.sleep(3)
    everything = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for each in reversed(everything):
        if each.is_running():
            each.kill()
    process.communicate()

    # Ctrl-C: states are saved, nothing is left running.
    process = _start(tmp_path)
    _wait_for_states(tmp_path, process, runs=1)
    deadline = time.monotonic() + 200
    while not _trials(process):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "carry on with" in errors
    assert "Traceback" not in errors
    _, alive = psutil.wait_procs(started, timeout=5)
    assert not alive

    process = _start(tmp_path)
    assert process.wait(300) == 0
    ours, theirs = (sorted((folder / "checkpoints").glob("*/*.safetensors")) for folder in (tmp_path, undisturbed))
    assert len(ours) == 2
    assert [path.read_bytes() for path in ours] == [path.read_bytes() for path in theirs]
    for one, other in zip(*(read_results(folder / "checkpoints") for folder in (tmp_path, undisturbed)), strict=True):
        assert (one["test_accuracy"], one["steps"]) == (other["test_accuracy"], other["steps"])
    assert sum(path.read_text().count("# resumed after step") for path in (tmp_path / "checkpoints").glob("*/*.log")) >= 1
    assert not _states(tmp_path)
