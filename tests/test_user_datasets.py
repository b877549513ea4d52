"""Data sets that a grid file defines: from the hub's schema and from image folders, what is decided for them, and what is refused."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import SHARED, needs_cifar, needs_tissue
from pictures import png, structs, write_split
from PIL import Image

from diffvit import dataset, from_pretrained
from diffvit.data import parts, user_datasets
from diffvit.data.sources import SOURCES
from diffvit.data.user_datasets import UserDataset
from diffvit.dataset import load
from diffvit.errors import UserError
from diffvit.evaluation import evaluate_checkpoint
from diffvit.ledger.spec import RunSpec
from diffvit.ledger.weights import load_weights
from diffvit.protocol import PROTOCOLS, Protocol, protocol_of
from diffvit.train import train
from diffvit.vit import build_model
from study.grid import find_dataset, find_grid

if TYPE_CHECKING:
    from hub.server import HubServer

SMALL = {"image_size": 32, "patch_size": 8, "d_model": 64, "heads": 4, "parameters": ["0.1M", "0.2M"], "batch_size": 4, "epochs": 2}


def _forget() -> None:
    """What a new process would not know."""
    for each, _ in user_datasets.registered():
        del PROTOCOLS[each.name], SOURCES[each.name], user_datasets._REGISTERED[each.name]
    parts.raw_of.cache_clear()
    dataset._load.cache_clear()


@pytest.fixture(autouse=True)
def _own_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("DIFFVIT_CACHE", str(tmp_path / "cache"))
    yield
    _forget()


def _folder(root: Path, classes: dict[str, int], first: int = 0) -> Path:
    """An image folder with so many images of each class."""
    for name, count in classes.items():
        for i in range(count):
            (root / name).mkdir(parents=True, exist_ok=True)
            (root / name / f"{i:02}.png").write_bytes(png(first + i, 16))
        first += count
    return root


def _grid_file(place: Path, **entry: Any) -> Path:
    path = place / "own.yaml"
    path.write_text(json.dumps({"datasets": [{"name": "mine", **entry}]}))
    return path


def _define(place: Path, data_root: Path | None = None, **entry: Any) -> Protocol:
    _forget()
    find_grid(str(_grid_file(place, **{**SMALL, **entry})), data_root=str(data_root) if data_root else None)
    return protocol_of("mine")


def _define_and_load(place: Path, **entry: Any) -> dataset.Dataset:
    _define(place, **entry)
    return load("mine")


def _run_id() -> str:
    return RunSpec.of("vit_classic", "0.2M", "mine").run_id(load("mine").fingerprint)


# --------------------------------------------------------------------------------------------------------------- what it is


@needs_tissue
def test_an_image_folder_trains_and_its_checkpoint_is_rebuilt(tmp_path: Path) -> None:
    """Crops of real tissue, all of other sizes: two classes, trained, found again where they are copied to."""
    for path in sorted((SHARED / "data/breakhis").glob("*.png")):
        tissue, kind = Image.open(path).convert("RGB"), "benign" if "_B_" in path.name else "malignant"
        for i in range(5):
            file = tmp_path / "tissue" / kind / f"{path.stem}-{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            tissue.crop((40 * i, 20 * i, 340 + 41 * i, 250 + 20 * i)).save(file)
    protocol = _define(tmp_path, folder="tissue")
    assert (protocol.classes, protocol.images, protocol.channels) == (2, (28, 4, 8), 3)
    data = load("mine")
    assert data.classes == ("benign", "malignant") and data.train.pixels.shape == (28, 3, 32, 32)
    for split, each in ((data.train, 14), (data.val, 2), (data.test, 4)):
        assert torch.bincount(split.labels).tolist() == [each] * 2
    assert data.notes[0] == "classes: 2, images: [28, 4, 8]" and "several" in data.notes[2]
    assert data.notes[1] == "the classes are benign, malignant"
    whole = Image.open(min((tmp_path / "tissue/malignant").iterdir())).resize((32, 32), Image.Resampling.BILINEAR)
    everything = torch.cat([data.train.pixels, data.val.pixels, data.test.pixels])
    assert (everything == torch.tensor(np.asarray(whole)).permute(2, 0, 1)).flatten(1).all(1).sum() == 1
    expected = data.train.pixels.double().div(255)
    assert data.mean == pytest.approx(expected.mean((0, 2, 3)).tolist()) and data.std == pytest.approx(
        expected.std((0, 2, 3), False).tolist()
    )

    spec = RunSpec.of("vit_differential", "0.1M", "mine", overrides={"max_steps": 2})
    result = train(spec, tmp_path / "checkpoints", device="cpu")
    assert result and result.dataset == "mine" and result.status == "done" and result.identity == spec.identity(data.fingerprint)
    weights = result.files(tmp_path / "checkpoints").weights
    again = evaluate_checkpoint(weights, device=torch.device("cpu"))
    assert again["accuracy"] == result.test_accuracy and not again["warnings"]
    assert [row["class"] for row in again["classes"]] == ["benign", "malignant"]

    shutil.copytree(tmp_path / "tissue", tmp_path / "elsewhere/tissue")
    run_id = _run_id()
    assert _define(tmp_path / "elsewhere", folder="tissue", splits="stratified") == protocol and _run_id() == run_id
    for file in sorted((tmp_path / "tissue/benign").iterdir())[:20]:
        file.write_bytes(png(1, 16))
    assert _define(tmp_path, folder="tissue") == protocol and _run_id() != run_id
    assert load("mine").notes[-1] == "4 of 8 test images are also training images, to the pixel"
    assert evaluate_checkpoint(weights, device=torch.device("cpu"))["warnings"]
    assert _define(tmp_path / "elsewhere", folder="tissue", lr=1e-3) != protocol and _run_id() != run_id

    _forget()
    assert load_weights(weights)[0].count_parameters() == result.parameters
    with pytest.raises(UserError, match="no data set named 'mine'") as refused:
        evaluate_checkpoint(weights, device=torch.device("cpu"))
    assert "FILE:NAME" in refused.value.hint


@needs_cifar
def test_the_same_images_from_a_folder_and_in_the_hubs_schema_are_the_same_data(tmp_path: Path, data_root: str) -> None:
    """A few dozen images of real CIFAR-100, kept at their own size."""
    import datasets

    names = ["apple", "aquarium_fish", "baby"]
    features = datasets.Features({"photo": datasets.Image(), "kind": datasets.ClassLabel(names=[*names, "unused"])})
    for split, each in (("train", 20), ("test", 5)):
        (source,) = (Path(data_root) / "uoft-cs/cifar100").rglob(f"{split}*.parquet")
        batch = next(pq.ParquetFile(source).iter_batches(4000, columns=["img", "fine_label"]))
        images, labels = batch["img"].to_pylist(), np.asarray(batch["fine_label"])
        chosen = [(label, images[row]["bytes"]) for label in range(3) for row in np.flatnonzero(labels == label)[:each]]
        for i, (label, content) in enumerate(chosen):
            file = tmp_path / "cifar" / split / names[label] / f"{i:02}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        table = {"photo": [{"bytes": content, "path": None} for _, content in chosen], "kind": [label for label, _ in chosen]}
        (tmp_path / "root/user/few").mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / f"root/user/few/{split}.parquet")
    of_folder = _define(tmp_path, folder="cifar")
    first = load("mine")
    assert of_folder.images == (54, 6, 15) and first.classes == tuple(names)
    assert first.train.pixels.shape == (54, 3, 32, 32)
    of_hub = _define(tmp_path, tmp_path / "root", hub="user/few", image="photo", label="kind")
    second = load("mine", tmp_path / "root")
    assert of_hub == of_folder and second.fingerprint == first.fingerprint and second.classes == first.classes
    assert any("left out: unused" in note for note in second.notes) and dataset.hub_name("mine") == "user/few"


def test_what_is_decided_where_an_entry_says_nothing(tmp_path: Path) -> None:
    """BACH's protocol at 224 pixels; with the classes and numbers of images in the entry, no data are needed."""
    bach = PROTOCOLS["BACH"]
    sizes = {"parameters": ["10M", "25M", "50M"], "image_size": 512, "warmup_steps": 500}
    entry = {"name": "mine", "hub": "user/nothing", "classes": 4, "images": [228, 40, 132]}
    as_bach = UserDataset.of({**entry, **sizes}, tmp_path).protocol()
    assert dict(as_bach.depths) == dict(zip(("10M", "25M", "50M"), bach.depths.values(), strict=True))
    assert as_bach == Protocol(**{**vars(bach), "depths": as_bach.depths})
    by_default = UserDataset.of(entry, tmp_path).protocol()
    assert (by_default.image_size, by_default.patch_size, by_default.warmup_steps) == (224, 16, 40)
    assert UserDataset.of({**entry, "images": [20_000, 1, 1]}, tmp_path).protocol().warmup_steps == 500
    for label, depth in by_default.depths.items():
        counts = {
            layers: build_model("vit_classic", "x", Protocol(**{**vars(by_default), "depths": {"x": layers}}), "meta").count_parameters()
            for layers in (depth - 1, depth, depth + 1)
        }
        assert min(counts, key=lambda layers: abs(counts[layers] - 1e6 * float(label[:-1]))) == depth


