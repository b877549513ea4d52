"""The benchmarks' own arithmetic, and that each runs at toy size. What they measure is no business of the tests."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.roofline import Ceilings
from bench.timing import Bar, Journal, finish, fit_and_time, ratio, rounds_of

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


def test_each_round_is_told_and_an_action_may_time_itself() -> None:
    told: list[dict[str, list[float]]] = []
    actions = {"own clock": lambda: 5.0, "none": lambda: time.sleep(0.001)}
    seconds = rounds_of(actions, 3, CPU, after_round=lambda so_far: told.append({name: list(times) for name, times in so_far.items()}))
    assert seconds["own clock"].tolist() == [5.0] * 3 and seconds["none"].max() < 5.0
    assert [len(so_far["none"]) for so_far in told] == [1, 2, 3]
    assert told[-1]["none"] == seconds["none"].tolist()


def _append_for_ever(path: Path) -> None:
    journal = Journal(CPU, path, toy=True)
    for number in itertools.count():
        journal.append("rows", {"number": number, "times": np.ones(3)})


def test_a_benchmark_that_is_killed_leaves_what_it_had(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    process = multiprocessing.get_context("fork").Process(target=_append_for_ever, args=(path,))
    process.start()
    try:
        for _ in range(1000):
            time.sleep(0.01)
            if path.exists() and len(json.loads(path.read_text())["rows"]) >= 10:
                break
    finally:
        process.terminate()
        process.join()
    assert process.exitcode == -signal.SIGTERM
    left = json.loads(path.read_text())
    assert left["toy"] and left["complete"] is False and len(left["rows"]) >= 10
    assert [row["number"] for row in left["rows"]] == list(range(len(left["rows"])))
    assert left["rows"][0]["times"] == [1.0] * 3


def test_a_journal_that_is_finished_says_so(tmp_path: Path) -> None:
    journal = Journal(CPU, tmp_path / "out.json")
    journal.note(bars=[Bar("a time", 3.0, 2.0)])
    assert json.loads((tmp_path / "out.json").read_text())["bars"][0]["holds"] is False
    with pytest.raises(SystemExit):
        journal.finish([Bar("a time", 1.0, 2.0)])
    assert json.loads((tmp_path / "out.json").read_text())["complete"] is True


def test_loops_are_timed_after_their_warm_up() -> None:
    from bench.peers import plain_loop, timm_model
    from diffvit.dataset import Dataset, ImageSet
    from diffvit.protocol import PROTOCOLS
    from diffvit.vit import build_model

    some = ImageSet(torch.zeros(8, 1, 8, 8, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64))
    data = Dataset("digits", some, some, some, tuple("0123456789"), (0.5,), (0.25,), "none")
    protocol = PROTOCOLS["digits"].with_overrides({"batch_size": 4})
    fitted, warm_up, seconds = fit_and_time(build_model("vit_classic", "0.1M", protocol), data, protocol, 2, 3, micro_batch=2)
    assert fitted.last.step == 6 and warm_up > 0 and seconds > 0
    theirs = timm_model("vit_classic", "0.1M", protocol)
    found = plain_loop(theirs, data, protocol, 3, "fp32", CPU, 2, warm_up=2)
    assert found is not None and found > 0
    assert plain_loop(theirs, data, protocol, 1, "fp32", CPU, 2) is None


def test_cells_that_say_most_come_first() -> None:
    from bench.cells import cells_in_order

    order = [(spec.dataset, spec.size, spec.model) for spec in cells_in_order("fp32", None, None, None)]
    assert len(set(order)) == 12
    assert order[:4] == [("CIFAR-100", size, model) for size in ("10B", "50B") for model in ("vit_classic", "vit_differential")]
    assert {dataset for dataset, _, _ in order[:6]} == {"CIFAR-100"}
    assert [spec.model for spec in cells_in_order("fp32", "50B", "BACH", "vit_classic")] == ["vit_classic"]


def _cell(model: str, size: str, seconds: float, cap_gb: float | None = None, dataset: str = "CIFAR-100") -> dict[str, Any]:
    depth = {"10B": 12, "25B": 31, "50B": 63}[size]
    return {"model": model, "size": size, "dataset": dataset, "seconds_a_step": seconds, "depth": depth, "hours": 0.35, "cap_gb": cap_gb}


def test_bars_of_cells_are_those_that_their_rows_can_tell() -> None:
    from bench.cells import bars_of

    cells = [_cell("vit_classic", "10B", 0.12), _cell("vit_classic", "50B", 0.64), _cell("vit_classic", "50B", 0.96, 24.0)]
    layers, capped = bars_of(cells, "NVIDIA H200")
    assert layers.value == pytest.approx(0.64 / 63 / 0.01) and layers.holds
    assert capped.value == pytest.approx(1.5) and not capped.holds
    assert bars_of(cells[2:], "NVIDIA H200") == [] == bars_of([_cell("vit_classic", "50B", 1.0, dataset="BACH")], "NVIDIA H200")
    sides = itertools.product(("CIFAR-100", "BACH"), ("10B", "25B", "50B"), ("vit_classic", "vit_differential"))
    grid = [_cell(model, size, 1.0, dataset=dataset) for dataset, size, model in sides]
    hours = {name: [bar for bar in bars_of(grid, name) if "hours" in bar.what] for name in ("NVIDIA H200", "NVIDIA H100 80GB", "A100")}
    assert hours["A100"] == [] and not hours["NVIDIA H200"][0].holds and hours["NVIDIA H100 80GB"][0].holds
    assert hours["NVIDIA H200"][0].value == pytest.approx(4.2)


def test_bars_of_a_step() -> None:
    from bench.step import bars_of_parts, cpu_bars, gpu_bars

    times = {"diffvit classic": 1.0, "diffvit differential": 1.04, "timm ViT": 1.7, "timm DiffAttention": 2.0}
    arms = {name: np.full(3, seconds) for name, seconds in times.items()}
    validated = {f"{name}, with validation": seconds for name, seconds in arms.items()}
    beside = ("diffvit classic, with validation", "timm ViT, with validation")
    compiled = {**{name: validated[name] for name in beside}, "timm ViT, compiled, with validation": np.full(3, 1.2)}
    assert [(bar.value, bar.holds) for bar in gpu_bars([validated])] == [(pytest.approx(1.7), True), (pytest.approx(1.04), True)]
    *_, last = gpu_bars([validated, compiled])
    assert last.value == pytest.approx(1.2) and not last.holds
    assert gpu_bars([compiled]) == [last] and cpu_bars(compiled) == []
    assert [bar.holds for bar in cpu_bars(arms)] == [True, True, True]
    parts = {"validation": np.full(3, 0.24), "data": np.full(3, 0.01)}
    assert [bar.value for bar in bars_of_parts(parts, validated, 4)] == [pytest.approx(0.24 / 0.76), 0.01]
    assert bars_of_parts(parts, arms, 4)[0].value == pytest.approx(0.24 / 0.94)


def _gpu_sh(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "bench/gpu.sh", *arguments],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


def test_gpu_sh_says_what_it_does_and_refuses_what_it_does_not() -> None:
    assert subprocess.run(["bash", "-n", "bench/gpu.sh"], cwd=ROOT, check=False).returncode == 0
    told, refused = _gpu_sh("--help"), _gpu_sh("--only", "everything")
    assert told.returncode == 0 and "--only cells" in told.stdout
    assert refused.returncode == 2 and not refused.stdout
    assert refused.stderr.startswith("there is no part 'everything': give one of tests cells step")
    # The limits that the header tells are those in force, and make ten minutes.
    script = (ROOT / "bench" / "gpu.sh").read_text()
    limits = dict(re.findall(r"^  (\w+) (\d+)   ", told.stdout, re.MULTILINE))
    in_force = dict(re.findall(r"^ +(?:bench|part) \"?(\w+)\S* ([1-9]\d*) ", script, re.MULTILINE))
    assert limits == in_force
    assert sum(map(int, limits.values())) - int(limits["train"]) - int(limits["slow"]) < 600


def test_gpu_sh_cuts_a_part_and_goes_on(tmp_path: Path) -> None:
    python = tmp_path / "python"
    left = '{"complete": false}'
    python.write_text(f'#!/bin/bash\necho {left!r} > "${{@: -1}}"\ncase $* in *bench.cells*) sleep 30;; *) exit 3;; esac\n')
    python.chmod(0o755)
    done = _gpu_sh("--toy", "--only", "cells", "--only", "data", PYTHON=str(python), OUT=str(tmp_path), LIMIT="0.3")
    assert done.returncode == 1, done.stderr
    assert f"cells: cut after 0.3 s; what was measured is in {tmp_path}/cells.json" in done.stdout
    assert "data: failed" in done.stdout and "attention" not in done.stdout
    assert json.loads((tmp_path / "cells.json").read_text()) == {"complete": False}
    assert done.stdout == (tmp_path / "gpu.log").read_text()


def test_the_roofline_is_the_higher_of_two_floors() -> None:
    ceilings = Ceilings(flops=100.0, bandwidth=10.0)
    assert ceilings.least_seconds(200.0, 10.0) == 2.0
    assert ceilings.least_seconds(200.0, 50.0) == 5.0


def test_attention_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    import click

    from bench import attention
    from diffvit.kernels.forms import FORMS

    monkeypatch.setitem(FORMS, "wrong", lambda qkv, heads, full: FORMS["maps"](qkv, heads, 1.01 * full))
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
    assert json.loads(path.read_text()).get("complete", True)
