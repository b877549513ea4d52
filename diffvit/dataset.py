"""Data sets by name: images as uint8, their splits, statistics and fingerprint."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from diffvit.data.cache import SPLITS, cached_arrays, decode_arrays
from diffvit.data.corruptions import add_gaussian
from diffvit.data.sources import SOURCES, find_data_root
from diffvit.errors import UserError
from diffvit.protocol import Protocol, protocol_of, stable_seed


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
        """A whole batch at once, which DataLoader calls where a data set has it."""
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
        notes: sentences about the data, repeated in a run's result.
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


def load(name: str, data_root: str | Path | None = None) -> Dataset:
    """Load a data set, decoded once per process and, where decoding is slow, once per machine.

    Args:
        name: a key of SOURCES.
        data_root: folder that holds hub data sets as `user/name`; default $DIFFVIT_DATA, then the hub.

    Raises:
        UserError: the data are missing, unreadable or not what the protocol says.
    """
    return _load(name, find_data_root(data_root))


def at_hand(name: str, data_root: str | Path | None = None) -> bool:
    """Whether a data set can be loaded without the hub. Raises UserError for a data root that does not exist."""
    root, source = find_data_root(data_root), SOURCES[name]
    if root is not None and not root.is_dir():
        raise UserError(f"there is no data folder {root}.", "check --data_root or DIFFVIT_DATA.")
    if source.folder is not None:
        return source.folder.is_dir() and any(source.folder.iterdir())  # an empty one is where a disk would be mounted
    return source.hub is None or (root is not None and (root / source.hub).is_dir())


def hub_name(name: str) -> str | None:
    """A data set's name on the Hugging Face hub, user/name; None for one from elsewhere, or an unknown one."""
    return SOURCES[name].hub if name in SOURCES else None


@functools.lru_cache(maxsize=4)
def _load(name: str, data_root: Path | None) -> Dataset:
    expected = protocol_of(name).images
    raw = SOURCES[name].load(data_root)
    found = tuple(len(raw.rows[split]) for split in SPLITS)
    if found != expected:
        raise UserError(
            f"{name} has {found[0]} training, {found[1]} validation and {found[2]} test images instead of "
            f"{expected[0]}, {expected[1]} and {expected[2]}.",
            "the copy is truncated or another data set: download it again.",
        )
    arrays, facts = cached_arrays(name, raw) if raw.cache_key else decode_arrays(name, raw)
    if min(facts["std"]) == 0:
        raise UserError(f"a colour channel of {name} has one value in all training images.", "it cannot be normalised: check the images.")
    repeated = [f"{facts['repeated']} of {found[2]} test images are also training images, to the pixel"] if facts["repeated"] else []
    splits = {split: ImageSet(torch.from_numpy(arrays[f"{split}_pixels"]), torch.from_numpy(arrays[f"{split}_labels"])) for split in SPLITS}
    return Dataset(
        name=name,
        classes=tuple(raw.classes),
        mean=tuple(facts["mean"]),
        std=tuple(facts["std"]),
        fingerprint=facts["fingerprint"],
        notes=(*raw.notes, *repeated),
        **splits,
    )


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
