"""Forecasts from a GPU's data sheet: what they rest on, how they are fitted, and how they hold against what was measured."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from bench import fit_sheet
from diffvit.compute import DEFAULT_COMPUTE, Compute
from study.cost.devices import SHEETS
from study.cost.forecast import (
    PASSES_TRAINING,
    SHEET_FIRST_RUN,
    SHEET_RUN_START,
    SHEET_STUDY_START,
    Fleet,
    forecast_study,
    forecast_text,
    least_seconds,
    run_seconds,
    sheet_fleet,
    sheet_rate,
)
from study.grid import GRIDS
from study.plan import PlannedRun, plan_runs

MEASURED = sorted((Path(__file__).resolve().parents[1] / "docs/results/gpu").glob("cells*.json"))


def _runs(precision: str = "bf16") -> list[PlannedRun]:
    return plan_runs(GRIDS["full"].runs(precision), Path("nowhere"), {})


def _text(place: Fleet, precision: str = "bf16") -> str:
    return " ".join(forecast_text(forecast_study(_runs(precision), place, Path("nowhere"))).split())


def test_the_first_run_of_each_slot_compiles() -> None:
    sheet, runs = SHEETS["h100"], _runs()
    one, two = (forecast_study(runs, sheet_fleet(sheet, devices, DEFAULT_COMPUTE, None), Path("nowhere")) for devices in (1, 2))
    assert one.makespan == pytest.approx(SHEET_STUDY_START + SHEET_FIRST_RUN + one.seconds)
    assert two.fleet.start == one.fleet.start and two.makespan < 0.6 * one.makespan
    assert all(each.rate.start == SHEET_RUN_START < 10 for each in one.runs)
    plain, asked = Compute(deterministic=True), Compute(deterministic=True, compile=True)
    for compute, start in ((plain, 0.0), (Compute(compile=False, fused=False), 0.0), (asked, SHEET_FIRST_RUN)):
        assert sheet_fleet(sheet, 1, compute, None).start == SHEET_STUDY_START + start


def test_a_pass_takes_its_products_and_its_bytes() -> None:
    runs = {run.spec.title: run for run in _runs()}
    small, large, other = (runs[f"{name} CIFAR-100 seed 0"] for name in ("vit_classic 10B", "vit_classic 50B", "vit_differential 10B"))
    h100, h200 = SHEETS["h100"], SHEETS["h200"]
    (products, moved), (most_products, most_moved) = least_seconds(h200, small), least_seconds(h200, large)
    assert products == small.forward_flops / 989e12
    # By hand, for each of 785 tokens, 256 wide: a layer's products have 16 x 256 inputs and outputs of two bytes, each written and read;
    # and its two sums and norms pass three times each over a stream of four bytes.
    assert moved == pytest.approx(11 * 785 * 256 * (2 * 2 * 16 + 6 * 4) / 4800e9)
    # The last layer computes its class token only, and so moves little.
    assert most_moved / moved == pytest.approx(62 / 11) and most_products / products == pytest.approx(62 / 11, rel=0.03)
    assert least_seconds(h100, small) == (products, pytest.approx(moved * 4800 / 3350))
    assert least_seconds(h200, other)[1] == pytest.approx(moved, rel=0.01)  # both arms' attention is fused
    rate, again = (sheet_rate(h200, recompute)(small) for recompute in (False, True))
    assert rate.train == pytest.approx(PASSES_TRAINING * rate.evaluate) and again.train == pytest.approx(rate.train * 4 / 3)
    wide = dataclasses.replace(small, spec=dataclasses.replace(small.spec, precision="fp32"))
    assert least_seconds(h200, wide)[0] == small.forward_flops / 67e12 and least_seconds(h200, wide)[1] > 1.5 * moved


def test_a_forecast_says_on_what_it_was_measured() -> None:
    assert SHEETS["h200"].measured and not SHEETS["t4"].measured
    here, elsewhere = (_text(sheet_fleet(SHEETS[name], 1, DEFAULT_COMPUTE, None)) for name in ("h200", "a100"))
    for said in (here, elsewhere):
        assert f"fitted to measurements on NVIDIA H200 SXM, {SHEETS['h200'].measured}" in said
    assert "not measured on this GPU" in elsewhere and "not measured" not in here
    for name, precision, words in (
        ("h200", "fp32", "50 % of peak, which is assumed; not measured at fp32"),
        ("t4", "fp32", "50 % of peak, which is assumed; 1.8 times that for plain blocks, as on an H200; not measured at fp32"),
        ("t4", "fp16", "66 % of peak, as large matrices reached on a V100; 1.8 times that for plain blocks, as on an H200; not measured"),
    ):
        assert words in _text(sheet_fleet(SHEETS[name], 1, DEFAULT_COMPUTE, None), precision)


def test_tensor_cores_without_bf16_are_used_in_fp16() -> None:
    t4, fleet = SHEETS["t4"], sheet_fleet(SHEETS["t4"], 1, DEFAULT_COMPUTE, None)
    assert t4.precision == "fp16" and t4.peak("bf16") == ("fp32", 8.1e12)
    half, full = (forecast_study(_runs(precision), fleet, Path("nowhere")) for precision in ("fp16", "fp32"))
    assert least_seconds(t4, _runs("fp16")[0])[0] == _runs()[0].forward_flops / 65e12
    assert 4 < full.seconds / half.seconds < 65 / 8.1 * 0.66 / 0.5


# ---------------------------------------------------------------------------------------------------------------- the fit


def _cells(shares: tuple[float, float], device_name: str = "NVIDIA H200", gpu: str = "h200") -> dict[str, Any]:
    """What bench.cells would write of a GPU that reaches these shares."""
    rows = []
    for run in _runs():
        protocol = run.spec.protocol
        forward = sum(seconds / share for seconds, share in zip(least_seconds(SHEETS[gpu], run), shares, strict=True))
        _, val, test = protocol.images
        training = run.train_flops / run.forward_flops - (val + test)  # passes of the steps, validation batches included
        rows.append({
            "model": run.spec.model, "size": run.spec.size, "dataset": run.spec.dataset, "steps": 50, "batch": protocol.batch_size,
            "micro_batch": 64, "seconds_a_step": training * forward / run.steps, "seconds_an_image_evaluated": forward, "start_seconds": 3.0,
        })  # fmt: skip
    return {"machine": {"device_name": device_name}, "toy": False, "cells": rows}


def _written(folder: Path, content: dict[str, Any]) -> Path:
    path = folder / f"{len(list(folder.iterdir()))}.json"
    path.write_text(json.dumps(content))
    return path


def test_the_fit_finds_the_shares_again(tmp_path: Path) -> None:
    shares = (0.31, 0.62)
    paths = [_written(tmp_path, _cells(shares)), _written(tmp_path, _cells(shares, "NVIDIA H100 80GB HBM3", "h100"))]
    cells = [cell for path in paths for cell in fit_sheet.read_cells(path)]
    assert [cell.gpu for cell in cells] == ["h200"] * 12 + ["h100"] * 12
    assert fit_sheet.fit(cells) == pytest.approx(shares, rel=1e-6)
    of_cells, of_grid = fit_sheet.errors(cells, shares)
    assert max(map(abs, of_cells)) < 1e-9 and abs(of_grid) < 1e-9
    slower, _ = fit_sheet.errors(cells, (shares[0] / 2, shares[1] / 2))
    assert slower == pytest.approx([1.0] * 24)
    said = CliRunner().invoke(fit_sheet.main, [str(path) for path in paths])
    assert said.exit_code == 0 and "SHARE_OF_PEAK 0.310, SHARE_OF_BANDWIDTH 0.620" in said.output and "error of the grid" in said.output


def test_the_fit_stays_below_what_plain_kernels_reach(tmp_path: Path) -> None:
    path = _written(tmp_path, _cells((5.0, 0.3)))
    peak, bandwidth = fit_sheet.fit(fit_sheet.read_cells(path))
    assert peak == pytest.approx(fit_sheet.MOST[0]) and bandwidth < fit_sheet.MOST[1]


def test_what_cannot_be_fitted_is_refused(tmp_path: Path) -> None:
    content = _cells((0.5, 0.5))
    other = [{**content["cells"][0], "batch": 4}]
    for wrong, said in (
        ({**content, "machine": {"device_name": "Abacus"}}, "no data sheet of 'Abacus'"), ({**content, "toy": True}, "toy size"),
        ({**content, "cells": other}, "another batch"),
    ):  # fmt: skip
        with pytest.raises(click.ClickException, match=said):
            fit_sheet.read_cells(_written(tmp_path, wrong))
    assert len(fit_sheet.read_cells(_written(tmp_path, {**content, "machine": {}}), "h100")) == 12


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.name)
def test_a_forecast_holds_against_what_was_measured(path: Path) -> None:
    """The constants of study/cost/forecast.py against recorded measurements: nothing is timed here."""
    cells = fit_sheet.read_cells(path)
    of_cells, of_grid = fit_sheet.errors(cells, fit_sheet.IN_FORCE)
    assert max(map(abs, of_cells)) <= fit_sheet.OF_A_CELL and abs(of_grid) <= fit_sheet.OF_THE_GRID
    # The forecast itself, without a run's start, gives the same.
    runs = {" ".join((run.spec.model, run.spec.size, run.spec.dataset)): run for run in _runs()}
    for cell, error in zip(cells, of_cells, strict=True):
        rate = dataclasses.replace(sheet_rate(SHEETS[cell.gpu])(runs[cell.title]), start=0.0)
        assert run_seconds(runs[cell.title], rate) == pytest.approx((1 + error) * cell.seconds)
