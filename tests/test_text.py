"""What a person reads on a terminal is folded between words, and fits 80 columns; elsewhere nothing is folded."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import struct
import termios
from pathlib import Path

import pytest

from study.text import columns, flops_unit, folded, runs_table, terminal_width

ROOT = Path(__file__).parents[1]

# The more conditions, data sets and numbers, the wider.
SCREENS = [
    ("study", "--grid", "full", "--dry_run"),
    ("study", "--grid", "digits", "--seeds", "3", "--dry_run"),
    ("study", "--grid", "controls", "--dry_run"),
    ("study", "--grid", "choices", "--seeds", "2", "--dry_run"),
    ("plan", "--grid", "full", "--gpu", "h100", "--seeds", "3", "--price", "2.5"),
    ("plan", "--grid", "full-plus", "--gpu", "h100", "--price", "2.5"),
    ("plan", "--grid", "choices", "--gpu", "h100", "--price", "1"),
    ("plan", "--grid", "full", "--gpu", "t4", "--gpus", "2", "--price", "1", "--session", "9"),
    ("plan", "--grid", "pilot", "--gpu", "h100", "--price", "2"),
    ("untrained",),
    ("untrained", "--grid", "controls"),
    ("check", str(ROOT / "docs/examples/sigmoid_attention.py:SigmoidAttention"), "--grid", "digits"),
    ("list", "--grid", "full", "--seeds", "2"),
    ("list", "--grid", "choices", "--seeds", "2"),
    ("power", "--grid", "full"),
    ("doctor",),
    ("list", "--grid", "digit"),
    ("train", "--model", "classic", "--size", "small", "--dataset", "digits", "--precision", "bf16", "--heads", "7"),
]


@pytest.mark.parametrize("screen", SCREENS, ids=" ".join)
def test_a_screen_fits_80_columns(screen: tuple[str, ...], cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("study.text.terminal_width", lambda stream: 80)
    outcome = cli(*screen)
    refused = "digit" in screen or "7" in screen
    # Whether `doctor` finds a problem is the machine's affair.
    assert outcome.code in ((2,) if refused else (0, 1) if screen == ("doctor",) else (0,)), outcome.err
    # A path may be longer than that, and is never broken.
    wide = [line for line in (outcome.out + outcome.err).splitlines() if len(line) > 80]
    wide = [line for line in wide if not any(len(word) > 40 and "/" in word for word in line.split())]
    assert not wide, "\n".join(wide)


def test_a_box_lists_its_share_in_the_grids_order(cli) -> None:
    lines = cli("study", "--grid", "choices", "--shard", "1/2", "--storage", "elsewhere", "--dry_run").out.splitlines()
    conditions = [line for line in lines if line.endswith(":")]
    assert len(conditions) == len(set(conditions)) >= 6


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("short", "short"),
        ("one two three four five", "one two three\n  four five"),
        ("  one two three four five", "  one two three\n  four five"),
        ("end   in some hours, on two", "end   in some\n      hours, on\n      two"),
        ("ok  up  full of all sorts", "ok  up  full of\n        all\n        sorts"),
        ("model  size  7  8.5  done so", "model  size  7  8.5  done so"),  # its last column begins too far right
        ("hint: now run `run.py a b c`", "hint: now run\n  `run.py a b c`"),
        ("to resume, run: uv run run.py study --x", "to resume, run:\n  uv run run.py study --x"),
        ("a_word_that_is_longer_than_all", "a_word_that_is_longer_than_all"),
        ("one two three four\n\nfive", "one two three\n  four\n\nfive"),
        ("    far in, and so below", "    far in, and\n    so below"),
        ("it is worse by 2.2 % of", "it is worse by\n  2.2 % of"),
        ("get it with: uv sync --extra it", "get it with:\n  uv sync --extra it"),
        ("the file run.py is not here", "the file run.py\n  is not here"),
        ("note: python 3 is what it needs", "note: python 3\n  is what it\n  needs"),
        ("数据集 数据集 数据集", "数据集 数据集\n  数据集"),  # each character two columns wide
    ],
)
def test_lines_are_folded_between_words_and_commands_stay_whole(text: str, expected: str) -> None:
    assert folded(text, 16) == expected
    assert folded(text, None) == text


def test_columns_are_as_wide_as_a_terminal_shows_them() -> None:
    assert columns([("数据", "a"), ("data set", "b")]) == "数据      a\ndata set  b"
    assert columns([("é", "a"), ("ab", "b")]) == "é   a\nab  b"


def test_the_width_is_that_of_the_streams_own_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    near, far = pty.openpty()
    with os.fdopen(near), open(far, "w") as terminal:
        fcntl.ioctl(far, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 72, 0, 0))
        assert terminal_width(terminal) == 72
        fcntl.ioctl(far, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 200, 0, 0))
        assert terminal_width(terminal) == 200
        fcntl.ioctl(far, termios.TIOCSWINSZ, struct.pack("HHHH", 0, 0, 0, 0))
        assert terminal_width(terminal) is None  # it does not say
        for columns, width in {"90": 90, "0": None, "many": None}.items():
            monkeypatch.setenv("COLUMNS", columns)
            assert terminal_width(terminal) == width
    assert terminal_width(io.StringIO()) is None


def test_lines_are_never_longer_than_can_be_read() -> None:
    assert max(map(len, folded(40 * "some words ", 300).splitlines())) in range(90, 101)


def test_conditions_precede_their_runs_and_what_is_shared_is_said_once() -> None:
    header = ("model", "seed", "state", "overrides")
    rows = [
        ("classic", "0", "to do", ""),
        ("differential", "0", "to do", ""),
        ("classic", "0", "to do", "lr=0.1"),
        ("v2", "0", "to do", "lr=0.1"),
    ]
    shared = ("seed", "state", "overrides")
    assert runs_table(header, rows, shared=shared).splitlines() == [
        "seed 0, all to do", "model", "as in the protocol:", "classic", "differential", "lr=0.1:", "classic", "v2"]  # fmt: skip
    assert runs_table(header, rows[:2], shared=shared).splitlines() == ["seed 0, all to do", "model", "classic", "differential"]
    assert runs_table(header, rows[2:], shared=shared).splitlines() == ["seed 0, all to do, lr=0.1", "model", "classic", "v2"]
    assert runs_table(header, rows[2:3], shared=shared).splitlines() == ["model    seed  state", "lr=0.1:", "classic  0     to do"]


def test_a_columns_unit_suits_its_largest_number() -> None:
    assert flops_unit([1.9e15, 1.2e18]) == (1e15, "PFLOP") and flops_unit([2e17, 4e19]) == (1e18, "EFLOP")
    assert flops_unit([1.6e11, 9e12]) == (1e9, "GFLOP") and flops_unit([1e13]) == (1e12, "TFLOP") and flops_unit([]) == (1e9, "GFLOP")
