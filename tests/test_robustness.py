"""A finished model under corruptions: the same images for every model, and sums that add up."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from diffvit.data.corruptions import CORRUPTIONS
from diffvit.dataset import ImageSet, load
from diffvit.evaluation import evaluate_checkpoint
from diffvit.findings.kept import add_evaluation, findings_of, outdated, read_evaluations
from diffvit.findings.robustness import CONDITIONS, corrupted_test_set, evaluate_corruptions, right_answers, summarise
from diffvit.ledger.files import RunFiles, files_of_weights
from diffvit.ledger.spec import RunSpec
from diffvit.train import train
from study.report.analysis import analyse
from study.table import run_table

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learnt a little."""
    folder = tmp_path_factory.mktemp("run")
    spec = RunSpec.of("vit_classic", "0.1M", "digits", overrides={"max_steps": 80, "warmup_steps": 10})
    return RunFiles.of(folder, spec, train(spec, folder, device="cpu").run_id).weights


@pytest.fixture(scope="module")
def findings(checkpoint: Path) -> dict:
    return evaluate_corruptions(checkpoint, device=CPU)


def test_every_condition_is_there_once(findings: dict) -> None:
    found = [(condition["corruption"], condition["severity"]) for condition in findings["conditions"]]
    assert found == list(CONDITIONS) and len(set(found)) == 28
    assert findings["images"] == 359 and findings["warnings"] == []
    assert json.loads(json.dumps(findings)) == findings


def test_clean_is_what_evaluate_says(checkpoint: Path, findings: dict) -> None:
    report = evaluate_checkpoint(checkpoint, device=CPU)
    clean = findings["conditions"][0]
    assert (clean["accuracy"], clean["loss"]) == (report["accuracy"], report["loss"])
    assert clean["accuracy"] > 0.4  # it has learnt something that noise could spoil


def test_right_answers_are_those_counted(findings: dict) -> None:
    for condition in findings["conditions"]:
        right = right_answers(condition, findings["images"])
        assert right.dtype == bool and right.shape == (359,)
        assert right.mean() == pytest.approx(condition["accuracy"])


def test_noise_costs_accuracy(findings: dict) -> None:
    losses = {(condition["corruption"], condition["severity"]): condition["loss"] for condition in findings["conditions"]}
    for corruption in ("gaussian", "impulse", "blur"):
        assert losses[corruption, 5] > losses["clean", 0]
    assert min(losses["clutter-noise", 0], losses["clutter-images", 0]) > losses["clean", 0] + 0.3


def test_a_limit_and_a_batch_size_leave_the_images_as_they_are(checkpoint: Path, findings: dict) -> None:
    some = evaluate_corruptions(checkpoint, device=CPU, limit=100, batch_size=17)
    assert some["images"] == 100
    for all_, first in zip(findings["conditions"], some["conditions"], strict=True):
        assert np.array_equal(right_answers(all_, 359)[:100], right_answers(first, 100))
    data = load("digits")
    for condition in CONDITIONS:
        whole, part = corrupted_test_set(data, *condition), corrupted_test_set(data, *condition, limit=100)
        assert torch.equal(whole.pixels[:100], part.pixels) and torch.equal(whole.labels, data.test.labels) and len(part) == 100


def test_each_condition_and_each_block_has_its_own_noise() -> None:
    data = load("digits")
    flat = ImageSet(torch.full((128, 1, 8, 8), 128, dtype=torch.uint8), torch.zeros(128, dtype=torch.int64))
    import dataclasses

    grey = dataclasses.replace(data, test=flat)
    noisy = {severity: corrupted_test_set(grey, "impulse", severity).pixels != 128 for severity in (4, 5)}
    assert not torch.equal(noisy[5][:64], noisy[5][64:])
    # The same draws would strike at severity 5 wherever they strike at 4.
    assert (noisy[4] & ~noisy[5]).any()


def test_data_of_another_kind_are_warned_of(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffvit import evaluation

    monkeypatch.setattr(evaluation, "load", lambda name, root: load("digits-noisy"))
    lines: list[str] = []
    report = evaluate_corruptions(checkpoint, device=CPU, limit=3, on_progress=lines.append)
    assert "not those that the model was trained on" in report["warnings"][0]
    assert len(lines) == 28 and lines[3].startswith("4/28  gaussian 3: accuracy ")


def test_findings_of_another_version_are_kept_apart_and_found_anew(checkpoint: Path, findings: dict) -> None:
    files = files_of_weights(checkpoint)
    add_evaluation(files, "corruptions", {**findings, "version": findings["version"] - 1, "conditions": []})
    assert read_evaluations(files) == {} and outdated(files) == ["corruptions"]
    left_out = analyse(run_table(files.checkpoints), files.checkpoints).left_out
    assert any("of another version of diffvit, evaluate again" in phrase for phrase in left_out)
    assert findings_of(files, ["corruptions"], device=CPU) == {"corruptions": findings}
    assert read_evaluations(files) == {"corruptions": findings} and outdated(files) == []
    files.evaluations.unlink()


def test_the_summary_by_hand() -> None:
    conditions = [{"corruption": c, "severity": s, "accuracy": 0.9 - 0.1 * s, "loss": 1.0 + s, "right": ""} for c, s in CONDITIONS]
    conditions[1]["accuracy"] = 0.3  # gaussian 1, in place of 0.8
    conditions[-1]["accuracy"] = 0.1
    rows = {row["corruption"]: row for row in summarise({"conditions": conditions})}
    assert list(rows) == ["clean", *CORRUPTIONS, "mean", "clutter-noise", "clutter-images"]
    assert rows["shot"]["error"] == pytest.approx(0.4) and rows["shot"]["loss"] == pytest.approx(4.0)
    assert rows["gaussian"]["error"] == pytest.approx(0.5)
    assert rows["mean"]["error"] == pytest.approx(0.42) and rows["mean"]["relative_error"] == pytest.approx(4.2)
    assert rows["clutter-images"]["relative_error"] == pytest.approx(9.0)
    conditions[0]["accuracy"] = 1.0
    assert {row["relative_error"] for row in summarise({"conditions": conditions})} == {None}
