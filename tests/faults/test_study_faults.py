"""A study whose processes are killed: those that train, Ray's own, the study itself, and all at once."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from faults.processes import (
    assert_same_ledgers,
    command_line,
    ending,
    family,
    finish,
    kill_all,
    states,
    study,
    trainer_of,
    trainers,
    wait_until,
    weights,
)

from diffvit.ledger.results import read_results

GRID = "datasets: [digits]\nsizes: [small]\noverrides: {epochs: 20}\n"
SAVE = ("--save_every", "0.5s")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(study(folder, grid=GRID))
    return folder


def _runs_with_states(folder: Path) -> int:
    return len({path.parent for path in states(folder)})


def _resumptions(folder: Path) -> list[int]:
    """After which steps runs were resumed."""
    logs = "".join(path.read_text() for path in folder.glob("checkpoints/*/*.log"))
    return [int(step) for step in re.findall(r"# resumed after step (\d+)", logs)]


def _same(folder: Path, undisturbed: Path) -> None:
    assert_same_ledgers(folder, undisturbed)
    assert len(weights(folder)) == 2
    for ours, theirs in zip(*(read_results(each / "checkpoints") for each in (folder, undisturbed)), strict=True):
        assert (ours.test_accuracy, ours.test_loss, ours.steps) == (theirs.test_accuracy, theirs.test_loss, theirs.steps)
    assert not states(folder) and not list(folder.rglob("*.aside"))
    assert _resumptions(folder) and min(_resumptions(folder)) > 0


@pytest.mark.slow
def test_workers_then_the_study_then_everything_then_ctrl_c_and_the_same_command_finishes(tmp_path: Path, undisturbed: Path) -> None:
    # The processes that train: the same study goes on by itself.
    process = study(tmp_path, *SAVE, grid=GRID)
    with ending(process):
        wait_until(lambda: _runs_with_states(tmp_path) == 2, process)
        killed = trainers(process)
        assert killed
        for trainer in killed:
            trainer.kill()
        wait_until(lambda: _resumptions(tmp_path), process)
        # The study alone: what it had started ends too, and lets go of the runs.
        training = trainers(process)
        process.kill()
        process.communicate()
        _, alive = psutil.wait_procs(training, timeout=30)
        assert training and not alive

    for everything_at_once in (True, False):
        before = set(states(tmp_path))
        process = study(tmp_path, *SAVE, grid=GRID)
        with ending(process):
            wait_until(lambda before=before: set(states(tmp_path)) - before, process)  # it trains again
            if everything_at_once:
                kill_all(process)
            else:  # Ctrl-C: states are saved, nothing is left running.
                assert "to resume, run:" in _stopped(process, signal.SIGINT)

    finish(study(tmp_path, *SAVE, grid=GRID))
    _same(tmp_path, undisturbed)


def _stopped(process: subprocess.Popen, number: int) -> str:
    """What a study says that a signal stops; nothing is left running."""
    started = family(process)[1:]
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert "Traceback" not in errors
    _, alive = psutil.wait_procs(started, timeout=5)
    assert not alive
    return errors


@pytest.mark.slow
def test_ray_itself_is_killed_and_the_study_starts_over(tmp_path: Path, undisturbed: Path) -> None:
    process = study(tmp_path, *SAVE, grid=GRID)
    with ending(process):
        for name in ("raylet/raylet", "gcs/gcs_server"):
            before = set(states(tmp_path))
            wait_until(lambda before=before: set(states(tmp_path)) - before, process)
            started = family(process)[1:]
            next(each for each in started if name in command_line(each).split(" ")[0]).kill()
            _, alive = psutil.wait_procs(started, timeout=60)
            assert not alive
        said = finish(process)
    assert said.count("a process of Ray died; starting over") == 2
    assert said.count("started a local Ray") == 3
    _same(tmp_path, undisturbed)


@pytest.mark.slow
def test_a_group_is_stopped_at_one_step_and_one_of_its_workers_is_killed(tmp_path: Path) -> None:
    grid = "datasets: [digits]\nmodels: [vit_differential]\nsizes: [small]\noverrides: {epochs: 15}\n"
    plain, ours = tmp_path / "plain", tmp_path / "ours"
    plain.mkdir()
    ours.mkdir()
    finish(study(plain, "--workers", "2", grid=grid))
    process = study(ours, *SAVE, "--workers", "2", grid=grid)
    with ending(process):
        wait_until(lambda: states(ours), process)
        assert "to resume, run:" in _stopped(process, signal.SIGTERM)
    before = set(states(ours))
    assert before
    process = study(ours, *SAVE, "--workers", "2", grid=grid)
    with ending(process):
        wait_until(lambda: set(states(ours)) - before, process)
        workers = [each for each in family(process) if "RayTrainWorker" in command_line(each)]
        assert len(workers) == 2
        workers[-1].kill()
        finish(process)
    assert_same_ledgers(ours, plain)
    assert len(_resumptions(ours)) == 2


@pytest.mark.slow
def test_a_run_that_always_dies_is_given_up_and_the_others_go_on(tmp_path: Path, undisturbed: Path) -> None:
    doomed = tmp_path / "checkpoints" / next(undisturbed.glob("checkpoints/vit_classic/*.log")).relative_to(undisturbed / "checkpoints")
    process = study(tmp_path, "--save_every", "1h", grid=GRID)
    kills = 0
    with ending(process):
        while process.poll() is None:
            trainer = trainer_of(process, doomed)
            if trainer and len(doomed.read_text().splitlines()) > 10:
                trainer.kill()
                trainer.wait(30)
                kills += 1
            time.sleep(0.1)
        out, errors = process.communicate()
    assert kills == 3
    assert process.returncode == 1, errors
    assert "1 of 2 runs failed" in errors and "study --grid grid.yaml" in errors
    assert re.search(r"vit_classic 0.1M digits seed 0 epochs=20: its process died \(3 times at the same step\); its log ends: \d+,", errors)
    assert out.count("differential") == 1
    finish(study(tmp_path, *SAVE, grid=GRID))
    assert weights(tmp_path) == weights(undisturbed)


@pytest.mark.slow
def test_two_studies_at_once_train_each_run_once(tmp_path: Path, undisturbed: Path) -> None:
    one = study(tmp_path, *SAVE, grid=GRID)
    with ending(one):
        wait_until(lambda: states(tmp_path), one)
        two = study(tmp_path, *SAVE, grid=GRID)
        with ending(two):
            said = [finish(each, seconds=400) for each in (one, two)]
    assert_same_ledgers(tmp_path, undisturbed)
    assert all(len(re.findall("^(?:classic|differential) ", text, re.MULTILINE)) == 2 for text in said)
    assert _resumptions(tmp_path) == []  # nobody had to begin or go on twice
    assert not list(tmp_path.rglob("*.aside"))


@pytest.mark.slow
def test_the_first_of_two_studies_is_killed_and_the_second_takes_over(tmp_path: Path, undisturbed: Path) -> None:
    one = study(tmp_path, *SAVE, grid=GRID)
    with ending(one):
        wait_until(lambda: _runs_with_states(tmp_path) == 2, one)
        for trainer in trainers(one):
            trainer.suspend()  # so that the second finds its runs being trained
        two = study(tmp_path, *SAVE, grid=GRID)
        with ending(two):
            wait_until(lambda: trainers(two), two)
            assert not _resumptions(tmp_path)
            kill_all(one)
            finish(two)
    _same(tmp_path, undisturbed)
    assert len(_resumptions(tmp_path)) == 2
