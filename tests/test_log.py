"""The training log: what it says of work that was done twice, what is read of it, and how damage is named."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from diffvit.errors import UserError
from diffvit.ledger.log import STEP_COLUMNS, LogPosition, Step, TrainingLog, WorkAgain, read_log, read_rows


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Of a log."""
    return tmp_path / "run.log"


def _steps(first: int, last: int) -> list[Step]:
    return [Step(step, 1, 1e-3, 1.0, 1.0, 0.5, 1.0, seconds=2.0 * step) for step in range(first, last + 1)]


def _grow(path: Path, keep: LogPosition | None, first: int, last: int) -> LogPosition:
    """A process goes on after `keep` as training does, to a step that is saved, and then two steps further, where it is killed."""
    again = WorkAgain.after(path, keep)
    with TrainingLog(path, {"run_id": "x"}, keep=keep) as log:
        if keep:
            log.note(again.note(f"resumed after step {first - 1}"))
        log.write(_steps(first, last))
        position = log.position()
        log.write(_steps(last + 1, last + 2))
    return position


def test_work_that_is_done_twice_is_counted_over_several_interruptions(path: Path) -> None:
    assert WorkAgain.after(path, None) == (0, 0.0)
    saved = _grow(path, None, 1, 10)
    assert WorkAgain.after(path, None) == (12, 24.0)  # nothing was saved: all of it
    assert WorkAgain.after(path, saved) == (2, 4.0)
    with TrainingLog(path, {}, keep=saved) as log:  # killed before it saved anything: its note goes, and its count stays
        log.note(WorkAgain(2, 4.0).note("resumed after step 10"))
        log.write(_steps(11, 13))
    assert WorkAgain.after(path, saved) == (5, 10.0)
    saved = _grow(path, saved, 11, 20)
    assert "# resumed after step 10; 5 steps, 10.0 s done again\n" in path.read_text()
    assert WorkAgain.after(path, saved) == (2, 4.0)
    assert read_log(path)["step"].tolist() == list(range(1, 23))


def test_a_line_that_was_cut_is_no_step(path: Path) -> None:
    saved = _grow(path, None, 1, 3)
    path.write_bytes(path.read_bytes()[:-4])
    assert WorkAgain.after(path, saved) == (1, 2.0)


def _log(path: Path, count: int) -> list[Step]:
    """A log whose numbers are hard to read: small, large, and none at all. Comments stand in front, in between and at the end."""
    chance = np.random.default_rng(0)
    steps = [
        Step(step, 1 + step // 3, 10.0 ** -int(step), float(np.float32(train)), val, 1 / 3, 1e30 * val, step / 3)
        for step, (train, val) in enumerate(chance.random((count, 2)).tolist(), start=1)
    ]
    steps[-1] = steps[-1]._replace(train_loss=math.nan, val_loss=math.inf, grad_norm=-math.inf)
    with TrainingLog(path, {"run_id": "x"}, ["one", "two, with a comma"]) as log:
        log.write(steps[:2])
        log.note("in between")
        log.note("and another")
        log.write(steps[2:])
        log.note("the end")
    return steps


def test_a_log_is_read_as_pandas_reads_it(path: Path) -> None:
    steps = _log(path, 7)
    table = read_log(path, steps=7)
    expected = pd.read_csv(path, comment="#", float_precision="round_trip")
    pd.testing.assert_frame_equal(table, expected, check_exact=True)
    assert table["train_loss"].astype(np.float32).tolist()[:-1] == [step.train_loss for step in steps[:-1]]  # to the bit
    text = read_rows(path).text
    assert text == "".join(step.line() + "\n" for step in steps).encode()


def test_an_unfinished_log_is_read_up_to_the_line_that_is_cut(path: Path) -> None:
    _log(path, 5)
    whole = path.read_bytes()
    for length in range(len(whole) + 1):  # killed after any byte
        path.write_bytes(whole[:length])
        lines = whole[:length].decode().split("\n")[:-1]
        steps = sum(line[0].isdigit() for line in lines)
        table = read_log(path)
        assert table["step"].tolist() == list(range(1, steps + 1))
        assert list(table) == list(STEP_COLUMNS)
        if steps < 5:
            with pytest.raises(UserError, match=r"run\.log is damaged"):
                read_log(path, steps=5)


# Of a log of five steps: comments in lines 1 to 3, names in 4, steps in 5, 6, 9, 10 and 11.
@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (b"step,epoch", b"step,time", "line 4 is 'step,time,"),
        (b"step,epoch,learning_rate,train_loss,val_loss,val_accuracy,grad_norm,seconds\n", b"", "line 4 is '1,1,1.0"),
        (b"\n2,1,", b"\n2,1,oops", "line 6 has 'oops1.000000e-02' for learning_rate, which is no number"),
        (b"\n3,2,", b"\n3,2.5,", "line 9 has '2.5' for epoch, which is no whole number"),
        (b"\n3,2,", b"\n3,,", "line 9 has '' for epoch"),
        (b"\n3,2,", b"\n3,", "line 9 has 7 of 8 values"),
        (b"\n3,2,", b"\n3,2,\xff\x00\xfe\x01", "line 9 has '\ufffd\\x00\ufffd\\x01"),
        (b"\n3,2,", b"\n\xff\x00\xfe\x01\n3,2,", "line 9 has 1 of 8 values"),
        (b"\n3,2,", b"\n4,2,", "line 9 has step 4 in place of step 3"),
        (b"\n3,2,", b"\n\n3,2,", "line 9 has 1 of 8 values"),
        (b"0.333333,", b"0.333333\r,", "line 5 has '0.333333\\r' for val_accuracy"),
    ],
)
@pytest.mark.parametrize("steps", [None, 5])
def test_damage_is_named_with_its_line(path: Path, old: bytes, new: bytes, said: str, steps: int | None) -> None:
    _log(path, 5)
    assert path.read_bytes().count(old) >= 1
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    with pytest.raises(UserError) as caught:
        read_log(path, steps)
    assert caught.value.message.startswith(f"{path} is damaged: ") and said in caught.value.message
    assert ("_result.json" if steps else "last checkpoint") in caught.value.hint


@pytest.mark.parametrize(
    ("steps", "cut", "said"),
    [
        (6, 0, "it ends with line 12, after 5 of 6 steps"),
        (4, 0, "line 11 has step 5, and the result says that the run has 4"),
        (5, 15, "line 11 is cut, after 4 of 5 steps"),
    ],
)
def test_a_finished_run_has_all_of_its_steps(path: Path, steps: int, cut: int, said: str) -> None:
    _log(path, 5)
    path.write_bytes(path.read_bytes()[: -cut or None])
    with pytest.raises(UserError, match=f"damaged: {said}"):
        read_log(path, steps)


def test_garbage_and_a_missing_log_are_one_sentence(path: Path) -> None:
    with pytest.raises(UserError, match=r"run\.log cannot be read: No such file"):
        read_log(path)
    path.write_bytes(np.random.default_rng(0).bytes(5000))
    with pytest.raises(UserError, match=r"run\.log is damaged: line \d+ "):
        read_log(path)
    path.write_bytes(b"")
    assert read_log(path).empty  # hardly begun
    with pytest.raises(UserError, match="it is empty, after 0 of 5 steps"):
        read_log(path, steps=5)
