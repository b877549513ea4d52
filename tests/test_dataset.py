"""Splits, batches and preparation; BACH in its hub schema, made from real tissue."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import SHARED, needs_cifar, needs_tissue
from pictures import png, structs, write_split
from PIL import Image

from diffvit import dataset
from diffvit.data import cache, hub, sources
from diffvit.data.batches import Prepare, StepBatches, make_loader
from diffvit.data.sources import SOURCES
from diffvit.data.splits import split_rows
from diffvit.dataset import load, with_training_noise
from diffvit.errors import UserError
from diffvit.protocol import PROTOCOLS

BACH_NAMES = ["Benign", "InSitu", "Invasive", "Normal", "Unknown"]
BACH_PREFIXES = ["b", "is", "iv", "n"]
BACH_ROWS = [(f"{prefix}{number:03}.tif", label) for label, prefix in enumerate(BACH_PREFIXES) for number in range(1, 101)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest):
    if "real_cache" not in request.keywords:
        monkeypatch.setenv("DIFFVIT_CACHE", str(tmp_path / "cache"))
        dataset._load.cache_clear()
    yield
    dataset._load.cache_clear()


@pytest.mark.parametrize("name", ["digits", "digits-noisy"])
def test_digits_splits_are_stratified_and_complete(name: str) -> None:
    data = load(name)
    assert [len(split) for split in (data.train, data.val, data.test)] == [1258, 180, 359]
    for split, share in ((data.train, 0.7), (data.val, 0.1), (data.test, 0.2)):
        counts = np.bincount(split.labels.numpy(), minlength=10)
        assert (abs(counts - share * 179.7) < 4).all()
    assert data.train.pixels.shape[1:] == (1, 8, 8)
    assert data.train.pixels.dtype == torch.uint8


def test_splits_are_disjoint_and_stable() -> None:
    labels = np.repeat(np.arange(7), 30)
    parts = split_rows(labels, [0.7, 0.1, 0.2], "x")
    assert sorted(np.concatenate(parts).tolist()) == list(range(210))
    # Written down once: the same rows for ever, on every machine.
    assert parts[1].tolist()[:6] == [8, 11, 17, 33, 39, 47]
    assert not np.array_equal(parts[1], split_rows(labels, [0.7, 0.1, 0.2], "y")[1])


def test_noise_is_fixed_and_changes_only_pixels() -> None:
    clean, noisy = load("digits"), load("digits-noisy")
    assert torch.equal(clean.test.labels, noisy.test.labels)
    assert clean.fingerprint != noisy.fingerprint
    difference = (noisy.train.pixels.float() - clean.train.pixels.float()) / 255
    assert 0.15 < difference.std() < sources.DIGITS_NOISE  # clipping takes some of it
    dataset._load.cache_clear()
    assert load("digits-noisy").fingerprint == noisy.fingerprint


def _noisy(seed: int = 0, **overrides: float) -> tuple[dataset.Dataset, torch.Tensor]:
    return with_training_noise(load("digits"), PROTOCOLS["digits"].with_overrides(overrides), seed)


def test_without_noise_the_data_are_not_copied() -> None:
    data, rows = _noisy()
    assert data is load("digits") and len(rows) == 0
    false, _ = _noisy(label_noise=0.2)
    assert false.train.pixels is data.train.pixels


@pytest.mark.parametrize("share", [0.2, 0.99])
def test_false_labels_are_as_many_as_asked_and_never_true(share: float) -> None:
    clean, (noisy, rows) = load("digits"), _noisy(label_noise=share)
    changed = torch.nonzero(noisy.train.labels != clean.train.labels)[:, 0]
    assert torch.equal(rows, changed) and len(rows) == round(share * 1258)
    assert noisy.train.labels.min() >= 0 and noisy.train.labels.max() <= 9
    steps = (noisy.train.labels - clean.train.labels)[rows] % 10
    counts = np.bincount(steps.numpy(), minlength=10)
    # Each of the nine other classes alike: within four standard deviations of its expected count.
    assert counts[0] == 0 and (abs(counts[1:] - len(rows) / 9) < 4 * (len(rows) / 9) ** 0.5).all()
    assert f"{len(rows)} of 1258 training labels are false" in noisy.notes


def test_false_labels_stay_false_at_a_higher_share() -> None:
    (low, low_rows), (high, high_rows) = _noisy(label_noise=0.2), _noisy(label_noise=0.4)
    assert set(low_rows.tolist()) < set(high_rows.tolist())
    assert torch.equal(low.train.labels[low_rows], high.train.labels[low_rows])


def test_training_noise_is_the_same_for_a_seed_and_leaves_val_and_test_alone() -> None:
    clean, overrides = load("digits"), {"label_noise": 0.3, "input_noise": 0.2}
    (first, _), (again, _), (other, _) = _noisy(1, **overrides), _noisy(1, **overrides), _noisy(2, **overrides)
    assert torch.equal(first.train.pixels, again.train.pixels) and torch.equal(first.train.labels, again.train.labels)
    assert not torch.equal(first.train.pixels, other.train.pixels) and not torch.equal(first.train.labels, other.train.labels)
    assert first.val is clean.val and first.test is clean.test
    assert (first.mean, first.std, first.fingerprint) == (clean.mean, clean.std, clean.fingerprint)


def test_input_noise_has_its_deviation() -> None:
    clean, (noisy, _) = load("digits").train.pixels, _noisy(input_noise=0.1)
    difference = (noisy.train.pixels.float() - clean.float()) / 255
    assert noisy.train.pixels.dtype == torch.uint8
    assert difference[(clean > 100) & (clean < 155)].std().item() == pytest.approx(0.1, rel=0.03)  # far from where clipping starts
    assert difference[clean == 0].min() == 0
    # No row has the noise of another, also where more rows than are drawn at once lie between them.
    grey = (clean > 50) & (clean < 205)
    for apart in (1, 1024):
        both = grey[apart:] & grey[:-apart]
        pairs = torch.stack([difference[apart:][both], difference[:-apart][both]])
        assert abs(torch.corrcoef(pairs)[0, 1].item()) < 0.1


def test_normalisation_is_of_the_training_split() -> None:
    data = load("digits")
    x = Prepare(8, data.mean, data.std)(data.train.pixels)
    assert x.mean().item() == pytest.approx(0, abs=1e-4)
    assert x.std().item() == pytest.approx(1, abs=1e-3)


def test_resizing_agrees_with_pil() -> None:
    pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    ours = Prepare(224, [0.0] * 3, [1.0] * 3)(pixels)[0].permute(1, 2, 0).numpy()
    pil = Image.fromarray(pixels[0].permute(1, 2, 0).numpy()).resize((224, 224), Image.Resampling.BILINEAR)
    assert abs(ours - np.asarray(pil) / 255).max() <= 1 / 255 + 1e-6


def _rows(batches: StepBatches) -> list[list[int]]:
    return [batch.tolist() for batch in batches]


def test_every_epoch_has_every_row_once() -> None:
    batches = _rows(StepBatches(10, 4, seed=0, steps=(1, 6)))
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4, 2]
    first, second = sum(batches[:3], []), sum(batches[3:], [])
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_a_run_that_starts_in_the_middle_sees_the_same_batches() -> None:
    whole = _rows(StepBatches(50, 8, seed=3, steps=(1, 20)))
    assert _rows(StepBatches(50, 8, seed=3, steps=(11, 20))) == whole[10:]


def test_workers_share_a_batch() -> None:
    whole = _rows(StepBatches(10, 4, seed=0, steps=(1, 6)))
    parts = [_rows(StepBatches(10, 4, seed=0, steps=(1, 6), part=(rank, 3))) for rank in range(3)]
    for step, batch in enumerate(whole):
        assert sorted(sum((part[step] for part in parts), [])) == sorted(batch)
    assert StepBatches(10, 4, seed=0, steps=(1, 6), part=(2, 3)).batch_length(3) == 2


def test_loader_is_a_dataloader_of_uint8() -> None:
    data = load("digits")
    loader = make_loader(data.val, StepBatches(180, 32, seed=0, steps=(1, 7)))
    assert isinstance(loader, torch.utils.data.DataLoader)
    shapes = [tuple(pixels.shape) for pixels, _ in loader]
    assert shapes == [(32, 1, 8, 8)] * 5 + [(20, 1, 8, 8), (32, 1, 8, 8)]
    assert next(iter(loader))[0].dtype == torch.uint8


@needs_cifar
@pytest.mark.real_cache
def test_real_cifar100(data_root: str) -> None:
    data = load("CIFAR-100", data_root)
    assert [len(split) for split in (data.train, data.val, data.test)] == [45_000, 5_000, 10_000]
    assert (np.bincount(data.train.labels) == 450).all()
    assert (np.bincount(data.val.labels) == 50).all()
    assert data.mean == pytest.approx((0.5071, 0.4865, 0.4409), abs=2e-3)  # the README of the data, all 50,000 images
    assert data.std == pytest.approx((0.2673, 0.2564, 0.2762), abs=2e-3)
    assert data.classes[26] == "cra"
    # The decoded cache is what the library decodes.
    import datasets

    test = datasets.load_dataset(f"{data_root}/uoft-cs/cifar100", split="test")
    for row in (0, 1234, 9_999):
        assert np.array_equal(np.asarray(test[row]["img"]).transpose(2, 0, 1), data.test.pixels[row].numpy())
        assert test[row]["fine_label"] == data.test.labels[row]


def _write_bach(root: Path, *, named: bool, rows: list[tuple[str, int]] | None = None, cut_image: int | None = None) -> None:
    """A data set in BACH's hub schema: patches of real tissue, smaller than BACH's, each unlike the others."""
    import datasets

    tissue = [np.asarray(Image.open(path).convert("RGB")) for path in sorted((SHARED / "data/breakhis").glob("*.png"))]
    random = np.random.RandomState(0)
    if rows is None:
        rows = list(BACH_ROWS)
        random.shuffle(rows)
    images = []
    for name, label in rows:
        source = tissue[label % 4 * 2 + random.randint(2)]
        top, left = random.randint(source.shape[0] - 96), random.randint(source.shape[1] - 128)
        buffer = io.BytesIO()
        Image.fromarray(source[top : top + 96, left : left + 128]).save(buffer, format="TIFF")
        content = buffer.getvalue()[:40] if len(images) == cut_image else buffer.getvalue()
        images.append({"path": name if named else None, "bytes": content})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=BACH_NAMES)})
    folder = root / "1aurent/BACH/data"
    folder.mkdir(parents=True)
    train = datasets.Dataset.from_dict({"image": images, "label": [label for _, label in rows]}, features=features)
    train.to_parquet(folder / "train-00000-of-00001.parquet")
    unknown = datasets.Dataset.from_dict({"image": images[:5], "label": [4] * 5}, features=features)
    unknown.to_parquet(folder / "test-00000-of-00001.parquet")


@needs_tissue
@pytest.mark.parametrize("named", [True, False])
def test_bach(tmp_path: Path, named: bool) -> None:
    _write_bach(tmp_path, named=named)
    data = load("BACH", tmp_path)
    assert [len(split) for split in (data.train, data.val, data.test)] == [228, 40, 132]
    assert data.classes == ("Benign", "InSitu", "Invasive", "Normal")
    assert data.train.pixels.shape[1:] == (3, 512, 512)
    assert np.bincount(data.val.labels).tolist() == [10] * 4
    assert len(set(data.test.labels[:40].tolist())) == 4  # the first rows stand for all
    expected = [48, 30, 31, 23] if named else [33] * 4  # eva's held-out patients, or a stratified third
    assert np.bincount(data.test.labels).tolist() == expected
    assert ("other patients" in data.notes[0]) == named
    assert ("stratified" in data.notes[0]) != named


@needs_tissue
def test_bach_by_patient_takes_the_held_out_files(tmp_path: Path) -> None:
    _write_bach(tmp_path, named=True)
    raw = SOURCES["BACH"].load(tmp_path)
    import datasets

    stored = datasets.load_dataset(f"{tmp_path}/1aurent/BACH", split="train").cast_column("image", datasets.Image(decode=False))
    names = np.asarray([image["path"] for image in stored["image"]])
    files = {split: set(names[rows]) for split, rows in raw.rows.items()}
    assert not files["train"] & files["test"] and not files["train"] & files["val"] and not files["val"] & files["test"]
    # Rows 41 to 58 in file-name order are the benign files 42 to 59; 139 to 168 the in-situ files 40 to 69; and so on.
    expected = [f"b{n:03}.tif" for n in [*range(42, 60), *range(61, 91)]] + [f"is{n:03}.tif" for n in range(40, 70)]
    expected += [f"iv{n:03}.tif" for n in [*range(41, 59), *range(61, 74)]] + [f"n{n:03}.tif" for n in range(46, 69)]
    assert files["test"] == set(expected)
    assert {f"b{n:03}.tif" for n in range(91, 101)} <= files["val"]


@needs_tissue
def test_bachs_unknown_rows_never_enter(tmp_path: Path) -> None:
    rows = list(BACH_ROWS)
    rows[5:5] = [("test01.tif", 4), ("test02.tif", 4)]
    _write_bach(tmp_path, named=True, rows=rows)
    data = load("BACH", tmp_path)
    assert sum(len(split) for split in (data.train, data.val, data.test)) == 400
    assert set(torch.cat([data.train.labels, data.val.labels, data.test.labels]).tolist()) == {0, 1, 2, 3}


def test_a_missing_data_set_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no data set folder"):
        load("CIFAR-100", tmp_path)


@needs_cifar
def test_a_truncated_file_is_found(tmp_path: Path, data_root: str) -> None:
    folder = tmp_path / "uoft-cs/cifar100/cifar100"
    folder.mkdir(parents=True)
    source = Path(data_root) / "uoft-cs/cifar100/cifar100"
    for split in ("train", "test"):
        whole = (source / f"{split}-00000-of-00001.parquet").read_bytes()
        (folder / f"{split}-00000-of-00001.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be loaded"):
        load("CIFAR-100", tmp_path)


@needs_tissue
def test_a_truncated_image_is_found(tmp_path: Path) -> None:
    _write_bach(tmp_path, named=True, cut_image=7)
    with pytest.raises(UserError, match="cannot be decoded"):
        load("BACH", tmp_path)
    assert not list((tmp_path / "cache").iterdir())


@needs_tissue
def test_missing_rows_are_found(tmp_path: Path) -> None:
    _write_bach(tmp_path, named=True, rows=[(f"b{n:03}.tif", 0) for n in range(1, 30)])
    with pytest.raises(UserError, match="instead of"):
        load("BACH", tmp_path)


@needs_tissue
def test_another_schema_is_found(tmp_path: Path) -> None:
    import datasets

    folder = tmp_path / "uoft-cs/cifar100"
    folder.mkdir(parents=True)
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(folder / "train.parquet")
    with pytest.raises(UserError, match="no split 'train' with columns fine_label, img: it has columns text"):
        load("CIFAR-100", tmp_path)


# ------------------------------------------------------------------------------- Parquet as pandas, polars or duckdb write it


def _write_cifar100(root: Path, labels: Callable[[list[int]], list | pa.Array], images: Callable[[list[bytes]], list | pa.Array]) -> None:
    for split, rows in (("train", 1000), ("test", 100)):
        numbers = [row % 100 for row in range(rows)]
        pictures = images([png(number) for number in numbers])
        write_split(root / "uoft-cs/cifar100", split, img=pictures, fine_label=labels(numbers), beside=numbers)


def _few(monkeypatch: pytest.MonkeyPatch, name: str, images: tuple[int, int, int]) -> None:
    monkeypatch.setitem(PROTOCOLS, name, dataclasses.replace(PROTOCOLS[name], images=images))


LABELS = {
    "int64": lambda numbers: numbers,
    "uint8": lambda numbers: pa.array(numbers, pa.uint8()),
    "float": lambda numbers: [float(number) for number in numbers],
    "text": lambda numbers: [f"class {number:02}" for number in numbers],
    "large text": lambda numbers: pa.array([f"class {number:02}" for number in numbers], pa.large_string()),
    "dictionary": lambda numbers: pa.array([f"class {number:02}" for number in numbers]).dictionary_encode(),
}
IMAGES = {
    "structs": structs,
    "structs without path": lambda images: [{"bytes": image} for image in images],
    "structs, fields the other way round": lambda images: [{"path": "a.png", "bytes": image} for image in images],
    "binary": lambda images: images,
    "large binary": lambda images: pa.array(images, pa.large_binary()),
    "large binary in structs": lambda images: pa.array(
        structs(images), pa.struct([("bytes", pa.large_binary()), ("path", pa.large_string())])
    ),
}


@pytest.mark.parametrize(("labels", "images"), [*((each, "structs") for each in LABELS), *(("int64", each) for each in IMAGES)])
def test_cifar100_needs_no_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: str, images: str) -> None:
    _few(monkeypatch, "CIFAR-100", (900, 100, 100))
    _write_cifar100(tmp_path, LABELS[labels], IMAGES[images])
    data = load("CIFAR-100", tmp_path)
    assert data.test.labels.tolist() == list(range(100)) == data.test.pixels[:, 0, 0, 0].tolist()
    assert data.train.labels.tolist() == data.train.pixels[:, 2, 0, 0].tolist()
    assert data.classes[7] == ("7" if labels in ("int64", "uint8", "float") else "class 07")


WRONG_LABELS = {
    "missing": (lambda numbers: [None, *numbers[1:]], "1 of 1000 labels in the column fine_label are missing"),
    "out of range": (lambda numbers: [100, *numbers[1:]], "whole numbers from 0 to 99"),
    "negative": (lambda numbers: [-1, *numbers[1:]], "whole numbers from 0 to 99"),
    "fractions": (lambda numbers: [0.5, *numbers[1:]], "whole numbers from 0 to 99"),
    "no number": (lambda numbers: [float("nan"), *numbers[1:]], "whole numbers from 0 to 99"),
    "truth values": (lambda numbers: [bool(number) for number in numbers], "whole numbers from 0 to 99"),
    "lists": (lambda numbers: [[number] for number in numbers], "whole numbers from 0 to 99"),
    "too few names": (lambda numbers: [str(number // 2) for number in numbers], "100 names"),
}


@pytest.mark.parametrize("kind", WRONG_LABELS)
def test_labels_that_are_none_are_one_sentence(tmp_path: Path, kind: str) -> None:
    labels, why = WRONG_LABELS[kind]
    _write_cifar100(tmp_path, labels, structs)
    with pytest.raises(UserError, match=why):
        load("CIFAR-100", tmp_path)


WRONG_IMAGES = {
    "numbers": (lambda images: [1] * len(images), "holds no encoded images"),
    "lists": (lambda images: [[1, 2]] * len(images), "holds no encoded images|row 0 of the train split cannot be used"),
    "paths to nothing": (lambda images: ["nowhere/1.png"] * len(images), "nowhere/1.png cannot be read: No such file"),
    "a missing one": (lambda images: [None, *structs(images)[1:]], "row 0 of the train split cannot be read"),
    "an empty one": (lambda images: [b"", *images[1:]], "row 0 of the train split cannot be decoded"),
    "another size": (lambda images: [png(0, 33), *images[1:]], "33 x 33 pixels"),
}


@pytest.mark.parametrize("kind", WRONG_IMAGES)
def test_images_that_are_none_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    _few(monkeypatch, "CIFAR-100", (900, 100, 100))
    images, why = WRONG_IMAGES[kind]
    _write_cifar100(tmp_path, LABELS["int64"], images)
    with pytest.raises(UserError, match=why):
        load("CIFAR-100", tmp_path)


def test_a_data_set_without_rows_is_one_sentence(tmp_path: Path) -> None:
    write_split(tmp_path / "1aurent/BACH", "train", image=pa.array([], pa.binary()), label=pa.array([], pa.string()))
    with pytest.raises(UserError, match=r"0 training, 0 validation and 0 test images|cannot be loaded"):
        load("BACH", tmp_path)


@pytest.mark.parametrize("labels", ["text", "numbers"])
def test_bach_needs_names_and_takes_them_as_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: str) -> None:
    _few(monkeypatch, "BACH", (24, 4, 12))
    monkeypatch.setitem(PROTOCOLS, "BACH", dataclasses.replace(PROTOCOLS["BACH"], image_size=8))
    rows = [row % 5 for row in range(50)]
    named = [BACH_NAMES[label] for label in rows] if labels == "text" else rows
    write_split(tmp_path / "1aurent/BACH", "train", image=[png(label, 8) for label in rows], label=named)
    if labels == "numbers":
        with pytest.raises(UserError, match="have no names") as refused:
            load("BACH", tmp_path)
        assert "as text" in refused.value.hint
        return
    data = load("BACH", tmp_path)
    assert data.train.labels.tolist() == data.train.pixels[:, 0, 0, 0].tolist() and len(data.train) == 24


@needs_tissue
def test_a_16_bit_bach_keeps_its_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tissue at 8 and at 16 bits gives the same pixels; of numbers of an unknown range the file is named."""
    monkeypatch.setitem(PROTOCOLS, "BACH", dataclasses.replace(PROTOCOLS["BACH"], image_size=32))
    tissue = np.asarray(Image.open(min((SHARED / "data/breakhis").glob("*.png"))).convert("L"))[:64, :64]
    found = []
    for kind in (tissue, tissue.astype(np.uint16) * 257, tissue.astype(np.float32)):
        buffer = io.BytesIO()
        Image.fromarray(kind).save(buffer, "TIFF")
        images = [{"bytes": buffer.getvalue(), "path": name} for name, _ in BACH_ROWS]
        names = [BACH_NAMES[label] for _, label in BACH_ROWS]
        write_split(tmp_path / str(kind.dtype) / "1aurent/BACH", "train", image=images, label=names)
        if kind.dtype == np.float32:
            with pytest.raises(UserError, match=r"^(b|is|iv|n)\d{3}\.tif cannot be used: it holds numbers from"):
                load("BACH", tmp_path / str(kind.dtype))
        else:
            found.append(load("BACH", tmp_path / str(kind.dtype)))
    assert torch.equal(found[0].train.pixels, found[1].train.pixels) and found[0].fingerprint == found[1].fingerprint
    assert found[0].train.pixels.float().std() > 10


