"""The command line as a user meets it: what is said, exit codes, and that bad input leaves nothing behind."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
from conftest import needs_cifar

import run as command_line
from diffvit.ledger.files import RunFiles
from diffvit.ledger.log import read_log
from diffvit.ledger.spec import RunSpec
from diffvit.train import train
from study.report import power

ROOT = Path(__file__).resolve().parents[1]


TRAIN = ("train", "--model", "vit_classic", "--size", "0.1M", "--dataset", "digits", "--device", "cpu")


def test_train_evaluate_list_plot(cli, tmp_path: Path) -> None:
    trained = cli(*TRAIN, "--epochs", "1")
    assert trained.code == 0
    assert "accuracy" in trained.out and "warning: warm-up (50 steps)" in trained.err
    again = cli(*TRAIN, "--epochs", "1")
    assert again.code == 0 and "done already" in again.err
    assert again.out == trained.out

    report = json.loads(cli("evaluate", *TRAIN[1:7], "--json").out)
    assert report["images"] == 359
    assert f"accuracy {100 * report['accuracy']:.2f} %" in trained.out.replace("test loss", "test")
    limited = cli("evaluate", *TRAIN[1:7], "--limit", "64")
    assert "of 64 images" in limited.out

    listed = cli("list")
    assert "1 of 1 runs done" in listed.out
    assert re.fullmatch(
        "there is no folder elsewhere yet; `(uv run|python) run.py study --checkpoints elsewhere` trains twelve runs\n",
        cli("list", "--checkpoints", "elsewhere").out,
    )
    one, beginning = (cli("evaluate", "--run_id", report["run_id"][:length], "--json") for length in (10, 4))
    assert one.code == 0 and beginning.out == one.out
    assert "run.py list --checkpoints elsewhere`" in cli("evaluate", "--run_id", "abc", "--checkpoints", "elsewhere").err
    assert json.loads(cli("list", "--json").out)[0]["run_id"] == report["run_id"]
    with_grid = cli("list", "--grid", "digits", "--epochs", "1")
    of_one = json.loads(cli("list", "--grid", "digits", "--model", "vit_differential_v2", "--json").out)
    assert {row["model"] for row in of_one if row["state"] != "done"} == {"vit_differential_v2"}
    assert "1 of 12 runs done, 11 to do" in with_grid.out and with_grid.out.count("\nto do ") == 11

    drawn = cli("plot", "--grid", "digits", "--epochs", "1", "--out", "figures")
    assert drawn.code == 0
    assert len(drawn.out.split()) == 6  # one architecture: two loss plots and one of scaling, each as PNG and SVG
    assert all(Path(path).is_file() for path in drawn.out.split())


def test_findings_are_kept_and_end_in_the_report(cli) -> None:
    Path("two.yaml").write_text("datasets: [digits]\nsizes: [small]\noverrides: {max_steps: 2}")
    for model in ("vit_classic", "vit_differential"):
        assert cli("train", "--model", model, "--size", "small", "--dataset", "digits", "--max_steps", "2").code == 0
    first = cli("evaluate", "--grid", "two.yaml", "--corruptions")
    rows = [line.split() for line in first.out.splitlines() if line.startswith(("classic ", "differential "))]
    assert first.code == 0 and len(rows) == 2 and "run.py report --grid two.yaml" in first.err
    assert "for all numbers of a run: " in first.err and "run.py evaluate --corruptions --run_id ID\n" in first.err
    assert "1 of 2: vit_classic 0.1M digits seed 0 max_steps=2\n" in first.err
    assert re.search(r"^2 of 2: .*, about \d+:\d\d left$", first.err, re.MULTILINE)
    one = cli("evaluate", "--run_id", rows[0][2], "--corruptions").out
    errors = {line.split()[0]: float(line.split()[1]) for line in one.splitlines()[2:]}
    assert "clutter-images" in errors and [float(cell) for cell in rows[0][3:]] == pytest.approx(
        [errors["clean"], errors["mean"], (errors["clutter-noise"] + errors["clutter-images"]) / 2], abs=0.06)  # fmt: skip
    kept = sorted(Path("checkpoints").glob("*/*_evaluations.json"))
    before = [path.read_bytes() for path in kept]
    trial = cli("evaluate", "--grid", "two.yaml", "--corruptions", "--limit", "64", "--json")
    assert len(json.loads(trial.out)) == 2 and [path.read_bytes() for path in kept] == before  # a trial is not kept
    again = cli("evaluate", "--grid", "two.yaml", "--corruptions")
    assert again.out == first.out and "left" not in again.err and len(kept) == 2
    assert cli("list", "--verify").code == 0
    kept[0].write_text(kept[0].read_text().replace("gaussian", "gaussien"))
    damaged = cli("list", "--verify")
    assert damaged.code == 1 and kept[0].name in damaged.out
    assert cli("report", "--grid", "two.yaml").code == 2  # and nothing is reported from it
    kept[0].write_bytes(before[0])
    outcome = cli("report", "--grid", "two.yaml")
    assert outcome.code == 0 and outcome.out.split() == ["checkpoints/two_report/report.html", "checkpoints/two_report/report.md"]
    page = Path("checkpoints/two_report/report.md").read_text()
    assert (
        "no interval (1 seed)" in page and "figures/digits_max_steps-2_noise.png" in page and "error in % on corrupted test images" in page
    )
    assert "not evaluated" not in page and "BACH" not in page
    kept[1].unlink()
    assert cli("report", "--grid", "two.yaml").code == 0
    assert "1 of 2 finished runs were not evaluated" in Path("checkpoints/two_report/report.md").read_text()


def test_power_says_how_many_seeds_are_needed(cli) -> None:
    rows = json.loads(cli("power", "--grid", "digits", "--difference", "10", "--json").out)
    assert [(row["dataset"], row["question"], row["pairs"]) for row in rows] == [
        ("digits", "level", 0), ("digits", "trend", 0), ("digits-noisy", "level", 0), ("digits-noisy", "trend", 0), ("digits-noisy", "noise", 0)]  # fmt: skip
    assert {row["questions"] for row in rows} == {5}
    for row in rows:  # more seeds, more power, to the error of a simulation; and the number that is needed is the first that suffices
        chances = list(row["power"].values())
        assert all(more > fewer - 0.02 for fewer, more in itertools.pairwise(chances))
        assert (
            max(seeds for seeds, chance in zip((2, 3, 4, 5, 7, 10, 15, 20, 30, 50), chances, strict=True) if chance < 0.8) < row["needed"]
        )
    assert [row["dataset"] for row in json.loads(cli("power", "--grid", "noise", "--json").out) if row["question"] == "noise"] == ["digits"]
    assert not any(row["found"] for row in rows)
    for row in json.loads(cli("power", "--grid", "noise", "--json").out):
        enough = power.power(row["question"], math.log1p(-row["found"]["50"]), row["spread"], np.log([1.02e5, 2.02e5, 4.02e5]), 50, 3)
        assert enough > 0.78 and 0.02 < row["found"]["50"] < row["found"]["10"] < row["found"]["3"] < 1
    said = cli("power", "--difference", "10").out
    assert "assumed: no cell has two seeds yet" in said and "true difference is 10 %" in said
    assert all(len(line) <= 80 for line in said.splitlines() if line.split()[1:2] in (["level"], ["trend"], ["noise"]))


def test_a_switch_alone_is_true(cli) -> None:
    for switch in (["--residual_scale"], ["--residual_scale", "true"], []):  # which is the protocol's
        assert cli(*TRAIN, "--max_steps", "2", *switch).code == 0
    assert len(json.loads(cli("list", "--json").out)) == 1
    assert cli(*TRAIN, "--max_steps", "2", "--residual_scale", "false").code == 0
    assert len(json.loads(cli("list", "--json").out)) == 2


def test_both_spellings_of_an_option(cli) -> None:
    first = cli(*TRAIN, "--max_steps", "2", "--batch_size", "16", "--warmup_steps", "1")
    second = cli(*TRAIN, "--max-steps", "2", "--batch-size", "16", "--warmup-steps", "1")
    assert first.code == second.code == 0
    assert "done already" in second.err


BAD_INPUT = [
    (("train", "--model", "vit_clasic", "--size", "10B", "--dataset", "BACH"), "did you mean vit_classic"),
    (("train", "--model", "vit_classic", "--size", "10B", "--dataset", "BACHH"), "did you mean BACH"),
    (("train", "--model", "vit_classic", "--size", "10B", "--dataset", "digits"), "0.1M, 0.2M, 0.4M"),
    ((*TRAIN, "--epochs", "0"), "at least 1"),
    ((*TRAIN, "--batch_size", "0"), "at least 1"),
    ((*TRAIN, "--batch_size", "1259"), "at most 1258"),
    ((*TRAIN, "--max_steps", "-1"), "at least 1"),
    ((*TRAIN, "--seed", "-1"), "at least 0"),
    ((*TRAIN, "--precision", "fp8"), "give one of auto, fp32, bf16, fp16"),
    ((*TRAIN, "--deterministic", "--fused", "true"), "leave --fused or --deterministic out"),
    ((*TRAIN, "--compile", "true", "--fused", "true"), "leave --fused or --compile out"),
    ((*TRAIN[:-1], "cuda:7"), "--device cpu"),
    ((*TRAIN[:-1], "meta"), "--device cpu"),
    ((*TRAIN, "--epochs", "9" * 400), "at least 1"),
    (("study", "--address", "ray://127.0.0.1:1"), "host:port"),
    (("study", "--grid", "full", "--dry_run", "--data_root", "nowhere"), "--data_root"),
    (("list", "--grid", "digits", "--data_root", "nowhere"), "--data_root"),
    ((*TRAIN, "--upload", "true"), ".env"),
    ((*TRAIN, "--colour", "red"), "--help"),
    (("train",), "--help"),
    (("train", "--model", "vit_classic", "--size", "10B", "--dataset", "CIFAR-100", "--data_root", "nowhere"), "--data_root"),
    (("evaluate", "--model", "vit_classic", "--size", "10B", "--dataset", "CIFAR-100"), "run.py list"),
    (("evaluate",), "--model, --size and --dataset, or --grid"),
    (("evaluate", "--model", "classic", "--size", "small"), "no data set given"),
    (("evaluate", "--grid", "digits"), "--corruptions, --attention or both"),
    (("evaluate", "--grid", "digits", "--size", "small", "--attention"), "one or the other"),
    (("evaluate", "--grid", "digits", "--corruptions"), "there is no folder checkpoints"),
    (("report",), "run.py study"),
    (("report", "--dataset", "CIFAR-100"), "--grid noise, lr, controls or choices"),
    (("power", "--difference", "0"), "above 0 and below 100"),
    (("power", "--grid", "fulll"), "did you mean full"),
    ((*TRAIN, "--label_noise", "1"), "at most 0.99"),
    (("study", "--grid", "fulll"), "did you mean full"),
    (("study", "--grid", "full", "--dataset", "CIFAR-100"), "--grid noise, lr, controls or choices"),
    (("study", "--dataset", "CIFAR-100"), "--grid noise, lr, controls or choices"),
    (("study", "--grid", "noise", "--dataset", "CIFAR-10"), "did you mean CIFAR-100"),
    (("plot", "--dataset", "digits"), "--grid noise, lr, controls or choices"),
    (("list", "--dataset", "digits"), "--grid noise, lr, controls or choices"),
    (("study", "--grid", "conditions.yaml"), "a list of overrides"),
    (("study", "--grid", "condition.yaml"), "at most 0.99"),
    (("study", "--grid", "elsewhere.yaml"), "add it to datasets"),
    (("study", "--grid", "unknown.yaml"), "did you mean digits"),
    (("study", "--grid", "seeds-of.yaml"), "whole numbers"),
    (("study", "--grid", "missing.yaml"), "built-in grids"),
    (("study", "--grid", "typo.yaml"), "did you mean datasets"),
    (("study", "--grid", "broken.yaml"), "docs/grids.md"),
    (("study", "--grid", "broken.toml"), "docs/grids.md"),
    (("study", "--grid", "list.yaml"), "its keys are"),
    (("study", "--grid", "size.yaml"), "0.1M, 0.2M, 0.4M"),
    (("study", "--grid", "override.yaml"), "did you mean epochs"),
    (("study", "--grid", "seeds.yaml"), "whole numbers"),
    (("study", "--grid", "empty.yaml"), "datasets"),
    (("study", "--epochs", "0"), "at least 1"),
    (("study", "--seeds", "0"), "give a whole number of at least 1"),
    (("study", "--seeds", "three"), "give a whole number of at least 1"),
    (("study", "--seeds", "--dry_run"), "--seeds has no value: --dry_run follows it"),
    (("study", "--seeds", "--dry-run"), "--seeds has no value: --dry-run follows it"),
    (("study", "--checkpoints", "--seeds=3", "--dry_run"), "--checkpoints has no value: --seeds=3 follows it"),
    (("study", "--dry_run", "--storage", "--no-recompute"), "--storage has no value: --no-recompute follows it"),
    (("power", "--no_recompute"), "it is one of `"),
    (("plan", "--gpu", "h100", "--session", "nan"), "give a number above 0"),
    ((*TRAIN, "--lr", "inf"), "give a number."),
    (("study", "--seeds", "--help"), "--seeds has no value: --help follows it"),
    (("train", *TRAIN[1:5], "--dataset", "empty.yaml:mine"), "names no datasets"),
    (("study", "--models", "classic"), "Did you mean '--model'?"),
    (("study", "--corruptions"), "it is one of `"),
    (("train", "--model", "classic"), "no --size and --dataset given"),
    (("study", "--dashboard", "perhaps"), "give true or false"),
    (("study", "--fused", "perhaps"), "give one of auto, true, false"),
    (("plan", "--gpu", "h100", "--price", "0"), "give a number above 0"),
    (("study", "--gpus_per_run", "-1"), "give a number of at least 0"),
    ((*TRAIN, "--lr", "abc"), "give a number."),
    ((*TRAIN, "--data_root", "nowhere"), "there is no folder nowhere"),
    ((*TRAIN, "--save_every", "often"), "500steps"),
    ((*TRAIN, "--save_every", "0"), "500steps"),
    ((*TRAIN, "--sync_every", "5steps"), "10m"),
    ((*TRAIN, "--storage", "gibberish://x"), "fsspec"),
    (("study", "--storage", "gibberish://x", "--address", "local"), "fsspec"),
    (("study", "--resource", "gpu=many"), "big_gpu=1"),
    (("study", "--resource", "no_such=1", "--address", "local", "--grid", "tiny.yaml"), "--resource"),
    (("study", "--upload", "true"), ".env"),
    (("study", "--upload", "--dry_run"), ".env"),
    (("upload", "somewhere", "."), ".env"),
    (("download", ".", "somewhere"), ".env"),
    ((*TRAIN, "--storage", "hf://someone"), "user/name"),
    (("study", "--collect"), "--upload true"),
    (("study", "--collect", "--shard", "1/2", "--storage", "s"), "all boxes"),
    (("study", "--collect", "--rehearse", "--storage", "s"), "one or the other"),
    (("study", "--shard", "5/4"), "such as 2/4"),
    (("study", "--shard", "half"), "such as 2/4"),
    (("study", "--shard", "1/99", "--storage", "s", "--address", "local"), "at most 12"),
    (("study", "--shard", "1/4"), "--upload true, or a --storage"),
    (("study", "--address", "127.0.0.1:1"), "--address local"),
    (("study", "--grid", "full", "--data_root", "nowhere", "--address", "local"), "--data_root"),
    (("plot",), "run.py study"),
    (("plot", "--grid", "nothing"), "digits"),
    (("polt",), "--help"),
]

GRID_FILES = {
    "typo.yaml": "dataset: [digits]",
    "broken.yaml": "datasets: [digits",
    "broken.toml": "datasets = ",
    "list.yaml": "[digits]",
    "size.yaml": "datasets: [digits]\nsizes: [10B]",
    "override.yaml": "datasets: [digits]\noverrides: {epoch: 3}",
    "seeds.yaml": "datasets: [digits]\nseeds: [a]",
    "conditions.yaml": "datasets: [digits]\nconditions: [label_noise]",
    "condition.yaml": "datasets: [digits]\nconditions: [{label_noise: 1}]",
    "elsewhere.yaml": "datasets: [digits]\nseeds: {BACH: 3}",
    "unknown.yaml": "datasets: [digits]\noverrides: {digit: {epochs: 3}}",
    "seeds-of.yaml": "datasets: [digits]\nseeds: {digits: many}",
    "empty.yaml": "sizes: [small]",
    "tiny.yaml": "datasets: [digits]\nsizes: [small]",
}


@pytest.mark.parametrize(("arguments", "hint"), BAD_INPUT, ids=[" ".join(a)[:60] for a, _ in BAD_INPUT])
def test_bad_input_is_one_sentence_and_a_hint(cli, tmp_path: Path, arguments: tuple[str, ...], hint: str) -> None:
    for name, text in GRID_FILES.items():
        (tmp_path / name).write_text(text)
    outcome = cli(*arguments)
    assert outcome.code == 2
    lines = outcome.err.strip().splitlines()
    assert lines[-2].startswith("error: ") and lines[-1].startswith("hint: ")
    assert hint in outcome.err
    assert all(argument in lines[-2] for argument in arguments if argument in GRID_FILES and argument != "tiny.yaml")
    assert "Traceback" not in outcome.err
    assert outcome.out == ""
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()} - set(GRID_FILES)
    assert left == set()


def test_a_data_root_of_the_environment_is_asked_for_where_data_are_needed(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFVIT_DATA", "not/mounted")
    assert cli("list").code == 0 and cli("doctor").code in (0, 1)
    outcome = cli("train", "--model", "vit_classic", "--size", "10B", "--dataset", "CIFAR-100")
    assert outcome.code == 2 and "not/mounted" in outcome.err


@pytest.mark.parametrize("command", [TRAIN, ("study", "--address", "local")])
def test_a_folder_that_cannot_be_written(cli, tmp_path: Path, command: tuple[str, ...]) -> None:
    (tmp_path / "file").write_text("in the way")
    outcome = cli(*command, "--checkpoints", "file/checkpoints")
    assert outcome.code == 2
    assert "cannot be written" in outcome.err and "hint:" in outcome.err
    assert (tmp_path / "file").read_text() == "in the way"


def test_damaged_and_foreign_checkpoints(cli, tmp_path: Path) -> None:
    spec = RunSpec.of("vit_classic", "0.1M", "digits", overrides={"max_steps": 1})
    result = train(spec, Path("checkpoints"), device="cpu")
    files = RunFiles.of(Path("checkpoints"), spec, result.run_id)
    whole = files.weights.read_bytes()
    for content, word in ((whole[:1000], "damaged"), (b"", "damaged"), (whole.replace(b"diffvit", b"another"), "not written by diffvit")):
        files.weights.write_bytes(content)
        outcome = cli("evaluate", *TRAIN[1:7])
        assert outcome.code == 2
        assert word in outcome.err and "hint:" in outcome.err


def test_damaged_and_missing_files_of_the_ledger_are_named(cli, tmp_path: Path) -> None:
    cli(*TRAIN, "--epochs", "1")
    folder = tmp_path / "checkpoints/vit_classic"
    result = next(folder.glob("*_result.json"))
    whole = result.read_text()
    for damaged in ("{", '{"run_id": "x"}'):
        result.write_text(damaged)
        for command in (("list",), ("plot",), (*TRAIN, "--epochs", "1"), ("study", "--epochs", "1", "--address", "local")):
            outcome = cli(*command)
            assert outcome.code == 2
            assert result.name in outcome.err
    result.write_text(whole)
    log = next(folder.glob("*.log"))
    log.unlink()
    assert log.name in cli("plot", "--epochs", "1").err
    assert f"missing: {log.relative_to(tmp_path)}" in cli("list").out


def test_a_run_that_diverges_is_an_outcome_of_its_own(cli) -> None:
    for attempt in range(2):  # the second finds it
        outcome = cli(*TRAIN, "--max_steps", "30", "--lr", "1e8")
        assert outcome.code == 1
        said = re.search(
            r"error: the run diverged at step (\d+): training loss .*, gradient norm .*, learning rate .*\nhint: ", outcome.err
        )
        assert said, outcome.err
        assert ("done already" in outcome.err) == bool(attempt)
    Path("grid.yaml").write_text("datasets: [digits]\nmodels: [vit_classic]\nsizes: [small]\noverrides: {max_steps: 30, lr: 1e8}")
    row = json.loads(cli("list", "--json").out)[0]
    assert row["state"] == "diverged" and row["test_accuracy"] is None and not row["missing"]
    result = json.loads(next(Path("checkpoints").glob("*/*_result.json")).read_text())
    assert result["status"] == "diverged" and result["steps"] == int(said[1]) == result["diverged"]["step"]
    assert result["diverged"]["learning_rate"] > 1e6 and float(result["diverged"]["grad_norm"]) > 0
    assert len(read_log(next(Path("checkpoints").glob("*/*.log")))) == int(said[1])
    assert not list(Path("checkpoints").glob("*/*.safetensors"))
    assert cli("list", "--verify").code == 0
    study = cli("study", "--grid", "grid.yaml", "--address", "local")
    assert study.code == 0 and "all 1 runs are done already" in study.err
    assert study.out.count("diverged") == 2 and "nan" not in study.out.splitlines()[1]
    drawn = cli("plot", "--grid", "grid.yaml").out
    assert "train_loss" in drawn and "scaling" not in drawn


def test_numbers_in_yaml_that_yaml_takes_for_text(cli) -> None:
    Path("grid.yaml").write_text("datasets: [digits]\noverrides: {lr: 1e-3}")
    assert cli("study", "--grid", "grid.yaml", "--dry_run").code == 0


def test_no_command_prints_the_help(cli) -> None:
    outcome = cli()
    assert outcome.code == 0
    assert "study" in outcome.out


def test_dry_run_of_the_full_grid(cli, tmp_path: Path) -> None:
    outcome = cli("study", "--grid", "full", "--dry_run")
    assert outcome.code == 0
    title, header, *lines = outcome.out.splitlines()
    assert title == "seed 0, all to do" and max(map(len, [header, *lines[:12]])) <= 80
    rows = [re.split(r"\s{2,}", line) for line in lines if line.startswith(("classic", "differential"))]
    assert len(rows) == 12
    assert {(row[2], row[4], row[5]) for row in rows} == {("CIFAR-100", "512", "4,400"), ("BACH", "64", "400")}
    for count in ("9,753,956", "9,756,260", "50,031,716", "50,043,812", "9,563,908", "50,387,332"):
        assert count in outcome.out
    assert "warm-up (500 steps) is not shorter than the run (400 steps)" in outcome.out
    assert not list(tmp_path.iterdir())


def test_a_python_without_the_packages_is_told_how(tmp_path: Path) -> None:
    run = [sys.executable, "-S", str(Path(command_line.__file__)), "study", "--grid", "digits"]
    done = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.splitlines()[1] == "hint: pip install uv && uv run run.py study --grid digits" and len(done.stderr.splitlines()) == 2


def test_grids_for_another_data_set(cli) -> None:
    outcome = cli("study", "--grid", "noise", "--dataset", "cifar-100", "--dry_run")
    title, _, *lines = outcome.out.splitlines()
    rows = [line for line in lines if line.startswith(("classic", "differential"))]
    assert outcome.code == 0 and len(rows) == 24 and title == "CIFAR-100, seed 0, batch 512, steps 4,400, all to do"
    conditions = [line for line in lines if line.endswith(":")]
    assert conditions == ["as in the protocol:", "input_noise=0.1:", "label_noise=0.2:", "label_noise=0.4:"]
    listed = cli("list", "--grid", "lr", "--dataset", "CIFAR-100")
    assert "0 of 18 runs done" in listed.out and listed.out.count("lr=0.0003:\n") == 1
    assert cli("plot", "--grid", "lr", "--dataset", "CIFAR-100").code == 2  # nothing to draw


@pytest.mark.parametrize("at_hand", [True, False])
def test_a_run_counts_for_its_own_condition_only(cli, monkeypatch: pytest.MonkeyPatch, at_hand: bool) -> None:
    if not at_hand:
        monkeypatch.setattr("study.listing.load_fingerprints", lambda *_, **__: {})
    cli(*TRAIN, "--epochs", "1", "--lr", "0.009")
    listed = cli("list", "--grid", "lr", "--epochs", "1").out.splitlines()
    assert "1 of 18 runs done" in listed[-1]
    (done,) = [number for number, line in enumerate(listed) if line.startswith("done")]
    assert [line for line in listed[:done] if line.endswith(":")][-1] == "epochs=1 lr=0.009:"


def test_every_command_and_option_has_help() -> None:
    for name, command in command_line.cli.commands.items():
        assert command.help, name
        for option in command.params:
            assert isinstance(option, click.Argument) or option.help, f"{name} {option.name}"


def test_the_readme_names_every_command() -> None:
    readme = (ROOT / "README.md").read_text()
    for name in command_line.cli.commands:
        assert f"run.py {name}" in readme


@pytest.mark.parametrize("path", ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_no_document_has_a_gap(path: str) -> None:
    assert not re.search(r"@[A-Z_]+@|TODO|FIXME", (ROOT / path).read_text())


@pytest.mark.parametrize(
    ("command", "heavy"), [("--help", "torch ray pandas numpy matplotlib datasets"), ("list", "torch ray matplotlib datasets")]
)
def test_commands_are_quick_because_nothing_heavy_is_imported(command: str, heavy: str, tmp_path: Path) -> None:
    code = f"import sys; sys.argv = ['run.py', '{command}']; import run\ntry: run.main()\nexcept SystemExit: pass\nprint(sorted(set('{heavy}'.split()) & set(sys.modules)), file=sys.stderr)"  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path, env=environment)
    assert printed.stderr.strip() == "[]"


def test_diffvit_needs_neither_ray_nor_study() -> None:
    code = "import sys; sys.modules.update(ray=None, study=None, pandas=None, matplotlib=None)\nimport diffvit.train, diffvit.evaluation, diffvit.vit_classic, diffvit.vit_differential"  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.slow
@needs_cifar
def test_the_real_model_on_the_real_images(cli, data_root: str) -> None:
    arguments = ("--model", "vit_differential", "--size", "10B", "--dataset", "CIFAR-100", "--data_root", data_root)
    trained = cli("train", *arguments, "--batch_size", "8", "--max_steps", "1")
    assert trained.code == 0
    assert "9,756,260" in trained.out
    read_back = cli("evaluate", *arguments, "--limit", "8")
    assert read_back.code == 0 and "of 8 images" in read_back.out
