"""A model's blocks with fused_triton.py's kernels between their matrix products: what a GPU computes.

The same as Block.forward, to rounding, and with the same dropout masks, in fewer passes over memory. A block's last residual connection
and the next one's first norm are one kernel, so what goes from block to block is the residual stream and its norm.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from diffvit.kernels.dropout import Dropout, key_on
from diffvit.kernels.fused_triton import mlp, residual_norm

if TYPE_CHECKING:
    from diffvit.vit import AttentionLayer, Block


def blocks_but_last(blocks: Sequence[nn.Module], x_BND: Tensor, run: Callable[..., Any]) -> tuple[Tensor, Tensor]:
    """The last block's input, and norm1 of it. [B, N, D] both

    Args:
        x_BND: the first block's input.
        run: calls a function with its arguments, or does so under activation checkpointing.
    """
    stream_BND = x_BND.float()
    normed_BND = cast("Block", blocks[0]).norm1(stream_BND)
    for each, following in itertools.pairwise(blocks):
        stream_BND, normed_BND = run(block_and_norm, each, cast("Block", following).norm1, stream_BND, normed_BND)
    return stream_BND, normed_BND


def block_and_norm(block: Block, next_norm: nn.LayerNorm, stream_BND: Tensor, normed_BND: Tensor) -> tuple[Tensor, Tensor]:
    """A block's output, and the following norm of it, from the block's input and norm1 of it. [B, N, D] all"""
    attention: Any = block.attn
    heads_BND = cast("AttentionLayer", attention).heads_output(normed_BND)
    branch_BND = F.linear(heads_BND, attention.proj.weight)
    stream_BND, normed_BND = _residual_norm(stream_BND, branch_BND, attention.proj, attention.dropout, block.norm2)
    fc1, fc2, dropout = block.mlp.fc1, block.mlp.fc2, block.mlp.hidden_dropout
    dtype, key = normed_BND.dtype, key_on(stream_BND.device)
    branch_BND = mlp(normed_BND, fc1.weight.to(dtype), fc1.bias, fc2.weight.to(dtype), key, dropout.site, _rate(dropout))
    return _residual_norm(stream_BND, branch_BND, fc2, block.mlp.dropout, next_norm)


def _residual_norm(
    stream_BND: Tensor, branch_BND: Tensor, linear: nn.Linear, dropout: Dropout, norm: nn.LayerNorm
) -> tuple[Tensor, Tensor]:
    """The sum of stream and branch, and the norm of it. The branch is what a linear layer made, without its bias."""
    return residual_norm(
        stream_BND, branch_BND, linear.bias, norm.weight, norm.bias,
        key_on(stream_BND.device), dropout.site, _rate(dropout), norm.eps,
    )  # fmt: skip


def _rate(dropout: Dropout) -> float:
    return dropout.p if dropout.training else 0.0
