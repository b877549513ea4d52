"""What `run.py watch` shows: how far a study is that runs elsewhere, from its ledger or its storage alone."""

from __future__ import annotations

import contextlib
import itertools
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from diffvit.errors import StorageError, first_line
from diffvit.keeping.lease import lease_state
from diffvit.keeping.runs import remote_result, state_folder
from diffvit.keeping.storage import open_storage
from diffvit.ledger.disk import write_atomically
from diffvit.ledger.files import RunFiles
from diffvit.ledger.log import read_rows
from diffvit.ledger.results import read_result, read_results
from diffvit.ledger.spec import RunSpec
from study.live.board import Board
from study.live.curves import Curves, check_page, served
from study.live.progress import RunProgress
from study.plan import PlannedRun, load_fingerprints, plan_runs, run_ids_of

# A log that has not grown for so long, and for so many of its run's steps, is called silent.
_SILENT_SECONDS = 180.0
_SILENT_STEPS = 10


@dataclass
class WatchedRun:
    """A run of the grid.

    Attributes:
        candidates: where its files would be, in each precision. order: numbers the runs as they are seen to have ended.
    """

    run: PlannedRun
    candidates: list[RunFiles]
    order: Iterator[int]

    def look(self, row: RunProgress, idle: Callable[[RunFiles, float], str], curves: Curves | None = None) -> None:
        """Bring the run's row up to date, and its curves.

        Args:
            idle: a word for a run that nobody trains, "" for others; called with its files and its seconds a step.

        Raises:
            UserError: a damaged log or result.
        """
        ended = [files for files in self.candidates if files.result.is_file()]
        begun = sorted((files for files in self.candidates if files.log.is_file() and files not in ended), key=_written, reverse=True)
        step_seconds = row.seconds / max(1, row.step)
        trained = [files for files in begun if not idle(files, step_seconds)]  # in another precision than one that has ended, perhaps
        files = next(iter([*trained, *ended, *begun]), None)
        if files is None:
            return
        if (result := read_result(files.result)) is not None:
            outcome = {"train_loss": result.train_loss, "val_loss": result.val_loss, "test_accuracy": result.test_accuracy}
            row.report({**outcome, "steps": result.steps, "seconds": result.seconds, "run_seconds": math.inf})
            row.state, row.ended = result.status, row.ended or next(self.order)
            if curves and files.log.is_file():
                curves.draw(self.run.spec, files.run_id, read_rows(files.log))
            return
        rows = read_rows(files.log)
        if rows.last not in (0, row.step):
            (last,) = rows.after(rows.last - 1)
            row.opened = row.opened or (0, 0.0)  # its log has all of its training
            row.report({**last.columns, "images_per_second": last.images_per_second(self.run.spec.protocol.batch_size)})
        row.phase = idle(files, step_seconds)
        row.state = "stopped" if row.phase else "training"
        if curves:
            curves.draw(self.run.spec, files.run_id, rows)


def _written(files: RunFiles) -> float:
    return files.log.stat().st_mtime


class LedgerSource:
    """A ledger in a folder, which another process of this or another machine writes."""

    every = 2.0  # seconds between two looks

    def __init__(self, checkpoints: Path):
        self.checkpoints = checkpoints

    def refresh(self, runs: Sequence[WatchedRun]) -> None:
        """Bring the folder up to date."""

    def idle(self, files: RunFiles, step_seconds: float) -> str:
        """A word for a run that has not ended and that nobody seems to train; "" where somebody does."""
        silence = time.time() - files.log.stat().st_mtime
        return "silent" if silence > max(_SILENT_SECONDS, _SILENT_STEPS * step_seconds) else ""


class StorageSource(LedgerSource):
    """The results and logs that a storage has, copied to a folder.

    Args:
        url: of the storage. logs: copy those of ended runs too.

    Raises:
        UserError: the storage is not known.
    """

    every = 60.0  # it may be slow, and may count requests

    def __init__(self, checkpoints: Path, url: str, logs: bool):
        super().__init__(checkpoints)
        self._logs = logs
        self._storage = open_storage(url)
        self._live: set[str] = set()

    def refresh(self, runs: Sequence[WatchedRun]) -> None:
        """Raises StorageError."""
        unfinished = set(self._storage.ls(".state"))
        for files in (files for watched in runs for files in watched.candidates if not files.result.is_file()):
            if found := remote_result(self._storage, files):
                if self._logs:
                    self._storage.get(f"{files.model}/{files.log.name}", files.log)
                write_atomically(files.result, found[1])
            elif files.run_id in unfinished:
                logs = self._storage.names(state_folder(files.run_id), ".log")
                if logs:
                    self._storage.get(logs[-1], files.log)
                alive = lease_state(self._storage, files.run_id) == "live"
                (self._live.add if alive else self._live.discard)(files.run_id)

    def idle(self, files: RunFiles, step_seconds: float) -> str:
        return "" if files.run_id in self._live else "stopped"


def watch_study(
    specs: list[RunSpec], checkpoints: Path, storage: str | None, data_root: str | None, web: bool = False, console: Console | None = None
) -> None:
    """Show the runs of a grid until all have ended, or once where stderr is no terminal.

    Args:
        storage: path or URL that is looked at instead of the checkpoints folder.
        web: serve the curves on this machine too.

    Raises:
        UserError: data that cannot be loaded; a damaged file; no TensorBoard for the page.
        StorageError: the storage did not answer the first time.
    """
    if web:
        check_page()
    with contextlib.ExitStack() as stack:
        if storage:
            source: LedgerSource = StorageSource(Path(stack.enter_context(tempfile.TemporaryDirectory())), storage, logs=web)
        else:
            source = LedgerSource(checkpoints)
        fingerprints = _fingerprints(specs, checkpoints, data_root)
        planned = plan_runs(specs, source.checkpoints, {})
        order = itertools.count(1)
        runs = [WatchedRun(run, _candidates(run.spec, source.checkpoints, fingerprints), order) for run in planned]
        board = Board(planned, console, timed=False)
        curves = stack.enter_context(served(board.say)) if web else None

        def look() -> bool:
            source.refresh(runs)
            for watched in runs:
                watched.look(board.rows[watched.run.spec.title], source.idle, curves)
            states = {row.state for row in board.rows.values()}
            all_ended = states <= {"done", "diverged"}
            board.note = "" if all_ended or "training" in states else "none is being trained"
            return all_ended

        ended = look()
        with board:
            while board.console.is_terminal or web:
                if ended and not web:
                    break
                time.sleep(source.every)
                try:
                    ended = look()
                except StorageError as error:
                    board.note = f"the storage does not answer: {first_line(error)}"
        board.console.print(board.draw())


def _candidates(spec: RunSpec, checkpoints: Path, fingerprints: dict[str, str]) -> list[RunFiles]:
    return [RunFiles.of(checkpoints, spec, run_id) for run_id in run_ids_of(spec, fingerprints[spec.dataset]).values()]


def _fingerprints(specs: Sequence[RunSpec], checkpoints: Path, data_root: str | None) -> dict[str, str]:
    """Data set -> fingerprint: of the data at hand, of a run of them that has ended here, or of the data loaded for this."""
    known = {result.dataset: str(result.identity["fingerprint"]) for result in read_results(checkpoints)}
    known |= load_fingerprints(specs, data_root, required=False)
    return known | load_fingerprints([spec for spec in specs if spec.dataset not in known], data_root, required=True)
