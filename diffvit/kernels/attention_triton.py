"""Attention of both architectures as Triton kernels, forward and backward, that hold no map in memory.

Classic:       O = A V
Differential:  O = (A1 - lambda A2) V              equation 1 of arXiv 2410.05258, lambda in fp32
with           As = softmax(Qs Ks' / sqrt(E))

Forward: one pass over the keys with the running maximum and sum of each softmax, so that keys and values are read once; as the
two maps of a pair have different sums, A1 V and A2 V are accumulated apart and subtracted on the chip. Kept for the backward
pass: the logarithms of the sums, and A2 V, for O alone does not give the two row sums below.

Backward, with dP = dO V', which is one for both maps, and the maps computed again from their logarithms:

    delta_s = rowsum(As * dP) = rowsum(dO * As V),  A1 V = O + lambda A2 V
    dS1 = A1 * (dP - delta_1),  dS2 = -lambda A2 * (dP - delta_2),  dQs = dSs Ks / sqrt(E),  dKs = dSs' Qs / sqrt(E)
    dV = (A1 - lambda A2)' dO,  dlambda = -sum(delta_2)

A bias of queries, keys and values has the sum of their gradients. As the rows of a map add up to 1 and those of dS to 0, that of the
values' is (1 - lambda) times the sum of dO, and that of the keys' is 0: other forms give rounding noise there, of which AdamW makes
a walk that no output depends on.

A kernel over queries gives delta and dQ, one over keys dK and dV. There are no atomic operations: the same kernels with the
same block sizes give the same bits. Products take the inputs' dtype (fp32: TF32), all sums are fp32. Queries, keys and values are
read where the linear layer wrote them, and their gradients written where it reads them: nothing is stacked or copied.

Importing this module raises ImportError where Triton is missing. With TRITON_INTERPRET=1 in the environment before the import
it works on the CPU, slowly: that is for tests.

Shapes in names: B batch, N tokens, D d_model, G groups of maps that share values (classic: the heads, differential: the pairs), s which
map of a group, E head dimension, V value dimension, E of a classic head and 2E of a pair; Q a block's queries, K a block's keys.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


def supported(device: torch.device, dtype: torch.dtype, head_dim: int, maps: int) -> bool:
    """Whether there are kernels for this: bf16, fp16 and TF32 on NVIDIA's GPUs from Ampere on; where Triton interprets, fp32 on any.

    Products of full fp32 do not run on tensor cores, and in Triton need more registers than there are: fp32 is supported where
    torch's setting allows TF32.

    Args:
        maps: maps that share values, 1 in classic attention and 2 in differential attention.
    """
    if _INTERPRETED:
        return dtype in (torch.bfloat16, torch.float16, torch.float32) and head_dim in (16, 32, 64, 128)
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    exact = dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return bool(configs("forward", head_dim, maps, dtype)) and not exact


def attend(qkv_BN3D: Tensor, heads: int, lambda_full: Tensor | None = None, bias_3D: Tensor | None = None) -> Tensor:
    """All heads' outputs side by side, in qkv's dtype: classic attention, or equation 1 where there is a lambda. [B, N, D]

    Differentiable by qkv, lambda and bias, once.

    Args:
        qkv_BN3D: queries, keys and values; within D head after head, neighbours (2i, 2i+1) forming pair i.
        heads: D / E; differential attention pairs them.
        lambda_full: scalar, fp32, on the same device.
        bias_3D: what was added to each token's queries, keys and values, 3D numbers. It is in qkv already; given here, it gets its
            gradient, the sum of qkv's over tokens, where that passes anyway.

    Raises:
        ValueError: shapes that do not fit together, or a dtype, head dimension or device that there are no kernels for.
    """
    shape, maps = list(qkv_BN3D.shape), 1 if lambda_full is None else 2
    if qkv_BN3D.ndim != 4 or shape[2] != 3 or heads < 1 or shape[3] % heads or heads % maps:
        raise ValueError(f"qkv must be [B, N, 3, D] with D in {heads} heads, not {shape}")
    if lambda_full is not None and (lambda_full.numel() != 1 or lambda_full.device != qkv_BN3D.device):
        raise ValueError(f"lambda must be one number on {qkv_BN3D.device}, not {list(lambda_full.shape)} on {lambda_full.device}")
    if bias_3D is not None and bias_3D.numel() != 3 * shape[3]:
        raise ValueError(f"the bias of qkv must be {3 * shape[3]} numbers, not {list(bias_3D.shape)}")
    if not qkv_BN3D.numel():
        raise ValueError("there is nothing to attend to: qkv is empty")
    return _attend(qkv_BN3D, lambda_full, bias_3D, heads, torch.is_grad_enabled())[0]


# --------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _dot(a, b, total):
    """The product in b's dtype, plus total, in fp32."""
    a = a.to(b.dtype)
    if _INTERPRETED:  # Triton's interpreter multiplies bf16 wrongly; in fp32 such products are exact
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="tf32")


