"""Studies over a real local Ray: all runs done, reports that agree with the table, failures that stay alone; and rehearsals."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pandas as pd
import pytest

from diffvit.errors import UserError
from diffvit.keeping.saving import Saving
from diffvit.ledger.files import RunFiles
from diffvit.ledger.log import Step, TrainingLog, read_log
from diffvit.ledger.spec import RunSpec
from diffvit.protocol import ARMS, MODELS, PROTOCOLS
from diffvit.train import train
from study.cluster.address import find_address
from study.cluster.connect import Cluster, connect
from study.cluster.display import StudyDisplay
from study.cluster.runner import Settings, run_all
from study.cost.rehearsal import Rehearsed, cells, rehearse
from study.grid import GRIDS, Grid, find_grid
from study.placement import Placement
from study.plan import PlannedRun, load_fingerprints, plan_runs
from study.table import conditions, files_of, prediction_table, run_table, step_table, write_step_csv

ROOT = Path(__file__).resolve().parents[1]
FOUR = Grid("four", datasets=("digits", "digits-noisy"), sizes=("small",), overrides={"max_steps": 4})
ONE = Grid("one", datasets=("digits",), models=("vit_classic",), sizes=("small",), seeds=(1,), overrides={"max_steps": 4})


@pytest.fixture(scope="module")
def cluster():
    with connect("local") as connected:
        yield connected


def _plan(grid: Grid, folder: Path):
    specs = grid.runs()
    return plan_runs(specs, folder, load_fingerprints(specs, None, required=True))


def _study(runs: list[PlannedRun], folder: Path, cluster: Cluster, **placement):
    with StudyDisplay(runs) as display:
        return run_all(runs, Settings(folder, placement=Placement(**placement)), cluster, display)[0]


def test_the_dashboard_answers(cluster: Cluster) -> None:
    assert cluster.dashboard is not None
    for _ in range(120):  # Ray does not wait for it
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{cluster.dashboard}", timeout=30) as response:
            assert response.status == 200
            return
        time.sleep(1)
    pytest.fail("no dashboard")


@pytest.fixture(scope="module")
def finished(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory):
    """A study of four runs that end and one that fails: its folder, and what Tune says of those that ended and of the other."""
    folder = tmp_path_factory.mktemp("study")
    (fails,) = _plan(ONE, folder)
    # A folder where its log has to go: a fault that only this run meets, and only when it starts.
    RunFiles.of(folder, fails.spec, str(fails.run_id)).log.mkdir(parents=True)
    reports = _study([fails, *_plan(FOUR, folder)], folder, cluster)
    return folder, reports, reports.pop(str(fails.run_id))


def test_a_run_that_fails_does_not_stop_the_others(finished) -> None:
    _, reports, failed = finished
    assert len(reports) == 4 and not any("failed" in report for report in reports.values())
    assert "IsADirectoryError" in failed["failed"] and "3 times" in failed["failed"]


def test_tunes_results_and_the_table_agree(finished) -> None:
    folder, reports, failed = finished
    ours = run_table(folder).set_index("run_id")
    tunes = pd.DataFrame(reports.values()).set_index("run_id")
    assert len(ours) == 4
    assert set(ours.index) == set(tunes.index)
    for column in ("test_accuracy", "test_loss", "val_loss", "train_loss", "steps", "parameters", "seconds"):
        pd.testing.assert_series_equal(ours[column].sort_index(), tunes[column].sort_index(), check_dtype=False)
    assert (ours["threads"] == 1).all()
    assert (ours["flags"] == "").all()
    assert [path.name for path in (folder / ".state").iterdir()] == [
        failed["run_id"]
    ]  # neither Tune's record nor states of finished runs are kept


def test_long_forms_have_a_row_a_step_and_a_row_an_image(finished) -> None:
    folder, *_ = finished
    table = run_table(folder)
    steps = step_table(folder, table)
    assert steps.groupby("run_id")["step"].apply(list).map(lambda s: s == [1, 2, 3, 4]).all()
    predictions = prediction_table(folder, table)
    assert len(predictions) == table["test_images"].sum()
    share = predictions.assign(right=predictions["label"] == predictions["predicted"]).groupby("run_id")["right"].mean()
    pd.testing.assert_series_equal(share.sort_index(), table.set_index("run_id")["test_accuracy"].sort_index(), check_names=False)


def _logs(folder: Path) -> pd.DataFrame:
    """As much of a run table as the step table needs, with a log for each run: of several lengths, the second of a run that diverged."""
    table = pd.DataFrame(
        [("a1", "vit_classic", "0.1M", 3), ("a0", "vit_differential", "0.1M", 1), ("b", "vit_classic", "0.4M", 130)],
        columns=["run_id", "model", "size", "steps"],
    ).assign(dataset="digits", seed=[0, 2**40, 1])
    for run in table.itertuples():
        losses = [float("nan") if run.run_id == "a0" else 1 / step for step in range(1, run.steps + 1)]
        with TrainingLog(files_of(folder, run).log, {"run_id": run.run_id}, ["a, note"]) as log:
            log.write(Step(step, 1, 1e-3, loss, loss, 0.5, 1.5, 0.001 * step) for step, loss in enumerate(losses, start=1))
            log.note("the end")
    return table


def test_the_step_table_is_the_logs_one_after_the_other(tmp_path: Path) -> None:
    table = _logs(tmp_path)
    steps = step_table(tmp_path, table)
    parts = []
    for run in table.itertuples():
        part = pd.read_csv(files_of(tmp_path, run).log, comment="#", float_precision="round_trip")
        for place, name in enumerate(("run_id", "model", "size", "dataset", "seed")):
            part.insert(place, name, getattr(run, name))
        parts.append(part)
    expected = pd.concat(parts, ignore_index=True)
    text = ["run_id", "model", "size", "dataset"]
    assert (steps[text].dtypes == "category").all()
    pd.testing.assert_frame_equal(steps.astype(dict.fromkeys(text, "str")), expected, check_exact=True)
    write_step_csv(tmp_path, table, tmp_path / "steps.csv")
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "steps.csv", float_precision="round_trip"), expected, check_exact=True)
    curves = steps[steps["size"] == "0.1M"].pivot(index="step", columns="run_id", values="train_loss")
    assert set(curves) == {"a0", "a1"} and curves["a1"].tolist() == [1, 0.5, pytest.approx(1 / 3)]
    assert step_table(tmp_path, table[:0]).empty


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text[: text.rindex(b"\n130,") + 9], "line 133 is cut, after 129 of 130 steps"),
        (lambda text: text.replace(b"\n7,", b"\n"), "line 10 has 7 of 8 values"),
        (lambda text: text.replace(b"\n7,1,", b"\n7,1,x"), "line 10 has 'x1.000000e-03' for learning_rate"),
        (lambda text: text.replace(b"epoch", b"time"), "line 3 is 'step,time,"),
        (lambda text: text[: text.rindex(b"\n130,") + 1], "it ends with line 132, after 129 of 130 steps"),
        (lambda text: b"\x00" * len(text), "line 1 is cut, after 0 of 130 steps"),
        (lambda text: None, "cannot be read: No such file"),
    ],
)
def test_a_finished_run_with_a_damaged_log_is_named(tmp_path: Path, damage, said: str) -> None:
    table = _logs(tmp_path)
    log = [files_of(tmp_path, run).log for run in table.itertuples()][2]
    damaged = damage(log.read_bytes())
    log.unlink() if damaged is None else log.write_bytes(damaged)
    (tmp_path / "steps.csv").write_text("of an earlier study")
    for read in (step_table, lambda *of: write_step_csv(*of, tmp_path / "steps.csv")):
        with pytest.raises(UserError) as caught:
            read(tmp_path, table)
        assert str(log) in caught.value.message and said in caught.value.message
        assert "_result.json" in caught.value.hint
    assert (tmp_path / "steps.csv").read_text() == "of an earlier study"


def test_a_trial_trains_as_a_plain_process_does(finished, tmp_path: Path) -> None:
    folder, *_ = finished
    for run in _plan(FOUR, tmp_path)[:2]:
        train(run.spec, tmp_path, device="cpu")
        ours, theirs = (RunFiles.of(place, run.spec, str(run.run_id)).weights for place in (tmp_path, folder))
        assert ours.read_bytes() == theirs.read_bytes()


def test_flags_name_what_differs(finished, tmp_path: Path) -> None:
    folder, *_ = finished
    shutil.copytree(folder, tmp_path / "copy")
    path = next((tmp_path / "copy/vit_classic").glob("*_0.1M_digits_result.json"))
    path.write_text(json.dumps({**json.loads(path.read_text()), "device_name": "another CPU", "micro_batch": 7}))
    table = run_table(tmp_path / "copy")
    flagged = table["flags"] != ""
    assert (flagged == ((table["dataset"] == "digits") & (table["size"] == "0.1M"))).all()
    assert table["flags"][flagged].str.contains("device_name").all()
    assert table["flags"][flagged].str.contains("micro_batch: 32 / 7").all()


@pytest.mark.slow
def test_a_worker_group_gives_the_losses_of_one_worker(cluster: Cluster, tmp_path: Path) -> None:
    grid = dataclasses.replace(ONE, models=("vit_differential",))
    train(grid.runs()[0], tmp_path / "one", device="cpu")
    reports = _study(_plan(grid, tmp_path / "two"), tmp_path / "two", cluster, workers=2)
    one, two = (run_table(tmp_path / folder).iloc[0] for folder in ("one", "two"))
    assert (one.workers, two.workers) == (1, 2) and one.run_id == two.run_id
    assert [report["test_accuracy"] for report in reports.values()] == [two.test_accuracy]
    files = [RunFiles(tmp_path / folder, two.model, two.run_id, two["size"], two.dataset) for folder in ("one", "two")]
    logs = [read_log(each.log)[["train_loss", "val_loss"]] for each in files]
    pd.testing.assert_frame_equal(*logs, rtol=2e-4, atol=1e-5)


def test_a_rehearsal_leaves_nothing_and_names_what_fails(cluster, tmp_path: Path) -> None:
    breaks = {"lr": 9e8, "warmup_steps": 0}
    chosen = cells(Grid("some", ("digits",), models=("vit_classic",), sizes=("small",), seeds=(0, 1), conditions=({}, breaks)).runs())
    assert [spec.overrides for spec in chosen] == [{"max_steps": 2}, {**breaks, "max_steps": 2}]
    (tmp_path / "storage").mkdir()
    settings = Settings(checkpoints=tmp_path / "checkpoints", saving=Saving(storage=str(tmp_path / "storage")))
    heard: list[Rehearsed] = []
    found = rehearse(chosen, settings, heard.append)
    assert len(heard) == 2 and {each.title for each in heard} == {each.title for each in found}
    whole, broken = found
    assert whole.title == "vit_classic 0.1M digits" and broken.title == "vit_classic 0.1M digits lr=900000000.0 warmup_steps=0"
    assert whole.parts == (
        "stopped and saved after a step", "resumed to step 2", "tested on 64 images", "read back", "stored and brought back")  # fmt: skip
    assert whole.fault == "" and whole.seconds > 0 and whole.memory is not None and whole.memory > 50 * 2**20
    assert whole.line().startswith("ok ") and "diverged" in broken.fault and broken.line().startswith("FAILED")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["storage"]


def test_a_rehearsal_keeps_what_was_there(cluster, tmp_path: Path) -> None:
    specs = Grid("one", ("digits",), models=("vit_classic",), sizes=("small",), overrides={"max_steps": 2}).runs()
    train(specs[0], tmp_path, device="cpu")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    (outcome,) = rehearse(cells(specs), Settings(tmp_path), lambda each: None)
    assert not outcome.fault and "stored and brought back" not in outcome.parts
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not list((tmp_path / ".state").iterdir())


def test_a_process_that_dies_in_a_rehearsal_is_named(cluster, tmp_path: Path) -> None:
    import ray

    from study.cost.rehearsal import _outcome

    died = _outcome(ray.remote(max_retries=0)(lambda: os._exit(3)).remote(), "some cell")
    assert died.title == "some cell" and "process died" in died.fault and "FAILED  some cell" in died.line()


def test_slots() -> None:
    def cluster_of(cpus: float, gpus: float) -> Cluster:
        return Cluster("", True, 1, cpus, gpus, None)

    assert Placement().slots(cluster_of(2, 0)) == 2
    assert Placement(gpus_per_run=1).slots(cluster_of(16, 4)) == 4
    assert Placement(gpus_per_run=0.25).slots(cluster_of(16, 1)) == 4
    assert Placement(gpus_per_run=1, workers=2).slots(cluster_of(16, 4)) == 2
    assert Placement(cpus_per_run=4).slots(cluster_of(2, 0)) == 0


def test_grids() -> None:
    assert len(GRIDS["full"].runs()) == len(GRIDS["digits"].runs()) == 12
    assert len(GRIDS["full"].runs(seeds=3)) == 36
    full = {(spec.model, spec.size, spec.dataset) for spec in GRIDS["full"].runs()}
    assert full == {(m, s, d) for m in ("vit_classic", "vit_differential") for s in ("10B", "25B", "50B") for d in ("CIFAR-100", "BACH")}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.yaml", "models: [vit_classic]\nsizes: [small, 0.4M]\ndatasets: [digits]\nseeds: [3, 4]\noverrides: {epochs: 2}\n"),
        (
            "a.toml",
            'models = ["vit_classic"]\nsizes = ["small", "0.4M"]\ndatasets = ["digits"]\nseeds = [3, 4]\noverrides = {epochs = 2}\n',
        ),
    ],
)
def test_grid_files(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    specs = find_grid(str(tmp_path / name)).runs()
    assert [(spec.size, spec.seed) for spec in specs] == [("0.1M", 3), ("0.1M", 4), ("0.4M", 3), ("0.4M", 4)]
    assert specs[0] == RunSpec.of("vit_classic", "0.1M", "digits", seed=3, overrides={"epochs": 2})


@pytest.mark.parametrize(("name", "dataset", "expected"), [
    ("noise", None, [{}, {"input_noise": 0.35}, {"label_noise": 0.2}, {"label_noise": 0.4}]),
    ("noise", "cifar-100", [{}, {"input_noise": 0.1}, {"label_noise": 0.2}, {"label_noise": 0.4}]),
    ("lr", None, [{"lr": 1e-3}, {}, {"lr": 9e-3}]),
    ("lr", "CIFAR-100", [{"lr": 3.33e-5}, {}, {"lr": 3e-4}]),
])  # fmt: skip
def test_grids_of_conditions(name: str, dataset: str | None, expected: list[dict]) -> None:
    specs = find_grid(name, dataset).runs()
    assert len(specs) == 6 * len(expected)
    assert [specs[i].overrides for i in range(0, len(specs), 6)] == expected
    assert {spec.dataset for spec in specs} == {"CIFAR-100" if dataset else "digits"}
    assert len({(spec.model, spec.size, str(spec.overrides)) for spec in specs}) == len(specs) == len({spec.title for spec in specs})
    plain = {spec.run_id("f") for spec in find_grid("full" if dataset else "digits").runs()}
    assert sum(spec.run_id("f") in plain for spec in specs) == 6  # the plain runs are those that are there already


@pytest.mark.parametrize(("dataset", "heads"), [("digits", 8), ("CIFAR-100", 16), ("BACH", 16)])
def test_grids_of_controls_and_choices(dataset: str, heads: int) -> None:
    controls, choices = (find_grid(name, dataset).runs() for name in ("controls", "choices"))
    assert {(spec.model, spec.protocol.heads) for spec in controls} == set(itertools.product(MODELS, (PROTOCOLS[dataset].heads, heads)))
    assert len(controls) == 2 * 3 * len(MODELS)
    lr = PROTOCOLS[dataset].lr
    chosen = {(spec.protocol.residual_scale, round(spec.protocol.lr / lr, 1), spec.protocol.heads) for spec in choices}
    assert chosen == set(itertools.product((True, False), (0.3, 1.0, 3.0), (PROTOCOLS[dataset].heads, heads)))
    assert len(choices) == 2 * 3 * len(chosen)
    assert {spec.model for spec in choices} == set(ARMS)


def test_the_pilot_is_the_full_study_of_cifar_with_fewer_tokens() -> None:
    pilot, full = find_grid("pilot").runs(), [spec for spec in find_grid("full").runs(seeds=3) if spec.dataset == "CIFAR-100"]
    for few, many in zip(pilot, full, strict=True):
        assert (few.model, few.size, few.seed) == (many.model, many.size, many.seed)
        assert (
            dataclasses.replace(few.protocol, patch_size=8) == many.protocol
            and (few.protocol.image_size // few.protocol.patch_size) ** 2 == 64
        )
    cost, whole = (sum(run.train_flops for run in plan_runs(specs, Path("nowhere"), {})) for specs in (pilot, full))
    assert cost < whole / 10


def test_full_plus_has_more_of_bach() -> None:
    counts = pd.Series([(spec.dataset, str(spec.overrides)) for spec in find_grid("full-plus").runs()]).value_counts()
    assert counts.to_dict() == {("CIFAR-100", "{}"): 6, ("BACH", "{}"): 30, ("BACH", "{'warmup_steps': 100}"): 30}
    assert len(find_grid("full-plus").runs(seeds=3)) == 6 * 3 * 3
    assert find_grid("full-plus").runs(overrides={"epochs": 7})[-1].overrides == {"warmup_steps": 100, "epochs": 7}


@pytest.mark.parametrize("name", ["full", "digits", "full-plus", "a.yaml"])
def test_grids_that_have_data_sets_of_their_own(name: str) -> None:
    with pytest.raises(UserError, match="data sets of its own") as caught:
        find_grid(name, "CIFAR-100")
    assert "noise, lr, controls or choices" in caught.value.hint


def test_grid_files_by_data_set(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(
        "models: [vit_classic]\nsizes: [small]\ndatasets: [digits, digits-noisy]\nseeds: {digits: 2}\n"
        "overrides: {epochs: 5, Digits-Noisy: {epochs: 8, dropout: 0.1}}\nconditions: {digits: [{}, {lr: 1e-3}, {lr: 3e-3}]}\n"
    )
    said: list[str] = []
    specs = [(spec.dataset, spec.seed, spec.overrides) for spec in find_grid(str(path)).runs(on_same=said.append)]
    # The protocol's own learning rate makes no run beside the plain one.
    assert said == ["digits: epochs=5 lr=0.003 is the same as epochs=5, and makes no runs of its own"]
    assert specs == [
        ("digits", 0, {"epochs": 5}), ("digits", 1, {"epochs": 5}),
        ("digits", 0, {"epochs": 5, "lr": 1e-3}), ("digits", 1, {"epochs": 5, "lr": 1e-3}),
        ("digits-noisy", 0, {"epochs": 8, "dropout": 0.1}),
    ]  # fmt: skip


def test_grid_files_with_conditions_for_all(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('datasets = ["digits", "digits-noisy"]\nconditions = [{}, {label_noise = 0.2}]\nseeds = 2\n')
    specs = find_grid(str(path)).runs()
    assert len(specs) == 2 * 2 * 3 * 2 * 2
    assert sum(spec.overrides == {"label_noise": 0.2} for spec in specs) == len(specs) / 2


def test_conditions_are_told_apart_in_tables_display_and_figures(tmp_path: Path) -> None:
    from rich.console import Console

    from study.plan import warmup_warnings
    from study.report.figures import draw_figures
    from study.results import table_text

    specs = Grid("some", ("digits",), sizes=("small",), overrides={"max_steps": 3}, conditions=({}, {"label_noise": 0.2})).runs()
    for spec in specs:
        train(spec, tmp_path, device="cpu")
    table = run_table(tmp_path, specs)
    assert table["overrides"].tolist() == ["max_steps=3"] * 2 + ["max_steps=3 label_noise=0.2"] * 2
    assert table["false_labels"].isna().tolist() == [True, True, False, False] and table["false_labels"].max() == 252
    assert table["memorised"].between(0, 1).tolist() == table["recovered"].between(0, 1).tolist() == [False, False, True, True]
    assert conditions(table) == ["", "", "label_noise=0.2", "label_noise=0.2"]
    assert conditions(table[2:]) == ["label_noise=0.2"] * 2  # not taken for plain ones where they are alone
    assert re.findall(r"^.*:$", table_text(table), re.MULTILINE) == ["max_steps=3:", "max_steps=3 label_noise=0.2:"]
    assert len(run_table(tmp_path, specs[:2])) == 2
    assert len(warmup_warnings(specs)) == 1

    runs = plan_runs(specs, tmp_path, load_fingerprints(specs, None, required=True))
    display = StudyDisplay(runs, Console(width=200, record=True))
    assert len(display.rows) == 4
    for row in display.rows.values():
        row.state = "training"
    display.console.print(display.draw())
    assert display.console.export_text().count("label_noise=0.2") == 2

    names = {path.name for path in draw_figures(table, step_table(tmp_path, table), tmp_path / "figures")}
    plain = {name for name in names if "label_noise" not in name}
    assert len(names) == 28 and len(plain) == 14 and "digits_max_steps-3_scaling_overlay.png" in plain
    assert names - plain == {name.replace("digits_", "digits_label_noise-0.2_") for name in plain}

    # A result from before there was label noise still loads.
    path = next(tmp_path.glob("vit_classic/*_result.json"))
    content = json.loads(path.read_text())
    old = {key: value for key, value in content.items() if key not in ("false_labels", "memorised", "recovered")}
    path.write_text(json.dumps(old))
    table = run_table(tmp_path)
    assert len(content) - len(old) == 3 and len(table) == 4
    assert table.set_index("run_id").loc[old["run_id"], ["false_labels", "memorised", "recovered"]].isna().all()


def test_planned_costs() -> None:
    runs = {(run.spec.model, run.spec.size, run.spec.dataset): run for run in plan_runs(GRIDS["full"].runs(), Path("nowhere"), {})}
    total = sum(run.train_flops for run in runs.values())
    assert 3.7e18 < total < 4.4e18  # about 4e18 by hand: 430 GFLOP over the six models of CIFAR-100, 9 million image passes each
    run = runs["vit_classic", "10B", "CIFAR-100"]
    # 50 epochs of 45,000 images at three passes, 4,400 validation batches from 5,000 images, validation and test at the end.
    per_cycle = -(-5000 // 512)
    validated = 4_400 // per_cycle * 5_000
    assert run.train_flops == run.forward_flops * (3 * 50 * 45_000 + validated + 5_000 + 10_000)
    (falsely,) = plan_runs([RunSpec.of("vit_classic", "10B", "CIFAR-100", overrides={"label_noise": 0.2})], Path("nowhere"), {})
    assert falsely.train_flops == run.train_flops + run.forward_flops * 9_000


def test_address_comes_from_option_then_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert find_address() == "local"
    monkeypatch.setenv("RAY_ADDRESS", "10.9.8.7:6379")
    assert find_address() == "10.9.8.7:6379"
    assert find_address("local") == "local"
    monkeypatch.delenv("RAY_ADDRESS")
    assert find_address("auto") == "local"  # a Ray that another program runs for itself is not ours to join
    (tmp_path / "ray").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as another_program:
        # What a cluster that is gone leaves behind: an address that nobody has, or somebody else by now.
        for address in ("127.0.0.1:1", f"127.0.0.1:{another_program.getsockname()[1]}"):
            (tmp_path / "ray/ray_current_cluster").write_text(address)
            assert find_address() == "local"


TWO_RUNS = "datasets: [digits]\nsizes: [small]\noverrides: {max_steps: 3}\n"
STUDY = ("study", "--grid", "two.yaml", "--address", "local")


def test_the_command_from_start_to_end(tmp_path: Path, cli) -> None:
    (tmp_path / "two.yaml").write_text(TWO_RUNS)
    first = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *STUDY], cwd=tmp_path, capture_output=True, text=True, timeout=400, check=False
    )
    assert first.returncode == 0, first.stderr
    assert "started a local Ray: 1 node" in first.stderr and "dashboard http://" in first.stderr and "cost: " not in first.stderr
    assert len(re.findall("^(?:classic|differential) ", first.stdout, re.MULTILINE)) == 2
    assert len(pd.read_csv(tmp_path / "checkpoints/two_runs.csv")) == 2
    assert len(pd.read_csv(tmp_path / "checkpoints/two_steps.csv")) == 6
    assert len(list((tmp_path / "checkpoints/figures").iterdir())) == 14

    again = cli(*STUDY)
    assert again.code == 0
    assert "all 2 runs are done already" in again.err
    assert again.out == first.stdout
