"""Where a finished model attends: the exact attention maps of every layer, summarised in a few numbers, and some as pictures.

Measured are the class token's maps, for it alone is classified. A differential map has negative parts, which act on the
output as positive ones do: shares and entropies are those of its absolute values; its positive part and its negative mass
stand beside them. A low entropy alone is no evidence of focus: an untrained model's maps are not uniform either, and the
architectures differ there. So the entropy of the same model before training is measured too. All is computed in fp32
from explicit maps, which tests prove to be those that the fused kernels apply.

Every model sees the same cluttered images: they are drawn from the data and an image's row, never from a run's seed.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from diffvit.checks import list_of, maybe, one_of, real, record, text, whole
from diffvit.data.batches import Prepare
from diffvit.data.corruptions import BACKGROUNDS, clutter
from diffvit.dataset import Dataset
from diffvit.errors import UserError
from diffvit.evaluation import data_warnings, open_checkpoint
from diffvit.protocol import stable_seed
from diffvit.vit import AttentionLayer, Block, VisionTransformer, build_model

# Rises with every change of what evaluate_attention finds: findings of different versions are not compared.
VERSION = 2

_PICTURES = 6
_PICTURE_PIXELS = 64

_TOP = record({"top1": real(), "median": real()})
_LAYER = record(
    {
        "layer": whole(0, 1000), "lambda": maybe(real()), "entropy": real(), "entropy_untrained": real(), "entropy_positive": real(),
        "negative_mass": real(0, 1.001), "attention_logits": _TOP, "hidden_states": _TOP,
        "signal_share": record({background: real(0, 1.001) for background in BACKGROUNDS}),
    }
)  # fmt: skip
_MAP = list_of(list_of(real(), 1, 1000), 1, 1000)
_PICTURE = record(
    {
        "row": whole(), "png": text("[A-Za-z0-9+/]*={0,2}", 100_000), "box": list_of(real(0, 1), 4, 4), "true": text(),
        "predicted": text(), "middle_map": _MAP, "last_map": _MAP,
    }
)  # fmt: skip
_KEPT = record(
    {
        "version": one_of(VERSION), "images": whole(1, 10**8), "warnings": list_of(text()), "uniform_entropy": real(),
        "signal_area": real(0, 1), "middle_layer": whole(0, 1000), "layers": list_of(_LAYER, 1, 1000),
        "pictures": list_of(_PICTURE, 0, 100),
    }
)  # fmt: skip


def wrong_findings(found: Any) -> str | None:
    """Check findings of evaluate_attention that were read from a file (see checks.py)."""
    if wrong := _KEPT(found):
        return wrong
    for i, picture in enumerate(found["pictures"]):
        if any(len({len(row) for row in picture[name]}) != 1 for name in ("middle_map", "last_map")):
            return f".pictures[{i}] has a map with rows of different lengths"
        try:
            picture_pixels(picture)
        except Exception:  # the decoder may raise anything
            return f".pictures[{i}].png is no picture of ours"
    return None


@torch.inference_mode()
def evaluate_attention(
    checkpoint: Path,
    *,
    data_root: str | Path | None = None,
    limit: int | None = 256,
    batch_size: int = 16,
    device: torch.device,
    on_progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure what a checkpoint attends to in its test set, on clean images and with clutter around them.

    Args:
        limit: the first so many test images only; None for all.
        batch_size: images whose maps of one layer are held at once.
        on_progress: called with a line after the clean images and after each kind of clutter.

    Returns:
        A dict that JSON can hold:

        "version", "images", "warnings"; "uniform_entropy", the log of the number of patches; "signal_area", the object's share of a
        cluttered image's area; "middle_layer", that of the pictures.

        "layers", first to last, each with its "layer", counted from 0; "lambda", its mean, or None where nothing is subtracted;
        "entropy" in nats, of the class token's attention over the patches, mean over heads and images; "entropy_untrained", the same
        before the first step; "entropy_positive", that of the maps' positive part; "negative_mass", the negative part's share of
        absolute attention; "signal_share", by background, the share of attention that falls on the object, which would be
        "signal_area" were it uniform; and "attention_logits" and "hidden_states" (the block's output) with "top1" and "median" of
        absolute values, as section 3.6 of arXiv 2410.05258 has them for text. top1 is over all images, median that of the images'
        medians.

        "pictures", of the first test images of different classes, in front of other images: "row" in the test set, "png" (see
        picture_pixels), "box" of the object as shares of height and width (top, left, bottom, right), "true" and "predicted" class,
        and the class token's attention to the patches, signed, mean over heads, [rows][columns]: "middle_map" and "last_map".

    Raises:
        UserError: the checkpoint or the data are missing or damaged, or the limit leaves no image.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}.", "give a whole number of at least 1.")
    model, facts, data, prepare = open_checkpoint(checkpoint, data_root, device)
    _check_maps(model, facts["model"])
    images = len(data.test.head(limit))
    batches = [range(first, min(first + batch_size, images)) for first in range(0, images, batch_size)]
    uniform_entropy = math.log(model.tokens - 1)

    layers = _clean_layers(model, prepare, data, batches)
    for layer, entropy in zip(layers, _entropies(_untrained(facts, device), prepare, data, batches), strict=True):
        layer["entropy_untrained"] = entropy
    if on_progress:
        entropy = np.mean([layer["entropy"] for layer in layers])
        on_progress(f"1/{1 + len(BACKGROUNDS)}  clean: mean entropy {entropy:.2f} of at most {uniform_entropy:.2f} nats")
    for number, background in enumerate(BACKGROUNDS, start=2):
        shares, area = _signal_shares(model, prepare, data, background, batches)
        for layer, share in zip(layers, shares, strict=True):
            layer["signal_share"][background] = share
        if on_progress:
            on_progress(
                f"{number}/{1 + len(BACKGROUNDS)}  clutter-{background}: mean share of attention on the object "
                f"{100 * np.mean(shares):.1f} %, of the area {100 * area:.1f} %"
            )
    return {
        "version": VERSION,
        "images": images,
        "warnings": data_warnings(facts, data),
        "uniform_entropy": uniform_entropy,
        "signal_area": area,
        "middle_layer": _middle_layer(model),
        "layers": layers,
        "pictures": _pictures(model, prepare, data, images),
    }


def _check_maps(model: VisionTransformer, name: str) -> None:
    """Raises UserError for an architecture of the user's own that does not tell its maps."""
    if missing := [method for method in ("logits", "maps", "apply_maps", "lambdas") if not hasattr(model.attention_class, method)]:
        raise UserError(f"{name} has no {', '.join(missing)}.", "without them its attention cannot be looked into.")


