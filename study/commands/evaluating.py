"""The output of `run.py evaluate`: a model's accuracy, and findings about it."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

from diffvit.evaluation import evaluate_checkpoint
from diffvit.findings.attention import summary_lines as attention_lines
from diffvit.findings.kept import findings_of
from diffvit.findings.robustness import summary_lines as corruption_lines
from diffvit.ledger.files import files_of_weights
from study.text import STDOUT, clock, put, put_json, say, show, warn

# Seconds. What the ledger has already is read, and says nothing of the others.
_MORE_THAN_READING = 0.5


def print_evaluation(path: Path, json_to: Path | None, **settings: Any) -> None:
    """Accuracy and loss of a checkpoint, in all and per class. Arguments as evaluate_checkpoint takes them."""
    report = evaluate_checkpoint(path, **settings)
    for warning in report["warnings"]:
        warn(warning)
    put(lambda: "\n".join([str(path), *_evaluation_lines(report)]), lambda: report, json_to)


def print_findings(paths: list[Path], kinds: list[str], json_to: Path | None, **settings: Any) -> None:
    """Findings about checkpoints, each as lines or all as JSON. Arguments as findings_of takes them."""
    all_findings: dict[str, Any] = {}
    took: list[float] = []
    for number, path in enumerate(paths, start=1):
        left = f", about {clock(statistics.fmean(took) * (len(paths) - number + 1))} left" if took else ""
        say(f"{number} of {len(paths)}: {path}{left}")
        begun = time.monotonic()
        findings = all_findings[str(path)] = findings_of(files_of_weights(path), kinds, **settings)
        if (seconds := time.monotonic() - begun) > _MORE_THAN_READING:
            took.append(seconds)
        for found in findings.values():
            for warning in found["warnings"]:
                warn(warning)
        if json_to != STDOUT:
            lines = {"corruptions": corruption_lines, "attention": attention_lines}
            show("\n".join([str(path), *(line for kind in lines if kind in findings for line in lines[kind](findings[kind]))]))
    if json_to:
        put_json(all_findings, json_to)


def _evaluation_lines(report: dict[str, Any]) -> list[str]:
    width = max(len(row["class"]) for row in report["classes"])
    return [
        f"test accuracy  {100 * report['accuracy']:.2f} % of {report['images']} images",
        f"balanced       {100 * report['balanced_accuracy']:.2f} % (majority answer: {100 * report['majority_answer']:.2f} %)",
        f"test loss      {report['loss']:.4f}",
        *(f"  {row['class']:<{width}}  {100 * row['accuracy']:6.2f} % of {row['images']:4d}  loss {row['loss']:.4f}"
          for row in report["classes"] if row["images"]),
    ]  # fmt: skip
