"""Sigmoid attention (arXiv 2409.04431): each weight is a sigmoid of its own, with a bias of -log N, instead of a softmax over keys."""

import math

import torch
from torch import Tensor

from diffvit.vit_classic import Attention


class SigmoidAttention(Attention):
    """The classic layer with sigmoid(Q K' / sqrt(E) - log N) in place of its softmax. [B, N, D] -> [B, N, D]"""

    def heads_output(self, x_BND: Tensor, queries: int | None = None) -> Tensor:
        """The heads' outputs side by side, of the first so many tokens or of all. [B, n, D]"""
        q_BHNE, k_BHNE, v_BHNE = self.project(x_BND, queries)
        scores_BHNN = q_BHNE @ k_BHNE.mT * q_BHNE.shape[-1] ** -0.5
        return (self.weights(scores_BHNN) @ v_BHNE).transpose(1, 2).flatten(2)

    def maps(self, x_BND: Tensor) -> Tensor:
        """The weights, for `evaluate --attention`. [B, H, N, N]"""
        return self.weights(self.logits(x_BND))

    def weights(self, scores_BHNN: Tensor) -> Tensor:
        """A weight for every score. With the bias a row of N equal scores of 0 starts with a sum of about 1."""
        return torch.sigmoid(scores_BHNN - math.log(scores_BHNN.shape[-1]))
