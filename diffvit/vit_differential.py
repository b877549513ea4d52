"""Differential ViT: differential attention (arXiv 2410.05258, section 2) in the blocks of vit.py.

    O_i = (softmax(Q_i1 K_i1' / sqrt(E)) - lambda softmax(Q_i2 K_i2' / sqrt(E))) V_i          equation 1
    lambda = exp(lq1 . lk1) - exp(lq2 . lk2) + lambda_init                                    equation 2
    head_i = (1 - lambda_init) RMSNorm(O_i)                                                   equation 3

Queries and keys have the classic layer's H heads of dimension E, neighbours (2i, 2i+1) forming pair i; values have
P = H/2 heads of dimension 2E. So the projections are the classic layer's, and the parameters that come on top are four
vectors of E and the norm's 2E a layer. One lambda a layer, shared by its heads; lambda_init = 0.8 - 0.6 exp(-0.3 layer).

Shapes in names: B batch, N tokens, D d_model, H = 2P query and key heads, P pairs, E head dimension, V = 2E value dimension.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from diffvit.kernels.dropout import Dropout, has_kernels
from diffvit.kernels.forms import CANDIDATES, default_form, differential_attention, maps, usable
from diffvit.protocol import PROTOCOLS, resolve_size
from diffvit.vit import VisionTransformer, apply_to_values, attend_by_triton, build_model, project, softmax_maps


def lambda_init(layer: int) -> float:
    """The constant part of lambda in a layer, counted from 0: 0.2, 0.356, 0.471, … towards 0.8."""
    return 0.8 - 0.6 * math.exp(-0.3 * layer)


class SubNorm(nn.RMSNorm):
    """Equation 3: RMSNorm of each head's output, times 1 - lambda_init. Outputs side by side [B, N, D] -> [B, N, D]"""

    def __init__(self, width: int, layer: int):
        super().__init__(width, eps=1e-5)
        self.factor = 1 - lambda_init(layer)

    def forward(self, o_BND: Tensor) -> Tensor:
        width = self.weight.numel()
        o_BNPV = o_BND.unflatten(-1, (-1, width))
        # The compiler fuses torch's own; and how our kernel rounds depends on a tile size that was chosen by time.
        others = torch.compiler.is_compiling() or torch.are_deterministic_algorithms_enabled()
        if not (others or width & (width - 1)) and has_kernels(o_BND.device, width):
            from diffvit.kernels.fused_triton import head_norm

            return head_norm(o_BNPV, self.weight, self.eps, self.factor).flatten(-2)
        return (self.factor * super().forward(o_BNPV)).flatten(-2)