def test_a_grid_for_one_data_set_takes_one_of_ones_own(tmp_path: Path) -> None:
    path = _grid_file(_folder(tmp_path / "data", {"a": 12, "b": 12}).parent, **SMALL, folder="data")
    runs = find_grid("lr", f"{path}:mine").runs()
    assert {run.dataset for run in runs} == {"mine"} and {run.size for run in runs} == {"0.1M", "0.2M"} and len(runs) == 12
    assert find_dataset("MINE") == find_dataset(f"{path}:mine") == "mine"
    with pytest.raises(UserError, match=r"no data set defined in .* named 'yours'"):
        find_dataset(f"{path}:yours")


def test_it_stands_beside_others_in_a_grid_file(tmp_path: Path) -> None:
    _folder(tmp_path / "data", {"a": 12, "b": 12})
    table = "\n".join(f"{key} = {json.dumps(value)}" for key, value in {**SMALL, "name": "mine", "folder": "data"}.items())
    (tmp_path / "own.toml").write_text(
        f'models = ["vit_classic"]\noverrides.mine = {{epochs = 7}}\nseeds = {{mine = 2}}\n[[datasets]]\n{table}\n'
    )
    assert {(run.seed, run.protocol.epochs) for run in find_grid(str(tmp_path / "own.toml")).runs()} == {(0, 7), (1, 7)}
    (tmp_path / "both.yaml").write_text(
        json.dumps({"datasets": ["digits", {**SMALL, "name": "mine", "folder": "data"}], "seeds": {"mine": 2}})
    )
    runs = find_grid(str(tmp_path / "both.yaml")).runs()
    assert [sum(run.dataset == name for run in runs) for name in ("digits", "mine")] == [6, 8]


