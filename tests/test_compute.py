"""How a run is computed does not change what it computes: memory that runs out, recomputation, torch.compile, chosen forms."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from diffvit import compute
from diffvit.compute import Chosen, Compute, choose, measure_forms
from diffvit.dataset import load
from diffvit.errors import UserError
from diffvit.kernels import forms as differential_forms
from diffvit.ledger.files import RunFiles
from diffvit.ledger.log import Step, read_log
from diffvit.ledger.spec import RunSpec
from diffvit.loop.fit import fit
from diffvit.protocol import PROTOCOLS
from diffvit.train import train
from diffvit.vit import VisionTransformer, build_model, set_form

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


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIFFVIT_CACHE", str(tmp_path))
    return tmp_path


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
    assert result.recompute is True and result.compiled is False


def test_forms_are_measured_once_and_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model()
    form = compute._fastest_form(model, 4, "fp32")
    path = cache / "attention_forms.json"
    (key, seconds), *others = json.loads(path.read_text()).items()
    assert not others and "cpu" in key and "float32" in key and "DifferentialAttention" in key and "4x17x64" in key
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


def test_a_cache_that_cannot_be_read_is_left_to_its_owner(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = cache / "attention_forms.json"
    compute.remember(path, "theirs", {"maps": 1.0})
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
        assert compute.recall(path, "theirs") == {}
        assert compute._fastest_form(_model(), 4, "fp32") in differential_forms.CANDIDATES
    assert path.read_bytes() == before and compute.recall(path, "theirs") == {"maps": 1.0}


@pytest.mark.parametrize(("name", "form", "forms"), [("vit_classic", "sdpa", ["sdpa"]), ("vit_differential_v2", None, [])])
def test_where_there_is_no_choice_there_is_no_doubt(name: str, form: str | None, forms: list[str], cache: Path) -> None:
    model = _model(name)
    assert model.blocks[0].attn.forms(CPU, torch.float32) == forms and compute._fastest_form(model, 4, "fp32") == form
    set_form(model, form)
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(model(images), _model(name)(images))


def test_each_architecture_has_its_own_place_in_the_cache(cache: Path) -> None:
    for name in ("vit_classic", "vit_differential"):
        compute._fastest_form(_model(name), 4, "fp32")
    compute._fastest_form(_model("vit_differential"), 2, "fp32")
    compute._fastest_form(_model("vit_differential"), 4, "bf16")
    assert len(json.loads((cache / "attention_forms.json").read_text())) == 4


def test_forms_that_fail_or_are_wrong_are_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = differential_forms.FORMS["maps"]

    def fails(*args: object) -> Tensor:
        raise RuntimeError("no kernel for it")

    def wrong_backwards(qkv: Tensor, heads: int, lambda_full: Tensor) -> Tensor:
        return maps(qkv, heads, lambda_full) + 0.1 * (qkv - qkv.detach()).sum()

    monkeypatch.setitem(differential_forms.FORMS, "fails", fails)
    monkeypatch.setitem(differential_forms.FORMS, "wrong", lambda qkv, heads, full: maps(qkv, heads, 1.1 * full))
    monkeypatch.setitem(differential_forms.FORMS, "wrong backwards", wrong_backwards)
    monkeypatch.setitem(differential_forms.FORMS, "nan", lambda *inputs: maps(*inputs) * float("nan"))
    model, forms = _model(), ["padded", "fails", "wrong", "wrong backwards", "nan", "maps"]
    set_form(model, "blocks")
    found = measure_forms(model, forms, 3, "fp32", repeats=2)
    assert set(found) == {"padded", "maps"}
    assert all(seconds > 0 for seconds in found.values())
    assert model.blocks[0].attn.form == "blocks", "it is left as it was"
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_compiler_that_fails_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: VisionTransformer, *args: object) -> float:
        for block in model.blocks:
            block.compile()
        model.eval()
        raise OSError("no compiler\nand much more")

    monkeypatch.setattr(compute, "_gain_of_compiling", broken)
    model = _model()
    chosen = choose(model, 4, "fp32", Compute(compile=True))
    assert not chosen.compiled
    assert chosen.notes == ("torch.compile does not work here and is left out: OSError: no compiler",)
    assert all(block._compiled_call_impl is None for block in model.blocks) and model.training


def test_on_a_cpu_nothing_is_measured_or_compiled_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_gain_of_compiling", "_gain_of_fusing", "_fastest_form", "measure_forms"):
        monkeypatch.setattr(compute, name, lambda *args: pytest.fail("not on a CPU"))
    chosen = choose(_model(), 4, "fp32", Compute())
    assert chosen == Chosen("maps")


class OnAGPU:
    """As much of a model on a GPU as `choose` looks at."""

    def __init__(self) -> None:
        self.pos_embed = SimpleNamespace(device=torch.device("cuda"))
        self.recompute = self.fused = self.plain = self.training = False
        self.blocks = [SimpleNamespace(_compiled_call_impl="compiled")]
        self.attention = SimpleNamespace(form=None)

    def modules(self) -> list[SimpleNamespace]:
        return [self.attention]

    def train(self, training: bool) -> None:
        self.training = training

    def attention_form(self, dtype: torch.dtype) -> str:
        return f"{self.attention.form}, {dtype}"


FAILS = None


@pytest.mark.parametrize(("asked", "fusing", "compiling", "tried", "chosen"), [
    # What fusing and compiling would gain; what is tried; what is chosen of fused blocks, graphs and compiled blocks.
    (Compute(), 1.5, 9.0, "form fusing", "fused graphs"),
    (Compute(), 0.9, 1.2, "form fusing compiling", "compiled"),
    (Compute(), 0.9, 0.9, "form fusing compiling", ""),
    (Compute(), FAILS, 1.2, "form fusing compiling", "compiled"),
    (Compute(), FAILS, FAILS, "form fusing compiling", ""),
    (Compute(fused=False), 1.5, 1.2, "form compiling", "compiled"),
    (Compute(fused=False, compile=False), 1.5, 1.2, "form", ""),
    (Compute(compile=False), 1.5, 1.2, "form fusing", "fused graphs"),
    (Compute(compile=False), 0.9, 1.2, "form fusing", ""),
    (Compute(compile=True), 1.5, 0.9, "form compiling", "compiled"),  # asked for, it is done, faster or not
    (Compute(fused=True), 0.9, 9.0, "form fusing", "fused graphs"),
    (Compute(fused=True), FAILS, 1.2, "form fusing compiling", "compiled"),
    (Compute(graphs=False), 1.5, 1.2, "form fusing", "fused"),
    (Compute(graphs=True, fused=False, compile=False), 1.5, 1.2, "form", "graphs"),
    (Compute(deterministic=True), 1.5, 1.2, "", ""),
    (Compute(deterministic=True, compile=True), 1.5, 1.2, "compiling", "compiled"),
])  # fmt: skip
def test_a_gpu_takes_what_is_faster_or_asked_for(
    monkeypatch: pytest.MonkeyPatch, asked: Compute, fusing: float | None, compiling: float | None, tried: str, chosen: str
) -> None:
    heard: list[str] = []

    def trial(what: str, gain: float | None):
        def gain_of(model: OnAGPU, images: int, precision: str) -> float:
            heard.append(what)
            assert images == 64 and precision == "bf16"
            if gain is FAILS:
                raise NotImplementedError("not here")
            return gain

        return gain_of

    monkeypatch.setattr(compute, "_fastest_form", lambda *args: heard.append("form") or "triton")
    monkeypatch.setattr(compute, "_gain_of_fusing", trial("fusing", fusing))
    monkeypatch.setattr(compute, "_gain_of_compiling", trial("compiling", compiling))
    model = OnAGPU()
    found = choose(model, 512, "bf16", dataclasses.replace(asked, recompute=True))
    assert " ".join(heard) == tried and len(found.notes) == len(heard) - ("form" in heard)
    words = (("fused", found.fused), ("graphs", found.graphs), ("compiled", found.compiled))
    assert " ".join(word for word, there in words if there) == chosen
    assert model.fused == found.fused and model.recompute
    assert found.attention == ("triton" if "form" in tried else "None") + ", torch.bfloat16"
    assert ("compiling" in heard and not found.compiled) == (model.blocks[0]._compiled_call_impl is None)


@pytest.mark.parametrize("asked", [Compute(), Compute(fused=True)])
def test_a_gpu_computes_code_of_the_users_own_as_it_is_written(monkeypatch: pytest.MonkeyPatch, asked: Compute) -> None:
    for name in ("_fastest_form", "_gain_of_fusing"):
        monkeypatch.setattr(compute, name, lambda *args: pytest.fail("it knows this architecture"))
    monkeypatch.setattr(compute, "_gain_of_compiling", lambda *args: 1.2)
    model = OnAGPU()
    model.plain = True
    found = choose(model, 512, "bf16", asked)
    assert found.compiled and not (found.fused or found.graphs or model.fused) and model.attention.form is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_classic", "vit_differential"])
def test_compiled_blocks_compute_the_same_and_repeat_themselves(name: str, tmp_path: Path) -> None:
    """A whole epoch, whose last batch is smaller."""
    spec = RunSpec.of(name, "0.2M", "digits", overrides={"max_steps": 45})
    logs, results = [], []
    for folder, options in (("eager", {}), ("compiled", {"compile": True}), ("again", {"compile": True})):
        results.append(train(spec, tmp_path / folder, device="cpu", compute=Compute(**options)))
        files = RunFiles.of(tmp_path / folder, spec, results[-1].run_id)
        logs.append(read_log(files.log)[["train_loss", "val_loss", "grad_norm"]].to_numpy())
    eager, compiled, again = logs
    assert [result.compiled for result in results] == [False, True, True]
    assert results[1].compile_seconds > 0
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
