"""Tests of attention_triton.py under Triton's interpreter, which test_attention_triton.py runs in a process of their own."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import triton
from forms import by_form
from torch import Tensor

from diffvit.kernels import attention_triton
from diffvit.kernels.attention_triton import attend, supported
from diffvit.kernels.forms import differential_attention
from diffvit.vit import set_form
from diffvit.vit_classic import Attention
from diffvit.vit_differential import DifferentialAttention

NAMES = ("out", "dq", "dk", "dv", "dlambda")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
both = pytest.mark.parametrize("maps", [1, 2], ids=["classic", "differential"])


class Case:
    """Inputs as the model gives them, with queries and keys large enough for sharp maps, and the gradient of the output.

    Attributes:
        lam: None in classic attention.
    """

    def __init__(
        self,
        maps: int,
        dtype: torch.dtype = torch.float32,
        images: int = 2,
        tokens: int = 37,
        groups: int = 2,
        width: int = 16,
        lam: float = 0.7,
    ):
        generator = torch.Generator().manual_seed(tokens)
        self.heads = maps * groups
        shape = images, tokens, 3, self.heads * width
        self.qkv = (torch.randn(shape, generator=generator) * torch.tensor([1.5, 1.5, 1.0])[:, None]).to(dtype)
        self.lam = torch.tensor(lam) if maps == 2 else None
        self.grad = torch.randn((images, tokens, shape[3]), generator=generator).to(dtype)

    def run(self) -> list[Tensor]:
        """Output, gradients of queries, keys and values, and of lambda where there is one."""
        return self._gradients(attend, self.qkv, self.lam, self.grad)

    def expected(self) -> list[Tensor]:
        """The same by the equations, in fp64 from the same rounded inputs."""
        return self._gradients(_equation, self.qkv.double(), None if self.lam is None else self.lam.double(), self.grad.double())

    def _gradients(self, form, qkv: Tensor, lam: Tensor | None, grad: Tensor) -> list[Tensor]:
        qkv = qkv.detach().requires_grad_()
        lam = None if lam is None else lam.detach().requires_grad_()
        out = form(qkv, self.heads, lam)
        dqkv, *dlambda = torch.autograd.grad(out, [qkv] if lam is None else [qkv, lam], grad)
        return [out.detach(), *dqkv.unbind(2), *dlambda]

    def assert_equation(self) -> None:
        found, expected = self.run(), self.expected()
        assert len(found) == len(expected) == (4 if self.lam is None else 5)
        for name, x, y in zip(NAMES, found, expected, strict=False):
            assert x.shape == y.shape and x.dtype == (torch.float32 if name == "dlambda" else self.qkv.dtype)
            # Lambda's gradient is a sum of terms of both signs, which rounding errors are in proportion to.
            scale = self._terms_of_dlambda().norm().clamp_min(y.abs()) if name == "dlambda" else y.norm()
            error = ((x.double() - y).norm() / scale).item()
            assert error < TOLERANCE[self.qkv.dtype], f"{name}: {error:.1e}"

    def _terms_of_dlambda(self) -> Tensor:
        """What the gradient of lambda is the sum of: of all elements, the output's gradient times A2 V. [B, N, D]"""
        with_less, with_more = (_equation(self.qkv.double(), self.heads, lam.double()) for lam in (self.lam - 0.5, self.lam + 0.5))
        return self.grad.double() * (with_less - with_more)


def _equation(qkv: Tensor, heads: int, lam: Tensor | None) -> Tensor:
    """softmax(Q K' / sqrt(E)) V of each head, or of each pair (A1 - lambda A2) V, one after another."""
    width, outs = qkv.shape[-1] // heads, []
    for first in range(0, heads, 1 if lam is None else 2):
        q, k = (qkv[:, :, i].unflatten(-1, (heads, width)) for i in (0, 1))
        a = [torch.softmax(q[:, :, head] @ k[:, :, head].mT / width**0.5, -1) for head in (first, first + 1)[: 1 if lam is None else 2]]
        v = qkv[:, :, 2, first * width : (first + len(a)) * width]
        outs.append((a[0] if lam is None else a[0] - lam * a[1]) @ v)
    return torch.cat(outs, -1)