class DifferentialAttention(nn.Module):
    """Multi-head differential attention. [B, N, D] -> [B, N, D]

    Raises:
        ValueError: an odd number of heads.
    """

    def __init__(self, d_model: int, heads: int, layer: int, dropout: float):
        super().__init__()
        if heads % 2:
            raise ValueError(f"differential attention pairs heads: {heads} is odd")
        self.pairs = heads // 2
        self.head_dim = d_model // heads
        self.lambda_init = lambda_init(layer)
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.lambda_q1 = nn.Parameter(torch.zeros(self.head_dim))
        self.lambda_k1 = nn.Parameter(torch.zeros(self.head_dim))
        self.lambda_q2 = nn.Parameter(torch.zeros(self.head_dim))
        self.lambda_k2 = nn.Parameter(torch.zeros(self.head_dim))
        self.sub_norm = SubNorm(2 * self.head_dim, layer)
        self.proj = nn.Linear(d_model, d_model)
        self.dropout = Dropout(dropout)
        self.form: str | None = None  # of equation 1: a key of FORMS, or None for the device's default

    @staticmethod
    def map_flops(d_model: int, tokens: int, queries: int | None = None) -> int:
        """FLOPs of one layer's two maps and their two products with V, for one image: the fused forms; others need a third less."""
        return 6 * tokens**2 * d_model if queries is None else 4 * queries * tokens * d_model

    @staticmethod
    def initialise_parameter(name: str, value: Tensor, generator: torch.Generator) -> None:
        """The lambda vectors start as N(0, 0.1)."""
        value.normal_(0.0, 0.1, generator=generator)

    def form_on(self, device: str, dtype: torch.dtype, tokens: int) -> str:
        """The form of equation 1 that forward computes there, for the record."""
        return self.form or default_form(device, dtype, tokens)

    def lambda_full(self) -> Tensor:
        """Equation 2, in fp32. Scalar."""
        first = torch.exp(torch.dot(self.lambda_q1.float(), self.lambda_k1.float()))
        second = torch.exp(torch.dot(self.lambda_q2.float(), self.lambda_k2.float()))
        return first - second + self.lambda_init

    def forms(self, device: torch.device, dtype: torch.dtype) -> list[str]:
        """What a GPU chooses `form` from by measurement. The first is what the others are compared with."""
        return usable(CANDIDATES, device, dtype, self.head_dim)

    def forward(self, x_BND: Tensor, queries: int | None = None) -> Tensor:
        return self.dropout(self.proj(self.heads_output(x_BND, queries)))

    def heads_output(self, x_BND: Tensor, queries: int | None = None) -> Tensor:
        """Equation 3: the heads' outputs side by side, of the first so many tokens or of all. [B, n, D]"""
        if queries is None and self.form == "triton":
            return self.sub_norm(attend_by_triton(self.qkv, x_BND, 2 * self.pairs, self.lambda_full()))
        if queries is None:
            qkv_BN3D = self.qkv(x_BND).unflatten(-1, (3, -1))
            return self.sub_norm(differential_attention(qkv_BN3D, 2 * self.pairs, self.lambda_full(), self.form))
        o_BPnV = maps(*self._project(x_BND, queries), self.lambda_full())  # of few queries the maps are small
        return self.sub_norm(o_BPnV.transpose(1, 2).flatten(2))

    def logits(self, x_BND: Tensor) -> Tensor:
        """Scores before the softmax, scaled, of all 2P heads. [B, H, N, N]: query, key"""
        q_BNPsE, k_BNPsE, _ = self._project(x_BND)
        q_BHNE, k_BHNE = q_BNPsE.flatten(2, 3).transpose(1, 2), k_BNPsE.flatten(2, 3).transpose(1, 2)
        return q_BHNE @ k_BHNE.mT * self.head_dim**-0.5

    def maps(self, x_BND: Tensor) -> Tensor:
        """The signed difference of each pair's maps, as equation 1 applies it to V, in fp32 or better. [B, P, N, N]"""
        maps_BHNN = softmax_maps(self.logits(x_BND))
        return maps_BHNN[:, 0::2] - self.lambda_full().to(maps_BHNN.dtype) * maps_BHNN[:, 1::2]

    def apply_maps(self, maps_BPNN: Tensor, x_BND: Tensor) -> Tensor:
        """The layer's output where its pairs' maps are these. [B, N, D]"""
        return self.dropout(self.proj(self.sub_norm(apply_to_values(maps_BPNN, self._project(x_BND)[2]))))

    def lambdas(self, x_BND: Tensor) -> Tensor:
        """What the second maps are multiplied with: one number for all. Scalar."""
        return self.lambda_full()

    def _project(self, x_BND: Tensor, queries: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        q_BND, k_BND, v_BND = project(self.qkv, x_BND, queries)
        q_BNPsE, k_BNPsE = (x.unflatten(-1, (self.pairs, 2, self.head_dim)) for x in (q_BND, k_BND))
        return q_BNPsE, k_BNPsE, v_BND.unflatten(-1, (self.pairs, 2 * self.head_dim)).transpose(1, 2)


def vit_differential_cifar100(size: str = "10B") -> VisionTransformer:
    """The CIFAR-100 version: 224 pixels, patch 8, d_model 256, 4 pairs of heads; depth 12, 31 or 63."""
    return build_model("vit_differential", resolve_size(size, "CIFAR-100"), PROTOCOLS["CIFAR-100"])


def vit_differential_bach(size: str = "10B") -> VisionTransformer:
    """The BACH version: 512 pixels, patch 16, d_model 384, 3 pairs of heads; depth 5, 14 or 28."""
    return build_model("vit_differential", resolve_size(size, "BACH"), PROTOCOLS["BACH"])
