"""Classic ViT: multi-head self-attention (arXiv 1706.03762) in the blocks of vit.py.

softmax(Q K' / sqrt(E)) V for each of H heads of dimension E = D / H.

Shapes in names: B batch, N tokens, D d_model, H heads, E head dimension.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffvit.dropout import Dropout
from diffvit.protocol import PROTOCOLS, resolve_size
from diffvit.vit import VisionTransformer, build_model, softmax_maps


class Attention(nn.Module):
    """Multi-head self-attention. [B, N, D] -> [B, N, D]"""

    def __init__(self, d_model: int, heads: int, layer: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.proj = nn.Linear(d_model, d_model)
        self.dropout = Dropout(dropout)

    @staticmethod
    def map_flops(d_model: int, tokens: int) -> int:
        """FLOPs of one layer's Q K' and its product with V, for one image."""
        return 4 * tokens**2 * d_model

    def form_on(self, device: str, dtype: torch.dtype, tokens: int) -> str:
        """The computation that forward does there, for the record."""
        return "sdpa"

    def forward(self, x_BND: Tensor) -> Tensor:
        return self._output(F.scaled_dot_product_attention(*self._project(x_BND)))

    def logits(self, x_BND: Tensor) -> Tensor:
        """Scores before the softmax, scaled. [B, H, N, N]: query, key"""
        q_BHNE, k_BHNE, _ = self._project(x_BND)
        return q_BHNE @ k_BHNE.mT * q_BHNE.shape[-1] ** -0.5

    def maps(self, x_BND: Tensor) -> Tensor:
        """The attention maps, in fp32 or better. [B, H, N, N]"""
        return softmax_maps(self.logits(x_BND))

    def apply_maps(self, maps_BHNN: Tensor, x_BND: Tensor) -> Tensor:
        """The layer's output where its maps are these. [B, N, D]"""
        v_BHNE = self._project(x_BND)[2]
        return self._output(maps_BHNN.to(v_BHNE.dtype) @ v_BHNE)

    def lambdas(self, x_BND: Tensor) -> None:
        """Nothing is subtracted here."""
        return None

    def _project(self, x_BND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        B, N, D = x_BND.shape
        q_BHNE, k_BHNE, v_BHNE = self.qkv(x_BND).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        return q_BHNE, k_BHNE, v_BHNE

    def _output(self, o_BHNE: Tensor) -> Tensor:
        return self.dropout(self.proj(o_BHNE.transpose(1, 2).flatten(2)))


def vit_classic_cifar100(size: str = "10B") -> VisionTransformer:
    """The CIFAR-100 version: 224 pixels, patch 8, d_model 256, 8 heads; depth 12, 31 or 63."""
    return build_model("vit_classic", resolve_size(size, "CIFAR-100"), PROTOCOLS["CIFAR-100"])


def vit_classic_bach(size: str = "10B") -> VisionTransformer:
    """The BACH version: 512 pixels, patch 16, d_model 384, 6 heads; depth 5, 14 or 28."""
    return build_model("vit_classic", resolve_size(size, "BACH"), PROTOCOLS["BACH"])
