"""The benchmarks' own arithmetic, and that each runs at toy size. What they measure is no business of the tests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.roofline import Ceilings
from bench.timing import Bar, finish, ratio, rounds_of

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


def test_a_ratio_is_taken_within_each_round() -> None:
    speed = np.asarray([1.0, 5.0, 2.0, 9.0, 1.0, 3.0])  # of the machine, which drifts
    found = ratio(1.5 * speed, speed)
    assert found.median == found.low == found.high == 1.5
    noisy = ratio(np.asarray([1.0, 1.2, 0.9, 1.1, 1.4, 1.0]), np.ones(6))
    assert noisy.low < noisy.median < noisy.high
    assert noisy.median == pytest.approx(1.05)


def test_rounds_interleave_in_turning_order_after_a_warm_up() -> None:
    calls: list[str] = []

    def action(name: str):
        def run() -> None:
            calls.append(name)
            torch.mm(torch.ones(2000, 2000), torch.ones(2000, 2000))  # longer than the least time: no repeats

        return run

    seconds = rounds_of({name: action(name) for name in "abc"}, 3, CPU)
    assert {name: len(times) for name, times in seconds.items()} == dict.fromkeys("abc", 3)
    assert all((times > 0).all() for times in seconds.values())
    assert sorted(calls[:3]) == ["a", "b", "c"] and calls[3] == "a"


def test_a_missed_bar_is_exit_code_1_and_in_the_json(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    bars = [Bar("a time", 1.0, 2.0), Bar("a rate", 5.0, 4.0, at_least=True)]
    with pytest.raises(SystemExit) as ended:
        finish({"rounds": np.asarray([1.0, 2.0])}, bars, CPU, tmp_path / "new" / "out.json")
    assert ended.value.code == 0
    with pytest.raises(SystemExit) as ended:
        finish({}, [*bars, Bar("another", 3.0, 2.0)], CPU, tmp_path / "out.json")
    assert ended.value.code == 1
    assert "MISSED  another: 3, at most 2" in capsys.readouterr().out
    first, second = (json.loads(path.read_text()) for path in (tmp_path / "new" / "out.json", tmp_path / "out.json"))
    assert first["rounds"] == [1.0, 2.0] and first["machine"]["versions"]["timm"]
    assert [bar["holds"] for bar in second["bars"]] == [True, True, False]


def test_the_roofline_is_the_higher_of_two_floors() -> None:
    ceilings = Ceilings(flops=100.0, bandwidth=10.0)
    assert ceilings.least_seconds(200.0, 10.0) == 2.0
    assert ceilings.least_seconds(200.0, 50.0) == 5.0


def test_attention_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    import click

    from bench import attention
    from diffvit.differential_forms import FORMS, maps

    monkeypatch.setitem(FORMS, "wrong", lambda q, k, v, full: maps(q, k, v, 1.01 * full))
    with pytest.raises(click.ClickException, match="wrong is wrong on digits"):
        attention.measure("digits", CPU, torch.float32, 2)


def test_models_that_differ_are_not_timed() -> None:
    import click

    from bench.peers import give_weights, timm_model
    from bench.step import check_same
    from diffvit.protocol import PROTOCOLS
    from diffvit.vit import build_model

    protocol, images = PROTOCOLS["digits"], torch.randn(2, 1, 8, 8)
    for name in ("vit_classic", "vit_differential"):
        ours, theirs = build_model(name, "0.1M", protocol), timm_model(name, "0.1M", protocol)
        ours.initialise(0)
        with pytest.raises(click.ClickException, match="ours and timm's differ"):
            check_same(ours, theirs, images, name)
        give_weights(ours, theirs)
        assert check_same(ours, theirs, images, name) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["attention", "--rounds", "2"],
        ["step", "--rounds", "2", "--depth", "1", "--images", "2"],
        ["data", "--rounds", "2"],
        ["study", "--rounds", "1", "--epochs", "1"],
        ["cells", "--toy", "--size", "10B"],
        ["scale", "--runs", "40", "--steps", "50", "--rounds", "1"],
    ],
    ids=lambda command: command[0],
)
def test_a_benchmark_runs_at_toy_size(command: list[str], tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    device = ["--device", "cpu"] if command[0] in ("attention", "step", "data", "cells") else []
    done = subprocess.run(
        [sys.executable, "-m", f"bench.{command[0]}", *command[1:], *device, "--json", str(path)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr  # whether bars are met depends on the machine
    assert path.is_file(), done.stderr
    assert json.loads(path.read_text())
