"""The memory of a training step, from a model's shapes, and the micro-batch that a device has room for.

Counted are weights, gradients, AdamW's moments and activations. The count of activations is checked against what autograd saves
(tests/test_plan.py). On a GPU the peak of a real pass is measured instead (loop/placement.py); the count is for GPUs that are not at
hand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F

from diffvit.data.batches import Prepare
from diffvit.machine.device import autocast, autocast_dtype, is_half
from diffvit.protocol import Protocol
from diffvit.vit import AttentionLayer, Block, VisionTransformer

# Bytes of a parameter in fp32 with its gradient and AdamW's two moments; in 16 bits comes a copy that the products use.
_PARAMETER_BYTES = 16

# Values that an attention layer keeps for each token and channel between its two projections, by its form: q, k, v, the output, and one
# for what fused kernels and norms keep a head and token; and what the difference and its norm add.
_ATTENTION_VALUES = {
    "sdpa": 5, "sdpa, normed": 7, "sdpa, one call": 10, "blocks": 7, "maps": 7, "triton": 7, "triton, normed": 7,
    "two_calls": 10, "four_calls": 12, "padded": 15,
}  # fmt: skip
_MOST_ATTENTION_VALUES = max(_ATTENTION_VALUES.values())

# The part of a GPU's memory that a run fills where its needs were measured; the rest is for the driver and the allocator's gaps.
FILLED = 0.92


def activation_bytes(model: VisionTransformer, precision: str, device: str, recompute: bool = False) -> int:
    """An upper bound on the bytes of activations that one image's forward pass keeps for the backward pass. The model may be on "meta".

    Args:
        device: kind of device that it trains on, "cpu" or "cuda"; on a GPU with bf16 the blocks are taken to be fused.
        recompute: only the blocks' inputs are kept, and one block's values at a time.
    """
    tokens, d_model = model.pos_embed.shape[1:]
    patches, depth = model.patch_embed, len(model.blocks)
    pixels = patches.in_channels * (tokens - 1) * patches.weight[0, 0].numel()
    narrow = autocast_dtype(precision).itemsize
    stream = 4 * tokens * d_model  # between blocks it is fp32 at any precision
    ends = (4 + (narrow if is_half(precision) else 0)) * pixels + 2 * stream  # the prepared image, the embedding's mask, the last norm
    block = _block_bytes(model, precision, device)
    if recompute:
        return ends + depth * (stream + tokens * narrow * d_model * _fused(model, precision, device)) + block
    # Of the last block: its input, the norm of it, keys and values.
    last = stream + tokens * narrow * d_model * (4 if is_half(precision) else 3)
    return ends + (depth - 1) * block + (block if model.plain else min(last, block))


def _fused(model: VisionTransformer, precision: str, device: str) -> bool:
    return device == "cuda" and precision == "bf16" and not model.plain


def _block_bytes(model: VisionTransformer, precision: str, device: str) -> int:
    """Bytes that a block keeps of one image."""
    tokens, d_model = model.pos_embed.shape[1:]
    block = cast(Block, model.blocks[0])
    hidden = block.mlp.fc1.out_features
    dtype = autocast_dtype(precision)
    narrow = dtype.itemsize
    form = "plain" if model.plain else cast(AttentionLayer, block.attn).form_on(device, dtype, tokens)
    if _fused(model, precision, device):
        form = "triton" if form in ("sdpa", "sdpa, normed", "two_calls") else form
    values = _ATTENTION_VALUES.get(form, _MOST_ATTENTION_VALUES) * d_model
    values += 2 * d_model + 2 * hidden  # inputs of qkv and fc1; of GELU and fc2
    if _fused(model, precision, device):  # and the two sums that are normalised; masks are drawn again
        return tokens * (4 * 2 * (d_model + 2) + narrow * values)
    if model.plain:  # unknown: maps in memory, four times over
        values += 4 * model.heads * tokens
    if form == "maps":  # both softmaxes and their difference; a classic layer's heads are twice the pairs
        values += 3 * cast(int, block.attn.pairs) * tokens
    if is_half(precision):
        values += 2 * d_model  # what autocast converts
    masks = (2 * d_model + hidden) if model.dropout.p else 0
    return tokens * (4 * 2 * d_model + narrow * values + (1 if device == "cuda" else narrow) * masks)  # the norms' inputs are fp32


def training_memory(model: VisionTransformer, images: int, precision: str, device: str, recompute: bool = False) -> int:
    """Bytes of a training step with so many images at once: parameters, gradients, moments and activations."""
    return parameter_bytes(model, precision) + images * activation_bytes(model, precision, device, recompute)


def parameter_bytes(model: VisionTransformer, precision: str) -> int:
    """Bytes of parameters, gradients and AdamW's moments, and in 16 bits of the copy for matrix products."""
    return (_PARAMETER_BYTES + (2 if is_half(precision) else 0)) * sum(p.numel() for p in model.parameters())


