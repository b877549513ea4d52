"""Equation 1 of differential attention (arXiv 2410.05258) as Triton kernels, forward and backward, that hold no map in memory.

    O = (A1 - lambda A2) V,    As = softmax(Qs Ks' / sqrt(E))

Forward: one pass over the keys with the running maximum and sum of both softmaxes, so that keys and values are read once; as
the two have different sums, A1 V and A2 V are accumulated apart and subtracted on the chip. Kept for the backward pass: both
logarithms of the sums, and A2 V, for O alone does not give the two row sums below.

Backward, with dP = dO V', which is one for both maps, and the maps computed again from their logarithms:

    delta_s = rowsum(As * dP) = rowsum(dO * As V),  A1 V = O + lambda A2 V
    dS1 = A1 * (dP - delta_1),  dS2 = -lambda A2 * (dP - delta_2),  dQs = dSs Ks / sqrt(E),  dKs = dSs' Qs / sqrt(E)
    dV = (A1 - lambda A2)' dO,  dlambda = -sum(delta_2)

A kernel over queries gives delta and dQ, one over keys dK and dV. There are no atomic operations: the same kernels with the
same block sizes give the same bits. Products take the inputs' dtype (fp32: TF32), all sums are fp32.

Importing this module raises ImportError where Triton is missing. With TRITON_INTERPRET=1 in the environment before the import
it works on the CPU, slowly: that is for tests.

Shapes in names: B batch, N tokens, P pairs of heads, s which of a pair's two heads, E head dimension, V = 2E value dimension;
Q a block's queries, K a block's keys. All outputs lie in memory as [B, N, P, V], where V may be s and E: an output's
transpose(1, 2).flatten(2) is a view.
"""

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


