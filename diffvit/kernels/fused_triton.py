"""What stands between a block's matrix products, as Triton kernels that read and write each tensor once, forward and backward.

mlp             both products of an MLP, with bias, exact GELU and dropout at the end of the first one, forward and backward
residual_norm   bias, dropout, residual connection, LayerNorm
head_norm       the RMSNorm of differential attention's heads, times its constant
dropout         dropout alone

Masks are drawn again in the backward pass and never stored: whether a value is kept is a function of the step's seed, the place in the
model, the number of the image in its global batch and the element, by Philox4x32-7 (Salmon et al., SC 2011), 16 bits a value. So masks do
not depend on how a batch is split into micro-batches or over workers. Like dropout.py on a CPU, p is rounded to 1/65536.

A linear layer's bias is added here, so that its gradient is summed up where the gradient passes anyway. Sums over rows are taken in a
fixed order, without atomic operations: the same inputs give the same bits. All arithmetic is fp32.

Importing this module raises ImportError where Triton is missing; TRITON_INTERPRET=1 is for tests, as in attention_triton.py.

Shapes in names: R a block's rows (tokens), C its columns; B images, N rows an image, D columns.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffvit.kernels import LEVELS

_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
# Values that share a call of Philox.
_DRAWS = 8
_ROUNDS = tl.constexpr(7)


def supported(device: torch.device, width: int) -> bool:
    """Whether there are kernels for rows of this width on a device: NVIDIA's GPUs from Ampere on."""
    if width % _DRAWS or triton.knobs.runtime.interpret:
        return width % _DRAWS == 0
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


