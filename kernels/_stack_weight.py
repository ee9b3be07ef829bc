"""The weight's gradient of a layer on a stack; `_implicit_gemm` has the formula.

    g[m, tap, c] = sum over images n and positions k of plain[n, k, m] windowed[n, k at tap, c]

A program takes some of m and (tap, c) and walks over images at fixed positions: what lies where,
and inside which border, is found once, and a step of the walk is loads and products. Layers
without a window take all positions for images. Where the activation has been applied nothing comes
between; where it has not, piecewise kinds are one selection in the product's own registers.

Floor: both stacks once, and 2 (1 + m) B FLOPs for every multiply-add of the layer on one sample;
the parts of the sums beside that, one a program. For 32 -> 32 channels, kernel 4 and stride 2, on
16 x 16 inputs, a chunk of 64 samples and 16 tangents in bfloat16: 89 MB, 9.1 GFLOP, 8 MB of parts
(4 on sm_90).

Instructions of the walk for each tensor-core instruction, counted in the machine code of Triton 3.8
(3.6 in brackets), of that layer and of 64 -> 32 channels on 8 x 8 inputs:

             32 -> 32, bfloat16   TF32           64 -> 32, bfloat16    TF32
    sm_86    7.6 (5.9)            8.0 (7.5)      6.4 (5.0)             6.9 (6.4)
    sm_89    7.6 (5.9)            8.0 (7.5)      6.4 (5.0)             6.9 (6.4)
    sm_90    18.6 (18.0) 64x32    6.3 (6.4)      17.0 (16.5) 64x64     4.8 (4.8)
    sm_120   5.3 (5.7)            6.8 (7.1)      4.6 (5.0)             6.1 (6.5)

TF32 operands that nobody has rounded are rounded on load, for 1.5 instructions each HMMA on sm_80
to sm_89 and 2.0 on sm_90 and sm_120, counted of 512 features and 784.

sm_90 takes bfloat16 by wgmma, 64 columns of the weight at a time. Windows are loaded 8 bytes wide
through L1, all else at least so; two programs of eight warps share a multiprocessor, with 37 KiB
each. That asks an H100's L2 for more than it can give, so on sm_90 a program has one to itself,
with up to 120 KiB, and up to twice the accumulators: of 64 -> 32 channels in bfloat16 L2 is asked
for 44 MB in place of 78. Of stacks that are some samples of larger ones the walk keeps count of the
slot: up to 0.5 instructions more for each HMMA, 0.13 for each 64x32, 0.38 for each 64x64. By
data sheets memory bounds it: an RTX 4090 moves 89 MB in 88 us, its tensor cores take 55 and its
schedulers 13; an H100 27 us, 10 and 12.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._blocks import dot, readied
from ._contract import samples_apart
from ._implicit_gemm import moved
from ._launch import Configuration, begin, device_limits, launch, pointer
from ._stack_geometry import Front, Gather
from ._stack_sums import Rooms, add_to, bias_of, column_sums, padded, room_of_width, tile_of
from ._stack_walk import walk_of, weight_constexprs


@triton.jit
def _at(n, SIZE: tl.constexpr, AXIS: tl.constexpr):
    """Offset of image n of SIZE elements; of several, along the tile's axis that is not AXIS."""
    at = n.to(tl.int64) * SIZE
    return at if len(n.shape) == 0 else tl.expand_dims(at, AXIS)


