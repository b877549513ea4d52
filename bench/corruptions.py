"""What each corruption does to images as a model sees them, so that a severity means about the same at 224 and at 512 pixels.

python -m bench.corruptions --data_root DIR --photos DIR prints, for CIFAR-100's test images and for pictures in a folder squeezed to
BACH's size, the peak signal-to-noise ratio in dB and the mean absolute change in percent of the range, by severity.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffvit.data.batches import Prepare
from diffvit.data.corruptions import CORRUPTIONS, corrupt
from diffvit.dataset import load
from diffvit.protocol import protocol_of

_IMAGES = 64


def measure(pixels: Tensor, image_size: int) -> dict[str, list[tuple[float, float]]]:
    """Corruption -> for each severity PSNR in dB and mean absolute change in percent, at the model's size.

    Args:
        pixels: uint8 [B, C, H, W] as a data set stores them.
    """
    prepare = Prepare(image_size, [0.0] * pixels.shape[1], [1.0] * pixels.shape[1])
    clean = prepare(pixels)
    found: dict[str, list[tuple[float, float]]] = {}
    for corruption, levels in CORRUPTIONS.items():
        for severity in range(1, len(levels) + 1):
            change = prepare(corrupt(pixels, corruption, severity, torch.Generator().manual_seed(0))) - clean
            ratio = -10 * change.square().mean().log10().item()
            found.setdefault(corruption, []).append((ratio, 100 * change.abs().mean().item()))
    return found


def _photos(folder: Path, side: int) -> Tensor:
    """All pictures of a folder, squeezed to a square. uint8 [B, 3, side, side]"""
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".png", ".jpg", ".tif", ".tiff"))
    squeezed = [np.asarray(Image.open(path).convert("RGB").resize((side, side), Image.Resampling.BILINEAR)) for path in paths]
    return torch.from_numpy(np.stack(squeezed)).permute(0, 3, 1, 2)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_root", type=Path, required=True, help="folder with uoft-cs/cifar100")
    parser.add_argument("--photos", type=Path, required=True, help="folder with pictures of the kind that BACH has")
    given = parser.parse_args()
    cifar, bach = protocol_of("CIFAR-100").image_size, protocol_of("BACH").image_size
    columns = {
        f"CIFAR-100 at {cifar}": measure(load("CIFAR-100", given.data_root).test.pixels[:_IMAGES], cifar),
        f"photos at {bach}": measure(_photos(given.photos, bach), bach),
    }
    print(f"{'':<12}" + "".join(f"{name:>24}" for name in columns))
    for corruption in CORRUPTIONS:
        for i, row in enumerate(zip(*(found[corruption] for found in columns.values()), strict=True), start=1):
            print(f"{corruption:<10} {i}" + "".join(f"{ratio:>13.1f} dB {change:>6.2f} %" for ratio, change in row))


if __name__ == "__main__":
    main()
