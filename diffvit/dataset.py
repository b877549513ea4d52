"""Data sets: loading, splitting, caching, batching.

`load("CIFAR-100")` gives a Dataset of three splits whose images are uint8 tensors at their stored size. A step's batch is
moved, resized and normalised on the training device by Prepare. A new data set is one function here, marked with
@loader, and one Protocol in protocol.py.

Splits depend on the data only, never on a run's seed: rows are put in order by a hash of their position.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from diffvit.corruptions import add_gaussian
from diffvit.errors import UserError
from diffvit.ledger import write_atomically, write_fault
from diffvit.protocol import Protocol, protocol_of, stable_seed

# Raise it when decoding, splitting or resizing changes: cached arrays of other versions are not used.
_CACHE_VERSION = 2

_SPLITS = ("train", "val", "test")


class ImageSet(TorchDataset):
    """One split in memory.

    Attributes:
        pixels: uint8 [images, channels, height, width].
        labels: int64 [images].
    """

    def __init__(self, pixels: Tensor, labels: Tensor):
        self.pixels = pixels
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return self.pixels[row], self.labels[row]

    def __getitems__(self, rows: Tensor | list[int]) -> tuple[Tensor, Tensor]:
        """A whole batch at once: what DataLoader calls where it is there."""
        index = torch.as_tensor(rows, dtype=torch.int64)
        if self.pixels.is_cuda:
            index = index.pin_memory().to(self.pixels.device, non_blocking=True)  # the host does not wait for the GPU
        return self.pixels.index_select(0, index), self.labels.index_select(0, index)

    def to(self, device: str | torch.device) -> ImageSet:
        """The same split on a device."""
        return ImageSet(self.pixels.to(device), self.labels.to(device))

    def head(self, rows: int | None) -> ImageSet:
        """The first `rows` images, or all."""
        return self if rows is None else ImageSet(self.pixels[:rows], self.labels[:rows])


@dataclass(frozen=True)
class Dataset:
    """A data set ready for training.

    Attributes:
        classes: class names, in label order.
        mean, std: per channel, pixels in 0-1, of the training split.
        fingerprint: hash over all pixels and labels of the three splits, in order.
        notes: what a reader of a result must know about the data.
    """

    name: str
    train: ImageSet
    val: ImageSet
    test: ImageSet
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Raw:
    """What a loader function returns: labels of all rows and their split are cheap, pixels are made on demand."""

    classes: Sequence[str]
    labels: np.ndarray
    rows: dict[str, np.ndarray]
    decode: Callable[[np.ndarray], np.ndarray]
    notes: list[str] = field(default_factory=list)
    cache_key: str | None = None


_LOADERS: dict[str, Callable[[Path | None], _Raw]] = {}
_HUB_NAMES: dict[str, str] = {}


def loader(name: str, hub: str | None = None) -> Callable[[Callable[[Path | None], _Raw]], Callable[[Path | None], _Raw]]:
    """Marks the function that loads a data set; it takes the data root. `hub` is where the Hugging Face hub has it."""

    def mark(function: Callable[[Path | None], _Raw]) -> Callable[[Path | None], _Raw]:
        _LOADERS[name] = function
        if hub:
            _HUB_NAMES[name] = hub
        return function

    return mark


def load(name: str, data_root: str | Path | None = None) -> Dataset:
    """A data set by name, decoded once per process and, where decoding is slow, once per machine.

    Args:
        name: a key of PROTOCOLS.
        data_root: folder that holds hub data sets as `user/name`; default $DIFFVIT_DATA, then the hub.

    Raises:
        UserError: the data are missing, unreadable or not what the protocol says.
    """
    return _load(name, _data_root(data_root))


def at_hand(name: str, data_root: str | Path | None = None) -> bool:
    """Whether a data set can be loaded without the hub. Raises UserError for a data root that does not exist."""
    root = _data_root(data_root)
    if root is not None and not root.is_dir():
        raise UserError(f"there is no data folder {root}.", "check --data_root or DIFFVIT_DATA.")
    return name not in _HUB_NAMES or (root is not None and (root / _HUB_NAMES[name]).is_dir())


def hub_name(name: str) -> str | None:
    """Where the Hugging Face hub has a data set, user/name; None where it comes from elsewhere or is unknown."""
    return _HUB_NAMES.get(name)


def _data_root(given: str | Path | None) -> Path | None:
    root = given or os.environ.get("DIFFVIT_DATA")
    return Path(os.path.expanduser(root)).resolve() if root else None


@functools.lru_cache(maxsize=4)
def _load(name: str, data_root: Path | None) -> Dataset:
    raw = _LOADERS[name](data_root)
    expected = protocol_of(name).images
    found = tuple(len(raw.rows[split]) for split in _SPLITS)
    if found != expected:
        raise UserError(
            f"{name} has {found[0]} training, {found[1]} validation and {found[2]} test images instead of "
            f"{expected[0]}, {expected[1]} and {expected[2]}.",
            "the copy is truncated or another data set: download it again.",
        )
    arrays, facts = _cached_arrays(name, raw) if raw.cache_key else _arrays(name, raw)
    splits = {
        split: ImageSet(torch.from_numpy(arrays[f"{split}_pixels"]), torch.from_numpy(arrays[f"{split}_labels"])) for split in _SPLITS
    }
    return Dataset(
        name=name,
        classes=tuple(raw.classes),
        mean=tuple(facts["mean"]),
        std=tuple(facts["std"]),
        fingerprint=facts["fingerprint"],
        notes=tuple(raw.notes),
        **splits,
    )


def _arrays(name: str, raw: _Raw) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    arrays = {}
    for split in _SPLITS:
        try:
            arrays[f"{split}_pixels"] = np.ascontiguousarray(raw.decode(raw.rows[split]))
        except UserError:
            raise
        except Exception as error:  # a damaged file of the data set shows itself in many ways
            raise UserError(
                f"an image of {name}'s {split} split cannot be decoded: {_first_sentence(error)}.", "download the data again."
            ) from error
        arrays[f"{split}_labels"] = raw.labels[raw.rows[split]].astype(np.int64)
    digest = hashlib.sha256()
    for key, array in arrays.items():
        digest.update(f"{key}{array.shape}".encode())
        digest.update(array.data)
    mean, std = _channel_statistics(arrays["train_pixels"])
    return arrays, {"fingerprint": digest.hexdigest()[:16], "mean": mean, "std": std}


def _channel_statistics(pixels: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, pixels in 0-1, from exact counts of the 256 values."""
    values = np.arange(256) / 255
    mean, std = [], []
    for channel in range(pixels.shape[1]):
        weights = np.bincount(pixels[:, channel].ravel(), minlength=256) / pixels[:, channel].size
        mean.append(float(weights @ values))
        std.append(float(np.sqrt(weights @ (values - mean[-1]) ** 2)))
    return mean, std


