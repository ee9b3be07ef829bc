"""A layer's product on a stack of values and tangents, behind an activation, as implicit GEMMs.

    forward     y_0 = L phi(x_0) + b                 y_i = L (phi'(x_0) x_i)
    backward    g_x_i = phi'(x_0) L^T g_y_i          g_x_0 = phi'(x_0) L^T g_y_0 + phi''(x_0) d
    weight      g_L = g_y_0 phi(x_0)^T + sum_i g_y_i (phi'(x_0) x_i)^T

with d = sum_i x_i * L^T g_y_i over the m tangents. L is a convolution, a transposed one or a linear
layer; slot 0 of a stack holds the values, the others one tangent each. The activation in front is
applied as the product loads its input and its slope as the data gradient is stored: what is kept
for the backward is the stack itself, neither phi(x) nor a mask, and phi'' needs no pass of its own.

Floor, with X and Y the bytes of the stacks of inputs and outputs: the forward moves X + Y, the data
gradient X + Y (2 X + Y where phi'' is not 0), the weight gradient X + Y; each does 2 (1 + m) B
FLOPs for every multiply-add of the layer on one sample. Inputs are read once for each tap that uses
them, from L2 or nearer but for the first; x_0 rides along with each of its m tangents.

Layouts, all dense: stacks [S, B, H, W, C] with S = 1 + m, weights [outer, taps, inner], where one
of outer and inner is summed over. An output position (y, x) of phase p reads, at its tap t, input
row stride * y + offset + p + step * t with the weight's row first - p + stride_w * t. One phase is
an ordinary convolution. Two phases an axis give the layer that doubles the size: outputs of the
same parity share their taps.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._blocks import dot
from .activations import activation


@triton.jit
def moved(x, a, is_primal, inside, KIND: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr):
    """The activation's value, or its slope times the tangent; 0 outside, whatever phi(0)."""
    phi, d1, _ = activation(a.to(tl.float32), KIND, P0, P1)
    moved = tl.where(is_primal, phi, d1 * x.to(tl.float32))
    return tl.where(inside, moved, 0.0).to(x.dtype)


