"""What the benchmarks share: rounds that interleave what is compared, ratios with intervals, the machine, bars, tables, JSON.

A machine's speed drifts. So everything that is compared runs once in each round, in an order that turns from round to round; a ratio is
taken within each round, and its interval is a bootstrap of the rounds' median.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from diffvit.train import machine_facts

json_option = click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the outcome there.")


# Shorter actions are repeated until they take so long, and their mean is noted.
_LEAST_SECONDS = 0.02


def rounds_of(actions: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, warm_up: int = 1) -> dict[str, np.ndarray]:
    """Seconds of each action in each round.

    Args:
        actions: name -> what is timed.
        warm_up: rounds before those that count, at least one.

    Returns:
        name -> seconds [rounds]
    """
    names = list(actions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    repeats = dict.fromkeys(names, 1)
    for number in range(-warm_up, rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            wait_for(device)
            start = time.perf_counter()
            for _ in range(repeats[name]):
                actions[name]()
            wait_for(device)
            mean = (time.perf_counter() - start) / repeats[name]
            if number >= 0:
                seconds[name].append(mean)
            else:
                repeats[name] = max(1, int(_LEAST_SECONDS / mean))
    return {name: np.asarray(values) for name, values in seconds.items()}


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Ratio:
    """A ratio of two times: the rounds' median and its 95 % interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


def ratio(seconds: np.ndarray, against: np.ndarray) -> Ratio:
    """Of two actions timed in the same rounds. [rounds], [rounds]"""
    ratios = np.asarray(seconds) / np.asarray(against)
    chance = np.random.default_rng(0)
    medians = np.median(chance.choice(ratios, (4000, len(ratios))), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return Ratio(float(np.median(ratios)), float(low), float(high))


def spread(seconds: np.ndarray) -> str:
    """Median and range, in milliseconds or seconds."""
    scale, unit = (1e3, "ms") if np.median(seconds) < 1 else (1.0, "s")
    median, low, high = scale * np.median(seconds), scale * np.min(seconds), scale * np.max(seconds)
    return f"{median:.4g} {unit} ({low:.4g} to {high:.4g})"


@dataclass(frozen=True)
class Bar:
    """A promise about a number, and the number."""

    what: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def holds(self) -> bool:
        """Whether the promise is kept."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        relation = ("at least" if self.at_least else "at most") + f" {self.limit:,.4g}"
        return f"{'met   ' if self.holds else 'MISSED'}  {self.what}: {self.value:,.4g}, {relation}"


def machine(device: torch.device) -> dict[str, Any]:
    """The device, and the versions of what is compared."""
    facts = machine_facts(device)
    versions = {name: importlib.metadata.version(name) for name in ("timm", "torchvision", "ray", "numpy")}
    return {**facts, "cpus": os.cpu_count(), "load": os.getloadavg()[0], "versions": {**facts["versions"], **versions}}


def finish(outcome: dict[str, Any], bars: list[Bar], device: torch.device, json_path: Path | None) -> None:
    """Prints the bars and the machine, writes the JSON, and ends the process with 1 if a bar is missed."""
    facts = machine(device)
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    click.echo(f"{facts['device_name']}, {facts['cpus']} CPUs, {facts['threads']} threads; {versions}\n")
    for bar in bars:
        click.echo(str(bar))
    if json_path:
        command = " ".join(["python", "-m", f"bench.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
        content = {
            "command": command,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "machine": facts,
            **outcome,
            "bars": [{**asdict(bar), "holds": bar.holds} for bar in bars],
        }
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(content, indent=1, default=_plain) + "\n", encoding="utf-8")
    sys.exit(0 if all(bar.holds for bar in bars) else 1)


def _plain(value: Any) -> Any:
    if isinstance(value, Ratio):
        return asdict(value)
    return np.asarray(value).round(7).tolist()


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a table, its first column to the left and the others to the right."""
    drawn = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, column in enumerate(columns):
        drawn.add_column(column, justify="left" if i == 0 else "right", no_wrap=i > 0)
    for row in rows:
        drawn.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(drawn)
    console.print()
