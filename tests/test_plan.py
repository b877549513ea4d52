"""What a study will need, known before it starts: memory, time and money."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from faults.processes import finish, run_py, study
from runs import stop_after

from diffvit.compute import DEFAULT_COMPUTE, Compute
from diffvit.dataset import load
from diffvit.ledger.files import RunFiles
from diffvit.ledger.log import was_interrupted
from diffvit.ledger.spec import RunSpec
from diffvit.memory import Peak, activation_bytes, evaluation_bytes, even_split, micro_batch_within, parameter_bytes, training_memory
from diffvit.protocol import MODELS, PROTOCOLS
from diffvit.train import train
from diffvit.vit import VisionTransformer, build_model
from study.cost.devices import SHEETS, CellRate, Machine, find_machine, find_sheet, how, keep_machine, measurements_file, sheet_of
from study.cost.forecast import Rate, cell_of, forecast_study, forecast_text, makespan, measured_fleet, run_seconds, sheet_fleet
from study.cost.probe import measure_cell
from study.cost.truth import compare, comparison_lines, seconds_taken
from study.grid import GRIDS, Grid
from study.plan import load_fingerprints, plan_runs

SHORT_DEPTHS = {"two": 2}

# ---------------------------------------------------------------------------------------------------------------- memory


def _saved_bytes(model: VisionTransformer, forward) -> int:
    """Bytes of all storages that autograd saves in `forward`, parameters left out."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that its address is not given away again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(size for size, _ in saved.values())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("dataset", "dropout"), [("digits", 0.0), ("digits", 0.2), ("CIFAR-100", 0.2)])
@pytest.mark.parametrize("model_name", MODELS)
def test_activations_are_what_autograd_saves(model_name: str, dataset: str, dropout: float, recompute: bool) -> None:
    protocol = dataclasses.replace(PROTOCOLS[dataset], dropout=dropout, depths=SHORT_DEPTHS)
    model = build_model(model_name, "two", protocol)
    model.initialise(0)
    model.recompute = recompute
    images, labels = torch.randn(2, protocol.channels, protocol.image_size, protocol.image_size), torch.zeros(2, dtype=torch.long)
    truth = _saved_bytes(model, lambda: F.cross_entropy(model(images), labels, reduction="sum"))
    if recompute:  # while a block's gradient is computed, it keeps what it would have kept
        x_BND = torch.randn(2, model.tokens, protocol.d_model, requires_grad=True)
        truth += _saved_bytes(model, lambda: model.blocks[0](x_BND))
    ratio = 2 * activation_bytes(model, "fp32", "cpu", recompute) / truth
    assert 1.0 <= ratio <= 1.6


def test_memory_follows_size_precision_and_recomputation() -> None:
    protocol = PROTOCOLS["CIFAR-100"]
    small, large = (build_model("vit_differential", size, protocol, "meta") for size in ("10B", "50B"))
    assert activation_bytes(small, "fp32", "cuda") < activation_bytes(large, "fp32", "cuda")
    assert activation_bytes(large, "bf16", "cuda") < activation_bytes(large, "fp32", "cuda")
    assert activation_bytes(large, "bf16", "cuda", recompute=True) < activation_bytes(large, "bf16", "cuda") / 5
    assert activation_bytes(large, "fp32", "cuda", recompute=True) < activation_bytes(large, "fp32", "cuda") / 8
    assert training_memory(large, 0, "fp32", "cuda") == 16 * large.count_parameters()
    fits = [micro_batch_within(large, 512, memory * 2**30, "bf16", "cuda") for memory in (8, 24, 80, 10_000)]
    assert fits == sorted(fits) and fits[-1] == 512 and 1 <= fits[0] < fits[2]
    for memory, images in zip((24, 80), fits[1:3], strict=True):
        assert training_memory(large, images, "bf16", "cuda") <= 0.75 * memory * 2**30 + 0.25 * parameter_bytes(large, "bf16")
    assert evaluation_bytes(large, "bf16") < min(evaluation_bytes(large, "fp32"), activation_bytes(large, "bf16", "cuda") / 10)
    without, with_it = (micro_batch_within(large, 512, 8 * 2**30, "fp32", "cpu", recompute) for recompute in (False, True))
    assert without < with_it