def test_a_plan_needs_no_data_where_the_entry_has_their_numbers(tmp_path: Path, cli: Callable) -> None:
    path = str(_grid_file(tmp_path, **SMALL, folder="nowhere", classes=["a", "b"], images=[16, 4, 4]))
    planned = cli("study", "--dry_run", "--grid", path)
    assert planned.code == 0 and "mine: data not here" in planned.out and "4 runs" in planned.out
    assert cli("plan", "--grid", path, "--gpu", "t4").code == 0
    started = cli("untrained", "--grid", path, "--images", "1", "--json")
    assert started.code == 0 and {row["of"] for row in json.loads(started.out)} == {"photographs"}
    refused = cli("study", "--grid", path, "--address", "local")
    assert refused.code == 2 and f"there is no folder {tmp_path / 'nowhere'}" in refused.err


def test_definitions_travel_to_workers_and_nodes_without_a_folder_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray import cloudpickle

    from study.cluster import nodes
    from study.options import StudyOptions

    _folder(tmp_path / "data", {"a": 12, "b": 12})
    grid = find_grid(str(_grid_file(tmp_path, **SMALL, folder="data")))
    settings = cloudpickle.dumps(StudyOptions(grid, tmp_path, data_root=str(tmp_path)).settings())
    (protocol, spec), fingerprint = (protocol_of("mine"), grid.runs()[0]), load("mine").fingerprint
    _forget()
    arrived = cloudpickle.loads(settings)
    for _ in range(2):  # a worker's process trains several runs
        arrived.know_data()
    assert protocol_of("mine") == protocol and load("mine").fingerprint == fingerprint and spec.protocol == protocol

    monkeypatch.setattr(nodes, "unreachable", lambda fault, **how: {"10.0.0.2": reason} if (reason := fault()) else {})
    nodes.check_shared_folder(tmp_path, arrived.data_folders())
    shutil.rmtree(tmp_path / "data")
    for check, place in ((nodes.check_shared_folder, tmp_path), (nodes.check_storage_and_data, str(tmp_path / "storage"))):
        with pytest.raises(UserError, match=f"10.0.0.2: there is no data folder {tmp_path / 'data'}"):
            check(place, arrived.data_folders())


