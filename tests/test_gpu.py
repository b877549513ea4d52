"""What only a GPU can show. Skipped where there is none; `bash bench/gpu.sh` runs them first.

Gradients decide whether blocks are computed as they should: those of every parameter, each way of computing, against fp64 on the CPU.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import statistics
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import needs_cifar
from forms import by_form

from diffvit import compute
from diffvit.compute import Compute
from diffvit.data.batches import Prepare
from diffvit.dataset import load
from diffvit.keeping.saving import Every, Saving
from diffvit.kernels.dropout import at_image, has_kernels, seed_masks
from diffvit.kernels.forms import CANDIDATES, usable
from diffvit.ledger.files import RunFiles
from diffvit.ledger.log import Step
from diffvit.ledger.spec import RunSpec
from diffvit.ledger.weights import load_weights
from diffvit.loop.fit import Stopped, fit
from diffvit.loop.placement import place_model
from diffvit.machine.device import autocast, autocast_dtype, default_precision, set_matmul_precision
from diffvit.memory import training_memory
from diffvit.protocol import ARMS, PROTOCOLS, Protocol
from diffvit.train import train
from diffvit.vit import VisionTransformer, build_model, set_form

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture(autouse=True)
def _settings_as_before():
    yield
    set_matmul_precision("fp32")


# ------------------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 785, 4, 32), (2, 1025, 3, 64), (4, 17, 2, 16), (1, 1, 2, 32)], ids=str)
def test_every_form_is_equation_1(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    torch.set_float32_matmul_precision("highest")
    B, N, P, E = shape
    generator = torch.Generator().manual_seed(0)
    sizes = ((B, N, P, 2, E), (B, N, P, 2, E), (B, P, N, 2 * E))
    inputs = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    do_BPNV = torch.randn(B, P, N, 2 * E, generator=generator, dtype=torch.float64)

    def passes(form: str, kind: torch.dtype, device: torch.device) -> list[torch.Tensor]:
        lambda_full = torch.tensor(0.7, device=device, dtype=torch.promote_types(kind, torch.float32))
        leaves = [*(tensor.to(device, kind) for tensor in inputs), lambda_full]
        for leaf in leaves:
            leaf.requires_grad_()
        out = by_form(*leaves, form=form)
        return [out, *torch.autograd.grad(out, leaves, do_BPNV.to(device, kind))]

    expected = passes("maps", torch.float64, CPU)
    forms = usable(CANDIDATES, GPU, dtype, E)
    if dtype == torch.bfloat16 and default_precision(GPU) == "bf16":
        assert "triton" in forms
    for form in forms:
        for found, right in zip(passes(form, dtype, GPU), expected, strict=True):
            error = (found.double().cpu() - right).norm()
            # With one token the gradients of q and k are 0: they are compared absolutely.
            size = right.norm() if right.norm() > 1e-6 else right.numel() ** 0.5
            assert error < (2e-3 if dtype == torch.float32 else 5e-2) * size, form


@pytest.mark.parametrize("shape", [(2, 785, 8, 32), (2, 1025, 6, 64), (4, 17, 4, 16), (1, 1, 4, 32)], ids=str)
def test_the_classic_kernels_are_attention(shape: tuple[int, int, int, int]) -> None:
    from diffvit.kernels.attention_triton import attend, supported

    B, N, H, E = shape
    if not supported(GPU, torch.bfloat16, E, maps=1):
        pytest.skip("there are no kernels for this GPU")
    qkv, grad = torch.randn(B, N, 3, H * E).bfloat16(), torch.randn(B, N, H * E).bfloat16()
    leaf = qkv.double().requires_grad_()
    q, k, v = (x.unflatten(-1, (H, E)).transpose(1, 2) for x in leaf.unbind(2))
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    expected = [out, torch.autograd.grad(out, leaf, grad.double())[0]]
    leaf = qkv.to(GPU).requires_grad_()
    out = attend(leaf, H)
    for found, right in zip([out, torch.autograd.grad(out, leaf, grad.to(GPU))[0]], expected, strict=True):
        assert (found.double().cpu() - right).norm() < 1e-2 * right.norm()


# ------------------------------------------------------------------------------------------------------------- gradients


def _model(name: str, dataset: str, depth: int, dropout: float = 0.0) -> tuple[VisionTransformer, Protocol]:
    protocol = dataclasses.replace(PROTOCOLS[dataset], depths={"some": depth}, dropout=dropout)
    model = build_model(name, "some", protocol)
    model.initialise(0)
    with torch.no_grad():  # biases and norms too are far from where they start
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * (0.05 if parameter.ndim == 1 else 0.0))
    return model, protocol


def _batch(protocol: Protocol, images: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(images, protocol.channels, protocol.image_size, protocol.image_size, generator=generator)
    return pixels, torch.randint(0, protocol.classes, (images,), generator=generator)


def _passes(model: VisionTransformer, batch: tuple[torch.Tensor, torch.Tensor], precision: str = "fp32") -> list[torch.Tensor]:
    """Logits under no_grad in evaluation, and the gradient of every parameter, in fp64 on the CPU."""
    device, kind = model.pos_embed.device, model.pos_embed.dtype
    pixels, labels = batch[0].to(device, kind), batch[1].to(device)
    with torch.no_grad(), autocast(device, precision):
        logits = model.eval()(pixels)
    seed_masks(device, 3)
    at_image(device, 0)
    with autocast(device, precision):
        trained = model.train()(pixels)
    scale = 2.0**10 if precision == "fp16" else 1.0
    loss = F.cross_entropy(trained.to(torch.promote_types(trained.dtype, torch.float32)), labels)
    gradients = torch.autograd.grad(loss * scale, model.parameters())
    return [logits.double().cpu(), *(x.double().cpu() / scale for x in gradients)]


@functools.cache
def _in_fp64(name: str, dataset: str, depth: int, images: int) -> list[torch.Tensor]:
    model, protocol = _model(name, dataset, depth)
    return _passes(model.double(), _batch(protocol, images))


def _errors(found: list[torch.Tensor], right: list[torch.Tensor]) -> list[float]:
    """Relative errors. The gradient of a key's bias is 0, that of a lambda small: none counts for less than a hundredth of the mean norm."""
    floor = 0.01 * sum(x.norm().item() for x in right) / len(right)
    return [((a - b).norm() / max(b.norm().item(), floor)).item() for a, b in zip(found, right, strict=True)]


