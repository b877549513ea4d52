"""Differential ViT V2: a second differential attention in the blocks of vit.py.

There is no paper. Its authors describe it in "Differential Transformer V2" (Microsoft, January 2026,
huggingface.co/blog/microsoft/diff-attn-v2). With equal weights, the rows of the queries permuted, the layer equals their code
(microsoft/unilm, Diff-Transformer/Diff-Transformer-V2/multihead_flashdiffv2.py, without rotation and mask) to 1e-14 in fp64. Other
than theirs, queries, keys, values and the output have biases, as the classic layer has here, and each head has its own keys and values.

    O_i = softmax(Q_i1 K_i' / sqrt(E)) V_i - sigmoid(x W_lambda)_i softmax(Q_i2 K_i' / sqrt(E)) V_i

There are H outputs, as many as the classic layer has heads, each from two query heads that share their key and value. So
both softmaxes are of full head dimension, lambda is a number of its own for each token and head, and neither a norm nor a
constant part of lambda is needed.

Queries are twice the classic layer's, which is paid for with a narrower MLP: the parameter counts agree within 1 %.

Shapes in names: B batch, N tokens, D d_model, H heads, 2N two queries a token, E head dimension.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffvit.kernels.dropout import Dropout
from diffvit.vit import apply_to_values, softmax_maps


class LambdaProjection(nn.Linear):
    """The logits of lambda for each token and head, without a bias. [B, N, D] -> [B, N, H]"""

    def __init__(self, d_model: int, heads: int):
        super().__init__(d_model, heads, bias=False)

    @staticmethod
    def initialise_parameter(name: str, value: Tensor, generator: torch.Generator) -> None:
        """Uniform with a standard deviation of 1 / sqrt(3 D), which is torch's default for linear layers and so the authors'."""
        value.uniform_(-(value.shape[1] ** -0.5), value.shape[1] ** -0.5, generator=generator)


class DifferentialAttentionV2(nn.Module):
    """Multi-head differential attention, second version. [B, N, D] -> [B, N, D]

    The rows of qkv are Q1, K, V and Q2: the first three are the classic layer's and start with its values.
    """

    def __init__(self, d_model: int, heads: int, layer: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(d_model, 4 * d_model)
        self.lambda_proj = LambdaProjection(d_model, heads)
        self.proj = nn.Linear(d_model, d_model)
        self.dropout = Dropout(dropout)

    @staticmethod
    def mlp_hidden(d_model: int, heads: int, mlp_ratio: int) -> int:
        """The MLP's hidden width that keeps the classic block's parameters, to the nearest multiple of 8, which GPUs are fast at."""
        more_in_attention = d_model * (d_model + 1 + heads)  # the second queries and lambda
        one_hidden_unit = 2 * d_model + 1
        return 8 * round((mlp_ratio * d_model - more_in_attention / one_hidden_unit) / 8)

    @staticmethod
    def map_flops(d_model: int, tokens: int, queries: int | None = None) -> int:
        """FLOPs of one layer's two maps and their two products with V, for one image."""
        return 8 * (queries or tokens) * tokens * d_model

    def form_on(self, device: str, dtype: torch.dtype, tokens: int) -> str:
        """The computation that forward does there, for the record."""
        return "sdpa, one call"

    def forms(self, device: torch.device, dtype: torch.dtype) -> list[str]:
        """There is nothing to choose from."""
        return []

    def forward(self, x_BND: Tensor, queries: int | None = None) -> Tensor:
        return self.dropout(self.proj(self.heads_output(x_BND, queries)))

    def heads_output(self, x_BND: Tensor, queries: int | None = None) -> Tensor:
        """The heads' outputs side by side, of the first so many tokens or of all. [B, n, D]"""
        q1_BHnE, q2_BHnE, k_BHNE, v_BHNE = self._project(x_BND, queries)
        # Both queries of a token meet the same keys and values, so one call takes them as 2n queries.
        o_BH2nE = F.scaled_dot_product_attention(torch.cat([q1_BHnE, q2_BHnE], dim=2), k_BHNE, v_BHNE)
        first_BHnE, second_BHnE = o_BH2nE.chunk(2, dim=2)
        lambda_BHn1 = self._lambdas(x_BND[:, :queries]).to(first_BHnE.dtype)
        return (first_BHnE - lambda_BHn1 * second_BHnE).transpose(1, 2).flatten(2)

    def logits(self, x_BND: Tensor) -> Tensor:
        """Scores before the softmax, scaled, of all 2H query heads; neighbours share a key. [B, 2H, N, N]: query, key"""
        q1_BHNE, q2_BHNE, k_BHNE, _ = self._project(x_BND)
        q_BHsNE = torch.stack([q1_BHNE, q2_BHNE], dim=2)
        return (q_BHsNE @ k_BHNE.mT.unsqueeze(2) * q_BHsNE.shape[-1] ** -0.5).flatten(1, 2)

    def maps(self, x_BND: Tensor) -> Tensor:
        """The signed maps whose products with V are the outputs, in fp32 or better. [B, H, N, N]"""
        maps_B2HNN = softmax_maps(self.logits(x_BND))
        return maps_B2HNN[:, 0::2] - self._lambdas(x_BND).to(maps_B2HNN.dtype) * maps_B2HNN[:, 1::2]

    def apply_maps(self, maps_BHNN: Tensor, x_BND: Tensor) -> Tensor:
        """The layer's output where its maps are these. [B, N, D]"""
        return self.dropout(self.proj(apply_to_values(maps_BHNN, self._project(x_BND)[3])))

    def lambdas(self, x_BND: Tensor) -> Tensor:
        """What each token's second map is multiplied with, 0 to 1, in fp32 or better. [B, H, N]"""
        return self._lambdas(x_BND).squeeze(-1)

    def _project(self, x_BND: Tensor, queries: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        D = x_BND.shape[-1]
        if queries is None:
            q1_BND, k_BND, v_BND, q2_BND = self.qkv(x_BND).chunk(4, dim=-1)
        else:
            rows, biases = self.qkv.weight.split(D), self.qkv.bias.split(D)
            q1_BND, q2_BND = (F.linear(x_BND[:, :queries], rows[i], biases[i]) for i in (0, 3))
            k_BND, v_BND = F.linear(x_BND, self.qkv.weight[D : 3 * D], self.qkv.bias[D : 3 * D]).chunk(2, dim=-1)
        q1_BHNE, q2_BHNE, k_BHNE, v_BHNE = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q1_BND, q2_BND, k_BND, v_BND))
        return q1_BHNE, q2_BHNE, k_BHNE, v_BHNE

    def _lambdas(self, x_BND: Tensor) -> Tensor:
        logits_BNH = self.lambda_proj(x_BND)
        logits_BNH = logits_BNH.to(torch.promote_types(logits_BNH.dtype, torch.float32))
        return torch.sigmoid(logits_BNH).transpose(1, 2).unsqueeze(-1)