# ----------------------------------------------------------------------------------------------------------- what is refused

ENTRIES: dict[str, tuple[dict[str, Any], str]] = {
    "no name": ({"name": None}, "has the name None"),
    "a name that is no file's": ({"name": "../mine"}, "has the name '../mine'"),
    "a name that is taken": ({"name": "cifar_100"}, "CIFAR-100 is one of diffvit's data sets"),
    "an unknown key": ({"lable": "x"}, "no key of the data set mine named 'lable'"),
    "noise, which is a condition": ({"label_noise": 0.1}, "no key of the data set mine named 'label_noise'"),
    "no source": ({"folder": None}, "folder of the data set mine is None"),
    "two sources": ({"hub": "user/mine"}, "is not said once"),
    "a hub name that is a path": ({"hub": "../../etc"}, "hub of the data set mine is '../../etc'"),
    "a column of a folder": ({"label": "kind"}, "label of the data set mine has no meaning in a folder"),
    "patches that do not fit": ({"patch_size": 7}, "in the data set mine, patch_size 7 does not divide image_size 32"),
    "heads that do not fit": ({"heads": 5}, "in the data set mine, 5 heads do not fit"),
    "an odd width": ({"d_model": 65}, "d_model of the data set mine is 65"),
    "a width of text": ({"d_model": "wide"}, "d_model of the data set mine is 'wide'"),
    "a rate that is none": ({"lr": -1}, "in the data set mine, lr is -1"),
    "a batch that is too large": ({"batch_size": 99}, "larger than the training set of 17 images"),
    "too few parameters": ({"parameters": ["0.01M"]}, "no depth gives the data set mine 0.01M parameters"),
    "too many parameters": ({"parameters": ["99M"]}, "no depth gives the data set mine 99M parameters"),
    "sizes that are one": ({"parameters": ["0.1M", "0.101M"]}, "two sizes of the data set mine are 2 layers"),
    "no parameters": ({"parameters": ["0M"]}, "parameters of the data set mine is"),
    "four sizes": ({"parameters": ["0.1M", "0.2M", "0.3M", "0.4M"]}, "parameters of the data set mine is"),
    "other classes": ({"classes": ["a", "c"]}, "has the 2 classes a, b, and its entry"),
    "another number of classes": ({"classes": 3}, "has the 2 classes a, b, and its entry"),
    "another number of images": ({"images": [20, 2, 2]}, r"has \[17, 2, 5\] images"),
    "a split that is not there": ({"splits": {"train": "train", "test": "held_out"}}, "the data set mine has no train split: it has a, b"),
    "splits without a test": ({"splits": {"train": "a"}}, "splits of the data set mine is"),
    "a split twice": ({"splits": {"train": "a", "test": "a"}}, "splits of the data set mine is"),
    "splits by chance": ({"splits": "random"}, "splits of the data set mine is 'random'"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ENTRIES)
def test_an_entry_that_says_something_else_is_one_sentence(tmp_path: Path, kind: str) -> None:
    change, why = ENTRIES[kind]
    _folder(tmp_path / "data", {"a": 11, "b": 13})
    with pytest.raises(UserError, match=why) as refused:
        _define_and_load(tmp_path, **{"folder": "data", **change})
    assert refused.value.hint and "\n" not in str(refused.value)
    assert not user_datasets.registered() and not (tmp_path / "cache").exists()


def _cut(path: Path) -> None:
    os.truncate(path, 60)


FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "there is no folder"),
    "no class": (lambda root: (shutil.rmtree(root), root.mkdir()), "data has no folders"),
    "one class": (lambda root: shutil.rmtree(root / "b"), "fewer than two classes: a"),
    "an empty class": (lambda root: (root / "c").mkdir(), "the class folder .*/c has no images"),
    "a class of two": (lambda root: _folder(root, {"c": 2}, 40), "the test split of mine has no image of the class c, of which there are 2"),
    "few of each class": (lambda root: (shutil.rmtree(root), _folder(root, {"a": 3, "b": 3})), "the validation split of mine has no image"),
    "no test split": (lambda root: (_folder(root / "train", {"a": 9}), _folder(root / "val", {"a": 9}), shutil.rmtree(root / "a"), shutil.rmtree(root / "b")),
                      "mine has no test split: it has train, val"),
    "splits beside classes": (lambda root: _folder(root / "train", {"a": 9}), "has the folders of splits and also a, b"),
    "splits that are called otherwise": (lambda root: ((root / "a").rename(root / "Train"), (root / "b").rename(root / "Test")), "has the folders Test, Train, which look like splits"),
    "a class in the test split only": (lambda root: (_folder(root / "train", {"a": 9, "b": 9}), _folder(root / "test", {"a": 9, "c": 9}), shutil.rmtree(root / "a"), shutil.rmtree(root / "b")),
                                       "the test split of mine has classes that its training split has not: c"),
    "a text": (lambda root: (root / "a/notes.txt").write_text("x"), "a/notes.txt cannot be decoded: it is no image"),
    "an image that is cut": (lambda root: _cut(root / "b/07.png"), "b/07.png cannot be decoded"),
    "an image of many frames": (lambda root: Image.new("L", (8, 8)).save(root / "a/film.gif", save_all=True, append_images=[Image.new("L", (8, 8), 9)]), "a/film.gif cannot be used: it has 2 frames"),
    "a link to nothing": (lambda root: (root / "a/x.png").symlink_to("nowhere"), "a/x.png is no file, or a link to nothing"),
    "a link to a folder": (lambda root: (root / "a/more").symlink_to(root / "b"), "a/more is a link to a folder"),
    "images of one colour": (lambda root: [path.write_bytes(_grey()) for path in root.rglob("*.png")], "a colour channel of mine has one value"),
    "a class with a strange name": (lambda root: (root / "a").rename(root / "a\tb"), "a class of mine is named 'a.+b'"),
}  # fmt: skip


