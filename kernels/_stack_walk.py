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
from ._tiles import tuned, tunes
from .activations import front_constexprs

# Rows of a TF32 product on sm_90: of 64 it takes operands from shared memory the other way round,
# where nothing but single elements, far apart, can be copied.
_TF32_ROWS = 32
# What may be another size, and the least.
_BLOCKS = {"block_m": 16, "block_n": 16, "block_k": 16}


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
        gather: as in `weight_parts`.
        front: likewise.
        limits: of the device.
        on_window: as in `weight_parts`.
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
    outer: int, columns: int, dtype: torch.dtype, front: Front, limits: DeviceLimits, single: bool
) -> Tile:
    """Block sizes for `outer` channels and `columns`, a window's taps times its channels.

    Where channels do not come eight bytes at a time, `single`, elements have a mask each.
    """
    full = dtype == torch.float32
    exact, three = (full and front.precision == name for name in ("ieee", "tf32x3"))
    plain = front.on_load[0] == "none"
    hopper = limits.capability // 10 == 9
    if hopper and plain and not (exact or three or single):
        wide = _wide_tile(outer, columns, full)
        if wide.block_m * wide.block_n >= 8192:
            return wide
    block_m = min(_power(outer), 64)
    if full and not exact and hopper:
        block_m = min(block_m, _TF32_ROWS)
    # Columns in tiles as wide as the accumulators allow.
    block_n = _block(columns, min(256, 8192 // block_m), 64)
    return Tile(
        block_m=block_m,
        block_n=block_n,
        block_k=16 if full else 32,
        num_warps=8 if block_m * block_n == 8192 else 4,
        num_stages=2 if exact else 3,
        # An activation and the parts of an operand want registers; else two programs of eight warps
        # share a multiprocessor.
        maxnreg=255 if three or not plain else 128,
    )


def _wide_tile(outer: int, columns: int, full: bool) -> Tile:
    """For sm_90, whose L2 bounds what 8192 accumulators re-read: twice as many.

    One program has a multiprocessor to itself, so there are half as many parts as well.
    """
    block_m = _block(outer, 64, _TF32_ROWS) if full else _block(outer, 128, 64)
    # Few rows share more of their windows' pixels where positions are many.
    block_k = (32 if block_m <= _TF32_ROWS else 16) if full else 64
    return Tile(
        block_m=block_m,
        block_n=_block(columns, min(256, 16384 // block_m), 64),
        block_k=block_k,
        num_warps=8,
        num_stages=4 if block_k == 16 else 3,
        maxnreg=255,
    )


def _block(size: int, most: int, least: int) -> int:
    """A power of 2 up to `most`, of which a quarter may go to waste if it is above `least`."""
    block = min(_power(size), most)
    while block > least and 3 * cdiv(size, block) * block > 4 * size:
        block //= 2
    return block


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
        gather: as in `weight_parts`, as the others.
        grid: ``(h, w)``.
        outer: M.
        size: ``(H, W, C)``.
        dtype: of both stacks.
        front: of the layer.
        on_window: as there.
        limits: of the device.

    Raises:
        ValueError: a tile, among those that are measured or tried, that the kernel cannot take.
    """
    (H, W, C) = size
    half, eight_bytes = dtype != torch.float32, 8 // dtype.itemsize
    single = C % eight_bytes > 0 or outer % eight_bytes > 0
    columns, hopper = gather.kernel**2 * C, limits.capability // 10 == 9
    tile = weight_tile_of(outer, columns, dtype, front, limits, single)
    rounds = front.rounds(not half)
    exact = not half and front.precision == "ieee"
    if single and exact:
        # Steps that overlap would spill a few bytes beside a mask for each element.
        tile = replace(tile, num_stages=1)
    elif tile.maxnreg == 128 and (single or (not half and on_window and limits.capability >= 120)):
        # Single elements have a mask each; and on sm_120 windows of a layer's input spill.
        tile = replace(tile, maxnreg=255 if exact else 168)
    if tunes(limits):
        tile = tuned(
            *("tangent_weight", tile, limits, _BLOCKS),
            **{"dtype": dtype, "product": "half" if half else front.precision},
            **{"M": outer, "h": grid[0], "w": grid[1], "H": H, "W": W, "C": C},
            **{"kernel": gather.kernel, "stride": gather.stride, "offset": gather.offset},
            **{"on_load": front.on_load[0], "on_window": on_window},
            **{"round_x": rounds[0], "round_g": rounds[1]},
        )
    twice = hopper and not half and front.precision == "tf32" and tile.block_m > _TF32_ROWS
    if twice and (tile.block_m > 2 * _TF32_ROWS or front.on_load[0] != "none"):
        raise ValueError(f"block_m={tile.block_m}: TF32 on sm_90 takes {_TF32_ROWS} rows, or twice")
    if tile.maxnreg is None:
        raise ValueError("maxnreg=None: a walk is split by the registers of a program")
    vector = eight_bytes
    if not tile.by_l1 and C % (2 * eight_bytes) == 0:
        vector = 2 * eight_bytes
    constexprs = {
        **{"GRID_H": grid[0], "GRID_W": grid[1], "M": outer, "H": H, "W": W, "C": C},
        **front_constexprs(*front.on_load),
        "ON_WINDOW": on_window,
        **{"KERNEL": gather.kernel, "STRIDE": gather.stride, "PADDING": -gather.offset},
        **{"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k},
        "PRODUCT_M": _TF32_ROWS if twice else tile.block_m,
        "POSITIONS": min(tile.block_k, triton.next_power_of_2(grid[0] * grid[1])),
        "VECTOR": vector if C % eight_bytes == 0 else 1,
        # Then programs whose columns meet other pixels share none of a window.
        "BY_PIXEL": hopper
        and gather.stride > 1
        and gather.kernel % gather.stride == 0
        and columns > tile.block_n,
        # wgmma takes 64 rows at least: there are as many columns.
        "WINDOW_FIRST": half and hopper and tile.block_n >= 64,
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
