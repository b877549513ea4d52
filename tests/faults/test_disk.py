"""A disk that is full or read-only in the middle of a run: one clear error, nothing finished damaged, and on after room is made.

The disk is a small tmpfs; where mounting is not allowed, a limit on the length of files takes its place.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.processes import ending, finish, run_py, states, study, wait_until, weights
from runs import stop_after

from diffvit.errors import StorageError
from diffvit.keeping.saving import Every, Saving
from diffvit.ledger.files import RunFiles, result_paths
from diffvit.ledger.spec import RunSpec
from diffvit.ledger.verify import verify_run
from diffvit.train import train

SPEC = RunSpec.of("vit_differential", "0.1M", "digits", overrides={"epochs": 2})
TRAIN = ("train", "--model", SPEC.model, "--size", SPEC.size, "--dataset", SPEC.dataset, "--epochs", "2", "--device", "cpu")
# A state of the model is 1.2 MB: three fit, as long as nothing else is there.
DISK_BYTES = 4 * 1024**2


@pytest.fixture
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A small file system."""
    size = getattr(request, "param", DISK_BYTES)
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("this machine does not let us mount a tmpfs; test_files_that_may_not_grow takes its place")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _fill(disk: Path, leave: int = 0) -> Path:
    """Takes all but `leave` bytes of the disk."""
    filler = disk / "filler"
    free = os.statvfs(disk)
    filler.write_bytes(b"x" * max(0, free.f_bavail * free.f_frsize - leave))
    return filler


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The weights of the undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    train(SPEC, folder / "checkpoints", device="cpu")
    return weights(folder)


def test_a_full_disk_while_a_state_is_saved(disk: Path, whole: dict[str, bytes]) -> None:
    checkpoints = disk / "checkpoints"
    stop_after(20, SPEC, checkpoints)
    filler = _fill(disk, leave=600_000)  # half a state
    with pytest.raises(StorageError, match="No space left on device"):
        train(SPEC, checkpoints, device="cpu", saving=Saving(Every(steps=5)))
    assert [path.name for path in states(disk)] == ["000000020.state"]
    assert not list(disk.glob("checkpoints/.state/*/*.aside"))
    filler.unlink()
    result = train(SPEC, checkpoints, device="cpu")
    files = RunFiles.of(checkpoints, SPEC, result.run_id)
    assert "# resumed after step 20" in files.log.read_text()
    assert weights(disk) == whole and verify_run(files.result) == []


@pytest.mark.parametrize("leave", [0, 150_000, 600_000])
def test_a_full_disk_at_any_other_moment(disk: Path, whole: dict[str, bytes], leave: int) -> None:
    # No room for the log; for the log only; for the weights, and not for what comes then.
    filler = _fill(disk, leave)
    with pytest.raises(StorageError, match="No space left on device"):
        train(SPEC, disk / "checkpoints", device="cpu", saving=Saving(Every(steps=5)) if leave > 200_000 else Saving())
    assert not weights(disk) and not result_paths(disk / "checkpoints")
    filler.unlink()
    train(SPEC, disk / "checkpoints", device="cpu")
    assert weights(disk) == whole


def test_files_that_may_not_grow(tmp_path: Path, whole: dict[str, bytes]) -> None:
    process = run_py(tmp_path, *TRAIN, "--save_every", "0.2s", limit_bytes=500_000)
    with ending(process):
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "error: " in errors and "File too large" in errors and "hint: make room" in errors and "Traceback" not in errors
    assert not states(tmp_path) and not weights(tmp_path)
    train(SPEC, tmp_path / "checkpoints", device="cpu")
    assert weights(tmp_path) == whole


def test_a_folder_that_becomes_read_only(disk: Path, whole: dict[str, bytes]) -> None:
    process = run_py(disk, *TRAIN, "--save_every", "0.1s")
    with ending(process):
        wait_until(lambda: states(disk), process)
        folder = states(disk)[0].parent
        # A file system with files open for writing cannot be made read-only; one that is can be put over the folder.
        subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)], check=True)
        _, errors = process.communicate(timeout=120)
    subprocess.run(["umount", str(folder)], check=True)
    assert process.returncode == 1, errors
    assert "Read-only file system" in errors and "hint: " in errors and "Traceback" not in errors
    assert states(disk) and not weights(disk)
    train(SPEC, disk / "checkpoints", device="cpu")
    assert weights(disk) == whole


@pytest.mark.slow
@pytest.mark.parametrize("disk", [2 * DISK_BYTES], indirect=True)  # room for figures beside three states
def test_a_study_on_a_full_disk_says_so_and_carries_on(disk: Path) -> None:
    grid = "datasets: [digits]\nsizes: [small]\noverrides: {epochs: 2}\n"
    done = study(disk, "--save_every", "0.3s", grid=grid.replace("sizes", "models: [vit_classic]\nsizes"))
    finish(done)
    first = weights(disk)
    filler = _fill(disk, leave=200_000)
    process = study(disk, "--save_every", "0.3s", grid=grid)
    with ending(process):
        _, errors = process.communicate(timeout=400)
    assert process.returncode == 1, errors
    assert "1 of 2 runs failed" in errors and "No space left on device" in errors
    assert "Traceback" not in errors
    assert weights(disk) == first and all(verify_run(path) == [] for path in result_paths(disk / "checkpoints"))
    filler.unlink()
    finish(study(disk, "--save_every", "0.3s", grid=grid))
    assert len(weights(disk)) == 2 and first.items() <= weights(disk).items()