def _grey() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (90, 90, 90)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_that_is_no_data_set_is_one_sentence(tmp_path: Path, kind: str) -> None:
    change, why = FOLDERS[kind]
    change(_folder(tmp_path / "data", {"a": 11, "b": 13}))
    with pytest.raises(UserError, match=why) as refused:
        _define_and_load(tmp_path, folder="data")
    assert refused.value.hint and "\n" not in str(refused.value)


def test_what_is_hidden_or_beside_the_classes_is_not_looked_at(tmp_path: Path) -> None:
    root = _folder(tmp_path / "data", {"a": 11, "b": 13})
    before = _define(tmp_path, folder="data"), load("mine").fingerprint
    for name in (".ipynb_checkpoints/x", "a/.DS_Store", "a/.more/x", "README.md"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("x")
    (root / "a/below").mkdir()
    (root / "a/10.png").rename(root / "a/below/10.png")  # folders in a class are the class's
    assert (_define(tmp_path, folder="data"), load("mine").fingerprint) == before


# ----------------------------------------------------------------------------------------------------------- the hub's schema


def _parquet(root: Path, labels: Callable[[list[int]], list], **splits: int) -> None:
    """A hub data set whose labels are numbers from 1 to 3, made into something else."""
    for first, (split, count) in enumerate(splits.items()):
        numbers = [1 + row % 3 for row in range(count)]
        images = structs([png(100 * first + row, 16) for row in range(count)])
        write_split(root / "user/mine", split, image=images, label=labels(numbers))


@pytest.mark.parametrize(
    ("labels", "entry", "classes"),
    [
        (lambda numbers: numbers, {}, ("1", "2", "3")),
        (lambda numbers: numbers, {"classes": ["red", "green", "blue"]}, ("red", "green", "blue")),
        (lambda numbers: [f"kind {number}" for number in numbers], {}, ("kind 1", "kind 2", "kind 3")),
    ],
    ids=["numbers", "numbers with names", "text"],
)
def test_labels_are_numbers_or_names(tmp_path: Path, labels: Callable, entry: dict, classes: tuple[str, ...]) -> None:
    _parquet(tmp_path, labels, train=60, test=6)
    protocol = _define(tmp_path, tmp_path, hub="user/mine", **entry)
    data = load("mine", tmp_path)
    assert data.classes == classes and protocol.images == (54, 6, 6) and protocol.classes == 3
    assert data.test.labels.tolist() == ((data.test.pixels[:, 0, 0, 0] - 100) % 3).tolist()
    assert torch.bincount(data.val.labels).tolist() == [2, 2, 2]


SPLITS: dict[str, tuple[dict[str, int], dict[str, Any], tuple[int, int, int] | str]] = {
    "all three": ({"train": 30, "validation": 9, "test": 6}, {}, (30, 9, 6)),
    "drawn though they are there": ({"train": 30, "validation": 9, "test": 6}, {"splits": "stratified"}, (21, 3, 6)),
    "one": ({"train": 30}, {}, (21, 3, 6)),
    "named": ({"train": 30, "test": 6, "validation": 9}, {"splits": {"train": "train", "test": "validation"}}, (27, 3, 9)),
    "a test split aside": ({"train": 30, "test": 6}, {"splits": "stratified"}, (21, 3, 6)),
    "no test": ({"train": 30, "validation": 9}, {}, "mine has no test split: it has train, validation"),
    "a name that is not there": (
        {"train": 30},
        {"splits": {"train": "train", "test": "held"}},
        "mine has no test split: it has train",
    ),
}


@pytest.mark.parametrize("kind", SPLITS)
def test_splits_are_taken_as_they_are_or_drawn(tmp_path: Path, kind: str) -> None:
    there, entry, expected = SPLITS[kind]
    _parquet(tmp_path, lambda numbers: numbers, **there)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected) as refused:
            _define(tmp_path, tmp_path, hub="user/mine", **entry)
        assert "splits:" in refused.value.hint
    else:
        assert _define(tmp_path, tmp_path, hub="user/mine", **entry).images == expected


