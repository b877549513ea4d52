"""Corrupted test images: five kinds of noise and blur at five severities, and objects in front of clutter.

The severities are those of CIFAR-C (Hendrycks & Dietterich 2019, arXiv 1903.12261), which were chosen for images of 32
pixels. In a larger image noise has larger grains, in proportion, so that a severity hides as much of the scene. Blur is
wider by the square root of that: on histology at 512 pixels it then costs about as many dB as on CIFAR-100, where in
proportion it would cost more, for there is more fine texture to lose (python -m bench.corruptions; docs/statistics.md).
Smaller images are corrupted pixel by pixel.

Corruptions act on images at their stored size, before Prepare resizes them. Random numbers are drawn on the generator's
device, all else happens on the pixels'.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from diffvit.errors import UserError, unknown_name

# Rises with every change of what corrupt or clutter give: findings of different versions are not compared.
VERSION = 2

# Severity 1 … 5. Gaussian and speckle: standard deviation, pixels in 0-1; shot: photons at white; impulse: share of values;
# blur: standard deviation of the kernel in pixels of an image of _SIDE pixels.
CORRUPTIONS: dict[str, tuple[float, ...]] = {
    "gaussian": (0.04, 0.06, 0.08, 0.09, 0.10),
    "shot": (500, 250, 100, 75, 50),
    "impulse": (0.01, 0.02, 0.03, 0.05, 0.07),
    "speckle": (0.06, 0.10, 0.12, 0.16, 0.20),
    "blur": (0.4, 0.6, 0.7, 0.8, 1.0),
}

BACKGROUNDS = ("noise", "images")

# The side in pixels of the images that the severities were chosen for.
_SIDE = 32

# How much larger than its image a cluttered canvas is, each way.
_CANVAS = 1.5


def corrupt(pixels: Tensor, corruption: str, severity: int, generator: torch.Generator) -> Tensor:
    """The images with one corruption, uint8 [B, C, H, W] as they came.

    Args:
        pixels: uint8 [B, C, H, W].
        corruption: a key of CORRUPTIONS. Blur draws nothing from the generator.
        severity: 1 … 5.

    Raises:
        UserError: an unknown corruption or severity.
    """
    if corruption not in CORRUPTIONS:
        raise unknown_name("corruption", corruption, CORRUPTIONS)
    levels = CORRUPTIONS[corruption]
    if isinstance(severity, bool) or not isinstance(severity, int) or not 1 <= severity <= len(levels):
        raise UserError(f"severity is {severity!r}.", f"give a whole number from 1 to {len(levels)}.")
    amount, x = levels[severity - 1], pixels.float() / 255
    height, width = pixels.shape[-2:]
    grain = max(1.0, min(height, width) / _SIDE)
    if corruption == "blur":
        return _to_uint8(_blurred(x, grain**0.5 * amount))
    if grain == 1:
        return _to_uint8(_noisy(x, corruption, amount, generator))
    small = F.interpolate(x, (round(height / grain), round(width / grain)), mode="area")
    change = _noisy(small, corruption, amount, generator).clamp(0, 1) - small
    return _to_uint8(x + F.interpolate(change, (height, width), mode="bilinear"))


def _noisy(x: Tensor, corruption: str, amount: float, generator: torch.Generator) -> Tensor:
    """Images in 0-1 with noise of one pixel's grain, not clipped."""
    if corruption == "gaussian":
        return x + amount * _normal(x.shape, generator).to(x.device)
    if corruption == "shot":
        return torch.poisson((x * amount).to(generator.device), generator).to(x.device) / amount
    if corruption == "speckle":
        return x + x * amount * _normal(x.shape, generator).to(x.device)
    drawn = _uniform(x.shape, generator).to(x.device)
    # One draw decides both: the lowest values of it are pepper, as many above them salt.
    return torch.where(drawn < amount / 2, 0.0, torch.where(drawn < amount, 1.0, x))