def _assert_right(found: list[torch.Tensor], plain: list[torch.Tensor], right: list[torch.Tensor], precision: str, what: str) -> None:
    """Within what a precision allows, and as near to fp64 as torch's own operations."""
    errors, usual = _errors(found, right), _errors(plain, right)
    assert max(errors) < {"bf16": 0.15, "fp16": 0.15, "fp32": 2e-3}[precision], (what, max(errors))
    together, usually = (sum(e * e for e in some) ** 0.5 for some in (errors, usual))
    assert together < 1.5 * usually + 1e-4, (what, together, usually)
    a, b = (torch.cat([x.flatten() for x in some[1:]]) for some in (found, right))
    assert F.cosine_similarity(a, b, dim=0) > 0.995, what


CELLS = [("digits", 3, 32), ("digits", 12, 32), ("CIFAR-100", 3, 3), ("CIFAR-100", 12, 2), ("BACH", 3, 2), ("BACH", 12, 1)]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("dataset", "depth", "images"), CELLS)
@pytest.mark.parametrize("name", ARMS)
def test_gradients_are_those_of_fp64(name: str, dataset: str, depth: int, images: int, precision: str) -> None:
    model, protocol = _model(name, dataset, depth)
    batch, right = _batch(protocol, images), _in_fp64(name, dataset, depth, images)
    set_matmul_precision(precision)
    model.to(GPU)
    plain = _passes(model, batch, precision)
    for form in model.blocks[0].attn.forms(GPU, autocast_dtype(precision)):
        set_form(model, form)
        _assert_right(_passes(model, batch, precision), plain, right, precision, form)
        if has_kernels(GPU, protocol.d_model) and precision != "fp32":
            model.fused = True
            _assert_right(_passes(model, batch, precision), plain, right, precision, f"{form}, fused")
            model.recompute = True
            _assert_right(_passes(model, batch, precision), plain, right, precision, f"{form}, fused, recomputed")
            model.fused = model.recompute = False


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(("dataset", "depth"), [("digits", 3), ("CIFAR-100", 3)])
@pytest.mark.parametrize("name", ARMS)
def test_compiled_blocks_have_the_gradients_of_fp64(name: str, dataset: str, depth: int, precision: str) -> None:
    model, protocol = _model(name, dataset, depth)
    exact = copy.deepcopy(model).double()
    set_matmul_precision(precision)
    model.to(GPU)
    batches = [_batch(protocol, images) for images in (4, 3, 1)]  # the last ones are smaller: dynamic shapes
    plain = [_passes(model, batch, precision) for batch in batches]
    chosen = compute.choose(model, 4, precision, Compute(compile=True))
    assert chosen.compiled and not chosen.fused, chosen.notes
    for batch, usual in zip(batches, plain, strict=True):
        _assert_right(_passes(model, batch, precision), usual, _passes(exact, batch), precision, f"{len(batch[0])} images")


