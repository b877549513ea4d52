"""Nothing that is read is trusted: whatever a file says ends in what it means or in one clear error, and nothing is executed or written.

Sizes here are such that believing them would take hours or all memory.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import io
import json
import math
import os
import pickle
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import stop_after
from safetensors.torch import load, save

from diffvit.errors import DiffvitError, StorageError, UserError
from diffvit.findings.kept import read_evaluations
from diffvit.hub.account import find_account, find_token, parse_repository
from diffvit.hub.client import _checked_file, is_safe_name
from diffvit.keeping.keeper import RunKeeper
from diffvit.keeping.lease import Lease, lease_state, take_lease
from diffvit.keeping.runs import fetch_run
from diffvit.keeping.saving import Every, Saving
from diffvit.keeping.state import StateFolder, folder_id
from diffvit.keeping.storage import Storage, open_storage
from diffvit.ledger.files import RunFiles
from diffvit.ledger.log import LogPosition, WorkAgain, read_log, was_interrupted
from diffvit.ledger.results import read_result
from diffvit.ledger.spec import RunSpec
from diffvit.ledger.verify import verify_run
from diffvit.ledger.weights import load_weights, read_header
from diffvit.loop.resume import fits_run
from diffvit.train import train
from study.commands.parsing import parse_resource, parse_saving, parse_seconds
from study.finished import FinishedRuns
from study.grid import read_grid
from study.hub import collect
from study.listing import ledger_rows, ledger_text, verify_ledger
from study.report.analysis import analyse
from study.report.page import page
from study.results import table_text
from study.shard import Shard
from study.table import cell_key, run_table, step_table


def bounded(examples: int) -> settings:
    return settings(max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))


def clear(action: Callable[[], Any]) -> Any:
    """What an action gives, or None where it ends in a clear error. Any other exception is the test's failure."""
    try:
        return action()
    except DiffvitError as error:
        told = error
    assert told.message and told.hint and "\n" not in told.message and len(told.message) < 1000
    return None


DEEP = "[" * 100_000 + "]" * 100_000

# Instead of what is expected. DEEP is put in as it is, since json.dumps would not write it.
VALUES: list[Any] = [
    None, True, -1, 0, 1, 7, 2**62, 10**30, 10**400, -(10**18), 0.5, -0.5, 1e308, math.nan, math.inf, "", "x", "x" * 5000, "../../outside",
    "/outside", "..", "a/b", "\ud800", "\x1b[31mred", "line\nline", "$\\frac$", "1e5", [], [[]], [1], ["../x"], {}, {"a": 1}, {"../x": "0" * 64},
    [[[[[[[[]]]]]]]], "DEEP",
]  # fmt: skip
hostile = st.sampled_from(VALUES)


def as_json(value: Any) -> str:
    return json.dumps(value).replace('"DEEP"', DEEP)


