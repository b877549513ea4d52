"""Grids: names for lists of runs. Pure data.

A grid is every combination of its models, sizes, data sets, conditions and seeds. Some are built in; others come from a
small file:

    models: [vit_classic, vit_differential]  # each is compared with the first
    controls: [vit_differential_v2]          # trained too, without a verdict
    sizes: [small, large]
    datasets: [digits, digits-noisy]
    seeds: 3                                 # how many, or a list of them
    overrides: {epochs: 5}                   # for all runs alike
    conditions: [{}, {label_noise: 0.2}]     # every run once under each: overrides on top of those for all

The last three keys may be given for single data sets. Those not named get one seed, and no overrides or conditions:

    seeds: {digits: 5}
    overrides: {epochs: 5, digits: {epochs: 8}}
    conditions: {digits: [{}, {lr: 1e-3}]}

An architecture of one's own is a file's class (docs/own-idea.md), its path relative to the grid file:

    models: [vit_classic, ideas/my_attention.py:MyAttention]

A data set of one's own is a table in the place of its name (docs/own-data.md):

    datasets: [{name: pets, folder: pets/images, parameters: [5M, 10M], epochs: 60}]

What a file says is used or refused. Refused are duplicate names and runs, missing values, and numbers that only YAML 1.1 reads as such.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffvit.checks import read_text, usable_path
from diffvit.errors import UserError, shown, unknown_name
from diffvit.ledger.spec import RunSpec, overrides_text
from diffvit.protocol import ARMS, MODELS, PILOT, check_override, protocol_of, resolve_dataset, resolve_model
from diffvit.user_models import beside
from study.strict_file import number, parse
from study.text import short_model

_ONE_SEED = (0,)
_MOST_RUNS = 10_000
_LONGEST_NAME = 80
_ONE_CONDITION: tuple[Mapping[str, Any], ...] = ({},)


@dataclass(frozen=True)
class Grid:
    """Lists whose product is the grid's runs.

    Attributes:
        models: the architectures that are compared, the baseline first. controls: more that are trained, of which no question is asked.
        sizes: None: all that a data set has.
        seeds: for all data sets, or data set -> seeds; a data set that is not named gets seed 0.
        overrides: protocol values for all runs; under the name of a data set, values for its runs on top of them.
        conditions: sets of overrides under each of which every run is made, on top of `overrides`; or data set -> such sets.
        prefix: what the names of its figures begin with. A file may have some sizes only: its figures are not those of a built-in grid.
    """

    name: str
    datasets: Sequence[str]
    models: Sequence[str] = ARMS
    sizes: Sequence[str] | None = None
    seeds: Sequence[int] | Mapping[str, Sequence[int]] = _ONE_SEED
    overrides: Mapping[str, Any] = field(default_factory=dict)
    conditions: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Mapping[str, Any]]] = _ONE_CONDITION
    prefix: str = ""
    controls: Sequence[str] = ()

    @property
    def trained(self) -> tuple[str, ...]:
        """All its models."""
        return tuple(map(resolve_model, (*self.models, *self.controls)))

    @property
    def arms(self) -> tuple[str, ...]:
        """The models that are compared, the baseline first; one alone is compared with what other grids trained of the study's own."""
        models = tuple(map(resolve_model, self.models))
        return models if len(models) > 1 else ARMS if models[0] in ARMS else (ARMS[0], *models)

    def with_models(self, models: Sequence[str]) -> Grid:
        """This grid with other models, and a name of its own. Raises UserError for an unknown one."""
        chosen = tuple(map(resolve_model, models))
        if chosen == tuple(map(resolve_model, self.models)) and not self.controls:
            return self
        name = "-".join([self.name, *map(short_model, chosen)])
        if len(name) > _LONGEST_NAME:  # figures and tables have it in their files' names
            name = f"{self.name}-{len(chosen)}-models-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        return dataclasses.replace(self, name=name, models=chosen, controls=(), prefix=f"{name}_")

    def runs(self, precision: str = "fp32", seeds: int | None = None, overrides: Mapping[str, Any] | None = None,
             on_same: Callable[[str], None] | None = None) -> list[RunSpec]:  # fmt: skip
        """The grid's runs, each once, by data set, condition, size, model and seed.

        Args:
            seeds: if given, seeds 0 … seeds-1 in place of the grid's own.
            overrides: on top of the grid's own.
            on_same: called with a sentence for each condition that equals the protocol or another one, and so makes no runs of its own.

        Raises:
            UserError: a name or a value that does not exist, a run that is asked for twice, or more runs than a study can have.
        """
        given = {name: value for name, value in (overrides or {}).items() if value is not None}
        unique: dict[str, RunSpec] = {}
        same: dict[str, None] = {}
        asked = 0
        for dataset in map(resolve_dataset, self.datasets):
            common = {name: value for name, value in self.overrides.items() if not isinstance(value, Mapping)}
            own = self.overrides.get(dataset, {})
            conditions = _for_dataset(self.conditions, dataset, _ONE_CONDITION)
            chosen = range(seeds) if seeds else _for_dataset(self.seeds, dataset, _ONE_SEED)
            sizes = protocol_of(dataset).sizes if self.sizes is None else self.sizes
            asked += len(conditions) * len(sizes) * len(self.trained) * len(chosen)
            if asked > _MOST_RUNS:
                raise UserError(f"the grid {self.name} has more than {_MOST_RUNS:,} runs.", "give fewer seeds, or fewer conditions.")
            for condition, size, model, seed in itertools.product(conditions, sizes, self.trained, chosen):
                spec = RunSpec.of(model, size, dataset, seed, precision, {**common, **own, **condition, **given})
                if (first := unique.setdefault(repr(spec.identity("")), spec)) is spec:
                    continue
                if first.title == spec.title:
                    hint = "name each model, size, data set, seed and condition once; an option may have made two conditions one."
                    raise UserError(f"the grid {self.name} asks for {spec.title} twice.", hint)
                texts = [overrides_text(each.overrides) or "the protocol" for each in (spec, first)]
                same[f"{dataset}: {texts[0]} is the same as {texts[1]}, and makes no runs of its own"] = None
        if on_same:
            for sentence in same:
                on_same(sentence)
        return list(unique.values())