def cache_folder() -> Path:
    """Where decoded images are kept: $DIFFVIT_CACHE, or diffvit in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(os.environ.get("DIFFVIT_CACHE") or Path(base) / "diffvit"))


def _cached_arrays(name: str, raw: _Raw) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The decoded splits, memory-mapped, so that runs on one machine share them."""
    folder = cache_folder() / f"{name}-{raw.cache_key}-v{_CACHE_VERSION}"
    if not os.path.lexists(folder):
        _fill_cache(name, raw, folder)
    try:
        arrays = {key: _mapped(folder / f"{key}.npy") for key in (f"{split}_{part}" for split in _SPLITS for part in ("pixels", "labels"))}
        facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        facts = {"fingerprint": str(facts["fingerprint"]), **{key: [float(value) for value in facts[key]] for key in ("mean", "std")}}
        for split in _SPLITS:
            pixels, labels = arrays[f"{split}_pixels"], arrays[f"{split}_labels"]
            if pixels.dtype != np.uint8 or len(pixels) != len(labels) or not np.array_equal(labels, raw.labels[raw.rows[split]]):
                raise ValueError(f"its {split} split is another one")
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or _first_sentence(error)
        raise UserError(
            f"the decoded images of {name} in {folder} cannot be used: {why}.",
            "delete that folder, or set DIFFVIT_CACHE.",
        ) from error
    return arrays, facts


