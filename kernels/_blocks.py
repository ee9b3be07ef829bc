"""What several kernels do with their tiles."""

from __future__ import annotations

import triton
import triton.language as tl

from ._launch import INTERPRET


@triton.jit
def _truncated(x):
    """What a tensor core reads of a float32 operand in TF32: its upper 19 bits."""
    return (x.to(tl.int32, bitcast=True) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def dot(x, y, acc, PRECISION: tl.constexpr):
    """The matrix product of two tiles, added to float32 acc; PRECISION is for float32 tiles."""
    if INTERPRET:
        if PRECISION == "tf32" and x.dtype == tl.float32:
            x, y = _truncated(x), _truncated(y)
        return tl.dot(x.to(tl.float32), y.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(x, y, acc, input_precision=PRECISION)


@triton.jit
def rounded(x, PRECISION: tl.constexpr):
    """Float32 x to the nearest TF32 number, ties away from 0; as it is unless PRECISION is "tf32".

    Tensor cores truncate float32 operands, which makes every product smaller on average. What
    makes an operand rounds it, once; what nobody has rounded is `readied` on load. NaN and the
    infinities stay.
    """
    if PRECISION == "tf32":
        # The magnitude half a unit up, before its lower 13 bits go; a NaN's might carry over.
        up = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        return tl.where(x == x, up.to(tl.float32, bitcast=True), x)
    else:
        return x


@triton.jit
def readied(x, PRECISION: tl.constexpr):
    """Float32 x so that what `dot` cuts off leaves the nearest TF32 number; likewise by PRECISION.

    For operands that nobody has rounded, between load and product: two instructions each.
    """
    if PRECISION == "tf32":
        # Half a unit away from 0: 2^-11 of x's power of 2, which a NaN has none of.
        power = (x.to(tl.int32, bitcast=True) & -0x800000).to(tl.float32, bitcast=True)
        return x + power * 0.00048828125
    else:
        return x


@triton.jit
def add_gram_float64(G, J, m):
    """G + J J^T for a float64 tile J [BLOCK_M, N] of m rows, whatever the card.

    No matrix instruction takes float64 on every card: one column of G at a time.
    """
    i = tl.arange(0, J.shape[0])
    for k in range(0, m):
        row = tl.sum(tl.where(i[:, None] == k, J, 0.0), 0)
        column = tl.sum(J * row[None, :], 1)
        G += tl.where(i[None, :] == k, column[:, None], 0.0)
    return G


@triton.jit
def as_mask(holds):
    """A comparison of two numbers, to be joined with masks of a block; no instruction.

    Triton's interpreter takes it for a number of the compared type when it spreads it over a block,
    and from 3.9 on refuses such a mask. "And" with a constant tells it the right type.
    """
    return True & holds


@triton.jit
def store_sums(g_ptr, p_ptr, rr_ptr, part, m, rows, cols, G, p, rr, first_col, first):
    """Store a program's share of G, p and rr as part (split, sample) of [splits * B, ...].

    Of the programs whose tiles share rows, `first_col` stores p; of all, `first` stores rr.
    """
    at = part * m * m + (rows[:, None] * m + cols[None, :])
    tl.store(g_ptr + at, G, mask=(rows < m)[:, None] & (cols < m)[None, :])
    tl.store(p_ptr + part * m + rows, p, mask=(rows < m) & as_mask(first_col))
    tl.store(rr_ptr + part, rr, mask=first)