def named_after(name: str, grids: Sequence[Grid], epochs: int | None) -> str:
    """A name with the command line's overrides, if they change any run of the grids: "digits_epochs-3"."""
    from study.table import file_stem

    overrides = {"epochs": epochs}
    plain, asked = ([run.protocol for grid in grids for run in grid.runs(seeds=1, overrides=each)] for each in ({}, overrides))
    return file_stem(name, overrides_text(overrides)) if plain != asked else name


def _for_dataset(values: Any, dataset: str, default: Any) -> Any:
    return values.get(dataset, default) if isinstance(values, Mapping) else values


def _noise(name: str, dataset: str) -> Grid:
    """Clean training data, noisy pixels, and a fifth and two fifths of the labels false."""
    # The digits with noise of this strength are learnt by small models still; elsewhere it is the strongest of CIFAR-C.
    pixels = 0.35 if dataset in ("digits", "digits-noisy") else 0.1
    return Grid(name, datasets=(dataset,), conditions=({}, {"input_noise": pixels}, {"label_noise": 0.2}, {"label_noise": 0.4}))


def _learning_rates(name: str, dataset: str) -> Grid:
    """Each run at a third, once and three times the protocol's learning rate: was the peak chosen in one arm's favour?"""
    lr = protocol_of(dataset).lr
    lower, higher = (float(f"{lr * factor:.3g}") for factor in (1 / 3, 3))
    return Grid(name, datasets=(dataset,), conditions=({"lr": lower}, {}, {"lr": higher}))


def _controls(name: str, dataset: str) -> Grid:
    """All architectures, with the protocol's heads and with more: is it the subtraction, and does it take more heads?"""
    others = tuple(model for model in MODELS if model not in ARMS)
    return Grid(name, datasets=(dataset,), controls=others, conditions=({}, {"heads": _more_heads(dataset)}))


def _choices(name: str, dataset: str) -> Grid:
    """Both arms under every combination of start, learning rate and heads that could as well have been chosen."""
    rates = [condition for condition in _learning_rates(name, dataset).conditions if isinstance(condition, Mapping)]
    starts: tuple[Mapping[str, Any], ...] = ({}, {"residual_scale": False})
    heads: tuple[Mapping[str, Any], ...] = ({}, {"heads": _more_heads(dataset)})
    return Grid(name, datasets=(dataset,), conditions=tuple({**a, **b, **c} for a, b, c in itertools.product(starts, rates, heads)))


def _more_heads(dataset: str) -> int:
    """16 heads, so 8 pairs, the fewest that the authors of differential attention used; 8 where 16 would have less than 8 values each."""
    return 16 if protocol_of(dataset).d_model >= 16 * 8 else 8


# Grids for one data set, which --dataset chooses.
_OF_A_DATASET: dict[str, Callable[[str, str], Grid]] = {
    "noise": _noise, "lr": _learning_rates, "controls": _controls, "choices": _choices,
}  # fmt: skip

