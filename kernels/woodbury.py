"""Log-determinant, solve and inverse of the low-rank Gaussian's m x m system, in one launch.

    s = sqrt(h)    A_ij = s_i G_ij s_j    C = cI + A    v = s p    C = L diag(d) L^T
    log_det = sum_k log(d_k / c)          explained = sum_k vhat_k^2 / d_k,  vhat = L^-1 v
    w = C^-1 v    y = s w                 K_ij = s_i (C^-1)_ij s_j           q = diag(A C^-1)

Pivot rule: a pivot d_k below floor_k = max(c, 4 eps C_kk) has been lost to rounding. It counts at
that floor and eliminates nothing: its multipliers and vhat_k are 0. A sample is marked lost when a
pivot was floored, kept fewer than half of its digits (d_k < sqrt(eps) C_kk) or is not finite.

Floor: the bytes of G, p and K once (8 m^2 a sample), 2 m^3 flops in m steps that depend on each
other. A program keeps all tiles of its sample in registers; the steps, not the bytes, set the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._contract import WOODBURY_MAX_M, Woodbury
from ._launch import Configuration


@triton.jit(do_not_specialize=["B", "m", "splits"])
def _woodbury_fwd_kernel(
    g_ptr,  # [splits, B, m, m]
    p_ptr,  # [splits, B, m]
    rr_ptr,  # [splits, B]
    h_ptr,  # [B, m]
    c_ptr,  # [B]
    log_det_ptr,  # [B]
    explained_ptr,  # [B]
    k_ptr,  # K [B, m, m]
    y_ptr,  # [B, m]
    q_ptr,  # [B, m]
    w_ptr,  # [B, m]
    lost_ptr,  # [B], uint8
    g_sum_ptr,  # [B, m, m], or g itself without SUMS
    p_sum_ptr,  # [B, m]
    rr_sum_ptr,  # [B]
    B,
    m,
    splits,
    BLOCK_M: tl.constexpr,
    SUMS: tl.constexpr,
    RESCUE: tl.constexpr,
):
    # A rescue computes lost samples again, in float64, and leaves the others alone.
    dtype: tl.constexpr = tl.float64 if RESCUE else tl.float32
    EPS: tl.constexpr = 2.0**-52 if RESCUE else 2.0**-23
    # The share of C_kk below which a pivot is rounding noise.
    PIVOT_EPS: tl.constexpr = 4 * EPS
    # Below this share of C_kk, sqrt(eps), a pivot has lost more than half of its digits.
    HALF_EPS: tl.constexpr = 2.0**-26 if RESCUE else 2.0**-11.5
    b = tl.program_id(0).to(tl.int64)
    if RESCUE:
        if tl.load(lost_ptr + b) == 0:
            return
    i = tl.arange(0, BLOCK_M)
    inside = i < m
    tile = inside[:, None] & inside[None, :]
    at = i[:, None] * m + i[None, :]
    diagonal = i[:, None] == i[None, :]

    G = tl.zeros([BLOCK_M, BLOCK_M], dtype)
    p = tl.zeros([BLOCK_M], dtype)
    for split in range(0, splits):
        part = split * B + b
        G += tl.load(g_ptr + part * m * m + at, mask=tile, other=0.0)
        p += tl.load(p_ptr + part * m + i, mask=inside, other=0.0)
    rr = tl.load(rr_ptr + b)
    for split in range(1, splits):
        rr += tl.load(rr_ptr + split * B + b)
    if SUMS:
        tl.store(g_sum_ptr + b * m * m + at, G, mask=tile)
        tl.store(p_sum_ptr + b * m + i, p, mask=inside)
        tl.store(rr_sum_ptr + b, rr)
    s = tl.sqrt(tl.load(h_ptr + b * m + i, mask=inside, other=0.0).to(dtype))
    c = tl.load(c_ptr + b).to(dtype)
    A = s[:, None] * G * s[None, :]
    a = tl.sum(tl.where(diagonal, A, 0.0), 0)
    floor = tl.maximum(c, (c + a) * PIVOT_EPS)

    # One tile holds both factors: after step k its columns up to k are L^-1 and the others are what
    # is left of C. Row k of L^-1, e_k, is final at step k, which adds its share of the inverse:
    # C^-1 = sum_k e_k e_k^T / d_k.
    T = tl.where(diagonal, c + A, A)
    C_inv = tl.zeros([BLOCK_M, BLOCK_M], dtype)
    v = s * p
    w = tl.zeros([BLOCK_M], dtype)
    pivots = tl.zeros([BLOCK_M], dtype) + c
    lost = 0
    # The padding is never a pivot and its rows of T are 0, so it takes no part.
    for k in range(0, m):
        is_k = i == k
        row = tl.sum(tl.where(is_k[:, None], T, 0.0), 0)
        pivot = tl.sum(tl.where(is_k, row, 0.0), 0)
        floor_k = tl.sum(tl.where(is_k, floor, 0.0), 0)
        floored = pivot < floor_k
        d = tl.where(floored, floor_k, pivot)
        v_k = tl.where(floored, 0.0, tl.sum(tl.where(is_k, v, 0.0), 0))
        lost = tl.where(floored, 1, lost)
        pivots = tl.where(is_k, d, pivots)

        e = tl.where(is_k, 1.0, tl.where(i < k, row, 0.0))
        C_inv += (e / d)[:, None] * e[None, :]
        w += e * (v_k / d)

        multiplier = tl.where((i > k) & (floored == 0), row / d, 0.0)
        v = tl.where(is_k, v_k, v - multiplier * v_k)
        T = (
            tl.where(is_k[None, :], 0.0, T)
            - multiplier[:, None] * tl.where(is_k, 1.0, row)[None, :]
        )

    ratio = pivots / c
    # True comparisons, which a NaN fails. A padded lane has pivot c and a = 0: it is resolved.
    resolved = (pivots >= (c + a) * HALF_EPS) & (ratio < float("inf"))
    lost = tl.maximum(lost, tl.max((resolved == 0).to(tl.int32), 0))
    # v has become vhat, and a padded lane's pivot is c. Summed here, over lanes, rather than in the
    # loop: a tree of additions loses less than a chain.
    log_det = tl.sum(tl.log(ratio), 0)
    explained = tl.sum(v * (v / pivots), 0)
    # Comparisons, not min and max, which would turn a NaN into a bound.
    explained = tl.where(explained < 0.0, 0.0, explained)
    explained = tl.where(explained > rr, rr, explained)
    # Each form of q is exact where the other cancels: 1 - c (C^-1)_ii is 1 - 1 for a small A_ii.
    q_sum = tl.sum(A * C_inv, 0)
    q_complement = 1.0 - c * tl.sum(tl.where(diagonal, C_inv, 0.0), 0)
    tl.store(log_det_ptr + b, log_det)
    tl.store(explained_ptr + b, explained)
    tl.store(k_ptr + b * m * m + at, s[:, None] * C_inv * s[None, :], mask=tile)
    tl.store(y_ptr + b * m + i, s * w, mask=inside)
    tl.store(q_ptr + b * m + i, tl.where(a < c, q_sum, q_complement), mask=inside)
    tl.store(w_ptr + b * m + i, w, mask=inside)
    tl.store(lost_ptr + b, lost.to(tl.uint8))


def woodbury_block(m: int) -> int:
    """The side of the tile that holds an m x m system."""
    return max(16, triton.next_power_of_2(m))


def _num_warps(block_m: int) -> int:
    # The m dependent steps pay for every warp that has to be synchronised, so only m = 64, whose
    # three tiles do not fit fewer warps' registers, gets many.
    return {16: 1, 32: 4, 64: 8}[block_m]


def woodbury_fwd(G: Tensor, p: Tensor, rr: Tensor, h: Tensor, c: Tensor) -> Woodbury:
    """Factorise C = cI + S G S for each sample and return all that the loss and its adjoint need.

    Args:
        G: float32 ``[B, m, m]`` with m <= 64, or partial sums ``[S, B, m, m]`` that are added here.
        p: float32 ``[B, m]`` or ``[S, B, m]``.
        rr: float32 ``[B]`` or ``[S, B]``.
        h: latent variances >= 0, float32 ``[B, m]``.
        c: noise variances > 0, float32 ``[B]``.

    Raises:
        TypeError: an input that is not float32.
        ValueError: m above 64.
    """
    return _launch(G, p, rr, h, c, None)


def woodbury_of_partials(
    G: Tensor, p: Tensor, rr: Tensor, h: Tensor, c: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor], Woodbury]:
    """`woodbury_fwd` of partial sums, and ``(G [B, m, m], p [B, m], rr [B])`` themselves."""
    sums = tuple(torch.empty(t.shape[1:], dtype=t.dtype, device=t.device) for t in (G, p, rr))
    return sums, _launch(G, p, rr, h, c, sums)


def _launch(
    G: Tensor,
    p: Tensor,
    rr: Tensor,
    h: Tensor,
    c: Tensor,
    sums: tuple[Tensor, Tensor, Tensor] | None,
) -> Woodbury:
    for name, tensor in {"G": G, "p": p, "rr": rr, "h": h, "c": c}.items():
        if tensor.dtype != torch.float32:
            raise TypeError(f"{name} has dtype {tensor.dtype}: this kernel takes float32")
    m = G.shape[-1]
    if m > WOODBURY_MAX_M:
        raise ValueError(
            f"m={m} does not fit the registers of one program (m <= {WOODBURY_MAX_M}); "
            "use the factorisation in plain torch"
        )
    splits = G.shape[0] if G.dim() == 4 else 1
    G, p, rr, h, c = (t.contiguous() for t in (G, p, rr, h, c))
    B = h.shape[0]
    log_det, explained = torch.empty_like(c), torch.empty_like(c)
    K = torch.empty((B, m, m), dtype=h.dtype, device=h.device)
    y, q, w = torch.empty_like(h), torch.empty_like(h), torch.empty_like(h)
    lost = torch.empty((B,), dtype=torch.bool, device=h.device)
    block_m = woodbury_block(m)
    with torch.cuda.device_of(h):
        _woodbury_fwd_kernel[(B,)](
            *(G, p, rr, h, c, log_det, explained, K, y, q, w, lost.view(torch.uint8)),
            *(*(sums or (G, p, rr)), B, m, splits),
            BLOCK_M=block_m,
            SUMS=sums is not None,
            RESCUE=False,
            num_warps=_num_warps(block_m),
        )
    return Woodbury(log_det, explained, K, y, q, w, lost)


def configurations() -> Iterator[Configuration]:
    """Every compilation of this kernel: the buckets of m."""
    names = "g p rr h c log_det explained k y q w g_sum p_sum rr_sum".split()
    types = {f"{name}_ptr": "*fp32" for name in names} | {"lost_ptr": "*u8"}
    for block_m, sums in product((16, 32, 64), (False, True)):
        yield Configuration(
            _woodbury_fwd_kernel,
            f"m={block_m}" + (" sums" if sums else ""),
            types,
            {"BLOCK_M": block_m, "SUMS": sums, "RESCUE": False},
            num_warps=_num_warps(block_m),
        )
