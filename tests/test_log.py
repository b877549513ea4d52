"""The training log: what it says of work that was done twice."""

from __future__ import annotations

from pathlib import Path

from diffvit.log import LogPosition, Step, TrainingLog, note_of_work_again, read_log, work_after


def _steps(first: int, last: int) -> list[Step]:
    return [Step(step, 1, 1e-3, 1.0, 1.0, 0.5, 1.0, seconds=2.0 * step) for step in range(first, last + 1)]


def _grow(path: Path, keep: LogPosition | None, first: int, last: int) -> LogPosition:
    """A process goes on after `keep` as training does, to a step that is saved, and then two steps further, where it is killed."""
    again = work_after(path, keep)
    with TrainingLog(path, {"run_id": "x"}, keep=keep) as log:
        if keep:
            log.note(note_of_work_again(f"resumed after step {first - 1}", *again))
        log.write(_steps(first, last))
        position = log.position()
        log.write(_steps(last + 1, last + 2))
    return position


def test_work_that_is_done_twice_is_counted_over_several_interruptions(tmp_path: Path) -> None:
    path = tmp_path / "run.log"
    assert work_after(path, None) == (0, 0.0)
    saved = _grow(path, None, 1, 10)
    assert work_after(path, None) == (12, 24.0)  # nothing was saved: all of it
    assert work_after(path, saved) == (2, 4.0)
    with TrainingLog(path, {}, keep=saved) as log:  # killed before it saved anything: its note goes, and its count stays
        log.note(note_of_work_again("resumed after step 10", 2, 4.0))
        log.write(_steps(11, 13))
    assert work_after(path, saved) == (5, 10.0)
    saved = _grow(path, saved, 11, 20)
    assert "# resumed after step 10; 5 steps, 10.0 s done again\n" in path.read_text()
    assert work_after(path, saved) == (2, 4.0)
    assert read_log(path)["step"].tolist() == list(range(1, 23))


def test_a_line_that_was_cut_is_no_step(tmp_path: Path) -> None:
    path = tmp_path / "run.log"
    saved = _grow(path, None, 1, 3)
    path.write_bytes(path.read_bytes()[:-4])
    assert work_after(path, saved) == (1, 2.0)
