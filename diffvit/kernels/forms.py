"""Equation 1 of differential attention (arXiv 2410.05258) in several exact forms: equal to rounding, unequal in speed.

    (softmax(Q1 K1' / sqrt(E)) - lambda softmax(Q2 K2' / sqrt(E))) V

None holds a whole map in memory, but for `maps`, which is the equation as it stands and what others are tested against.
`two_calls` and `padded` use that the difference of two maps, applied to V, is the difference of two attention outputs.
`blocks` subtracts the maps first and so multiplies with V once: a third less arithmetic. `triton` does so on the chip.

Shapes in names: B batch, N tokens, P pairs of heads, s which of a pair's two heads, E head dimension, V = 2E value dimension;
R a block's queries; D a block's images times pairs, C = 2D the same for both heads of the pairs, all first ones in front.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffvit.vit import triton_supported

# (q [B, N, P, 2, E], k the same, v [B, P, N, V], lambda, scalar) -> [B, P, N, V]; a classic layer's queries may be fewer than its keys
Equation = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
# (queries, keys and values in one matrix [B, N, 3, D], number of heads, lambda, scalar) -> the pairs' outputs side by side [B, N, D]
Form = Callable[[Tensor, int, Tensor], Tensor]


def differential_attention(qkv_BN3D: Tensor, heads: int, lambda_full: Tensor, form: str | None = None) -> Tensor:
    """Equation 1, the pairs' outputs side by side. [B, N, D], in qkv's dtype

    Args:
        qkv_BN3D: queries, keys and values as a linear layer makes them.
        heads: of queries, D / E; neighbours (2i, 2i+1) form pair i.
        lambda_full: scalar, fp32 or better.
        form: a key of FORMS; default: what default_form says for the device.
    """
    name = form or default_form(qkv_BN3D.device.type, qkv_BN3D.dtype, qkv_BN3D.shape[1])
    return FORMS[name](qkv_BN3D, heads, lambda_full)


# Up to so many tokens whole maps are small, and on a CPU the fastest.
_FEW_TOKENS = 64


def default_form(device: str, dtype: torch.dtype, tokens: int) -> str:
    """The form for a kind of device where none was chosen by measurement (compute.py). The evidence is in docs/performance.md.

    On a CPU `blocks` is the fastest, and `maps` where maps are small. Both are made of operations that a CPU has no fast ones for in
    half precision; there it is `padded`.
    """
    if device != "cpu":
        return "two_calls"
    if dtype not in (torch.float32, torch.float64):
        return "padded"
    return "maps" if tokens <= _FEW_TOKENS else "blocks"


def maps(q_BNPsE: Tensor, k_BNPsE: Tensor, v_BPNV: Tensor, lambda_full: Tensor) -> Tensor:
    """The equation as it stands, with both maps in memory."""
    q_sBPNE, k_sBPNE = _pairs_apart(q_BNPsE), _pairs_apart(k_BNPsE)
    first_BPNN, second_BPNN = torch.softmax(q_sBPNE @ k_sBPNE.mT * q_sBPNE.shape[-1] ** -0.5, dim=-1)
    return _difference(first_BPNN, second_BPNN, lambda_full) @ v_BPNV


def _difference(first: Tensor, second: Tensor, lambda_full: Tensor) -> Tensor:
    """first - lambda second, in their dtype. Lambda is not rounded to that: half precision has 8 bits of it."""
    if first.dtype in (torch.float32, torch.float64):
        return first - lambda_full.to(first.dtype) * second
    return (first - lambda_full.float() * second.float()).to(first.dtype)


def two_calls(q_BNPsE: Tensor, k_BNPsE: Tensor, v_BPNV: Tensor, lambda_full: Tensor) -> Tensor:
    """Two fused calls, with values twice as wide as keys: for devices whose fused kernels take that."""
    scale = q_BNPsE.shape[-1] ** -0.5
    first_BPNV, second_BPNV = (
        F.scaled_dot_product_attention(q_BPNE, k_BPNE, v_BPNV, scale=scale)
        for q_BPNE, k_BPNE in zip(_pairs_apart(q_BNPsE), _pairs_apart(k_BNPsE), strict=True)
    )
    return _difference(first_BPNV, second_BPNV, lambda_full)


def padded(q_BNPsE: Tensor, k_BNPsE: Tensor, v_BPNV: Tensor, lambda_full: Tensor) -> Tensor:
    """Two fused calls of one width: zeros at the end of Q and K leave every product as it is. For kernels that want equal widths."""
    scale = q_BNPsE.shape[-1] ** -0.5
    padding = [0, v_BPNV.shape[-1] - q_BNPsE.shape[-1]]
    first_BPNV, second_BPNV = (
        F.scaled_dot_product_attention(q_BPNV, k_BPNV, v_BPNV, scale=scale)
        for q_BPNV, k_BPNV in zip(_pairs_apart(F.pad(q_BNPsE, padding)), _pairs_apart(F.pad(k_BNPsE, padding)), strict=True)
    )
    return _difference(first_BPNV, second_BPNV, lambda_full)


def four_calls(q_BNPsE: Tensor, k_BNPsE: Tensor, v_BPNV: Tensor, lambda_full: Tensor) -> Tensor:
    """Four fused calls of the classic layer's shape, with V in halves: for flash kernels, which want equal widths."""
    first_BPNV, second_BPNV = (
        torch.cat([F.scaled_dot_product_attention(q_BPNE, k_BPNE, half_BPNE) for half_BPNE in v_BPNV.chunk(2, dim=-1)], dim=-1)
        for q_BPNE, k_BPNE in zip(_pairs_apart(q_BNPsE), _pairs_apart(k_BNPsE), strict=True)
    )
    return _difference(first_BPNV, second_BPNV, lambda_full)


