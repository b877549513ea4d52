"""fp16 with loss scaling: overflows are skipped, said and repeated, and nothing else about a run changes."""

from __future__ import annotations

import contextlib
import math
import re
from pathlib import Path

import pandas as pd
import pytest
import torch

from diffvit.dataset import load
from diffvit.evaluation import evaluate_checkpoint
from diffvit.keeping.saving import Every
from diffvit.ledger.files import RunFiles
from diffvit.ledger.log import read_log
from diffvit.ledger.results import Result
from diffvit.ledger.spec import RunSpec
from diffvit.loop import loss_scale
from diffvit.loop.fit import Stopped, fit
from diffvit.loop.recorder import Diverged
from diffvit.loop.resume import fits_run
from diffvit.machine.device import autocast, default_precision
from diffvit.train import train
from diffvit.vit import build_model

STEPS = 16
SPEC = RunSpec.of(
    "vit_differential",
    "0.1M",
    "digits",
    precision="fp16",
    overrides={"max_steps": STEPS, "batch_size": 16, "dropout": 0.2, "clip_norm": 5.0},
)
# Far too large at the first step, and doubled often: a run of few steps then has skips at its start and again later.
HIGH, SOON = 2.0**24, 3


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scale, "FIRST_SCALE", HIGH)
    monkeypatch.setattr(loss_scale, "STEPS_TO_DOUBLE", SOON)


def _train(folder: Path, steps: int | None = None) -> tuple[Result | None, RunFiles]:
    asked = iter(range(1, 1000))
    with contextlib.nullcontext() if steps is None else pytest.raises(Stopped):
        result = train(SPEC, folder, device="cpu", should_stop=lambda: next(asked) == steps)
    return None if steps else result, RunFiles.of(folder, SPEC, SPEC.run_id(load("digits").fingerprint))


def _skips(files: RunFiles) -> dict[int, float]:
    """Skipped step -> its loss scale, as the log's comments say; each stands behind its step's line."""
    lines = files.log.read_text().splitlines()
    comments = {number: re.fullmatch(r"# step (\d+) was skipped: .* at a loss scale of (\S+)", line) for number, line in enumerate(lines)}
    skips = {int(match[1]): float(match[2]) for match in comments.values() if match}
    assert all(lines[number - 1].startswith(f"{match[1]},") for number, match in comments.items() if match)
    return skips


def test_overflows_are_skipped_and_said_and_the_scale_follows(tmp_path: Path) -> None:
    result, files = _train(tmp_path)
    assert result is not None and result.status == "done" and result.precision == "fp16"
    skips, log = _skips(files), read_log(files.log)
    assert [step for step, norm in zip(log["step"], log["grad_norm"], strict=True) if not math.isfinite(norm)] == list(skips)
    scale, good = HIGH, 0
    for step in range(1, STEPS + 1):
        if step in skips:
            assert skips[step] == scale
            scale, good = scale / 2, 0
        else:
            good += 1
            scale, good = (scale * 2, 0) if good == SOON else (scale, good)
    first = next(step for step in range(1, STEPS + 1) if step not in skips)
    assert first > 1 and any(step > first for step in skips)  # halved at once, doubled and halved again later
    assert f"{len(skips)} of {STEPS} updates skipped, for their gradients overflowed fp16" in result.notes
    assert evaluate_checkpoint(files.weights, device=torch.device("cpu"), limit=result.test_images)["loss"] == pytest.approx(
        result.test_loss
    )


def test_a_resumed_run_is_the_undisturbed_one_to_the_bit(tmp_path: Path) -> None:
    _, whole = _train(tmp_path / "whole")
    for steps in (1, 10):  # among the first skips, and between growing and halving
        _train(tmp_path / "parts", steps)
    _, parts = _train(tmp_path / "parts")
    assert all(f"# resumed after step {stops_at};" in parts.log.read_text() for stops_at in (1, 11))
    assert _skips(whole) == _skips(parts) and 1 in _skips(whole)
    assert whole.weights.read_bytes() == parts.weights.read_bytes()
    same = [column for column in read_log(whole.log) if column != "seconds"]
    pd.testing.assert_frame_equal(read_log(whole.log)[same], read_log(parts.log)[same], check_exact=True)


