"""Real processes, killed with real signals: what they were doing goes on, to the same bytes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from faults.processes import assert_same_logs, files_in, run_py, wait_until
from runs import stop_after

from diffvit.errors import RunIsBusyError
from diffvit.keeping.saving import Every, Saving
from diffvit.keeping.state import StateFolder
from diffvit.ledger.files import RunFiles
from diffvit.ledger.results import read_result
from diffvit.ledger.spec import RunSpec
from diffvit.train import train

SPEC = RunSpec.of("vit_differential", "0.1M", "digits", overrides={"epochs": 3, "dropout": 0.1})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> RunFiles:
    folder = tmp_path_factory.mktemp("undisturbed")
    return RunFiles.of(folder, SPEC, train(SPEC, folder, device="cpu").run_id)


def _same(ours: RunFiles, undisturbed: RunFiles) -> None:
    assert ours.weights.read_bytes() == undisturbed.weights.read_bytes()
    assert ours.predictions.read_bytes() == undisturbed.predictions.read_bytes()
    assert_same_logs(ours.log, undisturbed.log)
    assert not (ours.checkpoints / ".state" / ours.run_id).exists()


def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path: Path, undisturbed: RunFiles) -> None:
    for _ in range(3):
        stop_after(30, SPEC, tmp_path)
    train(SPEC, tmp_path, device="cpu")
    files = files_in(tmp_path, undisturbed)
    _same(files, undisturbed)
    resumed = [line for line in files.log.read_text().splitlines() if line.startswith("# resumed")]
    assert resumed == [f"# resumed after step {step}; 0 steps, 0.0 s done again" for step in (30, 60, 90)]


def test_steps_after_the_last_state_are_not_in_the_log_twice(tmp_path: Path, undisturbed: RunFiles) -> None:
    stop_after(40, SPEC, tmp_path)
    files = files_in(tmp_path, undisturbed)
    with files.log.open("a") as log:  # what a killed process wrote after its last state, the last line half
        log.write("41,2,1e-3,0.5,0.5,0.9,1.0,9999.0\n42,2,1e-3,0.")
    train(SPEC, tmp_path, device="cpu")
    _same(files, undisturbed)
    assert re.search(r"# resumed after step 40; 1 steps, 99\d\d\.\d s done again\n", files.log.read_text())


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_state_is_passed_over_for_the_one_before(tmp_path: Path, undisturbed: RunFiles, damage: str) -> None:
    stop_after(50, SPEC, tmp_path, saving=Saving(Every(steps=1)))
    states = sorted((tmp_path / ".state" / undisturbed.run_id).glob("*.state"))
    assert [int(path.stem) for path in states] == [49, 50]
    content = bytearray(states[-1].read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
    states[-1].write_bytes({"truncated": content[:-1000], "flipped": content, "empty": b""}[damage])
    warnings: list[str] = []
    train(SPEC, tmp_path, device="cpu", on_warning=warnings.append)
    assert any("damaged" in warning for warning in warnings)
    _same(files_in(tmp_path, undisturbed), undisturbed)
    assert "# resumed after step 49" in files_in(tmp_path, undisturbed).log.read_text()


def test_without_a_whole_state_or_log_the_run_begins_again(tmp_path: Path, undisturbed: RunFiles) -> None:
    for lost in ("*.state", "log"):
        stop_after(20, SPEC, tmp_path)
        if lost == "log":
            files_in(tmp_path, undisturbed).log.write_text("# run_id")
        for path in (tmp_path / ".state" / undisturbed.run_id).glob(lost):
            path.write_bytes(b"x" * 100)
    train(SPEC, tmp_path, device="cpu")
    _same(files_in(tmp_path, undisturbed), undisturbed)


def test_states_that_could_not_be_used_do_not_displace_new_ones(tmp_path: Path) -> None:
    states = StateFolder(tmp_path, "run")
    for step in (190, 200):
        states.save(step, {"step": step, "tensors": {}})
        states.file(step).write_bytes(b"damaged")
    states.save(10, {"step": 10, "tensors": {}})
    assert states.steps() == [10]


def test_a_failed_save_keeps_the_state_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = StateFolder(tmp_path, "run")
    states.save(1, {"step": 1, "tensors": {"weight": torch.ones(3)}})

    def no_room(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(OSError, match="No space"):
        states.save(2, {"step": 2, "tensors": {}})
    monkeypatch.undo()
    loaded = states.load()
    assert loaded is not None
    assert loaded["step"] == 1
    assert [path.name for path in states.path.iterdir()] == ["000000001.state"]


def _start(folder: Path, *arguments: str) -> subprocess.Popen:
    overrides = [f"--{name}={value}" for name, value in SPEC.overrides.items() if name != "dropout" and f"--{name}" not in arguments]
    cell = ["--model", SPEC.model, "--size", SPEC.size, "--dataset", SPEC.dataset, "--device", "cpu"]
    return run_py(folder, "train", *cell, *overrides, "--save_every", "0.2", *arguments)


def _last_state(folder: Path) -> int:
    return max((int(path.stem) for path in folder.glob("checkpoints/.state/*/*.state")), default=0)


@pytest.mark.slow
def test_killed_three_ways_the_command_carries_on(tmp_path: Path) -> None:
    # The command has no option for dropout: a run of its own to compare with.
    spec = RunSpec.of(SPEC.model, SPEC.size, SPEC.dataset, overrides={"epochs": 3})
    whole = RunFiles.of(tmp_path / "whole", spec, train(spec, tmp_path / "whole", device="cpu").run_id)
    step = 0
    for number, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)):
        process = _start(tmp_path)
        wait_until(lambda before=step: _last_state(tmp_path) > before, process)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        step = _last_state(tmp_path)
        assert process.returncode == code
        if code > 0:
            assert "to resume, run:" in errors
            assert "Traceback" not in errors
    assert _start(tmp_path).wait(120) == 0
    files = RunFiles(tmp_path / "checkpoints", whole.model, whole.run_id, whole.size, whole.dataset)
    _same(files, whole)
    assert files.log.read_text().count("# resumed after step") == 3


def test_two_processes_do_not_train_the_same_run(tmp_path: Path) -> None:
    process = _start(tmp_path, "--epochs", "200")
    wait_until(lambda: _last_state(tmp_path), process)
    spec = RunSpec.of(SPEC.model, SPEC.size, SPEC.dataset, overrides={"epochs": 200})
    with pytest.raises(RunIsBusyError):
        train(spec, tmp_path / "checkpoints", device="cpu")
    process.kill()
    process.communicate()
    assert stop_after(1, spec, tmp_path / "checkpoints") > 1  # a dead holder does not keep the lock


def test_the_result_names_the_hashes_of_its_files(undisturbed: RunFiles) -> None:
    import hashlib

    result = read_result(undisturbed.result)
    assert result is not None
    for path in (undisturbed.weights, undisturbed.log, undisturbed.predictions):
        assert result.sha256[path.name] == hashlib.sha256(path.read_bytes()).hexdigest()
