"""The cache of decoded images: memory-mapped uint8 arrays, decoded once per machine and shared by all processes."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from diffvit.data.hub import first_sentence
from diffvit.data.sources import Raw
from diffvit.errors import UserError
from diffvit.ledger.disk import write_atomically
from diffvit.machine.caches import cache_folder

# Raise it when decoding, splitting or resizing changes: cached arrays of other versions are not used.
_CACHE_VERSION = 2

SPLITS = ("train", "val", "test")


def decode_arrays(name: str, raw: Raw) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Decode a data set. Returns its arrays by split, and the facts about them; "repeated" counts test images that are training images."""
    arrays = {}
    for split in SPLITS:
        try:
            arrays[f"{split}_pixels"] = np.ascontiguousarray(raw.decode(raw.rows[split]))
        except UserError:
            raise
        except Exception as error:  # a damaged file of the data set shows itself in many ways
            raise UserError(
                f"an image of {name}'s {split} split cannot be decoded: {first_sentence(error)}.", "download the data again."
            ) from error
        arrays[f"{split}_labels"] = raw.labels[raw.rows[split]].astype(np.int64)
    digest = hashlib.sha256()
    for key, array in arrays.items():
        digest.update(f"{key}{array.shape}".encode())
        digest.update(array.data)
    mean, std = _channel_statistics(arrays["train_pixels"])
    trained = {hashlib.blake2b(image).digest() for image in arrays["train_pixels"]}
    repeated = sum(hashlib.blake2b(image).digest() in trained for image in arrays["test_pixels"])
    return arrays, {"fingerprint": digest.hexdigest()[:16], "mean": mean, "std": std, "repeated": repeated}


def _channel_statistics(pixels: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, pixels in 0-1, from exact counts of the 256 values."""
    values = np.arange(256) / 255
    mean, std = [], []
    for channel in range(pixels.shape[1]):
        weights = np.bincount(pixels[:, channel].ravel(), minlength=256) / pixels[:, channel].size
        mean.append(float(weights @ values))
        std.append(float(np.sqrt(weights @ (values - mean[-1]) ** 2)))
    return mean, std


def cached_arrays(name: str, raw: Raw) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The decoded splits, memory-mapped, so that runs on one machine share them."""
    folder = cache_folder() / f"{name}-{raw.cache_key}-v{_CACHE_VERSION}"
    if not os.path.lexists(folder):
        _fill_cache(name, raw, folder)
    try:
        arrays = {key: _mapped(folder / f"{key}.npy") for key in (f"{split}_{part}" for split in SPLITS for part in ("pixels", "labels"))}
        facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        statistics = {key: [float(value) for value in facts[key]] for key in ("mean", "std")}
        facts = {"fingerprint": str(facts["fingerprint"]), "repeated": int(facts.get("repeated", 0)), **statistics}
        for split in SPLITS:
            pixels, labels = arrays[f"{split}_pixels"], arrays[f"{split}_labels"]
            if pixels.dtype != np.uint8 or len(pixels) != len(labels) or not np.array_equal(labels, raw.labels[raw.rows[split]]):
                raise ValueError(f"its {split} split is another one")
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or first_sentence(error)
        raise UserError(
            f"the decoded images of {name} in {folder} cannot be used: {why}.",
            "delete that folder, or set DIFFVIT_CACHE.",
        ) from error
    return arrays, facts


def _fill_cache(name: str, raw: Raw, folder: Path) -> None:
    """Decode the images into a new folder of the cache."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
    except OSError as error:
        raise UserError(f"the cache folder {folder.parent} cannot be written: {error.strerror}.", "set DIFFVIT_CACHE.") from error
    try:
        arrays, facts = decode_arrays(name, raw)
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