@triton.jit
def _product_tile(
    x_ptr,  # [S, B, H, W, C]
    w_ptr,
    n,  # [BLOCK_M] index into S * B
    top,  # [BLOCK_M] input row that tap 0 reads
    left,
    row_mask,
    cols,  # [BLOCK_N]
    first_y,  # weight's row of tap 0
    first_x,
    B,
    H,
    W,
    C,
    N,
    stride_w_c,
    stride_w_n,
    stride_w_tap,
    KIND: tl.constexpr,
    P0: tl.constexpr,
    P1: tl.constexpr,
    KERNEL: tl.constexpr,
    TAPS: tl.constexpr,
    STEP: tl.constexpr,
    STEP_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ONE_TAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[BLOCK_M, BLOCK_N] outputs in float32; the sum runs over (tap, channel)."""
    image = tl.cast(H * W * C, tl.int64)
    x_ptrs = x_ptr + (n * image)[:, None]
    a_ptrs = x_ptr + (n % B * image)[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, TAPS * TAPS * C, BLOCK_K):
        ks = tl.arange(0, BLOCK_K)
        if ONE_TAP:
            # One division for the block, not one a lane.
            tap = k // C + tl.zeros([BLOCK_K], tl.int32)
        else:
            tap = (k + ks) // C
        # Not a remainder: the compiler would lose that c is consecutive, and with it wide loads.
        c = k + ks - tap * C
        ty, tx = tap // TAPS, tap % TAPS
        at_y, at_x = top[:, None] + STEP * ty[None, :], left[:, None] + STEP * tx[None, :]
        inside = row_mask[:, None] & (tap < TAPS * TAPS)[None, :]
        inside &= (at_y >= 0) & (at_y < H) & (at_x >= 0) & (at_x < W)
        at = (at_y * W + at_x) * C + c[None, :]
        x = tl.load(x_ptrs + at, mask=inside, other=0.0)
        if KIND != "none":
            a = tl.load(a_ptrs + at, mask=inside, other=0.0)
            x = moved(x, a, (n < B)[:, None], inside, KIND, P0, P1)
        ky, kx = first_y + STEP_W * ty, first_x + STEP_W * tx
        used = (tap < TAPS * TAPS) & (ky < KERNEL) & (kx < KERNEL)
        at_w = (ky * KERNEL + kx) * stride_w_tap + c * stride_w_c
        w = tl.load(
            w_ptr + at_w[:, None] + cols[None, :] * stride_w_n,
            mask=used[:, None] & (cols < N)[None, :],
            other=0.0,
        )
        acc = dot(x, w, acc, PRECISION)
    return acc


# Batch and row counts are not specialised: a value of 1 or a multiple of 16 compiles nothing new.
@triton.jit(do_not_specialize=["rows", "slots", "B", "grid_h", "grid_w", "H", "W", "OH", "OW"])
def tangent_product_kernel(
    x_ptr,  # [S, B, H, W, C]
    w_ptr,  # weight; strides of its input channel, its output channel and its tap follow
    bias_ptr,  # [bias_size]; not read without HAS_BIAS
    a_ptr,  # [S, B, OH, OW, N], what the pulled-back activation was taken at; else not read
    y_ptr,  # [S, B, OH, OW, N]
    rows,
    slots,
    B,
    grid_h,
    grid_w,
    H,
    W,
    C,
    OH,
    OW,
    N,
    bias_size,
    stride_w_c,
    stride_w_n,
    stride_w_tap,
    KIND: tl.constexpr,
    P0: tl.constexpr,
    P1: tl.constexpr,
    PULL: tl.constexpr,
    CURVED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KERNEL: tl.constexpr,
    TAPS: tl.constexpr,
    STRIDE: tl.constexpr,
    PHASES: tl.constexpr,
    OFFSET: tl.constexpr,
    STEP: tl.constexpr,
    FIRST_W: tl.constexpr,
    STEP_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ONE_TAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Columns and phases of the same rows are neighbours in launch order: they share x through L2.
    pid = tl.program_id(0)
    col_tiles = tl.cdiv(N, BLOCK_N)
    cols = pid % col_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    phase = pid // col_tiles % (PHASES * PHASES)
    phase_y, phase_x = phase // PHASES, phase % PHASES
    row = pid // (col_tiles * PHASES * PHASES) * BLOCK_M + tl.arange(0, BLOCK_M)
    y, x = row // grid_w % grid_h, row % grid_w
    out_y, out_x = y * PHASES + phase_y, x * PHASES + phase_x
    row_mask = (row < rows) & (out_y < OH) & (out_x < OW)
    mask = row_mask[:, None] & (cols < N)[None, :]
    at = ((out_y * OW + out_x) * N)[:, None] + cols[None, :]
    image = tl.cast(OH * OW * N, tl.int64)

    first = row // (grid_h * grid_w)
    dot = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # All slots in one program where phi'' sums over them, the value's own last; else they are rows.
    for i in range(0, slots if CURVED else 1):
        n = first + (slots - 1 - i) * B if CURVED else first
        acc = _product_tile(
            *(x_ptr, w_ptr, n, y * STRIDE + OFFSET + phase_y, x * STRIDE + OFFSET + phase_x),
            *(row_mask, cols, FIRST_W - phase_y, FIRST_W - phase_x, B, H, W, C, N),
            *(stride_w_c, stride_w_n, stride_w_tap, "none" if PULL else KIND, P0, P1),
            *(KERNEL, TAPS, STEP, STEP_W, BLOCK_M, BLOCK_N, BLOCK_K, ONE_TAP, PRECISION),
        )
        if HAS_BIAS:
            bias = tl.load(bias_ptr + cols % bias_size, mask=cols < N, other=0.0)
            acc += tl.where((n < B)[:, None], bias.to(tl.float32)[None, :], 0.0)
        out = acc
        if PULL:
            # Loaded anew for each slot, so that it takes no registers during the product.
            a = tl.load(a_ptr + (n % B * image)[:, None] + at, mask=mask, other=0.0)
            _, d1, d2 = activation(a.to(tl.float32), KIND, P0, P1)
            out = d1 * acc
            if CURVED:
                t = tl.load(a_ptr + (n * image)[:, None] + at, mask=mask, other=0.0)
                is_primal = i == slots - 1
                out += tl.where(is_primal, d2 * dot, 0.0)
                dot += tl.where(is_primal, 0.0, t.to(tl.float32) * acc)
        tl.store(y_ptr + (n * image)[:, None] + at, out, mask=mask)
