"""Tests of differential_triton.py under Triton's interpreter, which test_differential_triton.py runs in a process of their own."""

from __future__ import annotations

import functools

import pytest
import torch
import triton
from torch import Tensor

from diffvit import differential_triton
from diffvit.differential_forms import differential_attention as by_form
from diffvit.differential_forms import maps
from diffvit.differential_triton import differential_attention, supported

NAMES = ("out", "dq", "dk", "dv", "dlambda")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def _inputs(dtype: torch.dtype, images: int = 2, tokens: int = 37, pairs: int = 2, width: int = 16, lam: float = 0.7) -> list[Tensor]:
    """q, k, v and lambda as the model gives them: views of one matrix, q and k large enough for sharp maps."""
    torch.manual_seed(tokens)
    qkv = torch.randn(images, tokens, 3, pairs * 2 * width).to(dtype)
    q, k = (1.5 * qkv[:, :, :2]).view(images, tokens, 2, pairs, 2, width).unbind(2)
    v = qkv[:, :, 2].view(images, tokens, pairs, 2 * width).transpose(1, 2)
    return [q, k, v, torch.tensor(lam)]


def _grad(inputs: list[Tensor]) -> Tensor:
    return torch.randn(inputs[2].shape).to(inputs[2].dtype)


def _run(form, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = form(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def _assert_equation(inputs: list[Tensor], grad: Tensor) -> None:
    found = _run(differential_attention, inputs, grad)
    expected = _run(maps, [x.double() for x in inputs], grad.double())
    for name, x, y, like in zip(NAMES, found, expected, (inputs[2], *inputs), strict=True):
        assert x.shape == y.shape and x.dtype == like.dtype
        error = ((x.double() - y).norm() / y.norm()).item()
        assert error < TOLERANCE[inputs[2].dtype], f"{name}: {error:.1e}"


def _set_blocks(monkeypatch: pytest.MonkeyPatch, queries: int, keys: int) -> None:
    monkeypatch.setattr(differential_triton, "configs", lambda *_: [triton.Config({"BLOCK_Q": queries, "BLOCK_K": keys})])
    monkeypatch.setattr(differential_triton, "_tuned", functools.cache(differential_triton._tuned.__wrapped__))


@pytest.fixture
def large_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes as long for a large block as for a small one."""
    _set_blocks(monkeypatch, 128, 128)


@pytest.mark.parametrize("width", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_kernels_are_the_equation(dtype: torch.dtype, width: int) -> None:
    inputs = _inputs(dtype, width=width)
    _assert_equation(inputs, _grad(inputs))


@pytest.mark.parametrize("tokens", [2, 17, 31, 32, 33, 64, 65, 257])
def test_any_number_of_tokens(tokens: int) -> None:
    inputs = _inputs(torch.float32, tokens=tokens, pairs=1 if tokens > 99 else 2)
    _assert_equation(inputs, _grad(inputs))


@pytest.mark.parametrize(("tokens", "width"), [(785, 32), (1025, 64)])
@pytest.mark.usefixtures("large_blocks")
def test_the_studys_token_counts(tokens: int, width: int) -> None:
    inputs = _inputs(torch.bfloat16, images=1, tokens=tokens, pairs=1, width=width)
    _assert_equation(inputs, _grad(inputs))


@pytest.mark.parametrize(("queries", "keys"), [(16, 64), (64, 16), (128, 32), (32, 128)])
def test_blocks_of_any_size(monkeypatch: pytest.MonkeyPatch, queries: int, keys: int) -> None:
    _set_blocks(monkeypatch, queries, keys)
    inputs = _inputs(torch.float32, tokens=77)
    _assert_equation(inputs, _grad(inputs))


def test_one_token_attends_to_itself() -> None:
    inputs = _inputs(torch.float32, tokens=1)
    out, dq, dk, dv, dlambda = _run(differential_attention, inputs, grad := _grad(inputs))
    torch.testing.assert_close(out, (1 - inputs[3]) * inputs[2])
    torch.testing.assert_close(dv, (1 - inputs[3]) * grad)
    torch.testing.assert_close(dlambda, -(grad * inputs[2]).sum())
    assert max(dq.abs().max(), dk.abs().max()) < 1e-5


@pytest.mark.parametrize("which", [0, 1, 2, "grad"])
def test_any_strides(which: int | str) -> None:
    inputs = _inputs(torch.float32)
    grad = _grad(inputs)
    if which == "grad":
        grad = grad.transpose(-1, -2).contiguous().transpose(-1, -2)
    else:
        backwards = tuple(reversed(range(inputs[which].ndim)))
        inputs[which] = inputs[which].permute(backwards).contiguous().permute(backwards)
        assert inputs[which].stride(-1) > 1
    _assert_equation(inputs, grad)


def test_a_gradient_that_is_one_number() -> None:
    inputs = _inputs(torch.float32)
    _assert_equation(inputs, torch.ones(()).expand(inputs[2].shape))


@pytest.mark.parametrize("lam", [0.0, 1.0, 1.7, -0.2])
def test_any_lambda(lam: float) -> None:
    inputs = _inputs(torch.float32, lam=lam)
    grad = _grad(inputs)
    if lam:
        _assert_equation(inputs, grad)
        return
    found, (q, k, v, _) = _run(differential_attention, inputs, grad), inputs
    expected = torch.softmax(q[..., 0, :].transpose(1, 2) @ k[..., 0, :].permute(0, 2, 3, 1) / 4, -1) @ v
    torch.testing.assert_close(found[0], expected)
    assert not found[1][..., 1, :].any() and not found[2][..., 1, :].any()  # nothing flows through a map that does not count
    assert found[4] != 0


def test_equal_maps_cancel() -> None:
    q, k, v, lam = _inputs(torch.float32, lam=1.0)
    q, k = (x[..., :1, :].expand(x.shape) for x in (q, k))
    found = _run(differential_attention, [q, k, v, lam], _grad([q, k, v]))
    assert found[0].abs().max() < 1e-6
    torch.testing.assert_close(found[1][..., 0, :], -found[1][..., 1, :], atol=1e-5, rtol=1e-5)
    assert found[3].abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [-300.0, 300.0])
def test_scores_of_any_size(dtype: torch.dtype, factor: float) -> None:
    q, k, v, lam = _inputs(dtype, tokens=33)
    # All scores of a head far from zero on one side: what stands in for keys that are not there must not count.
    same = torch.ones_like(q) * factor
    for inputs in ([same, k.abs() + 1, v, lam], [factor * q, k, v, lam]):
        found = _run(differential_attention, inputs, _grad(inputs))
        expected = maps(*(x.double() for x in inputs))
        assert all(x.isfinite().all() for x in found)
        assert (found[0].double() - expected).norm() < 2e-2 * expected.norm()


def test_lambdas_gradient_is_the_outputs_difference() -> None:
    inputs = _inputs(torch.float32)
    grad = _grad(inputs)
    higher, lower = (differential_attention(*inputs[:3], inputs[3] + step) for step in (0.5, -0.5))
    difference = ((higher - lower).double() * grad).sum()  # exact: the output is linear in lambda
    found = _run(differential_attention, inputs, grad)[4]
    torch.testing.assert_close(found.double(), difference, rtol=1e-4, atol=1e-4)


def test_twice_the_same_bits() -> None:
    inputs = _inputs(torch.bfloat16, tokens=65)
    grad = _grad(inputs)
    for first, second in zip(*(_run(differential_attention, inputs, grad) for _ in range(2)), strict=True):
        assert torch.equal(first, second)


def test_every_element_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    real, poisoned = torch.Tensor.new_empty, []

    def new_empty(self: Tensor, *shape, **options) -> Tensor:
        poisoned.append(shape)
        return real(self, *shape, **options).fill_(float("nan"))

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(torch, "empty_like", lambda x: torch.full_like(x, float("nan")))
    inputs, grad = _inputs(torch.float32), torch.ones(2, 2, 37, 32)
    assert all(x.isfinite().all() for x in _run(differential_attention, inputs, grad))
    assert poisoned


def test_without_gradients_the_output_is_the_same_and_nothing_is_kept() -> None:
    inputs = _inputs(torch.float32)
    expected = _run(differential_attention, inputs, _grad(inputs))[0]
    with torch.no_grad():
        out = differential_attention(*[x.requires_grad_() for x in map(torch.clone, inputs)])
    assert not out.requires_grad and torch.equal(out, expected)
    assert [x.numel() for x in differential_triton._attend(*inputs, False)] == [expected.numel(), 0, 0]


def test_the_heads_lie_side_by_side() -> None:
    out = differential_attention(*_inputs(torch.float32))
    assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()


def test_the_operator_is_as_torch_compile_expects() -> None:
    inputs = [x.detach().requires_grad_() for x in _inputs(torch.float32, images=1, tokens=17, pairs=1)]
    results = torch.library.opcheck(
        torch.ops.diffvit.triton_attention.default,
        (*inputs, True),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    assert set(results.values()) == {"SUCCESS"}
    with torch.no_grad():
        kept = torch.ops.diffvit.triton_attention(*inputs, True)
        backward = torch.ops.diffvit.triton_attention_backward.default
        detached = [x.detach() for x in inputs]
        results = torch.library.opcheck(
            backward, (torch.ones_like(kept[0]), *detached, *kept), test_utils=("test_schema", "test_faketensor")
        )
    assert set(results.values()) == {"SUCCESS"}


def test_compiled_as_a_graph_it_is_the_same() -> None:
    inputs = _inputs(torch.float32, images=1, tokens=17, pairs=1)
    grad = _grad(inputs)
    compiled = torch.compile(functools.partial(by_form, form="triton"), backend="aot_eager", fullgraph=True)
    for x, y in zip(_run(compiled, inputs, grad), _run(differential_attention, inputs, grad), strict=True):
        torch.testing.assert_close(x, y)


def test_it_is_a_form() -> None:
    inputs = _inputs(torch.float32)
    torch.testing.assert_close(by_form(*inputs, form="triton"), by_form(*inputs, form="maps"))


def test_what_does_not_fit_is_refused() -> None:
    q, k, v, lam = _inputs(torch.float32)
    for wrong in (
        (q[:, :, :, 0], k, v, lam),
        (q[:, :5], k, v, lam),
        (q, k, v[..., :16], lam),
        (q, k, v.transpose(1, 2), lam),
        (q[..., :1, :], k[..., :1, :], v, lam),
        (q, k, v, torch.ones(2)),
        (q[:0], k[:0], v[:0], lam),
        (q, k.half(), v, lam),
        (q, k, v.to("meta"), lam),
        (q.double(), k.double(), v.double(), lam),
        (q[..., :8], k[..., :8], v[..., :16], lam),
    ):
        with pytest.raises(ValueError, match=r"must be|nothing|one dtype|no Triton kernels"):
            differential_attention(*wrong)


def test_supported_where_triton_interprets() -> None:
    cpu = torch.device("cpu")
    assert all(supported(cpu, dtype, width) for dtype in TOLERANCE for width in (16, 32, 64, 128))
    assert not supported(cpu, torch.float64, 32) and not supported(cpu, torch.float32, 24)
