"""How much memory a training step takes, from a model's shapes, and how many images at once a device has room for.

Counted are weights, gradients and AdamW's moments, and what the blocks keep for their backward pass. The count of kept values is
checked against those that autograd saves (tests/test_plan.py).
"""

from __future__ import annotations

import math
import os
from typing import cast

import torch

from diffvit.differential_forms import CANDIDATES
from diffvit.protocol import Protocol
from diffvit.vit import AttentionLayer, Block, VisionTransformer

# Bytes of a parameter in fp32 with its gradient and AdamW's two moments; with bf16 comes a copy that the products use.
_PARAMETER_BYTES = 16

# Values that an attention layer keeps for each token and channel between its two projections, by its form: q, k, v, the output, and one
# for what fused kernels and norms keep a head and token; and what the difference and its norm add.
_ATTENTION_VALUES = {"sdpa": 5, "sdpa, one call": 10, "blocks": 7, "maps": 7, "triton": 8, "two_calls": 10, "four_calls": 12, "padded": 15}
_MOST_ATTENTION_VALUES = max(_ATTENTION_VALUES.values())


def activation_bytes(model: VisionTransformer, precision: str, device: str, recompute: bool = False) -> int:
    """Bytes that one image's forward pass keeps for the backward pass, an estimate from above. The model may be on "meta".

    Args:
        precision: "fp32" or "bf16".
        device: kind of device that it trains on, "cpu" or "cuda".
        recompute: only the blocks' inputs are kept, and one block's values at a time.
    """
    tokens, d_model = model.pos_embed.shape[1:]
    patches = model.patch_embed
    pixels = patches.in_channels * (tokens - 1) * patches.weight[0, 0].numel()
    narrow = 2 if precision == "bf16" else 4
    stream = 4 * tokens * d_model  # between blocks it is fp32 at any precision
    ends = (4 + (narrow if precision == "bf16" else 0)) * pixels + 2 * stream  # the prepared image, the embedding's mask, the last norm
    block = _block_bytes(model, precision, device)
    if recompute:
        return ends + len(model.blocks) * stream + block
    return ends + len(model.blocks) * block


def _block_bytes(model: VisionTransformer, precision: str, device: str) -> int:
    """Bytes that a block keeps of one image."""
    tokens, d_model = model.pos_embed.shape[1:]
    block = cast(Block, model.blocks[0])
    hidden = block.mlp.fc1.out_features
    narrow = 2 if precision == "bf16" else 4
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    form = cast(AttentionLayer, block.attn).form_on(device, dtype, tokens)
    attention = _ATTENTION_VALUES.get(form, _MOST_ATTENTION_VALUES)
    if device == "cuda" and form in CANDIDATES:  # which one it will be is found out by measurement
        attention = max(_ATTENTION_VALUES[each] for each in CANDIDATES)
    values = attention * d_model + 2 * d_model + 2 * hidden  # inputs of qkv and fc1; of GELU and fc2
    if form == "maps":  # both softmaxes and their difference; a classic layer's heads are twice the pairs
        values += 3 * cast(int, block.attn.pairs) * tokens
    if precision == "bf16":
        values += 2 * d_model  # what autocast converts
    masks = (2 * d_model + hidden) if model.dropout.p else 0
    return tokens * (4 * 2 * d_model + narrow * values + (1 if device == "cuda" else narrow) * masks)  # the norms' inputs are fp32


def training_memory(model: VisionTransformer, images: int, precision: str, device: str, recompute: bool = False) -> int:
    """Bytes of a training step with so many images at once: parameters with all that belongs to them, and activations."""
    per_parameter = _PARAMETER_BYTES + (2 if precision == "bf16" else 0)
    parameters = sum(p.numel() for p in model.parameters())
    return per_parameter * parameters + images * activation_bytes(model, precision, device, recompute)


def micro_batch_within(
    model: VisionTransformer, batch_size: int, memory: float, precision: str, device: str, recompute: bool = False
) -> int:
    """A power of two of images, at most the batch, whose activations fit into half of what parameters leave of `memory` bytes.

    The other half is for gradients of activations, kernels' workspaces, the data and the allocator's gaps.
    """
    room = (memory - training_memory(model, 0, precision, device)) / 2
    images = max(1, int(room // activation_bytes(model, precision, device, recompute)))
    return min(batch_size, 2 ** int(math.log2(images)))


def affordable_micro_batch(
    model: VisionTransformer,
    protocol: Protocol,
    device: torch.device,
    precision: str,
    memory_share: float = 1.0,
    recompute: bool = False,
) -> int:
    """micro_batch_within the part of the device's memory that a run may count on.

    It depends on the device's total memory, not on what is free: a repeated run shall be split alike.
    """
    memory = device_memory(device) * memory_share
    return micro_batch_within(model, protocol.batch_size, memory, precision, device.type, recompute)


def device_memory(device: torch.device) -> int:
    """All memory of a GPU, or of the machine, in bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
