"""What models are like before their first step: how alike tokens are, what branches add, and how widely the class token looks."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from diffvit.data.batches import Prepare
from diffvit.dataset import at_hand, hub_name, load
from diffvit.findings.attention import patch_shares, share_entropy
from diffvit.ledger.spec import RunSpec
from diffvit.vit import AttentionLayer, Block, VisionTransformer, build_model

# In a quick look images have at most so many patches along a side. It takes a tenth of the time, and cosines and norms are nearly the same.
_QUICK_SIDE = 8

# Overrides that decide how a model starts.
_OF_THE_START = ("residual_scale", "heads", "patch_size", "image_size")


@torch.inference_mode()
def measure_start(model: VisionTransformer, images: Tensor) -> dict[str, Any]:
    """What images do in a model.

    Returns:
        "cosine" between the tokens of an image after the last block, mean over pairs and images; "uniform_entropy", the largest that
        there can be; and "layers", the first, the middle and the last, each with its "layer", counted from 0, "attention_rms" and
        "mlp_rms", of what the branches add, and "entropy" in nats, of the class token's attention over the patches, mean over maps;
        None where the architecture has none to show.
    """
    model.eval()
    last = len(model.blocks) - 1
    x_BND, shown = model.embed(images), (0, last // 2, last)
    layers: dict[int, dict[str, Any]] = {}
    for layer, block in enumerate(cast(list[Block], model.blocks)):
        normed_BND = block.norm1(x_BND)
        attention_BND = block.attn(normed_BND)
        x_BND = x_BND + attention_BND
        mlp_BND = block.mlp(block.norm2(x_BND))
        x_BND = x_BND + mlp_BND
        if layer in shown:
            offered = hasattr(block.attn, "maps")
            entropy = share_entropy(patch_shares(cast(AttentionLayer, block.attn).maps(normed_BND))).mean().item() if offered else None
            rms = {f"{name}_rms": branch.square().mean().sqrt().item() for name, branch in (("attention", attention_BND), ("mlp", mlp_BND))}
            layers[layer] = {"layer": layer, **rms, "entropy": entropy}
    unit_BND, tokens = F.normalize(x_BND, dim=-1), x_BND.shape[1]
    cosine = (unit_BND.sum(1).square().sum(-1) - tokens) / (tokens * (tokens - 1))  # of all pairs but each token's with itself
    return {"cosine": cosine.mean().item(), "uniform_entropy": math.log(tokens - 1), "layers": [layers[layer] for layer in shown]}


def start_rows(specs: Iterable[RunSpec], images: int = 4, data_root: str | Path | None = None, quick: bool = False) -> list[dict[str, Any]]:
    """What measure_start finds for each cell and architecture of a list of runs, at its first seed, and what was looked at.

    Args:
        images: how many, of the validation split; of data that are not at hand photographs from scikit-learn.
        quick: images of at most 8 x 8 patches, and photographs for all data from the hub.
    """
    rows = {}
    for spec in specs:
        own = {name: value for name, value in spec.overrides.items() if name in _OF_THE_START}
        key = (spec.model, spec.size, spec.dataset, tuple(sorted(own.items())))
        if key not in rows:
            rows[key] = _start_row(*key, spec.seed, images, data_root, quick)
    return list(rows.values())


@functools.cache
def _start_row(
    model: str, size: str, dataset: str, own: tuple[tuple[str, Any], ...], seed: int, images: int, data_root: str | Path | None, quick: bool
) -> dict[str, Any]:
    protocol = RunSpec.of(model, size, dataset, overrides=dict(own)).protocol
    if quick:
        side = min(_QUICK_SIDE, protocol.image_size // protocol.patch_size)
        protocol = dataclasses.replace(protocol, image_size=side * protocol.patch_size)
    mean: Sequence[float]
    std: Sequence[float]
    if (quick and hub_name(dataset)) or not at_hand(dataset, data_root):
        pixels, mean, std, source = *_photographs(images), "photographs"
    else:
        data = load(dataset, data_root)
        pixels, mean, std, source = data.val.pixels[:images], data.mean, data.std, dataset
    built = build_model(model, size, protocol)
    built.initialise(seed)
    measured = measure_start(built, Prepare(protocol.image_size, mean, std)(pixels))
    named = {"model": model, "size": size, "dataset": dataset, "overrides": dict(own), "tokens": built.tokens}
    return {**named, "images": len(pixels), "of": source, **measured}


def _photographs(number: int) -> tuple[Tensor, list[float], list[float]]:
    """Squares of scikit-learn's two photographs, uint8 [number, 3, 256, 256], drawn alike each time, and their mean and deviation."""
    from sklearn.datasets import load_sample_images

    whole = [torch.tensor(image).permute(2, 0, 1) for image in load_sample_images().images]
    generator, side, parts = torch.Generator().manual_seed(0), 256, []
    for i in range(number):
        image = whole[i % len(whole)]
        top, left = (int(torch.randint(length - side + 1, (), generator=generator)) for length in image.shape[1:])
        parts.append(image[:, top : top + side, left : left + side])
    pixels = torch.stack(parts)
    shares = pixels.float() / 255
    return pixels, shares.mean((0, 2, 3)).tolist(), shares.std((0, 2, 3)).tolist()
