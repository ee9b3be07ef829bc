"""The transposed convolution that doubles the size, with few channels out: a decoder's last layer.

`_implicit_gemm` has the formulas. Here one program has all four outputs behind each of BLOCK_M
inputs: their 4 N numbers are the columns of one accumulator, 16 with those that are left empty, and
nine shifted tiles of the stack its operands. What an output row holds behind an input lies together
in memory, both columns of it, N numbers each.

Where it is given the data, it is their residual that a program stores, x - y: the one thing that a
last layer's values are wanted for, and a launch of its own otherwise.

Floor: inputs and results once. 32 -> 3 channels from 32 x 32, the residual of 64 samples in
bfloat16 with float32 data: 10.5 MB and 0.4 GFLOP.

Counted for that in machine code (Triton 3.8), a warp's instructions in all for each of its
tensor-core instructions, of which a program of 128 positions issues 36, 72 with TF32, on sm_90 and
twice as many elsewhere; data that lie channels first take 4 to 10 % more:

    bfloat16    sm_86, 89    13.6     80 registers
    bfloat16    sm_120       13.0    167 registers
    bfloat16    sm_90        27.6     80 registers
    TF32        sm_86, 89    11.2     96 registers
    TF32        sm_90        21.1     92 registers

27 KiB and no spills. Loads of the stack are 16 bytes wide, of the data and stores 8 (4 of data
whose channels lie first), loads of a half weight 2, which wider ones would want turned first. A
step, of which there are three, six with TF32, has all of its loads on their way together. Of L2 a
program asks for 28 KB, its inputs once: their nine copies come from L1. By data sheets DRAM bounds
it on every card.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._blocks import dot, readied, rounded
from ._implicit_gemm import image_of, position, rows_of, sloped, within
from ._launch import begin
from .activations import activation


@triton.jit
def _weight(
    w_ptr,
    c,  # [BLOCK_K]
    dy: tl.constexpr,
    dx: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """What is for inputs dy, dx away: [BLOCK_K, 16], 0 where an output does not see them."""
    j = tl.arange(0, 16)
    ky, kx = j // 8 + 1 - 2 * dy, j % 8 // N + 1 - 2 * dx
    used = ((j % 8 < 2 * N) & within(kx, 4) & within(ky, 4))[None, :]
    if C % BLOCK_K:
        used &= (c < C)[:, None]
    at = c[:, None] * (16 * N) + (kx * N + j % 8 % N)[None, :] + (ky * (4 * N))[None, :]
    return tl.load(w_ptr + at, mask=used, other=0.0)


# Row and sample counts are not specialised: a value of 1 or a multiple of 16 compiles nothing new.
@triton.jit(do_not_specialize=["first_slot", "rows", "B", "x_apart", "y_apart"])
def tangent_narrow_kernel(
    x_ptr,  # [S, B, H, W, C]
    w_ptr,  # [C, 4, 4, N]
    bias_ptr,  # [N]; not read without HAS_BIAS
    a_ptr,  # [S, B, 2 H, 2 W, N], slot 0 of which tells the slope; or the data; else not read
    y_ptr,  # [S, B, 2 H, 2 W, N]
    first_slot,
    rows,  # slots of the launch, from first_slot on
    B,
    x_apart,  # samples from one slot to the next; read where APART
    y_apart,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
    RESULT_KIND: tl.constexpr,  # of the activation behind the result
    R0: tl.constexpr,
    R1: tl.constexpr,
    DATA: tl.constexpr,  # "none", or where their channels lie, "first" or "last": the residual
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    UNIT: tl.constexpr,
    APART: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    ROUND_X: tl.constexpr,  # to what x is rounded on load, and what is stored
    ROUND: tl.constexpr,
):
    begin()
    K_TILES: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    slot, row = rows_of(tl.program_id(0), rows, BLOCK_M, UNIT)
    values = B * H * W
    # Rows beyond the end read what the last one does: nothing is outside for their sake.
    primal, y, x = position(tl.minimum(row, values - 1), H, W)
    slot += first_slot
    n = image_of(slot, primal, B, x_apart, APART)
    base = ((n.to(tl.int64) * H + y) * W + x)[:, None] * C

    acc = tl.zeros([BLOCK_M, 16], tl.float32)
    for dy in tl.static_range(-1, 2):
        for k in range(0, K_TILES):
            c = k * BLOCK_K + tl.arange(0, BLOCK_K)
            inside = within(y + dy, H)[:, None]
            if C % BLOCK_K:
                inside &= (c < C)[None, :]
            x_ptrs = x_ptr + base + (dy * (W * C) + c)[None, :]
            left = tl.load(x_ptrs - C, mask=inside & (x > 0)[:, None], other=0.0)
            middle = tl.load(x_ptrs, mask=inside, other=0.0)
            right = tl.load(x_ptrs + C, mask=inside & (x < W - 1)[:, None], other=0.0)
            w_left = _weight(w_ptr, c, dy, -1, C, N, BLOCK_K)
            w_middle = _weight(w_ptr, c, dy, 0, C, N, BLOCK_K)
            w_right = _weight(w_ptr, c, dy, 1, C, N, BLOCK_K)
            acc = dot(readied(left, ROUND_X), w_left, acc, PRECISION)
            acc = dot(readied(middle, ROUND_X), w_middle, acc, PRECISION)
            acc = dot(readied(right, ROUND_X), w_right, acc, PRECISION)

    j = tl.arange(0, 16)
    in_image = (((2 * y)[:, None] + (j // 8)[None, :]) * (2 * W) + (2 * x)[:, None]) * N
    in_image += (j % 8)[None, :]
    image = tl.full([], 4 * H * W * N, tl.int64)
    mask = (row < values)[:, None] & (j % 8 < 2 * N)[None, :]
    if first_slot == 0:
        if HAS_BIAS:
            bias = tl.load(bias_ptr + j % 8 % N).to(tl.float32)
            acc += tl.where((n < B)[:, None], bias[None, :], 0.0)
        if RESULT_KIND != "none":
            acc = activation(acc, RESULT_KIND, R0, R1)[0]
        if DATA != "none":
            of_data = in_image
            if DATA == "first":
                of_data = (j % 8 % N * (2 * H) + j // 8)[None, :] + (2 * y)[:, None]
                of_data = of_data * (2 * W) + (2 * x)[:, None] + (j % 8 // N)[None, :]
            data = tl.load(a_ptr + (n * image)[:, None] + of_data, mask=mask, other=0.0)
            acc = data.to(tl.float32) - acc
    elif RESULT_KIND != "none":
        # Tangents alone: the values were there before them.
        a_ptrs = a_ptr + (primal * image)[:, None] + in_image
        acc = sloped(acc, a_ptrs, mask, RESULT_KIND, R0, R1)
    n = image_of(slot, primal, B, y_apart, APART)
    tl.store(y_ptr + (n * image)[:, None] + in_image, rounded(acc, ROUND), mask=mask)
