"""Dropout with masks that are cheap to draw.

On a CPU from 16 random bits a value: torch takes 64, one after another, and 14 % of a step for it. On a GPU that Triton has kernels for, as
a function of the step, the place in the model, the image's number and the element (fused_triton.py). That needs no memory and no
generator, and masks are the same however a batch is split.
"""

from __future__ import annotations

import functools
import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffvit.kernels import LEVELS
from diffvit.protocol import stable_seed


class Dropout(nn.Dropout):
    """As nn.Dropout, but for the draws. p is rounded to 1/65536, and the scale is of the rounded one: the mean stays exact.

    Attributes:
        site: the place in the model, so that masks of different places are independent.
    """

    def __init__(self, p: float):
        super().__init__(p)
        self.site = 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not 0 < self.p < 1:
            return super().forward(x)
        if torch.compiler.is_compiling():  # it fuses torch's own
            return F.dropout(x, self.p)
        if x.device.type == "cpu":
            return x * _scaled_mask(x, self.p)
        if has_kernels(x.device, x.shape[-1]):
            from diffvit.kernels.fused_triton import dropout

            return dropout(x, key_on(x.device), self.site, self.p)
        return F.dropout(x, self.p)


def _scaled_mask(x: Tensor, p: float) -> Tensor:
    """0 with probability p, else 1 / (1 - p), in x's shape and dtype; from the CPU's default generator."""
    dropped = round(p * LEVELS)
    if dropped in (0, LEVELS):
        return torch.full_like(x, 1 - dropped / LEVELS)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = words.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - LEVELS // 2
    return kept.to(x.dtype).mul_(LEVELS / (LEVELS - dropped))


@functools.cache
def has_kernels(device: torch.device, width: int) -> bool:
    """Whether fused_triton.py has kernels for rows of this width on a device; a CPU only where Triton interprets, in tests."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":  # importing Triton takes seconds
        return False
    try:
        from diffvit.kernels.fused_triton import supported
    except Exception:  # missing, or broken in one of many ways: torch has dropout too
        return False
    return supported(device, width)


@functools.cache
def key_on(device: torch.device) -> Tensor:
    """What a device's masks are drawn from. int64 [3]: the step's seed, the first image's number in the global batch, and how far apart
    images are in it. It is always the same tensor, so that a captured graph follows it.
    """
    return torch.tensor([0, 0, 1], device=device)


def seed_masks(device: torch.device, seed: int, group: tuple[int, int] = (0, 1)) -> None:
    """Begin a step: all masks follow from its seed.

    Args:
        seed: of the step, the same on all workers.
        group: (rank, workers); each worker has every workers-th image of a batch.
    """
    rank, workers = group
    torch.manual_seed(stable_seed(seed, rank))
    if device.type == "cuda":
        key_on(device)[0].fill_(seed)
        key_on(device)[2].fill_(workers)


def at_image(device: torch.device, number: int) -> None:
    """The next forward pass begins with this image of the global batch."""
    if device.type == "cuda":
        key_on(device)[1].fill_(number)
