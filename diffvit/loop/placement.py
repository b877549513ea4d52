"""Place a run's model on its device: choose how it is computed there, and its micro-batch."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch

from diffvit.compute import Chosen, Compute, choose
from diffvit.loop.passes import is_out_of_memory
from diffvit.machine.caches import cache_folder, recall, remember
from diffvit.machine.device import autocast_dtype, device_memory, set_matmul_precision
from diffvit.memory import FILLED, Peak, evaluation_bytes, even_split, measure_peak, micro_batch_within, parameter_bytes
from diffvit.protocol import ARMS, Protocol
from diffvit.vit import VisionTransformer, build_model

# Bytes of a GPU that a process takes beside the model: the driver's context, the images, the allocator's rounding.
_BESIDE = 0.8e9
# With fewer images at once a GPU is idle most of the time, and recomputing, which makes room for more, is faster.
_FEW_IMAGES = 4


@dataclass(frozen=True)
class Placed:
    """A model on its device, ready to be trained there.

    Attributes:
        micro_batch: images per training pass.
        evaluation_batch: images per evaluation pass.
    """

    model: VisionTransformer
    chosen: Chosen
    micro_batch: int
    evaluation_batch: int

    @property
    def fit_arguments(self) -> dict[str, Any]:
        """Arguments for `fit`."""
        return {"micro_batch": self.micro_batch, "evaluation_batch": self.evaluation_batch, "graphs": self.chosen.graphs}


def place_model(
    name: str, size: str, protocol: Protocol, seed: int, device: torch.device, precision: str, compute: Compute, workers: int = 1
) -> Placed:
    """Build an architecture, put it on a device, choose how it is computed there and how its batches are split.

    On a GPU the memory that a pass takes is measured, once for each cell, and the result kept in the cache folder. All architectures
    that a study compares are measured, so that they are split alike.

    Args:
        workers: processes that share each batch.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)  # streams and graphs are those of the current device
    set_matmul_precision(precision)
    model = build_model(name, size, protocol)
    model.initialise(seed)
    model.to(device)
    most = -(-protocol.batch_size // workers)
    chosen = choose(model, min(most, compute.micro_batch or most), precision, compute)
    memory = device_memory(device) * compute.memory_share
    if device.type != "cuda":
        counted = micro_batch_within(model, protocol.batch_size, memory, precision, device.type, model.recompute)
        micro_batch = min(compute.micro_batch or counted, most)
        return Placed(model, chosen, micro_batch, micro_batch)
    room = FILLED * memory - _BESIDE - parameter_bytes(model, precision)

    def fitting() -> int:
        names = dict.fromkeys((name, *ARMS)) if name in ARMS else (name,)
        return min(_peak(each, size, protocol, model, precision, compute).images_within(room) for each in names)

    images = compute.micro_batch or fitting()
    if compute.micro_batch is None and compute.recompute is None and images < min(_FEW_IMAGES, most):
        model.recompute = True
        images = fitting()
    evaluated = max(1, int(room // evaluation_bytes(model, precision)))
    chosen = dataclasses.replace(chosen, graphs=chosen.graphs and workers == 1)
    micro_batch = min(compute.micro_batch, most) if compute.micro_batch else even_split(most, images)
    return Placed(model, chosen, micro_batch, even_split(most, max(images, evaluated)))


def _peak(name: str, size: str, protocol: Protocol, like: VisionTransformer, precision: str, compute: Compute) -> Peak:
    """The peak of an architecture's pass on the GPU of `like`, computed as that is: from the cache, or measured now."""
    device, path = like.pos_embed.device, cache_folder() / "memory_peaks.json"
    tokens, width = like.pos_embed.shape[1:]
    triton = like.attention_form(autocast_dtype(precision)).startswith("triton")
    words = (("triton", triton), ("fused", like.fused), ("compiled", bool(compute.compile)), ("recompute", like.recompute))
    how = " ".join(word for word, value in words if value) or "plain"
    key = (
        f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, {precision}, {name} depth {protocol.depths[size]} "
        f"{tokens}x{width}, {protocol.heads} heads, dropout {protocol.dropout:g}, {how}"
    )
    with contextlib.suppress(TypeError):  # where it is not known, or kept by another version
        return Peak(**recall(path, key))
    model = like
    if like.attention_class is not build_model(name, size, protocol, "meta").attention_class:
        model = build_model(name, size, protocol, device)
        choose(model, protocol.batch_size, precision, dataclasses.replace(compute, compile=False, fused=like.fused))
        model.recompute = like.recompute
    try:
        peak = measure_peak(model, protocol, precision)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        return Peak(math.inf, 1.0)  # not kept: with recomputation it may fit
    remember(path, key, dataclasses.asdict(peak))
    return peak
