"""AdamW, with weight decay on matrices only."""

from __future__ import annotations

import torch
from torch import nn

from diffvit.protocol import Protocol


def make_optimizer(model: nn.Module, protocol: Protocol) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only: not on biases, norms, lambda vectors, positions or the class token."""
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim > 1 and not name.endswith(("pos_embed", "cls_token"))
        (decayed if is_matrix else others).append(parameter)
    groups = [{"params": decayed, "weight_decay": protocol.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=protocol.lr, fused=True)
