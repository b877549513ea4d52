"""Every form of equation 1 against the equation in fp64: outputs, gradients, layouts, splits."""

from __future__ import annotations

import pytest
import torch
from forms import by_form
from torch import Tensor

from diffvit.kernels import forms as differential_forms
from diffvit.kernels.forms import FORMS, default_form

TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}
CPU_FORMS = [form for form in FORMS if form != "triton"]  # it has tests of its own
ON_A_CPU = [
    *((form, dtype) for form in CPU_FORMS for dtype in (torch.float32, torch.float64)),
    *((form, dtype) for form in ("maps", "two_calls", "padded") for dtype in (torch.bfloat16, torch.float16)),
]


def _inputs(dtype: torch.dtype, images: int = 3, tokens: int = 37, pairs: int = 2, width: int = 16) -> list[Tensor]:
    """q, k, v and lambda as the model gives them: views of one matrix, q and k large enough for sharp maps."""
    torch.manual_seed(tokens)
    qkv = torch.randn(images, tokens, 3, pairs * 2 * width, dtype=torch.float64).to(dtype)
    q, k = (2 * qkv[:, :, :2]).view(images, tokens, 2, pairs, 2, width).unbind(2)
    v = qkv[:, :, 2].view(images, tokens, pairs, 2 * width).transpose(1, 2)
    return [q, k, v, torch.tensor(0.7, dtype=torch.float64)]


def _output_and_gradients(form: str, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = by_form(*leaves, form=form)
    out.backward(grad.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def _by_the_equation(inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """The same in fp64, pair by pair, from the same rounded inputs."""
    q, k, v, lam = (x.detach().double().requires_grad_() for x in inputs)
    outs = []
    for pair in range(v.shape[1]):
        a1, a2 = (torch.softmax(q[:, :, pair, s] @ k[:, :, pair, s].mT / q.shape[-1] ** 0.5, dim=-1) for s in (0, 1))
        outs.append((a1 - lam * a2) @ v[:, pair])
    out = torch.stack(outs, dim=1)
    out.backward(grad.double())
    return [out.detach(), *(x.grad for x in (q, k, v, lam) if x.grad is not None)]


def _assert_equal(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    assert len(found) == len(expected) == 5
    for name, a, b in zip(("out", "dq", "dk", "dv", "dlambda"), found, expected, strict=True):
        assert a.shape == b.shape
        error = (a.double() - b).norm() / b.norm()
        assert error <= tolerance, f"{name}: {error:.2e}"


@pytest.mark.parametrize(("form", "dtype"), ON_A_CPU)
def test_a_form_is_the_equation(form: str, dtype: torch.dtype) -> None:
    inputs = _inputs(dtype)
    grad = torch.randn(3, 2, 37, 32).to(dtype)
    _assert_equal(_output_and_gradients(form, inputs, grad), _by_the_equation(inputs, grad), TOLERANCE[dtype])


@pytest.mark.parametrize("lam", [0.0, 1.0, 1.7, -0.2])
@pytest.mark.parametrize("form", CPU_FORMS)
def test_any_lambda(form: str, lam: float) -> None:
    inputs = [*_inputs(torch.float64)[:3], torch.tensor(lam, dtype=torch.float64)]
    grad = torch.randn(3, 2, 37, 32, dtype=torch.float64)
    _assert_equal(_output_and_gradients(form, inputs, grad), _by_the_equation(inputs, grad), 1e-12)


@pytest.mark.parametrize("scores", [1, 2 * 2 * 37 * 10, 2 * 2 * 37 * 37, 2 * 2 * 37 * 37 * 2, 10**6])
def test_blocks_of_any_size_are_the_equation(monkeypatch: pytest.MonkeyPatch, scores: int) -> None:
    # One query at a time, ten (the last block has seven), an image, two (the last one alone), all at once.
    monkeypatch.setattr(differential_forms, "_BLOCK_SCORES", scores)
    inputs, grad = _inputs(torch.float64), torch.randn(3, 2, 37, 32, dtype=torch.float64)
    _assert_equal(_output_and_gradients("blocks", inputs, grad), _by_the_equation(inputs, grad), 1e-12)


def test_blocks_write_every_element(monkeypatch: pytest.MonkeyPatch) -> None:
    real, poisoned = torch.Tensor.new_empty, []

    def new_empty(self: Tensor, *shape: int) -> Tensor:
        poisoned.append(shape)
        return real(self, *shape).fill_(float("nan"))

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(torch, "empty_like", lambda x: torch.full_like(x, float("nan")))
    monkeypatch.setattr(differential_forms, "_BLOCK_SCORES", 2 * 2 * 37 * 10)
    inputs, grad = _inputs(torch.float32), torch.randn(3, 2, 37, 32)
    assert all(x.isfinite().all() for x in _output_and_gradients("blocks", inputs, grad))
    assert poisoned


def test_blocks_where_only_some_inputs_need_a_gradient() -> None:
    inputs, grad = _inputs(torch.float64), torch.randn(3, 2, 37, 32, dtype=torch.float64)
    expected = _by_the_equation(inputs, grad)
    v = inputs[2].detach().requires_grad_()
    by_form(*inputs[:2], v, inputs[3], form="blocks").backward(grad)
    torch.testing.assert_close(v.grad, expected[3])
    with torch.no_grad():
        assert not by_form(*inputs, form="blocks").requires_grad


def test_scores_of_any_size_are_finite() -> None:
    inputs = _inputs(torch.float32)
    for form in CPU_FORMS:
        assert by_form(100 * inputs[0], *inputs[1:], form=form).isfinite().all()


@pytest.mark.parametrize("form", ["two_calls", "padded", "four_calls"])
def test_lambda_is_not_rounded_with_the_inputs(form: str) -> None:
    """bf16 knows 0.5 and 0.50390625 and nothing between."""
    inputs = [x.bfloat16() for x in _inputs(torch.float32)[:3]]
    found = [by_form(*inputs, torch.tensor(lam), form=form).double() for lam in (0.5, 0.5019)]
    exact = [by_form(*(x.double() for x in inputs), torch.tensor(lam).double(), form="maps") for lam in (0.5, 0.5019)]
    moved = (found[1] - found[0]).flatten() @ (exact[1] - exact[0]).flatten() / (exact[1] - exact[0]).square().sum()
    assert moved == pytest.approx(1, abs=0.3)


def test_the_default_fits_the_device() -> None:
    assert default_form("cuda", torch.bfloat16, 785) == "two_calls"
    assert default_form("cpu", torch.float32, 785) == "blocks"
    assert default_form("cpu", torch.float32, 17) == "maps"
    assert default_form("cpu", torch.bfloat16, 785) == "padded"  # the others use kernels that a CPU has not
