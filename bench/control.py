"""Real runs that do not differ: ten seeds of one architecture on digits, split five against five, and with an attention head masked."""

from __future__ import annotations

import concurrent.futures
import itertools
import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd

from diffvit.ledger.spec import RunSpec
from study.report import scaling, verdict
from study.report.scaling import Cells, Estimate

CONTRASTS: dict[str, Callable[[Cells], Estimate]] = {"level": scaling.level, "trend": scaling.trend}

CONTROL_SIZES = ("0.1M", "0.2M", "0.4M")


def control(folder: Path, seeds: int = 10) -> dict[str, Any]:
    """Ten seeds of the classic ViT on digits, split five against five in all ways; and the same runs with one attention head masked.

    Args:
        folder: a ledger, in which runs that are done are not done again.
    """
    from study.table import run_table

    specs = [RunSpec.of("vit_classic", size, "digits", seed) for size in CONTROL_SIZES for seed in range(seeds)]
    with concurrent.futures.ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(_train_one, spec, folder) for spec in reversed(specs)]  # longest first
        for number, _ in enumerate(concurrent.futures.as_completed(jobs), start=1):
            click.echo(f"{number} of {len(jobs)} runs", err=True)
        for job in jobs:
            job.result()
    table = run_table(folder, specs)
    logs, masked = [], []
    for size in CONTROL_SIZES:
        of_size = table[table["size"] == size].sort_values("seed")
        logs.append(scaling.log_error(of_size["test_accuracy"], of_size["test_images"]).to_numpy())
        accuracies = pd.Series([_accuracy_without_a_head(folder, run) for run in of_size.itertuples()], index=of_size.index)
        masked.append(scaling.log_error(accuracies, of_size["test_images"]).to_numpy())
    parameters = [int(table[table["size"] == size]["parameters"].iloc[0]) for size in CONTROL_SIZES]
    runs = {"parameters": parameters, "log_errors": _listed(logs), "log_errors_masked": _listed(masked)}
    return {"runs": len(specs), **split_all_ways(parameters, logs, masked), **runs}


def split_all_ways(parameters: Sequence[int], logs: list[np.ndarray], masked: list[np.ndarray]) -> dict[str, Any]:
    """How often two halves of the same runs are found different, and half of them from the crippled other half, in percent.

    "by the rule" is what a report of these two questions would say, Holm's correction included; "level" and "trend" are each alone.

    Args:
        parameters: of the sizes. logs, masked: log errors of each size, intact and crippled. [seeds]
    """
    x = np.log([parameters, parameters])
    seeds = range(len(logs[0]))
    halves = [list(half) for half in itertools.combinations(seeds, len(seeds) // 2) if 0 in half]
    different = dict.fromkeys([*CONTRASTS, "by the rule"], 0)
    crippled = 0
    for half in halves:
        rest = [seed for seed in seeds if seed not in half]
        same = Cells(x, [np.stack([log[half], log[rest]]) for log in logs])
        estimates = {name: contrast(same) for name, contrast in CONTRASTS.items()}
        for name, estimate in estimates.items():
            different[name] += estimate.p < 0.05
        _, words = verdict.verdicts([{name: estimate} for name, estimate in estimates.items()])
        different["by the rule"] += int(np.isin(words, ["better", "worse"]).any())
        worse = Cells(x, [np.stack([log[half], other[rest]]) for log, other in zip(logs, masked, strict=True)])
        crippled += scaling.level(worse).p < 0.05
    return {
        "splits": len(halves),
        "found_different": {name: 100 * count / len(halves) for name, count in different.items()},
        "crippled_found": 100 * crippled / len(halves),
        "crippled_error_ratio": float(np.exp(np.mean([other - log for log, other in zip(logs, masked, strict=True)]))),
        "spread": float(np.sqrt(np.mean([log.var(ddof=1) for log in logs]))),
    }


def _train_one(spec: RunSpec, folder: Path) -> None:
    import torch

    from diffvit.train import train

    torch.set_num_threads(1)
    train(spec, folder, device="cpu")


def _accuracy_without_a_head(folder: Path, run: Any) -> float:
    """Test accuracy of a trained model when the first head of its first layer is not heard."""
    import torch

    from diffvit.data.batches import Prepare
    from diffvit.dataset import load
    from diffvit.evaluation import evaluate
    from diffvit.ledger.weights import load_weights
    from study.table import files_of

    model, facts = load_weights(files_of(folder, run).weights)
    attention: Any = model.blocks[0].attn
    with torch.no_grad():
        attention.proj.weight[:, : attention.proj.in_features // attention.heads] = 0
    prepare = Prepare(facts["protocol"].image_size, facts["mean"], facts["std"])
    return evaluate(model, load("digits").test, prepare=prepare, batch_size=64).accuracy


def _listed(logs: list[np.ndarray]) -> list[list[float]]:
    return [log.round(6).tolist() for log in logs]
