"""What commands leave behind and say: named after what it is, and believed only while the files are there."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pandas as pd
import pytest
import torch

from diffvit.errors import UserError
from diffvit.evaluation import evaluate_checkpoint
from diffvit.keeping.state import StateFolder
from diffvit.ledger.files import RunFiles
from diffvit.ledger.results import read_results, write_result
from diffvit.ledger.spec import RunSpec, overrides_text, parse_overrides
from diffvit.protocol import Protocol
from diffvit.train import train
from study import main
from study.commands.following import of_one_run, of_same_runs, with_seeds
from study.finished import FinishedRuns
from study.grid import GRIDS, Grid, find_grid
from study.listing import ledger_text
from study.options import StudyOptions
from study.plan import plan_runs
from study.results import report_results

CELL = ("--model", "vit_classic", "--size", "small", "--dataset", "digits")
STUDY = ("study", "--grid", "one.yaml", "--address", "local")
CHECKPOINTS = Path("checkpoints")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ledger of five runs of a cell: as a study of two seeds leaves it, and three trials, two of them alike but for the seed."""
    folder = tmp_path_factory.mktemp("trained") / "checkpoints"
    with pytest.MonkeyPatch.context() as patch:  # as if the protocol had so few steps
        _short(patch)
        for seed, overrides in ((0, {}), (1, {}), (0, {"epochs": 3}), (1, {"epochs": 3}), (0, {"epochs": 3, "lr": 0.01})):
            train(RunSpec.of("vit_classic", "small", "digits", seed, overrides=overrides), folder, device="cpu")
    return folder


def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Protocol, "total_steps", lambda self, train_images=None: self.epochs % 4)


@pytest.fixture
def ledger(cli, trained: Path, monkeypatch: pytest.MonkeyPatch):
    """The command line in a folder with a copy of that ledger and a grid of its plain cell."""
    _short(monkeypatch)
    shutil.copytree(trained, CHECKPOINTS)
    Path("one.yaml").write_text("datasets: [digits]\nmodels: [vit_classic]\nsizes: [small]\n")
    return cli


def _outcome() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in CHECKPOINTS.rglob("*") if path.suffix in (".csv", ".png", ".svg", ".md", ".html")}


# --------------------------------------------------------------------------------------------- files, not markers


@pytest.mark.parametrize("damage", ["all", "one gone", "one empty", "one cut"])
def test_a_finished_study_draws_what_is_missing_or_damaged(ledger, damage: str) -> None:
    assert ledger(*STUDY).code == 0
    before = _outcome()
    figures = sorted((CHECKPOINTS / "figures").iterdir())
    assert len(figures) == 6
    if damage == "all":
        shutil.rmtree(CHECKPOINTS / "figures")
    elif damage == "one gone":
        figures[0].unlink()
    else:
        figures[0].write_bytes(b"" if damage == "one empty" else figures[0].read_bytes()[:1000])
    again = ledger(*STUDY)
    assert again.code == 0 and "all 1 runs are done already" in again.err
    assert _outcome() == before


def test_weights_that_are_gone_are_missed(ledger) -> None:
    spec = RunSpec.of("vit_classic", "small", "digits")
    result = next(each for each in read_results(CHECKPOINTS) if not each.overrides and each.seed == 0)
    weights = RunFiles.of(CHECKPOINTS, spec, result.run_id).weights
    assert "gone" not in ledger(*STUDY).err
    weights.unlink()
    assert f"warning: files of finished runs are gone: {weights}\nhint: delete the _result.json" in ledger(*STUDY).err
    alone = ledger("train", *CELL, "--device", "cpu")
    assert f"{weights} is gone" in alone.err and "weights " not in alone.out


def test_a_study_that_was_stopped_names_no_figures(ledger, capsys: pytest.CaptureFixture) -> None:
    options = StudyOptions(find_grid("one.yaml"), CHECKPOINTS, precision="fp32")
    report_results(options, options.runs(), draw=False)
    assert "figures" not in capsys.readouterr().err and not (CHECKPOINTS / "figures").exists()


# ------------------------------------------------------------------------------------------------ names of outcomes