@st.composite
def mutations(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Bytes flipped, cut off, cut out, put in or put at the end."""
    kind = draw(st.sampled_from(["flip", "truncate", "extend", "insert", "remove", "digits"]))
    place, some = draw(st.floats(0, 1, exclude_max=True)), draw(st.binary(min_size=1, max_size=8))

    def mutate(content: bytes) -> bytes:
        at = int(place**3 * len(content))  # more at the beginning, where headers are
        if kind == "flip":
            return content[:at] + bytes(a ^ b for a, b in zip(content[at:], some, strict=False)) + content[at + len(some) :]
        if kind == "digits":
            return content[:at] + b"9" * 5000 + content[at:]
        return {
            "truncate": content[:at], "extend": content + some, "insert": content[:at] + some + content[at:],
            "remove": content[:at] + content[at + len(some) :],
        }[kind]  # fmt: skip

    return mutate


def replaced(document: Any, path: tuple, value: Any) -> Any:
    """A copy in which one value is another."""
    changed = copy.deepcopy(document)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return changed


def paths(document: Any, depth: int = 4) -> list[tuple]:
    """Where a document's values are."""
    found: list[tuple] = []
    for key, value in document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ():
        found.append((key,))
        if depth:
            found += [(key, *rest) for rest in paths(value, depth - 1)]
    return found


# The smallest real ledger: both architectures, three steps.
GRID = "datasets: [digits]\nsizes: [small]\noverrides: {max_steps: 3}\n"
SPECS = [RunSpec.of(model, "0.1M", "digits", overrides={"max_steps": 3}) for model in ("vit_classic", "vit_differential")]


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ledger")
    for spec in SPECS:
        train(spec, folder, device="cpu")
    return folder


@pytest.fixture(scope="module")
def ended(ledger: Path) -> RunFiles:
    """The differential run's files."""
    path = next(ledger.glob("vit_differential/*_result.json"))
    return RunFiles(ledger, "vit_differential", path.name.split("_")[1], "0.1M", "digits")


def in_copy(files: RunFiles, folder: Path) -> RunFiles:
    shutil.copytree(files.checkpoints, folder / "copy", dirs_exist_ok=True)
    return RunFiles(folder / "copy", files.model, files.run_id, files.size, files.dataset)


@pytest.fixture
def copied(ended: RunFiles, tmp_path: Path) -> Iterator[RunFiles]:
    """A run to be damaged; nothing may appear beside its ledger."""
    yield in_copy(ended, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {"copy", "grid.yaml", "storage", "report", "elsewhere"}


# ---------------------------------------------------------------------------------------------------------- grid files


def grid_of(folder: Path, content: bytes, suffix: str = ".yaml") -> Any:
    path = folder / f"grid{suffix}"
    path.write_bytes(content)
    return clear(lambda: read_grid(path).runs())


def laughs(line: str, first: str) -> bytes:
    return "\n".join([first, *(line.format(i=i, list=", ".join([f"*a{i - 1}"] * 10)) for i in range(1, 30)), "datasets: *a29"]).encode()


HEAD = b"datasets: [digits]\n"
BAD_YAML = {
    "laughs": laughs("k{i}: &a{i} [{list}]", "k0: &a0 [lol]"),
    "laughs in a known key": HEAD + b"conditions: [&a {epochs: 1}, *a]\n",
    "merged laughs": laughs("k{i}: &a{i} {{<<: [{list}]}}", "k0: &a0 {x: 1}"),
    "recursive": b"datasets: &a [*a]",
    "deep": b"datasets: " + b"[" * 9_000,
    "deep and closed": b"datasets: " + b"[" * 9_000 + b"]" * 9_000,
    "deep maps": b"datasets: " + b"{a: " * 5_000,
    "deep blocks": b"- " * 9_000,
    "object": b"datasets: !!python/object/apply:os.system [touch pwned]",
    "another object": b"datasets: !!python/object/new:os.system [touch pwned]",
    "no integer": b'seeds: !!int ""',
    "no float": b'seeds: !!float ""',
    "no time": b'seeds: !!timestamp "x"',
    "a time": HEAD + b"seeds: 2024-99-99",
    "a time at the end of time": HEAD + b"seeds: 9999-12-31 23:59:59-23:59",
    "many seeds": HEAD + b"seeds: 1000000000",
    "many seeds in a list": HEAD + b"seeds: [" + b",".join(b"%d" % i for i in range(10_001)) + b"]",
    "a large seed": HEAD + b"seeds: [100000000000000000000000]",
    "a seed of many digits": HEAD + b"seeds: [0x" + b"f" * 15_000 + b"]",
    "so many seeds": HEAD + b"seeds: 0x" + b"f" * 15_000,
    "sixties": HEAD + b"overrides: {lr: 1" + b":59" * 2000 + b".5}",
    "many epochs": HEAD + b"overrides: {epochs: 1000000000}",
    "epochs of many digits": HEAD + b"overrides: {epochs: 0x" + b"f" * 15_000 + b"}",
    "a data set of many digits": HEAD + b"seeds: {0x" + b"f" * 15_000 + b": 1}",
    "a key of many digits": HEAD + b"0x" + b"f" * 15_000 + b": 1",
    "many runs": HEAD + b"seeds: 10000\nconditions: [" + b"{}," * 5000 + b"{}]",
    "not UTF-8": HEAD + b"sizes: [\xff\xfe]",
    "NUL": HEAD + b"sizes: [\x00]",
    "UTF-16": "datasets: [digits]".encode("utf-16"),
    "long": HEAD + b"#" * 10_000_000,
    "a list": b"[]",
    "two documents": HEAD + b"---\n" + HEAD,
    "a list for a key": b"? [a]\n: 1",
    "nan": HEAD + b"overrides: {lr: .nan}",
    "a set": b"datasets: !!set {digits}",
}
BAD_TOML = {
    "deep": b"datasets = " + b"[" * 9_000,
    "deep tables": b"datasets = " + b"{a=" * 5_000,
    "dotted": b".".join([b"a"] * 5_000) + b" = 1",
    "dotted in a known key": b'datasets = ["digits"]\noverrides.' + b".".join([b"a"] * 5_000) + b" = 1",
    "digits": b'datasets = ["digits"]\nseeds = ' + b"9" * 15_000,
    "hexadecimal digits": b'datasets = ["digits"]\nseeds = 0x' + b"f" * 15_000,
    "many seeds": b'datasets = ["digits"]\nseeds = 1000000000',
    "time": b"datasets = 2024-01-01",
    "not UTF-8": b'datasets = ["\xff"]',
}


@pytest.mark.parametrize("name", BAD_YAML)
def test_a_bad_yaml_grid_is_one_sentence(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert grid_of(tmp_path, BAD_YAML[name]) is None
    assert [path.name for path in tmp_path.iterdir()] == ["grid.yaml"]


@pytest.mark.parametrize("name", BAD_TOML)
def test_a_bad_toml_grid_is_one_sentence(tmp_path: Path, name: str) -> None:
    assert grid_of(tmp_path, BAD_TOML[name], ".toml") is None


def test_too_many_seeds_on_the_command_line(tmp_path: Path, cli: Any) -> None:
    outcome = cli("study", "--seeds", "1000000000", "--dry_run")
    assert outcome.code == 2 and "more than 10,000 runs" in outcome.err


structures = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["digits", "small", "epochs", "vit_classic"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["digits", "epochs", "lr", "", "1"]), inner, max_size=3),
    max_leaves=8,
)


@bounded(150)
@given(content=st.dictionaries(st.sampled_from(["models", "sizes", "datasets", "seeds", "overrides", "conditions"]), structures))
def test_any_structure_in_a_grid_file(tmp_path_factory: pytest.TempPathFactory, content: dict) -> None:
    folder = tmp_path_factory.getbasetemp()
    grid_of(folder, yaml.safe_dump({"datasets": ["digits"], **content}).encode("utf-8", "replace"))


@bounded(150)
@given(mutate=mutations(), suffix=st.sampled_from([".yaml", ".toml"]))
def test_a_mutated_grid_file(tmp_path_factory: pytest.TempPathFactory, mutate: Callable, suffix: str) -> None:
    yaml_grid = GRID + "seeds: {digits: 2}\nconditions: [{}, {label_noise: 0.2, lr: 1e-3}]\n"
    toml_grid = 'datasets = ["digits"]\nsizes = ["small"]\nseeds = 2\nconditions = [{}, {lr = 1e-3}]\n[overrides]\nepochs = 3\n'
    grid_of(tmp_path_factory.getbasetemp(), mutate((yaml_grid if suffix == ".yaml" else toml_grid).encode()), suffix)


# --------------------------------------------------------------------------------------------------------- checkpoints


def split_checkpoint(content: bytes) -> tuple[dict, dict, bytes]:
    """(header, our facts in it, tensors)."""
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    return header, json.loads(header["__metadata__"]["diffvit"]), content[8 + length :]


def checkpoint(header: dict, facts: str, tensors: bytes) -> bytes:
    text = json.dumps({**header, "__metadata__": {"diffvit": facts}}).encode()
    return struct.pack("<Q", len(text)) + text + tensors


def loaded(path: Path) -> None:
    """What is read of a checkpoint, if anything, is no larger than the file."""
    clear(lambda: read_header(path))
    if found := clear(lambda: load_weights(path)):
        assert 4 * found[0].count_parameters() <= path.stat().st_size


@bounded(200)
@given(mutate=mutations())
def test_a_mutated_checkpoint(tmp_path_factory: pytest.TempPathFactory, ended: RunFiles, mutate: Callable) -> None:
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(mutate(ended.weights.read_bytes()))
    loaded(path)


@bounded(300)
@given(data=st.data(), value=hostile)
def test_a_header_with_other_facts(tmp_path_factory: pytest.TempPathFactory, ended: RunFiles, data: st.DataObject, value: Any) -> None:
    header, facts, tensors = split_checkpoint(ended.weights.read_bytes())
    path = tmp_path_factory.getbasetemp() / "facts.safetensors"
    changed = replaced(facts, data.draw(st.sampled_from(paths(facts))), value)
    path.write_bytes(checkpoint(header, as_json(changed), tensors))
    loaded(path)


@pytest.mark.parametrize(
    "protocol",
    [
        {"d_model": 16384, "heads": 2}, {"d_model": 10**9}, {"image_size": 16384, "patch_size": 1}, {"image_size": 2**40},
        {"depths": {"0.1M": 1000}}, {"depths": {"0.1M": 10**9}}, {"depths": {"0.1M": -1}}, {"depths": {"0.1M": "2"}}, {"depths": ["0.1M"]},
        {"classes": 10**12}, {"channels": 10**12}, {"mlp_ratio": 10**9}, {"patch_size": 0}, {"heads": 0}, {"heads": 3}, {"heads": 64, "d_model": 65},
        {"heads": 1}, {"d_model": 64.0}, {"dropout": "0"}, {"lr": math.nan}, {"images": [1, 2]}, {"new": 1}, {"d_model": True},
    ],
    ids=str,
)  # fmt: skip
def test_a_header_of_another_model_is_refused(ended: RunFiles, tmp_path: Path, protocol: dict) -> None:
    header, facts, tensors = split_checkpoint(ended.weights.read_bytes())
    path = tmp_path / "x.safetensors"
    path.write_bytes(checkpoint(header, as_json({**facts, "protocol": {**facts["protocol"], **protocol}}), tensors))
    assert clear(lambda: load_weights(path)) is None


def test_a_header_that_fits_its_tensors_asks_for_no_other_images(ended: RunFiles, copied: RunFiles) -> None:
    from diffvit.evaluation import open_checkpoint

    # As many patches, each as large, of which all but one value are gone: the same tensors, and maps for 32 heads in place of 4.
    header, facts, tensors = split_checkpoint(ended.weights.read_bytes())
    for lambdas in [name for name in header if "lambda_" in name or "sub_norm" in name]:
        header[lambdas]["shape"] = [2] if "lambda_" in lambdas else [4]
    facts["protocol"]["heads"] = 32
    order = sorted((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"][0])
    parts, at = [], 0
    for name in order:
        first, _ = header[name]["data_offsets"]
        length = 4 * math.prod(header[name]["shape"])
        parts.append(tensors[first : first + length])
        header[name]["data_offsets"] = [at, at + length]
        at += length
    copied.weights.write_bytes(checkpoint(header, json.dumps(facts), b"".join(parts)))
    assert clear(lambda: load_weights(copied.weights)) is not None
    assert clear(lambda: open_checkpoint(copied.weights, None, torch.device("cpu"))) is None


DAMAGES = ["dtype", "shape", "missing", "extra", "overlap", "outside", "backwards", "no metadata", "long header", "deep"]


def damaged_tensors(content: bytes, damage: str, module: str) -> bytes:
    """A checkpoint or state whose header says something else of the weight and bias of a LayerNorm."""
    header, facts, tensors = split_checkpoint(content)
    name, text = f"{module}.weight", json.dumps(facts)
    first, last = header[name]["data_offsets"]
    if damage == "dtype":
        header[name]["dtype"] = "I32"
    elif damage == "shape":
        header[name]["shape"] = [8, 8]
    elif damage == "missing":
        del header[name]
    elif damage == "extra":
        header["another"] = {"dtype": "F32", "shape": [0], "data_offsets": [len(tensors), len(tensors)]}
    elif damage == "overlap":
        header[f"{module}.bias"]["data_offsets"] = [first, last]
    elif damage == "outside":
        header[name]["data_offsets"] = [2**60, 2**60 + last - first]
    elif damage == "backwards":
        header[name]["data_offsets"] = [last, first]
    elif damage == "deep":
        text = DEEP
    content = checkpoint(header, text, tensors)
    if damage == "no metadata":
        content = checkpoint(header, text, tensors).replace(b"diffvit", b"another")
    if damage == "long header":
        content = struct.pack("<Q", 2**62) + content[8:]
    return content


@pytest.mark.parametrize("damage", DAMAGES)
def test_tensors_that_are_not_the_models(ended: RunFiles, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(damaged_tensors(ended.weights.read_bytes(), damage, "norm"))
    assert clear(lambda: load_weights(path)) is None


# ---------------------------------------------------------------------------------------------------------------- logs


def logged(path: Path, steps: int) -> None:
    for count in (None, steps, 10**15):
        clear(lambda count=count: read_log(path, count))
    was_interrupted(path)
    for position in (None, LogPosition(0, ""), LogPosition(10**15, ""), LogPosition(-1, "")):
        done_again = WorkAgain.after(path, position)
        assert isinstance(done_again[0], int) and isinstance(f"{done_again[1]:.1f}", str)
        assert position is None or not position.fits(path)


@bounded(250)
@given(mutate=mutations(), again=mutations())
def test_a_mutated_log(tmp_path_factory: pytest.TempPathFactory, ended: RunFiles, mutate: Callable, again: Callable) -> None:
    path = tmp_path_factory.getbasetemp() / "run.log"
    path.write_bytes(again(mutate(ended.log.read_bytes())))
    logged(path, 3)


@pytest.mark.parametrize(
    "tail",
    [
        b"4,1,1,1,1,1,1,1" * 500_000 + b"\n", b"# " * 1_000_000 + b"\n", b"# ; 1 steps, " * 200_000, b"4," * 500_000 + b"\n",
        b"9" * 5000 + b",1,1,1,1,1,1,1\n", b"# x; " + b"9" * 5000 + b" steps, 1 s done again\n", b"# x; 1 steps, 1.2.3 s done again\n",
        b"4,1,1,1,1,1,1,nan\n", b"4,1,1,1,1,1,1,1e999\n", b"\x00" * 100_000, b"\xff\xfe" * 100 + b"\n", "4,٤,1,1,1,1,1,1\n".encode(),
        b"4,1,1,1,1,1,1,1\r\n", b'4,1,"1,1,1,1,1,1\n', b"step,epoch\n", b"\n" * 100_000,
    ],
    ids=lambda tail: repr(tail[:20]),
)  # fmt: skip
def test_a_log_with_such_an_end(ended: RunFiles, tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "run.log"
    path.write_bytes(ended.log.read_bytes() + tail)
    logged(path, 4)


# ------------------------------------------------------------------------------------------------------------- results


def everything_that_reads(checkpoints: Path, path: Path) -> None:
    """All of the ledger's readers, but figures."""
    result = clear(lambda: read_result(path))
    if result is not None:
        files = result.files(checkpoints)
        for name in (files.stem, *result.sha256):
            assert (files.folder / name).resolve().is_relative_to(checkpoints.resolve())
        cell_key(result.identity)
    assert isinstance(verify_run(path), list)
    json.dumps(verify_ledger(checkpoints))
    table = clear(lambda: run_table(checkpoints, SPECS))
    if table is not None and len(table):
        table_text(table).encode()
        clear(lambda: step_table(checkpoints, table))
        if (found := clear(lambda: analyse(table, checkpoints))) is not None:
            page(found, [], "")
    if (rows := clear(lambda: ledger_rows(checkpoints, None))) is not None:
        ledger_text(rows, checkpoints, None).encode()


def written(files: RunFiles, content: str | bytes) -> None:
    files.result.write_bytes(content.encode() if isinstance(content, str) else content)


def with_checksum(result: Any) -> str:
    """As whoever changes a result on purpose writes it."""
    text = json.dumps({key: value for key, value in result.items() if key != "checksum"}, sort_keys=True)
    return as_json({**result, "checksum": hashlib.sha256(text.encode()).hexdigest()})


@bounded(60)
@given(mutate=mutations())
def test_a_mutated_result(tmp_path_factory: pytest.TempPathFactory, ended: RunFiles, mutate: Callable) -> None:
    files = in_copy(ended, tmp_path_factory.getbasetemp())
    written(files, mutate(ended.result.read_bytes()))
    everything_that_reads(files.checkpoints, files.result)


@bounded(120)
@given(data=st.data(), value=hostile)
def test_a_result_with_another_value(tmp_path_factory: pytest.TempPathFactory, ended: RunFiles, data: st.DataObject, value: Any) -> None:
    files = in_copy(ended, tmp_path_factory.getbasetemp())
    result = json.loads(ended.result.read_text())
    written(files, with_checksum(replaced(result, data.draw(st.sampled_from(paths(result))), value)))
    everything_that_reads(files.checkpoints, files.result)


# What decides where files are, what is allocated, and what is printed.
BAD_RESULTS: dict[str, dict[str, Any]] = {
    "run_id": {"run_id": "../../../outside"}, "model": {"model": ".."}, "size": {"size": "../x"}, "dataset": {"dataset": "a/b"},
    "files": {"sha256": {"../../outside": "0" * 64}}, "absolute file": {"sha256": {"/etc/passwd": "0" * 64}}, "accuracy": {"test_accuracy": "0.5"},
    "accuracy above 1": {"test_accuracy": 7}, "notes": {"notes": 5}, "versions": {"versions": ["x"]}, "version": {"versions": {"torch": []}},
    "overrides": {"overrides": {"$\\frac$": 1}}, "identity": {"identity": {}}, "seed": {"seed": 2**70}, "status": {"status": "fine"},
    "terminal": {"finished": "\x1b[2J"}, "no loss": {"test_loss": None}, "steps": {"steps": "3"}, "parameters": {"parameters": 10**400},
    "a list of files": {"sha256": []}, "git_commit": {"git_commit": {}},
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_RESULTS)
def test_a_result_that_cannot_be_is_refused(copied: RunFiles, name: str) -> None:
    written(copied, with_checksum({**json.loads(copied.result.read_text()), **BAD_RESULTS[name]}))
    assert clear(lambda: read_result(copied.result)) is None
    assert len(verify_run(copied.result)) == 1
    everything_that_reads(copied.checkpoints, copied.result)


def test_versions_take_the_place_of_nothing_else(copied: RunFiles) -> None:
    result = json.loads(copied.result.read_text())
    result["versions"] |= {"run_id": "0000000000", "test_accuracy": "1", "model": "vit_classic"}
    written(copied, with_checksum(result))
    row = run_table(copied.checkpoints).set_index("model").loc["vit_differential"]
    assert (row["run_id"], row["test_accuracy"]) == (copied.run_id, result["test_accuracy"])


def test_a_result_of_very_many_steps_makes_no_room_for_them(copied: RunFiles) -> None:
    result = json.loads(copied.result.read_text())
    written(copied, with_checksum({**result, "steps": 10**13}))
    assert clear(lambda: step_table(copied.checkpoints, run_table(copied.checkpoints))) is None
    assert verify_run(copied.result)


def test_a_result_under_another_runs_name(copied: RunFiles) -> None:
    shutil.copy(copied.result, copied.folder / "model_0000000000_0.1M_digits_result.json")
    assert clear(lambda: run_table(copied.checkpoints)) is None


@pytest.mark.parametrize("name", ["deep", "long", "list", "bytes", "folder"])
def test_a_result_that_is_none(copied: RunFiles, name: str) -> None:
    content = {"deep": DEEP, "long": "[" + " " * 8_000_000 + "]", "list": "[1]", "bytes": b"\xff\x00"}.get(name, "")
    if name == "folder":
        copied.result.unlink()
        copied.result.mkdir()
    else:
        written(copied, content)
    assert clear(lambda: read_result(copied.result)) is None
    everything_that_reads(copied.checkpoints, copied.result)


NUMBERS = {
    "test_accuracy": [0, 1, 0.5, 1e-300], "test_loss": [0, -1, math.nan, math.inf, 1e300], "val_loss": [math.nan, 0.0], "parameters": [1, 2**49],
    "seconds": [0, 1e11], "forward_flops": [1, 2**50], "test_images": [1, 10**7], "images_per_second": [0], "seed": [2**60], "depth": [1],
    "memorised": [0.5], "false_labels": [2**50], "train_loss": [-1e300],
}  # fmt: skip


@bounded(20)
@given(values=st.fixed_dictionaries({}, optional={name: st.sampled_from(some) for name, some in NUMBERS.items()}))
def test_numbers_that_can_be_and_are_odd(tmp_path_factory: pytest.TempPathFactory, ended: RunFiles, values: dict) -> None:
    files = in_copy(ended, tmp_path_factory.getbasetemp())
    written(files, with_checksum({**json.loads(ended.result.read_text()), **values}))
    everything_that_reads(files.checkpoints, files.result)


def test_the_report_of_odd_numbers(copied: RunFiles, tmp_path: Path) -> None:
    grid = tmp_path / "grid.yaml"
    grid.write_text(GRID)
    odd = {"test_loss": math.nan, "test_accuracy": 1, "seconds": 0, "notes": ["<script>alert(1)</script>"], "device_name": "<b>|$x_"}
    written(copied, with_checksum({**json.loads(copied.result.read_text()), **odd}))
    pages, _ = clear(lambda: FinishedRuns(copied.checkpoints, str(grid)).report(tmp_path / "report"))
    with pytest.raises(UserError, match="none of these runs was on a GPU"):  # and so nothing that the price could be for
        FinishedRuns(copied.checkpoints, str(grid)).report(tmp_path / "report", price=2.5)
    assert pages and "<script>alert" not in pages[0].read_text() and "<b>|" not in pages[0].read_text()


@bounded(30)
@given(mutate=mutations())
def test_mutated_predictions(tmp_path_factory: pytest.TempPathFactory, ended: RunFiles, mutate: Callable) -> None:
    files = in_copy(ended, tmp_path_factory.getbasetemp())
    shutil.copy(ended.result, files.result)
    files.predictions.write_bytes(mutate(ended.predictions.read_bytes()))
    clear(lambda: analyse(run_table(files.checkpoints, SPECS), files.checkpoints))
    shutil.copy(ended.predictions, files.predictions)


# ---------------------------------------------------------------------------------------------------------- evaluations


@pytest.fixture(scope="module")
def findings(ended: RunFiles) -> dict[str, Any]:
    """What `evaluate` finds of few images."""
    from diffvit.findings.attention import evaluate_attention
    from diffvit.findings.robustness import evaluate_corruptions

    how: dict[str, Any] = {"limit": 16, "device": torch.device("cpu")}
    return {"corruptions": evaluate_corruptions(ended.weights, **how), "attention": evaluate_attention(ended.weights, **how)}


def evaluated(files: RunFiles, findings: Any) -> Any:
    """The report's analysis of the findings, whose checksum is right."""
    content = {"run_id": files.run_id, "findings": findings}
    files.evaluations.write_text(with_checksum(content))
    table = run_table(files.checkpoints, SPECS)
    found = clear(lambda: analyse(table, files.checkpoints))
    if found is not None:
        page(found, [], "")
        from study.report.write import _draw_findings

        _draw_findings(found, files.checkpoints)
    return found


def test_findings_as_they_are_written_are_read(copied: RunFiles, findings: dict) -> None:
    assert evaluated(copied, findings) is not None and read_evaluations(copied) == json.loads(json.dumps(findings))


@bounded(120)
@given(data=st.data(), value=hostile)
def test_findings_with_another_value(
    tmp_path_factory: pytest.TempPathFactory, ended: RunFiles, findings: dict, data: Any, value: Any
) -> None:
    kind = data.draw(st.sampled_from(["corruptions", "attention"]))
    path = data.draw(st.sampled_from(paths(findings[kind], 3)))
    files = in_copy(ended, tmp_path_factory.getbasetemp())
    shutil.copy(ended.result, files.result)
    files.evaluations.write_text(with_checksum({"run_id": files.run_id, "findings": {kind: replaced(findings[kind], path, value)}}))
    if clear(lambda: read_evaluations(files)):
        clear(lambda: analyse(run_table(files.checkpoints, SPECS), files.checkpoints))
    files.evaluations.unlink()


def a_png(width: int, height: int) -> str:
    """A small file of a very large picture."""
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return base64.b64encode(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(10_000))) + chunk(b"IEND", b"")
    ).decode()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("corruptions", "images"), 10**12), (("corruptions", "conditions"), []), (("corruptions", "conditions", 3, "severity"), 1),
        (("corruptions", "conditions", 0, "right"), "A"), (("corruptions", "conditions", 0, "accuracy"), math.nan),
        (("attention", "pictures", 0, "png"), a_png(60_000, 60_000)), (("attention", "pictures", 0, "png"), a_png(20_000, 8_000)),
        (("attention", "pictures", 0, "png"), "AAAA"), (("attention", "pictures", 0, "last_map"), [[1.0, 2.0], [1.0]]),
        (("attention", "layers"), []), (("attention", "layers", 1), {}), (("attention", "warnings"), 5), (("attention",), "x"),
        (("corruptions", "warnings"), [5]), (("attention", "layers", 0, "signal_share"), {}),
    ],
    ids=lambda each: str(each)[:40],
)  # fmt: skip
def test_findings_that_cannot_be_are_refused(copied: RunFiles, findings: dict, path: tuple, value: Any) -> None:
    assert evaluated(copied, replaced(findings, path, value)) is None
    assert any("evaluations.json is damaged" in wrong for wrong in verify_run(copied.result))