def test_an_image_folder_is_read_from_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _few(monkeypatch, "BACH", (24, 4, 12))
    monkeypatch.setitem(PROTOCOLS, "BACH", dataclasses.replace(PROTOCOLS["BACH"], image_size=8))
    for label, name in enumerate(BACH_NAMES[:4]):
        folder = tmp_path / "1aurent/BACH/train" / name
        folder.mkdir(parents=True)
        for number in range(10):
            (folder / f"{BACH_PREFIXES[label]}{number}.png").write_bytes(png(label, 8))
    data = load("BACH", tmp_path)
    assert data.train.labels.tolist() == data.train.pixels[:, 0, 0, 0].tolist()
    (tmp_path / "1aurent/BACH/train/Normal/n3.png").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    dataset._load.cache_clear()
    with pytest.raises(UserError, match=r"Normal/n3\.png is a Git LFS pointer"):
        load("BACH", tmp_path)


# --------------------------------------------------------------------------------------------- decoded images that are kept


@pytest.fixture
def decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a small CIFAR-100 in the cache."""
    _few(monkeypatch, "CIFAR-100", (900, 100, 100))
    _write_cifar100(tmp_path, LABELS["int64"], structs)
    load("CIFAR-100", tmp_path)
    dataset._load.cache_clear()
    (folder,) = (tmp_path / "cache").iterdir()
    return folder


def test_what_is_decoded_is_for_all_who_share_the_cache(decoded: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    assert decoded.stat().st_mode & 0o777 == 0o777 & ~umask
    assert {path.stat().st_mode & 0o777 for path in decoded.iterdir()} == {0o666 & ~umask}
    assert len(list(decoded.iterdir())) == 7


def test_decoded_images_are_used_again(decoded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "decode_arrays", lambda *_: pytest.fail("decoded again"))
    assert len(load("CIFAR-100", tmp_path).train) == 900


def _unreadable(path: Path) -> None:
    """Cannot be read by anybody, also where the tests run as root."""
    path.unlink()
    path.mkdir()


DAMAGE = {
    "unreadable pixels": lambda folder: _unreadable(folder / "train_pixels.npy"),
    "unreadable facts": lambda folder: _unreadable(folder / "facts.json"),
    "no facts": lambda folder: (folder / "facts.json").unlink(),
    "facts that are cut": lambda folder: (folder / "facts.json").write_text('{"mean"'),
    "facts that are none": lambda folder: (folder / "facts.json").write_text("[]"),
    "facts of text": lambda folder: (folder / "facts.json").write_text('{"mean": ["a"], "std": [1], "fingerprint": ""}'),
    "facts in another encoding": lambda folder: (folder / "facts.json").write_bytes(b"\xff\xfe{\0"),
    "no pixels": lambda folder: (folder / "val_pixels.npy").unlink(),
    "pixels that are cut": lambda folder: os.truncate(folder / "train_pixels.npy", 5000),
    "empty pixels": lambda folder: os.truncate(folder / "test_pixels.npy", 0),
    "pixels of another data set": lambda folder: (folder / "test_pixels.npy").write_bytes((folder / "train_pixels.npy").read_bytes()),
    "pixels of another type": lambda folder: np.save(folder / "test_pixels.npy", np.zeros((100, 3, 32, 32))),
    "other labels": lambda folder: np.save(folder / "test_labels.npy", np.zeros(100, dtype=np.int64)),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_decoded_images_that_cannot_be_used_are_one_sentence(decoded: Path, tmp_path: Path, kind: str) -> None:
    DAMAGE[kind](decoded)
    with pytest.raises(UserError, match=r"the decoded images of CIFAR-100 in .* cannot be used: ") as refused:
        load("CIFAR-100", tmp_path)
    assert "DIFFVIT_CACHE" in refused.value.hint


# ------------------------------------------------------------------------------------------------------ the hub, out of reach


@pytest.fixture
def away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """No network, and an empty Hugging Face cache: its folder for unpacked data sets."""
    import datasets
    import huggingface_hub

    kept = tmp_path / "huggingface/datasets"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", kept)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "huggingface/hub"))
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    huggingface_hub.close_session()
    yield kept
    huggingface_hub.close_session()


@contextlib.contextmanager
def _silent_server() -> Iterator[str]:
    """Takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