@pytest.mark.parametrize("dataset", ["digits", "CIFAR-100", "BACH"])
@pytest.mark.parametrize("name", ARMS)
def test_fused_blocks_drop_what_plain_ones_drop(name: str, dataset: str) -> None:
    if not has_kernels(GPU, 64):
        pytest.skip("there are no kernels for this GPU")
    model, protocol = _model(name, dataset, 3, dropout=0.2)
    model.to(GPU)
    batch = _batch(protocol, 2)
    plain = _passes(model, batch, "bf16")
    model.fused = True
    assert max(_errors(_passes(model, batch, "bf16"), plain)) < 0.15
    without = _passes(_model(name, dataset, 3)[0].to(GPU), batch, "bf16")
    assert max(_errors(plain[1:], without[1:])) > 0.4, "nothing was dropped"


# ---------------------------------------------------------------------------------------------------------- whole steps


@needs_cifar
@pytest.mark.parametrize("name", ARMS)
def test_the_first_step_on_real_images_is_that_of_fp32_on_the_cpu(name: str, data_root: str) -> None:
    data, images = load("CIFAR-100", data_root), 16
    model, protocol = _model(name, "CIFAR-100", PROTOCOLS["CIFAR-100"].depths["10B"])
    model.initialise(0)

    def first_step(device: torch.device, precision: str) -> tuple[float, list[torch.Tensor]]:
        prepare = Prepare(protocol.image_size, data.mean, data.std, device)
        with autocast(device, precision):
            logits = model.to(device)(prepare(data.train.pixels[:images].to(device))).float()
        loss = F.cross_entropy(logits, data.train.labels[:images].to(device))
        return loss.item(), [x.double().cpu() for x in torch.autograd.grad(loss, model.parameters())]

    loss, gradients = first_step(CPU, "fp32")
    precision = default_precision(GPU)
    compute.choose(model.to(GPU), images, precision, Compute())
    found, others = first_step(GPU, precision)
    assert found == pytest.approx(loss, abs=1e-2)
    least = 1e-3 * max(gradient.norm() for gradient in gradients)  # the gradient of a key's bias is 0 and has no direction
    for (path, _), a, b in zip(model.named_parameters(), gradients, others, strict=True):
        for x, y in zip(a.chunk(3), b.chunk(3), strict=True) if path.endswith("qkv.bias") else [(a, b)]:
            assert x.norm() < least or F.cosine_similarity(x.flatten(), y.flatten(), dim=0) > 0.99, path


@pytest.mark.slow
def test_compiled_training_lies_within_what_seeds_do() -> None:
    """Mean loss of the steps 36 to 45, ten seeds each. A run of compiled blocks once ended at 2.14; ten of plain ones at 1.47 to 1.98."""
    protocol, data = PROTOCOLS["digits"].with_overrides({"max_steps": 45}), load("digits")
    ends: dict[bool, list[float]] = {False: [], True: []}
    for compiled, found in ends.items():
        for seed in range(10):
            model = build_model("vit_differential", "0.1M", protocol)
            model.initialise(seed)
            model.to(GPU)
            set_matmul_precision("bf16")
            assert compute.choose(model, 32, "bf16", Compute(compile=compiled, fused=False)).compiled == compiled
            steps: list[Step] = []
            fit(model, data, protocol, seed=seed, precision="bf16", on_steps=lambda some, _, steps=steps: steps.extend(some))
            found.append(statistics.fmean(step.train_loss for step in steps[-10:]))
    spread = (sum(statistics.variance(found) for found in ends.values()) / 10) ** 0.5
    assert abs(statistics.fmean(ends[True]) - statistics.fmean(ends[False])) < 3 * spread, ends


def _losses(name: str, precision: str, graphs: bool, fused: bool = True, **how) -> list[Step]:
    protocol = PROTOCOLS["digits"].with_overrides({"max_steps": 45, "dropout": 0.2})  # an epoch of 40, whose last batch has 10 images
    model = build_model(name, "0.1M", protocol)
    model.initialise(0)
    model.to(GPU)
    set_matmul_precision(precision)
    model.fused = fused
    steps: list[Step] = []
    fit(model, load("digits"), protocol, seed=0, precision=precision, graphs=graphs, on_steps=lambda some, _: steps.extend(some), **how)
    return steps