@triton.jit
def _load(at, inside, MASKED: tl.constexpr, OTHER: tl.constexpr = 0.0):
    """What lies there; OTHER outside of the tensor. Masks cost time, so only where they are needed."""
    if MASKED:
        return tl.load(at, mask=inside, other=OTHER)
    else:
        return tl.load(at)


@triton.jit
def _softmax_step(s_QK, top_Q, sum_Q, to_log2):
    """One block of keys in a running softmax: its weights, the new maximum and sum, and what earlier results are multiplied with."""
    new_top_Q = tl.maximum(top_Q, tl.max(s_QK, 1) * to_log2)
    a_QK = tl.exp2(s_QK * to_log2 - new_top_Q[:, None])
    shrink_Q = tl.exp2(top_Q - new_top_Q)
    return a_QK, new_top_Q, sum_Q * shrink_Q + tl.sum(a_QK, 1), shrink_Q


@triton.jit
def _forward_step(
    q1_QE, q2_QE, k_ptr, v_ptr, first, o1_QV, o2_QV, top1_Q, top2_Q, sum1_Q, sum2_Q, to_log2, row,
    N: tl.constexpr, E: tl.constexpr, MAPS: tl.constexpr, BLOCK_K: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """The keys from `first` on. Only the last ones (TAIL) need masks.

    All loads of a step stand before its first product, here and below: Triton 3.6 mixes the others up in its pipeline. With loads
    between products it gave wrong gradients on an H200, and illegal addresses.
    """
    n_K = first + tl.arange(0, BLOCK_K)
    inside_K = n_K < N
    k_at = k_ptr + n_K[None, :] * row + tl.arange(0, E)[:, None]
    k1_EK = _load(k_at, inside_K[None, :], TAIL)
    if MAPS == 2:
        k2_EK = _load(k_at + E, inside_K[None, :], TAIL)
    v_KV = _load(v_ptr + n_K[:, None] * row + tl.arange(0, MAPS * E)[None, :], inside_K[:, None], TAIL)
    s_QK = _dot(q1_QE, k1_EK, None)
    if TAIL:
        s_QK = tl.where(inside_K[None, :], s_QK, -float("inf"))
    if MAPS == 2:
        s2_QK = _dot(q2_QE, k2_EK, None)
        if TAIL:
            s2_QK = tl.where(inside_K[None, :], s2_QK, -float("inf"))
    a_QK, top1_Q, sum1_Q, shrink_Q = _softmax_step(s_QK, top1_Q, sum1_Q, to_log2)
    o1_QV = _dot(a_QK, v_KV, o1_QV * shrink_Q[:, None])
    if MAPS == 2:
        a2_QK, top2_Q, sum2_Q, shrink2_Q = _softmax_step(s2_QK, top2_Q, sum2_Q, to_log2)
        o2_QV = _dot(a2_QK, v_KV, o2_QV * shrink2_Q[:, None])
    return o1_QV, o2_QV, top1_Q, top2_Q, sum1_Q, sum2_Q


@triton.jit
def forward_kernel(
    qkv_ptr, lambda_ptr, out_ptr, second_ptr, log_sum_ptr, D, G, to_log2,
    N: tl.constexpr, E: tl.constexpr, MAPS: tl.constexpr, FOR_BACKWARD: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A block of queries of one group: out and second (A2 V) [B, N, D], log_sum [B, G, s, N] to base 2."""
    blocks: tl.constexpr = (N + BLOCK_Q - 1) // BLOCK_Q
    V: tl.constexpr = MAPS * E
    row = 3 * D
    group = tl.program_id(0) // blocks
    b = (group // G).to(tl.int64)  # a batch may have more than 2^31 elements
    qkv_ptr += b * N * row + group % G * V
    n_Q = tl.program_id(0) % blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside_Q = n_Q < N
    q_at = qkv_ptr + n_Q[:, None] * row + tl.arange(0, E)[None, :]
    q1_QE = tl.load(q_at, mask=inside_Q[:, None], other=0.0)
    q2_QE = q1_QE
    if MAPS == 2:
        q2_QE = tl.load(q_at + E, mask=inside_Q[:, None], other=0.0)

    o1_QV = tl.zeros([BLOCK_Q, V], tl.float32)
    o2_QV = tl.zeros([BLOCK_Q, V], tl.float32)
    top1_Q = tl.full([BLOCK_Q], -float("inf"), tl.float32)
    top2_Q = tl.full([BLOCK_Q], -float("inf"), tl.float32)
    sum1_Q = tl.zeros([BLOCK_Q], tl.float32)
    sum2_Q = tl.zeros([BLOCK_Q], tl.float32)
    whole: tl.constexpr = N // BLOCK_K * BLOCK_K
    REST: tl.constexpr = 16 if N - whole <= 16 else (32 if N - whole <= 32 else BLOCK_K)
    for first in range(0, whole, BLOCK_K):
        o1_QV, o2_QV, top1_Q, top2_Q, sum1_Q, sum2_Q = _forward_step(
            q1_QE, q2_QE, qkv_ptr + D, qkv_ptr + 2 * D, first, o1_QV, o2_QV, top1_Q, top2_Q, sum1_Q, sum2_Q, to_log2, row,
            N, E, MAPS, BLOCK_K, False,
        )  # fmt: skip
    if whole < N:
        o1_QV, o2_QV, top1_Q, top2_Q, sum1_Q, sum2_Q = _forward_step(
            q1_QE, q2_QE, qkv_ptr + D, qkv_ptr + 2 * D, whole, o1_QV, o2_QV, top1_Q, top2_Q, sum1_Q, sum2_Q, to_log2, row,
            N, E, MAPS, REST, True,
        )  # fmt: skip

    out_QV = o1_QV / sum1_Q[:, None]
    at_QV = n_Q[:, None] * D + tl.arange(0, V)[None, :]
    out_ptr += b * N * D + group % G * V
    if FOR_BACKWARD:
        log_sum_ptr += group.to(tl.int64) * MAPS * N
        tl.store(log_sum_ptr + n_Q, top1_Q + tl.log2(sum1_Q), mask=inside_Q)
    if MAPS == 2:
        o2_QV = o2_QV / sum2_Q[:, None]
        out_QV -= tl.load(lambda_ptr).to(tl.float32) * o2_QV
        if FOR_BACKWARD:
            tl.store(second_ptr + b * N * D + group % G * V + at_QV, o2_QV.to(second_ptr.dtype.element_ty), mask=inside_Q[:, None])
            tl.store(log_sum_ptr + N + n_Q, top2_Q + tl.log2(sum2_Q), mask=inside_Q)
    tl.store(out_ptr + at_QV, out_QV.to(out_ptr.dtype.element_ty), mask=inside_Q[:, None])


@triton.jit
def _queries_step(
    q1_QE, q2_QE, do_QV, k_ptr, v_ptr, first, dq1_QE, dq2_QE, log1_Q, log2_Q, delta1_Q, delta2_Q, to_log2, row,
    N: tl.constexpr, E: tl.constexpr, MAPS: tl.constexpr, BLOCK_K: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    n_K = first + tl.arange(0, BLOCK_K)
    inside_K = n_K < N
    k_at = k_ptr + n_K[:, None] * row + tl.arange(0, E)[None, :]
    k1_KE = _load(k_at, inside_K[:, None], TAIL)
    if MAPS == 2:
        k2_KE = _load(k_at + E, inside_K[:, None], TAIL)
    v_KV = _load(v_ptr + n_K[:, None] * row + tl.arange(0, MAPS * E)[None, :], inside_K[:, None], TAIL)
    da_QK = _dot(do_QV, tl.trans(v_KV), None)
    a1_QK = tl.exp2(_dot(q1_QE, tl.trans(k1_KE), None) * to_log2 - log1_Q[:, None])
    if TAIL:  # a key that is not there has the score 0, and the weight that goes with it may be infinite
        a1_QK = tl.where(inside_K[None, :], a1_QK, 0.0)
    dq1_QE = _dot(a1_QK * (da_QK - delta1_Q[:, None]), k1_KE, dq1_QE)
    if MAPS == 2:
        a2_QK = tl.exp2(_dot(q2_QE, tl.trans(k2_KE), None) * to_log2 - log2_Q[:, None])
        if TAIL:
            a2_QK = tl.where(inside_K[None, :], a2_QK, 0.0)
        dq2_QE = _dot(a2_QK * (da_QK - delta2_Q[:, None]), k2_KE, dq2_QE)
    return dq1_QE, dq2_QE


@triton.jit
def queries_kernel(
    do_ptr, qkv_ptr, lambda_ptr, out_ptr, second_ptr, log_sum_ptr, delta_ptr, dqkv_ptr, dbias_ptr, D, G, to_log2, scale,
    N: tl.constexpr, E: tl.constexpr, MAPS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A block of queries of one group: delta [B, G, s, N], the queries' part of dqkv [B, N, 3, D]; dbias [2, D], a row a block."""
    blocks: tl.constexpr = (N + BLOCK_Q - 1) // BLOCK_Q
    V: tl.constexpr = MAPS * E
    row = 3 * D
    group = tl.program_id(0) // blocks
    b = (group // G).to(tl.int64)
    n_Q = tl.program_id(0) % blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside_Q = n_Q < N
    qkv_ptr += b * N * row + group % G * V
    dqkv_ptr += b * N * row + group % G * V
    to_group = b * N * D + group % G * V
    at_QV = n_Q[:, None] * D + tl.arange(0, V)[None, :]
    do_QV = tl.load(do_ptr + to_group + at_QV, mask=inside_Q[:, None], other=0.0)
    dbias_V = tl.sum(do_QV.to(tl.float32), 0)
    delta1_Q = tl.sum(do_QV.to(tl.float32) * tl.load(out_ptr + to_group + at_QV, mask=inside_Q[:, None], other=0.0).to(tl.float32), 1)
    at_Q = group.to(tl.int64) * MAPS * N + n_Q
    log1_Q = tl.load(log_sum_ptr + at_Q, mask=inside_Q, other=float("inf"))
    log2_Q = log1_Q
    delta2_Q = delta1_Q
    at_QE = n_Q[:, None] * row + tl.arange(0, E)[None, :]
    q1_QE = tl.load(qkv_ptr + at_QE, mask=inside_Q[:, None], other=0.0)
    q2_QE = q1_QE
    if MAPS == 2:
        lambda_full = tl.load(lambda_ptr).to(tl.float32)
        delta2_Q = tl.sum(
            do_QV.to(tl.float32) * tl.load(second_ptr + to_group + at_QV, mask=inside_Q[:, None], other=0.0).to(tl.float32), 1
        )
        delta1_Q += lambda_full * delta2_Q
        tl.store(delta_ptr + at_Q + N, delta2_Q, mask=inside_Q)
        log2_Q = tl.load(log_sum_ptr + at_Q + N, mask=inside_Q, other=float("inf"))
        q2_QE = tl.load(qkv_ptr + at_QE + E, mask=inside_Q[:, None], other=0.0)
        dbias_V *= 1.0 - lambda_full
    tl.store(delta_ptr + at_Q, delta1_Q, mask=inside_Q)
    if dbias_ptr is not None:
        at_block = (b * blocks + tl.program_id(0) % blocks) * 2 * D + group % G * V
        tl.store(dbias_ptr + at_block + D + tl.arange(0, V), dbias_V)
    k_ptr = qkv_ptr + D

    dq1_QE = tl.zeros([BLOCK_Q, E], tl.float32)
    dq2_QE = tl.zeros([BLOCK_Q, E], tl.float32)
    whole: tl.constexpr = N // BLOCK_K * BLOCK_K
    REST: tl.constexpr = 16 if N - whole <= 16 else (32 if N - whole <= 32 else BLOCK_K)
    for first in range(0, whole, BLOCK_K):
        dq1_QE, dq2_QE = _queries_step(
            q1_QE, q2_QE, do_QV, k_ptr, k_ptr + D, first, dq1_QE, dq2_QE, log1_Q, log2_Q, delta1_Q, delta2_Q, to_log2, row,
            N, E, MAPS, BLOCK_K, False,
        )  # fmt: skip
    if whole < N:
        dq1_QE, dq2_QE = _queries_step(
            q1_QE, q2_QE, do_QV, k_ptr, k_ptr + D, whole, dq1_QE, dq2_QE, log1_Q, log2_Q, delta1_Q, delta2_Q, to_log2, row,
            N, E, MAPS, REST, True,
        )  # fmt: skip

    dq1_QE *= scale
    tl.store(dqkv_ptr + at_QE, dq1_QE.to(dqkv_ptr.dtype.element_ty), mask=inside_Q[:, None])
    if MAPS == 2:
        dq2_QE *= -lambda_full * scale
        tl.store(dqkv_ptr + at_QE + E, dq2_QE.to(dqkv_ptr.dtype.element_ty), mask=inside_Q[:, None])
    if dbias_ptr is not None:
        tl.store(dbias_ptr + at_block + tl.arange(0, E), tl.sum(dq1_QE, 0))
        if MAPS == 2:
            tl.store(dbias_ptr + at_block + E + tl.arange(0, E), tl.sum(dq2_QE, 0))


@triton.jit
def _keys_step(
    k1_KE, k2_KE, v_KV, do_ptr, q_ptr, log_sum_ptr, delta_ptr, first, dk1_KE, dk2_KE, dv_KV, lambda_full, to_log2, D, row,
    N: tl.constexpr, E: tl.constexpr, MAPS: tl.constexpr, BLOCK_Q: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    n_Q = first + tl.arange(0, BLOCK_Q)
    inside_Q = n_Q < N
    q_at = q_ptr + n_Q[:, None] * row + tl.arange(0, E)[None, :]
    q1_QE = _load(q_at, inside_Q[:, None], TAIL)
    if MAPS == 2:
        q2_QE = _load(q_at + E, inside_Q[:, None], TAIL)
    do_QV = _load(do_ptr + n_Q[:, None] * D + tl.arange(0, MAPS * E)[None, :], inside_Q[:, None], TAIL)
    # A query that is not there has an infinite sum, so all its weights are 0.
    log1_Q = _load(log_sum_ptr + n_Q, inside_Q, TAIL, float("inf"))
    delta1_Q = _load(delta_ptr + n_Q, inside_Q, TAIL)
    if MAPS == 2:
        log2_Q = _load(log_sum_ptr + N + n_Q, inside_Q, TAIL, float("inf"))
        delta2_Q = _load(delta_ptr + N + n_Q, inside_Q, TAIL)
    a1_KQ = tl.exp2(_dot(k1_KE, tl.trans(q1_QE), None) * to_log2 - log1_Q[None, :])
    a_KQ = a1_KQ
    if MAPS == 2:
        a2_KQ = tl.exp2(_dot(k2_KE, tl.trans(q2_QE), None) * to_log2 - log2_Q[None, :])
        a_KQ = a1_KQ - lambda_full * a2_KQ
    dv_KV = _dot(a_KQ, do_QV, dv_KV)
    da_KQ = _dot(v_KV, tl.trans(do_QV), None)
    dk1_KE = _dot(a1_KQ * (da_KQ - delta1_Q[None, :]), q1_QE, dk1_KE)
    if MAPS == 2:
        dk2_KE = _dot(a2_KQ * (da_KQ - delta2_Q[None, :]), q2_QE, dk2_KE)
    return dk1_KE, dk2_KE, dv_KV


@triton.jit
def keys_kernel(
    do_ptr, qkv_ptr, lambda_ptr, log_sum_ptr, delta_ptr, dqkv_ptr, D, G, to_log2, scale,
    N: tl.constexpr, E: tl.constexpr, MAPS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A block of keys of one group: the keys' and values' part of dqkv [B, N, 3, D]."""
    blocks: tl.constexpr = (N + BLOCK_K - 1) // BLOCK_K
    V: tl.constexpr = MAPS * E
    row = 3 * D
    group = tl.program_id(0) // blocks
    b = (group // G).to(tl.int64)
    n_K = tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    inside_K = n_K < N
    qkv_ptr += b * N * row + group % G * V
    dqkv_ptr += b * N * row + group % G * V
    at_KE = D + n_K[:, None] * row + tl.arange(0, E)[None, :]
    at_KV = 2 * D + n_K[:, None] * row + tl.arange(0, V)[None, :]
    k1_KE = tl.load(qkv_ptr + at_KE, mask=inside_K[:, None], other=0.0)
    v_KV = tl.load(qkv_ptr + at_KV, mask=inside_K[:, None], other=0.0)
    k2_KE = k1_KE
    lambda_full = 0.0
    if MAPS == 2:
        k2_KE = tl.load(qkv_ptr + at_KE + E, mask=inside_K[:, None], other=0.0)
        lambda_full = tl.load(lambda_ptr).to(tl.float32)
    do_ptr += b * N * D + group % G * V
    log_sum_ptr += group.to(tl.int64) * MAPS * N
    delta_ptr += group.to(tl.int64) * MAPS * N

    dk1_KE = tl.zeros([BLOCK_K, E], tl.float32)
    dk2_KE = tl.zeros([BLOCK_K, E], tl.float32)
    dv_KV = tl.zeros([BLOCK_K, V], tl.float32)
    whole: tl.constexpr = N // BLOCK_Q * BLOCK_Q
    REST: tl.constexpr = 16 if N - whole <= 16 else (32 if N - whole <= 32 else BLOCK_Q)
    for first in range(0, whole, BLOCK_Q):
        dk1_KE, dk2_KE, dv_KV = _keys_step(
            k1_KE, k2_KE, v_KV, do_ptr, qkv_ptr, log_sum_ptr, delta_ptr, first, dk1_KE, dk2_KE, dv_KV, lambda_full, to_log2,
            D, row, N, E, MAPS, BLOCK_Q, False,
        )  # fmt: skip
    if whole < N:
        dk1_KE, dk2_KE, dv_KV = _keys_step(
            k1_KE, k2_KE, v_KV, do_ptr, qkv_ptr, log_sum_ptr, delta_ptr, whole, dk1_KE, dk2_KE, dv_KV, lambda_full, to_log2,
            D, row, N, E, MAPS, REST, True,
        )  # fmt: skip

    tl.store(dqkv_ptr + at_KE, (dk1_KE * scale).to(dqkv_ptr.dtype.element_ty), mask=inside_K[:, None])
    if MAPS == 2:
        tl.store(dqkv_ptr + at_KE + E, (dk2_KE * (-lambda_full * scale)).to(dqkv_ptr.dtype.element_ty), mask=inside_K[:, None])
    tl.store(dqkv_ptr + at_KV, dv_KV.to(dqkv_ptr.dtype.element_ty), mask=inside_K[:, None])


# ----------------------------------------------------------------------------------------------------------- block sizes


# Maps and head dimension -> queries and keys in a block, warps, stages of the pipeline. Of each list one spills no register, the first
# one on sm_80. Wider heads, or wider numbers, do not fit. All fit into the shared memory of sm_89. tests/test_attention_triton.py
# compiles them.
_HALF = {
    ("forward", 2, 16): [(64, 64, 4, 2), (128, 32, 8, 3), (128, 64, 8, 2)],
    ("forward", 2, 32): [(64, 32, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3), (128, 32, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3)],
    ("forward", 2, 64): [(32, 64, 8, 2), (64, 32, 4, 3), (64, 64, 8, 2), (128, 16, 8, 2), (128, 32, 8, 2)],
    ("queries", 2, 16): [(64, 64, 4, 2), (128, 64, 8, 2)],
    ("queries", 2, 32): [(64, 32, 4, 2), (64, 32, 4, 3), (64, 64, 4, 3), (128, 32, 8, 2), (128, 64, 8, 2)],
    ("queries", 2, 64): [(32, 64, 8, 2), (64, 32, 4, 2), (64, 64, 4, 2), (128, 32, 8, 2), (128, 64, 8, 2)],
    ("keys", 2, 16): [(32, 64, 4, 2), (64, 64, 4, 2), (64, 128, 8, 2)],
    ("keys", 2, 32): [(32, 64, 4, 2), (32, 128, 8, 2), (64, 64, 4, 3), (64, 64, 8, 2)],
    ("keys", 2, 64): [(16, 32, 8, 2), (16, 64, 8, 2), (16, 128, 8, 2), (32, 64, 8, 2)],
    ("forward", 1, 16): [(64, 64, 4, 2), (128, 64, 8, 2)],
    ("forward", 1, 32): [(64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (128, 64, 4, 2), (128, 64, 8, 2), (128, 128, 8, 2)],
    ("forward", 1, 64): [(64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2)],
    ("queries", 1, 16): [(64, 64, 4, 2), (128, 64, 8, 2)],
    ("queries", 1, 32): [(64, 32, 4, 3), (64, 64, 4, 3), (64, 128, 4, 2), (128, 64, 8, 2), (128, 64, 8, 3)],
    ("queries", 1, 64): [(64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3)],
    ("keys", 1, 16): [(64, 64, 4, 2), (64, 128, 8, 2)],
    ("keys", 1, 32): [(32, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 8, 2), (64, 128, 8, 3)],
    ("keys", 1, 64): [(32, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2), (64, 128, 8, 2), (64, 128, 8, 3)],
}
_SINGLE = {
    **{("forward", maps, width): [(64, 32, 4, 2), (128, 32, 8, 2)] for width in (16, 32) for maps in (1, 2)},
    **{("queries", maps, width): [(64, 32, 4, 2), (64, 32, 8, 2)] for width in (16, 32) for maps in (1, 2)},
    **{("keys", maps, width): [(16, 64, 4, 2), (32, 64, 8, 2)] for width, maps in ((16, 1), (16, 2), (32, 1))},
    ("keys", 2, 32): [(16, 64, 4, 2)],
}
KERNELS = {"forward": forward_kernel, "queries": queries_kernel, "keys": keys_kernel}


def configs(kernel: str, head_dim: int, maps: int, dtype: torch.dtype) -> list[triton.Config]:
    """What the autotuner of a kernel, a key of KERNELS, chooses from; nothing where there are no kernels."""
    if _INTERPRETED:
        return [triton.Config({"BLOCK_Q": 32, "BLOCK_K": 32})]
    tables: dict[torch.dtype, dict[tuple[str, int, int], list[tuple[int, int, int, int]]]]
    tables = {torch.bfloat16: _HALF, torch.float16: _HALF, torch.float32: _SINGLE}
    return [
        triton.Config({"BLOCK_Q": queries, "BLOCK_K": keys}, num_warps=warps, num_stages=stages)
        for queries, keys, warps, stages in tables.get(dtype, {}).get((kernel, maps, head_dim), [])
    ]


# Queries in a block of the backward pass, at least: what is allocated for sums over blocks before the autotuner has chosen.
_LEAST_BLOCK = 32


@functools.cache
def _tuned(kernel: str, head_dim: int, maps: int, dtype: torch.dtype) -> Any:
    # Choices are kept on disk, so that a run that goes on in another process goes on with the same bits.
    tune = triton.autotune(configs(kernel, head_dim, maps, dtype), key=["N", "E", "MAPS"], pre_hook=_forget_sums, cache_results=True)
    return tune(KERNELS[kernel])


def _forget_sums(arguments: dict[str, Any], reset_only: bool = False) -> None:
    """Before a block size is tried, and after: one with more blocks leaves more sums."""
    if arguments.get("dbias_ptr") is not None:
        arguments["dbias_ptr"].zero_()


def _launch(kernel: str, tensors: list[Tensor | None], qkv_BN3D: Tensor, maps: int, heads: int, floats: list[float], **fixed: Any) -> None:
    """Runs a kernel: its tensors, then sizes and factors. One program for each block of each group."""
    B, N, _, D = qkv_BN3D.shape
    block, groups, head_dim = "BLOCK_K" if kernel == "keys" else "BLOCK_Q", heads // maps, D // heads
    with torch.cuda.device_of(qkv_BN3D):
        _tuned(kernel, head_dim, maps, qkv_BN3D.dtype)[lambda meta: (triton.cdiv(N, meta[block]) * B * groups,)](
            *tensors, D, groups, *floats, N=N, E=head_dim, MAPS=maps, **fixed
        )


# ------------------------------------------------------------------------------------------------------------- operators


# Operators of their own: torch.compile leaves them alone.
@torch.library.custom_op("diffvit::attend", mutates_args=())
def _attend(
    qkv_BN3D: Tensor, lambda_full: Tensor | None, bias_3D: Tensor | None, heads: int, for_backward: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Out, and for the backward pass A2 V, both [B, N, D], and the logarithms of the sums [B, G, s, N]."""
    head_dim, maps = qkv_BN3D.shape[3] // heads, 1 if lambda_full is None else 2
    if not supported(qkv_BN3D.device, qkv_BN3D.dtype, head_dim, maps):  # asked here, where torch.compile does not look
        matmul = torch.get_float32_matmul_precision()
        raise ValueError(
            f"no Triton kernels for {qkv_BN3D.dtype} (matmul precision {matmul}), head dimension {head_dim} on {qkv_BN3D.device}"
        )
    qkv_BN3D = qkv_BN3D.contiguous()
    results = _attend_like(qkv_BN3D, lambda_full, bias_3D, heads, for_backward)
    _launch("forward", [qkv_BN3D, lambda_full, *results], qkv_BN3D, maps, heads, [_to_log2(head_dim)], FOR_BACKWARD=for_backward)
    return results


@_attend.register_fake
def _attend_like(
    qkv_BN3D: Tensor, lambda_full: Tensor | None, bias_3D: Tensor | None, heads: int, for_backward: bool
) -> tuple[Tensor, Tensor, Tensor]:
    B, N, _, D = qkv_BN3D.shape
    maps = 1 if lambda_full is None else 2
    kept, second = (B if for_backward else 0), (B if for_backward and maps == 2 else 0)
    log_sum_BGsN = qkv_BN3D.new_empty(kept, heads // maps, maps, N, dtype=torch.float32)
    return qkv_BN3D.new_empty(B, N, D), qkv_BN3D.new_empty(second, N, D), log_sum_BGsN


@torch.library.custom_op("diffvit::attend_backward", mutates_args=())
def _attend_backward(
    do_BND: Tensor, qkv_BN3D: Tensor, lambda_full: Tensor | None, heads: int, with_bias: bool, out_BND: Tensor, second_BND: Tensor,
    log_sum_BGsN: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradient of qkv, delta [B, G, s, N], and the gradient of qkv's bias [3D] or nothing."""
    do_BND, qkv_BN3D = do_BND.contiguous(), qkv_BN3D.contiguous()
    B, N, _, D = qkv_BN3D.shape
    head_dim, maps = D // heads, 1 if lambda_full is None else 2
    dqkv_BN3D, delta_BGsN = qkv_BN3D.new_empty(qkv_BN3D.shape), torch.empty_like(log_sum_BGsN)
    partial_R2D = None
    if with_bias:
        partial_R2D = qkv_BN3D.new_zeros(B * triton.cdiv(N, _LEAST_BLOCK), 2 * D, dtype=torch.float32)
    floats = [_to_log2(head_dim), head_dim**-0.5]
    sums = [log_sum_BGsN, delta_BGsN, dqkv_BN3D]
    _launch("queries", [do_BND, qkv_BN3D, lambda_full, out_BND, second_BND, *sums, partial_R2D], qkv_BN3D, maps, heads, floats)
    _launch("keys", [do_BND, qkv_BN3D, lambda_full, *sums], qkv_BN3D, maps, heads, floats)
    if partial_R2D is None:
        return dqkv_BN3D, delta_BGsN, log_sum_BGsN.new_empty(0)
    of_queries, of_values = partial_R2D.sum(0).chunk(2)
    return dqkv_BN3D, delta_BGsN, torch.cat([of_queries, torch.zeros_like(of_queries), of_values])


@_attend_backward.register_fake
def _attend_backward_like(
    do_BND: Tensor, qkv_BN3D: Tensor, lambda_full: Tensor | None, heads: int, with_bias: bool, out_BND: Tensor, second_BND: Tensor,
    log_sum_BGsN: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dbias_3D = log_sum_BGsN.new_empty(3 * qkv_BN3D.shape[3] if with_bias else 0)
    return qkv_BN3D.new_empty(qkv_BN3D.shape), torch.empty_like(log_sum_BGsN), dbias_3D


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    qkv_BN3D, lambda_full, bias_3D, ctx.heads, _ = inputs
    ctx.bias = None if bias_3D is None else (bias_3D.shape, bias_3D.dtype)
    ctx.set_materialize_grads(False)  # no zeros for the outputs that nobody differentiates
    ctx.save_for_backward(qkv_BN3D, lambda_full, *output)


def _differentiate(ctx: Any, do_BND: Tensor, *_unused: None) -> tuple[Tensor | None, ...]:
    qkv_BN3D, lambda_full, *kept = ctx.saved_tensors
    dqkv_BN3D, delta_BGsN, dbias_3D = _attend_backward(do_BND, qkv_BN3D, lambda_full, ctx.heads, ctx.bias is not None, *kept)
    dlambda = None if lambda_full is None else -delta_BGsN[:, :, 1].sum().to(lambda_full.dtype).reshape(lambda_full.shape)
    dbias = None if ctx.bias is None else dbias_3D.reshape(ctx.bias[0]).to(ctx.bias[1])
    return dqkv_BN3D, dlambda, dbias, None, None


_attend.register_autograd(_differentiate, setup_context=_keep)


def _to_log2(head_dim: int) -> float:
    """What scores are multiplied with so that exp2 of them is the softmax's exp."""
    return head_dim**-0.5 * math.log2(math.e)
