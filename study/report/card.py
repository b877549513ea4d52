"""A repository's model card: what the hub shows of it, written from its runs' results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from diffvit.dataset import hub_name
from diffvit.ledger.results import Result
from diffvit.ledger.spec import overrides_title
from diffvit.protocol import model_title
from diffvit.user_models import is_user_model
from study.report.document import Block, Code, Figures, Heading, Paragraph, Table, to_markdown
from study.table import other_tokens

# Says that a card is ours to write anew.
MARK = "<!-- written by diffvit; without this line it is left alone -->"


def card_text(repository: str, table: pd.DataFrame, results: Sequence[Result], figures: Sequence[str]) -> str:
    """README.md of a repository, with the test accuracies in its metadata.

    Args:
        table: the run table of its results.
        results: all of them, in any order.
        figures: names of the pictures that the repository has under figures/.
    """
    from huggingface_hub import ModelCardData

    done = table[table["status"] == "done"]
    datasets = sorted({name for dataset in table["dataset"] if (name := hub_name(str(dataset)))})
    metadata = ModelCardData(
        library_name="diffvit", pipeline_tag="image-classification", tags=["vision-transformer", "differential-attention", "scaling-laws"],
        datasets=datasets or None, ignore_metadata_errors=True,
    )  # fmt: skip
    header = {**metadata.to_dict(), "model-index": _model_index(done)} if len(done) else metadata.to_dict()
    page = to_markdown(_page(repository, table, done, results, figures), Path())
    return f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---\n{MARK}\n\n{page}"


def _model_index(done: pd.DataFrame) -> list[dict[str, Any]]:
    """Test accuracy and loss of every run, in the hub's format."""
    from huggingface_hub.repocard_data import EvalResult, eval_results_to_model_index

    index: list[dict[str, Any]] = []
    for run in done.itertuples():
        place = {
            "task_type": "image-classification", "dataset_type": hub_name(run.dataset) or run.dataset, "dataset_name": run.dataset,
            "dataset_split": "test",
        }  # fmt: skip
        metrics = [
            EvalResult(**place, metric_type="accuracy", metric_name="Test accuracy", metric_value=float(run.test_accuracy)),
            EvalResult(**place, metric_type="loss", metric_name="Test loss", metric_value=float(run.test_loss)),
        ]
        under = f", {title}" if (title := overrides_title(run.dataset, run.overrides or "")) else ""
        index += eval_results_to_model_index(f"{run.model} {run.size} {run.dataset} seed {run.seed}{under} ({run.run_id})", metrics)
    return index


def _page(repository: str, table: pd.DataFrame, done: pd.DataFrame, results: Sequence[Result], figures: Sequence[str]) -> list[Block]:
    blocks: list[Block] = [
        Heading(repository.partition("/")[2], 1),
        Paragraph(
            "Differential Vision Transformers ([differential attention](https://arxiv.org/abs/2410.05258)) and classic ones, trained by "
            "diffvit under one protocol: they differ in attention only. For each run there are weights, the log with one line a step, the "
            "predictions on the test set and the result."
        ),
        Heading("Runs"),
        *(Paragraph(f"**{phrase}**.") for phrase in other_tokens(table)),
        _runs(table),
    ]
    if figures:
        blocks += [Figures([(Path("figures") / name, name.removesuffix("_scaling_overlay.png")) for name in figures])]
    if len(done):
        run = done.iloc[0]
        own = is_user_model(str(run["model"]))
        call = f'model = from_pretrained("{repository}", model="{run["model"]}", size="{run["size"]}", dataset="{run["dataset"]}"'
        executed = "this model's code comes with them and is executed, so look at it first." if own else "loading them executes nothing."
        blocks += [
            Heading("Load a model"),
            Code(f"from diffvit import from_pretrained\n{call}{', trust=True' if own else ''})"),
            Paragraph(
                "`model.facts` has the classes, and the mean and standard deviation that pixels between 0 and 1 are normalised with. "
                f"Weights are safetensors; {executed}"
            ),
        ]
    return [*blocks, Heading("Protocol"), *_protocols(results)]


def _runs(table: pd.DataFrame) -> Table:
    rows = [
        (
            model_title(run.model), run.dataset, run.size, f"{run.parameters:,}", str(run.seed), run.overrides,
            *((f"{100 * run.test_accuracy:.2f} %", f"{run.test_loss:.4f}") if run.status == "done" else ("diverged", "")),
            f"{run.steps:,}", f"`{run.run_id}`",
        )
        for run in table.itertuples()
    ]  # fmt: skip
    header = ("model", "data set", "size", "parameters", "seed", "overrides", "test accuracy", "test loss", "steps", "run")
    return Table(header, rows, left=3)


def _protocols(results: Sequence[Result]) -> list[Block]:
    """The values that the runs of a data set share, a column a data set; those that differ between its runs are told as ranges."""
    protocols: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        protocols.setdefault(result.dataset, []).append(result.identity["protocol"])
    datasets = sorted(protocols)
    names = list(dict.fromkeys(name for dataset in datasets for protocol in protocols[dataset] for name in protocol))

    def value(dataset: str, name: str) -> str:
        values = {str(protocol[name]) for protocol in protocols[dataset] if name in protocol}
        return ", ".join(sorted(values, key=lambda text: (len(text), text)))

    return [Table(("", *datasets), [(name, *(value(dataset, name) for dataset in datasets)) for name in names])]