SCHEMAS: dict[str, tuple[Callable[[list[int]], list], dict[str, Any], str]] = {
    "a column that is missing": (lambda numbers: numbers, {"label": "kind"}, "with columns image, kind: it has columns image, label"),
    "images that are none": (
        lambda numbers: numbers,
        {"image": "label", "label": "label"},
        "the column label of .* holds no encoded images",
    ),
    "labels of fractions": (lambda numbers: [number / 2 for number in numbers], {}, "labels in the column label are not whole numbers"),
    "labels that are lists": (lambda numbers: [[number] for number in numbers], {}, "labels in the column label are not whole numbers"),
    "labels that are missing": (lambda numbers: [None, *numbers[1:]], {}, "1 of 60 labels in the column label are missing"),
    "one class": (lambda numbers: [1 for _ in numbers], {}, "fewer than two classes: 1"),
}


@pytest.mark.parametrize("kind", SCHEMAS)
def test_a_hub_data_set_that_is_another_one_is_one_sentence(tmp_path: Path, kind: str) -> None:
    labels, entry, why = SCHEMAS[kind]
    _parquet(tmp_path, labels, train=60)
    with pytest.raises(UserError, match=why) as refused:
        _define(tmp_path, tmp_path, hub="user/mine", **entry)
    assert refused.value.hint and "schema of" not in refused.value.hint


