"""Classic ViT with half the heads, each of double width: a control for the differential arm.

Differential attention pairs its heads, and so has half as many outputs of double width. Whether its gain comes from the
subtraction or from the wider heads is what a reviewer asks (github.com/microsoft/unilm, issue 1716): this architecture
has the wide heads without the subtraction, and the classic one's parameters to the last.
"""

from __future__ import annotations

from diffvit.vit_classic import Attention


class WideHeadsAttention(Attention):
    """Multi-head self-attention with heads / 2 heads of dimension 2 d_model / heads. [B, N, D] -> [B, N, D]

    Raises:
        ValueError: an odd number of heads.
    """

    def __init__(self, d_model: int, heads: int, layer: int, dropout: float):
        if heads % 2:
            raise ValueError(f"wide heads take the place of two each: {heads} is odd")
        super().__init__(d_model, heads // 2, layer, dropout)
