"""Sizes, costs, and equal starts of the architectures."""

from __future__ import annotations

import pytest
import torch

from diffvit.loop.optimizer import make_optimizer
from diffvit.protocol import ARMS, MODEL_TITLES, MODELS, PROTOCOLS
from diffvit.vit import VisionTransformer, build_model, set_form
from diffvit.vit_classic import vit_classic_bach, vit_classic_cifar100
from diffvit.vit_classic_wide_heads import WideHeadsAttention
from diffvit.vit_differential import DifferentialAttention, vit_differential_bach, vit_differential_cifar100

# data set, size, classic, differential, forward GFLOP of an image: counted by hand from the protocol. Of the last layer only the class token
# is computed after keys and values, which spares 1.7 and 2.0 GFLOP on CIFAR-100, 4.6 and 5.4 on BACH.
COUNTS = [
    ("CIFAR-100", "10B", 9_753_956, 9_756_260, 20.9, 24.3),
    ("CIFAR-100", "25B", 24_759_396, 24_765_348, 56.3, 65.7),
    ("CIFAR-100", "50B", 50_031_716, 50_043_812, 115.9, 135.5),
    ("BACH", "10B", 9_563_908, 9_565_828, 22.2, 25.4),
    ("BACH", "25B", 25_534_084, 25_539_460, 69.3, 79.8),
    ("BACH", "50B", 50_376_580, 50_387_332, 142.8, 164.6),
]


@pytest.mark.parametrize(("dataset", "size", "classic", "differential", "classic_gflop", "differential_gflop"), COUNTS)
def test_parameter_counts_and_flops(dataset, size, classic, differential, classic_gflop, differential_gflop) -> None:
    models = {name: build_model(name, size, PROTOCOLS[dataset], "meta") for name in MODELS}
    assert models["vit_classic"].count_parameters() == classic
    assert models["vit_differential"].count_parameters() == differential
    assert models["vit_classic"].estimate_flops() / 1e9 == pytest.approx(classic_gflop, abs=0.11)
    assert models["vit_differential"].estimate_flops() / 1e9 == pytest.approx(differential_gflop, abs=0.11)


@pytest.mark.parametrize("dataset", PROTOCOLS)
def test_all_architectures_agree_within_one_percent(dataset: str) -> None:
    for size in PROTOCOLS[dataset].sizes:
        counts = [build_model(name, size, PROTOCOLS[dataset], "meta").count_parameters() for name in MODELS]
        assert max(counts) <= 1.01 * min(counts)


