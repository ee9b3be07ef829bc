"""The weight's gradient of a layer on a stack; `_implicit_gemm` has the formulas and the floor."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._blocks import dot
from ._implicit_gemm import moved
from ._launch import DeviceLimits, cdiv, device_limits
from ._stack_geometry import Front, Gather
from ._stack_tile import Tile, bucket, is_curved
from .activations import front_constexprs


@triton.jit(
    do_not_specialize=["rows", "rows_per_split", "splits", "B", "grid_h", "grid_w", "H", "W"]
)
def tangent_weight_kernel(
    p_ptr,  # [S, B, grid_h, grid_w, M], one row a position
    q_ptr,  # [S, B, H, W, C], read in a window around each position
    part_ptr,  # [splits, M, KERNEL * KERNEL * C]
    rows,
    rows_per_split,
    splits,
    B,
    grid_h,
    grid_w,
    M,
    H,
    W,
    C,
    KIND: tl.constexpr,
    P0: tl.constexpr,
    P1: tl.constexpr,
    ON_WINDOW: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # The tiles of one part are neighbours in launch order: they share its rows through L2.
    pid = tl.program_id(0)
    N = KERNEL * KERNEL * C
    col_tiles, row_tiles = tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M)
    col = pid % col_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    out = pid // col_tiles % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    split = pid // (col_tiles * row_tiles)
    tap = col // C
    c = col - tap * C
    ky, kx = tap // KERNEL - PADDING, tap % KERNEL - PADDING
    image = tl.cast(H * W * C, tl.int64)
    grid = grid_h * grid_w
    first = split * rows_per_split
    last = tl.minimum(first + rows_per_split, rows)

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(first, last, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        n = row // grid
        y, x = row // grid_w % grid_h, row % grid_w
        is_primal = (n < B)[:, None]

        p_mask = (row < last)[:, None] & (out < M)[None, :]
        p = tl.load(p_ptr + row.to(tl.int64)[:, None] * M + out[None, :], mask=p_mask, other=0.0)
        at_y, at_x = (y * STRIDE)[:, None] + ky[None, :], (x * STRIDE)[:, None] + kx[None, :]
        inside = (row < last)[:, None] & (col < N)[None, :]
        inside &= (at_y >= 0) & (at_y < H) & (at_x >= 0) & (at_x < W)
        at = (at_y * W + at_x) * C + c[None, :]
        q = tl.load(q_ptr + (n * image)[:, None] + at, mask=inside, other=0.0)
        if KIND != "none":
            if ON_WINDOW:
                a = tl.load(q_ptr + (n % B * image)[:, None] + at, mask=inside, other=0.0)
                q = moved(q, a, is_primal, inside, KIND, P0, P1)
            else:
                at_p = (row % (B * grid)).to(tl.int64)[:, None] * M + out[None, :]
                a = tl.load(p_ptr + at_p, mask=p_mask, other=0.0)
                p = moved(p, a, is_primal, p_mask, KIND, P0, P1)
        acc = dot(tl.trans(p), q, acc, PRECISION)

    at_part = (split.to(tl.int64) * M + out)[:, None] * N + col[None, :]
    tl.store(part_ptr + at_part, acc, mask=(out < M)[:, None] & (col < N)[None, :])


def weight_tile_of(outer: int, columns: int, dtype: torch.dtype, precision: str, kind: str) -> Tile:
    exact, one, three = (
        dtype == torch.float32 and precision == of for of in ("ieee", "tf32", "tf32x3")
    )
    return Tile(
        block_m=bucket(outer),
        block_n=bucket(columns),
        block_k=16 if exact or three else 32,
        # One TF32 product holds little; what splits its operands or converts them holds more.
        num_warps=4 if one else 8,
        num_stages=2 if exact else 3,
        # As in a product, but here three TF32 products spill without a bound too.
        maxnreg=255 if three or is_curved(kind) else None,
    )


def _splits(rows: int, tiles: int, block_k: int, limits: DeviceLimits) -> tuple[int, int]:
    """Parts of the rows and rows per part: about two programs an SM, at least four blocks a part.

    It depends on the device alone, so its order of summation is the same on every run.
    """
    blocks = cdiv(rows, block_k)
    wanted = max(1, 2 * limits.sm_count // tiles)
    per_split = cdiv(blocks, max(1, min(wanted, blocks // 4)))
    return cdiv(blocks, per_split), per_split * block_k


def weight_gradient(
    plain: Tensor, windowed: Tensor, gather: Gather, front: Front, *, on_window: bool
) -> Tensor:
    """Sum over slots, samples and positions of plain (x) its window in the other stack.

    Args:
        plain: dense ``[S, B, h, w, M]``.
        windowed: dense ``[S, B, H, W, C]``.
        gather: what position (y, x) of `plain` meets there, as `window` gives it.
        front: of the layer.
        on_window: whether `windowed` is the layer's input, which the activation is in front of;
            else `plain` is.

    Returns:
        Float32 ``[M, taps, C]``; its sums are split and added up in a fixed order.
    """
    (S, B, grid_h, grid_w, M), (_, _, H, W, C) = plain.shape, windowed.shape
    taps = gather.kernel**2
    N = taps * C
    kind, params, precision, *_ = front
    tile = weight_tile_of(M, N, plain.dtype, precision, kind)
    tiles, rows = cdiv(M, tile.block_m) * cdiv(N, tile.block_n), S * B * grid_h * grid_w
    splits, per_split = _splits(rows, tiles, tile.block_k, device_limits(plain))
    parts = torch.empty((splits, M, taps, C), dtype=torch.float32, device=plain.device)
    constexprs = weight_constexprs(
        *(gather, M, N, plain.dtype, precision, front_constexprs(kind, params), on_window)
    )
    with torch.cuda.device_of(plain):
        tangent_weight_kernel[(splits * tiles,)](
            *(plain, windowed, parts, rows, per_split, splits, B, grid_h, grid_w, M, H, W, C),
            **constexprs,
            **tile.launch,
        )
    return parts[0] if splits == 1 else parts.sum(0)


def weight_constexprs(
    gather: Gather,
    outer: int,
    columns: int,
    dtype: torch.dtype,
    precision: str,
    kind: dict,
    on_window: bool,
) -> dict:
    tile = weight_tile_of(outer, columns, dtype, precision, kind["KIND"])
    return {
        **kind,
        "ON_WINDOW": on_window,
        **{"KERNEL": gather.kernel, "STRIDE": gather.stride, "PADDING": -gather.offset},
        **{"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k},
        "PRECISION": precision,
    }