def test_one_of_several_configurations_is_named(tmp_path: Path) -> None:
    _parquet(tmp_path, lambda numbers: numbers, few=30, many=60)
    configs = [{"config_name": name, "data_files": [{"split": "train", "path": f"{name}.parquet"}]} for name in ("few", "many")]
    (tmp_path / "user/mine/README.md").write_text(f"---\n{json.dumps({'configs': configs})}\n---\n")
    assert _define(tmp_path, tmp_path, hub="user/mine", config="many").images == (42, 6, 12)
    for entry in ({}, {"config": "all"}):
        with pytest.raises(UserError, match="user/mine has the configurations 'few', 'many'"):
            _define(tmp_path, tmp_path, hub="user/mine", **entry)


def test_two_data_sets_of_one_name_are_refused(tmp_path: Path) -> None:
    _folder(tmp_path / "data", {"a": 12, "b": 12})
    path = tmp_path / "two.yaml"
    path.write_text(json.dumps({"datasets": [{"name": "mine", "folder": "data", **SMALL}, {"name": "Mine", "folder": "data", **SMALL}]}))
    with pytest.raises(UserError, match="Mine cannot be the name of a data set: mine is another data set of a grid file"):
        find_grid(str(path))


def test_more_images_than_fit_into_memory_are_refused_before_they_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _folder(tmp_path / "data", {"a": 12, "b": 12})
    monkeypatch.setattr(parts, "memory_bytes", lambda: 24 * 3 * 16**2 - 1)
    with pytest.raises(UserError, match=r"mine takes 0\.0 GB while it is decoded"):
        _define_and_load(tmp_path, folder="data")
    monkeypatch.setattr(parts, "memory_bytes", lambda: 24 * 3 * 16**2)
    assert len(_define_and_load(tmp_path, folder="data").train) == 16


def test_a_model_is_loaded_from_the_hub_without_the_grid_file(
    tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch, cli: Callable
) -> None:
    monkeypatch.setenv("HF_REPOSITORY", "user/study")
    _folder(tmp_path / "data", {"a": 12, "b": 12})
    path = _grid_file(tmp_path, **SMALL, folder="data")
    options = ("--size", "0.1M", "--dataset", f"{path}:mine", "--max_steps", "1", "--device", "cpu", "--upload", "true")
    assert cli("train", "--model", "classic", *options).code == 0
    _forget()
    model = from_pretrained("user/study", model="classic", size="0.1M", dataset="mine")
    assert model.facts["classes"] == ["a", "b"] and model.facts["protocol"].images == (16, 4, 4)
    listed, wanting = cli("list"), cli("evaluate", "--run_id", model.facts["run_id"])
    assert listed.code == 0 and "mine" in listed.out
    assert wanting.code == 2 and "FILE:NAME" in wanting.err


# ------------------------------------------------------------------------------------------------------------------ a study


@pytest.mark.slow
def test_a_study_trains_an_image_folder(tmp_path: Path, cli: Callable) -> None:
    """From the grid file to the report, through Ray's workers, which know nothing but what they are sent."""
    _folder(tmp_path / "data", {"a": 20, "b": 20})
    path = _grid_file(tmp_path, **SMALL, folder="data")
    done = cli("study", "--grid", str(path), "--address", "local", "--dashboard", "false", "--yes")
    assert done.code == 0, done.err
    assert "data: mine: the classes are a, b" in done.err
    assert "4 runs" in done.err and (tmp_path / "checkpoints/figures/own_mine_scaling_overlay.png").is_file()
    _forget()
    again = cli("study", "--grid", str(path), "--address", "local")
    assert again.code == 0 and "all 4 runs are done already" in again.err
    found = cli("evaluate", "--model", "differential", "--size", "0.2M", "--dataset", f"{path}:mine", "--json")
    assert found.code == 0 and '"images": 8' in found.out
    # On a machine without the data, with what a run's log says of them.
    _forget()
    shutil.rmtree(tmp_path / "data")
    assert cli("report", "--grid", str(path)).code == 2
    noted = next((tmp_path / "checkpoints/vit_classic").glob("*.log")).read_text()
    assert "data: classes: 2, images: [28, 4, 8]" in noted
    _grid_file(tmp_path, **SMALL, folder="data", classes=2, images=[28, 4, 8])
    assert cli("report", "--grid", str(path)).code == 0
