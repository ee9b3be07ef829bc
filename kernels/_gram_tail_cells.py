"""A last layer's outputs by cells: what `gram_tail` multiplies, and how it adds up the Gram.

A transposed convolution with kernel 4, stride 2 and padding 1 makes outputs (2y - 1 + q, 2x - 1 +
q') with q and q' in {0, 1} of the four inputs (y - 1 + d, x - 1 + d'), d and d' likewise, at tap
q + 2 - 2 d of either axis, and of no others. Those four outputs are cell (y, x): nothing that it is
multiplied with is a zero. Cells of column 0 also are what would be column W: their outputs of
q' = 0 lie at the end of the row, where the inputs on the left, in the last column, make them, and
those of q' = 1 are made on the right alone. Rows of cells go from 0 to H.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._blocks import dot, readied, rounded
from ._gram_tail_tile import at_weight
from ._implicit_gemm import through, within
from .activations import activation


@triton.jit
def place(n, W: tl.constexpr):
    """Row and column of cell n; unsigned, as a constant then divides in fewer instructions."""
    n = n.to(tl.uint32, bitcast=True)
    return (n // W).to(tl.int32), (n % W).to(tl.int32)


@triton.jit
def _lower_input(n, RIGHT: tl.constexpr, W: tl.constexpr):
    """Row and column of cell n's lower input on a side; left of column 0 is the last one."""
    y, x = place(n, W)
    if not RIGHT:
        x = tl.where(x > 0, x, W) - 1
    return y, x


@triton.jit
def side_weight(
    w_ptr, first, RIGHT: tl.constexpr, C: tl.constexpr, CO: tl.constexpr, LAST: tl.constexpr,
    BLOCK_C: tl.constexpr, PRECISION: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """What the inputs on one side are multiplied with, from a channel on: [2 * BLOCK_C, 16]."""
    k, column = tl.arange(0, 2 * BLOCK_C)[:, None], tl.arange(0, 16)[None, :]
    ci, co = first + k % BLOCK_C, column % 4
    ky = column // 8 + 2 - 2 * (k // BLOCK_C)
    kx = column // 4 % 2 + (0 if RIGHT else 2)
    at = at_weight(ci, co, ky * 4 + kx, CO, LAST)
    w = tl.load(w_ptr + at, mask=(ci < C) & (co < CO), other=0.0)
    return rounded(w.to(tl.float32), PRECISION).to(dtype)


@triton.jit
def add_side(
    Z,  # [CELLS * BLOCK_M, 16]
    t_ptrs,  # [CELLS * BLOCK_M, 2 * BLOCK_C], of input (0, 0) and of the one above
    a_ptr,  # [H, W, C] of the sample; not read where KIND is "none"
    w,  # [2 * BLOCK_C, 16]
    cell, first,
    RIGHT: tl.constexpr, H: tl.constexpr, W: tl.constexpr, C: tl.constexpr,
    BLOCK_M: tl.constexpr, CELLS: tl.constexpr, BLOCK_C: tl.constexpr,
    KIND: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
    PRECISION: tl.constexpr, ROUND_T: tl.constexpr, BY_L1: tl.constexpr,
):  # fmt: skip
    """Z and what the inputs on one side give of CELLS cells from `cell` on, by BLOCK_C channels."""
    ROWS: tl.constexpr = BLOCK_M * CELLS
    k = tl.arange(0, 2 * BLOCK_C)
    down, ci = k // BLOCK_C - 1, first + k % BLOCK_C
    y, x = _lower_input(cell + tl.arange(0, ROWS) // BLOCK_M, RIGHT, W)
    inside = within(y[:, None] + down[None, :], H)
    if C % BLOCK_C:
        inside &= (ci < C)[None, :]
    T = tl.load(through(t_ptrs, ((y * W + x) * C)[:, None], BY_L1), mask=inside, other=0.0)
    if KIND != "none":
        y, x = _lower_input(cell + tl.arange(0, CELLS), RIGHT, W)
        y, ci = y[:, None] + down[None, :], ci[None, :]
        at = (y * W + x[:, None]) * C + ci
        a = tl.load(a_ptr + at, mask=within(y, H) & (ci < C), other=0.0)
        _, d1, _ = activation(a.to(tl.float32), KIND, P0, P1)
        moved = tl.reshape(T, [CELLS, BLOCK_M, 2 * BLOCK_C]).to(tl.float32) * d1[:, None, :]
        T = rounded(tl.reshape(moved, [ROWS, 2 * BLOCK_C]), ROUND_T).to(T.dtype)
    else:
        T = readied(T, ROUND_T)
    return dot(T, w, Z, PRECISION)


@triton.jit
def _cut(x):
    """Float32 x to its upper 16 bits, a bfloat16 number, and what is left."""
    bits = x.to(tl.uint32, bitcast=True)
    rest = x - (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True), rest


@triton.jit
def _turned(x):
    return tl.trans(x) if len(x.shape) == 2 else tl.permute(x, [0, 2, 1])


@triton.jit
def add_gram_in_parts(G, half, J):
    """(G, half) with J J^T [.., M, M] added to G + half + half^T, for a float32 J [.., M, N].

    J is the sum of three bfloat16 numbers, high, middle and low, 8 bits each. Of their products all
    count but those of low with middle and low, 2^-21 of |J_i| |J_j| at most. What tensor cores add
    up they truncate: G grows by whole tiles, each from 0.
    """
    high, rest = _cut(J)
    middle, rest = _cut(rest)
    low = rest.to(tl.bfloat16)
    half = dot(high, _turned(low), half, "ieee")
    half = dot(high, _turned(middle), half, "ieee")
    of_tile = dot(middle, _turned(middle), tl.zeros(G.shape, tl.float32), "ieee")
    return G + dot(high, _turned(high), of_tile, "ieee"), half