def _untrained(facts: dict[str, Any], device: torch.device) -> VisionTransformer:
    """The checkpoint's model before its first step."""
    model = build_model(facts["model"], facts["size"], facts["protocol"]).to(device).eval()
    model.initialise(facts["seed"])
    return model


def explicit_layers(model: VisionTransformer, images: Tensor) -> Iterator[tuple[AttentionLayer, Tensor, Tensor, Tensor]]:
    """The forward pass with explicit maps, block by block.

    Yields:
        The attention, its input [B, N, D], its maps [B, M, N, N], and the block's output [B, N, D].
    """
    x_BND = model.embed(images)
    for block in cast(list[Block], model.blocks):
        attention = cast(AttentionLayer, block.attn)
        input_BND = block.norm1(x_BND)
        maps_BMNN = attention.maps(input_BND)
        x_BND = x_BND + attention.apply_maps(maps_BMNN, input_BND)
        x_BND = x_BND + block.mlp(block.norm2(x_BND))
        yield attention, input_BND, maps_BMNN, x_BND


def patch_shares(maps_BMNN: Tensor) -> Tensor:
    """The class token's absolute attention to each patch, as a share of that to all patches. [B, M, N - 1]"""
    return _shares(maps_BMNN[:, :, 0, 1:].abs())


def positive_shares(maps_BMNN: Tensor) -> Tensor:
    """As patch_shares, of the maps' positive part. [B, M, N - 1]"""
    return _shares(maps_BMNN[:, :, 0, 1:].clamp_min(0))


def negative_mass(maps_BMNN: Tensor) -> Tensor:
    """The share of the class token's absolute attention to the patches that is negative; 0 for a classic map. [B, M]"""
    return (patch_shares(maps_BMNN) * (maps_BMNN[:, :, 0, 1:] < 0)).sum(dim=-1)


def _shares(weights: Tensor) -> Tensor:
    # Not even a map that is all on the class token itself divides by zero.
    return weights / weights.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)


def share_entropy(shares: Tensor) -> Tensor:
    """Entropy in nats over the last dimension."""
    return torch.special.entr(shares).sum(dim=-1)