def micro_batch_within(
    model: VisionTransformer, batch_size: int, memory: float, precision: str, device: str, recompute: bool = False
) -> int:
    """The micro-batch whose activations, counted from shapes, fit into a part of the `memory` bytes that parameters leave.

    On a CPU a power of two within half of it: the other half is for gradients of activations, kernels' workspaces, the data and the
    allocator's gaps. On a GPU as it will be split where needs are measured: within three quarters of it.
    """
    room = (memory - parameter_bytes(model, precision)) * (0.75 if device == "cuda" else 0.5)
    images = max(1, int(room // activation_bytes(model, precision, device, recompute)))
    return even_split(batch_size, images) if device == "cuda" else min(batch_size, 2 ** int(math.log2(images)))


def even_split(batch_size: int, most: int) -> int:
    """The micro-batch that splits a batch into the fewest parts of at most `most` images, as equal as possible."""
    return math.ceil(batch_size / math.ceil(batch_size / max(1, most)))


@dataclass(frozen=True)
class Peak:
    """The measured peak of a training pass on a GPU beside parameters, gradients and moments, in bytes.

    Attributes:
        fixed: whatever the number of images.
        per_image: for each image that is computed at once.
    """

    fixed: float
    per_image: float

    def images_within(self, memory: float) -> int:
        """How many images at once fit, 0 if none."""
        return 0 if self.fixed > memory else int((memory - self.fixed) // max(self.per_image, 1.0))


def measure_peak(model: VisionTransformer, protocol: Protocol, precision: str) -> Peak:
    """Measure the peak memory of a model's training pass on a GPU, from passes over few images. Clears its gradients."""
    device, peaks = model.pos_embed.device, []
    prepare = Prepare(protocol.image_size, (0.5,) * protocol.channels, (0.25,) * protocol.channels, device)
    few, more = 2, 6
    for images in (few, few, more):  # the first finds no gradients
        pixels = torch.zeros(images, protocol.channels, protocol.image_size, protocol.image_size, dtype=torch.uint8, device=device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        with autocast(device, precision):
            logits = model(prepare(pixels)).float()
        F.cross_entropy(logits, torch.zeros(images, dtype=torch.int64, device=device)).backward()
        peaks.append(torch.cuda.max_memory_allocated(device) - before)
        del logits
    model.zero_grad(set_to_none=True)
    per_image = (peaks[2] - peaks[1]) / (more - few)
    return Peak(peaks[1] - few * per_image, per_image)


def evaluation_bytes(model: VisionTransformer, precision: str) -> int:
    """An upper bound on the bytes that an image takes during evaluation."""
    tokens, d_model = model.pos_embed.shape[1:]
    hidden = cast(Block, model.blocks[0]).mlp.fc1.out_features
    return tokens * (3 * 4 * d_model + autocast_dtype(precision).itemsize * (8 * d_model + 2 * hidden))
