"""Log-determinant, solve and inverse of the low-rank Gaussian's m x m system, in one launch.

    s = sqrt(h)    A_ij = s_i G_ij s_j    C = cI + A    v = s p    C = L diag(d) L^T
    log_det = sum_k log(d_k / c)          explained = sum_k vhat_k^2 / d_k,  vhat = L^-1 v
    w = C^-1 v    y = s w                 K_ij = s_i (C^-1)_ij s_j           q = diag(A C^-1)

The pivot rule is `_factorise`'s. This is the form for any cotangents; where they are the samples'
weights, `elbo` finishes them in the same launch.

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
from ._factorise import bounded, factorise
from ._launch import Configuration, begin, launch


@triton.jit(do_not_specialize=["B", "m", "splits"])
def _woodbury_fwd_kernel(
    g_ptr,  # [splits, B, m, m]
    p_ptr,  # [splits, B, m]
    rr_ptr,  # [splits, B]; of a rescue [B], as float32 summed it
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
    begin()
    # A rescue computes lost samples again, in float64, and leaves the others alone.
    dtype: tl.constexpr = tl.float64 if RESCUE else tl.float32
    b = tl.program_id(0).to(tl.int64)
    if RESCUE:
        if tl.load(lost_ptr + b) == 0:
            return
    i = tl.arange(0, BLOCK_M)
    inside = i < m
    tile = inside[:, None] & inside[None, :]
    at = i[:, None] * m + i[None, :]

    G = tl.zeros([BLOCK_M, BLOCK_M], dtype)
    p = tl.zeros([BLOCK_M], dtype)
    for split in range(0, splits):
        part = split * B + b
        G += tl.load(g_ptr + part * m * m + at, mask=tile, other=0.0)
        p += tl.load(p_ptr + part * m + i, mask=inside, other=0.0)
    rr = tl.load(rr_ptr + b).to(dtype)
    if not RESCUE:
        for split in range(1, splits):
            rr += tl.load(rr_ptr + split * B + b)
    if SUMS:
        tl.store(g_sum_ptr + b * m * m + at, G, mask=tile)
        tl.store(p_sum_ptr + b * m + i, p, mask=inside)
        tl.store(rr_sum_ptr + b, rr)
    s = tl.sqrt(tl.load(h_ptr + b * m + i, mask=inside, other=0.0).to(dtype))
    c = tl.load(c_ptr + b).to(dtype)
    A = s[:, None] * G * s[None, :]
    log_det, explained, C_inv, w, q, lost = factorise(A, s * p, c, m)
    tl.store(log_det_ptr + b, log_det)
    tl.store(explained_ptr + b, bounded(explained, rr))
    tl.store(k_ptr + b * m * m + at, s[:, None] * C_inv * s[None, :], mask=tile)
    tl.store(y_ptr + b * m + i, s * w, mask=inside)
    tl.store(q_ptr + b * m + i, q, mask=inside)
    tl.store(w_ptr + b * m + i, w, mask=inside)
    tl.store(lost_ptr + b, lost.to(tl.uint8))


def woodbury_block(m: int) -> int:
    """The side of the tile that holds an m x m system."""
    return max(16, triton.next_power_of_2(m))


def woodbury_warps(block_m: int, rescue: bool = False) -> int:
    """Warps of a program that factorises a system of that block, in float64 for a rescue."""
    # The m dependent steps pay for every warp that has to be synchronised, so only m = 64, whose
    # tiles do not fit fewer warps' registers, gets many. A float64 takes two registers; at 16 warps
    # its tiles would exceed the 128 that a thread then has.
    return 8 if block_m == 64 else 4 if rescue or block_m == 32 else 1


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
    launch(
        *(_woodbury_fwd_kernel, (B,), G, p, rr, h, c),
        *(log_det, explained, K, y, q, w, lost.view(torch.uint8)),
        *(*(sums or (G, p, rr)), B, m, splits),
        BLOCK_M=block_m,
        SUMS=sums is not None,
        RESCUE=False,
        num_warps=woodbury_warps(block_m),
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
            num_warps=woodbury_warps(block_m),
        )