def test_a_trial_leaves_the_studys_outcome_alone(ledger) -> None:
    assert ledger(*STUDY, "--seeds", "2").code == ledger("report", "--grid", "one.yaml").code == 0
    before = _outcome()
    assert len(pd.read_csv(CHECKPOINTS / "one_runs.csv")) == 2
    trial = ledger(*STUDY, "--seeds", "2", "--epochs", "3")
    assert "table    checkpoints/one_epochs-3_runs.csv" in trial.err
    assert ledger("plot", "--grid", "one.yaml", "--epochs", "3").code == 0
    report = ledger("report", "--grid", "one.yaml", "--epochs", "3")
    assert report.out.split()[0] == "checkpoints/one_report_epochs-3/report.html"
    after = _outcome()
    assert {name: after[name] for name in before} == before
    added = set(after) - set(before)
    assert {"checkpoints/one_epochs-3_runs.csv", "checkpoints/one_epochs-3_steps.csv"} <= added
    assert all("epochs-3" in name for name in added)
    drawings = [content for name, content in after.items() if name in added and name.endswith("svg")]
    assert drawings and all(b"epochs=3" in content for content in drawings)
    assert b"On digits (epochs=3), " in after["checkpoints/one_report_epochs-3/report.md"]  # in the verdict itself


def test_the_report_names_the_study_and_what_was_trained_beside_it(ledger) -> None:
    assert ledger(*STUDY, "--seeds", "2").code == 0
    assert ledger("train", "--model", "classic", "--size", "small", "--dataset", "digits", "--seed", "7").code == 0
    Path("two.yaml").write_text(Path("one.yaml").read_text() + "seeds: [0, 1]\n")
    assert FinishedRuns(CHECKPOINTS, "two.yaml")._commands()[:2] == [
        "uv run run.py study --grid two.yaml", "uv run run.py train --model vit_classic --size 0.1M --dataset digits --seed 7"
    ]  # fmt: skip
    Path("two.yaml").write_text(Path("one.yaml").read_text() + "seeds: 1\n")
    assert FinishedRuns(CHECKPOINTS, "two.yaml")._commands()[0] == "uv run run.py study --grid two.yaml --seeds 2"
    commands = FinishedRuns(CHECKPOINTS, "one.yaml")._commands()
    assert [command.removeprefix("uv run run.py ") for command in commands[:-1]] == [
        "study --grid one.yaml --seeds 2", "train --model vit_classic --size 0.1M --dataset digits --seed 7"
    ]  # fmt: skip


def test_a_trial_in_a_grid_file_leaves_the_built_in_figures_alone(ledger) -> None:
    assert ledger("plot", "--grid", "digits").code == 0
    before = _outcome()
    assert all(name.startswith("checkpoints/figures/digits_vit_classic_") for name in before if "figures" in name)
    Path("some.yaml").write_text("datasets: [digits]\nmodels: [vit_classic]\nsizes: [small]\noverrides: {epochs: 3}\n")
    for grid in ("some.yaml", "one.yaml"):
        assert ledger("plot", "--grid", grid).code == 0
    assert before.items() <= _outcome().items()


def test_fewer_seeds_take_no_rows_off_the_table(ledger) -> None:
    ledger(*STUDY, "--seeds", "2")
    assert len(pd.read_csv(CHECKPOINTS / "one_runs.csv")) == 2
    said = ledger(*STUDY)
    assert said.out.count("\nclassic ") == len(pd.read_csv(CHECKPOINTS / "one_runs.csv")) == 2


@pytest.mark.parametrize(
    ("grid", "epochs", "name"),
    [("digits", None, "digits"), ("digits", 3, "digits_epochs-3"), ("digits", 15, "digits"), ("noise", 3, "noise_epochs-3")],
)
def test_overrides_that_change_nothing_are_not_named(grid: str, epochs: int | None, name: str) -> None:
    assert StudyOptions(GRIDS[grid], CHECKPOINTS, epochs=epochs).name == name


# --------------------------------------------------------------------------------------------------- which run is meant


def _evaluated(ledger, *arguments: str) -> tuple[dict, str]:
    outcome = ledger("evaluate", *CELL, "--limit", "8", "--device", "cpu", "--json", *arguments)
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    (result,) = (each for each in read_results(CHECKPOINTS) if each.run_id == report["run_id"])
    return result, outcome.err


@pytest.mark.parametrize(
    ("arguments", "seed", "overrides"),
    [
        ((), 0, {}),
        (("--seed", "1"), 1, {}),
        (("--epochs", "3"), 0, {"epochs": 3}),
        (("--epochs", "3", "--seed", "1"), 1, {"epochs": 3}),
        (("--lr", "0.01"), 0, {"epochs": 3, "lr": 0.01}),
        (("--epochs", "15"), 0, {}),  # the protocol's own
    ],
)
def test_evaluate_takes_the_run_that_is_named(ledger, arguments: tuple[str, ...], seed: int, overrides: dict) -> None:
    result, said = _evaluated(ledger, *arguments)
    assert (result.seed, result.overrides) == (seed, overrides)
    alone = arguments[0:1] == ("--lr",) or len(arguments) == 4
    line = rf"of \d runs that match, {result.run_id}: vit_classic 0.1M digits seed {seed}, .*fp32, ended {re.escape(result.finished)}\n"
    assert re.fullmatch("" if alone else line, said)  # no choice, no word


