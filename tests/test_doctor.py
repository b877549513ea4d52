"""`run.py doctor` on this machine and on broken ones, and `run.py completion` in a real shell."""

from __future__ import annotations

import errno
import fcntl
import json
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch

import run as command_line
from study.commands.completion import SHELLS

NAMES = ["Python", "machine", "torch", "GPU", "Ray", "checkpoints", "cache", "file locks", "hub", "data", "storage"]


def problems(cli, *arguments: str) -> dict[str, str]:
    """Name -> what was found and what to do, of the checks that fail; and the exit code says whether any does."""
    outcome = cli("doctor", "--json", *arguments)
    checks = json.loads(outcome.out)
    assert [check["name"] for check in checks] == NAMES
    found = {check["name"]: f"{check['detail']} | {check['hint']}" for check in checks if not check["ok"]}
    assert outcome.code == bool(found) and all(check["ok"] == (check["hint"] is None) for check in checks)
    return found


def test_a_sound_machine_has_no_problems_and_nothing_is_left_there(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_never_shown_anywhere_0123456789")
    monkeypatch.setenv("DIFFVIT_CACHE", str(tmp_path / "cache"))
    outcome = cli("doctor", "--address", "local")
    lines = outcome.out.splitlines()
    assert outcome.code == 0 and lines[-1] == "0 problems" and all(line.startswith("ok  ") for line in lines[:-1])
    assert "HF_TOKEN is set" in outcome.out and "never_shown" not in outcome.out + outcome.err
    assert f"torch        {torch.__version__}" in outcome.out and "digits, digits-noisy built in" in outcome.out
    assert not list(tmp_path.iterdir())
    assert not problems(cli, "--address", "local", "--storage", str(tmp_path / "storage"))


def test_each_problem_is_found_beside_the_others_and_says_what_to_do(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12, 10**9))
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("HF_TOKEN", "two words")
    found = problems(cli, "--address", "127.0.0.1:1", "--data_root", "nowhere", "--storage", "gibberish://x")
    assert "1.0 GB left" in found["checkpoints"] and "1.0 GB left" in found["cache"] and "make room" in found["cache"]
    assert "no locks that work" in found["file locks"] and "--storage" in found["file locks"]
    assert "torch sees no GPU" in found["GPU"] and "nvidia-smi" in found["GPU"]
    assert "no Ray cluster answers at 127.0.0.1:1" in found["Ray"] and "--address local" in found["Ray"]
    assert "--data_root" in found["data"] and "fsspec" in found["storage"]
    assert "HF_TOKEN is not a token" in found["hub"] and "two words" not in str(found)
    assert set(found) == {"checkpoints", "cache", "file locks", "GPU", "Ray", "data", "storage", "hub"}


def test_a_package_that_cannot_be_imported_is_a_problem_and_not_a_crash(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "ModuleNotFoundError" in (found := problems(cli))["Ray"] and "uv sync" in found["Ray"] and set(found) == {"Ray"}


def test_a_data_set_that_the_hub_gave_before_is_at_hand(cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    (tmp_path / "hf/uoft-cs___cifar100/default").mkdir(parents=True)
    out = cli("doctor", "--address", "local").out
    assert "CIFAR-100 downloaded" in out and "BACH not here" in out


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_is_a_script_of_the_shell(shell: str, cli, tmp_path: Path) -> None:
    script = cli("completion", shell).out
    assert "_RUN_PY_COMPLETE" in script and "_runpy_uv_completion" in script and "run.py)}" not in script
    if found := shutil.which(shell):
        (tmp_path / "script").write_text(script)
        assert subprocess.run([found, "-n", "script"], cwd=tmp_path, capture_output=True, check=True).stderr == b""


def test_bash_completes_what_follows_uv_run_run_py(cli, tmp_path: Path) -> None:
    (tmp_path / "script").write_text(cli("completion", "bash").out)
    (tmp_path / "uv").write_text(f'#!/bin/sh\nshift\nexec {sys.executable} "$@"\n')  # uv run FILE … in this environment
    (tmp_path / "uv").chmod(0o755)
    root = Path(command_line.__file__).parent

    def completed(*words: str) -> list[str]:
        line = f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _runpy_uv_completion uv; printf '%s\\n' \"${{COMPREPLY[@]}}\""
        shell = ["bash", "-c", f'source {tmp_path}/script; export PATH="{tmp_path}:$PATH"; cd {root}; {line}']
        return subprocess.run(shell, capture_output=True, text=True, check=True).stdout.split()

    assert completed("uv", "run", "run.py", "ev") == ["evaluate"]
    assert completed("uv", "run", "./run.py", "study", "--gr") == ["--grid", "--graphs"]
    assert completed("uv", "run", "run.py", "train", "--dataset", "DIG") == ["digits", "digits-noisy"]
    assert completed("uv", "run", "other.py", "ev") == []