WAYS = {
    "offline": "HF_HUB_OFFLINE is set",
    "dead proxy": "Connection refused",
    "SOCKS proxy": "SOCKS|Connection refused",
    "no such proxy": "proxy",
    "silent proxy": "no answer within 0.5 s|timed out",
}


@contextlib.contextmanager
def _out_of_reach(way: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from huggingface_hub import constants

    monkeypatch.setattr(hub, "_PATIENCE", 0.5)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", way == "offline")
    with _silent_server() as silent:
        address = {"offline": "", "SOCKS proxy": "socks5://127.0.0.1:9", "no such proxy": "nonsense://x:1", "silent proxy": silent}
        if proxy := address.get(way, "http://127.0.0.1:9"):
            monkeypatch.setenv("all_proxy", proxy)
        yield


@pytest.mark.parametrize("way", WAYS)
def test_a_hub_out_of_reach_is_one_sentence_at_once(
    away: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, way: str
) -> None:
    from huggingface_hub.utils import _http

    monkeypatch.setattr(_http.time, "sleep", lambda seconds: pytest.fail("the client tries again"))
    with _out_of_reach(way, monkeypatch), pytest.raises(UserError, match="the Hugging Face hub cannot be reached: ") as refused:
        load("CIFAR-100")
    assert re.search(WAYS[way], refused.value.message), refused.value.message
    assert "HF_HUB_OFFLINE" in refused.value.hint and "--data_root" in refused.value.hint
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("way", ["offline", "dead proxy", "SOCKS proxy"])
def test_what_the_hub_gave_once_is_used_without_it(
    away: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, way: str
) -> None:
    import datasets

    _few(monkeypatch, "CIFAR-100", (900, 100, 100))
    _write_cifar100(tmp_path, LABELS["int64"], structs)
    datasets.load_dataset(str(tmp_path / "uoft-cs/cifar100"))
    (away / "cifar100").rename(away / "uoft-cs___cifar100")
    assert hub.is_cached("uoft-cs/cifar100") and not hub.is_cached("1aurent/BACH")
    capfd.readouterr()
    with _out_of_reach(way, monkeypatch):
        assert len(load("CIFAR-100").train) == 900
    assert capfd.readouterr() == ("", "")
    assert datasets.config.HF_HUB_OFFLINE is False


@pytest.mark.parametrize("local", [True, False])
def test_a_hugging_face_cache_that_cannot_be_written_is_named(
    away: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local: bool
) -> None:
    away.parent.write_text("a file in its place")
    _write_cifar100(tmp_path, LABELS["int64"], structs)
    with _out_of_reach("dead proxy", monkeypatch), pytest.raises(UserError, match=r"Hugging Face cache .* cannot be written") as refused:
        load("CIFAR-100", tmp_path if local else None)
    assert "HF_HOME" in refused.value.hint


def test_pointers_instead_of_parquet_say_what_to_do(away: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    folder = tmp_path / "uoft-cs/cifar100"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        (folder / f"{split}.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    with pytest.raises(UserError, match=r"test\.parquet is a Git LFS pointer") as refused:
        load("CIFAR-100", tmp_path)
    assert "git lfs pull" in refused.value.hint
    assert capfd.readouterr() == ("", "")


def test_a_bach_class_by_another_name_is_named(tmp_path: Path) -> None:
    labels = [("Benign", "In Situ", "Invasive", "Normal")[row % 4] for row in range(40)]
    write_split(tmp_path / "1aurent/BACH", "train", image=[png(row % 4, 8) for row in range(40)], label=labels)
    with pytest.raises(UserError, match="is InSitu, and some are In Situ"):
        load("BACH", tmp_path)
