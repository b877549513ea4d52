"""Find the test images of CIFAR-100 that have a near-duplicate among its training images, and write their digests.

python -m bench.near_duplicates --data_root DIR writes diffvit/data/cifar100_near_duplicates.txt (five minutes of one core).

Candidates are the training images nearest to a test image, or to its mirror image, by the correlation of both reduced to 8 x 8
pixels. A pair counts where the fine structure of the two correlates, at the best shift of up to three pixels: brightness without its
slow changes, divided by its local contrast, so that a horizon or an outline before white counts little.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from diffvit.data.near_duplicates import LIST, digest
from diffvit.dataset import load

_CANDIDATES = 8
_SHIFT = 3
_LEAST = 0.65  # chosen by looking at pairs: from 0.65 to 0.7 about two of three are one picture, or its like; below, fewer than half


def correlations(test: Tensor, train: Tensor) -> Tensor:
    """The best correlation of each test image's fine structure with that of a training image. uint8 [B, 3, 32, 32] both -> [B]"""
    coarse = _coarse(train)
    best = torch.full((len(test),), -1.0)
    for rows in torch.arange(len(test)).split(500):
        for images in (test[rows], test[rows].flip(-1)):
            structure = _structure(images)
            for candidate in (_coarse(images) @ coarse.T).topk(_CANDIDATES).indices.T:
                best[rows] = torch.maximum(best[rows], _best_shift(structure, _structure(train[candidate])))
    return best


def _coarse(images: Tensor) -> Tensor:
    small = F.adaptive_avg_pool2d(images.float(), 8)
    return F.normalize((small - small.mean((2, 3), keepdim=True)).flatten(1), dim=1)


def _structure(images: Tensor) -> Tensor:
    """Brightness without its slow changes over its local contrast, [B, 1, 30, 30]."""
    brightness = images.float().mean(1, keepdim=True)
    fine = _blurred(brightness, 0.6) - _blurred(brightness, 2.0)
    return (fine / (_blurred(fine.square(), 3.0).sqrt() + 4))[..., 1:-1, 1:-1]


def _blurred(x: Tensor, sigma: float) -> Tensor:
    radius = int(3 * sigma + 0.5)
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).view(1, 1, -1, 1)
    return F.conv2d(F.conv2d(F.pad(x, (radius,) * 4, mode="reflect"), kernel), kernel.transpose(2, 3))


def _best_shift(first: Tensor, second: Tensor) -> Tensor:
    """The largest correlation over all shifts, of what overlaps. [B]"""
    side, best = first.shape[-1], torch.full((len(first),), -1.0)
    shifts = [(offset, slice(max(0, offset), side + min(0, offset))) for offset in range(-_SHIFT, _SHIFT + 1)]
    back = {offset: slice(max(0, -offset), side + min(0, -offset)) for offset, _ in shifts}
    for down, rows in shifts:
        for right, columns in shifts:
            one, two = first[..., rows, columns].flatten(1), second[..., back[down], back[right]].flatten(1)
            best = torch.maximum(best, F.cosine_similarity(one, two, dim=1))
    return best


def main() -> None:
    """Write the list."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_root", type=Path, required=True, help="folder with uoft-cs/cifar100")
    data = load("CIFAR-100", parser.parse_args().data_root)
    found = correlations(data.test.pixels, torch.cat([data.train.pixels, data.val.pixels])) >= _LEAST
    digests = sorted(digest(image) for image in data.test.pixels[found])
    LIST.write_text("".join(f"{line}\n" for line in digests))
    print(f"{len(digests)} of {len(found)} test images have a near-duplicate")


if __name__ == "__main__":
    main()