def add_gaussian(pixels: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    """uint8 [B, C, H, W] with Gaussian noise of a standard deviation (pixels in 0-1), clipped and rounded."""
    return _to_uint8(_noisy(pixels.float() / 255, "gaussian", deviation, generator))


def clutter(pixels: Tensor, background: str, generator: torch.Generator, others: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Each image at a random place on a canvas of 1.5 times its height and width.

    The image itself is pasted unscaled. Prepare brings the whole canvas to the model's image size, so the object appears
    smaller to the model than in training, at two thirds of its size.

    Args:
        pixels: uint8 [B, C, H, W].
        background: "noise" fills the canvas with uniform random values, "images" with a crop of four other images, two by two.
        others: where the other images come from, uint8 [N, C, H, W] with none of `pixels` among them; default: the batch, where no
            image is in its own background.

    Returns:
        Canvases, uint8 [B, C, H2, W2]; and boxes of the pasted images, int64 [B, 4]: top, left, bottom, right in canvas pixels, the
        last two just outside.

    Raises:
        UserError: an unknown background, or a batch without other images.
    """
    if background not in BACKGROUNDS:
        raise unknown_name("background", background, BACKGROUNDS)
    batch, channels, height, width = pixels.shape
    tall, wide = round(_CANVAS * height), round(_CANVAS * width)
    if background == "noise":
        canvas = _below(256, (batch, channels, tall, wide), generator).to(pixels.device, torch.uint8)
    else:
        mosaic = _mosaic(pixels, generator, others)
        tops, lefts = _places(batch, 2 * height - tall, 2 * width - wide, generator)
        crops = [mosaic[i, :, top : top + tall, left : left + wide] for i, (top, left) in enumerate(zip(tops, lefts, strict=True))]
        canvas = torch.stack(crops) if crops else pixels.new_empty(0, channels, tall, wide)
    tops, lefts = _places(batch, tall - height, wide - width, generator)
    for i, (top, left) in enumerate(zip(tops, lefts, strict=True)):
        canvas[i, :, top : top + height, left : left + width] = pixels[i]
    corner = torch.tensor([tops, lefts], device=pixels.device).T.reshape(batch, 2)
    return canvas, torch.cat([corner, corner + torch.tensor([height, width], device=pixels.device)], dim=1)


def _mosaic(pixels: Tensor, generator: torch.Generator, others: Tensor | None) -> Tensor:
    """A mosaic of four other images for each, two by two: uint8 [B, C, 2 H, 2 W]."""
    batch, channels, height, width = pixels.shape
    if others is None:
        if batch < 2:
            raise UserError("a single image has no other images for its background.", "give at least two images, or others.")
        # A step of 1 to batch - 1 round the batch never ends where it began.
        rows = (torch.arange(batch)[:, None] + 1 + _below(batch - 1, (batch, 4), generator).cpu()) % batch
        others = pixels
    else:
        assert others.shape[1:] == pixels.shape[1:] and len(others)
        rows = _below(len(others), (batch, 4), generator).cpu()
    tiles = others[rows.to(others.device)].to(pixels.device).view(batch, 2, 2, channels, height, width)
    return tiles.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, 2 * height, 2 * width)


def _places(count: int, down: int, right: int, generator: torch.Generator) -> tuple[list[int], list[int]]:
    """Tops 0 … down and lefts 0 … right, each equally likely."""
    return _below(down + 1, (count,), generator).tolist(), _below(right + 1, (count,), generator).tolist()


def _blurred(x: Tensor, sigma: float) -> Tensor:
    """A Gaussian filter out to four sigma along rows, then columns; edges are mirrored."""
    batch, channels, height, width = x.shape
    radius = min(int(4 * sigma + 0.5), height - 1, width - 1)
    distance = torch.arange(-radius, radius + 1, device=x.device)
    kernel = torch.exp(-0.5 * (distance / sigma) ** 2)
    kernel = (kernel / kernel.sum()).view(1, 1, -1, 1)
    x = F.pad(x.reshape(batch * channels, 1, height, width), (radius,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(x, kernel), kernel.transpose(2, 3)).view(batch, channels, height, width)


def _to_uint8(x: Tensor) -> Tensor:
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)


def _normal(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)


def _uniform(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device)


def _below(bound: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(bound, shape, generator=generator, device=generator.device)