def _fit(spec: RunSpec = SPEC, breaks: bool = False, **options) -> list[dict]:
    """The states after every step."""
    data, model, states = load("digits"), build_model(spec.model, spec.size, spec.protocol), []
    model.initialise(0)
    if breaks:
        model.head.weight.register_hook(lambda gradient: gradient * math.inf)

    def keep(state: dict) -> None:
        states.append({**state, "tensors": {name: tensor.clone() for name, tensor in state["tensors"].items()}})

    fit(model, data, spec.protocol, seed=0, precision=spec.precision, on_save=keep, save_every=Every(steps=1), **options)
    return states


def test_a_skipped_step_changes_neither_weights_nor_moments() -> None:
    states = _fit()
    made = [float(next(tensor for name, tensor in state["tensors"].items() if name.endswith(".step"))) for state in states]
    for before, after, count, more in zip(states, states[1:], made, made[1:], strict=False):
        same = all(torch.equal(after["tensors"][name], tensor) for name, tensor in before["tensors"].items())
        skipped = not math.isfinite(after["last"][6])
        assert same == skipped and more - count == (not skipped)
        assert (after["loss_scale"]["scale"] < before["loss_scale"]["scale"]) == skipped
    kept = {**states[0], "started": "now", "log": [0, "0" * 64]}
    assert fits_run(kept, SPEC, STEPS)
    assert not fits_run({name: value for name, value in kept.items() if name != "loss_scale"}, SPEC, STEPS)
    for wrong in ({"scale": 0.5, "steps": 0}, {"scale": math.inf, "steps": 0}, {"scale": 2.0, "steps": -1}, [2.0, 0]):
        assert not fits_run({**kept, "loss_scale": wrong}, SPEC, STEPS)
    full = RunSpec.of(SPEC.model, SPEC.size, SPEC.dataset, overrides=SPEC.overrides)
    assert not fits_run(kept, full, STEPS)


def test_what_overflows_without_any_scale_has_diverged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scale, "FIRST_SCALE", 8.0)
    with pytest.raises(Diverged, match="diverged at step 4: "):  # 8, 4 and 2 are skipped
        _fit(breaks=True)
    with pytest.raises(Diverged, match="diverged at step 1: "):
        _fit(RunSpec.of(SPEC.model, SPEC.size, SPEC.dataset, overrides=SPEC.overrides), breaks=True)


def test_micro_batches_only_split_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scale, "FIRST_SCALE", 2.0**10)
    spec = RunSpec.of("vit_differential", "0.1M", "digits", precision="fp16", overrides={"max_steps": 5})
    one, two = (_fit(spec, micro_batch=images) for images in (32, 16))
    for a, b in zip(one, two, strict=True):
        assert a["last"][3:7] == pytest.approx(b["last"][3:7], rel=2e-2, abs=1e-4)


def test_fp16_is_another_run_and_the_others_are_what_they_were() -> None:
    ids = {each: RunSpec.of("vit_classic", "10B", "CIFAR-100", precision=each).run_id("0" * 64) for each in ("fp32", "bf16", "fp16")}
    assert ids == {"fp32": "c23000ed9f", "bf16": "2cc82edbbd", "fp16": "c20a685557"}


@pytest.mark.parametrize(
    ("capability", "expected"), [((6, 0), "fp32"), ((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")]
)
def test_auto_takes_what_the_tensor_cores_have(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert default_precision(torch.device("cuda", 0)) == expected and default_precision(torch.device("cpu")) == "fp32"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_autocast(precision: str) -> None:
    with autocast(torch.device("cpu"), precision):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[
            precision
        ]
