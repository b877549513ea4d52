"""AdamW, with weight decay on matrices only."""

from __future__ import annotations

import torch
from torch import nn

from diffvit.protocol import Protocol


def make_optimizer(model: nn.Module, protocol: Protocol) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only: not on biases, norms, lambda vectors, positions or the class token."""
    return adamw(decayed_and_others(model), protocol)


def decayed_and_others(model: nn.Module) -> list[list[nn.Parameter]]:
    """Parameters with weight decay, and those without."""
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim > 1 and not name.endswith(("pos_embed", "cls_token"))
        (decayed if is_matrix else others).append(parameter)
    return [decayed, others]


def adamw(groups: list[list[nn.Parameter]], protocol: Protocol) -> torch.optim.AdamW:
    """The optimiser of parameters with weight decay and of those without."""
    decays = zip(groups, (protocol.weight_decay, 0.0), strict=True)
    return torch.optim.AdamW([{"params": group, "weight_decay": decay} for group, decay in decays], lr=protocol.lr, fused=True)