def test_findings_of_other_layers_than_the_models(copied: RunFiles, findings: dict) -> None:
    fewer = replaced(findings, ("attention", "layers"), findings["attention"]["layers"][:1])
    assert evaluated(copied, fewer) is None


def test_an_unknown_kind_of_findings(copied: RunFiles, findings: dict) -> None:
    assert evaluated(copied, {"x; touch pwned": findings["attention"]}) is None


# --------------------------------------------------------------------------------------------------------------- states


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ledger with a run that was stopped after its second step."""
    folder = tmp_path_factory.mktemp("stopped")
    stop_after(2, SPECS[0], folder)
    return folder


def state_file(folder: Path) -> Path:
    return next(folder.glob(".state/*/*.state"))


@pytest.fixture
def state(stopped: Path, tmp_path: Path) -> Path:
    """The state's file in a copy of that ledger."""
    shutil.copytree(stopped, tmp_path / "copy")
    return state_file(tmp_path / "copy")


def with_digest(payload: bytes) -> bytes:
    return payload + hashlib.sha256(payload).digest()


def forged(path: Path, change: Callable[[dict], dict]) -> bytes:
    """A state with a right digest in which something is changed: a dict of what its header says and of its tensors."""
    payload = path.read_bytes()[:-32]
    content = change({**split_checkpoint(payload)[1], "tensors": load(payload)})
    return with_digest(save(content.pop("tensors"), {"diffvit": json.dumps(content)}))