def test_a_batch_is_split_into_few_and_equal_parts() -> None:
    for batch in (1, 2, 7, 32, 100, 257, 512):
        for most in (0, 1, 2, 3, 10, 31, 32, 33, 100, 500, 512, 10**9):
            images = even_split(batch, most)
            parts = [min(images, batch - first) for first in range(0, batch, images)]
            assert sum(parts) == batch and 1 <= max(parts) == images <= max(1, most)
            fewest = -(-batch // max(1, most))
            assert len(parts) == fewest, "as few as can be"
            assert images == 1 or (images - 1) * fewest < batch, "smaller parts would be more"
    assert [even_split(512, most) for most in (511, 256, 200, 171, 170)] == [256, 256, 171, 171, 128]


def test_images_within_a_measured_peak() -> None:
    peak = Peak(fixed=100.0, per_image=30.0)
    assert [peak.images_within(memory) for memory in (-1e9, 0, 100, 129, 130, 189, 190, 100 + 30 * 512)] == [0, 0, 0, 0, 1, 2, 3, 512]
    assert Peak(fixed=-50.0, per_image=30.0).images_within(10) == 2


# --------------------------------------------------------------------------------------------------------------- forecast


def _machine(specs, **rate) -> Machine:
    cells = {
        cell_of(run.spec): CellRate(**{"train": 1e-3, "evaluate": 2e-4, "start": 0.5, "images": 32, "date": "2020-01-02", **rate}, flops=run.forward_flops)
        for run in specs
    }  # fmt: skip
    return Machine("Some CPU", "cpu", "fp32", 1, 2, 8 * 2**30, how(DEFAULT_COMPUTE), 4.0, {"digits": 1.0}, cells)


def test_makespan_is_that_of_list_scheduling() -> None:
    assert makespan([], 3) == 0
    assert makespan([5, 4, 3, 3, 3], 2) == 10  # 5 3 . | 4 3 3: the optimum is 9
    assert makespan([5, 4, 3, 3, 3], 1) == 18
    assert makespan([5, 4, 3, 3, 3], 9) == 5


def test_a_run_takes_what_its_images_and_its_start_take() -> None:
    (run,) = plan_runs([RunSpec.of("vit_classic", "0.1M", "digits", overrides={"epochs": 2})], Path("nowhere"), {})
    rate = Rate(train=1.0, evaluate=0.01, start=7.0, source="measured")
    steps = 2 * 40  # 1,258 images at 32; validation goes round its 180 in 6 batches, 13 times and 2 batches
    assert run.steps == steps
    assert run_seconds(run, rate) == pytest.approx(7 + 2 * 1258 + 0.01 * (13 * 180 + 2 * 32 + 180 + 359))
    assert run_seconds(run, rate, done=40) == pytest.approx(7 + 1258 + 0.01 * (13 * 180 + 2 * 32 - (6 * 180 + 4 * 32) + 180 + 359))
    (trial,) = plan_runs([RunSpec.of("vit_classic", "0.1M", "digits", overrides={"max_steps": 1})], Path("nowhere"), {})
    assert run_seconds(trial, rate) == pytest.approx(7 + 32 + 0.01 * (32 + 64 + 64))


def test_a_runs_cost_is_that_of_its_own_shape(tmp_path: Path) -> None:
    shapes: list[dict[str, int]] = [{}, {"heads": 16}, {"patch_size": 28}, {"image_size": 64}]
    runs = plan_runs([RunSpec.of("vit_classic", "10B", "CIFAR-100", overrides=shape) for shape in shapes], tmp_path, {})
    assert runs[0].forward_flops == runs[1].forward_flops > 10 * runs[2].forward_flops
    assert runs[2].parameters == runs[0].parameters + 256 * (3 * (28**2 - 8**2) - (785 - 65))
    assert len({cell_of(run.spec) for run in runs}) == len(runs)


def test_done_runs_cost_nothing_and_begun_ones_the_rest(tmp_path: Path) -> None:
    specs = Grid("two", ("digits",), sizes=("small",), overrides={"max_steps": 20}).runs()
    train(specs[0], tmp_path, device="cpu")
    stop_after(5, specs[1], tmp_path)
    runs = plan_runs(specs, tmp_path, load_fingerprints(specs, None, required=True))
    machine = _machine(runs)
    forecast = forecast_study(runs, measured_fleet(machine, runs, 1, DEFAULT_COMPUTE, None), tmp_path)
    done, begun = forecast.runs
    assert (done.state, done.seconds, begun.state, begun.steps_done) == ("done", 0.0, "25 % done", 5)
    rate = begun.rate
    assert begun.seconds == pytest.approx(run_seconds(runs[1], rate) - 5 * 32 * (rate.train + rate.evaluate))
    assert forecast.makespan == pytest.approx(4.0 + 2 * 1.0 + begun.seconds)
    said = forecast_text(forecast)
    assert (
        "1 to train, 1 of them begun; 1 already finished" in said
        and "measured  on Some CPU, 2020-01-02" in said
        and "ESTIMATED" not in said
    )
    everything = forecast_study(runs, measured_fleet(machine, runs, 1, DEFAULT_COMPUTE, None), tmp_path / "elsewhere")
    assert everything.runs[1].seconds > begun.seconds and not everything.runs[0].seconds


def test_a_cell_that_was_not_measured_is_scaled_from_its_neighbour() -> None:
    runs = plan_runs(GRIDS["digits"].runs(), Path("nowhere"), {})
    machine = _machine([run for run in runs if run.spec.size != "0.4M"])
    place = measured_fleet(machine, runs, 1, DEFAULT_COMPUTE, 3.0)
    forecast = forecast_study(runs, place, Path("nowhere"))
    assert [each.rate.source for each in forecast.runs] == (["measured"] * 4 + ["scaled"] * 2) * 2
    assert forecast.runs[4].rate.train == pytest.approx(1e-3 * runs[4].forward_flops / runs[2].forward_flops, rel=0.05)
    # Two runs share the machine, so each is charged half of its price.
    assert forecast.price(7200) == pytest.approx(3.0) and forecast.bill == pytest.approx(forecast.makespan / 3600 * 3.0)
    assert "scaled    by FLOPs" in forecast_text(forecast)


def test_measurements_are_kept_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFVIT_CACHE", str(tmp_path))
    assert find_machine("Some CPU", "fp32", 1, DEFAULT_COMPUTE) is None
    runs = plan_runs(GRIDS["digits"].runs(), Path("nowhere"), {})
    keep_machine(_machine(runs[:2]))
    kept = keep_machine(_machine(runs[1:3], train=5.0))
    assert [rate.train for rate in kept.cells.values()] == [1e-3, 5.0, 5.0]
    assert find_machine("^Some CPU$", "fp32", 1, DEFAULT_COMPUTE) == kept
    for others in (
        ("Some", "bf16", 1, DEFAULT_COMPUTE),
        ("Some", "fp32", 2, DEFAULT_COMPUTE),
        ("Some", "fp32", 1, Compute(recompute=True)),
    ):
        assert find_machine(*others) is None
    measurements_file().write_text("{")
    assert find_machine("Some CPU", "fp32", 1, DEFAULT_COMPUTE) is None
    assert keep_machine(_machine(runs[:1])).cells.keys() == {cell_of(runs[0].spec)}


@pytest.mark.parametrize(
    "wrong", [None, 7, {}, {"cells": {}}, {"start": "4"}, {"start": -1.0}, {"memory": float("nan")}, {"load": {"digits": None}},
              {"cells": {"a": {"train": 0.0}}}, {"cells": {"a": {"train": "x"}}}, {"of_a_later_version": 1}],
)  # fmt: skip
def test_a_measurement_that_cannot_be_is_left_alone_and_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: Any) -> None:
    monkeypatch.setenv("DIFFVIT_CACHE", str(tmp_path))
    machine = _machine(plan_runs(GRIDS["digits"].runs(), Path("nowhere"), {}))
    keep_machine(machine)
    kept = json.loads(measurements_file().read_text())
    (sound,) = kept.values()
    if isinstance(wrong, dict) and "cells" in wrong:
        wrong = {"cells": {cell: {**next(iter(sound["cells"].values())), **rate} for cell, rate in wrong["cells"].items()}}
    content = {"theirs": {**sound, "device_name": "Theirs", **wrong} if isinstance(wrong, dict) and wrong else wrong, **kept}
    measurements_file().write_text(json.dumps(content))
    assert find_machine("Some CPU", "fp32", 1, DEFAULT_COMPUTE) == machine
    assert find_machine("Theirs", "fp32", 1, DEFAULT_COMPUTE) is None
    keep_machine(machine)
    assert json.loads(measurements_file().read_text()).keys() == content.keys()


