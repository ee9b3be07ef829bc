"""The transposed convolution that doubles the size, with few channels out: a decoder's last layer.

`_implicit_gemm` has the formulas. Here one program has all four outputs behind each of BLOCK_M
inputs: their 4 N numbers are the columns of one accumulator, 16 with those that are left empty, and
nine shifted tiles of the stack its operands. What an output row holds behind an input lies together
in memory, both columns of it, N numbers each.

Floor: inputs and results once. 32 -> 3 channels from 32 x 32, the values of 64 samples in bfloat16
with float32 results: 7.3 MB and 0.4 GFLOP.

Counted for that in machine code (Triton 3.8), a warp's instructions in all for each of its
tensor-core instructions, of which a program of 128 positions issues 36, 72 with TF32, on sm_90 and
twice as many elsewhere:

    bfloat16    sm_86, 89    15.1    186 registers, 25 KiB
    bfloat16    sm_120       15.7    181 registers, 25 KiB
    bfloat16    sm_90        32.6    122 registers, 73 KiB
    TF32        sm_86, 89    13.8    160 registers, 27 KiB
    TF32        sm_90        29.9    133 registers, 81 KiB

No spills. Copies of the stack and stores of float32 are 8 bytes wide, loads of a half weight 2. Of
L2 a program asks for 22 KB, its inputs once: their nine copies come from L1. By data sheets DRAM
bounds it on an RTX card, instructions on an H100.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._blocks import dot, readied, rounded
from ._implicit_gemm import image_of, position, rows_of, sloped, through, within
from ._launch import begin
from .activations import activation


@triton.jit
def _weight(
    w_ptr,
    c,  # [BLOCK_K]
    dy,
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
    a_ptr,  # [S, B, 2 H, 2 W, N], slot 0 of which tells the slope; not read where none is taken
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
    HAS_BIAS: tl.constexpr,
    BY_L1: tl.constexpr,
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
    for k in range(0, 3 * K_TILES):
        dy = k // K_TILES - 1
        c = (k % K_TILES) * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = within(y + dy, H)[:, None]
        if C % BLOCK_K:
            inside &= (c < C)[None, :]
        at = base + (dy * (W * C) + c)[None, :]
        left = tl.load(through(x_ptr, at - C, BY_L1), mask=inside & (x > 0)[:, None], other=0.0)
        middle = tl.load(through(x_ptr, at, BY_L1), mask=inside, other=0.0)
        in_right = inside & (x < W - 1)[:, None]
        right = tl.load(through(x_ptr, at + C, BY_L1), mask=in_right, other=0.0)
        acc = dot(readied(left, ROUND_X), _weight(w_ptr, c, dy, -1, C, N, BLOCK_K), acc, PRECISION)
        acc = dot(readied(middle, ROUND_X), _weight(w_ptr, c, dy, 0, C, N, BLOCK_K), acc, PRECISION)
        acc = dot(readied(right, ROUND_X), _weight(w_ptr, c, dy, 1, C, N, BLOCK_K), acc, PRECISION)

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
    elif RESULT_KIND != "none":
        # Tangents alone: the values were there before them.
        a_ptrs = a_ptr + (primal * image)[:, None] + in_image
        acc = sloped(acc, a_ptrs, mask, RESULT_KIND, R0, R1)
    n = image_of(slot, primal, B, y_apart, APART)
    tl.store(y_ptr + (n * image)[:, None] + in_image, rounded(acc, ROUND), mask=mask)
