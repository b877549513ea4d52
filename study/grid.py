"""Grids: names for lists of runs. Pure data.

A grid is every combination of its models, sizes, data sets and seeds. Two are built in; others come from a small file:

    models: [vit_classic, vit_differential]
    sizes: [small, large]
    datasets: [digits]
    seeds: 3                  # how many, or a list of them
    overrides: {epochs: 5}    # for all runs alike
"""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffvit.errors import UserError, unknown_name
from diffvit.ledger import RunSpec
from diffvit.protocol import ARMS

_ALL_SIZES = ("small", "medium", "large")


@dataclass(frozen=True)
class Grid:
    """Lists whose product is the grid's runs."""

    name: str
    datasets: Sequence[str]
    models: Sequence[str] = ARMS
    sizes: Sequence[str] = _ALL_SIZES
    seeds: Sequence[int] = (0,)
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def runs(self, precision: str = "fp32", seeds: int | None = None, overrides: Mapping[str, Any] | None = None) -> list[RunSpec]:
        """The grid's runs, each once, by data set, size, model and seed.

        Args:
            seeds: if given, seeds 0 … seeds-1 in place of the grid's own.
            overrides: on top of the grid's own.

        Raises:
            UserError: a name or a value that does not exist.
        """
        values = {**self.overrides, **{name: value for name, value in (overrides or {}).items() if value is not None}}
        product = itertools.product(self.datasets, self.sizes, self.models, range(seeds) if seeds else self.seeds)
        specs = [RunSpec.of(model, size, dataset, seed, precision, values) for dataset, size, model, seed in product]
        return list({str(spec): spec for spec in specs}.values())


GRIDS = {
    "digits": Grid("digits", datasets=("digits", "digits-noisy")),
    "full": Grid("full", datasets=("CIFAR-100", "BACH")),
}

_FILE_KEYS = ("models", "sizes", "datasets", "seeds", "overrides")


def find_grid(name: str) -> Grid:
    """A built-in grid by name, or the grid of a YAML or TOML file. Raises UserError."""
    if name in GRIDS:
        return GRIDS[name]
    path = Path(name)
    if path.suffix.lower() not in (".yaml", ".yml", ".toml"):
        raise unknown_name("grid", name, [*GRIDS, "a .yaml or .toml file"])
    return read_grid(path)


def read_grid(path: Path) -> Grid:
    """The grid of a file. Raises UserError for a file that cannot be read or says something else."""
    try:
        content = _parse(path, path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"the grid file {path} cannot be read: {error.strerror}.", f"built-in grids are {', '.join(GRIDS)}.") from error
    except ValueError as error:
        raise UserError(
            f"the grid file {path} is not valid: {' '.join(str(error).split())[:200]}.", "see CONTRIBUTING.md for an example."
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"the grid file {path} is not a list of keys and values.", f"its keys are {', '.join(_FILE_KEYS)}.")
    for key in content:
        if key not in _FILE_KEYS:
            raise unknown_name(f"key in {path}", key, _FILE_KEYS)
    if "datasets" not in content:
        raise UserError(f"the grid file {path} names no datasets.", "add a line such as `datasets: [digits]`.")
    return Grid(
        path.stem if path.stem not in GRIDS else f"{path.stem}-file",
        datasets=_names(path, content, "datasets"),
        models=_names(path, content, "models") if "models" in content else ARMS,
        sizes=_names(path, content, "sizes") if "sizes" in content else _ALL_SIZES,
        seeds=_seeds(path, content.get("seeds", 1)),
        overrides=_overrides(path, content.get("overrides", {})),
    )


def _parse(path: Path, text: str) -> Any:
    if path.suffix.lower() == ".toml":
        return tomllib.loads(text)
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _names(path: Path, content: dict[str, Any], key: str) -> tuple[str, ...]:
    value = content[key]
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names or not all(isinstance(name, (str, int, float)) for name in names):
        raise UserError(f"{key} in {path} is {value!r}.", "give a list of names.")
    return tuple(str(name) for name in names)


def _seeds(path: Path, value: Any) -> tuple[int, ...]:
    seeds = list(range(value)) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise UserError(f"seeds in {path} is {value!r}.", "give how many, at least 1, or a list of whole numbers.")
    return tuple(seeds)


def _overrides(path: Path, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"overrides in {path} is {value!r}.", "give names and values, such as {epochs: 5}.")
    return {name: _number(entry) for name, entry in value.items()}


def _number(entry: Any) -> Any:
    """YAML reads 1e-3 as text."""
    try:
        return float(entry) if isinstance(entry, str) else entry
    except ValueError:
        return entry
