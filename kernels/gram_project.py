"""Gram matrix and projection of a tangent-major Jacobian, and their pullback.

    forward     G = J J^T          p = J r          rr = r^T r
    backward    dJ = M J + u r^T   dr = J^T u + 2 g_rr r      with M = dG + dG^T, u = dp

per sample, J [m, n] and r [n]; sums in float32, results G, p, rr in float32.

Floor, per sample, with e bytes an element: the forward reads (m + 1) n e bytes, the backward reads
the same and writes as much; each does 2 m^2 n flops. For m <= 64 both kernels move only that.
Above, J is cut into row tiles of 64 and read once per tile, mostly from L2.

The forward cuts n into `splits` parts that are summed in a fixed order by a second kernel (or by
the factorisation): the same bits on every run, and a full chip when the batch is small.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._blocks import as_mask, dot, store_sums
from ._contract import rows_dense
from ._gram_project_tile import Tile, bwd_tile, fwd_tile, splits
from ._launch import (
    INTERPRET,
    Configuration,
    begin,
    cdiv,
    check_dtypes,
    device_limits,
    empty_sums,
    launch,
    pointer,
)

_SUM_BLOCK = 1024


# Batch and latent sizes are not specialised: a value of 1 or a multiple of 16 compiles nothing new.
# n_per_split is, as a multiple of BLOCK_N: without that its loads are one element wide.
@triton.jit(do_not_specialize=["B", "m", "splits", "tiles"])
def _gram_project_fwd_kernel(
    j_ptr,  # [B, m, n], unit stride in n
    r_ptr,  # [B, n] float32, unit stride in n
    g_ptr,  # [splits, B, m, m]
    p_ptr,  # [splits, B, m]
    rr_ptr,  # [splits, B]
    B,
    m,
    n,
    splits,
    n_per_split,
    tiles,
    stride_j_b,
    stride_j_m,
    stride_r_b,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ONE_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    begin()
    # Tile pairs of one part of one sample are neighbours in launch order: they share J through L2.
    pid = tl.program_id(0)
    row_tile = pid % tiles
    col_tile = (pid // tiles) % tiles
    split = (pid // (tiles * tiles)) % splits
    b = (pid // (tiles * tiles * splits)).to(tl.int64)

    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = col_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ptrs = j_ptr + b * stride_j_b + rows.to(tl.int64)[:, None] * stride_j_m
    col_ptrs = j_ptr + b * stride_j_b + cols.to(tl.int64)[:, None] * stride_j_m
    first = split * n_per_split
    last = tl.minimum(first + n_per_split, n)

    G = tl.zeros([BLOCK_M, BLOCK_M], tl.float32)
    # p is summed over its lanes once, after the loop: a reduction in each step costs more.
    p_lanes = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    rr_lanes = tl.zeros([BLOCK_N], tl.float32)
    for start in range(first, last, BLOCK_N):
        ks = start + tl.arange(0, BLOCK_N)
        inside = ks < last
        J = tl.load(row_ptrs + ks[None, :], mask=(rows < m)[:, None] & inside[None, :], other=0.0)
        r = tl.load(r_ptr + b * stride_r_b + ks, mask=inside, other=0.0)
        if ONE_TILE:
            J_cols = J
        else:
            J_cols = tl.load(
                col_ptrs + ks[None, :], mask=(cols < m)[:, None] & inside[None, :], other=0.0
            )
        G = dot(J, tl.trans(J_cols), G, PRECISION)
        p_lanes += J.to(tl.float32) * r[None, :]
        rr_lanes += r * r

    first_col = col_tile == 0
    store_sums(
        *(g_ptr, p_ptr, rr_ptr, split * B + b, m, rows, cols, G, tl.sum(p_lanes, 1)),
        *(tl.sum(rr_lanes, 0), first_col, first_col & (row_tile == 0)),
    )


@triton.jit(do_not_specialize=["B", "m", "splits", "blocks"])
def _gram_project_sum_kernel(
    g_part_ptr,  # [splits, B, m, m]
    p_part_ptr,  # [splits, B, m]
    rr_part_ptr,  # [splits, B]
    g_ptr,  # [B, m, m]
    p_ptr,  # [B, m]
    rr_ptr,  # [B]
    B,
    m,
    splits,
    blocks,
    BLOCK: tl.constexpr,
):
    begin()
    pid = tl.program_id(0)
    b = (pid // blocks).to(tl.int64)
    # The lanes of a sample run over G, then p, then rr.
    at_g = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    at_p = at_g - m * m
    is_g = at_p < 0
    is_p = (at_p >= 0) & (at_p < m)
    is_rr = at_p == m
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(0, splits):
        part = split * B + b
        total += tl.load(g_part_ptr + part * m * m + at_g, mask=is_g, other=0.0)
        total += tl.load(p_part_ptr + part * m + at_p, mask=is_p, other=0.0)
        total += tl.load(rr_part_ptr + part + at_p - m, mask=is_rr, other=0.0)
    tl.store(g_ptr + b * m * m + at_g, total, mask=is_g)
    tl.store(p_ptr + b * m + at_p, total, mask=is_p)
    tl.store(rr_ptr + b + at_p - m, total, mask=is_rr)


@triton.jit(do_not_specialize=["m", "tiles", "n_blocks"])
def _gram_project_bwd_kernel(
    j_ptr,  # [B, m, n], unit stride in n
    r_ptr,  # [B, n] float32, unit stride in n
    m_ptr,  # M [B, m, m]
    u_ptr,  # [B, m]
    g_rr_ptr,  # [B]
    dj_ptr,  # [B, m, n], unit stride in n
    dr_ptr,  # [B, n]
    m,
    n,
    tiles,
    n_blocks,
    stride_j_b,
    stride_j_m,
    stride_r_b,
    stride_dj_b,
    stride_dj_m,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    begin()
    pid = tl.program_id(0)
    row_tile = pid % tiles
    n_block = (pid // tiles) % n_blocks
    b = (pid // (tiles * n_blocks)).to(tl.int64)

    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    ks = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.load(r_ptr + b * stride_r_b + ks, mask=ks < n, other=0.0)
    u_rows = tl.load(u_ptr + b * m + rows, mask=rows < m, other=0.0)

    dJ = u_rows[:, None] * r[None, :]
    dr = 2.0 * tl.load(g_rr_ptr + b) * r
    for first_col in range(0, m, BLOCK_M):
        cols = first_col + tl.arange(0, BLOCK_M)
        J = tl.load(
            j_ptr + b * stride_j_b + cols.to(tl.int64)[:, None] * stride_j_m + ks[None, :],
            mask=(cols < m)[:, None] & (ks < n)[None, :],
            other=0.0,
        )
        M = tl.load(
            m_ptr + b * m * m + (rows[:, None] * m + cols[None, :]),
            mask=(rows < m)[:, None] & (cols < m)[None, :],
            other=0.0,
        )
        u_cols = tl.load(u_ptr + b * m + cols, mask=cols < m, other=0.0)
        J32 = J.to(tl.float32)
        if J.dtype == tl.bfloat16 and not INTERPRET:
            # M as the sum of two bf16 numbers keeps 16 of its bits on the bf16 tensor cores.
            high = M.to(tl.bfloat16)
            low = (M - high.to(tl.float32)).to(tl.bfloat16)
            dJ = tl.dot(high, J, dJ)
            dJ = tl.dot(low, J, dJ)
        else:
            dJ = tl.dot(M, J32, dJ, input_precision=PRECISION)
        dr += tl.sum(u_cols[:, None] * J32, 0)

    dj_ptrs = dj_ptr + b * stride_dj_b + rows.to(tl.int64)[:, None] * stride_dj_m + ks[None, :]
    tl.store(dj_ptrs, dJ, mask=(rows < m)[:, None] & (ks < n)[None, :])
    tl.store(dr_ptr + b * n + ks, dr, mask=(ks < n) & as_mask(row_tile == 0))


def gram_project_partials(
    J: Tensor, r: Tensor, input_precision: str = "ieee"
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over parts of n, in a fixed split.

    Args:
        J: ``[B, m, n]``, float32, bfloat16 or float16; any strides, copied only where n's is not 1.
        r: ``[B, n]``, one of the same dtypes; computed with in float32.
        input_precision: how float32 products are formed: "ieee", "tf32x3" or "tf32".

    Returns:
        Float32 ``(G [S, B, m, m], p [S, B, m], rr [S, B])``; their sums over S are G, p and rr.

    Raises:
        TypeError: another dtype.
    """
    check_dtypes(J=J, r=r)
    J, r = rows_dense(J), rows_dense(r.to(torch.float32))
    B, m, n = J.shape
    limits = device_limits(J)
    tile = fwd_tile(m, n, J.dtype, input_precision, limits)
    tiles = cdiv(m, tile.block_m)
    parts, n_per_split = splits(B, n, tiles * tiles, tile.block_n, limits)
    G, p, rr = empty_sums(parts, B, m, J.device)
    launch(
        *(_gram_project_fwd_kernel, (B * parts * tiles * tiles,)),
        *(J, r, G, p, rr, B, m, n, parts, n_per_split, tiles),
        *(J.stride(0), J.stride(1), r.stride(0)),
        **_fwd_constexprs(tile, m, input_precision),
        **tile.options,
    )
    return G, p, rr