GRIDS = {
    "digits": Grid("digits", datasets=("digits", "digits-noisy")),
    "full": Grid("full", datasets=("CIFAR-100", "BACH")),
    "pilot": Grid("pilot", datasets=PILOT[:1], seeds=(0, 1, 2), overrides=PILOT[1]),
    # BACH is a hundredth of the full grid's FLOPs and its test set is small, so more seeds cost little and tell much. In 400 steps
    # the protocol's warm-up of 500 never ends; a condition in which it does shows what that costs. Ten times BACH: 10 % more.
    "full-plus": Grid(
        "full-plus",
        datasets=("CIFAR-100", "BACH"),
        seeds={"BACH": tuple(range(5))},
        conditions={"BACH": ({}, {"warmup_steps": 100})},
    ),
    **{name: make(name, "digits") for name, make in _OF_A_DATASET.items()},
}

# A grid file is a few lines, and what parses it may take a time that grows with the square of its length.
_LONGEST_FILE = 20_000

_FILE_KEYS = ("models", "controls", "sizes", "datasets", "seeds", "overrides", "conditions")


def find_grid(name: str, dataset: str | None = None, data_root: str | None = None, models: Sequence[str] = ()) -> Grid:
    """A built-in grid by name, or the grid of a YAML or TOML file.

    Args:
        dataset: for a built-in grid of a single data set, another one than digits, as find_dataset takes it.
        data_root: where data sets that a file defines are looked for, to know their classes and numbers of images.
        models: in place of the grid's own.

    Raises:
        UserError: no such grid, model or data set, or a grid that has its own data sets.
    """
    grid = _grid_named(name, dataset, data_root)
    return grid.with_models(models) if models else grid


def _grid_named(name: str, dataset: str | None, data_root: str | None) -> Grid:
    if dataset is not None and name not in _OF_A_DATASET:
        hint = "--dataset goes with --grid noise, lr, controls or choices; a grid file lists its datasets."
        raise UserError(f"the grid {name} has data sets of its own.", hint)
    if dataset is not None and (dataset := find_dataset(dataset, data_root)) != "digits":
        return _OF_A_DATASET[name](f"{name}-{dataset}", dataset)
    if name in GRIDS:
        return GRIDS[name]
    path = usable_path(name)
    if path.suffix.lower() not in (".yaml", ".yml", ".toml"):
        raise unknown_name("grid", name, [*GRIDS, "a .yaml or .toml file"])
    return read_grid(path, data_root)


def find_dataset(text: str, data_root: str | None = None) -> str:
    """The name of a data set as the ledger has it: of a built-in one, or of FILE:NAME, which that grid file defines. Raises UserError."""
    file, colon, name = text.rpartition(":")
    if not colon:
        return resolve_dataset(text)
    path = usable_path(file)
    with _named_in_errors(path):
        return _defined(path, name, data_root)


def _defined(path: Path, name: str, data_root: str | None) -> str:
    """The name of the data set that a grid file defines under it. Raises UserError."""
    entries = {str(entry.get("name")): entry for entry in _datasets(_read(path)) if isinstance(entry, dict)}
    if name not in entries:
        raise unknown_name(f"data set defined in {path}", name, entries or ["none"])
    return _known(path, [entries[name]], data_root)[0]


def _datasets(content: dict[str, Any]) -> list[Any]:
    return content["datasets"] if isinstance(content["datasets"], list) else [content["datasets"]]


def _known(path: Path, datasets: list[Any], data_root: str | None) -> list[Any]:
    """Data sets of a file, those that it defines by their names, under which this process now knows them. Raises UserError."""
    if not any(isinstance(entry, dict) for entry in datasets):
        return datasets
    from diffvit.data.user_datasets import define  # torch comes with it

    return [define(entry, path.resolve().parent, data_root) if isinstance(entry, dict) else entry for entry in datasets]


def _read(path: Path) -> dict[str, Any]:
    """A file's keys and values, "datasets" among them. Raises UserError for a file that cannot be read or has others."""
    try:
        content = parse(path, read_text(path, _LONGEST_FILE))
    except OSError as error:
        raise UserError(f"the grid file {path} cannot be read: {error.strerror}.", f"built-in grids are {', '.join(GRIDS)}.") from error
    except ValueError as error:
        raise UserError(
            f"the grid file {path} is not valid: {' '.join(str(error).split())[:200]}.", "docs/grids.md has an example."
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"the grid file {path} is not a list of keys and values.", f"its keys are {', '.join(_FILE_KEYS)}.")
    for key in content:
        if key not in _FILE_KEYS:
            raise unknown_name(f"key in {path}", key, _FILE_KEYS)
        if content[key] is None:
            raise UserError(f"{key} in {path} has no value.", "give it one, or take it out.")
    if "datasets" not in content:
        raise UserError(f"the grid file {path} names no datasets.", "add a line such as `datasets: [digits]`.")
    return content


