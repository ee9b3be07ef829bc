"""Rescue of lost samples: their Gram and factorisation again, in float64.

A float32 Gram cannot resolve eigenvalue ratios above 1e7 against c. Products of float32 numbers are
exact in float64, so a sample marked lost is worth a second look wherever its float32 J is at hand,
or is made again by `gram_tail`. The host never learns which samples those are: every program reads
its sample's flag and leaves at once where it is not set. Two launches: partial Grams, then the
factorisation of `woodbury`.

Floor, where nothing is lost: two launches that read B flags. A lost sample reads J once and does
2 m^2 n float64 FLOPs, which cards for games run at 1/64 of their float32 rate.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._blocks import add_gram_float64, store_sums
from ._contract import Woodbury, rows_dense
from ._launch import Configuration, begin, cdiv, empty_sums, launch, pointer
from .woodbury import _woodbury_fwd_kernel, woodbury_block, woodbury_warps

# Columns of J that one program sums up, at the least; and into how many parts n is cut at most.
_COLUMNS = 512
_MAX_SPLITS = 16


@triton.jit(do_not_specialize=["B", "m", "splits"])
def _gram_float64_kernel(
    lost_ptr,  # [B], uint8
    j_ptr,  # [B, m, n], unit stride in n
    r_ptr,  # [B, n], unit stride in n
    g_ptr,  # [splits, B, m, m], float64
    p_ptr,  # [splits, B, m], float64
    rr_ptr,  # [splits, B], float64
    B,
    m,
    n,
    splits,
    n_per_split,
    stride_j_b,
    stride_j_m,
    stride_r_b,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    begin()
    pid = tl.program_id(0)
    split = pid % splits
    b = (pid // splits).to(tl.int64)
    if tl.load(lost_ptr + b) == 0:
        return
    i = tl.arange(0, BLOCK_M)
    rows = j_ptr + b * stride_j_b + i.to(tl.int64)[:, None] * stride_j_m
    first = split * n_per_split
    last = tl.minimum(first + n_per_split, n)

    G = tl.zeros([BLOCK_M, BLOCK_M], tl.float64)
    p_lanes = tl.zeros([BLOCK_M, BLOCK_N], tl.float64)
    rr_lanes = tl.zeros([BLOCK_N], tl.float64)
    for start in range(first, last, BLOCK_N):
        ks = start + tl.arange(0, BLOCK_N)
        inside = ks < last
        J = tl.load(rows + ks[None, :], mask=(i < m)[:, None] & inside[None, :], other=0.0)
        J = J.to(tl.float64)
        r = tl.load(r_ptr + b * stride_r_b + ks, mask=inside, other=0.0).to(tl.float64)
        G = add_gram_float64(G, J, m)
        p_lanes += J * r[None, :]
        rr_lanes += r * r

    store_sums(
        *(g_ptr, p_ptr, rr_ptr, split * B + b, m, i, i, G, tl.sum(p_lanes, 1)),
        *(tl.sum(rr_lanes, 0), True, True),
    )


def gram_float64(J: Tensor, r: Tensor, lost: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lost samples' sums again, in one launch.

    Args:
        J: float32 ``[B, m, n]`` with m <= 64.
        r: ``[B, n]``.
        lost: bool ``[B]``.

    Returns:
        Float64 ``(G [S, B, m, m], p [S, B, m], rr [S, B])``, uninitialised where nothing is lost.

    Raises:
        TypeError: J is not float32.
    """
    if J.dtype != torch.float32:
        raise TypeError(f"J has dtype {J.dtype}: rounded tangents cannot be rescued in float64")
    J, r = rows_dense(J), rows_dense(r)
    B, m, n = J.shape
    block_m = woodbury_block(m)
    block_n = _block_n(block_m)
    wanted = min(_MAX_SPLITS, cdiv(n, _COLUMNS))
    n_per_split = cdiv(cdiv(n, block_n), wanted) * block_n
    splits = cdiv(n, n_per_split)
    sums = empty_sums(splits, B, m, J.device, torch.float64)
    launch(
        *(_gram_float64_kernel, (B * splits,), lost.view(torch.uint8), J, r),
        *(*sums, B, m, n, splits, n_per_split, J.stride(0), J.stride(1), r.stride(0)),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=_gram_warps(block_m),
    )
    return sums


def rescue(
    J: Tensor, r: Tensor, squared_error: Tensor, h: Tensor, c: Tensor, solved: Woodbury
) -> None:
    """Compute lost samples again, in place; a flag stays set where float64 loses a pivot too.

    Args:
        J: float32 ``[B, m, n]`` with m <= 64.
        r: ``[B, n]``.
        squared_error: r^T r as it was summed in float32, ``[B]``.
        h: float32 ``[B, m]``.
        c: float32 ``[B]``.
        solved: what `woodbury_fwd` made of them, dense as it returned it; overwritten.

    Raises:
        TypeError: J is not float32.
    """
    solve_again(gram_float64(J, r, solved.lost), squared_error, h, c, solved)


def solve_again(
    sums: tuple[Tensor, Tensor, Tensor],
    squared_error: Tensor,
    h: Tensor,
    c: Tensor,
    solved: Woodbury,
) -> None:
    """The second launch of `rescue`, in place.

    Args:
        sums: float64 parts of ``G [S, B, m, m]`` and ``p [S, B, m]``; those of samples that are not
            lost are not read. (The third, of rr, is not read at all: what is explained is bounded
            by `squared_error`.)
        squared_error: as in `rescue`.
        h: likewise.
        c: likewise.
        solved: likewise.
    """
    G, p, _ = sums
    splits, B, m, _ = G.shape
    block_m = woodbury_block(m)
    launch(
        *(_woodbury_fwd_kernel, (B,), G, p, squared_error, h.contiguous(), c.contiguous()),
        *(*solved[:-1], solved.lost.view(torch.uint8)),
        # Without SUMS these three are not written.
        *(G, p, squared_error, B, m, splits),
        **_SOLVE,
        BLOCK_M=block_m,
        num_warps=woodbury_warps(block_m, rescue=True),
    )


_SOLVE = {"SUMS": False, "RESCUE": True}


def _block_n(block_m: int) -> int:
    return 2048 // block_m


def _gram_warps(block_m: int) -> int:
    # A float64 takes two registers.
    return 16 if block_m == 64 else 4


def configurations() -> Iterator[Configuration]:
    """Every compilation of either kernel: the buckets of m, even and odd sizes."""
    sums = {f"{name}_ptr": "*fp64" for name in ("g", "p", "rr")} | {"lost_ptr": "*u8"}
    for block_m in (16, 32, 64):
        for odd in ((), ("j_ptr", "r_ptr", "n", "stride_j_b", "stride_j_m", "stride_r_b")):
            yield Configuration(
                _gram_float64_kernel,
                f"m={block_m}" + (" odd" if odd else ""),
                sums | {"j_ptr": pointer(torch.float32), "r_ptr": pointer(torch.float32)},
                {"BLOCK_M": block_m, "BLOCK_N": _block_n(block_m)},
                _gram_warps(block_m),
                odd=odd,
            )
        names = "rr h c log_det explained k y q w".split()
        more = {
            "g_sum_ptr": "*fp64",
            "p_sum_ptr": "*fp64",
            "rr_sum_ptr": "*fp32",
            "rr_ptr": "*fp32",
        }
        yield Configuration(
            _woodbury_fwd_kernel,
            f"m={block_m} rescue",
            sums | more | {f"{name}_ptr": "*fp32" for name in names},
            {"BLOCK_M": block_m, **_SOLVE},
            woodbury_warps(block_m, rescue=True),
        )