def _pairs_apart(x_BNPsE: Tensor) -> Tensor:
    return x_BNPsE.permute(3, 0, 2, 1, 4)


# ---------------------------------------------------------------------------------------------------------- blocks

# Scores that a block computes at once, both maps together: 4 MB in fp32, which stays in a CPU's cache between the passes over it.
_BLOCK_SCORES = 2**20


def blocks(q_BNPsE: Tensor, k_BNPsE: Tensor, v_BPNV: Tensor, lambda_full: Tensor) -> Tensor:
    """The maps' difference, block by block of queries, times V; the maps are computed again for the backward pass. fp32 and fp64.

    Forward and backward so need the arithmetic of classic attention, and not one and a half times as much.
    """
    return _blocks(_pairs_apart(q_BNPsE), _pairs_apart(k_BNPsE), v_BPNV, lambda_full.to(v_BPNV.dtype))


# Operators of their own, of q and k [s, B, P, N, E], v [B, P, N, V] and lambda, scalar: torch.compile leaves their loops alone.
@torch.library.custom_op("diffvit::blocks", mutates_args=())
def _blocks(q_sBPNE: Tensor, k_sBPNE: Tensor, v_BPNV: Tensor, lambda_full: Tensor) -> Tensor:
    B, P, N, _ = v_BPNV.shape
    out_BPNV = _blocks_like(q_sBPNE, k_sBPNE, v_BPNV, lambda_full)
    for images, rows in _parts(B, P, N):
        k_CNE, v_DNV = _flat(k_sBPNE[:, images]), _flat(v_BPNV[images])
        for queries in rows:
            first_DRN, second_DRN = _maps_of(_flat(q_sBPNE[:, images, :, queries]), k_CNE).chunk(2)
            out_DRV = torch.bmm(torch.addcmul(first_DRN, second_DRN, -lambda_full, out=first_DRN), v_DNV)
            out_BPNV[images, :, queries] = out_DRV.unflatten(0, (-1, P))
    return out_BPNV


@_blocks.register_fake
def _blocks_like(q_sBPNE: Tensor, k_sBPNE: Tensor, v_BPNV: Tensor, lambda_full: Tensor) -> Tensor:
    B, P, N, V = v_BPNV.shape
    return v_BPNV.new_empty(B, N, P, V).transpose(1, 2)  # so that the heads' outputs lie side by side


