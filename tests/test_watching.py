"""`run.py watch`: a study's table from its ledger or its storage alone, while others train."""

from __future__ import annotations

import dataclasses
import io
import itertools
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from runs import stop_after
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffvit.dataset import load
from diffvit.keeping.lease import Lease, take_lease
from diffvit.keeping.saving import Every, Saving
from diffvit.keeping.storage import open_storage
from diffvit.ledger.files import RunFiles
from diffvit.ledger.log import read_log, read_rows
from diffvit.train import train
from study.grid import Grid
from study.live.board import Board
from study.live.curves import Curves
from study.live.watching import LedgerSource, WatchedRun, watch_study
from study.plan import plan_runs

SPECS = Grid("some", ("digits",), sizes=("small",), seeds=(0, 1), overrides={"max_steps": 12, "batch_size": 32}).runs()
DONE, BEGUN = SPECS[1], SPECS[2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A ledger and a storage with a finished run, one that was stopped after 5 of 12 steps, and two that nobody began."""
    folder = tmp_path_factory.mktemp("watched")
    ledger, storage = folder / "checkpoints", folder / "storage"
    saving = Saving(Every.parse("1steps"), str(storage), sync_every=0.0)
    train(DONE, ledger, device="cpu", saving=saving)
    stop_after(5, BEGUN, ledger, saving=saving)
    return ledger, storage


def watched(checkpoints: Path, **options: Any) -> list[str]:
    """The lines that are printed where nothing can be redrawn."""
    console = Console(width=100, record=True, file=io.StringIO())
    watch_study(SPECS, checkpoints, data_root=None, console=console, **{"storage": None, **options})
    return [line.rstrip() for line in console.export_text().splitlines()]


def row(lines: list[str], model: str) -> str:
    (line,) = [line for line in lines if line.startswith(model)]
    return line


def test_a_ledger_tells_how_far_its_study_is(folders: tuple[Path, Path]) -> None:
    ledger, _ = folders
    log = next((ledger / BEGUN.model).glob("*_training.log"))
    last = read_log(log).iloc[-1]
    lines = watched(ledger)
    assert re.fullmatch(r"1 of 4 runs done, about [\d:]+ left", lines[0]) and "max_steps=12" in lines[1]
    done, begun = row(lines, "classic"), row(lines, "differential")
    assert "done" in done and "12/12" in done and done.endswith("%")
    assert "━" in begun and f"5/12      {last.train_loss:.4f}    {last.val_loss:.4f}" in begun
    assert lines[-1] == "2 waiting"
    before = log.stat().st_mtime
    os.utime(log, (before - 3600, before - 3600))  # an hour without a step
    try:
        assert row(watched(ledger), "differential").split()[3:5] == ["silent", "5/12"]
    finally:
        os.utime(log, (before, before))


def test_more_seeds_than_were_asked_for_are_said(cli, folders: tuple[Path, Path]) -> None:
    Path("one.yaml").write_text("datasets: [digits]\nsizes: [small]\noverrides: {max_steps: 12, batch_size: 32}\n")
    asked = ("watch", "--grid", "one.yaml", "--checkpoints", str(folders[0]))
    assert "seeds up to 1 of these runs: --seeds 2 shows them" in cli(*asked).err
    assert "shows them" not in cli(*asked, "--seeds", "2").err


def test_a_folder_that_is_not_there_is_said(cli) -> None:
    outcome = cli("watch", "--grid", "digits", "--checkpoints", "nowhere")
    assert (
        outcome.code == 0
        and "warning: there is no folder nowhere yet." in outcome.err
        and "0 of 12 runs done, none is being trained\n" in outcome.err
    )
    assert not Path("nowhere").exists()


def test_a_run_that_trains_in_another_precision_is_not_done(folders: tuple[Path, Path]) -> None:
    ledger, _ = folders
    log = next((ledger / DONE.model).glob("*_training.log"))
    other = RunFiles.of(ledger, DONE, dataclasses.replace(DONE, precision="bf16").run_id(load("digits").fingerprint))
    other.log.write_text("".join(log.read_text().splitlines(keepends=True)[:-10]))
    try:
        assert watched(ledger)[0].startswith("0 of 4 runs done") and "━" in row(watched(ledger), "classic")
        os.utime(other.log, (0, 0))
        assert watched(ledger)[0].startswith("1 of 4 runs done")
    finally:
        other.log.unlink()


def test_a_storage_tells_the_same_to_a_machine_without_the_ledger(folders: tuple[Path, Path], tmp_path: Path) -> None:
    ledger, url = folders
    lines = watched(tmp_path / "nothing", storage=str(url))
    assert lines[0].startswith("1 of 4 runs done") and "done" in row(lines, "classic")
    assert "stopped" in row(lines, "differential") and "5/12" in row(lines, "differential")
    log = next((ledger / BEGUN.model).glob("*_training.log"))
    lease = take_lease(open_storage(str(url)), log.name.split("_")[1], "another machine", 60.0)
    assert isinstance(lease, Lease)
    try:
        assert "━" in row(watched(tmp_path / "nothing", storage=str(url)), "differential")
    finally:
        lease.expire()
    assert not (tmp_path / "nothing").exists()


def test_curves_have_each_step_once_while_the_log_grows_and_shrinks(folders: tuple[Path, Path], tmp_path: Path) -> None:
    ledger, _ = folders
    run_id = next((ledger / DONE.model).glob("*_training.log")).name.split("_")[1]
    whole = RunFiles.of(ledger, DONE, run_id).log.read_text().splitlines(keepends=True)
    begin = next(number for number, line in enumerate(whole) if line.startswith("1,"))
    files = RunFiles.of(tmp_path / "copy", DONE, run_id)
    files.folder.mkdir(parents=True)
    curves = Curves(tmp_path)
    for steps in (0, 3, 3, 9, 4, 12):  # at 4, a run that was killed at 9 has begun again at its last checkpoint
        files.log.write_text("".join(whole[: begin + steps]) + ("7,1,0.0" if steps == 3 else ""))
        curves.draw(DONE, run_id, read_rows(files.log))
    (folder,) = (tmp_path / "tracking" / "tensorboard").iterdir()

    def drawn() -> list[int]:
        curves.draw(DONE, run_id, read_rows(files.log))  # each time, what the writer's thread has made of the last one is flushed
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        events.Reload()
        return [event.step for event in events.Scalars("train_loss")]

    deadline = time.monotonic() + 60
    while len(drawn()) < 12 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert drawn() == list(range(1, 13))


def test_a_look_at_a_run_reads_its_log_once(folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, _ = folders
    read, read_bytes = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path) or read_bytes(path))
    board, curves = Board(plan_runs([DONE, BEGUN], ledger, {}), None, timed=False), Curves(tmp_path)
    for run in plan_runs([DONE, BEGUN], ledger, {}):
        files = RunFiles.of(ledger, run.spec, run.spec.run_id(load("digits").fingerprint))
        WatchedRun(run, [files], itertools.count(1)).look(board.rows[run.spec.title], LedgerSource(ledger).idle, curves)
        assert read.count(files.log) == 1
    assert len(list((tmp_path / "tracking" / "tensorboard").iterdir())) == 2