@pytest.mark.parametrize("place", ["file", "folder"])
def test_measurements_that_cannot_be_kept_are_used_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """The file, or the cache folder, cannot be read or written: another user's, say."""
    monkeypatch.setenv("DIFFVIT_CACHE", str(tmp_path / "cache"))
    if place == "file":
        measurements_file().mkdir(parents=True)
    else:
        (tmp_path / "cache").write_text("")
    machine, heard = _machine(plan_runs(GRIDS["digits"].runs(), Path("nowhere"), {})), []
    assert find_machine("Some CPU", "fp32", 1, DEFAULT_COMPUTE) is None
    assert keep_machine(machine, heard.append) == machine
    assert len(heard) == 1 and str(measurements_file()) in heard[0] and "DIFFVIT_CACHE" in heard[0]


def test_data_sheets_give_sane_times() -> None:
    names = {
        "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200", "NVIDIA A100-SXM4-80GB": "a100", "NVIDIA A100-SXM4-40GB": "a100-40",
        "NVIDIA L40S": "l40s", "NVIDIA GeForce RTX 4090": "4090", "NVIDIA A10": "a10", "Tesla T4": "t4", "NVIDIA A10G": None, "Tesla V100-SXM2-32GB": "v100-32",
        "NVIDIA L4": "l4", "NVIDIA RTX A6000": "a6000", "NVIDIA RTX 6000 Ada Generation": "6000-ada", "NVIDIA GeForce RTX 5090": "5090",
        "NVIDIA B200": "b200", "AMD Instinct MI300X": "mi300x",
    }  # fmt: skip
    assert {name: sheet.name if (sheet := sheet_of(name)) else None for name in names} == names
    hours = {}
    for sheet in SHEETS.values():
        runs = plan_runs(GRIDS["full"].runs(sheet.precision), Path("nowhere"), {})
        forecast = forecast_study(runs, sheet_fleet(sheet, 1, DEFAULT_COMPUTE, None), Path("nowhere"))
        hours[sheet.name] = forecast.makespan / 3600
        assert all(each.fits and each.rate.source == "sheet" for each in forecast.runs)
        precision, peak = sheet.peak(sheet.precision)
        assert precision == sheet.precision
        assert forecast.seconds > sum(run.train_flops for run in runs) / peak  # nothing is faster than its peak
        slower = forecast_study(runs, sheet_fleet(sheet, 1, Compute(recompute=True), None), Path("nowhere"))
        assert slower.seconds > forecast.seconds and slower.runs[4].micro_batch > forecast.runs[4].micro_batch
    assert hours["h200"] < hours["h100"] < hours["a100"] < hours["a10"] < hours["t4"]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("RTX 4090", "4090"), ("rtx4090", "4090"), ("NVIDIA GeForce RTX 5090", "5090"), ("L4", "l4"), ("L40S", "l40s"), ("MI300X", "mi300x"),
        ("A100 40GB", "a100-40"), ("a100-80", "a100"), ("H100 SXM", "h100"), ("RTX A6000", "a6000"), ("RTX 6000 Ada", "6000-ada"),
    ],
)  # fmt: skip
def test_a_gpu_is_found_as_people_write_it(text: str, name: str) -> None:
    assert find_sheet(text).name == name


