"""What only a GPU can show. Skipped where there is none; `bash bench/gpu.sh` runs them first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from diffvit import compute
from diffvit.compute import Compute
from diffvit.dataset import load
from diffvit.differential_forms import CANDIDATES, FORMS, usable
from diffvit.ledger import RunFiles, RunSpec, load_weights
from diffvit.log import read_log
from diffvit.memory import affordable_micro_batch, training_memory
from diffvit.protocol import PROTOCOLS
from diffvit.saving import Every, Saving
from diffvit.train import Stopped, default_precision, fit, train
from diffvit.vit import build_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 785, 4, 32), (2, 1025, 3, 64), (4, 17, 2, 16), (1, 1, 2, 32)], ids=str)
def test_every_form_is_equation_1(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    torch.set_float32_matmul_precision("highest")
    B, N, P, E = shape
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(size, generator=generator, dtype=torch.float64) for size in ((B, N, P, 2, E), (B, N, P, 2, E), (B, P, N, 2 * E), ())
    ]
    do_BPNV = torch.randn(B, P, N, 2 * E, generator=generator, dtype=torch.float64)

    def passes(form: str, kind: torch.dtype, device: torch.device) -> list[torch.Tensor]:
        leaves = [tensor.to(device, kind).requires_grad_() for tensor in inputs]
        out = FORMS[form](*leaves)
        return [out, *torch.autograd.grad(out, leaves, do_BPNV.to(device, kind))]

    expected = passes("maps", torch.float64, torch.device("cpu"))
    forms = usable(CANDIDATES, GPU, dtype, E)
    if dtype == torch.bfloat16 and torch.cuda.is_bf16_supported(including_emulation=False):
        assert "triton" in forms
    for form in forms:
        for found, right in zip(passes(form, dtype, GPU), expected, strict=True):
            error = (found.double().cpu() - right).norm() / right.norm().clamp_min(1e-6)
            assert error < (3e-2 if dtype == torch.bfloat16 else 2e-3), form


@pytest.mark.parametrize("name", ["vit_classic", "vit_differential"])
def test_deterministic_runs_repeat_themselves_and_resume_to_the_same_bits(name: str, tmp_path: Path) -> None:
    spec = RunSpec.of(name, "0.1M", "digits", precision=default_precision(GPU), overrides={"max_steps": 60})
    options = {"device": "cuda", "compute": Compute(deterministic=True), "saving": Saving(every=Every(steps=7))}
    stops = iter([False] * 30 + [True])
    try:
        whole = train(spec, tmp_path / "whole", **options)
        again = train(spec, tmp_path / "again", **options)
        with pytest.raises(Stopped):
            train(spec, tmp_path / "cut", should_stop=lambda: next(stops), **options)
        cut = train(spec, tmp_path / "cut", **options)
    finally:
        torch.use_deterministic_algorithms(False)
    weights = [RunFiles.of(tmp_path / folder, spec, whole["run_id"]).weights for folder in ("whole", "again", "cut")]
    assert again["test_loss"] == whole["test_loss"] == cut["test_loss"]
    models = [load_weights(path)[0] for path in weights]
    for first, *others in zip(*(model.parameters() for model in models), strict=True):
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("name", ["vit_classic", "vit_differential"])
def test_compiled_blocks_train_as_others_do(name: str, tmp_path: Path) -> None:
    spec = RunSpec.of(name, "0.1M", "digits", precision=default_precision(GPU), overrides={"max_steps": 45})
    logs = []
    for compile in (False, True):
        folder = tmp_path / str(compile)
        result = train(spec, folder, device="cuda", compute=Compute(compile=compile))
        assert result["compiled"] == compile
        logs.append(read_log(RunFiles.of(folder, spec, result["run_id"]).log)["train_loss"].to_numpy())
    assert abs(logs[1][:5] / logs[0][:5] - 1).max() < 2e-2
    assert abs(logs[1][-10:].mean() / logs[0][-10:].mean() - 1) < 0.25


def test_the_form_is_chosen_by_measurement_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFVIT_CACHE", str(tmp_path))
    model = build_model("vit_differential", "10B", PROTOCOLS["CIFAR-100"]).to(GPU)
    chosen = compute.choose(model, 32, default_precision(GPU), Compute(compile=False))
    (seconds,) = json.loads((tmp_path / "attention_forms.json").read_text()).values()
    assert chosen.attention == min(seconds, key=seconds.get)


@pytest.mark.parametrize("name", ["vit_classic", "vit_differential"])
def test_a_step_takes_no_more_memory_than_was_foreseen(name: str) -> None:
    protocol = PROTOCOLS["digits"].with_overrides({"max_steps": 3, "batch_size": 512})
    model = build_model(name, "0.4M", protocol)
    model.initialise(0)
    model.to(GPU)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(GPU)
    before = torch.cuda.memory_allocated(GPU)
    precision = default_precision(GPU)
    micro_batch = affordable_micro_batch(model, protocol, GPU, precision)
    fit(model, load("digits"), protocol, seed=0, precision=precision, micro_batch=micro_batch)
    taken = torch.cuda.max_memory_allocated(GPU) - before
    # Twice: micro_batch_within leaves half of the room for what is not kept.
    assert taken < 2 * training_memory(model, micro_batch, precision, "cuda")