def _fill_cache(name: str, raw: _Raw, folder: Path) -> None:
    """Decodes the images into a new folder of the cache."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
    except OSError as error:
        raise UserError(f"the cache folder {folder.parent} cannot be written: {error.strerror}.", "set DIFFVIT_CACHE.") from error
    try:
        arrays, facts = _arrays(name, raw)
        filled = aside / "filled"  # a temporary folder is its maker's alone; this one is for all who share the cache
        filled.mkdir()
        for key, array in arrays.items():
            write_atomically(filled / f"{key}.npy", functools.partial(np.save, arr=array))
        write_atomically(filled / "facts.json", json.dumps(facts).encode())
        filled.rename(folder)
    except OSError as error:
        if not folder.is_dir():  # else another process was first, which is as good
            raise UserError(
                f"{name} cannot be kept in {folder.parent}: {error.strerror}.", "set DIFFVIT_CACHE to a folder with room."
            ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _mapped(path: Path) -> np.ndarray:
    """An array, memory-mapped where the file system (some of FUSE's and 9p do not) can."""
    try:
        return np.load(path, mmap_mode="c")  # copy-on-write: torch wants writable memory, and the file stays as it is
    except OSError as error:
        if error.errno not in (errno.ENODEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        return np.load(path)


# ---------------------------------------------------------------------------------------------------- the data sets


@loader("CIFAR-100", hub="uoft-cs/cifar100")
def _cifar100(data_root: Path | None) -> _Raw:
    """uoft-cs/cifar100: 50 of each class's 500 training images become validation."""
    parts = _load_hub("uoft-cs/cifar100", data_root, columns={"img", "fine_label"})
    train, test = parts["train"], parts["test"]
    (train_labels, names), (test_labels, test_names) = (_labels(part, "fine_label", classes=100) for part in (train, test))
    if names != test_names or len(names or range(100)) != 100:
        raise UserError("the labels of uoft-cs/cifar100 have not the same 100 names in both splits.", "download it again.")
    labels = np.concatenate([train_labels, test_labels])
    train_rows, val_rows = split_rows(labels[: len(train)], [0.9, 0.1], salt="CIFAR-100")
    test_rows = np.arange(len(train), len(labels))

    def decode(rows: np.ndarray) -> np.ndarray:
        part, first = (test, len(train)) if rows[0] >= len(train) else (train, 0)
        out = np.empty((len(rows), 3, 32, 32), dtype=np.uint8)
        for i, image in enumerate(_decoded(part, "img", rows - first)):
            if image.size != (32, 32):
                raise UserError(f"an image of CIFAR-100 has {image.width} x {image.height} pixels, not 32 x 32.", "it is another data set.")
            out[i] = np.asarray(image).transpose(2, 0, 1)
        return out

    return _Raw(
        classes=names or [str(label) for label in range(100)],
        labels=labels,
        rows={"train": train_rows, "val": val_rows, "test": test_rows},
        decode=decode,
        cache_key=f"{train._fingerprint}{test._fingerprint}",
    )


# The rows, in file-name order, that kaiko's eva holds out: a split of BACH's 400 labelled images by patient.
_BACH_HELD_OUT = ((41, 59), (60, 90), (139, 169), (240, 258), (260, 273), (345, 368))
_BACH_CLASSES = ("Benign", "InSitu", "Invasive", "Normal")
_BACH_FILE = re.compile(r"^(b|is|iv|n)(\d{3})\.\w+$")


@loader("BACH", hub="1aurent/BACH")
def _bach(data_root: Path | None) -> _Raw:
    """1aurent/BACH: the 400 labelled images; its own test split has no labels and is not used.

    eva's held-out patients are the test set. Ten images a class, neighbours in file-name order and so mostly of the same
    patients, are taken off the rest for validation.
    """
    part = _load_hub("1aurent/BACH", data_root, columns={"image", "label"}, splits=("train",))["train"]
    stored, names = _labels(part, "label")
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
    paths = _image_fields(part, "image", "path").to_pylist()  # the images stay on disk
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
        from PIL.Image import Resampling

        out = np.empty((len(rows), 3, size, size), dtype=np.uint8)
        for i, image in enumerate(_decoded(part, "image", part_rows[rows])):
            # The whole slide, squeezed to a square: its label holds for all of it, so nothing is cropped away.
            out[i] = np.asarray(image.resize((size, size), Resampling.BILINEAR)).transpose(2, 0, 1)
        return out

    return _Raw(
        classes=_BACH_CLASSES,
        labels=labels,
        # Not in class order: the first rows of a split shall stand for all of it.
        rows={"train": _mixed(train_rows), "val": _mixed(val_rows), "test": _mixed(test_rows)},
        decode=decode,
        notes=notes,
        cache_key=f"{part._fingerprint}-{size}",
    )


# Standard deviation of the noise in digits-noisy, pixels in 0-1, chosen on the validation split: small models still learn.
DIGITS_NOISE = 0.35
_DIGITS_NOISE_SEED = 20_241_005


@loader("digits")
def _digits(data_root: Path | None) -> _Raw:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels: 70 % training, 10 % validation, 20 % test."""
    return _digits_with_noise(0.0)


@loader("digits-noisy")
def _digits_noisy(data_root: Path | None) -> _Raw:
    """The digits with Gaussian noise on every pixel, drawn once from a seed of its own."""
    raw = _digits_with_noise(DIGITS_NOISE)
    raw.notes.append(f"Gaussian noise of standard deviation {DIGITS_NOISE:g} (pixels in 0-1) on all splits")
    return raw


def _digits_with_noise(noise: float) -> _Raw:
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
    return _Raw(
        classes=[str(digit) for digit in range(10)],
        labels=labels,
        rows={"train": train, "val": val, "test": test},
        decode=lambda rows: pixels[rows],
    )


def _load_hub(name: str, data_root: Path | None, columns: set[str], splits: Sequence[str] = ("train", "test")) -> Any:
    """A hub data set, from the data root where one is given, with images left encoded."""
    import datasets

    path = name
    if data_root is not None:
        path = str(data_root / name)
        if not Path(path).is_dir():
            raise UserError(f"there is no data set folder {path}.", f"put {name} there, or leave out --data_root to load it from the hub.")
    datasets.disable_progress_bars()
    unreachable = None if data_root else _why_unreachable(name)
    try:
        with _client_kept_quiet(offline=unreachable is not None):
            parts = datasets.load_dataset(path)
    except Exception as error:  # the client's errors are of many kinds: network, Parquet, schema
        raise _loading_failed(name, path, error, unreachable) from error
    for split in splits:
        if split not in parts or not columns <= set(parts[split].column_names):
            found = f"columns {', '.join(sorted(parts[split].column_names))}" if split in parts else f"splits {', '.join(sorted(parts))}"
            raise UserError(
                f"{path} has no split {split!r} with columns {', '.join(sorted(columns))}: it has {found}.",
                f"it must be in the schema of {name}.",
            )
    image_column = next(iter(columns - {"label", "fine_label"}))
    try:
        return {split: parts[split].cast_column(image_column, datasets.Image(decode=False)) for split in splits}
    except Exception as error:  # Arrow's, of several kinds
        found = str(parts[splits[0]].features[image_column])[:100]
        raise UserError(
            f"the column {image_column} of {path} holds no encoded images but {found}.", f"it must be in the schema of {name}."
        ) from error


_PATIENCE = 5.0  # seconds for the hub's first answer


def _why_unreachable(name: str) -> str | None:
    """Asks the hub for a data set, once. Returns why there is no answer, or None if there is one: an error of the hub's is one too."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    answer: list[str | None] = []

    def ask() -> None:
        try:
            HfApi().dataset_info(name, timeout=_PATIENCE)
        except Exception as error:  # of the client, and of the library below it, which changes with its version
            answer.append(None if getattr(error, "response", None) is not None else _first_sentence(error))
        else:
            answer.append(None)

    # A thread, for the client bounds neither the search for the host's address nor the number of addresses that it tries.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_PATIENCE)
    return answer[0] if answer else f"no answer within {_PATIENCE:g} s"


@contextlib.contextmanager
def _client_kept_quiet(offline: bool) -> Iterator[None]:
    """No raw lines of the hub's clients on stderr inside; offline, they try no network and take what they have kept."""
    import datasets
    from huggingface_hub import constants

    loggers = [logging.getLogger(library) for library in ("datasets", "huggingface_hub")]
    levels, before = [logger.level for logger in loggers], (constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)
    if offline:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)  # what fails is raised too
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _loading_failed(name: str, path: str, error: BaseException, unreachable: str | None) -> UserError:
    """What a user can do about a data set that cannot be loaded."""
    import datasets

    from diffvit.images import is_lfs_pointer, lfs_pointer

    kept = Path(datasets.config.HF_DATASETS_CACHE)
    if fault := write_fault(kept):
        return UserError(
            f"the Hugging Face cache {kept}, which {name} is unpacked into, cannot be written: {fault.strerror}.",
            "set HF_HOME to a folder that can be written and has room.",
        )
    cause: BaseException | None = error
    while cause is not None:  # a full disk, or another user's files, which are locked for reading too
        if isinstance(cause, OSError) and (cause.errno == errno.ENOSPC or str(cause.filename).startswith(f"{kept}{os.sep}")):
            return UserError(
                f"{name} cannot be unpacked into the Hugging Face cache {kept}: {cause.strerror}.",
                "set HF_HOME to a folder of your own with room.",
            )
        cause = cause.__cause__ or cause.__context__
    if unreachable is not None:
        return UserError(
            f"{name} is not on this machine, and the Hugging Face hub cannot be reached: {unreachable}.",
            "check the connection, the proxy and HF_HUB_OFFLINE, or give a local copy with --data_root.",
        )
    for file in sorted(Path(path).rglob("*")) if Path(path).is_dir() else ():
        with contextlib.suppress(OSError), open(file, "rb") as opened:
            if is_lfs_pointer(opened.read(100)):
                return lfs_pointer(str(file))
    return UserError(f"{name} cannot be loaded from {path}: {_first_sentence(error)}.", "download it again.")


def _labels(part: Any, column: str, classes: int = 0) -> tuple[np.ndarray, list[str] | None]:
    """A column of labels as int64 and the classes' names, None where they are numbers without names.

    Args:
        classes: how many there are, where they may be numbers without names.
    """
    values, names = part.with_format("arrow")[:][column], getattr(part.features[column], "names", None)
    if values.null_count:
        raise UserError(f"{values.null_count} of {len(values)} labels in the column {column} are missing.", "download the data set again.")
    numbers = values.to_numpy()
    if numbers.dtype.kind == "O" and all(isinstance(value, str) for value in numbers):
        texts, numbers = np.unique(numbers.astype(str), return_inverse=True)
        names = texts.tolist()
    if names is None and not classes:
        raise UserError(
            f"the labels in the column {column} have no names, and nothing says which is which class.",
            "give the names as text, or write the Parquet with the `datasets` library, which keeps them.",
        )
    classes = classes if names is None else len(names)
    if numbers.dtype.kind not in "iuf" or not ((numbers >= 0) & (numbers < classes) & (numbers == np.floor(numbers))).all():
        raise UserError(
            f"the labels in the column {column} are not whole numbers from 0 to {classes - 1} or names of classes.",
            "download the data set again.",
        )
    return numbers.astype(np.int64), names


def _image_fields(part: Any, column: str, field: str) -> Any:
    """A field of all rows' images, "bytes" or "path", as an Arrow column, in chunks: together they may exceed what one array can hold."""
    import pyarrow.compute

    return pyarrow.compute.struct_field(part.with_format("arrow")[:][column], field)


def _decoded(part: Any, column: str, rows: np.ndarray) -> Iterator[Any]:
    """The images of some rows, each as an RGB image of Pillow. Raises UserError, which names the file."""
    from diffvit.images import decode_rgb

    contents, paths = (_image_fields(part, column, field) for field in ("bytes", "path"))
    for row in map(int, rows):
        content, path = contents[row].as_py(), paths[row].as_py()
        file = path or f"the image in row {row} of the {part.split} split"
        if content is None:
            try:
                content = Path(path or "").read_bytes()
            except OSError as error:
                raise UserError(f"{file} cannot be read: {error.strerror}.", "download the data again.") from error
        yield decode_rgb(content, file)


def _first_sentence(error: BaseException) -> str:
    root = error.__cause__ or error
    text = " ".join(str(root).split()) or type(root).__name__
    return text.split(". ")[0].rstrip(".")[:200]


def _mixed(rows: np.ndarray) -> np.ndarray:
    return np.asarray(sorted(rows.tolist(), key=lambda row: stable_seed("mixed", row)))


def split_rows(labels: np.ndarray, fractions: Sequence[float], salt: str) -> list[np.ndarray]:
    """Row numbers of stratified parts, disjoint and sorted; each class is cut at rounded cumulative fractions.

    The order within a class is that of a hash of the row number, so that the split is the same for ever.
    """
    parts: list[list[np.ndarray]] = [[] for _ in fractions]
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        rows = np.asarray(sorted(rows.tolist(), key=lambda row: stable_seed("split", salt, row)))
        cuts = np.rint(np.cumsum(fractions)[:-1] * len(rows)).astype(int)
        for part, chunk in zip(parts, np.split(rows, cuts), strict=True):
            part.append(chunk)
    return [np.sort(np.concatenate(part)) for part in parts]


# -------------------------------------------------------------------------------------------- noise in the training split

_ROWS_AT_ONCE = 1024


def with_training_noise(data: Dataset, protocol: Protocol, seed: int) -> tuple[Dataset, Tensor]:
    """The data with the protocol's label_noise and input_noise in the training split; without either, `data` itself.

    The noise depends on the run's seed and on neither model nor size, so that all of them meet the same. Mean and standard
    deviation stay those of the clean images: validation and test images are clean, and normalised by the same numbers.

    Args:
        seed: of the run.

    Returns:
        The data, and the rows of the training split with a false label, int64, in order.
    """
    train, notes, count = data.train, [], protocol.false_labels(len(data.train))
    pixels, labels, rows = train.pixels, train.labels, torch.empty(0, dtype=torch.int64)
    if count:
        generator = torch.Generator().manual_seed(stable_seed("label-noise", seed))
        rows = torch.randperm(len(train), generator=generator)[:count].sort().values
        # A step of 1 to classes - 1 round the classes never ends at the true one. A step for every row: a row that is false at a
        # lower share has the same false label at a higher one.
        steps = torch.randint(1, len(data.classes), (len(train),), generator=generator)
        labels = labels.clone()
        labels[rows] = (labels[rows] + steps[rows]) % len(data.classes)
        notes.append(f"{count} of {len(train)} training labels are false")
    if protocol.input_noise:
        generator = torch.Generator().manual_seed(stable_seed("input-noise", seed))
        pixels = torch.cat([add_gaussian(some, protocol.input_noise, generator) for some in pixels.split(_ROWS_AT_ONCE)])
        notes.append(f"Gaussian noise of standard deviation {protocol.input_noise:g} (pixels in 0-1) on training images")
    if not notes:
        return data, rows
    return dataclasses.replace(data, train=ImageSet(pixels, labels), notes=(*data.notes, *notes)), rows


# ---------------------------------------------------------------------------------------------------------- batches


class StepBatches(Sampler[Tensor]):
    """The rows of every step's batch, int64 [images]: epochs of permutations drawn from (seed, epoch), the last partial batch kept.

    Args:
        rows: size of the split.
        steps: (first, last), counted from 1; a resumed run starts in the middle.
        part: (rank, workers): each worker takes every workers-th row of each batch.
    """

    def __init__(self, rows: int, batch_size: int, seed: int, steps: tuple[int, int], part: tuple[int, int] = (0, 1), salt: str = ""):
        self.rows, self.batch_size, self.seed, self.salt = rows, batch_size, seed, salt
        self.first, self.last = steps
        self.rank, self.workers = part
        self.per_epoch = -(-rows // batch_size)

    def __len__(self) -> int:
        return self.last - self.first + 1

    def batch_length(self, step: int) -> int:
        """Images in the whole batch of a step, all workers together."""
        start = (step - 1) % self.per_epoch * self.batch_size
        return min(self.batch_size, self.rows - start)

    def lengths(self) -> set[int]:
        """The lengths that this worker's part of a batch has, in a whole batch and in an epoch's last."""
        return {len(range(self.rank, self.batch_length(step), self.workers)) for step in (1, self.per_epoch)}

    def __iter__(self) -> Iterator[Tensor]:
        drawn, order = -1, torch.empty(0)
        for step in range(self.first, self.last + 1):
            epoch, position = divmod(step - 1, self.per_epoch)
            if epoch != drawn:
                generator = torch.Generator().manual_seed(stable_seed("order", self.seed, self.salt, epoch))
                drawn, order = epoch, torch.randperm(self.rows, generator=generator)
            batch = order[position * self.batch_size : (position + 1) * self.batch_size]
            yield batch[self.rank :: self.workers]


def make_loader(images: ImageSet, batches: StepBatches | None = None, batch_size: int = 1) -> DataLoader:
    """A DataLoader of (uint8 pixels, labels), one item a step of `batches`; without them, all rows once in order."""
    if batches is not None:
        # A DataLoader says that it wants lists; it hands a batch on as it is.
        return DataLoader(images, batch_sampler=cast(Any, batches), collate_fn=_as_is)
    return DataLoader(images, batch_size=batch_size, collate_fn=_as_is)


def _as_is(batch: Any) -> Any:
    return batch


class Prepare:
    """uint8 [B, C, height, width] -> float32 [B, C, image_size, image_size], on the pixels' device.

    Resized with antialiased bilinear interpolation (PIL's result to 1/255) where the size differs, then normalised.
    """

    def __init__(self, image_size: int, mean: Sequence[float], std: Sequence[float], device: str | torch.device = "cpu"):
        self.size = (image_size, image_size)
        self.mean = 255 * torch.tensor(mean, device=device).view(1, -1, 1, 1)
        self.std = 255 * torch.tensor(std, device=device).view(1, -1, 1, 1)

    def __call__(self, pixels: Tensor) -> Tensor:
        x = pixels.to(self.mean.device, torch.float32)
        if x.shape[-2:] != self.size:
            x = F.interpolate(x, size=self.size, mode="bilinear", antialias=True, align_corners=False)
        return (x - self.mean) / self.std