# ------------------------------------------------------------------------------------------------------------ the command


def test_plan_of_the_full_grid(cli, tmp_path: Path) -> None:
    outcome = cli("plan", "--grid", "full", "--gpu", "h100", "--gpus", "4", "--price", "2", "--json", "plan.json")
    assert outcome.code == 0
    assert len(re.findall(r"^sheet     ESTIMATED .* measures it$", outcome.out, re.MULTILINE)) == 1  # a sentence is one line off a terminal
    assert (
        outcome.out.startswith("seed 0, times from: sheet, all to do\n")
        and len(re.findall(r"^(classic|differential) ", outcome.out, re.MULTILINE)) == 12
        and "ESTIMATED from the data sheet" in outcome.out
        and "4 x NVIDIA H100 SXM" in outcome.out
    )
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert len(plan["runs"]) == 12 and plan["precision"] == "bf16"
    assert plan["dollars"] == pytest.approx(plan["seconds"] / 3600 * 2) and plan["bill"] == pytest.approx(
        plan["makespan_seconds"] / 3600 * 8
    )
    assert f"{plan['runs'][0]['parameters']:,}" in outcome.out
    assert f"\nbill      ${plan['bill']:,.2f}: every GPU is paid" in outcome.out and "costs at most 10 min 0 s" in outcome.out
    assert "$0.33 of each GPU" in outcome.out
    alone = cli("plan", "--grid", "full", "--gpu", "H100")
    assert alone.code == 0 and "$" not in alone.out and "--price P" in alone.out
    assert "fp16, 16 GB" in cli("plan", "--grid", "full", "--gpu", "t4").out
    assert "fp32, 16 GB" in cli("plan", "--grid", "full", "--gpu", "t4", "--precision", "fp32").out
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]  # no ledger