def test_a_run_id_may_stand_alone_and_must_agree_with_what_else_is_said(ledger) -> None:
    run_id = next(each.run_id for each in read_results(CHECKPOINTS) if each.seed == 1 and not each.overrides)
    alone = ledger("evaluate", "--run_id", run_id, "--limit", "8", "--device", "cpu")
    assert alone.code == 0 and run_id in alone.out and not alone.err
    for other in (("--seed", "0"), ("--epochs", "3"), ("--dataset", "digits-noisy"), ("--model", "vit_differential")):
        refused = ledger("evaluate", "--run_id", run_id, *other)
        assert refused.code == 2 and "there is no checkpoint" in refused.err and f"{other[1]}" in refused.err


def test_a_model_folder_on_a_disk_that_is_not_there_is_named(ledger) -> None:
    shutil.move(CHECKPOINTS / "vit_classic", "elsewhere")
    (CHECKPOINTS / "vit_classic").symlink_to("../not_mounted")
    found = ledger("evaluate", *CELL)
    assert found.code == 2 and "vit_classic is a link to ../not_mounted, which is not there" in found.err


def test_runs_that_nothing_tells_apart_are_shown_with_what_does(ledger) -> None:
    for result in read_results(CHECKPOINTS):
        if not result.overrides:
            for path in CHECKPOINTS.glob(f"*/*{result.run_id}*"):
                path.unlink()
    outcome = ledger("evaluate", *CELL, "--seed", "0")
    assert outcome.code == 2 and outcome.err.startswith("error: 2 runs of vit_classic 0.1M digits seed 0 match")
    assert sorted(re.findall(r"\n  [0-9a-f]{10}: vit_classic 0.1M digits seed 0, (.*), fp32, ended 20", outcome.err)) == [
        "epochs=3",
        "lr=0.01 epochs=3",
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("evaluate", "--grid", "digits", "--attention", "--seed", "1"), "--grid and --seed exclude"),
        (("evaluate", "--grid", "digits", "--attention", "--lr", "0.1"), "--grid and --lr exclude"),
        (("evaluate", *CELL, "--again"), "--again"),
        (("evaluate", *CELL, "--seed", "7"), "seed 7"),
        (("list", "--epochs", "3"), "--epochs is given without --grid"),
        (("list", "--seeds", "3"), "--seeds is given without --grid"),
        (("report", "--grid", "noise", "--dataset", "digits-noisy"), "run.py study --grid noise --dataset digits-noisy` trains it"),
        (("list", "--model", "classic"), "--model is given without --grid"),
        (("list", "--verify", "--grid", "digits"), "--verify and --grid exclude"),
    ],
)
def test_an_option_that_is_not_used_is_refused(ledger, arguments: tuple[str, ...], said: str) -> None:
    outcome = ledger(*arguments)
    assert outcome.code == 2 and said in outcome.err and "hint:" in outcome.err


# ---------------------------------------------------------------------------------------------------- other precisions


@pytest.fixture
def of_a_cluster(cli, monkeypatch: pytest.MonkeyPatch):
    """A ledger whose one run was trained in bf16, seen from a machine without a GPU."""
    _short(monkeypatch)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    train(RunSpec.of("vit_classic", "small", "digits", precision="bf16"), CHECKPOINTS, device="cpu")
    Path("one.yaml").write_text("datasets: [digits]\nmodels: [vit_classic]\nsizes: [small]\n")
    return cli


def test_a_run_counts_as_done_in_whatever_precision_it_is(of_a_cluster) -> None:
    listed = of_a_cluster("list", "--grid", "one.yaml").out
    assert "1 of 1 runs done" in listed and "to do" not in listed
    dry = of_a_cluster("study", "--grid", "one.yaml", "--dry_run").out
    assert (
        "to do (done in bf16)" in dry
        and "1 runs, 0 already finished" in dry
        and "note: 1 runs are done in bf16; in fp32 they are trained anew" in dry
    )
    assert of_a_cluster("plot", "--grid", "one.yaml").code == of_a_cluster("report", "--grid", "one.yaml").code == 0


