"""What the benchmarks share: rounds that interleave what is compared, ratios with intervals, the machine, bars, tables, JSON.

A machine's speed drifts. So everything that is compared runs once in each round, in an order that turns from round to round; a ratio is
taken within each round, and its interval is a bootstrap of the rounds' median.

What is measured is printed and written at once: a benchmark that is killed leaves a valid JSON of what it had, "complete" being false.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from diffvit.dataset import Dataset
from diffvit.keeping.saving import Every
from diffvit.ledger.disk import write_atomically
from diffvit.loop.fit import Fit, fit
from diffvit.machine.device import machine_facts
from diffvit.machine.host import cpus
from diffvit.protocol import Protocol

json_option = click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the outcome there.")


# Shorter actions are repeated until they take so long, and their mean is noted.
_LEAST_SECONDS = 0.02


def rounds_of(
    actions: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    warm_up: int = 1,
    after_round: Callable[[dict[str, list[float]]], None] | None = None,
) -> dict[str, np.ndarray]:
    """Seconds of each action in each round.

    Args:
        actions: name -> what is timed. One that returns a float has timed itself, and these are its seconds.
        warm_up: rounds before those that count, at least one.
        after_round: called with the seconds so far after each round that counts.

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
            start, own = time.perf_counter(), 0.0
            for _ in range(repeats[name]):
                found = actions[name]()
                own += found if isinstance(found, float) else 0.0
            wait_for(device)
            mean = (own or time.perf_counter() - start) / repeats[name]
            if number >= 0:
                seconds[name].append(mean)
            else:
                repeats[name] = max(1, int(_LEAST_SECONDS / mean))
        if number >= 0 and after_round:
            after_round(seconds)
    return {name: np.asarray(values) for name, values in seconds.items()}


def fit_and_time(model: nn.Module, data: Dataset, protocol: Protocol, warm_up: int, steps: int, **how: Any) -> tuple[Fit, float, float]:
    """Trains a model from seed 0 for so many steps.

    Args:
        warm_up: steps before those that count, at least one.
        how: other arguments of `fit`.

    Returns:
        What `fit` returns, seconds up to the last step of the warm-up, and seconds of the steps after it.
    """
    marks = [time.perf_counter()]

    def mark(state: dict[str, Any]) -> None:
        if state["step"] in (warm_up, warm_up + steps):
            marks.append(time.perf_counter())

    run = dataclasses.replace(protocol, epochs=10**6, max_steps=warm_up + steps + 1)  # after the last one nothing is saved
    fitted = fit(model, data, run, seed=0, on_save=mark, save_every=Every(steps=math.gcd(warm_up, steps)), **how)
    return fitted, marks[1] - marks[0], marks[2] - marks[1]


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
    versions = {}
    for name in ("timm", "torchvision", "ray", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # a bare GPU machine may have no Ray
            versions[name] = importlib.metadata.version(name)
    return {**facts, "cpus": cpus(), "load": os.getloadavg()[0], "versions": {**facts["versions"], **versions}}


class Journal:
    """The outcome of a benchmark as JSON, written anew as a whole whenever something is measured."""

    def __init__(self, device: torch.device, json_path: Path | None, **facts: Any):
        self._path = json_path
        self._content: dict[str, Any] = {
            "command": " ".join(["python", "-m", f"bench.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "complete": False,
            "machine": machine(device),
            **facts,
        }

    def note(self, **values: Any) -> None:
        """Sets values, and writes the file."""
        self._content |= values
        if self._path:
            text = json.dumps(self._content, indent=1, default=_plain) + "\n"
            write_atomically(self._path, text.encode())

    def append(self, key: str, row: Any) -> None:
        """Adds a row to the list under `key`."""
        self.note(**{key: [*self._content.get(key, []), row]})

    def finish(self, bars: Sequence[Bar]) -> NoReturn:
        """Prints the machine and the bars, completes the JSON, and ends the process with 1 if a bar is missed."""
        facts = self._content["machine"]
        versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        click.echo(f"\n{facts['device_name']}, {facts['cpus']} CPUs, {facts['threads']} threads; {versions}\n")
        for bar in bars:
            click.echo(str(bar))
        self.note(complete=True, bars=bars)
        sys.exit(0 if all(bar.holds for bar in bars) else 1)


def finish(outcome: Mapping[str, Any], bars: Sequence[Bar], device: torch.device, json_path: Path | None) -> NoReturn:
    """A journal of an outcome that is whole at once."""
    Journal(device, json_path, **outcome).finish(bars)


def medians(seconds: Mapping[str, Sequence[float] | np.ndarray]) -> dict[str, dict[str, float]]:
    """What a journal says of rounds: each action's median, and of how many."""
    return {name: {"median": float(np.median(times)), "rounds": len(times)} for name, times in seconds.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Bar):
        return {**asdict(value), "holds": value.holds}
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


def line(values: Sequence[str], widths: Sequence[int]) -> None:
    """Prints a row of a table that grows while it is measured, its first column to the left and the others to the right."""
    first, *others = zip(values, widths, strict=True)
    click.echo("  ".join([f"{first[0]:<{first[1]}}", *(f"{value:>{width}}" for value, width in others)]).rstrip())
