"""The product that doubles the size: a transposed convolution, a strided convolution's gradient.

`_implicit_gemm` has the formulas, the floor, and this product beside a curved activation. Here one
program has the outputs of one row parity and both column parities behind BLOCK_M inputs. Each
output has two taps a row, and neighbours share them: a step loads three shifted tiles of the stack
for four products into two accumulators, where one output parity at a time would load four.

Counted in machine code (Triton 3.8), the tangents of 32 -> 32 channels from 16 x 16 with kernel 4
between ReLUs, a warp's instructions for each of its tensor-core instructions:

    bfloat16    sm_86, 89    3.9 in the loop, 10.6 in all    102 registers, 32 KiB
    bfloat16    sm_120       3.9 in the loop, 9.7 in all     122 registers, 32 KiB
    bfloat16    sm_90        32 a wgmma of 64 x 32 x 16      128 registers, 84 KiB
    TF32        sm_86, 89    10.3 in all, unrolled           103 registers, 32 KiB
    TF32        sm_90        39.8 a wgmma of 64 x 32 x 8     199 registers, 112 KiB

No spills; copies of the stack are 8 bytes wide, of slot 0 and of the result 16. By the cards' data
sheets memory bounds it. Of L2 a program asks for its inputs once, as their shifted copies come from
L1, for its half of the weight, and for the slopes of its positions, which several slots share:
counted in sectors for those tangents, 160 MB on sm_90, where 256 rows share a weight, and 202 MB
elsewhere, of 89 MB of stacks. On Hopper TF32 wants the weight the other way round, copied
4 bytes at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._blocks import as_mask, dot, readied, rounded
from ._implicit_gemm import image_of, moved, position, rows_of, sloped, through, within
from ._launch import begin
from .activations import activation


@triton.jit
def _shifted(
    x_ptr,
    at,  # [BLOCK_M, BLOCK_K]
    at_a,
    inside,  # [BLOCK_M, 1]
    is_primal,
    in_channels,  # [1, BLOCK_K]
    KIND: tl.constexpr,
    P0: tl.constexpr,
    P1: tl.constexpr,
    BY_L1: tl.constexpr,
    ROUND_X: tl.constexpr,
):
    """A tile of the stack behind its activation."""
    mask = inside & in_channels
    x = tl.load(through(x_ptr, at, BY_L1), mask=mask, other=0.0)
    if KIND != "none":
        a = tl.load(through(x_ptr, at_a, BY_L1), mask=mask, other=0.0)
        x = moved(x, a, is_primal, mask, KIND, P0, P1)
    return readied(x, ROUND_X)


# Row and sample counts are not specialised: a value of 1 or a multiple of 16 compiles nothing new.
@triton.jit(do_not_specialize=["first_slot", "rows", "B", "x_apart", "y_apart"])
def tangent_doubling_kernel(
    x_ptr,  # [S, B, H, W, C]
    w_ptr,  # [C, KERNEL, KERNEL, N]
    bias_ptr,  # [N]; not read without HAS_BIAS
    a_ptr,  # [S, B, OH, OW, N], slot 0 of which tells the slope; not read where none is taken
    y_ptr,  # [S, B, OH, OW, N]
    first_slot,
    rows,  # slots of the launch, from first_slot on
    B,
    x_apart,  # samples from one slot to the next; read where APART
    y_apart,
    GRID_H: tl.constexpr,
    GRID_W: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    OH: tl.constexpr,
    OW: tl.constexpr,
    N: tl.constexpr,
    KIND: tl.constexpr,  # of the activation that the input is in front of
    P0: tl.constexpr,
    P1: tl.constexpr,
    RESULT_KIND: tl.constexpr,  # of the one behind the result, or with PULL in front of it
    R0: tl.constexpr,
    R1: tl.constexpr,
    PULL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KERNEL: tl.constexpr,
    BY_L1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    UNIT: tl.constexpr,
    APART: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    ROUND_X: tl.constexpr,  # to what x is rounded on load, and what is stored
    ROUND: tl.constexpr,
):
    begin()
    # Columns and parities of the same rows are neighbours in launch order: they share x through L2.
    pid = tl.program_id(0)
    COL_TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    K_TILES: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    cols = pid % COL_TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    parity = pid // COL_TILES % 2
    slot, row = rows_of(pid // (COL_TILES * 2), rows, BLOCK_M, UNIT)
    values = B * GRID_H * GRID_W
    # Rows beyond the end read what the last one does: nothing is outside for their sake.
    primal, y, x = position(tl.minimum(row, values - 1), GRID_H, GRID_W)
    slot += first_slot
    n = image_of(slot, primal, B, x_apart, APART)
    base = ((n.to(tl.int64) * H + y) * W + x)[:, None] * C
    base_a = ((primal.to(tl.int64) * H + y) * W + x)[:, None] * C
    is_primal = (n < B)[:, None]

    # Outputs in even columns and in odd ones.
    even = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    odd = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, 2 * K_TILES):
        ty = k // K_TILES
        c = (k - ty * K_TILES) * BLOCK_K + tl.arange(0, BLOCK_K)
        # A mask that is always true is a constant, which the compiler leaves out.
        in_channels = tl.full([1, BLOCK_K], True, tl.int1)
        used = tl.full([BLOCK_K, 1], True, tl.int1)
        if C % BLOCK_K:
            in_channels, used = (c < C)[None, :], (c < C)[:, None]
        if N % BLOCK_N:
            used &= (cols < N)[None, :]
        if KERNEL == 3:
            used &= as_mask(1 - parity + 2 * ty < KERNEL)
        tile = (is_primal, in_channels)
        dy = parity - ty
        shift = (dy * (W * C) + c)[None, :]
        at, at_a = base + shift, base_a + shift
        inside = within(y + dy, H)[:, None]
        at_w = (c * KERNEL + 1 - parity + 2 * ty)[:, None] * (KERNEL * N) + cols[None, :]
        in_middle = inside & within(x, W)[:, None] if GRID_W > W else inside
        middle = _shifted(x_ptr, at, at_a, in_middle, *tile, KIND, P0, P1, BY_L1, ROUND_X)
        in_right = inside & (x + 1 < W)[:, None]
        right = _shifted(x_ptr, at + C, at_a + C, in_right, *tile, KIND, P0, P1, BY_L1, ROUND_X)
        even = dot(
            middle, tl.load(through(w_ptr, at_w + N, BY_L1), mask=used, other=0.0), even, PRECISION
        )
        odd = dot(
            middle,
            tl.load(through(w_ptr, at_w + 2 * N, BY_L1), mask=used, other=0.0),
            odd,
            PRECISION,
        )
        odd = dot(right, tl.load(through(w_ptr, at_w, BY_L1), mask=used, other=0.0), odd, PRECISION)
        if KERNEL == 4:
            in_left = inside & within(x - 1, W)[:, None]
            left = _shifted(x_ptr, at - C, at_a - C, in_left, *tile, KIND, P0, P1, BY_L1, ROUND_X)
            even = dot(
                left,
                tl.load(through(w_ptr, at_w + 3 * N, BY_L1), mask=used, other=0.0),
                even,
                PRECISION,
            )

    out_y, out_x = 2 * y + parity, 2 * x
    n = image_of(slot, primal, B, y_apart, APART)
    at_y = ((n.to(tl.int64) * OH + out_y) * OW + out_x)[:, None] * N + cols[None, :]
    at_values = ((primal.to(tl.int64) * OH + out_y) * OW + out_x)[:, None] * N + cols[None, :]
    mask = (row < values)[:, None]
    if OH % 2:
        mask &= (out_y < OH)[:, None]
    if N % BLOCK_N:
        mask &= (cols < N)[None, :]
    mask_odd = mask & (out_x + 1 < OW)[:, None] if OW % 2 else mask
    a_ptrs = a_ptr + at_values
    if PULL:
        if RESULT_KIND != "none":
            even = sloped(even, a_ptrs, mask, RESULT_KIND, R0, R1)
            odd = sloped(odd, a_ptrs + N, mask_odd, RESULT_KIND, R0, R1)
    elif first_slot == 0:
        if HAS_BIAS:
            bias = tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
            bias = tl.where(is_primal, bias[None, :], 0.0)
            even += bias
            odd += bias
        if RESULT_KIND != "none":
            even = activation(even, RESULT_KIND, R0, R1)[0]
            odd = activation(odd, RESULT_KIND, R0, R1)[0]
    elif RESULT_KIND != "none":
        # Tangents alone: the values were there before them.
        even = sloped(even, a_ptrs, mask, RESULT_KIND, R0, R1)
        odd = sloped(odd, a_ptrs + N, mask_odd, RESULT_KIND, R0, R1)
    tl.store(y_ptr + at_y, rounded(even, ROUND), mask=mask)
    tl.store(y_ptr + at_y + N, rounded(odd, ROUND), mask=mask_odd)
