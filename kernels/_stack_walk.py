"""How the weight's kernels walk over two stacks: what is compiled in, and how it is split."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import triton

from ._launch import DeviceLimits, cdiv
from ._stack_geometry import POINTWISE, Front, Gather
from ._stack_tile import Tile
from .activations import front_constexprs


class Walk(NamedTuple):
    """How two stacks are walked over.

    Attributes:
        constexprs: of the kernel.
        tile: block sizes.
        blocks: programs for each part.
        parts: of the sum.
        images: slots times samples; each position of a pointwise layer is a sample.
        batch: samples.
        per_split: images of a part.
        per_group: tiles of positions of a part.
    """

    constexprs: dict
    tile: Tile
    blocks: int
    parts: int
    images: int
    batch: int
    per_split: int
    per_group: int


def walk_of(
    plain: Sequence[int],
    windowed: Sequence[int],
    dtype: torch.dtype,
    gather: Gather,
    front: Front,
    limits: DeviceLimits,
    *,
    on_window: bool,
) -> Walk:
    """The walk over dense stacks of these shapes, by which a device adds up a gradient.

    It depends on the device and the shapes alone, so the order of summation is the same on every
    run.

    Args:
        plain: ``[S, B, h, w, M]``.
        windowed: ``[S, B, H, W, C]``.
        dtype: of both.
        gather: as in `weight_gradient`.
        front: likewise.
        limits: of the device.
        on_window: as in `weight_gradient`.
    """
    (S, B, *grid, M), (_, _, H, W, C) = plain, windowed
    if gather == POINTWISE:
        # No position meets another one: each is an image.
        B, grid, H, W = B * grid[0] * grid[1], [1, 1], 1, 1
    constexprs, tile = weight_constexprs(
        gather, (grid[0], grid[1]), M, (H, W, C), dtype, front, on_window, limits
    )
    positions = constexprs["POSITIONS"]
    together = tile.block_k // positions
    blocks = cdiv(M, tile.block_m) * cdiv(gather.kernel**2 * C, tile.block_n)
    # What registers let a multiprocessor hold: one wave.
    resident = 2**16 // (32 * tile.num_warps * cdiv(tile.maxnreg, 8) * 8)
    tiles, steps = cdiv(grid[0] * grid[1], positions), cdiv(S * B, together)
    per_group, per_split = split_walk(tiles, steps, resident * limits.sm_count // blocks)
    parts = cdiv(tiles, per_group) * cdiv(steps, per_split)
    return Walk(constexprs, tile, blocks, parts, S * B, B, per_split * together, per_group)


def weight_tile_of(
    outer: int, columns: int, dtype: torch.dtype, front: Front, limits: DeviceLimits
) -> Tile:
    """Block sizes for `outer` channels and `columns`, a window's taps times its channels."""
    full = dtype == torch.float32
    exact, three = (full and front.precision == name for name in ("ieee", "tf32x3"))
    block_m = min(_power(outer), 64)
    if full and not exact and limits.capability // 10 == 9:
        # From 64 rows on sm_90 takes TF32 operands from shared memory the other way round, where
        # nothing but single elements, far apart, can be copied.
        block_m = min(block_m, 32)
    # Columns in tiles as wide as the accumulators allow, of which a quarter may go to waste.
    block_n = min(_power(columns), 256, 8192 // block_m)
    while block_n > 64 and 3 * cdiv(columns, block_n) * block_n > 4 * columns:
        block_n //= 2
    return Tile(
        block_m=block_m,
        block_n=block_n,
        block_k=16 if full else 32,
        num_warps=8 if block_m * block_n == 8192 else 4,
        num_stages=2 if exact else 3,
        # An activation and the parts of an operand want registers; else two programs of eight warps
        # share a multiprocessor.
        maxnreg=255 if three or front.on_load[0] != "none" else 128,
    )


def _power(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def weight_constexprs(
    gather: Gather,
    grid: tuple[int, int],
    outer: int,
    size: tuple[int, int, int],
    dtype: torch.dtype,
    front: Front,
    on_window: bool,
    limits: DeviceLimits,
) -> tuple[dict, Tile]:
    """What is compiled in, and the tile.

    Args:
        gather: as in `weight_gradient`, as the others.
        grid: ``(h, w)``.
        outer: M.
        size: ``(H, W, C)``.
        dtype: of both stacks.
        front: of the layer.
        on_window: as there.
        limits: of the device.
    """
    (H, W, C) = size
    tile = weight_tile_of(outer, gather.kernel**2 * C, dtype, front, limits)
    rounds = front.rounds(dtype == torch.float32)
    half, eight_bytes = dtype != torch.float32, 8 // dtype.itemsize
    single = C % eight_bytes > 0 or outer % eight_bytes > 0
    if tile.maxnreg == 128 and (single or (not half and on_window and limits.capability >= 120)):
        # Single elements have a mask each; and on sm_120 TF32 windows of a layer's input spill.
        tile = replace(tile, maxnreg=168)
    constexprs = {
        **{"GRID_H": grid[0], "GRID_W": grid[1], "M": outer, "H": H, "W": W, "C": C},
        **front_constexprs(*front.on_load),
        "ON_WINDOW": on_window,
        **{"KERNEL": gather.kernel, "STRIDE": gather.stride, "PADDING": -gather.offset},
        **{"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k},
        "POSITIONS": min(tile.block_k, triton.next_power_of_2(grid[0] * grid[1])),
        "VECTOR": eight_bytes if C % eight_bytes == 0 else 1,
        # wgmma takes 64 rows at least: there are as many columns.
        "WINDOW_FIRST": half and limits.capability // 10 == 9 and tile.block_n >= 64,
        "PRECISION": front.precision,
        **dict(
            zip(
                ("ROUND_Q", "ROUND_P") if on_window else ("ROUND_P", "ROUND_Q"), rounds, strict=True
            )
        ),
    }
    return constexprs, tile


@functools.lru_cache(maxsize=4096)
def split_walk(tiles: int, steps: int, most: int) -> tuple[int, int]:
    """How many tiles and steps each part takes, of `tiles` times `steps` in all.

    Of at most so many parts, the division by which the largest is done first; a part has at least
    four steps, as its sum costs as much to write as one or two of them to read, and a tile costs
    about three to begin.
    """
    most = max(1, min(most, tiles * steps // 4))
    found = []
    for groups in range(1, min(tiles, most) + 1):
        per_group, per_split = cdiv(tiles, groups), cdiv(steps, min(steps, most // groups))
        count = cdiv(tiles, per_group) * cdiv(steps, per_split)
        found.append((per_group * (per_split + 3), count, per_group, per_split))
    return min(found)[2:]
