"""What the predictions of a run say beside its accuracy, as columns of the run table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from diffvit.errors import UserError
from diffvit.evaluation import balanced_accuracy, majority_share
from diffvit.findings.calibration import calibrate
from study.table import prediction_table

_CALIBRATION = ("ece", "ece_low", "ece_high", "ece_by_chance")

# Shares, but for brier and near_duplicates, a number of test images, of which distinct_accuracy is without. Only the first two are
# there for predictions of older versions.
COLUMNS = ("balanced_accuracy", "majority_answer", *_CALIBRATION, "brier", "near_duplicates", "distinct_accuracy")


def with_predictions(table: pd.DataFrame, checkpoints: Path | None) -> pd.DataFrame:
    """The run table with COLUMNS, computed from each run's predictions; empty where these are missing or damaged.

    A table that has COLUMNS already is returned as it is.

    Args:
        checkpoints: the ledger; None leaves all empty.
    """
    if set(COLUMNS) <= set(table):
        return table
    rows = [_measure(checkpoints, table.iloc[[row]]) if checkpoints else {} for row in range(len(table))]
    return pd.concat([table, pd.DataFrame(rows, table.index, list(COLUMNS), float)], axis=1)


def _measure(checkpoints: Path, run: pd.DataFrame) -> dict[str, Any]:
    """The columns' values for a table of one run."""
    try:
        predictions = prediction_table(checkpoints, run)
        if len(predictions) != run["test_images"].iloc[0]:
            return {}
        labels, predicted = (predictions[name].astype(int).to_numpy() for name in ("label", "predicted"))  # fails on gaps
        found = {"balanced_accuracy": balanced_accuracy(labels, predicted), "majority_answer": majority_share(labels)}
        if "confidence" in predictions:
            confidences, briers = (predictions[name].to_numpy(float) for name in ("confidence", "brier"))
            if ((confidences >= 0) & (confidences <= 1)).all():
                calibration = calibrate((labels == predicted).astype(float), confidences)
                found |= dict(zip(_CALIBRATION, calibration, strict=True)) | {"brier": float(briers.mean())}
        if "near_duplicate" in predictions:
            distinct = predictions["near_duplicate"].astype(int).to_numpy() == 0
            found["near_duplicates"] = int((~distinct).sum())
            if distinct.any():
                found["distinct_accuracy"] = float((labels == predicted)[distinct].mean())
        return found
    except (UserError, KeyError, ValueError, TypeError, OverflowError):  # `list --verify` names what is damaged
        return {}