# --------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _kept(key_ptr, site, row_R, column, N: tl.constexpr, D: tl.constexpr, C: tl.constexpr, DROPPED: tl.constexpr):
    """Which values of a tile are kept, of columns from `column` on. [R, C]

    key_ptr: the step's seed, the global batch's number of the first image here, and how far apart images here are in it.
    """
    place_RC = (row_R % N)[:, None] * (D // 8) + (column // 8 + tl.arange(0, C // 8))[None, :]
    image_R = tl.load(key_ptr + 1).to(tl.int32) + (row_R // N) * tl.load(key_ptr + 2).to(tl.int32)
    zero_RC = place_RC * 0
    a, b, c, d = tl.philox(tl.load(key_ptr), place_RC, zero_RC + image_R[:, None], zero_RC + site, zero_RC, _ROUNDS)
    words_RC22 = tl.join(tl.join(a, b), tl.join(c, d))
    halves_RC222 = tl.join(words_RC22 & 0xFFFF, words_RC22 >> 16)
    return tl.reshape(halves_RC222, [row_R.shape[0], C]) >= DROPPED


@triton.jit
def _normal_cdf(x):
    """Phi(x), and exp(-x^2 / 2), of which it is made; to 1e-7 (Abramowitz and Stegun, 7.1.26)."""
    t = 1.0 + 0.23164189 * tl.abs(x)
    t = tl.rsqrt(t * t)  # one instruction, where a division takes eight
    gauss = tl.exp2(x * x * -0.72134752)
    tail = t * (0.127414796 + t * (-0.142248368 + t * (0.710706871 + t * (-0.7265760135 + t * 0.5307027145)))) * gauss
    return tl.where(x < 0.0, tail, 1.0 - tail), gauss


@triton.jit
def _gelu_dropout(x_RC, key_ptr, site, row_R, column, N: tl.constexpr, D: tl.constexpr, C: tl.constexpr, DROPPED: tl.constexpr):
    cdf_RC, _ = _normal_cdf(x_RC)
    out_RC = x_RC * cdf_RC
    if DROPPED:
        kept_RC = _kept(key_ptr, site, row_R, column, N, D, C, DROPPED)
        out_RC = tl.where(kept_RC, out_RC * (65536.0 / (65536 - DROPPED)), 0.0)
    return out_RC


@triton.jit
def _gelu_dropout_gradient(
    d_RC, x_RC, key_ptr, site, row_R, column, N: tl.constexpr, D: tl.constexpr, C: tl.constexpr, DROPPED: tl.constexpr
):
    cdf_RC, gauss_RC = _normal_cdf(x_RC)
    d_RC *= cdf_RC + x_RC * gauss_RC * 0.3989422804
    if DROPPED:
        kept_RC = _kept(key_ptr, site, row_R, column, N, D, C, DROPPED)
        d_RC = tl.where(kept_RC, d_RC * (65536.0 / (65536 - DROPPED)), 0.0)
    return d_RC


@triton.jit
def _dot(a, b, total):
    if _INTERPRETED:  # Triton's interpreter multiplies bf16 wrongly; in fp32 such products are exact
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="tf32")


@triton.jit(do_not_specialize=["rows", "site"])
def linear_gelu_dropout_kernel(
    x_ptr, weight_ptr, bias_ptr, key_ptr, u_ptr, out_ptr, rows, site,
    N: tl.constexpr, D: tl.constexpr, H: tl.constexpr, FOR_BACKWARD: tl.constexpr, DROPPED: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """u = x weight', out = dropout(GELU(u + bias)): [rows, D], [H, D] -> [rows, H]. A tile of R rows and C columns, D in steps of K."""
    first = (tl.program_id(0) // (H // C)).to(tl.int64) * R
    column = tl.program_id(0) % (H // C) * C
    r_R = tl.arange(0, R)
    column_C = column + tl.arange(0, C)
    inside_R1 = (first + r_R < rows)[:, None]
    x_ptr += first * D
    x_at = x_ptr + r_R[:, None] * D + tl.arange(0, K)[None, :]
    weight_at = weight_ptr + column_C[:, None] * D + tl.arange(0, K)[None, :]
    u_RC = tl.zeros([R, C], tl.float32)
    for k in range(0, D, K):
        x_RK = tl.load(x_at + k, mask=inside_R1, other=0.0)
        weight_CK = tl.load(weight_at + k)
        u_RC = _dot(x_RK, tl.trans(weight_CK), u_RC)
    at_RC = r_R[:, None] * H + column_C[None, :]
    u_RC = u_RC.to(out_ptr.dtype.element_ty)
    if FOR_BACKWARD:
        tl.store(u_ptr + first * H + at_RC, u_RC, mask=inside_R1)
    x_RC = u_RC.to(tl.float32) + tl.load(bias_ptr + column_C)[None, :]
    out_RC = _gelu_dropout(x_RC, key_ptr, site, (first + r_R).to(tl.int32), column, N, H, C, DROPPED)
    tl.store(out_ptr + first * H + at_RC, out_RC.to(out_ptr.dtype.element_ty), mask=inside_R1)


@triton.jit(do_not_specialize=["rows", "site"])
def linear_gelu_dropout_backward_kernel(
    dy_ptr, weight_ptr, u_ptr, bias_ptr, key_ptr, du_ptr, dbias_ptr, rows, site,
    N: tl.constexpr, D: tl.constexpr, H: tl.constexpr, DROPPED: tl.constexpr, R: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """du of dropout(GELU(u + bias)), whose gradient is dy weight: [rows, D], [D, H] -> [rows, H]; and of each R rows one row of dbias."""
    first = (tl.program_id(0) // (H // C)).to(tl.int64) * R
    column = tl.program_id(0) % (H // C) * C
    r_R = tl.arange(0, R)
    column_C = column + tl.arange(0, C)
    inside_R1 = (first + r_R < rows)[:, None]
    dy_ptr += first * D
    dy_at = dy_ptr + r_R[:, None] * D + tl.arange(0, K)[None, :]
    weight_at = weight_ptr + tl.arange(0, K)[:, None] * H + column_C[None, :]
    d_RC = tl.zeros([R, C], tl.float32)
    for k in range(0, D, K):
        dy_RK = tl.load(dy_at + k, mask=inside_R1, other=0.0)
        weight_KC = tl.load(weight_at + k * H)
        d_RC = _dot(dy_RK, weight_KC, d_RC)
    at_RC = r_R[:, None] * H + column_C[None, :]
    x_RC = tl.load(u_ptr + first * H + at_RC, mask=inside_R1, other=0.0).to(tl.float32) + tl.load(bias_ptr + column_C)[None, :]
    d_RC = _gelu_dropout_gradient(d_RC, x_RC, key_ptr, site, (first + r_R).to(tl.int32), column, N, H, C, DROPPED)
    tl.store(du_ptr + first * H + at_RC, d_RC.to(du_ptr.dtype.element_ty), mask=inside_R1)
    # Rows that are not there have a gradient of 0.
    tl.store(dbias_ptr + (first // R) * H + column_C, tl.sum(d_RC, 0))


@triton.jit(do_not_specialize=["rows", "site"])
def residual_norm_kernel(
    stream_ptr, branch_ptr, bias_ptr, weight_ptr, beta_ptr, key_ptr, sum_ptr, normed_ptr, mean_ptr, rstd_ptr, rows, site, eps,
    N: tl.constexpr, D: tl.constexpr, C: tl.constexpr, DROPPED: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """sum = stream + dropout(branch + bias), normed = LayerNorm(sum). R whole rows; C is D or the next power of two."""
    first = tl.program_id(0).to(tl.int64) * R
    r_R = tl.arange(0, R)
    column_C = tl.arange(0, C)
    inside_C = column_C < D
    inside_R = first + r_R < rows
    at_RC = r_R[:, None] * D + column_C[None, :]
    inside_RC = inside_R[:, None] & inside_C[None, :]
    x_RC = tl.load(branch_ptr + first * D + at_RC, mask=inside_RC, other=0.0).to(tl.float32)
    x_RC += tl.load(bias_ptr + column_C, mask=inside_C, other=0.0)[None, :]
    if DROPPED:
        kept_RC = _kept(key_ptr, site, (first + r_R).to(tl.int32), 0, N, D, C, DROPPED)
        x_RC = tl.where(kept_RC, x_RC * (65536.0 / (65536 - DROPPED)), 0.0)
    x_RC += tl.load(stream_ptr + first * D + at_RC, mask=inside_RC, other=0.0)
    tl.store(sum_ptr + first * D + at_RC, x_RC, mask=inside_RC)
    mean_R = tl.sum(x_RC, 1) / D
    from_mean_RC = tl.where(inside_C[None, :], x_RC - mean_R[:, None], 0.0)
    rstd_R = 1.0 / tl.sqrt(tl.sum(from_mean_RC * from_mean_RC, 1) / D + eps)
    weight_C = tl.load(weight_ptr + column_C, mask=inside_C, other=0.0)
    beta_C = tl.load(beta_ptr + column_C, mask=inside_C, other=0.0)
    normed_RC = from_mean_RC * rstd_R[:, None] * weight_C[None, :] + beta_C[None, :]
    tl.store(normed_ptr + first * D + at_RC, normed_RC.to(normed_ptr.dtype.element_ty), mask=inside_RC)
    tl.store(mean_ptr + first + r_R, mean_R, mask=inside_R)
    tl.store(rstd_ptr + first + r_R, rstd_R, mask=inside_R)


@triton.jit(do_not_specialize=["rows", "site"])
def residual_norm_backward_kernel(
    dsum_ptr, dnormed_ptr, sum_ptr, mean_ptr, rstd_ptr, weight_ptr, key_ptr, dstream_ptr, dbranch_ptr, partial_ptr, rows, site,
    N: tl.constexpr, D: tl.constexpr, C: tl.constexpr, DROPPED: tl.constexpr, R: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """dstream and dbranch, and of TILES tiles of R rows one row of partial sums [3, D]: of bias, weight and beta."""
    r_R = tl.arange(0, R)
    column_C = tl.arange(0, C)
    inside_C = column_C < D
    at_RC = r_R[:, None] * D + column_C[None, :]
    weight_C = tl.load(weight_ptr + column_C, mask=inside_C, other=0.0)
    dbias_RC = tl.zeros([R, C], tl.float32)
    dweight_RC = tl.zeros([R, C], tl.float32)
    dbeta_RC = tl.zeros([R, C], tl.float32)
    for tile in range(0, TILES):
        first = (tl.program_id(0).to(tl.int64) * TILES + tile) * R
        inside_R = first + r_R < rows
        inside_RC = inside_R[:, None] & inside_C[None, :]
        rstd_R = tl.load(rstd_ptr + first + r_R, mask=inside_R, other=0.0)
        mean_R = tl.load(mean_ptr + first + r_R, mask=inside_R, other=0.0)
        x_RC = tl.load(sum_ptr + first * D + at_RC, mask=inside_RC, other=0.0)
        d_RC = tl.load(dnormed_ptr + first * D + at_RC, mask=inside_RC, other=0.0).to(tl.float32)
        dsum_RC = tl.load(dsum_ptr + first * D + at_RC, mask=inside_RC, other=0.0)
        x_RC = tl.where(inside_RC, (x_RC - mean_R[:, None]) * rstd_R[:, None], 0.0)
        dweight_RC += d_RC * x_RC
        dbeta_RC += d_RC
        d_RC *= weight_C[None, :]
        d_RC -= (tl.sum(d_RC, 1) / D)[:, None] + x_RC * (tl.sum(d_RC * x_RC, 1) / D)[:, None]
        d_RC = d_RC * rstd_R[:, None] + dsum_RC
        tl.store(dstream_ptr + first * D + at_RC, d_RC, mask=inside_RC)
        if DROPPED:
            kept_RC = _kept(key_ptr, site, (first + r_R).to(tl.int32), 0, N, D, C, DROPPED)
            d_RC = tl.where(kept_RC, d_RC * (65536.0 / (65536 - DROPPED)), 0.0)
        tl.store(dbranch_ptr + first * D + at_RC, d_RC.to(dbranch_ptr.dtype.element_ty), mask=inside_RC)
        dbias_RC += tl.where(inside_RC, d_RC, 0.0)
    partial_ptr += tl.program_id(0) * 3 * D + column_C
    tl.store(partial_ptr, tl.sum(dbias_RC, 0), mask=inside_C)
    tl.store(partial_ptr + D, tl.sum(dweight_RC, 0), mask=inside_C)
    tl.store(partial_ptr + 2 * D, tl.sum(dbeta_RC, 0), mask=inside_C)


@triton.jit(do_not_specialize=["rows"])
def head_norm_kernel(x_ptr, weight_ptr, out_ptr, rows, eps, factor, D: tl.constexpr, R: tl.constexpr):
    """out = factor * weight * x / rms(x). D is a power of two."""
    first = tl.program_id(0).to(tl.int64) * R
    r_R = tl.arange(0, R)
    at_RD = r_R[:, None] * D + tl.arange(0, D)[None, :]
    inside_RD = (first + r_R < rows)[:, None]
    x_RD = tl.load(x_ptr + first * D + at_RD, mask=inside_RD, other=0.0).to(tl.float32)
    rrms_R = 1.0 / tl.sqrt(tl.sum(x_RD * x_RD, 1) / D + eps)
    scale_D = tl.load(weight_ptr + tl.arange(0, D)) * factor
    tl.store(out_ptr + first * D + at_RD, (x_RD * rrms_R[:, None] * scale_D[None, :]).to(out_ptr.dtype.element_ty), mask=inside_RD)


@triton.jit(do_not_specialize=["rows"])
def head_norm_backward_kernel(
    dout_ptr, x_ptr, weight_ptr, dx_ptr, partial_ptr, rows, eps, factor, D: tl.constexpr, R: tl.constexpr, TILES: tl.constexpr
):
    """dx, and of TILES tiles of R rows one row of partial sums of the weight's gradient."""
    r_R = tl.arange(0, R)
    at_RD = r_R[:, None] * D + tl.arange(0, D)[None, :]
    scale_D = tl.load(weight_ptr + tl.arange(0, D)) * factor
    sum_RD = tl.zeros([R, D], tl.float32)
    for tile in range(0, TILES):
        first = (tl.program_id(0).to(tl.int64) * TILES + tile) * R
        inside_RD = (first + r_R < rows)[:, None]
        x_RD = tl.load(x_ptr + first * D + at_RD, mask=inside_RD, other=0.0).to(tl.float32)
        d_RD = tl.load(dout_ptr + first * D + at_RD, mask=inside_RD, other=0.0).to(tl.float32)
        rrms_R = 1.0 / tl.sqrt(tl.sum(x_RD * x_RD, 1) / D + eps)
        x_RD *= rrms_R[:, None]
        sum_RD += d_RD * x_RD
        d_RD *= scale_D[None, :]
        d_RD = rrms_R[:, None] * (d_RD - x_RD * (tl.sum(d_RD * x_RD, 1) / D)[:, None])
        tl.store(dx_ptr + first * D + at_RD, d_RD.to(dx_ptr.dtype.element_ty), mask=inside_RD)
    tl.store(partial_ptr + tl.program_id(0) * D + tl.arange(0, D), tl.sum(sum_RD, 0) * factor)


@triton.jit(do_not_specialize=["rows", "site"])
def dropout_kernel(
    x_ptr, key_ptr, out_ptr, rows, site, N: tl.constexpr, D: tl.constexpr, C: tl.constexpr, DROPPED: tl.constexpr, R: tl.constexpr
):
    """out = dropout(x); also its gradient. R whole rows; C is D or the next power of two."""
    first = tl.program_id(0).to(tl.int64) * R
    r_R = tl.arange(0, R)
    at_RC = r_R[:, None] * D + tl.arange(0, C)[None, :]
    inside_RC = (first + r_R < rows)[:, None] & (tl.arange(0, C) < D)[None, :]
    x_RC = tl.load(x_ptr + first * D + at_RC, mask=inside_RC, other=0.0).to(tl.float32) * (65536.0 / (65536 - DROPPED))
    x_RC = tl.where(_kept(key_ptr, site, (first + r_R).to(tl.int32), 0, N, D, C, DROPPED), x_RC, 0.0)
    tl.store(out_ptr + first * D + at_RC, x_RC.to(out_ptr.dtype.element_ty), mask=inside_RC)


# ------------------------------------------------------------------------------------------------------------ tile sizes


def _tiles(options: list[dict[str, int]], warps: list[int], stages: int = 2) -> list[triton.Config]:
    return [triton.Config(option, num_warps=count, num_stages=stages) for option, count in zip(options, warps, strict=True)]


# What each kernel's autotuner chooses from. Reductions over a row are fastest within a warp.
_PRODUCT_TILES = [
    *_tiles([{"R": 128, "C": 128, "K": 64}, {"R": 64, "C": 128, "K": 64}, {"R": 128, "C": 64, "K": 64}], [8, 4, 4], stages=3),
    *_tiles([{"R": 64, "C": 64, "K": 64}, {"R": 128, "C": 128, "K": 32}], [4, 8], stages=4),
]
CONFIGS = {
    "linear_gelu_dropout": _PRODUCT_TILES,
    "linear_gelu_dropout_backward": _PRODUCT_TILES,
    "residual_norm": _tiles([{"R": 1}, {"R": 2}, {"R": 4}, {"R": 8}], [1, 1, 2, 4]),
    "residual_norm_backward": _tiles(
        [{"R": 1, "TILES": 32}, {"R": 2, "TILES": 16}, {"R": 2, "TILES": 32}, {"R": 4, "TILES": 8}], [1, 1, 2, 4]
    ),
    "head_norm": _tiles([{"R": 32}, {"R": 64}], [2, 4]),
    "head_norm_backward": _tiles([{"R": 8, "TILES": 32}, {"R": 16, "TILES": 32}, {"R": 32, "TILES": 16}], [1, 2, 4]),
    "dropout": _tiles([{"R": 4}, {"R": 8}], [2, 4]),
}
KERNELS = {
    "linear_gelu_dropout": linear_gelu_dropout_kernel,
    "linear_gelu_dropout_backward": linear_gelu_dropout_backward_kernel,
    "residual_norm": residual_norm_kernel,
    "residual_norm_backward": residual_norm_backward_kernel,
    "head_norm": head_norm_kernel,
    "head_norm_backward": head_norm_backward_kernel,
    "dropout": dropout_kernel,
}


@functools.cache
def _tuned(kernel: str) -> Any:
    # Choices are kept on disk, so that a run that goes on in another process goes on with the same bits.
    configs = CONFIGS[kernel][-1:] if _INTERPRETED else CONFIGS[kernel]
    sums = [name for name in KERNELS[kernel].arg_names if name in ("dbias_ptr", "partial_ptr")]  # sizes tried before leave theirs
    return triton.autotune(configs, key=["D"], reset_to_zero=sums, cache_results=True)(KERNELS[kernel])


# Rows of a tile at least, and so rows of partial sums at most: what is allocated before the autotuner has chosen.
_LEAST_ROWS = {"linear_gelu_dropout_backward": 64, "residual_norm_backward": 32, "head_norm_backward": 256}


def _partial(kernel: str, rows: int, *shape: int, like: Tensor) -> Tensor:
    """Room for partial sums, 0 where a tile size needs less."""
    return like.new_zeros(triton.cdiv(rows, _LEAST_ROWS[kernel]), *shape)


# ------------------------------------------------------------------------------------------------------------- operators


def _rows(x_BND: Tensor) -> tuple[int, int, int]:
    """Rows in all, rows an image, and columns of a tensor whose first dimension is images."""
    D = x_BND.shape[-1]
    rows = x_BND.numel() // D
    return rows, rows // len(x_BND), D


def _dropped(p: float) -> int:
    return min(round(p * LEVELS), LEVELS - 1)


@torch.library.custom_op("diffvit::linear_gelu_dropout", mutates_args=())
def _linear_gelu_dropout(
    x_BND: Tensor, weight_HD: Tensor, bias_H: Tensor, key: Tensor, site: int, p: float, for_backward: bool
) -> tuple[Tensor, Tensor]:
    """The output, and for the backward pass the product, without bias. [B, N, H] both"""
    x_BND, weight_HD, (rows, N, D), H = x_BND.contiguous(), weight_HD.contiguous(), _rows(x_BND), len(weight_HD)
    out_BNH = x_BND.new_empty(*x_BND.shape[:-1], H)
    u_BNH = torch.empty_like(out_BNH) if for_backward else x_BND.new_empty(0)
    with torch.cuda.device_of(x_BND):
        _tuned("linear_gelu_dropout")[lambda meta: (triton.cdiv(rows, meta["R"]) * (H // meta["C"]),)](
            x_BND, weight_HD, bias_H, key, u_BNH, out_BNH, rows, site, N=N, D=D, H=H, FOR_BACKWARD=for_backward, DROPPED=_dropped(p)
        )
    return out_BNH, u_BNH


@torch.library.custom_op("diffvit::linear_gelu_dropout_backward", mutates_args=())
def _linear_gelu_dropout_backward(
    dy_BND: Tensor, weight_DH: Tensor, u_BNH: Tensor, bias_H: Tensor, key: Tensor, site: int, p: float
) -> tuple[Tensor, Tensor]:
    """The gradients of u and of its bias, where that of the output is dy weight."""
    dy_BND, weight_DH, (rows, N, D), H = dy_BND.contiguous(), weight_DH.contiguous(), _rows(dy_BND), u_BNH.shape[-1]
    du_BNH, partial_GH = torch.empty_like(u_BNH), _partial("linear_gelu_dropout_backward", rows, H, like=bias_H)
    with torch.cuda.device_of(dy_BND):
        _tuned("linear_gelu_dropout_backward")[lambda meta: (triton.cdiv(rows, meta["R"]) * (H // meta["C"]),)](
            dy_BND, weight_DH, u_BNH, bias_H, key, du_BNH, partial_GH, rows, site, N=N, D=D, H=H, DROPPED=_dropped(p)
        )
    return du_BNH, partial_GH.sum(0)


class _Mlp(torch.autograd.Function):
    """dropout(GELU(x weight1' + bias1)) weight2', of which the backward pass keeps x, the first product, and what the second is of."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x_BND, weight_HD, bias_H, weight_DH, key, site, p, for_backward = inputs
        hidden_BNH, u_BNH = _linear_gelu_dropout(x_BND, weight_HD, bias_H, key, site, p, for_backward)
        ctx.site, ctx.p = site, p
        ctx.save_for_backward(x_BND, weight_HD, bias_H, weight_DH, key, u_BNH, hidden_BNH)
        return F.linear(hidden_BNH, weight_DH)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_BND, weight_HD, bias_H, weight_DH, key, u_BNH, hidden_BNH = ctx.saved_tensors
        dy_BND = gradients[0]
        du_BNH, dbias_H = _linear_gelu_dropout_backward(dy_BND, weight_DH, u_BNH, bias_H, key, ctx.site, ctx.p)
        dweight_DH = dy_BND.flatten(0, -2).mT @ hidden_BNH.flatten(0, -2)
        dweight_HD = du_BNH.flatten(0, -2).mT @ x_BND.flatten(0, -2)
        return du_BNH @ weight_HD, dweight_HD, dbias_H, dweight_DH, None, None, None, None


def mlp(x_BND: Tensor, weight_HD: Tensor, bias_H: Tensor, weight_DH: Tensor, key: Tensor, site: int, p: float) -> Tensor:
    """dropout(GELU(x weight1' + bias1)) weight2', in x's dtype. [B, N, D]

    Args:
        weight_HD, weight_DH: of the two linear layers, in x's dtype; D a multiple of 64, H of 128.
        bias_H: of the first, fp32. The second's is added by residual_norm.
        key: int64 [3], see dropout.key_on.
        site: the place in the model.
        p: 0: no dropout.

    Raises:
        ValueError: widths that there are no kernels for, or fp32 where torch's setting does not allow TF32.
    """
    H, D = weight_HD.shape
    exact = x_BND.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest" and not _INTERPRETED.value
    if D % 64 or H % 128 or exact:
        raise ValueError(f"there are no kernels for an MLP of widths {D} and {H} in {x_BND.dtype}{' without TF32' if exact else ''}")
    return cast(Tensor, _Mlp.apply(x_BND, weight_HD, bias_H, weight_DH, key, site, p, torch.is_grad_enabled()))


@torch.library.custom_op("diffvit::residual_norm", mutates_args=())
def _residual_norm(
    stream_BND: Tensor, branch_BND: Tensor, bias_D: Tensor, weight_D: Tensor, beta_D: Tensor, key: Tensor, site: int, p: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum, the normalised sum, and for the backward pass mean and 1 / standard deviation of its rows."""
    stream_BND, branch_BND, (rows, N, D) = stream_BND.contiguous(), branch_BND.contiguous(), _rows(branch_BND)
    sum_BND, normed_BND = torch.empty_like(stream_BND), torch.empty_like(branch_BND)
    mean_M, rstd_M = stream_BND.new_empty(rows), stream_BND.new_empty(rows)
    with torch.cuda.device_of(stream_BND):
        _tuned("residual_norm")[lambda meta: (triton.cdiv(rows, meta["R"]),)](
            stream_BND, branch_BND, bias_D, weight_D, beta_D, key, sum_BND, normed_BND, mean_M, rstd_M, rows, site, eps,
            N=N, D=D, C=triton.next_power_of_2(D), DROPPED=_dropped(p),
        )  # fmt: skip
    return sum_BND, normed_BND, mean_M, rstd_M


@torch.library.custom_op("diffvit::residual_norm_backward", mutates_args=())
def _residual_norm_backward(
    dsum_BND: Tensor, dnormed_BND: Tensor, sum_BND: Tensor, mean_M: Tensor, rstd_M: Tensor, weight_D: Tensor, key: Tensor,
    site: int, p: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dstream, dbranch, and the gradients of bias, weight and beta [3, D]."""
    dsum_BND, dnormed_BND, (rows, N, D) = dsum_BND.contiguous(), dnormed_BND.contiguous(), _rows(dnormed_BND)
    dstream_BND, dbranch_BND = torch.empty_like(dsum_BND), torch.empty_like(dnormed_BND)
    partial_G3D = _partial("residual_norm_backward", rows, 3, D, like=weight_D)
    with torch.cuda.device_of(dsum_BND):
        _tuned("residual_norm_backward")[lambda meta: (triton.cdiv(rows, meta["R"] * meta["TILES"]),)](
            dsum_BND, dnormed_BND, sum_BND, mean_M, rstd_M, weight_D, key, dstream_BND, dbranch_BND, partial_G3D, rows, site,
            N=N, D=D, C=triton.next_power_of_2(D), DROPPED=_dropped(p),
        )  # fmt: skip
    return dstream_BND, dbranch_BND, partial_G3D.sum(0)


@torch.library.custom_op("diffvit::head_norm", mutates_args=())
def head_norm(x_RD: Tensor, weight_D: Tensor, eps: float, factor: float) -> Tensor:
    """factor * RMSNorm(x) over the last dimension, a power of two, in x's dtype; the weight is fp32."""
    x_RD, D = x_RD.contiguous(), x_RD.shape[-1]
    out_RD, rows = torch.empty_like(x_RD), x_RD.numel() // D
    with torch.cuda.device_of(x_RD):
        _tuned("head_norm")[lambda meta: (triton.cdiv(rows, meta["R"]),)](x_RD, weight_D, out_RD, rows, eps, factor, D=D)
    return out_RD


@torch.library.custom_op("diffvit::head_norm_backward", mutates_args=())
def _head_norm_backward(dout_RD: Tensor, x_RD: Tensor, weight_D: Tensor, eps: float, factor: float) -> tuple[Tensor, Tensor]:
    dout_RD, x_RD, D = dout_RD.contiguous(), x_RD.contiguous(), x_RD.shape[-1]
    rows = x_RD.numel() // D
    dx_RD, partial_GD = torch.empty_like(x_RD), _partial("head_norm_backward", rows, D, like=weight_D)
    with torch.cuda.device_of(x_RD):
        _tuned("head_norm_backward")[lambda meta: (triton.cdiv(rows, meta["R"] * meta["TILES"]),)](
            dout_RD, x_RD, weight_D, dx_RD, partial_GD, rows, eps, factor, D=D
        )
    return dx_RD, partial_GD.sum(0)


@torch.library.custom_op("diffvit::dropout", mutates_args=())
def dropout(x_BND: Tensor, key: Tensor, site: int, p: float) -> Tensor:
    """x with values set to 0, others scaled up, in x's dtype; images are its first dimension. See mlp."""
    x_BND, (rows, N, D) = x_BND.contiguous(), _rows(x_BND)
    out_BND = torch.empty_like(x_BND)
    with torch.cuda.device_of(x_BND):
        _tuned("dropout")[lambda meta: (triton.cdiv(rows, meta["R"]),)](
            x_BND, key, out_BND, rows, site, N=N, D=D, C=triton.next_power_of_2(D), DROPPED=_dropped(p)
        )
    return out_BND


def residual_norm(
    stream_BND: Tensor, branch_BND: Tensor, bias_D: Tensor, weight_D: Tensor, beta_D: Tensor, key: Tensor, site: int, p: float, eps: float
) -> tuple[Tensor, Tensor]:
    """stream + dropout(branch + bias), fp32, and its LayerNorm, in the branch's dtype. [B, N, D] both. See mlp.

    Args:
        stream_BND: fp32.
        bias_D, weight_D, beta_D: fp32; of the linear layer that made the branch, and of the LayerNorm.
    """
    return _residual_norm(stream_BND, branch_BND, bias_D, weight_D, beta_D, key, site, p, eps)[:2]


# What torch.compile and autograd must know of each.


@_residual_norm.register_fake
def _(
    stream_BND: Tensor, branch_BND: Tensor, bias_D: Tensor, weight_D: Tensor, beta_D: Tensor, key: Tensor, site: int, p: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = stream_BND.numel() // stream_BND.shape[-1]
    sums = (stream_BND.new_empty(rows), stream_BND.new_empty(rows))
    return stream_BND.new_empty(stream_BND.shape), branch_BND.new_empty(branch_BND.shape), *sums


@_residual_norm_backward.register_fake
def _(
    dsum_BND: Tensor,
    dnormed_BND: Tensor,
    sum_BND: Tensor,
    mean_M: Tensor,
    rstd_M: Tensor,
    weight_D: Tensor,
    key: Tensor,
    site: int,
    p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return dsum_BND.new_empty(dsum_BND.shape), dnormed_BND.new_empty(dnormed_BND.shape), weight_D.new_empty(3, len(weight_D))


@head_norm.register_fake
def _(x_RD: Tensor, weight_D: Tensor, eps: float, factor: float) -> Tensor:
    return x_RD.new_empty(x_RD.shape)


@_head_norm_backward.register_fake
def _(dout_RD: Tensor, x_RD: Tensor, weight_D: Tensor, eps: float, factor: float) -> tuple[Tensor, Tensor]:
    return x_RD.new_empty(x_RD.shape), torch.empty_like(weight_D)


@dropout.register_fake
def _(x_BND: Tensor, key: Tensor, site: int, p: float) -> Tensor:
    return x_BND.new_empty(x_BND.shape)


def _keep_residual_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, branch_BND, _, weight_D, _, key, ctx.site, ctx.p, _ = inputs
    ctx.dtype = branch_BND.dtype
    sum_BND, _, mean_M, rstd_M = output
    ctx.set_materialize_grads(False)  # no zeros for the outputs that nobody differentiates
    ctx.save_for_backward(sum_BND, mean_M, rstd_M, weight_D, key)


def _differentiate_residual_norm(
    ctx: Any, dsum_BND: Tensor | None, dnormed_BND: Tensor | None, *_unused: None
) -> tuple[Tensor | None, ...]:
    sum_BND, *others = ctx.saved_tensors
    dsum_BND = torch.zeros_like(sum_BND) if dsum_BND is None else dsum_BND
    dnormed_BND = torch.zeros_like(sum_BND, dtype=ctx.dtype) if dnormed_BND is None else dnormed_BND
    dstream_BND, dbranch_BND, sums_3D = _residual_norm_backward(dsum_BND, dnormed_BND, sum_BND, *others, ctx.site, ctx.p)
    return dstream_BND, dbranch_BND, *sums_3D.unbind(), None, None, None, None


def _keep_head_norm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps, ctx.factor = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_head_norm(ctx: Any, dout_RD: Tensor) -> tuple[Tensor | None, ...]:
    return *_head_norm_backward(dout_RD, *ctx.saved_tensors, ctx.eps, ctx.factor), None, None


def _keep_dropout(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, key, ctx.site, ctx.p = inputs
    ctx.save_for_backward(key)


def _differentiate_dropout(ctx: Any, dout_BND: Tensor) -> tuple[Tensor | None, ...]:
    return dropout(dout_BND, *ctx.saved_tensors, ctx.site, ctx.p), None, None, None


_residual_norm.register_autograd(_differentiate_residual_norm, setup_context=_keep_residual_norm)
head_norm.register_autograd(_differentiate_head_norm, setup_context=_keep_head_norm)
dropout.register_autograd(_differentiate_dropout, setup_context=_keep_dropout)
