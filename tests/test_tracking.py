"""Experiment trackers: each step once, also after a resume; one that fails costs a run nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from runs import stop_after
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffvit import tracking
from diffvit.errors import UserError
from diffvit.ledger.files import RunFiles
from diffvit.ledger.log import read_log
from diffvit.ledger.spec import RunSpec
from diffvit.tracking import TRACKERS, Tracker, Tracking, check_tracker
from diffvit.train import train

SPEC = RunSpec.of("vit_classic", "0.1M", "digits", overrides={"max_steps": 12, "batch_size": 32})


def test_tensorboard_has_every_step_once_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "_SECONDS_TO_STOP", 120.0)
    options = Tracking("tensorboard", dollars_per_second=0.01)
    stop_after(5, SPEC, tmp_path, tracking=options)
    result = train(SPEC, tmp_path, device="cpu", tracking=options)
    assert result is not None and result.test_accuracy is not None
    (folder,) = (tmp_path / "tracking" / "tensorboard").iterdir()
    assert folder.name == f"vit_classic_0.1M_digits_seed0_{result.run_id}"
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    log = read_log(RunFiles.of(tmp_path, SPEC, result.run_id).log)
    for name in ("train_loss", "val_loss", "val_accuracy", "learning_rate", "grad_norm"):
        curve = events.Scalars(name)
        assert [event.step for event in curve] == list(range(1, 13))
        assert [event.value for event in curve] == pytest.approx(log[name].tolist(), rel=1e-5)
    assert [event.value for event in events.Scalars("dollars")] == pytest.approx((0.01 * log["seconds"]).tolist(), abs=1e-4)
    assert all(event.value > 0 for event in events.Scalars("images_per_second"))
    assert events.Scalars("final/test_accuracy")[0].value == pytest.approx(result.test_accuracy)
    (config,) = [tag for tag in events.Tags()["tensors"] if tag.startswith("config")]
    assert b"| batch_size | 32 |" in events.Tensors(config)[0].tensor_proto.string_val[0]


class _Broken(Tracker):
    """Fails at its second call."""

    def __init__(self, run: Any):
        self._calls = 0

    def log(self, steps: list) -> None:
        self._calls += 1
        if self._calls > 1:
            raise SystemExit("the quota of hf_abcdefghijklmnopqrstuvwxyzabcdefgh is used up")

    def finish(self, outcome: Any) -> None:
        self.log([])


class _Silent(Tracker):
    """Never answers."""

    def __init__(self, run: Any):
        threading.Event().wait()

    def log(self, steps: list) -> None: ...

    def finish(self, outcome: Any) -> None: ...


@pytest.mark.parametrize(
    ("kind", "said"), [(_Broken, "wandb has failed, and is left out: "), (_Silent, "wandb had not received everything")]
)
def test_a_tracker_that_fails_costs_nothing(kind: type[Tracker], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tracking._CLASSES, "wandb", kind)
    monkeypatch.setattr(tracking, "_SECONDS_TO_FINISH", 0.05)
    warnings: list[str] = []
    with_tracker = train(SPEC, tmp_path / "with", device="cpu", tracking=Tracking("wandb"), on_warning=warnings.append)
    without = train(SPEC, tmp_path / "without", device="cpu")
    assert with_tracker is not None and without is not None and with_tracker.test_loss == without.test_loss
    (warning,) = [text for text in warnings if text.startswith("wandb")]
    assert warning.startswith(said) and "abcdefgh" not in warning and warning in with_tracker.notes


def test_a_run_that_is_stopped_does_not_wait_for_its_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its state is still to be sent, and whoever stops it kills it soon."""
    monkeypatch.setitem(tracking._CLASSES, "wandb", _Silent)
    monkeypatch.setattr(tracking, "_SECONDS_TO_FINISH", 10_000.0)
    monkeypatch.setattr(tracking, "_SECONDS_TO_STOP", 0.05)
    stop_after(3, SPEC, tmp_path, tracking=Tracking("wandb"))


def test_mlflow_without_a_server_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match="no server") as caught:
        check_tracker("mlflow")
    assert "MLFLOW_TRACKING_URI" in caught.value.hint


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRACKERS, "wandb", "a_package_that_nobody_has")
    check_tracker(None)
    with pytest.raises(UserError, match="--track wandb needs the package"):
        check_tracker("wandb")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_real_writers_continue_a_resumed_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tmp_path / "store"
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setattr(tracking, "_SECONDS_TO_FINISH", 120.0)
    monkeypatch.setattr(tracking, "_SECONDS_TO_STOP", 120.0)
    stop_after(5, SPEC, tmp_path, tracking=Tracking(name))
    warnings: list[str] = []
    result = train(SPEC, tmp_path, device="cpu", tracking=Tracking(name), on_warning=warnings.append)
    assert result is not None and not [text for text in warnings if text.startswith(name)]
    if name == "wandb":
        assert len(list((tmp_path / "tracking" / "wandb" / "wandb").glob(f"offline-run-*-{result.run_id}"))) == 2
        return
    from mlflow import MlflowClient

    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("diffvit").experiment_id])
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "train_loss")] == list(range(1, 13))
    assert run.data.metrics["test_accuracy"] == result.test_accuracy and run.info.status == "FINISHED"
    assert run.data.tags["model"] == "vit_classic" and run.data.params["batch_size"] == "32"


@pytest.mark.slow
def test_a_run_whose_tracker_failed_gets_nothing_of_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray trains the next run in the same process."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(tracking, "_SECONDS_TO_FINISH", 120.0)
    monkeypatch.setattr(tracking, "_SECONDS_TO_STOP", 120.0)
    monkeypatch.setattr(tracking._WandB, "log", lambda self, steps: steps.no_such_thing)
    first = train(SPEC, tmp_path, device="cpu", tracking=Tracking("wandb"))
    monkeypatch.undo()
    monkeypatch.setenv("WANDB_MODE", "offline")
    ids: list[str] = []
    log = tracking._WandB.log

    def noting(self: Any, steps: list) -> None:
        ids.append(self._run.id)
        log(self, steps)

    monkeypatch.setattr(tracking._WandB, "log", noting)
    second = train(dataclasses.replace(SPEC, seed=1), tmp_path, device="cpu", tracking=Tracking("wandb"))
    assert first is not None and second is not None and any("left out" in note for note in first.notes)
    assert set(ids) == {second.run_id}


@pytest.mark.slow
def test_a_study_is_tracked(tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text(json.dumps({"datasets": ["digits"], "sizes": ["small"], "overrides": {"max_steps": 4}}))
    command = [sys.executable, str(Path(__file__).parents[1] / "run.py"), "study", "--grid", "grid.yaml", "--track", "tensorboard"]
    subprocess.run([*command, "--address", "local", "--dashboard", "false"], cwd=tmp_path, check=True, env=os.environ, timeout=400)
    runs = sorted((tmp_path / "checkpoints" / "tracking" / "tensorboard").iterdir())
    assert [run.name.rpartition("_")[0] for run in runs] == ["vit_classic_0.1M_digits_seed0", "vit_differential_0.1M_digits_seed0"]
    assert all(list(run.glob("events*")) for run in runs)
