"""The factorisation of one sample's m x m system in the registers of a program.

    s = sqrt(h)    A_ij = s_i G_ij s_j    C = cI + A    v = s p    C = L diag(d) L^T

Pivot rule: a pivot d_k below floor_k = max(c, 4 eps C_kk) has been lost to rounding. It counts at
that floor and eliminates nothing: its multipliers and vhat_k are 0. A sample is marked lost when a
pivot was floored, kept fewer than half of its digits (d_k < sqrt(eps) C_kk) or is not finite.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def factorise(A, v, c, m):
    """Factorise C = cI + A, in A's dtype.

    Args:
        A: ``[BLOCK_M, BLOCK_M]``, float32 or float64; 0 outside of its m rows and columns.
        v: ``[BLOCK_M]``, likewise.
        c: above 0, in A's dtype.
        m: how many rows are no padding.

    Returns:
        log_det = sum_k log(d_k / c); what v explains, v^T C^-1 v, bounded by nothing; C^-1, 0 in
        the padding; w = C^-1 v; q = diag(A C^-1); and whether the sample is lost, int32.
    """
    EPS: tl.constexpr = 2.0**-52 if A.dtype == tl.float64 else 2.0**-23
    # The share of C_kk below which a pivot is rounding noise.
    PIVOT_EPS: tl.constexpr = 4 * EPS
    # Below this share of C_kk, sqrt(eps), a pivot has lost more than half of its digits.
    HALF_EPS: tl.constexpr = 2.0**-26 if A.dtype == tl.float64 else 2.0**-11.5
    i = tl.arange(0, A.shape[0])
    diagonal = i[:, None] == i[None, :]
    C_diagonal = c + tl.sum(tl.where(diagonal, A, 0.0), 0)

    # One tile holds both factors: after step k its columns up to k are L^-1 and the others are what
    # is left of A, without c. Row k of L^-1, e_k, is final at step k, which adds its share of the
    # inverse: C^-1 = sum_k e_k e_k^T / d_k.
    T = A
    C_inv = tl.zeros_like(A)
    w = tl.zeros_like(v)
    q = tl.zeros_like(v)
    pivots = tl.zeros_like(v) + c
    lost = 0
    # The padding is never a pivot and its rows of T are 0, so it takes no part.
    for k in range(0, m):
        is_k = i == k
        row = tl.sum(tl.where(is_k[:, None], T, 0.0), 0)
        left = tl.sum(tl.where(is_k, row, 0.0), 0)
        C_kk = tl.sum(tl.where(is_k, C_diagonal, 0.0), 0)
        floor_k = tl.maximum(c, C_kk * PIVOT_EPS)
        floored = c + left < floor_k
        d = tl.where(floored, floor_k, c + left)
        v_k = tl.where(floored, 0.0, tl.sum(tl.where(is_k, v, 0.0), 0))
        # True comparisons, which a NaN fails.
        resolved = (d >= C_kk * HALF_EPS) & (d / c < float("inf"))
        lost = tl.where(floored | (resolved == 0), 1, lost)
        pivots = tl.where(is_k, d, pivots)

        e = tl.where(is_k, 1.0, tl.where(i < k, row, 0.0))
        by_d = e / d
        C_inv += by_d[:, None] * e[None, :]
        w += by_d * v_k
        # q = 1 - c diag(C^-1), of which the first share is d - c: `left`, before c has rounded it.
        q += tl.where(is_k, tl.where(floored, d - c, left) / d, -c * by_d * e)

        multiplier = tl.where((i > k) & (floored == 0), row / d, 0.0)
        v = tl.where(is_k, v_k, v - multiplier * v_k)
        T = (
            tl.where(is_k[None, :], 0.0, T)
            - multiplier[:, None] * tl.where(is_k, 1.0, row)[None, :]
        )

    # v has become vhat, and a padded lane's pivot is c. Summed here, over lanes, rather than in the
    # loop: a tree of additions loses less than a chain.
    log_det = tl.sum(tl.log(pivots / c), 0)
    explained = tl.sum(v * (v / pivots), 0)
    return log_det, explained, C_inv, w, q, lost


@triton.jit
def bounded(explained, rr):
    """`explained` in [0, rr]; by comparisons, as min and max would turn a NaN into a bound."""
    explained = tl.where(explained < 0.0, 0.0, explained)
    return tl.where(explained > rr, rr, explained)
