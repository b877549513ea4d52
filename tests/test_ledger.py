"""Identity of runs, names of files, and what becomes of damaged ones."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffvit.dataset import load
from diffvit.errors import UserError
from diffvit.ledger import spec as specs
from diffvit.ledger.disk import disk_faults, sweep_asides, write_atomically
from diffvit.ledger.files import RunFiles
from diffvit.ledger.results import read_result, read_results, write_result
from diffvit.ledger.spec import RunSpec
from diffvit.ledger.verify import verify_run
from diffvit.ledger.weights import load_weights, read_header, save_weights, weight_facts
from diffvit.vit import build_model

BASE = RunSpec.of("vit_classic", "10B", "CIFAR-100")


def test_everything_that_decides_the_result_is_in_the_run_id(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = {BASE.run_id("f")}
    others = [
        RunSpec.of("vit_differential", "10B", "CIFAR-100"),
        RunSpec.of("vit_classic", "25B", "CIFAR-100"),
        RunSpec.of("vit_classic", "10B", "BACH"),
        RunSpec.of("vit_classic", "10B", "CIFAR-100", seed=1),
        RunSpec.of("vit_classic", "10B", "CIFAR-100", precision="bf16"),
        *(
            RunSpec.of("vit_classic", "10B", "CIFAR-100", overrides={name: value})
            for name, value in {
                "epochs": 49, "batch_size": 256, "lr": 2e-4, "warmup_steps": 100, "max_steps": 10, "dropout": 0.1,
                "weight_decay": 0.1, "clip_norm": 1.0, "label_noise": 0.2, "input_noise": 0.1, "residual_scale": False,
                "heads": 16, "patch_size": 28, "image_size": 112,
            }.items()
        ),
    ]  # fmt: skip
    ids |= {spec.run_id("f") for spec in others} | {BASE.run_id("other data")}
    monkeypatch.setattr(specs, "SEMANTICS_VERSION", 99)
    ids.add(BASE.run_id("f"))
    assert len(ids) == len(others) + 3


def test_run_ids_stay_what_they_were() -> None:
    # Written down for semantics version 4: a change here would leave every finished run behind.
    assert BASE.run_id("f") == "46b797672e"
    assert RunSpec.of("vit_differential", "0.1M", "digits", seed=3).run_id("f") == "b224469d7c"
    assert RunSpec.of("vit_classic", "50B", "BACH", overrides={"epochs": 3, "label_noise": 0, "input_noise": 0}).run_id("f") == "6dc78c6349"


def test_overrides_as_text_are_read_as_they_were() -> None:
    overrides = {"epochs": 3, "lr": 1e-4, "residual_scale": False}
    assert specs.parse_overrides(specs.overrides_text(overrides)) == overrides


def test_a_checkpoint_of_before_the_scaled_start_is_read_with_the_old_one(tmp_path: Path) -> None:
    spec, path = RunSpec.of("vit_differential", "0.1M", "digits"), tmp_path / "model_id_0.1M_digits.safetensors"
    facts = weight_facts(spec, "id", load("digits"))
    del facts["protocol"]["residual_scale"]
    model = build_model(spec.model, spec.size, spec.protocol)
    save_weights(path, model, facts)
    read, facts = load_weights(path)
    assert facts["protocol"] == spec.protocol.with_overrides({"residual_scale": False})
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in read.state_dict().items())


def test_the_same_work_has_the_same_run_id() -> None:
    same = [
        RunSpec.of("vit_classic", "small", "cifar-100"),
        RunSpec.of("vit_classic", "10M", "CIFAR-100", overrides={"epochs": 50, "lr": 0.0001}),
        RunSpec.of("vit_classic", "10B", "CIFAR-100", overrides={"epochs": None}),
    ]
    assert {spec.run_id("f") for spec in same} == {BASE.run_id("f")}


def test_the_run_id_is_the_same_in_every_process() -> None:
    code = "from diffvit.ledger.spec import RunSpec; print(RunSpec.of('vit_classic', '10B', 'CIFAR-100').run_id('f'))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert printed.stdout.strip() == BASE.run_id("f")


def test_file_names_are_the_users() -> None:
    files = RunFiles.of(Path("checkpoints"), BASE, "abc")
    assert str(files.weights) == "checkpoints/vit_classic/model_abc_10B_CIFAR-100.safetensors"
    assert str(files.log) == "checkpoints/vit_classic/model_abc_10B_CIFAR-100_training.log"


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def no_room(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_room)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_damaged_checkpoints_are_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(UserError, match="no checkpoint"):
        load_weights(path)
    path.write_bytes(b"not a checkpoint at all")
    with pytest.raises(UserError, match="damaged"):
        load_weights(path)
    save_file({"a": torch.zeros(3)}, path)
    with pytest.raises(UserError, match="not written by diffvit"):
        load_weights(path)
    save_file({"a": torch.zeros(3)}, path, metadata={"diffvit": json.dumps({"model": "vit_classic", "protocol": {"images": [1]}})})
    with pytest.raises(UserError, match="not written by diffvit"):
        read_header(path)


def test_weights_that_do_not_fit_their_header(tmp_path: Path) -> None:
    small, large = (RunSpec.of("vit_classic", size, "digits") for size in ("0.1M", "0.2M"))
    path = tmp_path / "x.safetensors"
    save_weights(path, build_model("vit_classic", "0.1M", small.protocol), weight_facts(large, "id", load("digits")))
    with pytest.raises(UserError, match="does not fit"):
        load_weights(path)
    save_weights(path, build_model("vit_classic", "0.2M", small.protocol), weight_facts(large, "id", load("digits")))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged"):
        load_weights(path)


def test_damaged_results_are_named(tmp_path: Path) -> None:
    path = tmp_path / "vit_classic" / "model_x_10B_CIFAR-100_result.json"
    assert read_result(path) is None
    path.parent.mkdir()
    path.write_text('{"run_id": "x", ')
    with pytest.raises(UserError, match="damaged"):
        read_results(tmp_path)
    path.write_text("[]")
    with pytest.raises(UserError, match="not a result"):
        read_results(tmp_path)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> RunFiles:
    from diffvit.train import train

    folder = tmp_path_factory.mktemp("ended")
    spec = RunSpec.of("vit_classic", "0.1M", "digits", overrides={"max_steps": 3})
    return RunFiles.of(folder, spec, train(spec, folder, device="cpu").run_id)


def _copy(ended: RunFiles, folder: Path) -> RunFiles:
    import shutil

    shutil.copytree(ended.checkpoints, folder / "copy")
    return RunFiles(folder / "copy", ended.model, ended.run_id, ended.size, ended.dataset)


def test_a_whole_run_is_found_whole(ended: RunFiles) -> None:
    assert verify_run(ended.result) == []


@pytest.mark.parametrize("name", ["weights", "log", "predictions", "result"])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_every_damage_of_a_run_is_named(ended: RunFiles, tmp_path: Path, name: str, damage: str) -> None:
    copy = _copy(ended, tmp_path)
    path = getattr(copy, name)
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[:-20])
    else:
        content[content.index(b"0.", len(content) // 3) + 2 if name != "weights" else len(content) // 2] ^= 1
        path.write_bytes(content)
    wrong = verify_run(copy.result)
    assert len(wrong) == 1
    assert path.name in wrong[0]


def test_files_that_do_not_belong_together_are_named(ended: RunFiles, tmp_path: Path) -> None:
    copy = _copy(ended, tmp_path)
    result = read_result(copy.result)
    assert result is not None
    for change, said in (
        ({"parameters": 7}, "differ in parameters"),
        ({"steps": 4}, "after 3 of 4 steps"),
        ({"identity": {**result.identity, "seed": 9}}, "run_id that does not belong"),
        ({"seed": 9}, "differ in seed"),
    ):
        write_result(copy, dataclasses.replace(result, **change))
        assert any(said in wrong for wrong in verify_run(copy.result)), said
    copy.result.rename(copy.result.with_name("model_0000000000_0.1M_digits_result.json"))
    assert any("another run" in wrong for wrong in verify_run(copy.result.with_name("model_0000000000_0.1M_digits_result.json")))


def test_runs_in_a_linked_folder_are_seen_and_a_link_to_nowhere_is_named(ended: RunFiles, tmp_path: Path) -> None:
    ended = _copy(ended, tmp_path)
    ended.folder.rename(tmp_path / "big")
    ended.folder.symlink_to(tmp_path / "big")
    assert [result.run_id for result in read_results(ended.checkpoints)] == [ended.run_id] and verify_run(ended.result) == []
    (tmp_path / "big").rename(tmp_path / "away")
    for read in (lambda: read_results(ended.checkpoints), lambda: read_result(ended.result)):
        with pytest.raises(UserError, match=f"{ended.model} is a link to .*big, which is not there"):
            read()
    with pytest.raises(UserError, match="which is not there"), disk_faults(tmp_path):
        write_atomically(ended.log, b"not lost in silence")
    ended.folder.unlink()
    ended.folder.symlink_to(ended.folder.name)
    with pytest.raises(UserError, match="leads in a circle"):
        read_results(ended.checkpoints)


def test_a_result_that_is_a_link_to_nowhere_or_cannot_be_read_is_named(
    ended: RunFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = _copy(ended, tmp_path)
    ended.result.rename(ended.folder / "kept")
    ended.result.symlink_to("gone")
    with pytest.raises(UserError, match=r"_result\.json is a link to gone"):
        read_results(ended.checkpoints)
    ended.result.unlink()
    ended.result.symlink_to("kept")
    assert len(read_results(ended.checkpoints)) == 1

    def denied(path: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(os, "listdir", denied)
    with pytest.raises(UserError, match="cannot be read: Permission denied"):
        read_results(ended.checkpoints)


def test_a_disks_own_folder_that_cannot_be_read_does_no_harm(ended: RunFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = _copy(ended, tmp_path)
    (ended.checkpoints / "lost+found").mkdir()
    real = os.listdir

    def denied(path: Path) -> list[str]:
        if Path(path).name == "lost+found":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "listdir", denied)
    assert len(read_results(ended.checkpoints)) == 1


def test_what_a_killed_writer_left_aside_is_swept(tmp_path: Path) -> None:
    (tmp_path / ".model_a.x1.aside").touch()
    (tmp_path / ".model_b.x1.aside").touch()
    (tmp_path / "model_a").touch()
    sweep_asides(tmp_path, "model_a")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".model_b.x1.aside", "model_a"]