@pytest.mark.parametrize("name", ARMS)
def test_graphs_replay_what_would_have_been_computed(name: str) -> None:
    if not has_kernels(GPU, 64):
        pytest.skip("there are no kernels for this GPU")
    eager, graphed, split = (
        _losses(name, "bf16", graphs, micro_batch=micro_batch) for graphs, micro_batch in ((False, 32), (True, 32), (True, 12))
    )
    for other in (graphed, split):  # masks do not depend on how a batch is split
        for a, b in zip(eager[:10], other[:10], strict=True):
            assert b.train_loss == pytest.approx(a.train_loss, rel=1e-2) and b.val_loss == pytest.approx(a.val_loss, rel=1e-2)
            assert b.grad_norm == pytest.approx(a.grad_norm, rel=5e-2)
        assert sum(s.train_loss for s in other[-10:]) == pytest.approx(sum(s.train_loss for s in eager[-10:]), rel=0.2)


@pytest.mark.parametrize("name", ["vit_classic", "vit_differential"])
def test_deterministic_runs_repeat_themselves_and_resume_to_the_same_bits(name: str, tmp_path: Path) -> None:
    spec = RunSpec.of(name, "0.1M", "digits", precision=default_precision(GPU), overrides={"max_steps": 60, "dropout": 0.1})
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
    weights = [RunFiles.of(tmp_path / folder, spec, whole.run_id).weights for folder in ("whole", "again", "cut")]
    assert again.test_loss == whole.test_loss == cut.test_loss
    models = [load_weights(path)[0] for path in weights]
    for first, *others in zip(*(model.parameters() for model in models), strict=True):
        assert all(torch.equal(first, other) for other in others)


def test_a_run_is_fused_and_captured_and_says_so(tmp_path: Path) -> None:
    spec = RunSpec.of("vit_differential", "0.1M", "digits", precision=default_precision(GPU), overrides={"max_steps": 3})
    heard: list[str] = []
    result = train(
        spec, tmp_path, device="cuda", compute=Compute(fused=True, compile=False), on_phase=lambda phase, step: heard.append(phase)
    )
    kernels = has_kernels(GPU, 64)
    assert result.fused == result.graphs == kernels and not result.compiled
    assert heard == ["compiling", "evaluating"]


def test_the_form_is_chosen_by_measurement_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFVIT_CACHE", str(tmp_path))
    for name in ARMS:
        model = build_model(name, "10B", PROTOCOLS["CIFAR-100"]).to(GPU)
        chosen = compute.choose(model, 32, default_precision(GPU), Compute(compile=False, fused=False))
        seconds = list(json.loads((tmp_path / "attention_forms.json").read_text()).values())[-1]
        assert chosen.attention == min(seconds, key=seconds.get)


# --------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("size", ["10B", "50B"])
def test_both_arms_are_split_alike_and_fill_the_memory_that_they_may_use(
    size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFVIT_CACHE", str(tmp_path))
    total = torch.cuda.get_device_properties(GPU).total_memory
    share = 12 * 2**30 / total
    protocol = PROTOCOLS["CIFAR-100"].with_overrides({"max_steps": 2})
    precision = default_precision(GPU)
    data = load("digits")
    data = dataclasses.replace(
        data, **{part: _as_cifar(getattr(data, part)) for part in ("train", "val")}, mean=(0.5,) * 3, std=(0.25,) * 3
    )
    splits, taken = [], []
    for name in ARMS:
        torch.cuda.empty_cache()
        placed = place_model(name, size, protocol, 0, GPU, precision, Compute(memory_share=share))
        splits.append((placed.micro_batch, placed.evaluation_batch))
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(GPU)
        fitted = fit(placed.model, data, protocol, seed=0, precision=precision, **placed.fit_arguments)
        taken.append(torch.cuda.max_memory_reserved(GPU))
        assert fitted.micro_batch == placed.micro_batch, "memory ran out"
        counted = training_memory(placed.model, placed.micro_batch, precision, "cuda")
        assert 0.7 * taken[-1] < counted < 1.3 * taken[-1]
        del placed, fitted
    assert splits[0] == splits[1]
    assert max(taken) < 12 * 2**30
    if size == "50B":
        assert max(taken) > 0.8 * 12 * 2**30


def _as_cifar(split):
    pixels = F.interpolate(split.pixels.float(), size=(32, 32)).to(torch.uint8).repeat(1, 3, 1, 1)
    return dataclasses.replace(split, pixels=pixels.contiguous())
