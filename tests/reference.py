"""Writes docs/reference.md from the code: `python -m tests.reference`. A test fails where the file is not what this gives."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import click

import run as command_line
from diffvit.ledger import files
from diffvit.ledger.log import Step
from diffvit.ledger.spec import overrides_text
from diffvit.protocol import ARMS, MODELS, OVERRIDES, PROTOCOLS, Protocol
from study import predictions, table
from study.commands.command import COMMAND_HEADINGS, OPTION_HEADINGS, StrictCommand
from study.cost.devices import SHEETS
from study.grid import _OF_A_DATASET, GRIDS, Grid

PATH = Path(__file__).resolve().parents[1] / "docs/reference.md"


def reference() -> str:
    """The document's text."""
    lines = [
        "# Reference", "",
        "Generated from the code by `python -m tests.reference`; a test fails where this file is stale.", "",
        "[Commands](#commands), [grids](#grids), [overrides](#overrides), [protocols](#protocols), [files](#files), [GPUs](#gpus).", "",
        "## Commands", "",
        "Options may be written with `-` or with `_`. Exit codes: 0 done, 1 a run, a disk or a storage failed, 2 bad input, 130, 143 and 129", "where Ctrl-C, SIGTERM or a closed terminal ended it.", "",
    ]  # fmt: skip
    for heading in COMMAND_HEADINGS:
        for name, command in command_line.cli.commands.items():
            if isinstance(command, StrictCommand) and command.heading == heading:
                lines += _command(name, command)
    return "\n".join([*lines, *_grids(), *_overrides(), *_protocols(), *_files(), *_gpus()])


def _command(name: str, command: StrictCommand) -> Iterator[str]:
    context = click.Context(command, info_name=f"run.py {name}")
    yield from (
        f"### {' '.join([name, *(param.human_readable_name for param in command.params if isinstance(param, click.Argument))])}",
        "",
    )
    for paragraph in (command.help or "").split("\n\n"):
        yield from (" ".join(paragraph.split()), "")
    yield from (f"    uv run run.py {line}\n        {what}" for line, what in command.examples)
    yield ""
    records = [(getattr(param, "heading", ""), param.get_help_record(context)) for param in command.params]
    rows = []
    for heading in OPTION_HEADINGS:
        of_heading = [(f"`{record[0]}`", re.sub(r"  +", " ", record[1])) for its, record in records if record and its == heading]
        rows += [(heading if number == 0 else "", *cells) for number, cells in enumerate(of_heading)]
    if rows:
        yield from _table(("", "option", ""), rows)


def _grids() -> Iterator[str]:
    yield from (
        "## Grids",
        "",
        "`--grid NAME`; `--dataset` makes those for one data set for another. [grids.md](grids.md) has the grid file.",
        "",
    )
    rows = []
    for name, grid in GRIDS.items():
        models = ", ".join(
            "both" if grid.trained == ARMS else "all" if set(grid.trained) == set(MODELS) else model for model in grid.trained[:1]
        )
        data = "one, digits by default" if name in _OF_A_DATASET else ", ".join(grid.datasets)
        rows.append((f"`{name}`", models, data, _seeds(grid), _conditions(grid), str(len(grid.runs()))))
    yield from _table(("grid", "architectures", "data sets", "seeds", "each run under", "runs"), rows)


def _seeds(grid: Grid) -> str:
    of = grid.seeds
    return "; ".join(f"{data}: {len(seeds)}" for data, seeds in of.items()) if isinstance(of, Mapping) else str(len(of))


def _conditions(grid: Grid) -> str:
    of: Mapping[str, Sequence[Mapping]] = grid.conditions if isinstance(grid.conditions, Mapping) else {"": grid.conditions}
    said = []
    for data, conditions in of.items():
        texts = [overrides_text({**grid.overrides, **condition}) or "the protocol" for condition in conditions]
        listed = "; ".join(texts) if len(texts) <= 4 else f"{len(texts)} conditions, such as {texts[-1]}"
        said.append(f"{data}: {listed}" if data else listed)
    return "; ".join(said)


