"""Classic ViT: multi-head self-attention (arXiv 1706.03762) in the blocks of vit.py.

softmax(Q K' / sqrt(E)) V for each of H heads of dimension E = D / H.

Shapes in names: B batch, N tokens, D d_model, H heads, E head dimension.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffvit.kernels.dropout import Dropout
from diffvit.protocol import PROTOCOLS, resolve_size
from diffvit.vit import VisionTransformer, apply_to_values, attend_by_triton, build_model, project, softmax_maps, triton_supported


class Attention(nn.Module):
    """Multi-head self-attention. [B, N, D] -> [B, N, D]"""

    def __init__(self, d_model: int, heads: int, layer: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.proj = nn.Linear(d_model, d_model)
        self.dropout = Dropout(dropout)
        self.form: str | None = None  # "triton", or None for torch's fused attention

    @staticmethod
    def map_flops(d_model: int, tokens: int, queries: int | None = None) -> int:
        """FLOPs of one layer's Q K' and its product with V, for one image."""
        return 4 * (queries or tokens) * tokens * d_model

    def form_on(self, device: str, dtype: torch.dtype, tokens: int) -> str:
        """The computation that forward does there, for the record."""
        return self.form or "sdpa"

    def forms(self, device: torch.device, dtype: torch.dtype) -> list[str]:
        """What a GPU chooses `form` from by measurement. The first is what the others are compared with."""
        head_dim = self.qkv.in_features // self.heads
        return ["sdpa", *(["triton"] if triton_supported(device, dtype, head_dim, maps=1) else [])]

    def forward(self, x_BND: Tensor, queries: int | None = None) -> Tensor:
        return self.dropout(self.proj(self.heads_output(x_BND, queries)))

    def heads_output(self, x_BND: Tensor, queries: int | None = None) -> Tensor:
        """The heads' outputs side by side, of the first so many tokens or of all. [B, n, D]"""
        if queries is None and self.form == "triton":
            return attend_by_triton(self.qkv, x_BND, self.heads)
        return F.scaled_dot_product_attention(*self.project(x_BND, queries)).transpose(1, 2).flatten(2)

    def logits(self, x_BND: Tensor) -> Tensor:
        """Scores before the softmax, scaled. [B, H, N, N]: query, key"""
        q_BHNE, k_BHNE, _ = self.project(x_BND)
        return q_BHNE @ k_BHNE.mT * q_BHNE.shape[-1] ** -0.5

    def maps(self, x_BND: Tensor) -> Tensor:
        """The attention maps, in fp32 or better. [B, H, N, N]"""
        return softmax_maps(self.logits(x_BND))

    def apply_maps(self, maps_BHNN: Tensor, x_BND: Tensor) -> Tensor:
        """The layer's output where its maps are these. [B, N, D]"""
        return self.dropout(self.proj(apply_to_values(maps_BHNN, self.project(x_BND)[2])))

    def lambdas(self, x_BND: Tensor) -> None:
        """Nothing is subtracted here."""
        return None

    def project(self, x_BND: Tensor, queries: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of the first so many tokens, or of all, keys and values. [B, H, n, E], twice [B, H, N, E]"""
        q_BHNE, k_BHNE, v_BHNE = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in project(self.qkv, x_BND, queries))
        return q_BHNE, k_BHNE, v_BHNE


def vit_classic_cifar100(size: str = "10B") -> VisionTransformer:
    """The CIFAR-100 version: 224 pixels, patch 8, d_model 256, 8 heads; depth 12, 31 or 63."""
    return build_model("vit_classic", resolve_size(size, "CIFAR-100"), PROTOCOLS["CIFAR-100"])


def vit_classic_bach(size: str = "10B") -> VisionTransformer:
    """The BACH version: 512 pixels, patch 16, d_model 384, 6 heads; depth 5, 14 or 28."""
    return build_model("vit_classic", resolve_size(size, "BACH"), PROTOCOLS["BACH"])
