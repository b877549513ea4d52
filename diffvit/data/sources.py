"""The data sets: for each a source, whose loader returns a Raw."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from diffvit.data.hub import decoded, fingerprint, image_fields, labels_of, load_hub
from diffvit.data.splits import mixed, split_rows
from diffvit.errors import UserError
from diffvit.protocol import protocol_of


@dataclass(frozen=True)
class Raw:
    """A data set before decoding: the labels of all rows, their splits, and a function that decodes rows."""

    classes: Sequence[str]
    labels: np.ndarray
    rows: dict[str, np.ndarray]
    decode: Callable[[np.ndarray], np.ndarray]
    notes: list[str] = field(default_factory=list)
    cache_key: str | None = None


Loader = Callable[[Path | None], Raw]


@dataclass(frozen=True)
class DataSource:
    """Where a data set comes from.

    Attributes:
        load: given the data root, if any. Raises UserError.
        hub: its `user/name` on the Hugging Face hub, of one that is there.
        folder: of one that lies in a folder of the user's.
    """

    load: Loader
    hub: str | None = None
    folder: Path | None = None


# All data sets: those below, and those that a grid file defines (user_datasets.py). Each has a protocol of the same name in PROTOCOLS.
SOURCES: dict[str, DataSource] = {}


def loader(name: str, hub: str | None = None) -> Callable[[Loader], Loader]:
    """Register the function that loads a data set."""

    def mark(function: Loader) -> Loader:
        SOURCES[name] = DataSource(function, hub)
        return function

    return mark


def find_data_root(given: str | Path | None) -> Path | None:
    """The folder that holds hub data sets as `user/name`: the one given, $DIFFVIT_DATA, or None for the hub."""
    root = given or os.environ.get("DIFFVIT_DATA")
    return Path(os.path.expanduser(root)).resolve() if root else None


@loader("CIFAR-100", hub="uoft-cs/cifar100")
def _cifar100(data_root: Path | None) -> Raw:
    """uoft-cs/cifar100: 50 of each class's 500 training images become validation."""
    parts = load_hub("uoft-cs/cifar100", data_root, "img", "fine_label")
    train, test = parts["train"], parts["test"]
    (train_labels, names), (test_labels, test_names) = (labels_of(part, "fine_label", classes=100) for part in (train, test))
    if names != test_names or len(names or range(100)) != 100:
        raise UserError("the labels of uoft-cs/cifar100 have not the same 100 names in both splits.", "download it again.")
    labels = np.concatenate([train_labels, test_labels])
    train_rows, val_rows = split_rows(labels[: len(train)], [0.9, 0.1], salt="CIFAR-100")
    test_rows = np.arange(len(train), len(labels))

    def decode(rows: np.ndarray) -> np.ndarray:
        part, first = (test, len(train)) if rows[0] >= len(train) else (train, 0)
        out = np.empty((len(rows), 3, 32, 32), dtype=np.uint8)
        for i, image in enumerate(decoded(part, "img", rows - first)):
            if image.size != (32, 32):
                raise UserError(f"an image of CIFAR-100 has {image.width} x {image.height} pixels, not 32 x 32.", "it is another data set.")
            out[i] = np.asarray(image).transpose(2, 0, 1)
        return out

    return Raw(
        classes=names or [str(label) for label in range(100)],
        labels=labels,
        rows={"train": train_rows, "val": val_rows, "test": test_rows},
        decode=decode,
        cache_key=f"{fingerprint(train)}{fingerprint(test)}",
    )


# The rows, in file-name order, that kaiko's eva holds out: a split of BACH's 400 labelled images by patient.
_BACH_HELD_OUT = ((41, 59), (60, 90), (139, 169), (240, 258), (260, 273), (345, 368))
_BACH_CLASSES = ("Benign", "InSitu", "Invasive", "Normal")
_BACH_FILE = re.compile(r"^(b|is|iv|n)(\d{3})\.\w+$")


