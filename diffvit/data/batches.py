"""The batches of a step, which depend on its number only, and images as the model takes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from diffvit.dataset import ImageSet
from diffvit.protocol import stable_seed


class StepBatches(Sampler[Tensor]):
    """The rows of every step's batch, int64 [images]: epochs of permutations drawn from (seed, epoch), the last partial batch kept.

    Args:
        rows: size of the split.
        steps: (first, last), counted from 1; a resumed run starts in the middle.
        part: (rank, workers): each worker takes every workers-th row of each batch.
    """

    def __init__(self, rows: int, batch_size: int, seed: int, steps: tuple[int, int], part: tuple[int, int] = (0, 1), salt: str = ""):
        self.rows, self.batch_size, self.seed, self.salt = rows, batch_size, seed, salt
        self.first, self.last = steps
        self.rank, self.workers = part
        self.per_epoch = -(-rows // batch_size)

    def __len__(self) -> int:
        return self.last - self.first + 1

    def batch_length(self, step: int) -> int:
        """Images in the whole batch of a step, all workers together."""
        start = (step - 1) % self.per_epoch * self.batch_size
        return min(self.batch_size, self.rows - start)

    def lengths(self) -> set[int]:
        """The lengths that this worker's part of a batch has, in a whole batch and in an epoch's last."""
        return {len(range(self.rank, self.batch_length(step), self.workers)) for step in (1, self.per_epoch)}

    def __iter__(self) -> Iterator[Tensor]:
        drawn, order = -1, torch.empty(0)
        for step in range(self.first, self.last + 1):
            epoch, position = divmod(step - 1, self.per_epoch)
            if epoch != drawn:
                generator = torch.Generator().manual_seed(stable_seed("order", self.seed, self.salt, epoch))
                drawn, order = epoch, torch.randperm(self.rows, generator=generator)
            batch = order[position * self.batch_size : (position + 1) * self.batch_size]
            yield batch[self.rank :: self.workers]


def make_loader(images: ImageSet, batches: StepBatches | None = None, batch_size: int = 1) -> DataLoader:
    """A DataLoader of (uint8 pixels, labels), one item a step of `batches`; without them, all rows once in order."""
    if batches is not None:
        # DataLoader's type asks for lists, but it passes a batch on as it is.
        return DataLoader(images, batch_sampler=cast(Any, batches), collate_fn=_as_is)
    return DataLoader(images, batch_size=batch_size, collate_fn=_as_is)


def _as_is(batch: Any) -> Any:
    return batch


class Prepare:
    """uint8 [B, C, height, width] -> float32 [B, C, image_size, image_size], on the pixels' device.

    Resized with antialiased bilinear interpolation (PIL's result to 1/255) where the size differs, then normalised.
    """

    def __init__(self, image_size: int, mean: Sequence[float], std: Sequence[float], device: str | torch.device = "cpu"):
        self.size = (image_size, image_size)
        self.mean = 255 * torch.tensor(mean, device=device).view(1, -1, 1, 1)
        self.std = 255 * torch.tensor(std, device=device).view(1, -1, 1, 1)

    def __call__(self, pixels: Tensor) -> Tensor:
        x = pixels.to(self.mean.device, torch.float32)
        if x.shape[-2:] != self.size:
            x = F.interpolate(x, size=self.size, mode="bilinear", antialias=True, align_corners=False)
        return (x - self.mean) / self.std
