"""Synthetic run tables whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from study.table import COLUMNS

PARAMETERS = {"10B": (9_753_956, 9_756_260), "25B": (24_759_396, 24_765_348), "50B": (50_031_716, 50_043_812)}


def study_table(
    level: float = 0.0, trend: float = 0.0, spread: float = 0.01, seeds: int = 3, dataset: str = "CIFAR-100", overrides: str = "",
    seed: int = 0, images: int = 10_000,
) -> pd.DataFrame:  # fmt: skip
    """A run table of both arms at three sizes.

    Args:
        level: the differential arm's log error ratio at the middle size; trend: its change from the smallest to the largest.
        spread: of a run's log error between seeds.
    """
    chance = np.random.default_rng(seed)
    rows = []
    for i, (size, counts) in enumerate(PARAMETERS.items()):
        for run_seed in range(seeds):
            for arm, model in enumerate(("vit_classic", "vit_differential")):
                log_error = math.log(0.5) - 0.17 * math.log(counts[arm] / 2.4e7) + arm * (level + trend * (i - 1) / 2)
                error = math.exp(log_error + spread * chance.standard_normal())
                rows.append({
                    "run_id": f"{dataset}{overrides}{size}{run_seed}{arm}", "status": "done", "model": model, "size": size, "dataset": dataset,
                    "seed": run_seed, "overrides": overrides, "parameters": counts[arm], "forward_flops": 2300 * counts[arm] * (1 + 0.17 * arm),
                    "seconds": counts[arm] / 1e4, "steps": 4400, "test_accuracy": 1 - error, "test_loss": 4 * error, "test_images": images,
                    "flags": "", "notes": "", "precision": "bf16", "device_name": "a GPU", "fingerprint": "f", "git_commit": "c", "torch": "2",
                    "diffvit": "0", "attention": "sdpa",
                })  # fmt: skip
    return pd.DataFrame(rows, columns=list(COLUMNS))