def box_overlap(boxes: Tensor, canvas: tuple[int, int], grid: int) -> Tensor:
    """The share of each patch's area that lies in the box, row by row of the grid. [B, grid * grid]

    Args:
        boxes: [B, 4], top, left, bottom, right in canvas pixels, the last two just outside.
        canvas: height and width in pixels, which the model sees squeezed to a square.
        grid: patches along a side.
    """
    top, left, bottom, right = (boxes.double() * grid / torch.tensor([*canvas, *canvas], device=boxes.device)).unsqueeze(-1).unbind(1)
    starts = torch.arange(grid, device=boxes.device)
    down = (bottom.clamp_max(starts + 1) - top.clamp_min(starts)).clamp(0, 1)
    across = (right.clamp_max(starts + 1) - left.clamp_min(starts)).clamp(0, 1)
    return (down.unsqueeze(2) * across.unsqueeze(1)).flatten(1)


def cluttered(data: Dataset, background: str, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Test images with clutter around them, each drawn from the data, the background and its own row.

    Returns:
        Canvases, uint8 [B, C, H2, W2], and boxes, int64 [B, 4]: see corruptions.clutter. The images around come from the validation
        split: no model was trained on them, and no test image is its own background.
    """
    drawn = [
        clutter(
            data.test.pixels[row : row + 1],
            background,
            torch.Generator().manual_seed(stable_seed(data.fingerprint, "clutter", background, row)),
            data.val.pixels,
        )
        for row in rows
    ]
    canvases, boxes = zip(*drawn, strict=True)
    return torch.cat(canvases), torch.cat(boxes)


def summary_lines(findings: Mapping[str, Any]) -> list[str]:
    """A readable table of the findings, a line a layer."""
    names = ("layer", "lambda", "entropy", "start", "pos.", "neg.", "noise", "images", "logit", "med.", "hidden", "med.")
    widths = (5, 7, 8, 6, 6, 6, 6, 7, 7, 7, 7, 7)
    lines = ["".join(map(str.rjust, names, widths))]
    for layer in findings["layers"]:
        shares = (layer["negative_mass"], layer["signal_share"]["noise"], layer["signal_share"]["images"])
        sizes = (layer[name][part] for name in ("attention_logits", "hidden_states") for part in ("top1", "median"))
        cells = (
            str(layer["layer"]), "" if layer["lambda"] is None else f"{layer['lambda']:.3f}",
            *(f"{layer[name]:.2f}" for name in ("entropy", "entropy_untrained", "entropy_positive")),
            *(f"{100 * share:.0f} %" for share in shares), *(f"{size:.2f}" if size < 1000 else f"{size:.0f}" for size in sizes),
        )  # fmt: skip
        lines.append("".join(map(str.rjust, cells, widths)))
    uniform = f"uniform attention: entropy {findings['uniform_entropy']:.3f} nats, {100 * findings['signal_area']:.1f} % on the object"
    meanings = (
        "start: entropy before training; pos.: entropy of the positive part; neg.: the negative part's share of absolute attention; "
        "noise, images: share on the object in front of them; logit, hidden: the largest in size of attention logits and hidden states, "
        "and their median"
    )
    return [*lines, f"  {uniform}; {findings['images']} images", f"  {meanings}"]


def picture_pixels(picture: Mapping[str, Any]) -> np.ndarray:
    """The image of one of the "pictures" of evaluate_attention, uint8 [height, width] or [height, width, 3]. Raises ValueError."""
    from PIL import Image

    with Image.open(io.BytesIO(base64.b64decode(picture["png"])), formats=["PNG"]) as image:
        if max(image.size) > _PICTURE_PIXELS or image.mode not in ("L", "RGB"):  # before it is decoded
            raise ValueError("a picture of another kind")
        return np.asarray(image)


def _clean_layers(model: VisionTransformer, prepare: Prepare, data: Dataset, batches: Sequence[range]) -> list[dict[str, Any]]:
    """Measures of every layer on unchanged images. Each is one number an image, so that the batch size changes nothing."""
    values: list[dict[str, list[Tensor]]] = [{} for _ in model.blocks]
    for rows in batches:
        pixels = data.test.pixels[rows.start : rows.stop]
        for found, (attention, input_BND, maps_BMNN, hidden_BND) in zip(values, explicit_layers(model, prepare(pixels)), strict=True):
            numbers = {
                "entropy": share_entropy(patch_shares(maps_BMNN)).mean(dim=1),
                "entropy_positive": share_entropy(positive_shares(maps_BMNN)).mean(dim=1),
                "negative_mass": negative_mass(maps_BMNN).mean(dim=1),
            }
            lambdas = attention.lambdas(input_BND)
            if lambdas is not None:
                numbers["lambda"] = lambdas.expand(len(rows)) if lambdas.ndim == 0 else lambdas.flatten(1).mean(dim=1)
            for what, tensor in (("attention_logits", attention.logits(input_BND)), ("hidden_states", hidden_BND)):
                sizes = tensor.abs().flatten(1)
                numbers[f"{what}.top1"] = sizes.amax(dim=1)
                numbers[f"{what}.median"] = torch.stack([image.median() for image in sizes])
            for name, number in numbers.items():
                found.setdefault(name, []).append(number.double().cpu())
    together = [{name: torch.cat(parts) for name, parts in found.items()} for found in values]
    return [
        {
            "layer": layer,
            "lambda": found["lambda"].mean().item() if "lambda" in found else None,
            **{name: found[name].mean().item() for name in ("entropy", "entropy_positive", "negative_mass")},
            "signal_share": {},
            **{
                what: {"top1": found[f"{what}.top1"].max().item(), "median": found[f"{what}.median"].median().item()}
                for what in ("attention_logits", "hidden_states")
            },
        }
        for layer, found in enumerate(together)
    ]


def _entropies(model: VisionTransformer, prepare: Prepare, data: Dataset, batches: Sequence[range]) -> list[float]:
    """Every layer's entropy, mean over heads and images."""
    totals = [0.0] * len(model.blocks)
    for rows in batches:
        for layer, (_, _, maps_BMNN, _) in enumerate(explicit_layers(model, prepare(data.test.pixels[rows.start : rows.stop]))):
            totals[layer] += share_entropy(patch_shares(maps_BMNN)).mean(dim=1).double().sum().item()
    return [total / sum(map(len, batches)) for total in totals]


def _signal_shares(
    model: VisionTransformer, prepare: Prepare, data: Dataset, background: str, batches: Sequence[range]
) -> tuple[list[float], float]:
    """Every layer's share of attention on the object, mean over heads and images, and the object's share of the area."""
    totals = [0.0] * len(model.blocks)
    area = 0.0
    for rows in batches:
        canvases, boxes = cluttered(data, background, rows)
        overlap = box_overlap(boxes, (canvases.shape[-2], canvases.shape[-1]), _grid(model))
        area += overlap.mean(dim=1).sum().item()
        overlap = overlap.to(prepare.mean.device, torch.float32)
        for layer, (_, _, maps_BMNN, _) in enumerate(explicit_layers(model, prepare(canvases))):
            shares_BM = (patch_shares(maps_BMNN) * overlap.unsqueeze(1)).sum(dim=-1)
            totals[layer] += shares_BM.mean(dim=1).double().sum().item()
    images = sum(map(len, batches))
    return [total / images for total in totals], area / images


def _pictures(model: VisionTransformer, prepare: Prepare, data: Dataset, images: int) -> list[dict[str, Any]]:
    labels = data.test.labels[:images].tolist()
    rows = sorted({label: row for row, label in reversed(list(enumerate(labels)))}.values())[:_PICTURES]
    canvases, boxes = cluttered(data, "images", rows)
    height, width = canvases.shape[-2:]
    maps, predicted = [], []
    for _, _, maps_BMNN, hidden_BND in explicit_layers(model, prepare(canvases)):
        maps.append(maps_BMNN[:, :, 0, 1:].mean(dim=1).view(len(rows), _grid(model), _grid(model)).cpu())
        predicted = model.classify(hidden_BND).argmax(dim=1).tolist()  # after the last block it is the model's answer
    return [
        {
            "row": row,
            "png": _png(canvases[i]),
            "box": [side / length for side, length in zip(boxes[i].tolist(), (height, width, height, width), strict=True)],
            "true": data.classes[labels[row]],
            "predicted": data.classes[predicted[i]],
            "middle_map": _rounded(maps[_middle_layer(model)][i]),
            "last_map": _rounded(maps[-1][i]),
        }
        for i, row in enumerate(rows)
    ]


def _middle_layer(model: VisionTransformer) -> int:
    return (len(model.blocks) - 1) // 2


def _grid(model: VisionTransformer) -> int:
    return math.isqrt(model.tokens - 1)


def _png(pixels: Tensor) -> str:
    """uint8 [C, H, W] as a PNG in base64, made smaller where a side is longer than 64 pixels."""
    from PIL import Image

    array = pixels.permute(1, 2, 0).cpu().numpy()
    image = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
    image.thumbnail((_PICTURE_PIXELS, _PICTURE_PIXELS))
    file = io.BytesIO()
    image.save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def _rounded(attention: Tensor) -> list[list[float]]:
    """To five significant digits, for small files."""
    return [[float(f"{value:.5g}") for value in row] for row in attention.tolist()]