def supported(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether there are kernels for this: bf16, fp16 and TF32 on NVIDIA's GPUs from Ampere on; where Triton interprets, fp32 on any.

    Products of full fp32 do not run on tensor cores, and in Triton need more registers than there are: fp32 is supported where
    torch's setting allows TF32.
    """
    if _INTERPRETED:
        return dtype in (torch.bfloat16, torch.float16, torch.float32) and head_dim in (16, 32, 64, 128)
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    exact = dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return bool(configs("forward", head_dim, dtype)) and not exact


def differential_attention(q_BNPsE: Tensor, k_BNPsE: Tensor, v_BPNV: Tensor, lambda_full: Tensor) -> Tensor:
    """Equation 1. [B, P, N, V], in v's dtype; differentiable by all four, once.

    Args:
        q_BNPsE, k_BNPsE, v_BPNV: of one dtype and any strides; V = 2E.
        lambda_full: scalar, of any dtype, on the same device.

    Raises:
        ValueError: shapes that do not fit together, or a dtype, head dimension or device that there are no kernels for.
    """
    B, N, P, s, E = q_BNPsE.shape if q_BNPsE.ndim == 5 else (0, 0, 0, 0, 0)
    if not (s == 2 and k_BNPsE.shape == q_BNPsE.shape and v_BPNV.shape == (B, P, N, 2 * E) and lambda_full.numel() == 1):
        shapes = ", ".join(str(list(x.shape)) for x in (q_BNPsE, k_BNPsE, v_BPNV, lambda_full))
        raise ValueError(f"q and k must be [B, N, P, 2, E], v [B, P, N, 2E] and lambda a scalar, not {shapes}")
    if not q_BNPsE.numel():
        raise ValueError("there is nothing to attend to: an input is empty")
    if len({x.dtype for x in (q_BNPsE, k_BNPsE, v_BPNV)}) > 1 or len({x.device for x in (q_BNPsE, k_BNPsE, v_BPNV, lambda_full)}) > 1:
        raise ValueError("q, k and v must have one dtype, and all inputs be on one device")
    return _attend(q_BNPsE, k_BNPsE, v_BPNV, lambda_full, torch.is_grad_enabled())[0]


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
def _softmax_step(s_QK, top_Q, sum_Q, to_log2):
    """One block of keys in a running softmax: its weights, the new maximum and sum, and what earlier results are multiplied with."""
    new_top_Q = tl.maximum(top_Q, tl.max(s_QK, 1) * to_log2)
    a_QK = tl.exp2(s_QK * to_log2 - new_top_Q[:, None])
    shrink_Q = tl.exp2(top_Q - new_top_Q)
    return a_QK, new_top_Q, sum_Q * shrink_Q + tl.sum(a_QK, 1), shrink_Q


@triton.jit
def _forward_step(
    q1_QE, q2_QE, k_ptr, v_ptr, first, o1_QV, o2_QV, top1_Q, top2_Q, sum1_Q, sum2_Q, to_log2, k_n, k_s, v_n,
    N: tl.constexpr, E: tl.constexpr, BLOCK_K: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """The keys from `first` on. Only the last ones (TAIL) need masks."""
    n_K = first + tl.arange(0, BLOCK_K)
    e_E = tl.arange(0, E)
    v_V = tl.arange(0, 2 * E)
    k_at = k_ptr + n_K[None, :] * k_n + e_E[:, None]
    v_at = v_ptr + n_K[:, None] * v_n + v_V[None, :]
    if TAIL:
        inside_K = n_K < N
        k1_EK = tl.load(k_at, mask=inside_K[None, :], other=0.0)
        k2_EK = tl.load(k_at + k_s, mask=inside_K[None, :], other=0.0)
        v_KV = tl.load(v_at, mask=inside_K[:, None], other=0.0)
    else:
        k1_EK = tl.load(k_at)
        k2_EK = tl.load(k_at + k_s)
        v_KV = tl.load(v_at)
    s1_QK = _dot(q1_QE, k1_EK, None)
    s2_QK = _dot(q2_QE, k2_EK, None)
    if TAIL:
        s1_QK = tl.where(inside_K[None, :], s1_QK, -float("inf"))
        s2_QK = tl.where(inside_K[None, :], s2_QK, -float("inf"))
    a1_QK, top1_Q, sum1_Q, shrink1_Q = _softmax_step(s1_QK, top1_Q, sum1_Q, to_log2)
    o1_QV = _dot(a1_QK, v_KV, o1_QV * shrink1_Q[:, None])
    a2_QK, top2_Q, sum2_Q, shrink2_Q = _softmax_step(s2_QK, top2_Q, sum2_Q, to_log2)
    o2_QV = _dot(a2_QK, v_KV, o2_QV * shrink2_Q[:, None])
    return o1_QV, o2_QV, top1_Q, top2_Q, sum1_Q, sum2_Q


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, lambda_ptr, out_ptr, second_ptr, log_sum_ptr,
    q_b, q_n, q_p, q_s, k_b, k_n, k_p, k_s, v_b, v_p, v_n, P, to_log2,
    N: tl.constexpr, E: tl.constexpr, FOR_BACKWARD: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A block of queries of one pair of heads: out and second (A2 V) [B, N, P, V], log_sum [B, P, s, N] to base 2."""
    blocks: tl.constexpr = (N + BLOCK_Q - 1) // BLOCK_Q
    pair = tl.program_id(0) // blocks
    b = (pair // P).to(tl.int64)  # a batch may have more than 2^31 elements
    p = pair % P
    n_Q = tl.program_id(0) % blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside_Q = n_Q < N
    e_E = tl.arange(0, E)
    q_at = q_ptr + b * q_b + p * q_p + n_Q[:, None] * q_n + e_E[None, :]
    q1_QE = tl.load(q_at, mask=inside_Q[:, None], other=0.0)
    q2_QE = tl.load(q_at + q_s, mask=inside_Q[:, None], other=0.0)
    k_ptr += b * k_b + p * k_p
    v_ptr += b * v_b + p * v_p

    o1_QV = tl.zeros([BLOCK_Q, 2 * E], tl.float32)
    o2_QV = tl.zeros([BLOCK_Q, 2 * E], tl.float32)
    top1_Q = tl.full([BLOCK_Q], -float("inf"), tl.float32)
    top2_Q = tl.full([BLOCK_Q], -float("inf"), tl.float32)
    sum1_Q = tl.zeros([BLOCK_Q], tl.float32)
    sum2_Q = tl.zeros([BLOCK_Q], tl.float32)
    whole: tl.constexpr = N // BLOCK_K * BLOCK_K
    for first in range(0, whole, BLOCK_K):
        o1_QV, o2_QV, top1_Q, top2_Q, sum1_Q, sum2_Q = _forward_step(
            q1_QE, q2_QE, k_ptr, v_ptr, first, o1_QV, o2_QV, top1_Q, top2_Q, sum1_Q, sum2_Q, to_log2, k_n, k_s, v_n,
            N, E, BLOCK_K, False,
        )  # fmt: skip
    if whole < N:
        o1_QV, o2_QV, top1_Q, top2_Q, sum1_Q, sum2_Q = _forward_step(
            q1_QE, q2_QE, k_ptr, v_ptr, whole, o1_QV, o2_QV, top1_Q, top2_Q, sum1_Q, sum2_Q, to_log2, k_n, k_s, v_n,
            N, E, BLOCK_K, True,
        )  # fmt: skip

    o2_QV = o2_QV / sum2_Q[:, None]
    out_QV = o1_QV / sum1_Q[:, None] - tl.load(lambda_ptr).to(tl.float32) * o2_QV
    at_QV = (b * N * P + p) * (2 * E) + n_Q[:, None] * (P * 2 * E) + tl.arange(0, 2 * E)[None, :]
    tl.store(out_ptr + at_QV, out_QV.to(out_ptr.dtype.element_ty), mask=inside_Q[:, None])
    if FOR_BACKWARD:
        tl.store(second_ptr + at_QV, o2_QV.to(second_ptr.dtype.element_ty), mask=inside_Q[:, None])
        log_sum_ptr += (b * P + p) * 2 * N
        tl.store(log_sum_ptr + n_Q, top1_Q + tl.log2(sum1_Q), mask=inside_Q)
        tl.store(log_sum_ptr + N + n_Q, top2_Q + tl.log2(sum2_Q), mask=inside_Q)


@triton.jit
def _queries_step(
    q1_QE, q2_QE, do_QV, k_ptr, v_ptr, first, dq1_QE, dq2_QE, log1_Q, log2_Q, delta1_Q, delta2_Q, to_log2, k_n, k_s, v_n,
    N: tl.constexpr, E: tl.constexpr, BLOCK_K: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    n_K = first + tl.arange(0, BLOCK_K)
    k_at = k_ptr + n_K[:, None] * k_n + tl.arange(0, E)[None, :]
    v_at = v_ptr + n_K[:, None] * v_n + tl.arange(0, 2 * E)[None, :]
    if TAIL:
        inside_K = n_K < N
        k1_KE = tl.load(k_at, mask=inside_K[:, None], other=0.0)
        k2_KE = tl.load(k_at + k_s, mask=inside_K[:, None], other=0.0)
        v_KV = tl.load(v_at, mask=inside_K[:, None], other=0.0)
    else:
        k1_KE = tl.load(k_at)
        k2_KE = tl.load(k_at + k_s)
        v_KV = tl.load(v_at)
    da_QK = _dot(do_QV, tl.trans(v_KV), None)
    a1_QK = tl.exp2(_dot(q1_QE, tl.trans(k1_KE), None) * to_log2 - log1_Q[:, None])
    if TAIL:  # a key that is not there has the score 0, and the weight that goes with it may be infinite
        a1_QK = tl.where(inside_K[None, :], a1_QK, 0.0)
    ds1_QK = a1_QK * (da_QK - delta1_Q[:, None])
    dq1_QE = _dot(ds1_QK, k1_KE, dq1_QE)
    a2_QK = tl.exp2(_dot(q2_QE, tl.trans(k2_KE), None) * to_log2 - log2_Q[:, None])
    if TAIL:
        a2_QK = tl.where(inside_K[None, :], a2_QK, 0.0)
    ds2_QK = a2_QK * (da_QK - delta2_Q[:, None])
    dq2_QE = _dot(ds2_QK, k2_KE, dq2_QE)
    return dq1_QE, dq2_QE


@triton.jit
def queries_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, lambda_ptr, out_ptr, second_ptr, log_sum_ptr, delta_ptr, dq_ptr,
    do_b, do_p, do_n, q_b, q_n, q_p, q_s, k_b, k_n, k_p, k_s, v_b, v_p, v_n, P, to_log2, scale,
    N: tl.constexpr, E: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A block of queries of one pair of heads: delta [B, P, s, N] and dq [B, N, P, s, E]."""
    blocks: tl.constexpr = (N + BLOCK_Q - 1) // BLOCK_Q
    pair = tl.program_id(0) // blocks
    b = (pair // P).to(tl.int64)
    p = pair % P
    n_Q = tl.program_id(0) % blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside_Q = n_Q < N
    e_E = tl.arange(0, E)
    v_V = tl.arange(0, 2 * E)
    packed = (b * N * P + p) * (2 * E)
    at_QV = packed + n_Q[:, None] * (P * 2 * E) + v_V[None, :]
    do_QV = tl.load(do_ptr + b * do_b + p * do_p + n_Q[:, None] * do_n + v_V[None, :], mask=inside_Q[:, None], other=0.0)
    out_QV = tl.load(out_ptr + at_QV, mask=inside_Q[:, None], other=0.0)
    second_QV = tl.load(second_ptr + at_QV, mask=inside_Q[:, None], other=0.0)
    lambda_full = tl.load(lambda_ptr).to(tl.float32)
    delta2_Q = tl.sum(do_QV.to(tl.float32) * second_QV.to(tl.float32), 1)
    delta1_Q = tl.sum(do_QV.to(tl.float32) * out_QV.to(tl.float32), 1) + lambda_full * delta2_Q
    row = (b * P + p) * 2 * N + n_Q
    tl.store(delta_ptr + row, delta1_Q, mask=inside_Q)
    tl.store(delta_ptr + row + N, delta2_Q, mask=inside_Q)
    log1_Q = tl.load(log_sum_ptr + row, mask=inside_Q, other=float("inf"))
    log2_Q = tl.load(log_sum_ptr + row + N, mask=inside_Q, other=float("inf"))
    q_at = q_ptr + b * q_b + p * q_p + n_Q[:, None] * q_n + e_E[None, :]
    q1_QE = tl.load(q_at, mask=inside_Q[:, None], other=0.0)
    q2_QE = tl.load(q_at + q_s, mask=inside_Q[:, None], other=0.0)
    k_ptr += b * k_b + p * k_p
    v_ptr += b * v_b + p * v_p

    dq1_QE = tl.zeros([BLOCK_Q, E], tl.float32)
    dq2_QE = tl.zeros([BLOCK_Q, E], tl.float32)
    whole: tl.constexpr = N // BLOCK_K * BLOCK_K
    for first in range(0, whole, BLOCK_K):
        dq1_QE, dq2_QE = _queries_step(
            q1_QE, q2_QE, do_QV, k_ptr, v_ptr, first, dq1_QE, dq2_QE, log1_Q, log2_Q, delta1_Q, delta2_Q, to_log2, k_n, k_s, v_n,
            N, E, BLOCK_K, False,
        )  # fmt: skip
    if whole < N:
        dq1_QE, dq2_QE = _queries_step(
            q1_QE, q2_QE, do_QV, k_ptr, v_ptr, whole, dq1_QE, dq2_QE, log1_Q, log2_Q, delta1_Q, delta2_Q, to_log2, k_n, k_s, v_n,
            N, E, BLOCK_K, True,
        )  # fmt: skip

    dq_at = dq_ptr + packed + n_Q[:, None] * (P * 2 * E) + e_E[None, :]
    tl.store(dq_at, (dq1_QE * scale).to(dq_ptr.dtype.element_ty), mask=inside_Q[:, None])
    tl.store(dq_at + E, (dq2_QE * (-lambda_full * scale)).to(dq_ptr.dtype.element_ty), mask=inside_Q[:, None])


@triton.jit
def _keys_step(
    k1_KE, k2_KE, v_KV, do_ptr, q_ptr, log_sum_ptr, delta_ptr, first, dk1_KE, dk2_KE, dv_KV, lambda_full, to_log2, do_n, q_n, q_s,
    N: tl.constexpr, E: tl.constexpr, BLOCK_Q: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    n_Q = first + tl.arange(0, BLOCK_Q)
    q_at = q_ptr + n_Q[:, None] * q_n + tl.arange(0, E)[None, :]
    do_at = do_ptr + n_Q[:, None] * do_n + tl.arange(0, 2 * E)[None, :]
    if TAIL:  # a query that is not there has an infinite sum, so all its weights are 0
        inside_Q = n_Q < N
        q1_QE = tl.load(q_at, mask=inside_Q[:, None], other=0.0)
        q2_QE = tl.load(q_at + q_s, mask=inside_Q[:, None], other=0.0)
        do_QV = tl.load(do_at, mask=inside_Q[:, None], other=0.0)
        log1_Q = tl.load(log_sum_ptr + n_Q, mask=inside_Q, other=float("inf"))
        log2_Q = tl.load(log_sum_ptr + N + n_Q, mask=inside_Q, other=float("inf"))
        delta1_Q = tl.load(delta_ptr + n_Q, mask=inside_Q, other=0.0)
        delta2_Q = tl.load(delta_ptr + N + n_Q, mask=inside_Q, other=0.0)
    else:
        q1_QE = tl.load(q_at)
        q2_QE = tl.load(q_at + q_s)
        do_QV = tl.load(do_at)
        log1_Q = tl.load(log_sum_ptr + n_Q)
        log2_Q = tl.load(log_sum_ptr + N + n_Q)
        delta1_Q = tl.load(delta_ptr + n_Q)
        delta2_Q = tl.load(delta_ptr + N + n_Q)
    a1_KQ = tl.exp2(_dot(k1_KE, tl.trans(q1_QE), None) * to_log2 - log1_Q[None, :])
    a2_KQ = tl.exp2(_dot(k2_KE, tl.trans(q2_QE), None) * to_log2 - log2_Q[None, :])
    dv_KV = _dot(a1_KQ - lambda_full * a2_KQ, do_QV, dv_KV)
    da_KQ = _dot(v_KV, tl.trans(do_QV), None)
    ds1_KQ = a1_KQ * (da_KQ - delta1_Q[None, :])
    dk1_KE = _dot(ds1_KQ, q1_QE, dk1_KE)
    ds2_KQ = a2_KQ * (da_KQ - delta2_Q[None, :])
    dk2_KE = _dot(ds2_KQ, q2_QE, dk2_KE)
    return dk1_KE, dk2_KE, dv_KV


@triton.jit
def keys_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, lambda_ptr, log_sum_ptr, delta_ptr, dk_ptr, dv_ptr,
    do_b, do_p, do_n, q_b, q_n, q_p, q_s, k_b, k_n, k_p, k_s, v_b, v_p, v_n, P, to_log2, scale,
    N: tl.constexpr, E: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A block of keys of one pair of heads: dk [B, N, P, s, E] and dv [B, N, P, V]."""
    blocks: tl.constexpr = (N + BLOCK_K - 1) // BLOCK_K
    pair = tl.program_id(0) // blocks
    b = (pair // P).to(tl.int64)
    p = pair % P
    n_K = tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    inside_K = n_K < N
    e_E = tl.arange(0, E)
    v_V = tl.arange(0, 2 * E)
    k_at = k_ptr + b * k_b + p * k_p + n_K[:, None] * k_n + e_E[None, :]
    k1_KE = tl.load(k_at, mask=inside_K[:, None], other=0.0)
    k2_KE = tl.load(k_at + k_s, mask=inside_K[:, None], other=0.0)
    v_KV = tl.load(v_ptr + b * v_b + p * v_p + n_K[:, None] * v_n + v_V[None, :], mask=inside_K[:, None], other=0.0)
    lambda_full = tl.load(lambda_ptr).to(tl.float32)
    do_ptr += b * do_b + p * do_p
    q_ptr += b * q_b + p * q_p
    log_sum_ptr += (b * P + p) * 2 * N
    delta_ptr += (b * P + p) * 2 * N

    dk1_KE = tl.zeros([BLOCK_K, E], tl.float32)
    dk2_KE = tl.zeros([BLOCK_K, E], tl.float32)
    dv_KV = tl.zeros([BLOCK_K, 2 * E], tl.float32)
    whole: tl.constexpr = N // BLOCK_Q * BLOCK_Q
    for first in range(0, whole, BLOCK_Q):
        dk1_KE, dk2_KE, dv_KV = _keys_step(
            k1_KE, k2_KE, v_KV, do_ptr, q_ptr, log_sum_ptr, delta_ptr, first, dk1_KE, dk2_KE, dv_KV, lambda_full, to_log2, do_n, q_n, q_s,
            N, E, BLOCK_Q, False,
        )  # fmt: skip
    if whole < N:
        dk1_KE, dk2_KE, dv_KV = _keys_step(
            k1_KE, k2_KE, v_KV, do_ptr, q_ptr, log_sum_ptr, delta_ptr, whole, dk1_KE, dk2_KE, dv_KV, lambda_full, to_log2, do_n, q_n, q_s,
            N, E, BLOCK_Q, True,
        )  # fmt: skip

    packed = (b * N * P + p) * (2 * E)
    dk_at = dk_ptr + packed + n_K[:, None] * (P * 2 * E) + e_E[None, :]
    tl.store(dk_at, (dk1_KE * scale).to(dk_ptr.dtype.element_ty), mask=inside_K[:, None])
    tl.store(dk_at + E, (dk2_KE * (-lambda_full * scale)).to(dk_ptr.dtype.element_ty), mask=inside_K[:, None])
    dv_at = dv_ptr + packed + n_K[:, None] * (P * 2 * E) + v_V[None, :]
    tl.store(dv_at, dv_KV.to(dv_ptr.dtype.element_ty), mask=inside_K[:, None])


# ----------------------------------------------------------------------------------------------------------- block sizes


# Queries and keys in a block, warps, stages of the pipeline. Wider heads, or wider numbers, do not fit into the registers: none of
# these spills on sm_90, and all fit into the shared memory of sm_89. tests/test_differential_triton.py compiles them all.
_HALF = {
    ("forward", 16): [(64, 64, 4, 2), (128, 32, 8, 3), (128, 64, 8, 2)],
    ("forward", 32): [(64, 32, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3), (128, 32, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3)],
    ("forward", 64): [(32, 64, 4, 2), (64, 32, 4, 3), (64, 64, 8, 2), (128, 16, 8, 2), (128, 32, 8, 2), (128, 32, 8, 3), (128, 64, 8, 2)],
    ("queries", 16): [(64, 64, 4, 2), (128, 64, 8, 2)],
    ("queries", 32): [(64, 32, 4, 2), (64, 64, 4, 2), (64, 64, 4, 3), (128, 32, 8, 2), (128, 64, 8, 2), (128, 64, 8, 3)],
    ("queries", 64): [(64, 32, 4, 2), (64, 64, 4, 2), (128, 32, 8, 2), (128, 64, 8, 2)],
    ("keys", 16): [(32, 64, 4, 2), (64, 64, 4, 2), (64, 128, 8, 2)],
    ("keys", 32): [(32, 64, 4, 2), (32, 128, 8, 2), (64, 64, 4, 3), (64, 64, 8, 2)],
    ("keys", 64): [(16, 64, 4, 2), (16, 128, 8, 2), (32, 64, 8, 2), (32, 128, 8, 3)],
}
_SINGLE = {
    **{("forward", width): [(64, 32, 4, 2), (128, 32, 8, 2)] for width in (16, 32)},
    **{("queries", width): [(64, 32, 4, 2), (64, 32, 8, 2)] for width in (16, 32)},
    **{("keys", width): [(16, 64, 4, 2), (32, 64, 8, 2)] for width in (16, 32)},
}
KERNELS = {"forward": forward_kernel, "queries": queries_kernel, "keys": keys_kernel}


def configs(kernel: str, head_dim: int, dtype: torch.dtype) -> list[triton.Config]:
    """What the autotuner of a kernel, a key of KERNELS, chooses from; nothing where there are no kernels."""
    if _INTERPRETED:
        return [triton.Config({"BLOCK_Q": 32, "BLOCK_K": 32})]
    blocks = {torch.bfloat16: _HALF, torch.float16: _HALF, torch.float32: _SINGLE}.get(dtype, {}).get((kernel, head_dim), [])
    return [
        triton.Config({"BLOCK_Q": queries, "BLOCK_K": keys}, num_warps=warps, num_stages=stages) for queries, keys, warps, stages in blocks
    ]


@functools.cache
def _tuned(kernel: str, head_dim: int, dtype: torch.dtype) -> Any:
    # Choices are kept on disk, so that a run that goes on in another process goes on with the same bits.
    return triton.autotune(configs(kernel, head_dim, dtype), key=["N", "E"], cache_results=True)(KERNELS[kernel])


def _launch(
    kernel: str, tensors: list[Tensor], strided: list[Tensor], tokens: int, pairs: int, head_dim: int, floats: list[float], **fixed: Any
) -> None:
    """Runs a kernel: its tensors, the strides of some of them, then sizes and factors. One program for each block of each pair."""
    strides = [stride for x in strided for stride in x.stride()[:-1]]
    block = "BLOCK_K" if kernel == "keys" else "BLOCK_Q"
    groups = strided[-1].shape[0] * pairs
    with torch.cuda.device_of(strided[-1]):
        _tuned(kernel, head_dim, strided[-1].dtype)[lambda meta: (triton.cdiv(tokens, meta[block]) * groups,)](
            *tensors, *strides, pairs, *floats, N=tokens, E=head_dim, **fixed
        )


# ------------------------------------------------------------------------------------------------------------- operators


# Operators of their own: torch.compile leaves them alone.
@torch.library.custom_op("diffvit::triton_attention", mutates_args=())
def _attend(q_BNPsE: Tensor, k_BNPsE: Tensor, v_BPNV: Tensor, lambda_full: Tensor, for_backward: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Out, and for the backward pass A2 V, both [B, P, N, V], and the logarithms of the sums [B, P, s, N]."""
    N, P, _, E = q_BNPsE.shape[1:]
    if not supported(v_BPNV.device, v_BPNV.dtype, E):  # asked here, where torch.compile does not look
        matmul = torch.get_float32_matmul_precision()
        raise ValueError(f"no Triton kernels for {v_BPNV.dtype} (matmul precision {matmul}), head dimension {E} on {v_BPNV.device}")
    results = _attend_like(q_BNPsE, k_BNPsE, v_BPNV, lambda_full, for_backward)
    strided = [_rows_whole(x) for x in (q_BNPsE, k_BNPsE, v_BPNV)]
    _launch("forward", [*strided, lambda_full, *results], strided, N, P, E, [_to_log2(E)], FOR_BACKWARD=for_backward)
    return results


@_attend.register_fake
def _attend_like(
    q_BNPsE: Tensor, k_BNPsE: Tensor, v_BPNV: Tensor, lambda_full: Tensor, for_backward: bool
) -> tuple[Tensor, Tensor, Tensor]:
    B, P, N, V = v_BPNV.shape
    kept = B if for_backward else 0
    out_BPNV, second_BPNV = (v_BPNV.new_empty(images, N, P, V).transpose(1, 2) for images in (B, kept))
    return out_BPNV, second_BPNV, v_BPNV.new_empty(kept, P, 2, N, dtype=torch.float32)


@torch.library.custom_op("diffvit::triton_attention_backward", mutates_args=())
def _attend_backward(
    do_BPNV: Tensor,
    q_BNPsE: Tensor,
    k_BNPsE: Tensor,
    v_BPNV: Tensor,
    lambda_full: Tensor,
    out_BPNV: Tensor,
    second_BPNV: Tensor,
    log_sum_BPsN: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, and delta [B, P, s, N]."""
    N, P, _, E = q_BNPsE.shape[1:]
    dq_BNPsE, dk_BNPsE, dv_BPNV, delta_BPsN = _attend_backward_like(
        do_BPNV, q_BNPsE, k_BNPsE, v_BPNV, lambda_full, out_BPNV, second_BPNV, log_sum_BPsN
    )
    strided = [_rows_whole(x) for x in (do_BPNV, q_BNPsE, k_BNPsE, v_BPNV)]
    floats = [_to_log2(E), E**-0.5]
    _launch("queries", [*strided, lambda_full, out_BPNV, second_BPNV, log_sum_BPsN, delta_BPsN, dq_BNPsE], strided, N, P, E, floats)
    _launch("keys", [*strided, lambda_full, log_sum_BPsN, delta_BPsN, dk_BNPsE, dv_BPNV], strided, N, P, E, floats)
    return dq_BNPsE, dk_BNPsE, dv_BPNV, delta_BPsN


@_attend_backward.register_fake
def _attend_backward_like(
    do_BPNV: Tensor,
    q_BNPsE: Tensor,
    k_BNPsE: Tensor,
    v_BPNV: Tensor,
    lambda_full: Tensor,
    out_BPNV: Tensor,
    second_BPNV: Tensor,
    log_sum_BPsN: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, P, N, V = v_BPNV.shape
    dv_BPNV = v_BPNV.new_empty(B, N, P, V).transpose(1, 2)
    return q_BNPsE.new_empty(q_BNPsE.shape), k_BNPsE.new_empty(k_BNPsE.shape), dv_BPNV, torch.empty_like(log_sum_BPsN)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # no zeros for the outputs that nobody differentiates
    ctx.save_for_backward(*inputs[:4], *output)


def _differentiate(ctx: Any, do_BPNV: Tensor, *_unused: None) -> tuple[Tensor | None, ...]:
    lambda_full = ctx.saved_tensors[3]
    dq_BNPsE, dk_BNPsE, dv_BPNV, delta_BPsN = _attend_backward(do_BPNV, *ctx.saved_tensors)
    dlambda = -delta_BPsN[:, :, 1].sum().to(lambda_full.dtype).reshape(lambda_full.shape)
    return dq_BNPsE, dk_BNPsE, dv_BPNV, dlambda, None


_attend.register_autograd(_differentiate, setup_context=_keep)


def _rows_whole(x: Tensor) -> Tensor:
    """With neighbouring elements in the last dimension, which the kernels need; the model's tensors are so."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _to_log2(head_dim: int) -> float:
    """What scores are multiplied with so that exp2 of them is the softmax's exp."""
    return head_dim**-0.5 * math.log2(math.e)
