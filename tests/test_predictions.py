"""What predictions say beside accuracy: balance and calibration, in the run table and on the page."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tables import study_table

from diffvit.data.batches import Prepare
from diffvit.data.near_duplicates import LIST, digest, near_duplicates
from diffvit.dataset import ImageSet
from diffvit.evaluation import balanced_accuracy, evaluate, majority_share
from diffvit.findings.calibration import calibrate, calibration_error
from diffvit.ledger.spec import RunSpec
from diffvit.train import train
from study.predictions import COLUMNS, with_predictions
from study.report.analysis import analyse
from study.report.document import to_markdown
from study.report.predictions import predictions_section
from study.table import files_of, run_table


def test_a_constant_answer_is_balanced_to_one_in_so_many_classes() -> None:
    labels = np.repeat([0, 1, 2, 3], [48, 30, 31, 23])  # BACH's test images
    assert majority_share(labels) == pytest.approx(48 / 132)
    assert balanced_accuracy(labels, np.zeros(132)) == pytest.approx(0.25)
    assert balanced_accuracy(labels, np.where(labels < 2, labels, 9)) == pytest.approx(0.5)


def test_confidences_and_brier_scores_are_those_of_the_probabilities() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 3.0, 1.0]])
    model = torch.nn.Linear(1, 3)
    model.forward = lambda x: logits  # type: ignore[method-assign]
    images = ImageSet(torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 2]))
    found = pd.read_csv(io.StringIO(evaluate(model, images, prepare=Prepare(2, [0.0], [1.0]), batch_size=2).to_csv()))
    shares = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(1, keepdims=True)
    assert found["predicted"].tolist() == [0, 1]
    np.testing.assert_allclose(found["confidence"], shares.max(1), rtol=1e-6)
    np.testing.assert_allclose(found["probability"], [shares[0, 0], shares[1, 2]], rtol=1e-6)
    np.testing.assert_allclose(found["brier"], ((shares - np.eye(3)[[0, 2]]) ** 2).sum(1), rtol=1e-6)


def test_the_calibration_error_by_hand() -> None:
    # Two bins: of four answers at 0.9 two are right, of two at 0.5 one is.
    right, confidences = np.array([1.0, 1, 0, 0, 1, 0]), np.array([0.9, 0.9, 0.9, 0.9, 0.5, 0.5])
    assert calibration_error(right, confidences) == pytest.approx((4 * 0.4 + 2 * 0.0) / 6)
    assert calibration_error(np.ones(3), np.ones(3)) == 0.0


@pytest.mark.parametrize(("gap", "images"), [(0.0, 132), (0.0, 1000), (0.2, 132)])
def test_the_calibration_interval_covers_the_truth(gap: float, images: int) -> None:
    # All gaps have one sign and no bin's lies across 0, so that the true error is the gap itself.
    chance = np.random.default_rng(0)
    missed, studies = 0, 80
    for _ in range(studies):
        confidences = chance.uniform(0.3, 0.95, images)
        found = calibrate((chance.random(images) < confidences - gap).astype(float), confidences)
        missed += not found.low <= gap <= found.high
    assert missed <= 9  # of 80 at 5 % more than 9 are missed in 1 % of worlds; the percentile interval misses all where the gap is 0


def test_an_ended_run_has_all_columns_and_an_older_one_the_balanced_accuracy(tmp_path: Path) -> None:
    spec = RunSpec.of("vit_classic", "0.1M", "digits", overrides={"max_steps": 2})
    train(spec, tmp_path, device="cpu")
    runs = run_table(tmp_path)
    table = with_predictions(runs, tmp_path)
    assert table[list(COLUMNS)].notna().all(axis=None) and table["ece_low"][0] <= table["ece_high"][0]
    path = files_of(tmp_path, next(table.itertuples())).predictions
    old = pd.read_csv(path).drop(columns=["confidence", "brier", "near_duplicate"])
    old.to_csv(path, index=False)
    older = with_predictions(runs, tmp_path).iloc[0]
    assert older["balanced_accuracy"] == table["balanced_accuracy"][0] and older[["ece", "brier"]].isna().all()
    for damaged in (old.assign(predicted=old["predicted"].where(old.index > 0)), old[1:]):  # a gap, a row that is gone
        damaged.to_csv(path, index=False)
        assert with_predictions(runs, tmp_path)[list(COLUMNS)].isna().all(axis=None)
    path.unlink()
    assert with_predictions(runs, tmp_path)[list(COLUMNS)].isna().all(axis=None)
    assert with_predictions(table, tmp_path) is table  # a study's end hands it on, and reads no file twice


def test_near_duplicates_are_known_by_their_pixels_and_left_out_of_the_second_error(tmp_path: Path, monkeypatch) -> None:
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert not near_duplicates(pixels).any() and not near_duplicates(pixels[..., :8]).any()
    monkeypatch.setattr("diffvit.data.near_duplicates._listed", lambda: frozenset([digest(pixels[2])]))
    assert near_duplicates(pixels[[3, 2, 1]]).tolist() == [False, True, False]  # whatever the order
    spec = RunSpec.of("vit_classic", "0.1M", "digits", overrides={"max_steps": 2})
    train(spec, tmp_path, device="cpu")
    path = files_of(tmp_path, next(run_table(tmp_path).itertuples())).predictions
    answers = pd.read_csv(path)
    answers["near_duplicate"] = (answers["label"] == answers["predicted"]).astype(int)
    answers.to_csv(path, index=False)
    table = with_predictions(run_table(tmp_path), tmp_path).iloc[0]
    assert table["near_duplicates"] == answers["near_duplicate"].sum() > 0 and table["distinct_accuracy"] == 0


def test_the_list_has_as_many_images_as_are_said() -> None:
    digests = LIST.read_text().split()
    assert len(digests) == len(set(digests)) == 823 and {len(each) for each in digests} == {12} and digests == sorted(digests)


def _section(table: pd.DataFrame, **columns: float) -> str:
    analysis = analyse(table, None)
    for part in analysis.subjects:
        part.table[list(columns)] = list(columns.values())
    return to_markdown(predictions_section(analysis), Path())


MEASURED = {
    "majority_answer": 48 / 132,
    "near_duplicates": 0,
    "distinct_accuracy": 0.3,
    "ece": 0.1,
    "ece_low": 0.05,
    "ece_high": 0.15,
    "ece_by_chance": 0.04,
    "brier": 0.6,
}


def test_what_learnt_nothing_is_said_to() -> None:
    bach = study_table(dataset="BACH", images=132, spread=0.0)
    text = _section(bach, test_accuracy=0.36, balanced_accuracy=0.25, **MEASURED)
    assert "learnt nothing: always giving the commonest class has 36.4 % accuracy" in text and "Classic ViT 9.75 M (3 runs)" in text
    assert "learnt nothing that counts: a frozen, randomly initialised ViT-S/16" in text
    better = _section(bach, test_accuracy=0.7, balanced_accuracy=0.65, **MEASURED)
    assert "learnt nothing that counts" not in better and "would have learnt nothing" in better
    assert "| 10.0 % (5.0 to 15.0) | 4.0 % | 0.600 |" in better


def test_accuracies_beyond_the_plausible_are_doubted() -> None:
    table = study_table()
    assert "35 to 50 % in the literature" in _section(table, balanced_accuracy=0.5, **MEASURED)
    assert "above 60 %" not in _section(table, balanced_accuracy=0.5, **MEASURED)
    assert "above 60 % accuracy, which this protocol should not reach" in _section(table, test_accuracy=0.61, **MEASURED)
    twice = _section(table, test_accuracy=0.5, balanced_accuracy=0.5, **{**MEASURED, "near_duplicates": 823, "distinct_accuracy": 0.45})
    assert "| 50.0 % | 50.0 % | 50.0 % | 55.0 % |" in twice and "823 of the test images used here have near-duplicates" in twice
    assert (
        "judged 891 by eye" in _section(table) and "do not say which" in _section(table) and _section(study_table(dataset="digits")) == "\n"
    )
