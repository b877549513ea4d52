"""Dropout that draws its masks on a CPU from 16 random bits a value: torch takes 64, one after another, and 14 % of a step for it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LEVELS = 2**16


class Dropout(nn.Dropout):
    """As nn.Dropout, which it is but on a CPU. There p is rounded to 1/65536, and the scale is of the rounded one: the mean stays exact."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not 0 < self.p < 1:
            return super().forward(x)
        if x.device.type != "cpu" or torch.compiler.is_compiling():  # both have fast ones of their own
            return F.dropout(x, self.p)
        return x * _scaled_mask(x, self.p)


def _scaled_mask(x: Tensor, p: float) -> Tensor:
    """0 with probability p, else 1 / (1 - p), in x's shape and dtype; from the CPU's default generator."""
    dropped = round(p * _LEVELS)
    if dropped in (0, _LEVELS):
        return torch.full_like(x, 1 - dropped / _LEVELS)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = words.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - _LEVELS // 2
    return kept.to(x.dtype).mul_(_LEVELS / (_LEVELS - dropped))
