"""Both gradients of a layer that doubles the size, in one pass over the gradient of its result.

    g_x[n, k, c] = slope sum over taps and channels of g[n, k at tap, o] w[c, tap, o]
    g_w[c, tap, o] = sum over images n and positions k of x[n, k, c] g[n, k at tap, o]

The windows of g are the right operand of both products, of the first one turned. A program walks
over images at fixed positions, as `_stack_weight` does, with all of the weight's gradient in its
accumulators, the weight in shared memory and the next image's window on its way in registers.

Floor: g and x read, g_x written, once each, and the FLOPs of both products. For 32 -> 32 channels,
kernel 4 and stride 2, on 16 x 16 inputs, a chunk of 64 samples and 16 tangents in bfloat16: 107 MB,
18.3 GFLOP, where two kernels move 178 MB.

Counted for sm_89 (Triton 3.8 and 3.6): 5.7 instructions of the walk for each HMMA, 217 registers,
no spill, 64 KiB of shared memory; loads of g are 16 bytes wide, those of x and the stores 8. So a
program has a multiprocessor to itself. Stacks that are some samples of larger ones take the same
code: the slot of an image is kept count of, which tells where it lies and which sample it is. By
data sheets an RTX 4090's tensor cores bound it at 110 us, where memory gives two kernels 88 each.
An RTX 3090's tensor cores take 256 us for both either way, an RTX 5090's 87 where memory gives two
kernels 50 each, which is no more than one program alone loses by waiting. On an H100 memory would
bound it at 34 us and two kernels at 61, but its HMMA, instructions, L2 and waiting take 24 to 31
each, with nothing else on the multiprocessor to hide them, where the two have wgmma: two, until a
card has timed both.
TF32 spills 1,256 bytes on sm_89, 64 channels of 8 x 8 inputs 96.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._blocks import dot
from ._contract import room_for
from ._launch import Configuration, begin, cdiv, device_limits, launch, pointer
from ._stack_geometry import Front, Gather, window
from ._stack_sums import Rooms, add_to, bias_of, column_sums, room_of_width, tile_of
from ._stack_walk import split_walk
from ._stack_weight import gap_of, next_slot, slot_of
from .activations import front_constexprs, times_slope

_READS = window(4, stride=2, padding=1)
_CHANNELS, _BLOCK_K = 32, 32
_LAUNCH = {"num_warps": 8, "num_stages": 1, "maxnreg": 255}


@triton.jit
def _at(n, slot, gap, SIZE: tl.constexpr):
    """Offset of image n of SIZE elements."""
    return (n + slot * gap).to(tl.int64) * SIZE


@triton.jit(
    do_not_specialize=[
        *("images", "images_per_split", "tiles_per_group", "B", "x_gap", "g_gap", "gx_gap"),
        *("programs", "bias_parts", "bias_rows", "filled", "bias_filled"),
    ]
)
def tangent_back_kernel(
    x_ptr,  # [images, H, W, C], behind its activation
    g_ptr,  # [images, 2 H, 2 W, N]
    w_ptr,  # [C, 16 N]
    gx_ptr,  # [images, H, W, C]
    part_ptr,  # [parts, C, 16 N]
    bias_ptr,  # [bias_parts, COLUMNS], each of `padded` width; not written without COLUMNS
    images,
    images_per_split,
    tiles_per_group,
    B,
    x_gap,  # images between the end of a slot and the next one, 0 in a dense stack
    g_gap,
    gx_gap,
    programs,
    bias_parts,
    bias_rows,
    filled,
    bias_filled,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
    KIND: tl.constexpr,
    P0: tl.constexpr,
    P1: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    begin()
    IMAGE: tl.constexpr = H * W * C
    IMAGE_G: tl.constexpr = 4 * H * W * N
    TILES: tl.constexpr = H * W // BLOCK_K
    pid = tl.program_id(0)
    if COLUMNS > 0:
        if pid >= programs:
            column_sums(
                *(g_ptr, bias_ptr, bias_filled, pid - programs, bias_parts, bias_rows),
                *(COLUMNS, ROWS, WIDTH),
            )
            return
    groups = tl.cdiv(TILES, tiles_per_group)
    group, split = pid % groups, pid // groups
    first = split * images_per_split
    last = tl.minimum(first + images_per_split, images)
    c, col, k = tl.arange(0, C), tl.arange(0, 16 * N), tl.arange(0, BLOCK_K)
    ky, kx = col // N // 4, col // N % 4
    weight_at = c[:, None] * (16 * N) + col[None, :]
    w = tl.load(w_ptr + weight_at)

    acc = tl.zeros([C, 16 * N], tl.float32)
    last_tile = tl.minimum((group + 1) * tiles_per_group, TILES)
    for tile in range(group * tiles_per_group, last_tile):
        position = tile * BLOCK_K + k
        top, left = 2 * (position // W) - 1, 2 * (position % W) - 1
        y, x = top[:, None] + ky[None, :], left[:, None] + kx[None, :]
        inside = (y >= 0) & (y < 2 * H) & (x >= 0) & (x < 2 * W)
        at_g = ((top * 2 * W + left) * N)[:, None] + ((ky * 2 * W + kx) * N + col % N)[None, :]
        at_x = (position * C)[None, :] + c[:, None]
        slot = slot_of(first, B)
        x_now = tl.load(x_ptr + _at(first, slot, x_gap, IMAGE) + at_x)
        g_now = tl.load(g_ptr + _at(first, slot, g_gap, IMAGE_G) + at_g, mask=inside, other=0.0)
        for start in range(first, last):
            n = tl.full([], 0, tl.int32) + start
            gx_at, sample = _at(n, slot, gx_gap, IMAGE), n - slot * B
            # The last image's is read twice, and not used.
            ahead = tl.minimum(n + 1, last - 1)
            slot = next_slot(slot, ahead, B)
            x_next = tl.load(x_ptr + _at(ahead, slot, x_gap, IMAGE) + at_x)
            g_at = _at(ahead, slot, g_gap, IMAGE_G)
            g_next = tl.load(g_ptr + g_at + at_g, mask=inside, other=0.0)
            acc = dot(x_now, g_now, acc, "ieee")
            gx = dot(w, tl.trans(g_now), tl.zeros([C, BLOCK_K], tl.float32), "ieee")
            if KIND != "none":
                a = tl.load(x_ptr + sample.to(tl.int64) * IMAGE + at_x)
                gx = times_slope(gx, a, KIND, P0, P1)
            tl.store(gx_ptr + gx_at + at_x, gx)
            x_now, g_now = x_next, g_next
    own = tl.full(acc.shape, True, tl.int1)
    add_to(part_ptr + pid.to(tl.int64) * (C * 16 * N) + weight_at, acc, own, filled)


def takes(gather: Gather, plain: Tensor, windowed: Tensor, front: Front) -> bool:
    """Whether `both_gradients` takes these, and is computed to be faster than two kernels."""
    H, W, C = plain.shape[2:]
    whole = windowed.shape[2:] == (2 * H, 2 * W, _CHANNELS) and C == _CHANNELS
    fits = whole and H * W % _BLOCK_K == 0 and plain.dtype != torch.float32
    at_hand = front.applied or front.kind == "none"
    return device_limits(plain).capability == 89 and gather == _READS and fits and at_hand


def both_gradients(
    plain: Tensor,
    windowed: Tensor,
    weight: Tensor,
    front: Front,
    *,
    rooms: Rooms,
    bias_rooms: Rooms | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The data's gradient of a layer that `takes` names, and parts of the weight's and the bias's.

    Args:
        plain: the layer's input, ``[S, B, H, W, C]``, behind its activation; dense, or some samples
            of a dense stack (`samples_apart`).
        windowed: the gradient of its result, ``[S, B, 2 H, 2 W, N]``, likewise.
        weight: dense ``[C, 16, N]``, of the same dtype.
        front: of the layer.
        rooms: for parts of the weight's ``[C, 16, N]``.
        bias_rooms: of the bias's ``[N]``; None where it is not wanted.
        out: where the data's goes, in the dtype of `plain` or in float32; None for new memory.

    Returns:
        ``[S, B, H, W, C]`` in front of the activation or, where it is given, `out`.

    Raises:
        ValueError: an `out` of another shape, dtype or order.
    """
    S, B, H, W, C = plain.shape
    limits, tiles = device_limits(plain), H * W // _BLOCK_K
    # One program a multiprocessor.
    per_group, per_split = split_walk(tiles, S * B, limits.sm_count)
    count = cdiv(tiles, per_group) * cdiv(S * B, per_split)
    grad = room_for(out, plain.shape, plain)
    gaps = [gap_of(t, B) for t in (plain, windowed, grad)]
    room = room_of_width(rooms, count, weight.numel())
    bias = bias_of(windowed, _CHANNELS, bias_rooms)
    bias_room = bias.room or room
    launch(
        tangent_back_kernel,
        (count + bias.count,),
        *(plain, windowed, weight, grad, room.parts, bias_room.parts),
        *(S * B, per_split, per_group, B, *gaps, count, bias.count, bias.rows),
        *(int(room.filled), int(bias_room.filled)),
        **_constexprs(H, W, front),
        **tile_of(0 if bias_rooms is None else _CHANNELS),
        **_LAUNCH,
    )
    return grad


def _constexprs(H: int, W: int, front: Front) -> dict:
    sizes = {"H": H, "W": W, "C": _CHANNELS, "N": _CHANNELS, "BLOCK_K": _BLOCK_K}
    return {**sizes, **front_constexprs(front.kind, front.params)}


def configuration(H: int, W: int, dtype: torch.dtype, front: Front) -> Configuration:
    """What `both_gradients` compiles for inputs of H x W pixels."""
    types = {f"{name}_ptr": pointer(dtype) for name in ("x", "g", "w", "gx")}
    types |= {"part_ptr": "*fp32", "bias_ptr": "*fp32"}
    constexprs = _constexprs(H, W, front) | tile_of(_CHANNELS)
    return Configuration(tangent_back_kernel, f"both {H} x {W}", types, constexprs, **_LAUNCH)