@torch.library.custom_op("diffvit::blocks_backward", mutates_args=())
def _blocks_backward(
    do_BPNV: Tensor, q_sBPNE: Tensor, k_sBPNE: Tensor, v_BPNV: Tensor, lambda_full: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, P, N, _ = v_BPNV.shape
    scale = q_sBPNE.shape[-1] ** -0.5
    # The second map is subtracted lambda times, and so are the gradients that flow through it.
    sign_s1111 = torch.stack([torch.ones_like(lambda_full), -lambda_full]).view(2, 1, 1, 1, 1)
    dq_sBPNE, dk_sBPNE, dv_BPNV, dlambda = _blocks_backward_like(do_BPNV, q_sBPNE, k_sBPNE, v_BPNV, lambda_full)
    dlambda.zero_()
    for images, rows in _parts(B, P, N):
        k_CNE, v_DNV = _flat(k_sBPNE[:, images]), _flat(v_BPNV[images])
        dk_CNE, dv_DNV = torch.zeros_like(k_CNE), torch.zeros_like(v_DNV)
        for queries in rows:
            q_CRE, do_DRV = _flat(q_sBPNE[:, images, :, queries]), _flat(do_BPNV[images, :, queries])
            a_CRN = _maps_of(q_CRE, k_CNE)
            first_DRN, second_DRN = a_CRN.chunk(2)
            da_DRN = torch.bmm(do_DRV, v_DNV.mT)  # of the difference: one for both maps
            dv_DNV.baddbmm_(torch.addcmul(first_DRN, second_DRN, -lambda_full).mT, do_DRV)
            dlambda -= torch.dot(second_DRN.flatten(), da_DRN.flatten())
            for map_DRN in (first_DRN, second_DRN):  # its memory takes the gradient of its scores
                torch.ops.aten._softmax_backward_data.out(da_DRN, map_DRN, -1, map_DRN.dtype, grad_input=map_DRN)
            dq_sBPNE[:, images, :, queries] = torch.bmm(a_CRN, k_CNE).unflatten(0, (2, -1, P)) * (sign_s1111 * scale)
            dk_CNE.baddbmm_(a_CRN.mT, q_CRE)
        dk_sBPNE[:, images] = dk_CNE.unflatten(0, (2, -1, P)) * (sign_s1111 * scale)
        dv_BPNV[images] = dv_DNV.unflatten(0, (-1, P))
    return dq_sBPNE, dk_sBPNE, dv_BPNV, dlambda


@_blocks_backward.register_fake
def _blocks_backward_like(do_BPNV: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(tensor) for tensor in inputs)


def _keep_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_blocks(ctx: Any, do_BPNV: Tensor) -> tuple[Tensor, ...]:
    return _blocks_backward(do_BPNV, *ctx.saved_tensors)


_blocks.register_autograd(_differentiate_blocks, setup_context=_keep_inputs)


def _parts(images: int, pairs: int, tokens: int) -> Iterator[tuple[slice, list[slice]]]:
    """Slices of images, each with slices of queries, whose scores fit into a block."""
    rows = max(1, min(tokens, _BLOCK_SCORES // (2 * pairs * tokens)))
    at_once = max(1, _BLOCK_SCORES // (2 * pairs * tokens * tokens)) if rows == tokens else 1
    for first in range(0, images, at_once):
        yield slice(first, first + at_once), [slice(row, row + rows) for row in range(0, tokens, rows)]


def _flat(x: Tensor) -> Tensor:
    """All dimensions before the last two as one, without gaps: what a batched product is fastest on."""
    return x.reshape(-1, *x.shape[-2:]).contiguous()


def _maps_of(q_CRE: Tensor, k_CNE: Tensor) -> Tensor:
    """Both maps of a block. [C, R, N]"""
    scores_CRN = torch.bmm(q_CRE * q_CRE.shape[-1] ** -0.5, k_CNE.mT)
    return torch.softmax(scores_CRN, dim=-1, out=scores_CRN)


# ----------------------------------------------------------------------------------------------------------- the table


def of_matrix(equation: Equation) -> Form:
    """The form that takes queries, keys and values out of their matrix for an equation."""

    def form(qkv_BN3D: Tensor, heads: int, lambda_full: Tensor) -> Tensor:
        q_BND, k_BND, v_BND = qkv_BN3D.unbind(2)
        q_BNPsE, k_BNPsE = (x.unflatten(-1, (heads // 2, 2, -1)) for x in (q_BND, k_BND))
        o_BPNV = equation(q_BNPsE, k_BNPsE, v_BND.unflatten(-1, (heads // 2, -1)).transpose(1, 2), lambda_full)
        return o_BPNV.transpose(1, 2).flatten(2)

    return form


def triton(qkv_BN3D: Tensor, heads: int, lambda_full: Tensor) -> Tensor:
    """One kernel forward and two backward, for GPUs: attention_triton.py, imported where it is used, for not every system has Triton.

    Raises:
        ImportError: there is no Triton.
        ValueError: there are no kernels for this.
    """
    from diffvit.kernels.attention_triton import attend

    return attend(qkv_BN3D, heads, lambda_full)


FORMS: dict[str, Form] = {
    "maps": of_matrix(maps),
    "two_calls": of_matrix(two_calls),
    "padded": of_matrix(padded),
    "four_calls": of_matrix(four_calls),
    "blocks": of_matrix(blocks),
    "triton": triton,
}

# What a GPU chooses from by measurement. The first is what the others are compared with.
CANDIDATES = ("two_calls", "padded", "four_calls", "triton")


def usable(forms: Iterable[str], device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
    """Those of the forms that can be tried on a device: `triton` only where it is installed and has kernels."""
    return [form for form in forms if form != "triton" or triton_supported(device, dtype, head_dim, maps=2)]
