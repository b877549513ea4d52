"""Dropout as torch has it, but for where its random numbers come from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffvit.kernels.dropout import Dropout
from diffvit.protocol import PROTOCOLS
from diffvit.vit import build_model


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_many_values_are_dropped_as_should_be(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    out = Dropout(p)(torch.ones(400_001, dtype=dtype))
    dropped = (out == 0).double().mean().item()
    assert dropped == pytest.approx(p, abs=5 * (p * (1 - p) / 400_001) ** 0.5)
    assert set(out.tolist()) == {0.0, out.max().item()} and out.dtype == dtype
    assert out.max().item() == pytest.approx(1 / (1 - p), rel=1e-4 if dtype == torch.float32 else 4e-3)


def test_the_expected_value_is_exact_for_the_rounded_probability() -> None:
    out = Dropout(0.1)(torch.ones(1000, dtype=torch.float64))
    assert out.max().item() * (1 - 6554 / 65536) == pytest.approx(1, abs=1e-15)


def test_gradients_pass_where_values_did() -> None:
    x = torch.randn(3, 5, 7, requires_grad=True)
    out = Dropout(0.5)(x)
    out.sum().backward()
    assert isinstance(x.grad, Tensor)
    assert torch.equal(x.grad * x.detach(), out.detach()) and 0 < (out == 0).sum() < out.numel()


def test_masks_follow_the_generator_and_neighbours_are_independent() -> None:
    x = torch.ones(1 << 18)

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return Dropout(0.5)(x) > 0

    first = draw(1)
    assert torch.equal(first, draw(1)) and not torch.equal(first, draw(2))
    for distance in (1, 2, 3, 4, 8):  # four values share a word
        same = (first[distance:] == first[:-distance]).double().mean().item()
        assert same == pytest.approx(0.5, abs=5 * 0.5 / len(x) ** 0.5)


@pytest.mark.parametrize("p", [0.0, 1e-9, 1.0 - 1e-9, 1.0])
def test_the_ends_of_the_range(p: float) -> None:
    x = torch.randn(100)
    assert torch.equal(Dropout(p)(x), x if p < 0.5 else torch.zeros(100))


def test_evaluation_drops_nothing() -> None:
    x = torch.randn(100)
    assert torch.equal(Dropout(0.5).eval()(x), x)


@pytest.mark.parametrize(
    "model", ["vit_classic", "vit_classic_wide_heads", "vit_classic_sub_norm", "vit_differential", "vit_differential_v2"]
)
def test_every_architecture_drops_where_it_should(model: str) -> None:
    built = build_model(model, "0.1M", PROTOCOLS["digits"].with_overrides({"dropout": 0.5}))
    found = [module for module in built.modules() if isinstance(module, torch.nn.Dropout)]
    assert len(found) == 1 + 3 * len(built.blocks) and all(type(module) is Dropout for module in found)
