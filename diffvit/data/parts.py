"""The images of a data set that a grid file defines: the splits of its source, with their labels aligned, drawn where they are missing."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from diffvit.checks import text
from diffvit.data.folder import class_folders, read_file, split_folders
from diffvit.data.hub import MOST_CLASSES, encoded, fingerprint, labels_of, load_hub
from diffvit.data.images import decode_rgb, squeezed
from diffvit.data.sources import Raw
from diffvit.data.splits import mixed, split_rows
from diffvit.errors import UserError, shown
from diffvit.machine.host import memory_bytes

if TYPE_CHECKING:
    from diffvit.data.user_datasets import UserDataset

ROLES = ("train", "validation", "test")
VALIDATION = ("validation", "val", "valid", "dev")  # what others call it

# Parts that are drawn: of all images, or of the training split where a test split is there.
_ALL_THREE, _WITHOUT_TEST = (0.7, 0.1, 0.2), (0.9, 0.1)


@dataclass(frozen=True)
class _Part:
    """A split of the source.

    Attributes:
        labels: int64 [images]. names: of the labels, or None for numbers without names.
        encoded: the files of rows, and what messages call each.
        key: changes with the content.
    """

    labels: np.ndarray
    names: Sequence[str] | None
    encoded: Callable[[np.ndarray], Iterator[tuple[bytes, str]]]
    key: str


def _hub_parts(dataset: UserDataset, data_root: Path | None) -> dict[str, _Part]:
    roles: dict[str, str] = {}

    def choose(available: Sequence[str]) -> Sequence[str]:
        roles.update(dataset.roles(available))
        return list(roles.values())

    mend = (
        "its entry in the grid file names columns with image: and label:, and splits with splits:; "
        "stratified leaves a test split without labels aside."
    )
    parts = load_hub(dataset.hub, data_root, dataset.image, dataset.label, choose, dataset.config or None, mend)
    return {
        role: _Part(
            *labels_of(parts[split], dataset.label, MOST_CLASSES, mend),
            functools.partial(encoded, parts[split], dataset.image), fingerprint(parts[split]),
        )
        for role, split in roles.items()
    }  # fmt: skip


def _folder_parts(dataset: UserDataset) -> dict[str, _Part]:
    root = Path(dataset.folder)
    named = isinstance(dataset.splits, tuple) and bool(dataset.splits)
    splits = split_folders(root, known=(*ROLES, *VALIDATION), named=named)
    parts = {}
    for role, split in dataset.roles(splits or [""]).items():
        names, labels, files, key = class_folders(root / split)
        parts[role] = _Part(np.asarray(labels), names, functools.partial(_read_files, files), key)
    return parts


def _read_files(files: Sequence[Path], rows: np.ndarray) -> Iterator[tuple[bytes, str]]:
    return (read_file(files[row]) for row in rows)


@functools.lru_cache(maxsize=4)
def raw_of(dataset: UserDataset, data_root: Path | None) -> Raw:
    """The data set before decoding. Raises UserError for data that are not what the entry says, or cannot be trained on."""
    parts = _folder_parts(dataset) if dataset.folder else _hub_parts(dataset, data_root)
    parts = {role: parts[role] for role in ROLES if role in parts}
    labels_by_role, classes, notes = _aligned(dataset, parts)
    labels = np.concatenate(list(labels_by_role.values()))
    rows, drawn = _split(dataset, labels_by_role)
    _check_split(dataset, labels, rows, classes)
    firsts = dict(zip(parts, np.cumsum([0, *map(len, labels_by_role.values())]), strict=False))

    @functools.cache
    def side() -> int:
        stored = _stored_side(parts.values(), dataset.image_size)
        needed, memory = 3 * stored**2 * len(labels), memory_bytes()
        if needed > memory:
            raise UserError(
                f"{dataset.name} takes {needed / 1e9:.1f} GB while it is decoded, and this machine has {memory / 1e9:.1f} GB of memory.",
                "give a smaller image_size, or bring the cache folder, DIFFVIT_CACHE, from a larger machine.",
            )
        return stored

    def decode(rows: np.ndarray) -> np.ndarray:
        out = np.empty((len(rows), 3, side(), side()), dtype=np.uint8)
        role = [role for role, first in firsts.items() if first <= rows[0]][-1]
        for i, (content, file) in enumerate(parts[role].encoded(rows - firsts[role])):
            out[i] = squeezed(decode_rgb(content, file), side())
        return out

    digest = hashlib.sha256(json.dumps([dataset.image_size, *(part.key for part in parts.values())]).encode())
    for split in rows.values():
        digest.update(split.tobytes())
    counted = f"classes: {len(classes)}, images: {[len(each) for each in rows.values()]}"  # as an entry may have it
    return Raw(
        classes,
        labels,
        rows,
        decode,
        [counted, f"the classes are {_some(classes)}", *notes, *drawn],
        f"{digest.hexdigest()[:16]}-{dataset.image_size}",
    )


def _aligned(dataset: UserDataset, parts: Mapping[str, _Part]) -> tuple[dict[str, np.ndarray], list[str], list[str]]:
    """Labels of each part from 0 without gaps, the classes' names, and notes. Raises UserError."""
    names = parts["train"].names
    labels = {}
    for role, part in parts.items():
        labels[role] = part.labels
        if part.names != names:
            places = {name: place for place, name in enumerate(names or ())}
            if (strange := [name for name in part.names or () if name not in places]) or not part.names:
                raise UserError(
                    f"the {role} split of {dataset.name} has classes that its training split has not: {_some(strange) or 'numbers'}.",
                    "the splits must be of the same classes, spelled alike.",
                )
            labels[role] = np.asarray([places[name] for name in part.names], dtype=np.int64)[part.labels]
    used = np.unique(np.concatenate(list(labels.values())))
    if untrained := sorted({*used.tolist()} - {*labels["train"].tolist()}):
        listed = _some([str(names[label] if names is not None else label) for label in untrained])
        raise UserError(
            f"no training image of {dataset.name} is of the class {listed}.",
            "each class needs some; splits: stratified leaves a test split without labels aside.",
        )
    notes = []
    if names is not None and (unused := np.setdiff1d(np.arange(len(names)), used)).size:
        notes.append(f"classes without any image are left out: {_some([names[label] for label in unused])}")
    classes = [str(names[label]) if names is not None else str(label) for label in used.tolist()]
    given = dataset.classes
    if isinstance(given, tuple) and given and len(given) == len(classes) and names is None:
        classes = list(given)
    elif given and given not in (len(classes), tuple(classes)):
        raise UserError(
            f"{dataset.name} has the {len(classes)} classes {_some(classes)}, and its entry in the grid file says {shown(given)}.",
            "correct classes there, or take it out.",
        )
    if len(classes) < 2:
        few = _some(classes) or "none"
        raise UserError(f"{dataset.name} has fewer than two classes: {few}.", "there must be two at least to tell apart.")
    if wrong := [name for name in classes if not name.strip() or text()(name)]:
        raise UserError(f"a class of {dataset.name} is named {shown(wrong[0])}.", "give it a name that can be printed.")
    return {role: np.searchsorted(used, each) for role, each in labels.items()}, classes, notes