def test_an_unfinished_run_of_another_precision_is_seen(of_a_cluster) -> None:
    next(CHECKPOINTS.glob("*/*_result.json")).unlink()
    row = json.loads(of_a_cluster("list", "--grid", "one.yaml", "--json").out)[0]
    assert row["state"] == "unfinished" and next(CHECKPOINTS.glob(f"*/*{row['run_id']}*.log"))
    (CHECKPOINTS / ".state" / row["run_id"]).mkdir(parents=True)
    dry = of_a_cluster("study", "--grid", "one.yaml", "--dry_run").out
    assert "to do (begun in bf16)" in dry and "note: 1 runs are begun in bf16; in fp32 they are trained anew" in dry


def test_a_study_says_that_it_trains_again_what_is_done_in_another_precision(of_a_cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []

    def instead_of_training(_: list, pending: list, *__: object) -> tuple[list, int]:
        trained.extend(pending)
        return [], 130

    monkeypatch.setattr("study.main._train", instead_of_training)
    monkeypatch.setattr("study.main.connect_cluster", lambda *_: None)
    said = of_a_cluster(*STUDY).err
    assert [run.spec.precision for run in trained] == ["fp32"]
    assert "note: 1 runs are done in bf16; in fp32 they are trained anew, --precision bf16 keeps to those" in said
    trained.clear()
    said = of_a_cluster(*STUDY, "--precision", "bf16").err
    assert not trained and "all 1 runs are done already" in said and "note" not in said


def test_a_damaged_checkpoint_does_not_stand_in_the_way_of_another(ledger) -> None:
    for path in CHECKPOINTS.glob("vit_classic/*.safetensors"):
        result = json.loads(path.with_name(f"{path.stem}_result.json").read_text())
        if result["seed"] == 1:
            path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert ledger("evaluate", *CELL, "--seed", "0", "--limit", "8").code == 0
    damaged = ledger("evaluate", *CELL, "--seed", "1")
    assert damaged.code == 2 and "damaged" in damaged.err


@pytest.mark.parametrize(("seconds", "ask", "restarts", "asked"), [
    (700, True, None, True), (500, True, None, False), (700, False, None, False), (700, True, "1", False)])  # fmt: skip
def test_long_work_begins_with_a_question_where_there_is_somebody_to_ask(
    seconds: float, ask: bool, restarts: str | None, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A study whose Ray died starts itself over: at night, nobody answers."""
    if restarts:
        monkeypatch.setenv("DIFFVIT_RESTARTS", restarts)
    questions: list[str] = []
    monkeypatch.setattr(main.click, "confirm", lambda text, **options: questions.append(text))
    monkeypatch.setattr(main, "expected_forecast", lambda *given: SimpleNamespace(makespan=seconds, pending=[]))

    def begin(*given: Any) -> None:
        raise EOFError

    monkeypatch.setattr(main, "watch", begin)
    saving = SimpleNamespace(saving=SimpleNamespace(storage=None), data_root=None)
    options: Any = SimpleNamespace(
        settings=lambda: saving, placement=SimpleNamespace(check_room=lambda cluster: 1), ask=ask, command="run.py study"
    )
    with pytest.raises(UserError if asked else EOFError):
        main._train([], [], options, cast(Any, SimpleNamespace(own=True, nodes=1)), 0.0)
    assert questions == (["start it?"] if asked else [])


def test_a_study_is_judged_once_no_run_is_missing(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    """A look at a part of the runs would have to be paid for, when the rest is there."""
    grid = Grid("some", ("digits",), sizes=("small",), seeds=(0, 1), overrides={"max_steps": 2}, prefix="some_")
    options = StudyOptions(grid, tmp_path, precision="fp32", tracker="wandb", command="uv run run.py study --grid some.yaml --seeds 2")
    *most, last = options.runs()
    for spec in most:
        train(spec, tmp_path, device="cpu")
    looks = tmp_path / "some_report" / "looks.json"
    assert report_results(options, options.runs(), draw=True, judge=True)
    assert "next" not in capsys.readouterr().err and not looks.exists()
    result = train(last, tmp_path, device="cpu")
    assert result is not None
    write_result(RunFiles.of(tmp_path, last, result.run_id), dataclasses.replace(result, notes=[*result.notes, "wandb has failed: no key"]))
    assert report_results(options, options.runs(), draw=True, judge=True)
    said = capsys.readouterr().err
    assert "next     for the page: uv run run.py report --grid some.yaml" in said and "warning: wandb has failed: no key\n" in said
    assert [len(seen) for seen in json.loads(looks.read_text()).values()] == [1]


@pytest.mark.parametrize(("study", "report"), [
    ("python run.py study", "python run.py report"),
    ("uv run run.py study --grid lr --dataset=digits --seeds 3 --storage s3://b --checkpoints /mnt/x --epochs 2",
     "uv run run.py report --grid lr --dataset=digits --checkpoints /mnt/x --epochs 2"),
    ("run.py study --model classic --model=a.py:B", "run.py report --grid digits --model classic --model=a.py:B"),
    ("run.py study --data-root d --grid full --cpus-per-run 1", "run.py report --data-root d --grid full"),
    ("run.py evaluate --grid=lr --again --corruptions --device cpu", "run.py report --grid=lr"),
])  # fmt: skip
def test_the_report_that_is_recommended_is_of_the_same_runs(study: str, report: str) -> None:
    assert of_same_runs(study, "report") == report


def test_the_beginning_of_several_run_ids_chooses_none(ledger) -> None:
    weights = sorted(CHECKPOINTS.glob("*/*.safetensors"))[0]
    run_id = weights.name.split("_")[1]
    twin = f"{run_id[:9]}{'0' if run_id[9] != '0' else '1'}"
    shutil.copy(weights, weights.with_name(weights.name.replace(run_id, twin)))
    outcome = ledger("evaluate", "--run_id", run_id[:9])
    assert outcome.code == 2 and "give more of its run_id" in outcome.err
    assert all(f"  {each}: vit_classic 0.1M digits seed " in outcome.err for each in (run_id, twin))
    assert ledger("evaluate", "--run_id", run_id).code == 0


def test_more_seeds_replace_those_that_were_given() -> None:
    assert with_seeds("python run.py study --seeds 1 --upload true (with the secret in place of ***)", 3) == (
        "python run.py study --upload true --seeds 3 (with the secret in place of ***)"
    )
    assert with_seeds("python run.py study --collect --storage s", 3) == "python run.py study --storage s --seeds 3"


def test_one_run_of_the_same_ledger() -> None:
    given = "uv run run.py evaluate --grid lr --attention --data-root d --limit 3 --checkpoints=/mnt/a"
    assert of_one_run(given, ["attention"]) == "uv run run.py evaluate --attention --data-root d --checkpoints=/mnt/a --run_id ID"


def test_a_stop_says_what_resumes(tmp_path: Path) -> None:
    runs = plan_runs(GRIDS["digits"].runs(), tmp_path, {"digits": "f", "digits-noisy": "f"})
    StateFolder(tmp_path, str(runs[0].run_id)).save(3, {"tensors": {}})
    StateFolder(tmp_path, str(runs[1].run_id)).path.mkdir(parents=True)
    options = StudyOptions(GRIDS["digits"], tmp_path)
    assert main._what_is_kept(options, runs) == "0 of 12 runs are done, 1 begun (they resume from their states), 11 not begun"
    elsewhere = dataclasses.replace(options, saving=dataclasses.replace(options.saving, storage="s3://b"))
    assert main._what_is_kept(elsewhere, runs) == "0 of 12 runs are done; those that have begun resume from their states"
    for name in ("a1_0.1M_digits_training.log", "b2_0.1M_digits_training.log", "b2_0.1M_digits_result.json"):
        (tmp_path / "vit_classic").mkdir(exist_ok=True)
        (tmp_path / "vit_classic" / f"model_{name}").touch()
    said = ledger_text([], tmp_path, None)
    assert said.endswith(f"\nnote: 1 unfinished; `run.py list --grid GRID --checkpoints {tmp_path}` names those of a grid")


@pytest.mark.parametrize("overrides", [{"heads": 8}, {"image_size": 16}, {"patch_size": 4}, {"residual_scale": False}])
def test_a_run_with_another_shape_is_evaluated(overrides: dict, tmp_path: Path) -> None:
    spec = RunSpec.of("vit_differential", "0.1M", "digits", overrides={**overrides, "max_steps": 2})
    result = train(spec, tmp_path, device="cpu")
    assert result is not None
    path = RunFiles.of(tmp_path, spec, result.run_id).weights
    found = evaluate_checkpoint(path, limit=result.test_images, device=torch.device("cpu"))
    assert found["accuracy"] == result.test_accuracy
    (again,) = read_results(tmp_path)
    assert parse_overrides(overrides_text(again.overrides)) == spec.overrides == again.overrides


def test_overrides_are_kept_as_the_types_that_they_take() -> None:
    kept = RunSpec.of("vit_classic", "0.1M", "digits", overrides={"residual_scale": "false", "heads": 8, "lr": 1}).overrides
    assert kept == {"residual_scale": False, "heads": 8, "lr": 1.0} and [type(value) for value in kept.values()] == [bool, int, float]