def read_grid(path: Path, data_root: str | None = None) -> Grid:
    """The grid of a file. Raises UserError, with the file's name, for one that cannot be read or says something else."""
    with _named_in_errors(path):
        grid = _grid_of(path, _read(path), data_root)
        grid.runs()  # names and values
    return grid


@contextlib.contextmanager
def _named_in_errors(path: Path) -> Iterator[None]:
    """Put the file's name in front of errors that do not have it."""
    try:
        yield
    except UserError as error:
        if str(path) in error.message:
            raise
        raise UserError(f"the grid file {path}: {error.message}", error.hint) from None


def _grid_of(path: Path, content: dict[str, Any], data_root: str | None) -> Grid:
    content["datasets"] = _known(path, _datasets(content), data_root)
    name = path.stem if path.stem not in GRIDS else f"{path.stem}-file"
    models = _models(path, content, "models") if "models" in content else ARMS
    controls = _models(path, content, "controls") if content.get("controls", []) != [] else ()
    if controls and len(models) < 2:
        raise UserError(f"{path} has controls, but only one of its models is compared.", "give at least two models, the baseline first.")
    if both := set(models) & set(controls):
        raise UserError(f"{path} has {sorted(both)[0]} in models and in controls.", "take it out of one of them.")
    return Grid(
        name,
        datasets=_names(path, content, "datasets"),
        models=models,
        controls=controls,
        sizes=_names(path, content, "sizes") if "sizes" in content else None,
        seeds=_per_dataset(path, content, "seeds", 1, _seeds),
        overrides=_all_overrides(path, content),
        conditions=_per_dataset(path, content, "conditions", [{}], _conditions),
        prefix=f"{name}_",
    )


def _models(path: Path, content: dict[str, Any], key: str) -> tuple[str, ...]:
    return tuple(resolve_model(beside(path.parent, name)) for name in _names(path, content, key))


def _names(path: Path, content: dict[str, Any], key: str) -> tuple[str, ...]:
    value = content[key]
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names or not all(isinstance(name, (str, int, float)) for name in names):
        raise UserError(f"{key} in {path} is {shown(value)}.", "give a list of names.")
    return tuple(name if isinstance(name, str) else shown(name) for name in names)


def _per_dataset(path: Path, content: dict[str, Any], key: str, default: Any, read: Callable[[Path, Any], Any]) -> Any:
    """What `read` makes of a key's value, or of each value where it is a table by data set."""
    value = content.get(key, default)
    if not isinstance(value, dict):
        return read(path, value)
    return {dataset: read(path, entry) for dataset, entry in _by_dataset(path, content, key, value).items()}


def _by_dataset(path: Path, content: dict[str, Any], key: str, values: dict[Any, Any]) -> dict[str, Any]:
    """Data set -> the value that is meant for it; each must be one of the grid's, and named once."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        dataset = resolve_dataset(name)
        if dataset not in map(resolve_dataset, _names(path, content, "datasets")):
            raise UserError(f"{key} in {path} names {dataset}, which is not in its datasets.", "add it to datasets, or take it out.")
        if dataset in found:
            raise UserError(f"{key} in {path} names {dataset} twice.", "remove one of the two.")
        found[dataset] = value
    return found


def _conditions(path: Path, value: Any) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, list) or not value or not all(isinstance(entry, dict) for entry in value):
        raise UserError(f"conditions in {path} is {shown(value)}.", "give a list of overrides, such as [{}, {label_noise: 0.2}].")
    return tuple(_overrides(path, entry) for entry in value)


def _all_overrides(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Overrides for all runs, and by data set those whose value is a table itself."""
    value = _overrides(path, content.get("overrides", {}))
    tables = {name: entry for name, entry in value.items() if isinstance(entry, dict)}
    common = {name: entry for name, entry in value.items() if name not in tables}
    return common | {dataset: _overrides(path, entry) for dataset, entry in _by_dataset(path, content, "overrides", tables).items()}


def _seeds(path: Path, value: Any) -> tuple[int, ...]:
    seeds = list(range(value)) if type(value) is int and value <= _MOST_RUNS else value
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise UserError(
            f"seeds in {path} is {shown(value)}.", f"give how many, at least 1 and at most {_MOST_RUNS}, or a list of whole numbers."
        )
    return tuple(seeds)


def _overrides(path: Path, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"overrides in {path} is {shown(value)}.", "give names and values, such as {epochs: 5}.")
    return {
        name: entry if isinstance(entry, dict) else check_override(name, number(entry) if isinstance(entry, str) else entry)  # "3" is 3
        for name, entry in value.items()
    }