def _set_blocks(monkeypatch: pytest.MonkeyPatch, queries: int, keys: int) -> None:
    monkeypatch.setattr(attention_triton, "configs", lambda *_: [triton.Config({"BLOCK_Q": queries, "BLOCK_K": keys})])
    monkeypatch.setattr(attention_triton, "_tuned", functools.cache(attention_triton._tuned.__wrapped__))


@both
@pytest.mark.parametrize("width", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_kernels_are_the_equation(dtype: torch.dtype, width: int, maps: int) -> None:
    Case(maps, dtype, images=1, groups=1, width=width).assert_equation()


@both
@pytest.mark.parametrize("tokens", [2, 17, 31, 32, 33, 64, 65, 129])
def test_any_number_of_tokens(tokens: int, maps: int) -> None:
    Case(maps, tokens=tokens, images=1, groups=1).assert_equation()


@both
@pytest.mark.parametrize(("tokens", "width"), [(785, 32), (1025, 64)])
def test_the_studys_token_counts(monkeypatch: pytest.MonkeyPatch, tokens: int, width: int, maps: int) -> None:
    _set_blocks(monkeypatch, 256, 256)  # the interpreter takes as long for a large block as for a small one
    Case(maps, torch.bfloat16, images=1, tokens=tokens, groups=1, width=width).assert_equation()


@both
@pytest.mark.parametrize("heads", [(8, 32), (6, 64)], ids=str)
def test_the_studys_heads(heads: tuple[int, int], maps: int) -> None:
    count, width = heads
    Case(maps, tokens=5, groups=count // maps, width=width).assert_equation()


@both
@pytest.mark.parametrize(("queries", "keys"), [(16, 64), (64, 16), (128, 32), (32, 128)])
def test_blocks_of_any_size(monkeypatch: pytest.MonkeyPatch, queries: int, keys: int, maps: int) -> None:
    _set_blocks(monkeypatch, queries, keys)
    Case(maps, tokens=77, images=1, groups=1).assert_equation()


@both
def test_one_token_attends_to_itself(maps: int) -> None:
    case = Case(maps, tokens=1)
    out, dq, dk, dv, *dlambda = case.run()
    share = 1.0 if case.lam is None else 1 - case.lam
    torch.testing.assert_close(out, share * case.qkv[:, :, 2])
    torch.testing.assert_close(dv, share * case.grad)
    assert max(dq.abs().max(), dk.abs().max()) < 1e-5
    for each in dlambda:
        torch.testing.assert_close(each, -(case.grad * case.qkv[:, :, 2]).sum())


@both
@pytest.mark.parametrize("which", ["backwards", "expanded", "sliced", "grad"])
def test_any_strides(which: str, maps: int) -> None:
    case = Case(maps)
    if which == "grad":
        case.grad = case.grad.mT.contiguous().mT
        assert not case.grad.is_contiguous()
    else:
        if which == "backwards":
            case.qkv = case.qkv.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
        elif which == "expanded":  # the same image twice, in the same memory
            case.qkv = case.qkv[:1].expand(2, -1, -1, -1)
        else:
            case.qkv = torch.cat([case.qkv, case.qkv.flip(1)], -1)[:, ::2, :, : case.qkv.shape[-1]]
            case.grad = case.grad[:, ::2]
        assert not case.qkv.is_contiguous()
    case.assert_equation()


@both
def test_a_gradient_that_is_one_number(maps: int) -> None:
    case = Case(maps, images=1, groups=1)
    case.grad = torch.ones(()).expand(case.grad.shape)
    case.assert_equation()


@pytest.mark.parametrize("lam", [1.0, 1.7, -0.2])
def test_any_lambda(lam: float) -> None:
    Case(2, images=1, groups=1, lam=lam).assert_equation()


def test_with_a_lambda_of_zero_second_maps_do_not_count_but_for_its_gradient() -> None:
    case = Case(2, images=1, lam=0.0)
    out, dq, dk, dv, dlambda = case.run()
    for found, right in zip((out, dv, dlambda), (case.expected()[i] for i in (0, 3, 4)), strict=True):
        torch.testing.assert_close(found.double(), right, rtol=1e-4, atol=1e-4)
    for each in (dq, dk):
        first, second = each.unflatten(-1, (2, 2, 16)).unbind(3)
        assert first.any() and not second.any()
    assert dlambda != 0


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_lambda_may_have_any_shape_of_one_number(shape: tuple[int, ...]) -> None:
    case = Case(2, tokens=17, images=1)
    scalar = case.run()
    case.lam = case.lam.reshape(shape)
    found = case.run()
    assert found[4].shape == shape
    assert all(torch.equal(x.flatten(), y.flatten()) for x, y in zip(found, scalar, strict=True))


def test_lambda_is_not_rounded_with_the_inputs() -> None:
    """bf16 knows 0.5 and 0.50390625 and nothing between."""
    case, found, exact = Case(2, torch.bfloat16, images=1), [], []
    for lam in (0.5, 0.5019):
        case.lam = torch.tensor(lam)
        found.append(case.run()[0].double())
        exact.append(case.expected()[0])
    moved = ((found[1] - found[0]) * (exact[1] - exact[0])).sum() / (exact[1] - exact[0]).square().sum()
    assert moved == pytest.approx(1, abs=0.3)


def test_lambda_alone_or_the_matrix_alone_may_need_a_gradient() -> None:
    case = Case(2, tokens=17, images=1)
    _, dq, dk, dv, dlambda = case.run()
    lam = case.lam.clone().requires_grad_()
    assert torch.equal(torch.autograd.grad(attend(case.qkv, case.heads, lam), lam, case.grad)[0], dlambda)
    qkv = case.qkv.clone().requires_grad_()
    assert torch.equal(torch.autograd.grad(attend(qkv, case.heads, case.lam), qkv, case.grad)[0], torch.stack([dq, dk, dv], 2))


def test_equal_maps_cancel() -> None:
    case = Case(2, images=1, lam=1.0)
    halves = case.qkv.unflatten(-1, (2, 2, 16))
    halves[:, :, :2, :, 1] = halves[:, :, :2, :, 0]
    out, dq, dk, dv, _ = case.run()
    assert out.abs().max() < 1e-6 and dv.abs().max() < 1e-6
    for each in (dq, dk):
        first, second = each.unflatten(-1, (2, 2, 16)).unbind(3)
        assert first.abs().max() > 1e-2
        torch.testing.assert_close(first, -second, atol=1e-5, rtol=1e-5)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("factor", [-300.0, 300.0])
def test_scores_of_any_size(dtype: torch.dtype, factor: float, maps: int) -> None:
    case = Case(maps, dtype, images=1, tokens=33, groups=1)
    # All scores of a head far from zero on one side: what stands in for keys that are not there must not count.
    one_sided = case.qkv.clone()
    one_sided[:, :, 0], one_sided[:, :, 1] = factor, one_sided[:, :, 1].abs() + 1
    large = case.qkv.clone()
    large[:, :, 0] *= factor
    for case.qkv in (one_sided, large):
        found, expected = case.run(), case.expected()
        assert all(x.isfinite().all() for x in found)
        assert (found[0].double() - expected[0]).norm() < 2e-2 * expected[0].norm()
        assert (found[3].double() - expected[3]).norm() < 2e-2 * expected[3].norm()


def test_lambdas_gradient_is_the_outputs_difference() -> None:
    case = Case(2)
    higher, lower = (attend(case.qkv, case.heads, case.lam + step) for step in (0.5, -0.5))
    difference = ((higher - lower).double() * case.grad).sum()  # exact: the output is linear in lambda
    torch.testing.assert_close(case.run()[4].double(), difference, rtol=1e-4, atol=1e-4)


@both
def test_heads_and_images_do_not_look_at_each_other(maps: int) -> None:
    case = Case(maps, tokens=17)
    whole, (image, group) = case.run(), (1, slice(16 * maps, 32 * maps))
    case.qkv, case.grad = case.qkv[image:, :, :, group], case.grad[image:, :, group]
    case.heads = maps
    for name, alone, part in zip(NAMES[:4], case.run(), whole, strict=False):
        assert torch.equal(alone, part[image:, :, group]), name


@both
def test_twice_the_same_bits(maps: int) -> None:
    case = Case(maps, torch.bfloat16, tokens=65, images=1, groups=1)
    assert all(torch.equal(first, second) for first, second in zip(case.run(), case.run(), strict=True))


@both
@pytest.mark.parametrize("tokens", [1, 37])
def test_every_element_is_written(monkeypatch: pytest.MonkeyPatch, tokens: int, maps: int) -> None:
    case, real, written = Case(maps, tokens=tokens, images=1), torch.Tensor.new_empty, []

    def poisoned(x: Tensor) -> Tensor:
        if x.numel():  # the interpreter makes empty ones
            written.append(x.fill_(float("nan")))
        return x

    class Poisoned:
        """torch, but for one function: Triton's interpreter allocates, too."""

        empty_like = staticmethod(lambda x: poisoned(torch.empty_like(x)))

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    monkeypatch.setattr(attention_triton, "torch", Poisoned())
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *shape, **how: poisoned(real(self, *shape, **how)))
    assert all(x.isfinite().all() for x in case.run())
    # Output, A2 V, logarithms; the gradient and delta: what the backward pass reads is written whole, too.
    assert len(written) == (5 if maps == 2 else 4) and all(x.isfinite().all() for x in written)


@both
def test_without_gradients_the_output_is_the_same_and_nothing_is_kept(maps: int) -> None:
    case = Case(maps)
    expected = case.run()[0]
    with torch.no_grad():
        out = attend(case.qkv.clone().requires_grad_(), case.heads, case.lam)
    assert not out.requires_grad and torch.equal(out, expected)
    for for_backward, kept in ((False, (0, 0)), (True, (expected.numel() if maps == 2 else 0, 2 * 2 * maps * 37))):
        results = attention_triton._attend(case.qkv, case.lam, None, case.heads, for_backward)
        assert [x.numel() for x in results] == [expected.numel(), *kept]


@both
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_operator_is_as_torch_compile_expects(maps: int, with_bias: bool) -> None:
    case = Case(maps, images=1, tokens=17, groups=1)
    qkv, lam = case.qkv.requires_grad_(), None if case.lam is None else case.lam.requires_grad_()
    bias = torch.zeros(3 * qkv.shape[3], requires_grad=True) if with_bias else None
    calls = [
        (torch.ops.diffvit.attend.default, (qkv, lam, bias, case.heads, True), ["test_autograd_registration"]),
        (torch.ops.diffvit.attend.default, (qkv, lam, bias, case.heads, False), []),
    ]
    with torch.no_grad():
        kept = torch.ops.diffvit.attend(qkv, lam, bias, case.heads, True)
    inputs = (case.grad, qkv.detach(), None if lam is None else lam.detach(), case.heads, with_bias, *kept)
    calls.append((torch.ops.diffvit.attend_backward.default, inputs, []))
    for operator, given, more in calls:
        utils = ("test_schema", "test_faketensor", *more)
        assert set(torch.library.opcheck(operator, given, test_utils=utils).values()) == {"SUCCESS"}


def _assert_bias_is_the_sum(case: Case, shape: tuple[int, ...]) -> None:
    """The bias's gradient is the sum of qkv's, and all others are as without it."""
    qkv, lam = case.qkv.clone().requires_grad_(), None if case.lam is None else case.lam.clone().requires_grad_()
    bias = torch.zeros(shape, requires_grad=True)
    dqkv, dbias, *dlambda = torch.autograd.grad(attend(qkv, case.heads, lam, bias), [qkv, bias, *([] if lam is None else [lam])], case.grad)
    plain = case.run()
    assert all(torch.equal(a, b) for a, b in zip([*dqkv.unbind(2), *dlambda], plain[1:], strict=True))
    expected = torch.stack(case.expected()[1:4]).sum((1, 2))
    assert dbias.shape == shape and dbias.dtype == torch.float32
    dq, dk, dv = dbias.view(3, -1).double()
    assert not dk.any() and expected[1].norm() < 1e-12 * expected.norm()
    for found, right in ((dq, expected[0]), (dv, expected[2])):
        # The sum cancels, of rounding errors it does not.
        scale = max(right.norm(), plain[1].double().norm(), 0.3 * expected.norm())
        assert (found - right).norm() < 3 * TOLERANCE[case.qkv.dtype] * scale


@both
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_bias_gets_the_sum_over_all_tokens(dtype: torch.dtype, maps: int) -> None:
    case = Case(maps, dtype, groups=1)
    _assert_bias_is_the_sum(case, (3 * case.qkv.shape[3],))


@both
@pytest.mark.parametrize(("images", "tokens", "width"), [(1, 65, 32), (3, 1, 64), (1, 32, 16)])
def test_a_bias_gets_the_sum_however_many_tokens(images: int, tokens: int, width: int, maps: int) -> None:
    case = Case(maps, images=images, tokens=tokens, groups=1, width=width)
    _assert_bias_is_the_sum(case, (3 * case.qkv.shape[3],))


@both
@pytest.mark.parametrize(("queries", "keys"), [(32, 64), (64, 32), (128, 128)])
def test_a_bias_gets_the_sum_whatever_the_blocks(monkeypatch: pytest.MonkeyPatch, queries: int, keys: int, maps: int) -> None:
    _set_blocks(monkeypatch, queries, keys)
    case = Case(maps, images=1, tokens=77, groups=1)
    _assert_bias_is_the_sum(case, (3, case.qkv.shape[3]))


@both
def test_compiled_as_a_graph_it_is_the_same(maps: int) -> None:
    case = Case(maps, images=1, tokens=17, groups=1)
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    for x, y in zip(case._gradients(compiled, case.qkv, case.lam, case.grad), case.run(), strict=True):
        torch.testing.assert_close(x, y)
    bias = torch.zeros(3, case.qkv.shape[3], requires_grad=True)
    found, expected = (torch.autograd.grad(form(case.qkv, case.heads, case.lam, bias), bias, case.grad)[0] for form in (compiled, attend))
    torch.testing.assert_close(found, expected)
    assert found.any()


def test_it_is_a_form() -> None:
    case = Case(2)
    q, k = (case.qkv[:, :, i].unflatten(-1, (2, 2, 16)) for i in (0, 1))
    v = case.qkv[:, :, 2].unflatten(-1, (2, 32)).transpose(1, 2)
    found = by_form(q, k, v, case.lam, form="triton")
    torch.testing.assert_close(found, by_form(q, k, v, case.lam, form="maps"))
    whole = differential_attention(case.qkv, case.heads, case.lam, "triton")
    assert torch.equal(found.transpose(1, 2).flatten(2), whole) and torch.equal(whole, case.run()[0])


@pytest.mark.parametrize("layer", [Attention, DifferentialAttention])
def test_a_layer_computes_the_same_in_the_kernels(layer: type) -> None:
    torch.manual_seed(0)
    module, x = layer(64, 4, 0, 0.0), torch.randn(2, 17, 64, requires_grad=True)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    found = []
    for form in ("triton", None):
        set_form(module, form)
        out = module(x)
        found.append([out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * max(1.0, b.abs().max().item()))


def test_what_does_not_fit_is_refused() -> None:
    classic, pairs = Case(1, images=1, tokens=3), Case(2, images=1, tokens=3)
    qkv, lam = pairs.qkv, pairs.lam
    for wrong in (
        (qkv[:, :, 0], 4, lam),
        (qkv[:, :, :2], 4, lam),
        (qkv[None], 4, None),
        (qkv, 5, None),
        (qkv, 0, None),
        (qkv, -4, None),
        (qkv[..., :48], 3, lam),  # a head without its pair
        (qkv, 4, torch.ones(2)),
        (qkv, 4, torch.ones(0)),
        (qkv, 4, lam.to("meta")),
        (qkv[:0], 4, lam),
        (qkv[:, :0], 4, None),
        (qkv.double(), 4, lam),
        (classic.qkv.double(), 2, None),
        (qkv[..., :32], 4, lam),  # heads of 8
        (qkv[..., :48], 2, None),  # and of 24
        (qkv, 4, lam, torch.zeros(64)),
        (qkv, 4, None, torch.zeros(2, 64)),
    ):
        with pytest.raises(ValueError, match=r"must be|nothing to attend|no Triton kernels"):
            attend(*wrong)
    assert attend(qkv, 4, lam).shape == attend(qkv, 4).shape == (1, 3, 64)


def test_supported_where_triton_interprets() -> None:
    cpu = torch.device("cpu")
    for maps in (1, 2):
        assert all(supported(cpu, dtype, width, maps) for dtype in TOLERANCE for width in (16, 32, 64, 128))
        assert not supported(cpu, torch.float64, 32, maps) and not supported(cpu, torch.float32, 24, maps)