def test_plan_says_how_many_sessions_it_takes(cli, tmp_path: Path) -> None:
    pilot = ("plan", "--grid", "pilot", "--gpu", "t4", "--gpus", "2", "--json", "plan.json")
    assert "sessions" not in cli(*pilot).out
    start = json.loads((tmp_path / "plan.json").read_text())["start_seconds"]
    for hours, counted in ((1000, 1), (3, None), (0.5, None)):
        said = cli(*pilot, "--session", str(hours)).out
        plan = json.loads((tmp_path / "plan.json").read_text())
        work, usable = plan["makespan_seconds"] - start, 3600 * hours - start
        assert usable * (plan["sessions"] - 1) < work <= usable * plan["sessions"] and counted in (None, plan["sessions"])
        assert ("one suffices" if plan["sessions"] == 1 else f"{plan['sessions']} of them") in said
    assert "over before the first run begins" in cli(*pilot, "--session", "0.01").err


def test_plan_says_what_does_not_fit(cli) -> None:
    assert "does not fit" in cli("plan", "--grid", "full", "--gpu", "t4", "--micro_batch", "64").out
    assert "does not fit" not in cli("plan", "--grid", "full", "--gpu", "t4", "--micro_batch", "64", "--recompute").out


@pytest.mark.parametrize(("arguments", "hint"), [
    (("--gpu", "h101"), "did you mean h100"),
    (("--gpu", "abacus"), "known: b200, h200, h100, a100"),
    (("--gpu", "h100", "--price", "0"), "give a number above 0"),
    (("--gpu", "h100", "--price", "-2"), "give a number above 0"),
    (("--gpu", "h100", "--gpus", "0"), "give a whole number of at least 1"),
    (("--gpu", "h100", "--probe"), "--probe measures the machine at hand"),
    (("--probe", "--probe_seconds", "0"), "give a number above 0"),
    (("--grid", "fulll", "--gpu", "h100"), "did you mean full"),
    (("--gpu", "h100", "--data_root", "nowhere"), "--data_root"),
    (("--gpu", "h100", "--epochs", "0"), "at least 1"),
    (("--gpus_per_run", "0"), "give --probe, which measures it"),
    (("--gpu", "h100", "--json", "nowhere/plan.json"), "a folder that is there"),
])  # fmt: skip
def test_bad_input(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], hint: str) -> None:
    monkeypatch.setenv("DIFFVIT_CACHE", str(tmp_path / "cache"))
    outcome = cli("plan", *([] if "--json" in arguments else ["--json", "plan.json"]), *arguments)
    assert outcome.code == 2
    error, said = outcome.err.strip().splitlines()[-2:]
    assert error.startswith("error: ") and said.startswith("hint: ") and hint in said
    assert outcome.out == "" and not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------- forecast and truth