@loader("BACH", hub="1aurent/BACH")
def _bach(data_root: Path | None) -> Raw:
    """1aurent/BACH: the 400 labelled images; its own test split has no labels and is not used.

    eva's held-out patients are the test set. Ten images a class, neighbours in file-name order and so mostly of the same
    patients, are taken off the rest for validation.
    """
    part = load_hub("1aurent/BACH", data_root, "image", "label", splits=lambda _: ("train",))["train"]
    stored, names = labels_of(part, "label")
    assert names
    used = {names[label] for label in stored}
    if (missing := set(_BACH_CLASSES) - used) and (unknown := used - set(_BACH_CLASSES)):
        raise UserError(
            f"no image of 1aurent/BACH is {' or '.join(sorted(missing))}, and some are {' or '.join(sorted(unknown))}.",
            f"the classes must be named {', '.join(_BACH_CLASSES)}.",
        )
    known = np.asarray([names[label] in _BACH_CLASSES for label in stored], dtype=bool)
    part_rows = np.flatnonzero(known)
    labels = np.asarray([_BACH_CLASSES.index(names[label]) for label in stored[part_rows]], dtype=np.int64)
    paths = image_fields(part, "image", "path").to_pylist()  # the images stay on disk
    files = [Path(paths[row] or "").name for row in part_rows]

    notes = []
    order = np.lexsort((np.asarray(files), labels))
    if len(set(files)) == len(files) == 400 and all(_BACH_FILE.match(file) for file in files):
        held_out = np.zeros(len(order), dtype=bool)
        for first, last in _BACH_HELD_OUT:
            held_out[first:last] = True
        test_rows, rest = order[held_out], order[~held_out]
        val_rows = np.concatenate([rest[labels[rest] == label][-10:] for label in range(4)])
        train_rows = np.setdiff1d(rest, val_rows)
        notes.append("test images are of other patients than training images (eva's split)")
    else:
        train_rows, val_rows, test_rows = split_rows(labels, [228 / 400, 40 / 400, 132 / 400], salt="BACH")
        notes.append("the images carry no BACH file names, so the split is stratified by class and patients may be shared")
    size = protocol_of("BACH").image_size

    def decode(rows: np.ndarray) -> np.ndarray:
        from diffvit.data.images import squeezed

        out = np.empty((len(rows), 3, size, size), dtype=np.uint8)
        for i, image in enumerate(decoded(part, "image", part_rows[rows])):
            out[i] = squeezed(image, size)
        return out

    return Raw(
        classes=_BACH_CLASSES,
        labels=labels,
        # Not in class order: the first rows of a split shall stand for all of it.
        rows={"train": mixed(train_rows), "val": mixed(val_rows), "test": mixed(test_rows)},
        decode=decode,
        notes=notes,
        cache_key=f"{fingerprint(part)}-{size}",
    )


# Standard deviation of the noise in digits-noisy, pixels in 0-1, chosen on the validation split: small models still learn.
DIGITS_NOISE = 0.35
_DIGITS_NOISE_SEED = 20_241_005


@loader("digits")
def _digits(data_root: Path | None) -> Raw:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels: 70 % training, 10 % validation, 20 % test."""
    return _digits_with_noise(0.0)


@loader("digits-noisy")
def _digits_noisy(data_root: Path | None) -> Raw:
    """The digits with Gaussian noise on every pixel, drawn once from a seed of its own."""
    raw = _digits_with_noise(DIGITS_NOISE)
    raw.notes.append(f"Gaussian noise of standard deviation {DIGITS_NOISE:g} (pixels in 0-1) on all splits")
    return raw


def _digits_with_noise(noise: float) -> Raw:
    # scikit-learn's own file, because importing scikit-learn takes seconds in every process: 64 pixels of 0 to 16 and a label a row.
    package = importlib.util.find_spec("sklearn")
    assert package and package.submodule_search_locations
    rows = np.loadtxt(Path(package.submodule_search_locations[0], "datasets", "data", "digits.csv.gz"), delimiter=",")
    images = rows[:, :64].reshape(-1, 8, 8) / 16.0
    if noise:
        images = images + np.random.RandomState(_DIGITS_NOISE_SEED).standard_normal(images.shape) * noise
    pixels = np.clip(np.rint(images * 255), 0, 255).astype(np.uint8)[:, None]
    labels = rows[:, 64].astype(np.int64)
    train, val, test = split_rows(labels, [0.7, 0.1, 0.2], salt="digits")
    return Raw(
        classes=[str(digit) for digit in range(10)],
        labels=labels,
        rows={"train": train, "val": val, "test": test},
        decode=lambda rows: pixels[rows],
    )
