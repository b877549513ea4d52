"""Tests of fused_triton.py and fused.py under Triton's interpreter, which test_fused.py runs in a process of their own."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from diffvit import compute, vit_differential
from diffvit.compute import Compute, choose
from diffvit.kernels import fused, fused_triton
from diffvit.kernels.dropout import Dropout, has_kernels, key_on
from diffvit.kernels.fused_triton import CONFIGS, KERNELS, dropout, head_norm, mlp, residual_norm, supported
from diffvit.protocol import MODELS, PROTOCOLS
from diffvit.vit import VisionTransformer, build_model

CPU = torch.device("cpu")
KEY = torch.tensor([2**62 + 12345, 0, 1])
SITE = 3
# By what outputs may be off, relative to their norm: bf16 has 8 bits, fp16 11, and the interpreter cuts the others off.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
# Images, rows an image, columns: rows that do not fill the last tile, columns that do not fill the tile, more rows than a program sums up.
SHAPES = [(3, 7, 64), (2, 37, 256), (5, 13, 384), (1, 1, 8), (2, 35, 24)]
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
each_rate = pytest.mark.parametrize("p", [0.0, 0.3])
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def _mask(shape: tuple[int, ...], p: float, key: Tensor = KEY, site: int = SITE) -> Tensor:
    """0, or what a kept value is multiplied with. fp64"""
    return dropout(torch.ones(shape), key, site, p).double() if p else torch.ones(shape, dtype=torch.float64)


def _passes(form: Callable[..., Any], inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Outputs, and gradients by all inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = form(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, grads)]


def _assert_same(
    form: Callable[..., Any], right: Callable[..., Any], inputs: list[Tensor], grads: list[Tensor], dtype: torch.dtype
) -> None:
    """That `form` gives what `right` gives in fp64: outputs and gradients, each in the dtype of what it is the gradient of."""
    found = _passes(form, inputs, grads)
    expected = _passes(right, [x.double() for x in inputs], [x.double() for x in grads])
    for number, (x, y, like) in enumerate(zip(found, expected, [*grads, *inputs], strict=True)):
        assert x.shape == y.shape and x.dtype == like.dtype
        error = ((x.double() - y).norm() / y.norm().clamp_min(1e-3)).item()
        assert error < TOLERANCE[dtype], (number, error)


@pytest.fixture
def _large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes as long for a large tile as for a small one."""
    for kernel, (*_, last) in CONFIGS.items():
        monkeypatch.setitem(CONFIGS, kernel, [triton.Config({**last.kwargs, "R": 64})])
    monkeypatch.setattr(fused_triton, "_tuned", functools.cache(fused_triton._tuned.__wrapped__))


large_tiles = pytest.mark.usefixtures("_large_tiles")


# -------------------------------------------------------------------------------------------------------------- operators


def _mlp_inputs(shape: tuple[int, int, int], H: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    D = shape[-1]
    weights = [_random(H, D, dtype=dtype) / D**0.5, _random(D, H, seed=1, dtype=dtype) / H**0.5]
    return [2 * _random(*shape, dtype=dtype), weights[0], _random(H), weights[1]]


@pytest.mark.parametrize(("shape", "H"), [((3, 7, 64), 128), ((2, 67, 64), 256), ((5, 13, 384), 384), ((1, 1, 128), 128)], ids=str)
@each_dtype
@each_rate
def test_mlp_is_what_its_name_says(shape: tuple[int, int, int], H: int, dtype: torch.dtype, p: float) -> None:
    mask = _mask((*shape[:2], H), p)

    def right(x: Tensor, weight_HD: Tensor, bias_H: Tensor, weight_DH: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, weight_HD, bias_H)) * mask, weight_DH)

    inputs, grads = _mlp_inputs(shape, H, dtype), [_random(*shape, seed=1, dtype=dtype)]
    _assert_same(lambda *inputs: mlp(*inputs, KEY, SITE, p), right, inputs, grads, dtype)


def test_mlp_keeps_the_first_product_only_for_a_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, real = [], fused_triton._linear_gelu_dropout

    def spied(*inputs: Any) -> tuple[Tensor, Tensor]:
        results = real(*inputs)
        kept.append(results[1].numel())
        return results

    monkeypatch.setattr(fused_triton, "_linear_gelu_dropout", spied)
    inputs = [x.requires_grad_() for x in _mlp_inputs((2, 5, 64), 128)]
    with torch.no_grad():
        without = mlp(*inputs, KEY, SITE, 0.3)
    assert not without.requires_grad and torch.equal(without, mlp(*inputs, KEY, SITE, 0.3))
    assert kept == [0, 2 * 5 * 128]