def test_the_error_of_a_forecast_is_said(tmp_path: Path) -> None:
    specs = Grid("two", ("digits",), sizes=("small", "medium"), overrides={"max_steps": 20}).runs()
    runs = plan_runs(specs, tmp_path, load_fingerprints(specs, None, required=True))
    forecast = forecast_study(runs, measured_fleet(_machine(runs), runs, 1, DEFAULT_COMPUTE, None), tmp_path)
    said = forecast.runs[0].seconds
    logs = [RunFiles.of(tmp_path, run.spec, str(run.run_id)).log for run in runs]
    for log, note in zip(
        logs, ("", "# resumed after step 3; 2 steps, 1.5 s done again\n", "# begun again; 4 steps, 0.3 s done again\n"), strict=False
    ):
        log.parent.mkdir(exist_ok=True)
        log.write_text("step,seconds\n" + note)
    assert [was_interrupted(log) for log in logs] == [False, True, True, False]  # the last one has no log at all
    reports = {str(run.run_id): {"status": "done", "run_seconds": 1.0, "seconds": 0.1} for run in runs[:3]}
    reports[str(runs[0].run_id)]["run_seconds"] = said / 1.25
    reports[str(runs[3].run_id)] = {"status": "done", "run_seconds": 0.1, "seconds": 99.0}  # another machine had trained it
    took = seconds_taken(
        {**reports, "failed": {"failed": "it died"}, "diverged": {"status": "diverged", "run_seconds": 1.0, "seconds": 0.5}}
    )
    assert took.keys() == {str(run.run_id) for run in runs[:3]}
    comparison = compare(forecast, took, forecast.makespan * 2, tmp_path)
    assert [run[0] for run in comparison.runs] == [runs[0].spec.title] and len(comparison.interrupted) == 2
    text = "\n".join(comparison_lines(comparison))
    assert "+25 %" in text and "-50 %" in text and "2 runs were interrupted" in text and "1 runs: the forecast is off by 25 %" in text
    stopped = "\n".join(comparison_lines(compare(forecast, took, None, tmp_path)))
    assert "whole study" not in stopped and "+25 %" in stopped


def test_a_cell_is_measured_by_real_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spec = RunSpec.of("vit_differential", "0.1M", "digits")
    found = measure_cell(spec, load("digits"), torch.device("cpu"), Compute(micro_batch=16), 0.5)
    assert found["images"] in (1, 4, 16, 32) and found["train"] > 0 and found["evaluate"] > 0 and found["start"] > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_plan_probe_study_and_rehearsal_as_commands(tmp_path: Path, cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFVIT_CACHE", str(tmp_path / "cache"))
    grid = "datasets: [digits]\nsizes: [small]\noverrides: {epochs: 2}\n"
    rehearsed = finish(study(tmp_path, "--rehearse", grid=grid)).splitlines()
    assert sum(line.startswith("ok ") and " GB: " in line for line in rehearsed) == 2
    assert not (tmp_path / "checkpoints").exists()
    assert cli("study", "--grid", "grid.yaml", "--address", "local", "--rehearse", "--dry_run").code == 2

    unknown = cli("plan", "--grid", "grid.yaml")
    assert unknown.code == 2 and "--probe" in unknown.err
    probe = ("--probe", "--probe_seconds", "1", "--json", "plan.json")
    probed = finish(run_py(tmp_path, "plan", "--grid", "grid.yaml", "--address", "local", *probe))
    assert "digits, seed 0, times from: measured, all to do, epochs=2\n" in probed and "measured  on " in probed
    assert json.loads((tmp_path / "plan.json").read_text())["makespan_seconds"] > 0
    assert cli("plan", "--grid", "grid.yaml", "--address", "local").out in probed

    begun = time.monotonic()
    said = finish(study(tmp_path, "--price", "3600", grid=grid))
    passed = time.monotonic() - begun
    bill = float(re.search(r"; \$([\d,.]+) for all 1 machines from start to end$", said, re.MULTILINE)[1].replace(",", ""))
    assert 0 < bill <= passed  # at a dollar a second
    assert re.search(r"^forecast: \d+", said, re.MULTILINE)
    assert len(re.findall(r"^vit_\w+ 0\.1M digits seed 0 .*\d s +\d+\.\d s +[+-]\d+ %$", said, re.MULTILINE)) == 2
    assert re.search(r"^whole study: forecast \d+.*, took \d+.*: [+-]\d+ %$", said, re.MULTILINE)
    done = cli("plan", "--grid", "grid.yaml", "--address", "local").out
    assert "0 to train; 2 already finished" in done and done.count("0:00:00") == 2