def gram_project_fwd(
    J: Tensor, r: Tensor, input_precision: str = "ieee"
) -> tuple[Tensor, Tensor, Tensor]:
    """Return float32 ``(G [B, m, m], p [B, m], rr [B])``; arguments as `gram_project_partials`."""
    parts = gram_project_partials(J, r, input_precision)
    count, B, m = parts[1].shape
    if count == 1:
        G, p, rr = parts
        return G.squeeze(0), p.squeeze(0), rr.squeeze(0)
    sums = tuple(torch.empty(part.shape[1:], dtype=part.dtype, device=J.device) for part in parts)
    blocks = cdiv(m * m + m + 1, _SUM_BLOCK)
    launch(
        *(_gram_project_sum_kernel, (B * blocks,)),
        *parts,
        *sums,
        B,
        m,
        count,
        blocks,
        BLOCK=_SUM_BLOCK,
        num_warps=4,
    )
    return sums


def gram_project_bwd(
    J: Tensor,
    r: Tensor,
    M: Tensor,
    u: Tensor,
    g_rr: Tensor,
    input_precision: str = "ieee",
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Pull cotangents of G, p and rr back to J and r.

    Args:
        J: ``[B, m, n]`` as in the forward.
        r: ``[B, n]`` as in the forward.
        M: dG + dG^T, ``[B, m, m]`` float32.
        u: dp, ``[B, m]`` float32.
        g_rr: d rr, ``[B]`` float32.
        input_precision: as in `gram_project_partials`; bfloat16 J always runs on bfloat16 products,
            with M in two terms.
        out: where dJ is written, ``[B, m, n]`` of J's dtype with unit stride in n; None for new
            memory in J's order of strides.

    Returns:
        ``(dJ [B, m, n], dr [B, n])`` in the dtypes of J and r.

    Raises:
        TypeError: another dtype.
    """
    check_dtypes(J=J, r=r)
    J, r32 = rows_dense(J), rows_dense(r.to(torch.float32))
    M, u, g_rr = (t.to(torch.float32).contiguous() for t in (M, u, g_rr))
    B, m, n = J.shape
    tile = bwd_tile(m, n, J.dtype, input_precision, device_limits(J))
    tiles, n_blocks = cdiv(m, tile.block_m), cdiv(n, tile.block_n)
    dJ = torch.empty_like(J) if out is None else out
    dr = torch.empty((B, n), dtype=torch.float32, device=r.device)
    launch(
        *(_gram_project_bwd_kernel, (B * tiles * n_blocks,)),
        *(J, r32, M, u, g_rr, dJ, dr, m, n, tiles, n_blocks),
        *(J.stride(0), J.stride(1), r32.stride(0), dJ.stride(0), dJ.stride(1)),
        **_bwd_constexprs(tile, input_precision),
        **tile.options,
    )
    return dJ, dr.to(r.dtype)


def _fwd_constexprs(tile: Tile, m: int, precision: str) -> dict:
    one_tile = m <= tile.block_m
    return {
        **{"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n},
        **{"ONE_TILE": one_tile, "PRECISION": precision},
    }


def _bwd_constexprs(tile: Tile, precision: str) -> dict:
    return {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "PRECISION": precision}


def configurations() -> Iterator[Configuration]:
    """Every compilation at the default precision: m's buckets, J's dtypes, even and odd sizes."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    limits = device_limits(torch.empty(0))
    for m, dtype, is_odd in product((16, 32, 64, 128), dtypes, (False, True)):
        label = f"m{'>64' if m > 64 else f'={m}'} J {pointer(dtype)[1:]}"
        label += " odd" if is_odd else ""
        odd = ("j_ptr", "r_ptr", "n", "stride_j_b", "stride_j_m", "stride_r_b") if is_odd else ()
        # Odd sizes, and those of the paper's images.
        n = 12287 if is_odd else 12288
        fwd, bwd = (tile(m, n, dtype, "ieee", limits) for tile in (fwd_tile, bwd_tile))
        yield Configuration(
            _gram_project_fwd_kernel,
            label,
            _pointers("r g p rr") | {"j_ptr": pointer(dtype)},
            _fwd_constexprs(fwd, m, "ieee"),
            fwd.num_warps,
            fwd.num_stages,
            odd,
        )
        yield Configuration(
            _gram_project_bwd_kernel,
            label,
            _pointers("r m u g_rr dr") | {"j_ptr": pointer(dtype), "dj_ptr": pointer(dtype)},
            _bwd_constexprs(bwd, "ieee"),
            odd=(*odd, "stride_dj_b", "stride_dj_m") if is_odd else (),
            **bwd.options,
        )
    yield Configuration(
        _gram_project_sum_kernel,
        "any m",
        _pointers("g_part p_part rr_part g p rr"),
        {"BLOCK": _SUM_BLOCK},
        num_warps=4,
    )


def _pointers(names: str) -> dict[str, str]:
    return {f"{name}_ptr": "*fp32" for name in names.split()}