def pickled(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


class Touch:
    """A pickle that makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_what_is_no_state_of_this_version_is_passed_over(state: Path, tmp_path: Path) -> None:
    marker, whole = tmp_path / "pwned", state.read_bytes()
    header, facts, tensors = split_checkpoint(whole[:-32])
    payloads = [
        pickled({"format": 2, "step": 2}), pickled(Touch(marker)), pickle.dumps(Touch(marker)), b"", b"PK\x03\x04",  # as states were
        *(checkpoint(header, json.dumps({**facts, "format": other}), tensors) for other in (2, 4, "3", [3], None)),
        *(checkpoint(header, text, tensors) for text in ("[]", "null", "3", "{}", "", "NaN", "[" * 10**5)),
    ]  # fmt: skip
    heard: list[str] = []
    for content in (*map(with_digest, payloads), whole[:-1], whole[1:], whole[:-32], whole + b"x", with_digest(whole), b"", b"x" * 31):
        state.write_bytes(content)
        assert StateFolder(tmp_path / "copy", state.parent.name, heard.append).load() is None
        assert len(verify_ledger(tmp_path / "copy")["damaged"]) == 1
    assert [text.split(".state ")[1] for text in heard] == [
        *["was written by another version; the one before is used"] * len(payloads), *["is damaged; the one before is used"] * 4,
        "was written by another version; the one before is used", *["is damaged; the one before is used"] * 2,
    ]  # fmt: skip
    assert not marker.exists()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_state_with_other_tensors_than_its_run(state: Path, tmp_path: Path, damage: str) -> None:
    state.write_bytes(with_digest(damaged_tensors(state.read_bytes()[:-32], damage, "model.norm")))
    with RunKeeper(RunFiles.of(tmp_path / "copy", SPECS[0], state.parent.name), Saving()) as keeper:
        assert keeper.load_state(lambda state: fits_run(state, SPECS[0], 3)) is None


@bounded(120)
@given(mutate=mutations(), honest=st.booleans())
def test_a_mutated_state(tmp_path_factory: pytest.TempPathFactory, stopped: Path, mutate: Callable, honest: bool) -> None:
    folder = tmp_path_factory.getbasetemp() / "states"
    content = state_file(stopped).read_bytes()
    path = folder / ".state/run/000000002.state"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(mutate(content) if honest else with_digest(mutate(content[:-32])))
    StateFolder(folder, "run").load(lambda state: False)
    StateFolder(folder, "run").damaged()


WEIGHT, MOMENT = "model.norm.weight", "optimizer.norm.weight.exp_avg"
CHANGES: list[tuple[tuple, Any]] = [
    (("step",), 10**15), (("step",), -1), (("step",), 1), (("step",), "2"), (("step",), 3), (("step",), 2.0), (("step",), None),
    (("last",), []), (("last",), {}), (("last", 0), 10**9), (("last", 2), math.nan), (("last", 3), "x"), (("last", 7), math.inf),
    (("log",), 5), (("log",), (10**15, "0" * 64)), (("log",), (-1, "0" * 64)), (("log",), ("x", None)), (("log",), (5, 5)),
    (("log",), ("0" * 64, "0" * 64)), (("log",), []), (("started",), 5), (("started",), "\x1b[2J"),
    (("micro_batch",), 0), (("micro_batch",), "x"), (("micro_batch",), math.nan), (("micro_batch",), None), (("tensors",), {}),
    (("tensors", WEIGHT), torch.zeros(5)), (("tensors", WEIGHT), torch.zeros(64, dtype=torch.float64)), (("tensors", WEIGHT), torch.zeros(64, 1)),
    (("tensors", "model.another"), torch.zeros(1)), (("tensors", "tensors"), torch.zeros(1)), (("tensors", ""), torch.zeros(1)),
    (("tensors", MOMENT), torch.zeros(1)), (("tensors", MOMENT), torch.zeros(0, 10**12)), (("tensors", MOMENT), torch.zeros(64).half()),
    (("tensors", "optimizer.norm.weight.step"), torch.zeros(1)), (("tensors", "optimizer.norm.weight.lr"), torch.tensor(math.nan)),
    (("tensors", "optimizer.0.exp_avg"), torch.zeros(64)),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value"), CHANGES, ids=lambda each: str(each)[:50].replace("\n", " "))
def test_a_state_that_is_not_of_the_run_is_passed_over(state: Path, tmp_path: Path, path: tuple, value: Any) -> None:
    state.write_bytes(forged(state, lambda content: replaced(content, path, value)))
    with RunKeeper(RunFiles.of(tmp_path / "copy", SPECS[0], state.parent.name), Saving()) as keeper:
        assert keeper.load_state(lambda state: fits_run(state, SPECS[0], 3)) is None


def test_a_run_whose_state_is_not_its_own_begins_again(state: Path, tmp_path: Path) -> None:
    heard: list[str] = []
    state.write_bytes(forged(state, lambda content: {**content, "step": 10**15}))
    result = train(SPECS[0], tmp_path / "copy", device="cpu", on_warning=heard.append)
    assert result.steps == 3 and any("resume state" in text for text in heard)
    assert len(read_log(next((tmp_path / "copy").glob("*/*.log")), 3)) == 3


def test_a_state_of_the_run_is_taken(state: Path, tmp_path: Path) -> None:
    with RunKeeper(RunFiles.of(tmp_path / "copy", SPECS[0], state.parent.name), Saving()) as keeper:
        content = keeper.load_state(lambda state: fits_run(state, SPECS[0], 3))
        assert content["step"] == 2 and content["tensors"]["optimizer.norm.weight.step"] == 2
        assert keeper.load_state(lambda state: fits_run(state, SPECS[0], 2)) is None
        assert keeper.load_state(lambda state: fits_run(state, SPECS[1], 3)) is None


def test_other_files_among_the_states(state: Path, tmp_path: Path) -> None:
    folder = state.parent
    for name in ("x.state", "-1.state", "9" * 200 + ".state", "٣٣٣٣٣٣٣٣٣.state", ".state"):
        (folder / name).write_bytes(b"x")
    assert StateFolder(tmp_path / "copy", folder.name).steps() == [2]
    (tmp_path / "copy/.state/folder").write_bytes(b"\xff" * 10**6)
    assert clear(lambda: folder_id(tmp_path / "copy")) is None


# -------------------------------------------------------------------------------------------------------------- storage


def stored(storage: Storage, name: str, content: bytes, marker: Any = None) -> None:
    storage.put(name, content)
    if marker is not None:
        storage.overwrite(name + ".ok", marker if isinstance(marker, bytes) else as_json(marker).encode("utf-8", "replace"))


def all_of(storage: Storage, folder: Path) -> None:
    """All that a storage is asked for; what comes is what was put there."""
    for name in ["object", *(clear(lambda: storage.names(".", "")) or [])]:
        content = clear(lambda name=name: storage.read(name))
        assert content in (None, b"content")
        if clear(lambda name=name: storage.get(name, folder / "brought")):
            assert (folder / "brought").read_bytes() == b"content"
        clear(lambda name=name: storage.has(name))


RIGHT = {"bytes": 7, "sha256": hashlib.sha256(b"content").hexdigest()}


@bounded(80)
@given(
    marker=hostile
    | st.dictionaries(st.sampled_from(["bytes", "sha256"]), hostile)
    | st.sampled_from([{**RIGHT, "bytes": b} for b in (6, 8, -7)])
)
def test_a_marker_with_something_else(tmp_path_factory: pytest.TempPathFactory, marker: Any) -> None:
    folder = tmp_path_factory.getbasetemp()
    storage = open_storage(str(folder / "marked"))
    stored(storage, "object", b"content", marker)
    all_of(storage, folder)


@bounded(60)
@given(mutate=mutations())
def test_a_mutated_marker(tmp_path_factory: pytest.TempPathFactory, mutate: Callable) -> None:
    folder = tmp_path_factory.getbasetemp()
    storage = open_storage(str(folder / "marked"))
    stored(storage, "object", b"content", mutate(json.dumps(RIGHT).encode()))
    all_of(storage, folder)


def test_an_object_longer_than_its_marker_says_is_not_brought(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path / "storage"))
    for there in (RIGHT, {**RIGHT, "bytes": 10**12}):
        stored(storage, "object", b"content", there)
        with open(tmp_path / "storage/object", "wb") as file:
            file.write(b"content")
            file.truncate(2**40)  # a hole
        assert storage.read("object") is None and not storage.get("object", tmp_path / "brought")
    with open(tmp_path / "storage/object.ok", "wb") as file:
        file.truncate(2**40)
    assert storage.read("object") is None and not storage.get("object", tmp_path / "brought")


@pytest.mark.parametrize("there", ["object", "object.ok"])
def test_a_folder_in_place_of_an_object(tmp_path: Path, there: str) -> None:
    storage = open_storage(str(tmp_path / "storage"))
    stored(storage, "object", b"content")
    (tmp_path / "storage" / there).unlink()
    (tmp_path / "storage" / there).mkdir()
    all_of(storage, tmp_path)


LEASE = {"owner": "another", "host": "host", "seconds": 60.0, "expires": 4e9, "nonce": "x"}


@bounded(120)
@given(
    content=hostile | st.tuples(st.sampled_from(list(LEASE)), hostile).map(lambda pair: {**LEASE, pair[0]: pair[1]}), name=st.just("000001")
)
def test_a_lease_with_something_else(tmp_path_factory: pytest.TempPathFactory, content: Any, name: str) -> None:
    with tempfile.TemporaryDirectory(dir=tmp_path_factory.getbasetemp()) as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffvit.keeping.lease.time", SimpleNamespace(**{**vars(__import__("time")), "sleep": lambda seconds: None}))
        storage = open_storage(folder)
        storage.overwrite(f".state/run/lease/{name}", as_json(content).encode("utf-8", "replace"))
        assert lease_state(storage, "run") in ("live", "expired")
        lease = clear(lambda: take_lease(storage, "run", "us", 60.0))
        assert (isinstance(lease, str) and len(lease) < 2000) or isinstance(lease, Lease)
        if isinstance(lease, Lease):
            assert lease.renew()
            lease.release()
            assert lease_state(storage, "run") == "none"


@pytest.mark.parametrize("name", ["²", "1" * 200, "٣٣٣٣٣٣", "-00001", "x", "000001.ok"])
def test_other_objects_among_the_leases(tmp_path: Path, name: str) -> None:
    storage = open_storage(str(tmp_path))
    storage.overwrite(f".state/run/lease/{name}", json.dumps(LEASE).encode())
    assert lease_state(storage, "run") == "none"
    assert isinstance(take_lease(storage, "run", "us", 60.0), Lease)


@bounded(100)
@given(data=st.data(), value=hostile)
def test_collecting_from_a_hostile_storage(
    tmp_path_factory: pytest.TempPathFactory, ended: RunFiles, data: st.DataObject, value: Any
) -> None:
    result = json.loads(ended.result.read_text())
    with tempfile.TemporaryDirectory(dir=tmp_path_factory.getbasetemp()) as folder:
        storage, here = open_storage(f"{folder}/storage"), Path(folder, "here/checkpoints")
        for name in result["sha256"]:
            storage.put(f"{ended.model}/{name}", ended.folder / name)
        changed = with_checksum(replaced(result, data.draw(st.sampled_from(paths(result))), value))
        storage.put(f"{ended.model}/{ended.result.name}", changed.encode("utf-8", "replace"))
        storage.put(f"{ended.model}/model_.._.._.._result.json", changed.encode("utf-8", "replace"))
        clear(lambda: collect(storage, SPECS, here))
        clear(lambda: fetch_run(storage, RunFiles(here, ended.model, ended.run_id, ended.size, ended.dataset)))
        assert {path.name for path in Path(folder).iterdir()} <= {"here", "storage"}
        assert {path.name for path in Path(folder, "here").glob("*")} <= {"checkpoints"}
        assert {path.name for path in here.glob("*/*")} <= {*result["sha256"], ended.result.name}
        clear(lambda: run_table(here))


def test_another_runs_result_is_not_collected(ended: RunFiles, tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path / "storage"))
    storage.put(f"{ended.model}/model_0000000000_0.1M_digits_result.json", ended.result)
    with pytest.raises(StorageError, match="is not a result of diffvit"):
        collect(storage, SPECS, tmp_path / "here")
    assert not (tmp_path / "here").exists()


def test_states_with_other_names_in_a_storage(stopped: Path, tmp_path: Path) -> None:
    run_id = state_file(stopped).parent.name
    storage = open_storage(str(tmp_path / "storage"))
    for name in ("x", "9" * 100, "²", "-00000002"):
        storage.put(f".state/{run_id}/{name}.state", b"x")
    files = RunFiles.of(tmp_path / "here", SPECS[0], run_id)
    with RunKeeper(files, Saving(storage=str(tmp_path / "storage"))) as keeper:
        assert keeper.load_state(lambda state: True) is None


# ------------------------------------------------------------------------------------------------ names, options, .env

name_parts = st.sampled_from(
    ["..", ".", "", " ", "a", "a.", ".. ", "...", "C:", "CON", "nul.txt", "\\", "\x00", "\ud800", "é", "~", "a" * 300, "$x"]
)
names = st.lists(name_parts | st.text(max_size=4), max_size=5).map("/".join) | st.text(max_size=12) | hostile


@bounded(500)
@given(name=names)
def test_a_safe_name_stays_in_its_folder(name: Any) -> None:
    if not is_safe_name(name):
        return
    for kind, root in ((PurePosixPath, "/folder"), (PureWindowsPath, "C:\\folder")):
        path = kind(root, name)
        assert path.is_relative_to(root) and path != kind(root) and ".." not in path.parts
    windows = PureWindowsPath(name)
    assert not windows.is_reserved() and not windows.drive and all(part.rstrip(". ") == part for part in windows.parts)
    name.encode()


@bounded(300)
@given(
    text=st.text(max_size=30) | st.lists(name_parts | st.sampled_from(["https://huggingface.co", "user", "tree"]), max_size=6).map("/".join)
)
def test_a_repository_is_two_plain_names(text: str) -> None:
    if (found := clear(lambda: parse_repository(text))) is not None:
        user, name = found.split("/")
        assert re.fullmatch("[A-Za-z0-9][A-Za-z0-9._-]*", user) and re.fullmatch("[A-Za-z0-9][A-Za-z0-9._-]*", name) and ".." not in found


entries = st.fixed_dictionaries(
    {
        "path": names,
        "size": hostile,
        "blob_id": st.just("0" * 40) | hostile,
        "lfs": st.none() | st.builds(SimpleNamespace, sha256=hostile, size=hostile),
    }
)


@bounded(300)
@given(entry=entries)
def test_a_listed_file_is_plain_or_refused(entry: dict) -> None:
    file = clear(lambda: _checked_file(SimpleNamespace(**entry)))
    if file is not None:
        assert is_safe_name(file.name) and type(file.size) is int and 0 <= file.size < 2**50


ENV = b"HF_REPOSITORY=user/study\nHF_TOKEN=hf_token\n"
BAD_ENV = [b"\xff\xfe", b"HF_TOKEN=a\x00b", b"HF_TOKEN='a b'\nHF_REPOSITORY=u/n", b"HF_REPOSITORY=../..\nHF_TOKEN=x", b"x" * 10**7,
           b'HF_TOKEN="a\\nb"\nHF_REPOSITORY=u/n', b"HF_TOKEN=${HF_TOKEN}\nHF_REPOSITORY=u/n\xc3\xa9", b"HF_TOKEN=$(touch pwned)\n"]  # fmt: skip


@pytest.mark.parametrize("content", BAD_ENV, ids=range(len(BAD_ENV)))
def test_a_bad_env_file_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.chdir(tmp_path)
    Path(".env").write_bytes(content)
    assert clear(find_account) is None
    clear(find_token)
    assert [path.name for path in tmp_path.iterdir()] == [".env"]


@bounded(150)
@given(mutate=mutations())
def test_a_mutated_env_file(tmp_path_factory: pytest.TempPathFactory, mutate: Callable) -> None:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir=tmp_path_factory.getbasetemp()) as folder:
        patch.chdir(folder)
        Path(".env").write_bytes(mutate(ENV))
        if (found := clear(find_account)) is not None:
            assert found.token and found.token.isascii() and found.token.isprintable()


def test_an_env_that_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(".env").mkdir()
    assert clear(find_account) is None


options = st.text(max_size=10) | st.sampled_from(
    ["9" * 400 + "steps", "9" * 400, "1e400s", "nan", "inf", "٣s", "0.0", ".", "1steps", "1.5steps", "9" * 9 + "h", "1/9999", "0/0", "9" * 50 + "/1",
     "x=nan", "x=inf", "x=1e400", "=1", "x=" + "9" * 5000, "~nobody_of_this_name/x", "a\x00b", "x" * 5000, "weird://x", "s3://", "::", "a::b", "zip://x",
     "reference://x", "hf://", "hf://../..", "hf://a/b/../..", "memory://x", "file://", "http://[", "simplecache::file://x"]
)  # fmt: skip


@bounded(300)
@given(text=options)
def test_options_are_understood_or_refused(text: str) -> None:
    for parse in (Every.parse, Shard.parse, parse_resource, parse_seconds):
        found = clear(lambda parse=parse: parse(text))
        if isinstance(found, Every):
            assert found.seconds is None or 0 < found.seconds < 1e10
            assert found.steps is None or 0 < found.steps < 1e10
    clear(lambda: parse_saving(text, False))


@bounded(150)
@given(text=options)
def test_a_storage_can_be_opened_or_is_refused(text: str) -> None:
    from diffvit.keeping.storage import open_storage

    os.environ.pop("HF_TOKEN", None)
    clear(lambda: open_storage(text))
