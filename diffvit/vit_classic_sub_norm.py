"""Classic ViT in the differential layer without its subtraction: a control for the differential arm.

Differential attention has three parts: half as many heads of double width, a norm of each head's output with a factor that
falls with depth (equation 3 of arXiv 2410.05258), and the subtraction of a second map. This architecture has the first two,
so what the differential one does otherwise is due to the subtraction. vit_classic_wide_heads has the first alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffvit.vit import apply_to_values
from diffvit.vit_classic_wide_heads import WideHeadsAttention
from diffvit.vit_differential import SubNorm


class SubNormAttention(WideHeadsAttention):
    """Multi-head self-attention with wide heads, each normalised and scaled by 1 - lambda_init. [B, N, D] -> [B, N, D]"""

    def __init__(self, d_model: int, heads: int, layer: int, dropout: float):
        super().__init__(d_model, heads, layer, dropout)
        self.sub_norm = SubNorm(d_model // self.heads, layer)

    def form_on(self, device: str, dtype: torch.dtype, tokens: int) -> str:
        """The computation that forward does there, for the record."""
        return f"{super().form_on(device, dtype, tokens)}, normed"

    def heads_output(self, x_BND: Tensor, queries: int | None = None) -> Tensor:
        """The heads' normed outputs side by side, of the first so many tokens or of all. [B, n, D]"""
        return self.sub_norm(super().heads_output(x_BND, queries))

    def apply_maps(self, maps_BHNN: Tensor, x_BND: Tensor) -> Tensor:
        """The layer's output where its maps are these. [B, N, D]"""
        return self.dropout(self.proj(self.sub_norm(apply_to_values(maps_BHNN, self.project(x_BND)[2]))))
