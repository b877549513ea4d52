"""Forms of attention as functions of queries, keys and values apart, which tests vary one by one."""

from __future__ import annotations

import torch
from torch import Tensor

from diffvit.kernels.forms import differential_attention


def by_form(q_BNPsE: Tensor, k_BNPsE: Tensor, v_BPNV: Tensor, lambda_full: Tensor, form: str | None = None) -> Tensor:
    """Equation 1 in a form. [B, P, N, V]"""
    v_BND = v_BPNV.transpose(1, 2).flatten(2)
    qkv_BN3D = torch.stack([q_BNPsE.flatten(2), k_BNPsE.flatten(2), v_BND], dim=2)
    out_BND = differential_attention(qkv_BN3D, 2 * v_BPNV.shape[1], lambda_full, form)
    return out_BND.unflatten(-1, (v_BPNV.shape[1], -1)).transpose(1, 2)
