"""The loop: it learns, repeats itself to the bit, and is the same however a step is split."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.multiprocessing as mp
from conftest import needs_cifar
from runs import stop_after

from bench.peers import give_weights, timm_model
from diffvit.compute import Compute
from diffvit.data.batches import Prepare
from diffvit.dataset import load, with_training_noise
from diffvit.ledger.files import RunFiles
from diffvit.ledger.log import read_log
from diffvit.ledger.results import read_result, read_results
from diffvit.ledger.spec import RunSpec
from diffvit.ledger.verify import verify_run
from diffvit.ledger.weights import load_weights
from diffvit.loop import loss_scale
from diffvit.loop.fit import Stopped, fit
from diffvit.memory import micro_batch_within
from diffvit.protocol import ARMS, PROTOCOLS
from diffvit.train import train
from diffvit.vit import build_model
from study.grid import find_grid

SHORT = {"max_steps": 12, "batch_size": 32}
TOO_HIGH = 2.0**22  # a loss scale in fp16 at which the first gradients overflow


def _losses(files: RunFiles) -> pd.DataFrame:
    return read_log(files.log)[["train_loss", "val_loss", "val_accuracy"]]


def _run(folder: Path, model: str = "vit_differential", overrides: dict | None = None, **options) -> RunFiles:
    spec = RunSpec.of(model, "0.1M", "digits", overrides=SHORT if overrides is None else overrides)
    result = train(spec, folder, device="cpu", **options)
    return RunFiles.of(folder, spec, result.run_id)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> RunFiles:
    """A run of twelve steps, to be looked at."""
    return _run(tmp_path_factory.mktemp("short"))


def test_a_run_leaves_its_four_files_and_learns(tmp_path: Path) -> None:
    files = _run(tmp_path, overrides={"epochs": 4, "lr": 2e-3})
    assert {path.name for path in files.weights.parent.iterdir()} == {
        path.name for path in (files.weights, files.log, files.predictions, files.result)
    }
    log = pd.read_csv(files.log, comment="#")
    assert log["step"].tolist() == list(range(1, 161))
    assert log["train_loss"].tail(20).mean() < 0.6 * log["train_loss"].head(20).mean()
    result = read_result(files.result)
    assert result is not None
    assert result.test_accuracy > 0.5
    predictions = pd.read_csv(files.predictions)
    assert len(predictions) == 359
    assert (predictions["label"] == predictions["predicted"]).mean() == pytest.approx(result.test_accuracy)
    assert predictions["loss"].mean() == pytest.approx(result.test_loss, rel=1e-6)
    assert predictions["label"].tolist() == load("digits").test.labels.tolist()


def test_the_saved_model_gives_the_recorded_accuracy(short: RunFiles) -> None:
    from diffvit.evaluation import evaluate_checkpoint

    result = read_result(short.result)
    assert result is not None
    report = evaluate_checkpoint(short.weights, device=torch.device("cpu"), batch_size=50)
    limited = evaluate_checkpoint(short.weights, device=torch.device("cpu"), limit=result.test_images)
    assert limited["accuracy"] == pytest.approx(result.test_accuracy)
    assert limited["loss"] == pytest.approx(result.test_loss, rel=1e-5)
    assert report["images"] == 359
    assert sum(row["images"] for row in report["classes"]) == 359


@pytest.mark.parametrize("model", ["vit_classic", "vit_differential"])
def test_same_seed_same_bytes(tmp_path: Path, model: str) -> None:
    overrides = {**SHORT, "dropout": 0.2}
    first, second = (_run(tmp_path / name, model, overrides) for name in "ab")
    assert first.weights.read_bytes() == second.weights.read_bytes()
    pd.testing.assert_frame_equal(_losses(first), _losses(second), check_exact=True)


def test_another_seed_another_run(tmp_path: Path, short: RunFiles) -> None:
    spec = RunSpec.of("vit_differential", "0.1M", "digits", seed=1, overrides=SHORT)
    result = train(spec, tmp_path, device="cpu")
    assert result.run_id not in short.weights.name
    assert short.weights.read_bytes() != RunFiles.of(tmp_path, spec, result.run_id).weights.read_bytes()


def test_micro_batches_change_neither_losses_nor_norms(tmp_path: Path, short: RunFiles) -> None:
    split = _run(tmp_path, compute=Compute(micro_batch=5))
    assert short.weights.name == split.weights.name  # the same work, so the same run_id
    pd.testing.assert_frame_equal(_losses(short), _losses(split), rtol=2e-4, atol=1e-5)
    pd.testing.assert_series_equal(read_log(short.log)["grad_norm"], read_log(split.log)["grad_norm"], rtol=1e-3)
    assert json.loads(split.result.read_text())["micro_batch"] == 5


def _in_a_group(rank: int, folder: str, rounds: list[tuple[dict, bool, str]]) -> None:
    """One of two processes trains in each round, of which the second process alone may be asked to stop; notes how each ended."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    loss_scale.FIRST_SCALE = TOO_HIGH
    for number, (overrides, stops, precision) in enumerate(rounds):
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous{number}", rank=rank, world_size=2)
        asked, outcome = iter(range(1, 1000)), "ended"
        try:
            spec = RunSpec.of("vit_differential", "0.1M", "digits", precision=precision, overrides=overrides)
            train(spec, Path(folder), device="cpu", should_stop=lambda: stops and rank == 1 and next(asked) >= 10)  # noqa: B023
        except Stopped as stopped:
            outcome = f"stopped after {stopped.step}"
        Path(folder, f"outcome{number}-{rank}").write_text(outcome)
        dist.destroy_process_group()