@pytest.mark.parametrize(("D", "H"), [(32, 128), (64, 64), (96, 128), (64, 192)])
def test_widths_that_fill_no_tile_are_refused(D: int, H: int) -> None:
    with pytest.raises(ValueError, match=f"no kernels for an MLP of widths {D} and {H}"):
        mlp(*_mlp_inputs((2, 5, D), H), KEY, SITE, 0.3)


@each_shape
@each_dtype
@each_rate
def test_residual_norm_is_what_its_name_says(shape: tuple[int, int, int], dtype: torch.dtype, p: float) -> None:
    mask, D = _mask(shape, p), shape[-1]

    def right(stream: Tensor, branch: Tensor, bias: Tensor, weight: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        total = stream + (branch + bias) * mask
        return total, F.layer_norm(total, (D,), weight, beta, 1e-6)

    inputs = [3 * _random(*shape) + 1, _random(*shape, seed=1, dtype=dtype), _random(D), 1 + _random(D, seed=1), _random(D, seed=2)]
    grads = [_random(*shape, seed=2), _random(*shape, seed=3, dtype=dtype)]
    _assert_same(lambda *inputs: residual_norm(*inputs, KEY, SITE, p, 1e-6), right, inputs, grads, dtype)


@pytest.mark.parametrize("which", [0, 1])
def test_either_output_of_residual_norm_may_go_unused(which: int) -> None:
    shape, D = (2, 5, 24), 24
    inputs = [_random(*shape), _random(*shape, seed=1, dtype=torch.bfloat16), _random(D), 1 + _random(D, seed=1), _random(D, seed=2)]
    grads = [_random(*shape, seed=2), _random(*shape, seed=3, dtype=torch.bfloat16)]
    leaves = [x.requires_grad_() for x in inputs]
    out = residual_norm(*leaves, KEY, SITE, 0.3, 1e-6)
    found = torch.autograd.grad(out[which], leaves, grads[which], allow_unused=True)
    grads[1 - which] = torch.zeros_like(grads[1 - which])
    expected = torch.autograd.grad(residual_norm(*leaves, KEY, SITE, 0.3, 1e-6), leaves, grads)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_norm_is_exact_far_from_zero() -> None:
    """The variance is not the difference of two large numbers."""
    stream = 1000 + _random(2, 9, 384)
    zeros, ones = torch.zeros(384), torch.ones(384)
    _, found = residual_norm(stream, torch.zeros_like(stream), zeros, ones, zeros, KEY, SITE, 0.0, 1e-6)
    torch.testing.assert_close(found.double(), F.layer_norm(stream.double(), (384,), eps=1e-6), rtol=0, atol=2e-4)


@pytest.mark.parametrize("shape", [(3, 5, 2, 32), (2, 37, 3, 128), (1, 1, 1, 64), (5, 113, 1, 32)], ids=str)
@each_dtype
def test_head_norm_is_what_its_name_says(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    factor = 0.7315
    _assert_same(
        lambda x, weight: head_norm(x, weight, 1e-5, factor),
        lambda x, weight: factor * F.rms_norm(x, shape[-1:], weight, 1e-5),
        [0.1 * _random(*shape, dtype=dtype), 1 + _random(shape[-1])], [_random(*shape, seed=1, dtype=dtype)], dtype,
    )  # fmt: skip


def test_head_norm_of_nothing_is_finite() -> None:
    """Where two maps are equal, all of an output is 0."""
    found = _passes(lambda x, weight: head_norm(x, weight, 1e-5, 0.8), [torch.zeros(2, 3, 32), torch.ones(32)], [torch.ones(2, 3, 32)])
    assert all(x.isfinite().all() for x in found) and not found[0].any()


@each_shape
@each_dtype
def test_dropout_multiplies_with_its_mask(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    mask = _mask(shape, 0.3)
    _assert_same(
        lambda x: dropout(x, KEY, SITE, 0.3),
        lambda x: x * mask,
        [_random(*shape, dtype=dtype)],
        [_random(*shape, seed=1, dtype=dtype)],
        dtype,
    )


def test_gelu_is_torchs_exact_one() -> None:
    bias = torch.linspace(-12, 12, 64 * 128 + 1)[:-1]
    zeros = torch.zeros(1, 1, 64), torch.zeros(len(bias), 64)
    out, u = fused_triton._linear_gelu_dropout(*zeros, bias, KEY, 0, 0.0, True)
    one = F.one_hot(torch.tensor([[0]]), 64).float()  # so that the output's gradient is 1 everywhere
    slope, dbias = fused_triton._linear_gelu_dropout_backward(one, torch.ones(64, len(bias)), u, bias, KEY, 0, 0.0)
    assert torch.equal(slope.flatten(), dbias)
    x, out, slope = bias, out.flatten(), slope.flatten()
    right, right_slope = _passes(F.gelu, [x.double()], [torch.ones_like(x).double()])
    errors = (out - right).abs()
    assert errors[x < 1].max() < 2.5e-7
    assert (errors / x)[x >= 1].max() < 2e-7  # beyond 4, neighbours in fp32 are 5e-7 apart
    assert (slope - right_slope).abs().max() < 3e-7
    assert torch.equal(out[x > 8], x[x > 8]) and out[x < -8].abs().max() < 1e-14


def test_inputs_may_have_any_strides() -> None:
    shape = (3, 7, 64)

    def results(change: Callable[[Tensor], Tensor]) -> list[Tensor]:
        a, b, grad, grad2 = (change(_random(*shape, seed=seed)) for seed in range(4))
        c, ones, (_, first, bias, second) = _random(64), torch.ones(64), _mlp_inputs(shape, 128)
        first, second = (weight.mT.contiguous().mT if change is backwards else weight for weight in (first, second))
        return [
            *_passes(lambda *inputs: mlp(*inputs, KEY, 1, 0.2), [a, first, bias, second], [grad]),
            *_passes(lambda *inputs: residual_norm(*inputs, KEY, 1, 0.2, 1e-6), [a, b, c, ones, c], [grad, grad2]),
            *_passes(lambda x, weight: head_norm(x, weight, 1e-5, 0.8), [a, ones], [grad]),
            *_passes(lambda x: dropout(x, KEY, 1, 0.2), [a], [grad]),
        ]

    def backwards(x: Tensor) -> Tensor:
        changed = x.permute(2, 1, 0).contiguous().permute(2, 1, 0)
        assert not changed.is_contiguous()
        return changed

    for a, b in zip(results(torch.clone), results(backwards), strict=True):
        torch.testing.assert_close(a, b)


def _all_operators(p: float) -> list[Tensor]:
    """Everything that they write, from inputs that have rows and columns beside the tiles."""
    shape, D = (2, 37, 24), 24
    a, b, c = _random(*shape), _random(*shape, seed=1, dtype=torch.bfloat16), _random(D)
    x, weight_HD, bias_H, weight_DH = _mlp_inputs((2, 37, 64), 128, torch.bfloat16)
    results = [dropout(a, KEY, 1, p), *fused_triton._linear_gelu_dropout(x, weight_HD, bias_H, KEY, 1, p, True)]
    results += fused_triton._linear_gelu_dropout_backward(x, weight_DH, results[-1], bias_H, KEY, 1, p)
    results += (outputs := fused_triton._residual_norm(a, b, c, c, c, KEY, 1, p, 1e-6))
    results += fused_triton._residual_norm_backward(a, b, outputs[0], *outputs[2:], c, KEY, 1, p)
    heads, weight = _random(2, 37, 3, 32), _random(32)
    return [*results, head_norm(heads, weight, 1e-5, 0.8), *fused_triton._head_norm_backward(heads, heads, weight, 1e-5, 0.8)]


@each_rate
def test_every_element_is_written_and_nothing_else(monkeypatch: pytest.MonkeyPatch, p: float) -> None:
    """Memory that is new is full of NaN, and so is what lies behind it."""
    expected, allocated, frame = _all_operators(p), [], 4096

    def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = torch.Size(shape).numel()
        storage = torch.full((frame + size + frame,), float("nan"), dtype=dtype)
        allocated.append((storage, storage[frame : frame + size].view(shape)))
        return allocated[-1][1]

    class Poisoned:
        """torch, but for one function: Triton's interpreter allocates, too."""

        empty_like = staticmethod(lambda x: poisoned(tuple(x.shape), x.dtype))

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    real = torch.Tensor.new_empty
    monkeypatch.setattr(fused_triton, "torch", Poisoned())
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda self, *shape, **how: real(self, *shape, **how) if how else poisoned(shape, self.dtype)
    )
    found = _all_operators(p)
    assert len(allocated) == len(found) - 3  # but for the sums, whose parts begin as 0
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for storage, inside in allocated:
        assert inside.isfinite().all() and storage[:frame].isnan().all() and storage[-frame:].isnan().all()


def test_tiles_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _all_operators(0.3)
    assert CONFIGS.keys() == KERNELS.keys()
    for number in range(max(map(len, CONFIGS.values())) - 1):  # the interpreter takes the last one
        chosen = {kernel: [configs[number % len(configs)]] for kernel, configs in CONFIGS.items()}
        monkeypatch.setattr(fused_triton, "CONFIGS", chosen)
        monkeypatch.setattr(fused_triton, "_tuned", functools.cache(fused_triton._tuned.__wrapped__))
        for a, b in zip(_all_operators(0.3), expected, strict=True):
            assert (a.double() - b.double()).norm() <= TOLERANCE[b.dtype] * b.double().norm(), chosen


def test_there_is_room_for_the_sums_of_the_smallest_tile() -> None:
    least = {
        kernel: min(config.kwargs["R"] * config.kwargs.get("TILES", 1) for config in configs)
        for kernel, configs in CONFIGS.items()
        if kernel.endswith("_backward")
    }
    assert least == fused_triton._LEAST_ROWS


def test_twice_the_same_bits() -> None:
    assert all(torch.equal(a, b) for a, b in zip(_all_operators(0.3), _all_operators(0.3), strict=True))


def test_the_operators_are_as_torch_compile_expects() -> None:
    shape, operators = (2, 5, 8), torch.ops.diffvit
    a, b, c, heads, weight = _random(*shape), _random(*shape, seed=1, dtype=torch.bfloat16), _random(8), _random(2, 3, 16), _random(16)
    sums = operators.residual_norm(a, b, c, c, c, KEY, 1, 0.3, 1e-6)
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (operators.residual_norm, (a, b, c, c, c, KEY, 1, 0.3, 1e-6)),
        (operators.head_norm, (heads, weight, 1e-5, 0.8)),
        (operators.dropout, (a, KEY, 1, 0.3)),
        (operators.residual_norm_backward, (a, b, sums[0], *sums[2:], c, KEY, 1, 0.3)),
        (operators.head_norm_backward, (heads, heads, weight, 1e-5, 0.8)),
    ]
    for number, (operator, inputs) in enumerate(calls):
        differentiable = number < 3
        given = [x.clone().requires_grad_(x.is_floating_point() and differentiable) if isinstance(x, Tensor) else x for x in inputs]
        utils = ("test_schema", "test_faketensor", *(["test_autograd_registration"] if differentiable else []))
        assert set(torch.library.opcheck(operator.default, tuple(given), test_utils=utils).values()) == {"SUCCESS"}


def test_supported_where_triton_interprets() -> None:
    for width, there in ((8, True), (64, True), (384, True), (20, False), (4, False)):
        assert supported(CPU, width) == has_kernels(CPU, width) == there


# ------------------------------------------------------------------------------------------------------------------ masks


def _kept(*shape: int, p: float = 0.5, seed: int = 11, first: int = 0, stride: int = 1, site: int = SITE) -> Tensor:
    return _mask(shape, p, torch.tensor([seed, first, stride]), site) > 0


def _assert_independent(a: Tensor, b: Tensor) -> None:
    """Within 5 sigma. Where both keep half of their values, they agree in half of them."""
    assert (a == b).double().mean().item() == pytest.approx(0.5, abs=5 * 0.5 / a.numel() ** 0.5)


@large_tiles
@pytest.mark.parametrize("p", [0.1, 0.2, 0.5, 0.9])
def test_as_many_values_are_dropped_as_should_be(p: float) -> None:
    x = torch.ones(8, 50, 1024)
    out = dropout(x, KEY, SITE, p)
    dropped = (out == 0).double()
    assert dropped.mean().item() == pytest.approx(p, abs=5 * (p * (1 - p) / x.numel()) ** 0.5)
    for dims in ((0, 1), (0, 2), (1, 2)):  # in every column, row and image
        some = dropped.mean(dims)
        assert (some - p).abs().max() < 5.5 * (p * (1 - p) * len(some) / x.numel()) ** 0.5
    levels = round(p * 65536)
    assert out.unique().tolist() == pytest.approx([0, 65536 / (65536 - levels)], rel=1e-6)


@pytest.mark.parametrize("p", [0.0, 1e-9, 1 - 1e-9])
def test_the_ends_of_the_range(p: float) -> None:
    x = torch.ones(2, 100, 64)
    out = dropout(x, KEY, SITE, p)
    assert torch.equal(out, x) if p < 0.5 else (out > 0).sum() <= 5  # one in 65536


@large_tiles
def test_masks_of_places_seeds_and_images_are_independent() -> None:
    shape = (2, 16, 1024)
    masks = [_kept(*shape, site=site) for site in (0, 1, 2, 40)]
    masks += [_kept(*shape, seed=seed) for seed in (0, 1, 2, 2**32, 2**33, 2**62)]  # all of a seed's bits count
    masks += [_kept(*shape, first=first) for first in (2, 100, 2**20)]
    for a, b in itertools.combinations(masks, 2):
        _assert_independent(a, b)
    for a, b in itertools.combinations(_kept(8, 10, 1024), 2):
        _assert_independent(a, b)


@large_tiles
@pytest.mark.parametrize("width", [64, 256, 384])
def test_neighbouring_elements_are_independent(width: int) -> None:
    kept = _kept(4, 64, width)
    for distance in (1, 2, 3, 4, 5, 6, 7, 8, 16):  # eight values share a draw
        _assert_independent(kept[..., distance:], kept[..., :-distance])
    for distance in (1, 2, 3, 8):
        _assert_independent(kept[:, distance:], kept[:, :-distance])
    flat = kept.flatten(1)
    for distance in (width - 1, width + 1, 4 * width):
        _assert_independent(flat[:, distance:], flat[:, :-distance])


@large_tiles
def test_pairs_within_a_draw_are_independent() -> None:
    draws = _kept(2, 125, 1024).view(-1, 8)
    for i, j in itertools.combinations(range(8), 2):
        _assert_independent(draws[:, i], draws[:, j])


def test_a_higher_rate_drops_what_a_lower_one_drops_and_more() -> None:
    low, high = (_kept(3, 20, 64, p=p) for p in (0.2, 0.6))
    assert not (high & ~low).any() and (low & ~high).any()


@pytest.mark.parametrize("rows", [1, 5, 17])
@pytest.mark.parametrize("width", [24, 64, 384])
def test_masks_do_not_depend_on_how_a_batch_is_split(rows: int, width: int) -> None:
    whole = _kept(8, rows, width)
    assert torch.equal(whole[2:5], _kept(3, rows, width, first=2))
    assert torch.equal(whole[7:], _kept(1, rows, width, first=7))
    for rank in (0, 1):  # of two workers, each of which has every second image
        assert torch.equal(whole[rank::2], _kept(4, rows, width, first=rank, stride=2))
    # The second micro-batch of two images of the second of two workers.
    assert torch.equal(whole[5::2], _kept(2, rows, width, first=1 + 2 * 2, stride=2))


def test_a_mask_follows_the_key_where_it_lies() -> None:
    """A graph is captured once, and the seed written into the key before it is replayed."""
    key = KEY.clone()
    first = dropout(torch.ones(1, 9, 64), key, SITE, 0.5)
    key[0] += 1
    second = dropout(torch.ones(1, 9, 64), key, SITE, 0.5)
    key[0] -= 1
    assert not torch.equal(first, second) and torch.equal(first, dropout(torch.ones(1, 9, 64), key, SITE, 0.5))


# ----------------------------------------------------------------------------------------------------------- whole models


@pytest.fixture(autouse=True)
def _masks_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, modules draw masks of their own."""

    def forward(self: Dropout, x: Tensor) -> Tensor:
        return dropout(x, key_on(x.device), self.site, self.p) if self.training and self.p else x

    monkeypatch.setattr(Dropout, "forward", forward)
    key_on(CPU).copy_(torch.tensor([7, 0, 1]))


@pytest.fixture
def plain_norms(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Whether differential attention's norm is torch's."""
    return lambda plain: monkeypatch.setattr(vit_differential, "has_kernels", lambda *_: not plain)


def _model(name: str, p: float, fused: bool = False, recompute: bool = False, depth: int = 2) -> VisionTransformer:
    protocol = dataclasses.replace(PROTOCOLS["digits"], depths={"some": depth}, dropout=p)
    model = build_model(name, "some", protocol)
    model.initialise(0)
    with torch.no_grad():  # biases and norms too are far from where they start
        for number, parameter in enumerate(model.parameters()):
            if parameter.ndim == 1:
                parameter.add_(0.1 * _random(len(parameter), seed=number))
    model.fused, model.recompute = fused, recompute
    return model


@functools.cache
def _images() -> tuple[Tensor, Tensor]:
    return _random(3, 1, 8, 8), torch.tensor([1, 4, 9])


def _logits_and_gradients(model: VisionTransformer, images: Tensor | None = None, labels: Tensor | None = None) -> list[Tensor]:
    images, labels = _images() if images is None else (images, labels)
    logits = model(images)
    loss = F.cross_entropy(logits.float(), labels, reduction="sum")
    return [logits.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def _assert_near(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    floor = 1e-2 * sum(y.norm().item() for y in expected) / len(expected)  # some gradients are next to nothing
    for number, (x, y) in enumerate(zip(found, expected, strict=True)):
        assert (x - y).norm() <= tolerance * max(y.norm().item(), floor), number


# The MLP of the second version has a width that fills no tile.
FUSED = [name for name in MODELS if name != "vit_differential_v2"]


@large_tiles
@pytest.mark.parametrize(("name", "p"), [("vit_differential", 0.0), *((name, 0.3) for name in FUSED)])
def test_a_fused_model_is_the_plain_one(name: str, p: float, plain_norms: Callable[[bool], None]) -> None:
    depth = 3 if name == "vit_classic" else 2  # a block between two others
    plain_norms(True)
    expected = _logits_and_gradients(_model(name, p, depth=depth))
    plain_norms(False)
    fused = _logits_and_gradients(_model(name, p, fused=True, depth=depth))
    _assert_near(fused, expected)
    recomputed = _logits_and_gradients(_model(name, p, fused=True, recompute=True, depth=depth))
    assert all(torch.equal(a, b) for a, b in zip(fused, recomputed, strict=True)), "the same masks are drawn once more"


@large_tiles
@pytest.mark.parametrize("name", FUSED)
def test_a_fused_model_evaluates_as_the_plain_one_does(name: str, plain_norms: Callable[[bool], None]) -> None:
    images, _ = _images()
    plain_norms(True)
    with torch.no_grad():
        expected = _model(name, 0.3).eval()(images)
        plain_norms(False)
        found = [_model(name, 0.3, fused=True, recompute=recompute).eval()(images) for recompute in (False, True)]
        assert torch.equal(*found) and not found[0].requires_grad
        _assert_near(found[:1], [expected])
        assert (_model(name, 0.3, fused=True)(images) - expected).norm() > 1e-2, "while it trains, it drops"


@large_tiles
def test_a_single_block_is_fused_too(plain_norms: Callable[[bool], None]) -> None:
    models = [_model("vit_classic", 0.3, fused) for fused in (False, True)]
    for model in models:
        model.blocks = model.blocks[:1]
    plain, fused = map(_logits_and_gradients, models)
    _assert_near(fused, plain)


@large_tiles
def test_a_fused_models_masks_do_not_depend_on_the_split() -> None:
    images, labels = _images()
    model = _model("vit_differential", 0.3, fused=True)
    whole = _logits_and_gradients(model)
    parts = []
    for first, part in ((0, slice(0, 2)), (2, slice(2, 3))):
        key_on(CPU)[1].fill_(first)
        parts.append(_logits_and_gradients(model, images[part], labels[part]))
    logits = torch.cat([part[0] for part in parts])
    _assert_near([logits, *(a + b for a, b in zip(parts[0][1:], parts[1][1:], strict=True))], whole)


def test_every_place_of_a_model_has_masks_of_its_own() -> None:
    model = _model("vit_differential", 0.3)
    sites = [module.site for module in model.modules() if isinstance(module, Dropout)]
    assert sorted(sites) == list(range(1 + 3 * 2))


@large_tiles
def test_fused_blocks_are_checked_before_they_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "_median_seconds", lambda action, device, repeats: 1.0)
    model = _model("vit_differential", 0.3)
    chosen = choose(model, 2, "fp32", Compute(fused=True))
    assert chosen.fused and model.fused and not chosen.graphs and model.training
    assert len(chosen.notes) == 1 and chosen.notes[0].startswith("fused blocks, tried for ")
    monkeypatch.setattr(fused, "mlp", lambda *inputs: 1.1 * mlp(*inputs))
    chosen = choose(model, 2, "fp32", Compute(fused=True))
    assert not chosen.fused and not model.fused and model.training
    assert "ArithmeticError: they do not give what the plain blocks give" in chosen.notes[0]


def test_a_model_whose_widths_fill_no_tile_is_left_as_it_is() -> None:
    model = _model("vit_differential_v2", 0.3)
    chosen = choose(model, 2, "fp32", Compute(fused=True))
    assert not chosen.fused and not model.fused and model.training and "no kernels for an MLP" in chosen.notes[0]
