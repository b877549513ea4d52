"""What a study will need, known before it starts: memory, time and money; and what a rehearsal finds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from diffvit.memory import activation_bytes, affordable_micro_batch, micro_batch_within, training_memory
from diffvit.protocol import MODELS, PROTOCOLS
from diffvit.vit import VisionTransformer, build_model

ROOT = Path(__file__).resolve().parents[1]
SHORT_DEPTHS = {"two": 2}

# ---------------------------------------------------------------------------------------------------------------- memory


def _saved_bytes(model: VisionTransformer, forward) -> int:
    """Bytes of all storages that autograd saves in `forward`, parameters left out."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that its address is not given away again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(size for size, _ in saved.values())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("dataset", ["digits", "CIFAR-100"])
@pytest.mark.parametrize("model_name", MODELS)
def test_activations_are_what_autograd_saves(model_name: str, dataset: str, dropout: float, recompute: bool) -> None:
    protocol = dataclasses.replace(PROTOCOLS[dataset], dropout=dropout, depths=SHORT_DEPTHS)
    model = build_model(model_name, "two", protocol)
    model.initialise(0)
    model.recompute = recompute
    images, labels = torch.randn(1, protocol.channels, protocol.image_size, protocol.image_size), torch.zeros(1, dtype=torch.long)
    truth = _saved_bytes(model, lambda: F.cross_entropy(model(images), labels, reduction="sum"))
    if recompute:  # while a block's gradient is computed, it keeps what it would have kept
        x_BND = torch.randn(1, model.tokens, protocol.d_model, requires_grad=True)
        truth += _saved_bytes(model, lambda: model.blocks[0](x_BND))
    ratio = activation_bytes(model, "fp32", "cpu", recompute) / truth
    assert 1.0 <= ratio <= 1.6


def test_memory_follows_size_precision_and_recomputation() -> None:
    protocol = PROTOCOLS["CIFAR-100"]
    small, large = (build_model("vit_differential", size, protocol, "meta") for size in ("10B", "50B"))
    assert activation_bytes(small, "fp32", "cuda") < activation_bytes(large, "fp32", "cuda")
    assert activation_bytes(large, "bf16", "cuda") < activation_bytes(large, "fp32", "cuda")
    assert activation_bytes(large, "bf16", "cuda", recompute=True) < activation_bytes(large, "bf16", "cuda") / 8
    assert training_memory(large, 0, "fp32", "cuda") == 16 * large.count_parameters()
    fits = [micro_batch_within(large, 512, memory * 2**30, "bf16", "cuda") for memory in (8, 24, 80, 10_000)]
    assert fits == sorted(fits) and fits[-1] == 512 and 1 <= fits[0] < fits[2]
    for memory, images in zip((24, 80), fits[1:3], strict=True):
        assert training_memory(large, images, "bf16", "cuda") < memory * 2**30 / 2 + 16 * large.count_parameters()
    place = torch.device("cpu")
    without, with_it = (affordable_micro_batch(large, protocol, place, "fp32", 0.5, recompute) for recompute in (False, True))
    assert without < with_it
