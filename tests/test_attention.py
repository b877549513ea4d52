"""All attentions against formulas written down again in fp64, against their own exact maps, and against timm's classes with copied weights."""

from __future__ import annotations

import math

import pytest
import torch
from timm.layers.diff_attention import DiffAttention

from bench.peers import give_weights, timm_model
from diffvit.protocol import MODELS, PROTOCOLS
from diffvit.vit import attention_class, build_model
from diffvit.vit_classic import Attention
from diffvit.vit_classic_sub_norm import SubNormAttention
from diffvit.vit_classic_wide_heads import WideHeadsAttention
from diffvit.vit_differential import DifferentialAttention, lambda_init
from diffvit.vit_differential_v2 import DifferentialAttentionV2


def _random_layer(cls, d_model: int, heads: int, layer: int, seed: int = 0):
    """A layer whose every parameter, biases and norm weights too, is far from its initial value."""
    torch.manual_seed(seed)
    attention = cls(d_model, heads, layer, 0.0)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.3 / d_model**0.5))
    return attention


def _differential_by_the_paper(attention: DifferentialAttention, x: torch.Tensor, layer: int) -> torch.Tensor:
    """Equations 1 to 3 of arXiv 2410.05258, head by head and with explicit maps, in fp64."""
    state = {name: value.double() for name, value in attention.state_dict().items()}
    x = x.double()
    tokens, d_model = x.shape[1:]
    d = attention.head_dim
    q, k, v = (x @ state["qkv.weight"].T + state["qkv.bias"]).split(d_model, dim=-1)
    init = 0.8 - 0.6 * math.exp(-0.3 * layer)
    lam = math.exp(float(state["lambda_q1"] @ state["lambda_k1"])) - math.exp(float(state["lambda_q2"] @ state["lambda_k2"])) + init
    heads = []
    for i in range(d_model // (2 * d)):
        first, second = 2 * i * d, (2 * i + 1) * d
        map1 = torch.softmax(q[..., first : first + d] @ k[..., first : first + d].mT / math.sqrt(d), dim=-1)
        map2 = torch.softmax(q[..., second : second + d] @ k[..., second : second + d].mT / math.sqrt(d), dim=-1)
        head = (map1 - lam * map2) @ v[..., 2 * i * d : 2 * (i + 1) * d]
        head = head / torch.sqrt((head**2).mean(-1, keepdim=True) + 1e-5) * state["sub_norm.weight"]
        heads.append((1 - init) * head)
    out = torch.cat(heads, dim=-1)
    assert out.shape == (len(x), tokens, d_model)
    return out @ state["proj.weight"].T + state["proj.bias"]


@pytest.mark.parametrize(("d_model", "heads", "tokens"), [(64, 4, 17), (256, 8, 50), (384, 6, 33)])
@pytest.mark.parametrize("layer", [0, 3])
def test_differential_attention_is_the_papers_formula(d_model: int, heads: int, tokens: int, layer: int) -> None:
    attention = _random_layer(DifferentialAttention, d_model, heads, layer)
    x = torch.randn(3, tokens, d_model)
    torch.testing.assert_close(attention(x).double(), _differential_by_the_paper(attention, x, layer), rtol=1e-5, atol=1e-5)


def test_gradients_of_differential_attention_are_the_formulas() -> None:
    attention = _random_layer(DifferentialAttention, 64, 4, 2).double()
    x = torch.randn(2, 9, 64, dtype=torch.float64)
    attention(x).square().sum().backward()
    ours = {name: parameter.grad.clone() for name, parameter in attention.named_parameters()}

    # The formula again, differentiable in the same parameters.
    attention.zero_grad()
    q, k, v = attention.qkv(x).chunk(3, dim=-1)
    lam = torch.exp(attention.lambda_q1 @ attention.lambda_k1) - torch.exp(attention.lambda_q2 @ attention.lambda_k2) + lambda_init(2)
    pieces = []
    for i in range(2):
        a1, a2 = (torch.softmax(q[..., s * 16 : (s + 1) * 16] @ k[..., s * 16 : (s + 1) * 16].mT / 4, dim=-1) for s in (2 * i, 2 * i + 1))
        pieces.append(attention.sub_norm((a1 - lam * a2) @ v[..., 32 * i : 32 * (i + 1)]))
    attention.proj(torch.cat(pieces, dim=-1)).square().sum().backward()
    for name, parameter in attention.named_parameters():
        # lambda itself is fp32 in ours
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("layer", [0, 5])
def test_differential_attention_equals_timms(layer: int) -> None:
    ours = _random_layer(DifferentialAttention, 256, 8, layer)
    timms = DiffAttention(256, num_heads=4, qkv_bias=True, depth=layer).eval()
    timms.load_state_dict(ours.state_dict())  # the names agree, so a missing or extra parameter would raise
    x = torch.randn(2, 65, 256)
    torch.testing.assert_close(ours(x), timms(x), rtol=1e-5, atol=1e-5)


def test_lambda_starts_as_the_paper_says() -> None:
    assert [round(lambda_init(layer), 3) for layer in range(4)] == [0.2, 0.356, 0.471, 0.556]


def test_lambda_matters() -> None:
    # A layer that ignored its second map would pass a test in which lambda is 0.
    attention = _random_layer(DifferentialAttention, 64, 4, 1)
    x = torch.randn(1, 9, 64)
    before = attention(x)
    with torch.no_grad():
        attention.lambda_q1.add_(1.0)
    assert (attention(x) - before).abs().max() > 1e-3


def test_classic_attention_is_softmax_attention() -> None:
    attention = _random_layer(Attention, 64, 4, 0).double()
    x = torch.randn(2, 11, 64, dtype=torch.float64)
    q, k, v = attention.qkv(x).chunk(3, dim=-1)
    heads = [torch.softmax(q[..., s : s + 16] @ k[..., s : s + 16].mT / 4, dim=-1) @ v[..., s : s + 16] for s in range(0, 64, 16)]
    torch.testing.assert_close(attention(x), attention.proj(torch.cat(heads, dim=-1)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("d_model", "heads"), [(64, 4), (384, 6)])
def test_wide_heads_are_classic_attention_with_half_the_heads(d_model: int, heads: int) -> None:
    wide = _random_layer(WideHeadsAttention, d_model, heads, 0)
    classic = Attention(d_model, heads // 2, 0, 0.0)
    classic.load_state_dict(wide.state_dict())
    x = torch.randn(2, 17, d_model)
    assert torch.equal(wide(x), classic(x))
    assert (wide(x) - _random_layer(Attention, d_model, heads, 0)(x)).abs().max() > 1e-3  # and not that with all of them


@pytest.mark.parametrize("layer", [0, 3])
def test_the_sub_norm_control_is_the_differential_layer_without_its_subtraction(layer: int) -> None:
    attention, x = _random_layer(SubNormAttention, 64, 4, layer).double(), torch.randn(2, 11, 64, dtype=torch.float64)
    q, k, v = attention.qkv(x).chunk(3, dim=-1)
    heads = []
    for part in (slice(0, 32), slice(32, 64)):
        head = torch.softmax(q[..., part] @ k[..., part].mT / math.sqrt(32), dim=-1) @ v[..., part]
        head = head / torch.sqrt((head**2).mean(-1, keepdim=True) + 1e-5) * attention.sub_norm.weight
        heads.append((1 - lambda_init(layer)) * head)
    torch.testing.assert_close(attention(x), attention.proj(torch.cat(heads, dim=-1)), rtol=1e-9, atol=1e-9)


def _v2_by_the_description(attention: DifferentialAttentionV2, x: torch.Tensor, heads: int) -> torch.Tensor:
    """The formula of vit_differential_v2, output by output and with explicit maps, in fp64."""
    state = {name: value.double() for name, value in attention.state_dict().items()}
    x = x.double()
    d_model = x.shape[-1]
    d = d_model // heads
    q1, k, v, q2 = (x @ state["qkv.weight"].T + state["qkv.bias"]).split(d_model, dim=-1)
    lam = 1 / (1 + torch.exp(-(x @ state["lambda_proj.weight"].T)))
    outputs = []
    for i in range(heads):
        part = slice(i * d, (i + 1) * d)
        a1, a2 = (torch.softmax(q[..., part] @ k[..., part].mT / math.sqrt(d), dim=-1) @ v[..., part] for q in (q1, q2))
        outputs.append(a1 - lam[..., i : i + 1] * a2)
    return torch.cat(outputs, dim=-1) @ state["proj.weight"].T + state["proj.bias"]


@pytest.mark.parametrize(("d_model", "heads", "tokens"), [(64, 4, 17), (256, 8, 50), (384, 6, 33)])
def test_v2_is_the_described_formula(d_model: int, heads: int, tokens: int) -> None:
    attention = _random_layer(DifferentialAttentionV2, d_model, heads, 0)
    x = torch.randn(3, tokens, d_model)
    torch.testing.assert_close(attention(x).double(), _v2_by_the_description(attention, x, heads), rtol=1e-5, atol=1e-5)


def _layer_of(model: str, dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, torch.Tensor]:
    """A layer of an architecture and an input for it."""
    attention = _random_layer(attention_class(model), 64, 4, 2).to(dtype)
    return attention, torch.randn(3, 17, 64, dtype=dtype)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_exact_maps_give_what_forward_gives(model: str, dtype: torch.dtype, tolerance: float) -> None:
    attention, x = _layer_of(model, dtype)
    maps = attention.maps(x)
    assert maps.dtype == dtype
    torch.testing.assert_close(attention.apply_maps(maps, x), attention(x), rtol=tolerance, atol=tolerance)
    assert (attention.apply_maps(maps.flip(-1), x) - attention(x)).abs().max() > 1e-2  # the output depends on the maps


@pytest.mark.parametrize(
    ("model", "heads", "maps"),
    [
        ("vit_classic", 4, 4),
        ("vit_classic_wide_heads", 2, 2),
        ("vit_classic_sub_norm", 2, 2),
        ("vit_differential", 4, 2),
        ("vit_differential_v2", 8, 4),
    ],
)
def test_logits_are_of_all_heads_and_maps_sum_up_to_one_less_lambda(model: str, heads: int, maps: int) -> None:
    attention, x = _layer_of(model)
    assert attention.logits(x).shape == (3, heads, 17, 17)
    assert attention.maps(x).shape == (3, maps, 17, 17)
    lambdas = attention.lambdas(x)
    sums = attention.maps(x).sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums) if lambdas is None else (1 - lambdas).expand_as(sums))
    # From the logits alone: softmax of neighbours, the second times lambda, are the maps.
    softmax = torch.softmax(attention.logits(x), dim=-1)
    if lambdas is not None:
        softmax = softmax[:, 0::2] - (lambdas if lambdas.ndim == 0 else lambdas.unsqueeze(-1)) * softmax[:, 1::2]
    torch.testing.assert_close(attention.maps(x), softmax)


@pytest.mark.parametrize("model", MODELS)
def test_maps_are_fp32_where_the_layer_is_bf16(model: str) -> None:
    attention, x = _layer_of(model, torch.bfloat16)
    assert attention.maps(x).dtype == torch.float32
    assert attention.apply_maps(attention.maps(x), x).dtype == torch.bfloat16


def test_classic_logits_are_the_scaled_products() -> None:
    attention, x = _layer_of("vit_classic", torch.float64)
    q, k, _ = attention.qkv(x).chunk(3, dim=-1)
    for head in range(4):
        part = slice(16 * head, 16 * (head + 1))
        torch.testing.assert_close(attention.logits(x)[:, head], q[..., part] @ k[..., part].mT / 4)


@pytest.mark.parametrize(("dataset", "size"), [("digits", "0.4M"), ("CIFAR-100", "10B")])
def test_classic_model_equals_timms(dataset: str, size: str) -> None:
    protocol = PROTOCOLS[dataset]
    ours = build_model("vit_classic", size, protocol).eval()
    ours.initialise(seed=3)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    timms = timm_model("vit_classic", size, protocol).eval()
    give_weights(ours, timms)
    images = torch.randn(2, protocol.channels, protocol.image_size, protocol.image_size)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), timms(images), rtol=1e-5, atol=1e-5)


def test_differential_model_with_timms_attention_in_every_block() -> None:
    protocol = PROTOCOLS["digits"]
    ours = build_model("vit_differential", "0.4M", protocol).eval()
    ours.initialise(seed=3)
    timms = timm_model("vit_classic", "0.4M", protocol).eval()
    for layer, block in enumerate(timms.blocks):
        block.attn = DiffAttention(protocol.d_model, num_heads=protocol.heads // 2, qkv_bias=True, depth=layer).eval()
    give_weights(ours, timms)
    images = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), timms(images), rtol=1e-5, atol=1e-5)
