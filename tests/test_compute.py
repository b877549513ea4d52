"""How a run is computed does not change what it computes: memory that runs out, recomputation, torch.compile, chosen forms."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from diffvit import compute, differential_forms
from diffvit.compute import Compute, choose, measure_forms
from diffvit.dataset import load
from diffvit.errors import UserError
from diffvit.ledger import RunFiles, RunSpec
from diffvit.log import Step, read_log
from diffvit.protocol import PROTOCOLS
from diffvit.train import fit, train
from diffvit.vit import VisionTransformer, build_model

CPU = torch.device("cpu")
DROPOUT = PROTOCOLS["digits"].with_overrides({"max_steps": 5, "dropout": 0.2})
PLAIN = PROTOCOLS["digits"].with_overrides({"max_steps": 5})


class SmallMemory(nn.Module):
    """A model on a device that has room for so many images."""

    def __init__(self, model: nn.Module, room: int):
        super().__init__()
        self.model, self.room, self.calls = model, room, 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        if len(images) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self.model(images)


def _model(model: str = "vit_differential", size: str = "0.1M") -> VisionTransformer:
    built = build_model(model, size, PROTOCOLS["digits"])
    built.initialise(0)
    return built


def _losses(model: nn.Module, protocol=PLAIN, **options) -> tuple[list[Step], int]:
    steps: list[Step] = []
    fitted = fit(model, load("digits"), protocol, seed=3, on_steps=lambda some, total: steps.extend(some), **options)
    return [step._replace(seconds=0.0) for step in steps], fitted.micro_batch


def test_memory_that_runs_out_halves_the_micro_batch_and_no_more() -> None:
    small = SmallMemory(_model(), room=10)
    found, micro_batch = _losses(small)
    expected, _ = _losses(_model(), micro_batch=8)
    assert micro_batch == 8
    assert found == expected  # the step that failed is done again, from its start: the same bits as if it had never failed
    whole, _ = _losses(_model())
    assert [step.train_loss for step in found] == pytest.approx([step.train_loss for step in whole], rel=1e-4)
    assert small.calls == 2 + 5 * 2 * 4, "32 and 16 images fail once each; then four micro-batches a batch"


def test_memory_that_runs_out_in_validation_halves_it_too() -> None:
    model = SmallMemory(_model(), room=32)
    model.register_forward_pre_hook(lambda module, args: setattr(module, "room", 32 if module.training else 10))
    found, micro_batch = _losses(model)
    whole, _ = _losses(_model())
    assert micro_batch == 8
    assert found[0].train_loss == whole[0].train_loss
    assert [step.val_loss for step in found] == pytest.approx([step.val_loss for step in whole], rel=1e-4)


def test_a_resumed_run_goes_on_with_the_smaller_micro_batch() -> None:
    states: list[dict] = []
    stop = iter([False, True])
    with pytest.raises(Exception, match="stopped after step 2"):
        _losses(SmallMemory(_model(), room=10), on_save=states.append, should_stop=lambda: next(stop))
    resumed = SmallMemory(_model(), room=10)
    _, micro_batch = _losses(resumed, resume=states[-1])
    assert micro_batch == 8
    assert resumed.calls == 3 * 2 * 4  # none failed


def test_memory_too_small_for_an_image_is_said() -> None:
    with pytest.raises(UserError, match="a single image does not fit"):
        _losses(SmallMemory(_model(), room=0))


def test_other_errors_of_the_model_are_its_own() -> None:
    model = _model()
    model.register_forward_pre_hook(lambda module, args: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        _losses(model)


@pytest.mark.parametrize("name", ["vit_classic", "vit_differential", "vit_differential_v2"])
def test_recomputation_gives_the_same_bits_with_dropout(name: str) -> None:
    kept, recomputed = _model(name), _model(name)
    recomputed.recompute = True
    assert _losses(kept, DROPOUT) == _losses(recomputed, DROPOUT)
    for a, b in zip(kept.parameters(), recomputed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_recomputation_is_recorded(tmp_path: Path) -> None:
    spec = RunSpec.of("vit_differential", "0.1M", "digits", overrides={"max_steps": 2})
    result = train(spec, tmp_path, device="cpu", compute=Compute(recompute=True))
    assert result["recompute"] is True and result["compiled"] is False


def test_forms_are_measured_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFVIT_CACHE", str(tmp_path))
    model = _model()
    form = compute._fastest_form(model, 4, "fp32")
    path = tmp_path / "attention_forms.json"
    (key, seconds), *others = json.loads(path.read_text()).items()
    assert not others and "cpu" in key and "float32" in key and "4x17x2x16" in key
    assert form == min(seconds, key=seconds.get) and set(seconds) <= set(differential_forms.CANDIDATES)
    with monkeypatch.context() as patch:
        patch.setattr(compute, "measure_forms", lambda *args: pytest.fail("measured again"))
        assert compute._fastest_form(model, 4, "fp32") == form
    slowest = max(seconds, key=seconds.get)
    path.write_text(json.dumps({key: {**seconds, slowest: 0.0, "of another version": -1.0}}))
    assert compute._fastest_form(model, 4, "fp32") == slowest, "what is kept counts, but for forms that there are not"
    for damaged in ("", "[]", "{", json.dumps({key: None}), json.dumps({key: {"padded": "x"}})):
        path.write_text(damaged)
        assert compute._fastest_form(model, 4, "fp32") in differential_forms.CANDIDATES
        assert json.loads(path.read_text())[key]


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("DIFFVIT_CACHE", str(blocked / "below"))
    assert compute._fastest_form(_model(), 4, "fp32") in differential_forms.CANDIDATES


def test_the_classic_model_has_no_form_to_choose() -> None:
    assert compute._fastest_form(_model("vit_classic"), 4, "fp32") is None


def test_forms_that_fail_or_are_wrong_are_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Tensor) -> Tensor:
        raise RuntimeError("no kernel for it")

    monkeypatch.setitem(differential_forms.FORMS, "fails", fails)
    monkeypatch.setitem(differential_forms.FORMS, "wrong", lambda q, k, v, full: differential_forms.maps(q, k, v, 1.1 * full))
    monkeypatch.setitem(differential_forms.FORMS, "nan", lambda q, k, v, full: differential_forms.maps(q, k, v, full) * float("nan"))
    found = measure_forms(["padded", "fails", "wrong", "nan", "maps"], CPU, torch.float32, (2, 17, 2, 16), repeats=2)
    assert set(found) == {"padded", "maps"}
    assert all(seconds > 0 for seconds in found.values())


def test_a_compiler_that_fails_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: VisionTransformer, *args: object) -> tuple[float, float]:
        for block in model.blocks:
            block.compile()
        raise OSError("no compiler\nand much more")

    monkeypatch.setattr(compute, "_compile", broken)
    model = _model()
    chosen = choose(model, 4, "fp32", Compute(compile=True))
    assert not chosen.compiled
    assert chosen.notes == ("torch.compile does not work here and is left out: OSError: no compiler",)
    assert all(block._compiled_call_impl is None for block in model.blocks)


def test_on_a_cpu_nothing_is_measured_or_compiled_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_compile", "_fastest_form"):
        monkeypatch.setattr(compute, name, lambda *args: pytest.fail("not on a CPU"))
    chosen = choose(_model(), 4, "fp32", Compute())
    assert chosen == compute.Chosen("maps")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_classic", "vit_differential"])
def test_compiled_blocks_compute_the_same_and_repeat_themselves(name: str, tmp_path: Path) -> None:
    """A whole epoch, whose last batch is smaller."""
    spec = RunSpec.of(name, "0.2M", "digits", overrides={"max_steps": 45})
    logs, results = [], []
    for folder, options in (("eager", {}), ("compiled", {"compile": True}), ("again", {"compile": True})):
        results.append(train(spec, tmp_path / folder, device="cpu", compute=Compute(**options)))
        files = RunFiles.of(tmp_path / folder, spec, results[-1]["run_id"])
        logs.append(read_log(files.log)[["train_loss", "val_loss", "grad_norm"]].to_numpy())
    eager, compiled, again = logs
    assert [result["compiled"] for result in results] == [False, True, True]
    assert results[1]["compile_seconds"] > 0
    # Rounding differs, and training makes more of it from step to step.
    assert abs(compiled[:5] / eager[:5] - 1).max() < 1e-3
    assert abs(compiled[-5:, :2] / eager[-5:, :2] - 1).max() < 0.25
    assert (compiled == again).all()


@pytest.mark.slow
def test_compiled_blocks_compute_the_same_at_many_tokens() -> None:
    """785 tokens, where a CPU computes differential attention in blocks."""
    protocol = dataclasses.replace(PROTOCOLS["CIFAR-100"], depths={"10B": 2})
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    found = []
    for compile in (False, True):
        model = build_model("vit_differential", "10B", protocol).eval()
        model.initialise(0)
        chosen = choose(model, 2, "fp32", Compute(compile=compile))
        assert chosen.attention == "blocks" and chosen.compiled == compile
        logits = model(images)
        logits.square().sum().backward()
        found.append([logits.detach(), *(parameter.grad for parameter in model.parameters())])
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()