def _split(dataset: UserDataset, labels: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
    """The rows of the training, validation and test split, and notes on what was drawn. Rows are numbered through all parts."""
    ends = np.cumsum([len(each) for each in labels.values()])
    rows_of = dict(zip(labels, np.split(np.arange(ends[-1]), ends[:-1]), strict=True))
    notes = []
    if "test" not in labels:
        train, val, test = split_rows(labels["train"], _ALL_THREE, salt=dataset.name)
        notes.append("the splits are drawn, 70, 10 and 20 % of each class: images of one patient or scene may be in several")
    elif "validation" not in labels:
        train, val = split_rows(labels["train"], _WITHOUT_TEST, salt=dataset.name)
        test = rows_of["test"]
        notes.append("validation images are drawn, 10 % of each class of the training split")
    else:
        train, val, test = (rows_of[role] for role in ROLES)
    # Not in class order: the first rows of a split shall stand for all of it.
    return {"train": mixed(train), "val": mixed(val), "test": mixed(test)}, notes


def _check_split(dataset: UserDataset, labels: np.ndarray, rows: Mapping[str, np.ndarray], classes: Sequence[str]) -> None:
    """Raises UserError for splits that are not as the entry says, or without images."""
    counts = np.bincount(labels, minlength=len(classes))
    for split, title in (("train", "training"), ("val", "validation"), ("test", "test")):
        missing = np.setdiff1d(np.arange(len(classes)), labels[rows[split]])
        if len(missing) and (split != "val" or len(missing) == len(classes)):
            few = int(missing[np.argmin(counts[missing])])
            raise UserError(
                f"the {title} split of {dataset.name} has no image of the class {classes[few]}, of which there are {counts[few]}.",
                "it takes about ten images of each class for drawn splits; in those of its own each class needs one.",
            )
    images = tuple(len(rows[split]) for split in ("train", "val", "test"))
    if dataset.images and images != dataset.images:
        raise UserError(
            f"{dataset.name} has {list(images)} images for training, validation and test, and its entry in the grid file says "
            f"{list(dataset.images)}.",
            "correct images there, or take it out.",
        )


def _stored_side(parts: Iterable[_Part], image_size: int) -> int:
    """The side at which decoded images are kept: their own, if all are squares of one size that is not larger than the model's."""
    side = 0
    for part in parts:
        for content, _ in part.encoded(np.arange(len(part.labels))):
            try:
                with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(content)) as image:
                    width, height = image.size
            except Exception:  # decoding says what is wrong with it
                return image_size
            side = side or width
            if not side == width == height <= image_size:
                return image_size
    return side


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(str, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