@triton.jit
def slot_of(n, B):
    """Slot of image n, unsigned, which takes fewer instructions."""
    return (n.to(tl.uint32, bitcast=True) // B.to(tl.uint32, bitcast=True)).to(tl.int32)


@triton.jit
def next_slot(slot, n, B):
    """Slot of image n, where `slot` is the one of n - 1 or n."""
    return slot + (n >= (slot + 1) * B).to(tl.int32)


@triton.jit
def _tap_of(i, KERNEL: tl.constexpr, STRIDE: tl.constexpr):
    """Row and column of the i-th tap, where those that meet the same pixels are neighbours."""
    EACH: tl.constexpr = KERNEL // STRIDE
    row, col = i // (EACH * KERNEL), i // (EACH * EACH) % STRIDE
    return row + i // EACH % EACH * STRIDE, col + i % EACH * STRIDE


@triton.jit(
    do_not_specialize=[
        *("images", "images_per_split", "tiles_per_group", "B", "p_gap", "q_gap"),
        *("programs", "bias_parts", "bias_rows", "filled", "bias_filled"),
    ]
)
def tangent_weight_kernel(
    p_ptr,  # [images, GRID_H, GRID_W, M], one row a position
    q_ptr,  # [images, H, W, C], read in a window around each position
    part_ptr,  # [parts, M, KERNEL * KERNEL * C], each part of `padded` width
    bias_ptr,  # [bias_parts, COLUMNS], likewise; not written without COLUMNS
    images,
    images_per_split,
    tiles_per_group,
    B,
    p_gap,  # images between the end of a slot and the next one; read where APART
    q_gap,
    programs,
    bias_parts,
    bias_rows,
    filled,
    bias_filled,
    GRID_H: tl.constexpr,
    GRID_W: tl.constexpr,
    M: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    KIND: tl.constexpr,
    P0: tl.constexpr,
    P1: tl.constexpr,
    ON_WINDOW: tl.constexpr,
    APART: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRODUCT_M: tl.constexpr,  # rows of one product: all of BLOCK_M or half of it
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    POSITIONS: tl.constexpr,
    VECTOR: tl.constexpr,
    BY_PIXEL: tl.constexpr,  # columns of taps that meet the same pixels are neighbours
    WINDOW_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
    ROUND_P: tl.constexpr,  # to what either is rounded on load
    ROUND_Q: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    begin()
    N: tl.constexpr = KERNEL * KERNEL * C
    COL_TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    ROW_TILES: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    GRID: tl.constexpr = GRID_H * GRID_W
    TILES: tl.constexpr = (GRID + POSITIONS - 1) // POSITIONS
    GROUPED: tl.constexpr = BLOCK_K // POSITIONS
    # The tiles of one part are neighbours in launch order: they share its rows through L2.
    pid = tl.program_id(0)
    if COLUMNS > 0:
        # Beside the walks: the gradient of the result, whose first slot is the values'.
        if pid >= programs:
            g_ptr = p_ptr if ON_WINDOW else q_ptr
            column_sums(
                *(g_ptr, bias_ptr, bias_filled, pid - programs, bias_parts, bias_rows),
                *(COLUMNS, ROWS, WIDTH),
            )
            return
    col = pid % COL_TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    out = pid // COL_TILES % ROW_TILES * BLOCK_M + tl.arange(0, PRODUCT_M)
    part = pid // (COL_TILES * ROW_TILES)
    groups = tl.cdiv(TILES, tiles_per_group)
    group, split = part % groups, part // groups
    first = split * images_per_split
    last = tl.minimum(first + images_per_split, images)
    ky, kx = col // C // KERNEL, col // C % KERNEL
    to = col
    if BY_PIXEL:
        ky, kx = _tap_of(col // C, KERNEL, STRIDE)
        to = (ky * KERNEL + kx) * C + col % C
    ky, kx = ky - PADDING, kx - PADDING
    at_col = (ky * W + kx) * C + col % C
    k = tl.arange(0, BLOCK_K)

    acc = tl.zeros([BLOCK_N, BLOCK_M] if WINDOW_FIRST else [PRODUCT_M, BLOCK_N], tl.float32)
    below = acc
    last_tile = tl.minimum((group + 1) * tiles_per_group, TILES)
    for tile in range(group * tiles_per_group, last_tile):
        # All that depends on a position is the same for every image.
        position = tile * POSITIONS + k % POSITIONS
        top, left = position // GRID_W * STRIDE, position % GRID_W * STRIDE
        p_inside = (position < GRID)[None, :] & (out < M)[:, None]
        y, x = top[:, None] + ky[None, :], left[:, None] + kx[None, :]
        q_inside = (position < GRID)[:, None] & (col < N)[None, :]
        q_inside &= (y >= 0) & (y < H) & (x >= 0) & (x < W)
        # Eight bytes at a time go through L1, where neighbouring windows find each other's pixels;
        # sixteen would not.
        q_inside = tl.max_constancy(q_inside, [1, VECTOR])
        p_at = (position * M)[None, :] + out[:, None]
        q_at = ((top * W + left) * C)[:, None] + at_col[None, :]
        slot = slot_of(first, B) if APART and GROUPED == 1 else 0
        for start in range(first, last, GROUPED):
            n = tl.full([], 0, tl.int32) + start
            p_mask, q_mask = p_inside, q_inside
            if GROUPED > 1:
                n += k // POSITIONS
                p_mask, q_mask = p_mask & (n < last)[None, :], q_mask & (n < last)[:, None]
            p_n, q_n = n, n
            if APART:
                # By a division where images are several.
                if GROUPED > 1:
                    behind = slot_of(n, B)
                else:
                    slot = next_slot(slot, n, B)
                    behind = slot
                p_n, q_n = n + behind * p_gap, n + behind * q_gap
            p = tl.load(p_ptr + _at(p_n, GRID * M, 0) + p_at, mask=p_mask, other=0.0)
            q = tl.load(q_ptr + _at(q_n, H * W * C, 1) + q_at, mask=q_mask, other=0.0)
            if KIND != "none" and ON_WINDOW:
                a = tl.load(q_ptr + _at(n % B, H * W * C, 1) + q_at, mask=q_mask, other=0.0)
                is_primal = (n < B)[:, None] if GROUPED > 1 else n < B
                q = moved(q, a, is_primal, q_mask, KIND, P0, P1)
            elif KIND != "none":
                a = tl.load(p_ptr + _at(n % B, GRID * M, 0) + p_at, mask=p_mask, other=0.0)
                is_primal = (n < B)[None, :] if GROUPED > 1 else n < B
                p = moved(p, a, is_primal, p_mask, KIND, P0, P1)
            p, q = readied(p, ROUND_P), readied(q, ROUND_Q)
            if WINDOW_FIRST:
                acc = dot(tl.trans(q), tl.trans(p), acc, PRECISION)
            else:
                acc = dot(p, q, acc, PRECISION)
            if PRODUCT_M < BLOCK_M:
                # No activation is applied here.
                p_mask = (position < GRID)[None, :] & (out + PRODUCT_M < M)[:, None]
                if GROUPED > 1:
                    p_mask &= (n < last)[None, :]
                p_ptrs = p_ptr + _at(p_n, GRID * M, 0) + (p_at + PRODUCT_M)
                p = readied(tl.load(p_ptrs, mask=p_mask, other=0.0), ROUND_P)
                below = dot(p, q, below, PRECISION)

    at_part = part.to(tl.int64) * padded(M * N)
    if WINDOW_FIRST:
        at, mask = (out * N)[None, :] + to[:, None], (out < M)[None, :] & (col < N)[:, None]
    else:
        at, mask = (out * N)[:, None] + to[None, :], (out < M)[:, None] & (col < N)[None, :]
    add_to(part_ptr + at_part + at, acc, mask, filled)
    if PRODUCT_M < BLOCK_M:
        mask = (out + PRODUCT_M < M)[:, None] & (col < N)[None, :]
        add_to(part_ptr + at_part + (at + PRODUCT_M * N), below, mask, filled)


def weight_parts(
    plain: Tensor,
    windowed: Tensor,
    gather: Gather,
    front: Front,
    *,
    on_window: bool,
    rooms: Rooms,
    bias_size: int = 0,
    bias_rooms: Rooms | None = None,
) -> None:
    """Leave parts of the sum over slots, samples and positions of plain (x) its window.

    Of both sums the parts lie in rooms, for `add_up`; how they are split depends on the device and
    the shapes alone.

    Args:
        plain: ``[S, B, h, w, M]``, dense or some samples of a dense stack (`samples_apart`).
        windowed: ``[S, B, H, W, C]``, likewise.
        gather: what position (y, x) of `plain` meets there, as `window` gives it.
        front: of the layer.
        on_window: whether `windowed` is the layer's input, which the activation is in front of;
            else `plain` is.
        rooms: for parts of the weight's ``[M, taps, C]``, as many as `walk_of` says.
        bias_size: of the layer's bias.
        bias_rooms: for parts of its gradient; None where it is not wanted.
    """
    walk = walk_of(
        *(plain.shape, windowed.shape, plain.dtype, gather, front, device_limits(plain)),
        on_window=on_window,
    )
    size = plain.shape[4] * gather.kernel**2 * windowed.shape[4]
    room = room_of_width(rooms, walk.parts, size)
    bias = bias_of(plain if on_window else windowed, bias_size, bias_rooms)
    bias_room = bias.room or room
    programs = walk.parts * walk.blocks
    gaps = [gap_of(t, walk.batch) for t in (plain, windowed)]
    launch(
        tangent_weight_kernel,
        (programs + bias.count,),
        *(plain, windowed, room.parts, bias_room.parts),
        *(walk.images, walk.per_split, walk.per_group, walk.batch, *gaps),
        *(programs, bias.count, bias.rows, int(room.filled), int(bias_room.filled)),
        **walk.constexprs,
        **tile_of(0 if bias_rooms is None else bias_size),
        APART=any(gaps),
        **walk.tile.launch,
    )


def gap_of(stack: Tensor, images: int) -> int:
    """Images between the end of a slot and the next one, of a slot of so many."""
    samples = stack.shape[1]
    apart = samples_apart(stack)
    assert apart is not None, stack.stride()
    return (apart - samples) * (images // samples)


def weight_configuration(
    label: str,
    gather: Gather,
    grid: tuple[int, int],
    outer: int,
    size: tuple[int, int, int],
    dtype: torch.dtype,
    front: Front,
    on_window: bool,
    bias_size: int,
    apart: bool = False,
) -> Configuration:
    """What `weight_parts` compiles on the device that is pretended, under a label."""
    limits = device_limits(torch.empty(0))
    constexprs, tile = weight_constexprs(gather, grid, outer, size, dtype, front, on_window, limits)
    types = {"p_ptr": pointer(dtype), "q_ptr": pointer(dtype)}
    types |= {"part_ptr": "*fp32", "bias_ptr": "*fp32"}
    constexprs |= tile_of(bias_size) | {"APART": apart}
    return Configuration(tangent_weight_kernel, label, types, constexprs, **tile.launch)