def _overrides() -> Iterator[str]:
    yield from (
        "## Overrides",
        "",
        "Protocol values that `train` takes as options, and a grid file under `overrides` and `conditions`.",
        "",
    )
    options = {name for param in command_line.cli.commands["train"].params for name in [str(param.name)]}
    rows = []
    for name, (kind, low, high, closed) in OVERRIDES.items():
        least = f"{'at least' if closed else 'above'} {low:g}" + (f", at most {high:g}" if high is not None else "")
        number = "a whole number" if kind is int else "a number"
        where = f"`--{name}`" if name in options else "in a grid file only"
        rows.append((f"`{name}`", "true or false" if kind is bool else f"{number}, {least}", where))
    yield from _table(("override", "value", "option of `train`"), rows)


def _protocols() -> Iterator[str]:
    yield from ("## Protocols", "", "The hyper-parameters of each data set. `images`: of the training, validation and test split.", "")
    names = [name for name in PROTOCOLS if name != "digits-noisy"]
    rows = [
        (f"`{field.name}`", *(_value(getattr(PROTOCOLS[name], field.name)) for name in names)) for field in dataclasses.fields(Protocol)
    ]
    yield from _table(("", *("digits, digits-noisy" if name == "digits" else name for name in names)), rows)


def _value(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {each}" for key, each in value.items())
    if isinstance(value, tuple):
        return ", ".join(f"{each:,}" if isinstance(each, int) else str(each) for each in value)
    return "none" if value is None else str(value)


def _files() -> Iterator[str]:
    yield from ("## Files", "", "Of each run, in `checkpoints/{model}/`, named `model_{run_id}_{size}_{dataset}` and:", "")
    said = dict(re.findall(r"^([._]\S+)  +(.*)$", files.__doc__ or "", re.MULTILINE))
    run = files.RunFiles(Path("c"), "m", "i", "s", "d")
    paths = [
        getattr(run, name) for name, value in vars(files.RunFiles).items() if isinstance(value, property) and name not in ("stem", "folder")
    ]
    suffixes = [path.name.removeprefix(run.stem) for path in paths]
    yield from _table(("", ""), [(f"`{suffix}`", said[suffix]) for suffix in suffixes])
    yield from ("Of a study, in `checkpoints/`:", "")
    yield from _table(("", ""), [
        ("`{grid}_runs.csv`", "one row a run"), ("`{grid}_steps.csv`", "one row a step"), ("`figures/`", "figures, as PNG and SVG"),
        ("`report/`", "`report.html`, `report.md`, their figures, and `looks.json`, which counts the looks at each question"),
        ("`tracking/`", "files of trackers, with `--track`"), ("`.state/`", "states and locks of unfinished runs; go when they end"),
    ])  # fmt: skip
    for title, names in (
        ("Columns of a log", Step._fields), ("Columns of `{grid}_runs.csv`", (*table.COLUMNS, *predictions.COLUMNS)),
    ):  # fmt: skip
        yield from (f"{title}: {', '.join(f'`{name}`' for name in names)}.", "")


def _gpus() -> Iterator[str]:
    yield from (
        "## GPUs",
        "",
        "What `plan --gpu` knows: dense bf16 products (V100 and T4: fp16) summed up in fp32, and fp32 outside of the tensor",
        "cores, in TFLOP/s; memory in GB and its bandwidth in GB/s; when cells of the full grid were measured on one.",
        "",
    )
    rows = [
        (
            f"`{each.name}`",
            each.title,
            f"{each.bf16:g}" if each.bf16 else f"fp16: {each.fp16:g}" if each.fp16 else "none: runs are fp32",
            f"{each.fp32:g}",
            f"{each.memory:g}",
            f"{each.bandwidth:,g}",
            each.measured,
        )
        for each in SHEETS.values()
    ]
    yield from _table(("`--gpu`", "", "bf16", "fp32", "memory", "bandwidth", "measured"), rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for cells in (header, ["---"] * len(header), *rows):
        yield "|" + "|".join(f" {cell} ".replace("|", "\\|") for cell in cells).replace("| --- ", "|---").replace(" --- ", "---") + "|"
    yield ""


if __name__ == "__main__":
    PATH.write_text(reference(), encoding="utf-8")
    print(PATH)
