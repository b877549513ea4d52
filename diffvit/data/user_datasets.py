"""Data sets of the user's own: an entry of a grid file, and the hub data set or the image folder that it names.

What an entry leaves out is decided in one place, the defaults of UserDataset: the values of BACH's protocol at 224 pixels, sizes of about
10, 25 and 50 million parameters, the splits that are there, or stratified ones.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffvit.checks import Check, any_of, dict_of, list_of, one_of, text, usable_path, whole
from diffvit.data.hub import MOST_CLASSES
from diffvit.data.parts import ROLES, VALIDATION, raw_of
from diffvit.data.sources import SOURCES, DataSource, Raw, find_data_root
from diffvit.errors import UserError, shown, unknown_name
from diffvit.protocol import PROTOCOLS, Protocol, check_override, known_dataset
from diffvit.vit import build_model

STRATIFIED = "stratified"

# A size is the depth that comes nearest to its parameters; one that is further off than this share would be mislabelled.
_FURTHEST = 0.25
_DEEPEST = 1000


@dataclass(frozen=True, kw_only=True)
class UserDataset:
    """An entry, checked. Its defaults are what is decided where an entry says nothing.

    Attributes:
        hub: `user/name`, with its configuration, where it has several, and its columns of images and labels.
        folder: absolute path of a folder with one folder a class. Either hub or folder is given.
        splits: "stratified", pairs of a role (train, validation, test) and the split's name, or nothing: as they are.
        classes: names, or how many. images: of (train, validation, test). Both may be left out, and are then found in the data.
        parameters: a label for each size, in order.
        warmup_steps: None: 500, or a tenth of all steps where that is less.
    """

    name: str
    hub: str = ""
    config: str = ""
    image: str = "image"
    label: str = "label"
    folder: str = ""
    splits: str | tuple[tuple[str, str], ...] = ()
    classes: int | tuple[str, ...] = ()
    images: tuple[int, ...] = ()
    parameters: tuple[str, ...] = ("10M", "25M", "50M")
    image_size: int = 224
    patch_size: int = 16
    d_model: int = 384
    heads: int = 6
    dropout: float = 0.2
    residual_scale: bool = True
    epochs: int = 100
    batch_size: int = 64
    lr: float = 3e-4
    warmup_steps: int | None = None
    weight_decay: float = 0.01
    clip_norm: float | None = None

    @staticmethod
    def of(entry: Mapping[str, Any], place: Path) -> UserDataset:
        """An entry of a grid file in the folder `place`, checked but for its data. Raises UserError."""
        name = entry.get("name")
        if _SHAPES["name"][0](name):
            raise UserError(f"a data set of the grid file has the name {shown(name)}.", f"give {_SHAPES['name'][1]}.")
        for key, value in entry.items():
            if key not in _KEYS:
                raise unknown_name(f"key of the data set {name}", key, _KEYS)
            check, what = _SHAPES.get(key, (None, ""))
            if check and check(value):
                raise UserError(f"{key} of the data set {name} is {shown(value)}.", f"give {what}.")
        if ("hub" in entry) == ("folder" in entry):
            raise UserError(f"where the data set {name} comes from is not said once.", "give either hub: user/name or folder: DIR.")
        if "folder" in entry and (wrong := [key for key in ("config", "image", "label") if key in entry]):
            raise UserError(f"{wrong[0]} of the data set {name} has no meaning in a folder.", "take it out: folders name the classes.")
        values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
        for key in _OF_PROTOCOL & values.keys():
            values[key] = _named(str(name), functools.partial(check_override, key, values[key]))
        if isinstance(splits := values.get("splits"), dict):
            if not {"train", "test"} <= splits.keys() or len(set(splits.values())) < len(splits):
                raise UserError(
                    f"splits of the data set {name} is {shown(splits)}.", "name a train and a test split, each another, or say stratified."
                )
            values["splits"] = tuple(splits.items())
        if "folder" in values:
            values["folder"] = str(usable_path(place / Path(values["folder"]).expanduser()).resolve())
        sizes = values.get("parameters", UserDataset.parameters)
        values["parameters"] = tuple(sorted(sizes, key=_millions))
        return UserDataset(**values)

    def protocol(self, data_root: str | Path | None = None) -> Protocol:
        """The data set's protocol. The data are looked at, not decoded, unless the entry says its classes and images. Raises UserError."""
        classes, images = self.classes if isinstance(self.classes, int) else len(self.classes), self.images
        if not classes or not images:
            raw = raw_of(self, find_data_root(data_root))
            classes, images = len(raw.classes), tuple(len(raw.rows[split]) for split in ("train", "val", "test"))
        values = {key: getattr(self, key) for key in _OF_PROTOCOL - {"warmup_steps", "clip_norm"}}
        first = Protocol(
            **values, classes=classes, channels=3, images=(images[0], images[1], images[2]), d_model=self.d_model,
            depths={"1": 1, "2": 2}, warmup_steps=0, clip_norm=self.clip_norm,
        )  # fmt: skip
        protocol = _named(self.name, lambda: first.with_overrides({"heads": self.heads}))
        warmup = min(500, protocol.total_steps() // 10) if self.warmup_steps is None else self.warmup_steps
        return dataclasses.replace(protocol, warmup_steps=warmup, depths=self._depths(protocol))

    def _depths(self, protocol: Protocol) -> dict[str, int]:
        """Size label -> the depth at which the classic arm's parameters are nearest to it."""
        one, two = (build_model("vit_classic", size, protocol, "meta").count_parameters() for size in ("1", "2"))
        layer = two - one
        depths: dict[str, int] = {}
        for label in self.parameters:
            wanted = 1e6 * _millions(label)
            depth = min(max(1, round((wanted - one) / layer) + 1), _DEEPEST)
            nearest = one + (depth - 1) * layer
            if abs(nearest / wanted - 1) > _FURTHEST:
                raise UserError(
                    f"no depth gives the data set {self.name} {label} parameters: with d_model {self.d_model} {depth} layers have "
                    f"{nearest / 1e6:.1f}M.",
                    "ask for other parameters, or give another d_model.",
                )
            if depth in depths.values():
                raise UserError(f"two sizes of the data set {self.name} are {depth} layers.", "give parameters that lie further apart.")
            depths[label] = depth
        return depths

    def load(self, data_root: Path | None) -> Raw:
        """The data set before decoding. Raises UserError for data that are not what the entry says, or cannot be trained on."""
        return raw_of(self, data_root)

    def roles(self, available: Sequence[str]) -> dict[str, str]:
        """Role -> the split of the source that has it; without "test", all three are drawn from the training split. Raises UserError."""
        if isinstance(self.splits, tuple) and self.splits:
            roles = dict(self.splits)
        elif len(available) == 1 or self.splits == STRATIFIED:
            train = available[0] if len(available) == 1 else "train"
            roles = {"train": train}
        else:
            roles = {"train": "train", "test": "test"}
            if validation := next((name for name in VALIDATION if name in available), None):
                roles["validation"] = validation
        for role, split in roles.items():
            if split not in available:
                raise UserError(
                    f"the data set {self.name} has no {role} split: it has {', '.join(sorted(available)) or 'none'}.",
                    "name them with splits: {train: …, test: …}, or give splits: stratified, which draws all from the training split.",
                )
        return roles


_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}"
_LABEL = r"(?!0(?:\.0*)?M)(?:0|[1-9][0-9]{0,3})(?:\.[0-9]{1,3})?M"
# Key -> the check of its value, and what to give.
_SHAPES: dict[str, tuple[Check, str]] = {
    "name": (text(_NAME), "letters, digits, points, hyphens and underscores, at most 40, for file names"),
    "hub": (text(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"), "a name on the Hugging Face hub, user/name"),
    "config": (text(r".+"), "the name of one of its configurations"),
    "image": (text(r".+"), "the name of the column that holds the images"),
    "label": (text(r".+"), "the name of the column that holds the labels"),
    "folder": (text(r".+", 4000), "a folder that has one folder a class"),
    "splits": (any_of(one_of(STRATIFIED), dict_of(one_of(*ROLES), text(r".+"))), "{train: …, validation: …, test: …} or stratified"),
    "classes": (any_of(whole(2, MOST_CLASSES), list_of(text(r".+"), 2, MOST_CLASSES)), "how many there are, or a list of their names"),
    "images": (list_of(whole(1), 3, 3), "how many there are for training, validation and test, such as [3000, 300, 600]"),
    "parameters": (list_of(text(_LABEL), 1, 3), "one to three sizes in millions of parameters, such as [10M, 25M, 50M]"),
    "d_model": (lambda value: whole(16, 2**14)(value) or (" is no multiple" if value % 16 else None), "a multiple of 16"),
}
_OF_PROTOCOL = frozenset(
    {
        "image_size", "patch_size", "heads", "dropout", "residual_scale", "epochs", "batch_size", "lr", "warmup_steps", "weight_decay",
        "clip_norm",
    }
)  # fmt: skip
_KEYS = tuple(field.name for field in dataclasses.fields(UserDataset))


def _named(name: str, make: Callable[[], Any]) -> Any:
    """What `make` returns; its error says whose value it is about."""
    try:
        return make()
    except UserError as error:
        raise UserError(f"in the data set {name}, {error.message}", error.hint) from None


def _millions(label: str) -> float:
    return float(label.removesuffix("M")) if re.fullmatch(_LABEL, label) else math.nan


# ------------------------------------------------------------------------------------------------------------ registry

# What grid files have defined in this process.
_REGISTERED: dict[str, tuple[UserDataset, Protocol]] = {}


def define(entry: Mapping[str, Any], place: Path, data_root: str | Path | None = None) -> str:
    """Check an entry of a grid file in the folder `place`, look at its data and register it. Returns its name. Raises UserError."""
    dataset = UserDataset.of(entry, place)
    _check_name(dataset)
    register(dataset, dataset.protocol(data_root))
    return dataset.name


def registered() -> tuple[tuple[UserDataset, Protocol], ...]:
    """All definitions with their protocols, to be registered in a worker's process."""
    return tuple(_REGISTERED.values())


def register(dataset: UserDataset, protocol: Protocol) -> None:
    """Make a data set known to this process under its name. Raises UserError for a name that another one has."""
    _check_name(dataset)
    _REGISTERED[dataset.name] = dataset, protocol
    PROTOCOLS[dataset.name] = protocol
    SOURCES[dataset.name] = DataSource(dataset.load, dataset.hub or None, Path(dataset.folder) if dataset.folder else None)


def _check_name(dataset: UserDataset) -> None:
    known = known_dataset(dataset.name)
    if known and (known not in _REGISTERED or _REGISTERED[known][0] != dataset):
        whose = "is another data set of a grid file" if known in _REGISTERED else "is one of diffvit's data sets"
        raise UserError(f"{dataset.name} cannot be the name of a data set: {known} {whose}.", "give it another name.")
