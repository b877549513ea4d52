"""The output of `run.py evaluate`: a model's accuracy, and findings about it."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

from diffvit.evaluation import evaluate_checkpoint
from diffvit.findings.attention import summary_lines as attention_lines
from diffvit.findings.kept import findings_of, read_evaluations
from diffvit.findings.robustness import summarise
from diffvit.findings.robustness import summary_lines as corruption_lines
from diffvit.ledger.files import files_of_weights
from diffvit.ledger.results import read_result
from diffvit.ledger.spec import overrides_text
from diffvit.ledger.weights import read_header
from study.text import clock, columns, put, runs_table, say, short_model, warn


def print_evaluation(path: Path, json_to: Path | None, **settings: Any) -> None:
    """Accuracy and loss of a checkpoint, in all and per class. Arguments as evaluate_checkpoint takes them."""
    report = evaluate_checkpoint(path, **settings)
    for warning in report["warnings"]:
        warn(warning)
    put(lambda: "\n".join([str(path), *_evaluation_lines(report)]), lambda: report, json_to)


def print_findings(
    paths: list[Path], kinds: list[str], json_to: Path | None, *, again: bool = False, limit: int | None = None, **settings: Any
) -> None:
    """Findings about checkpoints as JSON, or as text: all of a single one, a line each of several. Arguments as findings_of takes them."""
    all_findings: dict[str, Any] = {}
    took: list[float] = []
    known = 0
    for number, path in enumerate(paths, start=1):
        left = f", about {clock(statistics.fmean(took) * (len(paths) - number + 1))} left" if took else ""
        kept = {} if again or limit is not None else read_evaluations(files_of_weights(path))
        if set(kinds) <= set(kept):
            known += 1
            findings = {kind: kept[kind] for kind in kinds}
        else:
            say(f"{number} of {len(paths)}: {_title(path)}{left}")
            begun = time.monotonic()
            findings = findings_of(files_of_weights(path), kinds, again=again, limit=limit, **settings)
            took.append(time.monotonic() - begun)
        all_findings[str(path)] = findings
        for found in findings.values():
            for warning in found["warnings"]:
                warn(warning)
    if known:
        say(f"{known} of {len(paths)} were evaluated before; --again evaluates them anew")
    put(lambda: _findings_text(all_findings), lambda: all_findings, json_to)


def _title(path: Path) -> str:
    """What a run is called while it is evaluated."""
    facts, result = read_header(path), read_result(files_of_weights(path).result)
    overrides = overrides_text(result.overrides) if result else ""
    return f"{facts['model']} {facts['size']} {facts['dataset']} seed {facts['seed']} {overrides}".rstrip()


def _findings_text(all_findings: dict[str, Any]) -> str:
    if len(all_findings) > 1:
        return _findings_table(all_findings)
    ((path, findings),) = all_findings.items()
    of_kind = {"corruptions": corruption_lines, "attention": attention_lines}
    return "\n".join([path, *(line for kind, lines in of_kind.items() if kind in findings for line in lines(findings[kind]))])


def _findings_table(all_findings: dict[str, Any]) -> str:
    """A line a run: its errors, and where it looks."""
    header = ("model", "size", "data set", "seed", "run_id", *_FOUND, "overrides")
    rows = []
    for path, findings in all_findings.items():
        facts, result = read_header(Path(path)), read_result(files_of_weights(Path(path)).result)
        numbers = [""] * len(_FOUND)
        if "corruptions" in findings:
            error = {row["corruption"]: row["error"] for row in summarise(findings["corruptions"])}
            shown = (error["clean"], error["mean"], (error["clutter-noise"] + error["clutter-images"]) / 2)
            numbers[:3] = [f"{100 * each:.1f}" for each in shown]
        if "attention" in findings:
            layers = findings["attention"]["layers"]
            entropy = statistics.fmean(layer["entropy"] for layer in layers)
            share = statistics.fmean(layer["signal_share"]["noise"] for layer in layers)
            numbers[3:] = [f"{entropy:.2f}", f"{100 * share:.0f}"]
        names = (short_model(facts["model"]), facts["size"], facts["dataset"], str(facts["seed"]), facts["run_id"][:_SHORT])
        rows.append((*names, *numbers, overrides_text(result.overrides) if result else ""))
    kinds = [kind for kind in _MEANING if any(kind in findings for findings in all_findings.values())]
    table = runs_table(header, rows, numbers=_FOUND, shared=("data set", "seed", "overrides"))
    return "\n".join([*(_MEANING[kind] for kind in kinds), table])


# So many characters of a run_id find its run.
_SHORT = 6
_FOUND = ("clean", "corr.", "clut.", "ent.", "obj")
_MEANING = {
    "corruptions": "clean, corr., clut.: errors in % on test images as they are, under five corruptions (mean), and before clutter (mean)",
    "attention": "ent.: entropy of attention in nats, obj: its share in % on the object that stands before noise; means over layers",
}


def _evaluation_lines(report: dict[str, Any]) -> list[str]:
    classes = [row for row in report["classes"] if row["images"]]
    cells = [(f"  {row['class']}", f"{100 * row['accuracy']:.2f} %", f"of {row['images']}", f"loss {row['loss']:.4f}") for row in classes]
    return [
        f"test accuracy  {100 * report['accuracy']:.2f} % of {report['images']} images",
        f"balanced       {100 * report['balanced_accuracy']:.2f} % (majority answer: {100 * report['majority_answer']:.2f} %)",
        f"test loss      {report['loss']:.4f}",
        *([columns(cells, right=(1, 2))] if cells else []),
    ]