def test_groups_of_workers(tmp_path: Path) -> None:
    """They give the losses of one worker, and stop, resume, diverge and skip steps in fp16 together."""
    # AdamW hides a wrong scale of the gradient; clipping some of the steps does not.
    compared = [
        {"max_steps": 10, "batch_size": 32, "clip_norm": 11.0},
        {"max_steps": 3, "batch_size": 1257, "clip_norm": 11.0},  # the last batch is one image: a worker without any
    ]
    interrupted, diverges = {"epochs": 1}, {"epochs": 1, "lr": 1e8}
    cases = [*((each, False) for each in compared), (interrupted, True), (interrupted, False), (diverges, False)]
    rounds = [*((*case, "fp32") for case in cases), (compared[0], False, "fp16")]
    mp.start_processes(_in_a_group, args=(str(tmp_path), rounds), nprocs=2, start_method="spawn")
    outcomes = [{(tmp_path / f"outcome{number}-{rank}").read_text() for rank in (0, 1)} for number in range(len(rounds))]
    assert outcomes == [{"ended"}, {"ended"}, {"stopped after 11"}, {"ended"}, {"ended"}, {"ended"}]

    for overrides in compared:
        alone = _run(tmp_path / "alone", overrides=overrides)
        together = RunFiles(tmp_path, "vit_differential", alone.stem.split("_")[1], "0.1M", "digits")
        pd.testing.assert_frame_equal(_losses(alone), _losses(together), rtol=2e-4, atol=1e-5)
    half = RunSpec.of("vit_differential", "0.1M", "digits", precision="fp16", overrides=compared[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_scale, "FIRST_SCALE", TOO_HIGH)
        alone_id = train(half, tmp_path / "alone", device="cpu").run_id
    alone, together = (read_log(RunFiles.of(folder, half, alone_id).log) for folder in (tmp_path / "alone", tmp_path))
    skipped = [~np.isfinite(log["grad_norm"]) for log in (alone, together)]
    assert skipped[0].tolist() == skipped[1].tolist() and 0 < skipped[0].sum() < 10
    pd.testing.assert_series_equal(alone["train_loss"], together["train_loss"], rtol=2e-2)
    results = read_results(tmp_path)
    assert [result.workers for result in results] == [2] * 5
    statuses = {result.status: result for result in results if "epochs" in result.overrides}
    assert set(statuses) == {"done", "diverged"}
    log = RunFiles(tmp_path, "vit_differential", statuses["done"].run_id, "0.1M", "digits").log
    assert "# resumed after step 11;" in log.read_text() and read_log(log)["step"].tolist() == list(range(1, 41))


def test_the_norm_in_the_log_is_the_gradients(short: RunFiles) -> None:
    one = read_log(short.log)["grad_norm"]
    assert (one > 0).all()
    spec = RunSpec.of("vit_differential", "0.1M", "digits", overrides=SHORT)
    data, model = load("digits"), build_model(spec.model, spec.size, spec.protocol)
    model.initialise(0)
    norms: list[float] = []
    optimizer_step = torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        norms.append(sum(float(p.grad.double().square().sum()) for p in model.parameters()) ** 0.5)
        return optimizer_step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", spy)
        fit(model, data, spec.protocol, seed=0)
    assert norms == pytest.approx(one.tolist(), rel=1e-4)


def test_both_arms_see_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffvit.dataset import ImageSet

    data = load("digits")
    seen: dict[str, list] = {}
    for model in ("vit_classic", "vit_differential"):
        rows = seen.setdefault(model, [])
        original = ImageSet.__getitems__
        monkeypatch.setattr(
            ImageSet, "__getitems__", lambda self, r, rows=rows, original=original: (rows.append(r.tolist()), original(self, r))[1]
        )
        built = build_model(model, "0.1M", PROTOCOLS["digits"])
        fit(built, data, PROTOCOLS["digits"].with_overrides({"max_steps": 45}), seed=5)
        monkeypatch.undo()
    assert len(seen["vit_classic"]) == 90
    assert seen["vit_classic"] == seen["vit_differential"]


def test_both_arms_train_on_the_same_noise_and_test_on_clean_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffvit.train as module

    seen: list = []
    original = module.fit
    monkeypatch.setattr(
        module, "fit", lambda model, data, *args, **options: (seen.append(data), original(model, data, *args, **options))[1]
    )
    overrides = {**SHORT, "label_noise": 0.2, "input_noise": 0.3}
    runs = [_run(tmp_path, model, overrides) for model in ("vit_classic", "vit_differential")]
    clean, (first, second) = load("digits"), seen
    assert torch.equal(first.train.pixels, second.train.pixels) and torch.equal(first.train.labels, second.train.labels)
    assert not torch.equal(first.train.pixels, clean.train.pixels) and not torch.equal(first.train.labels, clean.train.labels)
    for files in runs:
        result = read_result(files.result)
        assert result is not None
        assert result.identity["protocol"]["label_noise"] == 0.2 and result.false_labels == 252
        assert "data: 252 of 1258 training labels are false" in result.notes
        assert load_weights(files.weights)[1]["mean"] == list(clean.mean)
        labels = pd.read_csv(files.predictions)["label"].tolist()
        assert labels == clean.test.labels[: len(labels)].tolist()
        assert verify_run(files.result) == []


def test_a_resumed_run_meets_the_same_noise(tmp_path: Path) -> None:
    overrides = {**SHORT, "label_noise": 0.4, "input_noise": 0.3}
    whole = _run(tmp_path / "whole", overrides=overrides)
    stop_after(5, RunSpec.of("vit_differential", "0.1M", "digits", overrides=overrides), tmp_path / "parts")
    resumed = _run(tmp_path / "parts", overrides=overrides)
    assert "# resumed after step 5;" in resumed.log.read_text()
    assert resumed.weights.read_bytes() == whole.weights.read_bytes()


def test_memorised_and_recovered_are_what_the_saved_model_answers(tmp_path: Path) -> None:
    files = _run(tmp_path, overrides={"epochs": 3, "label_noise": 0.2})
    result = read_result(files.result)
    assert result is not None
    model, facts = load_weights(files.weights)
    clean = load("digits")
    noisy, rows = with_training_noise(clean, facts["protocol"], facts["seed"])
    with torch.inference_mode():
        answers = model(Prepare(8, clean.mean, clean.std)(noisy.train.pixels[rows])).argmax(1)
    assert result.false_labels == len(rows) == 252
    assert result.memorised == pytest.approx((answers == noisy.train.labels[rows]).double().mean().item())
    assert result.recovered == pytest.approx((answers == clean.train.labels[rows]).double().mean().item())
    assert result.recovered > 0.3 > result.memorised  # three epochs learn the digits before the mistakes


@pytest.mark.parametrize("overrides", [SHORT, {**SHORT, "input_noise": 0.1}, {**SHORT, "label_noise": 0.2, "lr": 1e8}])
def test_nothing_is_memorised_without_false_labels_or_a_model(tmp_path: Path, overrides: dict) -> None:
    result = read_result(_run(tmp_path, overrides=overrides).result)
    assert result is not None
    assert (result.memorised, result.recovered) == (None, None)
    assert result.false_labels == (252 if "label_noise" in overrides else None)
    assert result.status == ("diverged" if "lr" in overrides else "done")


def test_a_trial_looks_at_no_more_false_labels_than_it_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffvit.train as module

    looked: list[int] = []
    original = module.evaluate
    monkeypatch.setattr(
        module, "evaluate", lambda model, images, **options: (looked.append(len(images)), original(model, images, **options))[1]
    )
    _run(tmp_path, overrides={"max_steps": 3, "label_noise": 0.4})
    assert looked == [96, 96, 96]  # of validation, test and falsely labelled images


def test_done_is_not_done_again(tmp_path: Path) -> None:
    files = _run(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in files.weights.parent.iterdir()}
    steps: list = []
    _run(tmp_path, on_steps=lambda some, total: steps.extend(some))
    assert not steps
    assert before == {path: path.stat().st_mtime_ns for path in files.weights.parent.iterdir()}


def test_a_run_without_its_result_file_is_done_again(tmp_path: Path) -> None:
    files = _run(tmp_path)
    weights = files.weights.read_bytes()
    files.result.unlink()
    files.weights.write_bytes(b"half a file")
    _run(tmp_path)
    assert files.weights.read_bytes() == weights


def test_the_log_says_what_a_reader_must_know(tmp_path: Path) -> None:
    files = _run(tmp_path, overrides={"max_steps": 3})
    text = files.log.read_text()
    assert "warning: warm-up (50 steps) is not shorter than the run (3 steps)" in text
    assert "# test_accuracy=" in text
    result = read_result(files.result)
    assert result is not None
    assert any("warm-up" in note for note in result.notes)


def test_clipping_is_an_option(tmp_path: Path, short: RunFiles) -> None:
    clipped_files = _run(tmp_path, overrides={**SHORT, "clip_norm": 1e-3})
    assert not _losses(short).equals(_losses(clipped_files))
    assert json.loads(clipped_files.result.read_text())["identity"]["protocol"]["clip_norm"] == 1e-3


def test_the_header_rebuilds_the_model(short: RunFiles) -> None:
    model, facts = load_weights(short.weights)
    assert facts["run_id"] in short.weights.name
    assert facts["protocol"].with_overrides({}) == PROTOCOLS["digits"].with_overrides(SHORT)
    assert model.count_parameters() == 102_410


def test_micro_batch_fits_the_memory() -> None:
    protocol = PROTOCOLS["CIFAR-100"]
    models = [build_model("vit_classic", size, protocol, "meta") for size in protocol.sizes]
    sizes = [micro_batch_within(model, protocol.batch_size, 8 * 2**30, "fp32", "cpu") for model in models]
    assert sizes == sorted(sizes, reverse=True)
    assert 1 <= sizes[-1] < sizes[0] <= 512


@needs_cifar
@pytest.mark.parametrize("model", ARMS)
def test_the_pilot_trains_on_the_real_images(model: str, tmp_path: Path, data_root: str) -> None:
    (spec,) = [spec for spec in find_grid("pilot").runs(seeds=1) if (spec.model, spec.size) == (model, "10B")]
    spec = RunSpec.of(spec.model, spec.size, spec.dataset, overrides={**spec.overrides, "max_steps": 2, "batch_size": 8})
    result = train(spec, tmp_path, device="cpu", data_root=data_root)
    assert result is not None and result.steps == 2 and result.overrides["patch_size"] == 28
    model_again, _ = load_weights(RunFiles.of(tmp_path, spec, result.run_id).weights)
    assert model_again.tokens == 65


@needs_cifar
def test_a_small_model_learns_from_real_cifar100(data_root: str) -> None:
    data = load("CIFAR-100", data_root)
    protocol = PROTOCOLS["CIFAR-100"].with_overrides({"max_steps": 60, "batch_size": 128, "lr": 1e-3, "warmup_steps": 10, "dropout": 0.0})
    import dataclasses

    small = dataclasses.replace(protocol, image_size=32, d_model=64, heads=4, depths={"10B": 2})
    for name in ("vit_classic", "vit_differential"):
        model = build_model(name, "10B", small)
        model.initialise(0)
        losses: list[float] = []
        fit(model, data, small, seed=0, on_steps=lambda steps, total, losses=losses: losses.extend(s.train_loss for s in steps))
        assert sum(losses[-10:]) / 10 < sum(losses[:5]) / 5 - 0.3


def test_timms_vit_in_the_same_loop_learns_the_same() -> None:
    data, protocol = load("digits"), PROTOCOLS["digits"].with_overrides({"max_steps": 80})
    ours, timms = build_model("vit_classic", "0.1M", protocol), timm_model("vit_classic", "0.1M", protocol)
    ours.initialise(0)
    give_weights(ours, timms)
    losses: tuple[list[float], list[float]] = ([], [])
    for model, found in zip((ours, timms), losses, strict=True):
        fit(model, data, protocol, seed=0, on_steps=lambda steps, total, found=found: found.extend(step.train_loss for step in steps))
    assert len(losses[0]) == 80 and losses[0][-1] < losses[0][0] / 2
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0][:20] == pytest.approx(losses[1][:20], rel=1e-4)