@pytest.mark.parametrize("size", PROTOCOLS["digits"].sizes)
def test_flops_are_those_that_torch_counts(size: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    def counted(model: VisionTransformer) -> int:
        with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            model(torch.randn(1, 1, 8, 8))
        return counter.get_total_flops()

    for name in MODELS:
        model = build_model(name, size, PROTOCOLS["digits"]).eval()
        if name == "vit_differential":
            set_form(model, "maps")  # multiplies once with V, and so has the classic layer's arithmetic
            assert counted(model) == build_model("vit_classic", size, PROTOCOLS["digits"], "meta").estimate_flops()
            set_form(model, "two_calls")
        assert counted(model) == model.estimate_flops()


def test_named_constructors_are_the_protocols_models() -> None:
    with torch.device("meta"):
        for build, count in (
            (vit_classic_cifar100, 9_753_956),
            (vit_classic_bach, 9_563_908),
            (vit_differential_cifar100, 9_756_260),
            (vit_differential_bach, 9_565_828),
        ):
            assert build("small").count_parameters() == count


def _initial_state(name: str) -> dict[str, torch.Tensor]:
    model = build_model(name, "0.2M", PROTOCOLS["digits"])
    model.initialise(seed=7)
    return model.state_dict()


def test_the_arms_start_equal_where_they_share_a_parameter() -> None:
    classic, differential = (_initial_state(name) for name in ARMS)
    assert set(classic) < set(differential)
    assert all(torch.equal(classic[name], differential[name]) for name in classic)
    assert {name.split(".")[-1] for name in set(differential) - set(classic)} == {
        "lambda_q1",
        "lambda_k1",
        "lambda_q2",
        "lambda_k2",
        "weight",
    }


def test_the_controls_start_as_the_classic_model() -> None:
    classic, wide, normed = (_initial_state(name) for name in ("vit_classic", "vit_classic_wide_heads", "vit_classic_sub_norm"))
    assert classic.keys() == wide.keys()
    assert set(normed) - set(classic) == {f"blocks.{i}.attn.sub_norm.weight" for i in range(4)}
    assert all(torch.equal(classic[name], other[name]) for name in classic for other in (wide, normed))


def test_v2_starts_equal_where_it_shares_a_shape_and_in_first_queries_keys_and_values() -> None:
    classic, v2 = _initial_state("vit_classic"), _initial_state("vit_differential_v2")
    assert set(v2) - set(classic) == {f"blocks.{i}.attn.lambda_proj.weight" for i in range(4)}
    equal = {name for name in classic if classic[name].shape == v2[name].shape}
    assert all(torch.equal(classic[name], v2[name]) for name in equal)
    others = {name.split(".", 2)[2] for name in set(classic) - equal}
    assert others == {"attn.qkv.weight", "attn.qkv.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight"}
    for block in range(4):
        name = f"blocks.{block}.attn.qkv.weight"
        assert torch.equal(v2[name][:192], classic[name])
        # The second queries are a Xavier matrix of 64 x 64 of their own.
        assert v2[name][192:].abs().max() == pytest.approx((6 / 128) ** 0.5, rel=1e-2)
        assert not torch.equal(v2[name][192:], v2[name][:64])


@pytest.mark.parametrize("name", MODELS)
def test_gradients_reach_every_parameter(name: str) -> None:
    model = build_model(name, "0.2M", PROTOCOLS["digits"])
    model.initialise(seed=1)
    torch.manual_seed(0)
    model(torch.randn(4, 1, 8, 8)).square().sum().backward()
    untouched = [path for path, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.abs().sum() > 0]
    assert untouched == []


def test_every_architecture_has_a_title() -> None:
    assert list(MODEL_TITLES) == list(MODELS)
    assert len(set(MODEL_TITLES.values())) == len(MODELS)


def test_initial_values() -> None:
    model = build_model("vit_differential", "50B", PROTOCOLS["CIFAR-100"])
    model.initialise(seed=0)
    state = model.state_dict()
    assert all((value == 0).all() for name, value in state.items() if name.endswith("bias") or name == "cls_token")
    assert state["pos_embed"].std() == pytest.approx(0.02, rel=0.02)
    v2 = build_model("vit_differential_v2", "10B", PROTOCOLS["CIFAR-100"])
    v2.initialise(seed=0)
    assert v2.blocks[3].attn.lambda_proj.weight.std().item() == pytest.approx((3 * 256) ** -0.5, rel=0.03)
    lambdas = torch.cat([value for name, value in state.items() if "lambda_" in name])
    assert lambdas.std() == pytest.approx(0.1, rel=0.05)
    # Query, key and value are three Xavier matrices of 256 x 256, not one of 768 x 256.
    assert state["blocks.5.attn.qkv.weight"].abs().max() == pytest.approx((6 / 512) ** 0.5, rel=1e-3)
    assert state["blocks.5.mlp.fc1.weight"].abs().max() == pytest.approx((6 / (256 + 1024)) ** 0.5, rel=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_added_to_the_stream_starts_at_one_over_the_root_of_all_branches(name: str) -> None:
    scaled, old = (build_model(name, "0.4M", PROTOCOLS["digits"].with_overrides({"residual_scale": value})) for value in (True, False))
    for model in (scaled, old):
        model.initialise(seed=3)
    for (parameter, value), other in zip(scaled.named_parameters(), old.parameters(), strict=True):
        factor = 1 / 4 if parameter.endswith(("attn.proj.weight", "mlp.fc2.weight")) else 1  # 16 branches
        assert torch.equal(value, factor * other), parameter
    assert old.blocks[7].mlp.fc2.weight.abs().max() > 0.9 * (6 / sum(old.blocks[7].mlp.fc2.weight.shape)) ** 0.5


def test_another_seed_gives_other_weights() -> None:
    first, second = (build_model("vit_classic", "0.1M", PROTOCOLS["digits"]) for _ in range(2))
    first.initialise(0)
    second.initialise(1)
    assert not torch.equal(first.head.weight, second.head.weight)


def test_weight_decay_falls_on_matrices_only() -> None:
    model = build_model("vit_differential", "0.1M", PROTOCOLS["digits"])
    decayed, others = make_optimizer(model, PROTOCOLS["digits"]).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert decayed["weight_decay"] == 0.01
    assert others["weight_decay"] == 0.0
    matrices = {"patch_embed.weight", "head.weight"}
    for block in range(2):
        matrices |= {f"blocks.{block}.{part}.weight" for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    assert {names[id(parameter)] for parameter in decayed["params"]} == matrices
    assert len(decayed["params"]) + len(others["params"]) == len(names)


def test_shapes_that_do_not_fit_are_refused() -> None:
    for attention in (DifferentialAttention, WideHeadsAttention):
        with pytest.raises(ValueError, match="odd"):
            attention(63, 3, 0, 0.0)
    import dataclasses

    with pytest.raises(ValueError, match="patch size"):
        build_model("vit_classic", "0.1M", dataclasses.replace(PROTOCOLS["digits"], patch_size=3))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_sparing_the_last_block_most_of_its_work_changes_nothing(name: str, recompute: bool) -> None:
    model = build_model(name, "0.2M", PROTOCOLS["digits"]).double()
    model.initialise(seed=1)
    model.recompute = recompute
    images, labels = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64), torch.arange(5)

    def whole(images: torch.Tensor) -> torch.Tensor:
        x_BND = model.embed(images)
        for block in model.blocks:
            x_BND = block(x_BND)
        assert x_BND.shape[1] == 17
        return model.classify(x_BND)

    results = []
    for forward in (model, whole):
        logits = forward(images)
        gradients = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, labels), list(model.parameters()))
        results.append([logits.detach(), *gradients])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())


@pytest.mark.parametrize("name", MODELS)
def test_a_block_of_few_tokens_gives_the_first_of_all(name: str) -> None:
    block = build_model(name, "0.2M", PROTOCOLS["digits"]).double().blocks[1]
    x = torch.randn(3, 17, 64, dtype=torch.float64)
    whole = block(x)
    for tokens in (1, 2, 5, 17):
        torch.testing.assert_close(block(x, tokens), whole[:, :tokens], rtol=1e-6, atol=1e-7)
