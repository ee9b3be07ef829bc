"""A layer's product on a stack of values and tangents, between activations, as an implicit GEMM.

    forward     y_0 = L phi(x_0) + b                 y_i = L (phi'(x_0) x_i)
    backward    g_x_i = phi'(x_0) L^T g_y_i          g_x_0 = phi'(x_0) L^T g_y_0 + phi''(x_0) d
    weight      g_L = g_y_0 phi(x_0)^T + sum_i g_y_i (phi'(x_0) x_i)^T

with d = sum_i x_i * L^T g_y_i over the m tangents. L is a convolution, a transposed one or a linear
layer; slot 0 of a stack holds the values, the others one tangent each.

Where an activation's result tells its slope, the layer that makes the stack stores it behind that
activation, once an output: phi(y_0), then phi'(y_0) y_i with the slope read off the values that are
there already. Every product is then a plain one. Otherwise the activation in front is applied as
the product loads its input. Either way the data gradient takes the slope as it is stored: what is
kept for the backward is the stack itself, neither phi(x) nor a mask, and phi'' needs no pass of its
own.

Floor, with X and Y the bytes of the stacks of inputs and outputs: the forward moves X + Y, the data
gradient X + Y (2 X + Y where phi'' is not 0), the weight gradient X + Y; each does 2 (1 + m) B
FLOPs for every multiply-add of the layer on one sample. Inputs are read once for each tap that uses
them, from L2 or nearer but for the first.

Layouts: stacks [S, B, H, W, C] with S = 1 + m, dense or, with slots further apart, some samples of
a dense one; dense weights [outer, taps, inner], where one of outer and inner is summed over. An
output position (y, x) of phase p reads, at its tap t, input row stride * y + offset + p + step * t
with the weight's row first - p + stride_w * t. One phase is an ordinary convolution. Two phases an
axis give the layer that doubles the size: outputs of the same parity share their taps, and
`_doubling_gemm` has a faster kernel for it.

Tensor cores cut float32 operands off to TF32. A stack or a gradient that whoever made it has not
rounded, and all that an activation on load makes, is rounded between load and product
(`Front.rounds`): two instructions an element. Of 256 -> 512 features that costs 1.9 for each HMMA
on sm_86 and sm_89 and 9.7 for each wgmma of 64 x 64 x 8 on sm_90, which then reads it from
registers.

Sizes are compiled in, so that positions, masks and addresses cost little in the loop; the numbers
of rows, samples and slots are not.

Counted in machine code (Triton 3.8), the data gradient of 32 -> 32 channels from 16 x 16 with
kernel 4 behind a ReLU, instructions of a warp for each of its tensor-core instructions:

    bfloat16    sm_86, 89    6.9 in the loop, 8.9 in all     128 registers, 20 KiB
    bfloat16    sm_120       6.0 in the loop, 7.8 in all     100 registers, 20 KiB
    bfloat16    sm_90        29.5 a wgmma of 64 x 32 x 16    94 registers, 54 KiB
    TF32        sm_86, 89    7.1 in the loop, 9.1 in all     110 registers, 40 KiB
    TF32        sm_90        22.8 a wgmma of 64 x 32 x 8     98 registers, 108 KiB

Copies of the stack are 8 bytes wide (on sm_90 in half precision of the weight as well), of slot 0
and of the result 16.
By the cards' data sheets DRAM bounds it: an input's taps find it in L1, and on Hopper, where L2
would be asked for more than DRAM, 256 rows share a copy of the weight.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._blocks import as_mask, dot, readied, rounded
from ._launch import begin
from .activations import activation, times_slope


@triton.jit
def moved(x, a, is_primal, inside, KIND: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr):
    """The activation's value, or its slope times the tangent; 0 outside, whatever phi(0)."""
    if KIND == "relu" or KIND == "leaky_relu":
        # The value is the slope's multiple too, and what lies outside is 0 as it was loaded.
        return times_slope(x, a, KIND, P0, P1)
    else:
        phi, d1, _ = activation(a.to(tl.float32), KIND, P0, P1)
        moved = tl.where(is_primal, phi, d1 * x.to(tl.float32))
        return tl.where(inside, moved, 0.0).to(x.dtype)


@triton.jit
def sloped(acc, a_ptrs, mask, KIND: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr):
    """A product's result times the slope that slot 0 of a stack tells."""
    return times_slope(acc, tl.load(a_ptrs, mask=mask, other=0.0), KIND, P0, P1)


@triton.jit
def rows_of(tile, slots, BLOCK: tl.constexpr, UNIT: tl.constexpr):
    """Slot and position of a block's rows.

    Rows are ordered by UNIT positions, then slots: what a slot's slope is read from is the same for
    a block's several slots.
    """
    UNITS: tl.constexpr = BLOCK // UNIT
    lanes = tl.arange(0, BLOCK)
    unit = tile * UNITS
    run, first = unit // slots, unit % slots
    slot = first + lanes // UNIT
    # By one division a block where it wraps once.
    if UNITS == 1:
        at, slot_of = run * UNIT + lanes, first
    elif slots >= UNITS:
        over = slot >= slots
        at = tl.where(over, run + 1, run) * UNIT + lanes % UNIT
        slot_of = tl.where(over, slot - slots, slot)
    else:
        at, slot_of = (run + slot // slots) * UNIT + lanes % UNIT, slot % slots
    return slot_of, at


@triton.jit
def position(row, GRID_H: tl.constexpr, GRID_W: tl.constexpr):
    """Sample, y and x of a row; unsigned, as a constant then divides in fewer instructions."""
    row = row.to(tl.uint32, bitcast=True)
    n, y, x = row // (GRID_H * GRID_W), row // GRID_W % GRID_H, row % GRID_W
    return n.to(tl.int32), y.to(tl.int32), x.to(tl.int32)


@triton.jit
def image_of(slot, primal, B, apart, APART: tl.constexpr):
    """Where a slot's sample lies, counted in samples; below B in slot 0 alone, as apart >= B."""
    return slot * (apart if APART else B) + primal


@triton.jit
def through(ptr, at, BY_L1: tl.constexpr):
    """Pointers to what neighbours read again: copies of 8 bytes go through L1, of 16 past it."""
    return tl.multiple_of(ptr + at, [1, 8]) if BY_L1 else ptr + at


@triton.jit
def within(at, SIZE: tl.constexpr):
    """0 <= at < SIZE, in one comparison."""
    return at.to(tl.uint32, bitcast=True) < SIZE


@triton.jit
def _product_tile(
    x_ptr,
    w_ptr,
    at_x,  # [BLOCK_M] what tap 0 reads of x [S, B, H, W, C]; the same of slot 0
    at_a,
    is_primal,  # [BLOCK_M]
    top,  # [BLOCK_M] input row that tap 0 reads
    left,
    cols,  # [BLOCK_N]
    first_y,  # weight's row of tap 0
    first_x,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
    INNER_IS_INPUT: tl.constexpr,
    KIND: tl.constexpr,
    P0: tl.constexpr,
    P1: tl.constexpr,
    KERNEL: tl.constexpr,
    TAPS: tl.constexpr,
    STEP: tl.constexpr,
    STEP_W: tl.constexpr,
    INSIDE: tl.constexpr,
    BY_L1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    ROUND_X: tl.constexpr,
):
    """[BLOCK_M, BLOCK_N] outputs in float32; the sum runs over (tap, channel)."""
    ONE_TAP: tl.constexpr = C % BLOCK_K == 0
    STRIDE_C: tl.constexpr = 1 if INNER_IS_INPUT else KERNEL * KERNEL * N
    STRIDE_N: tl.constexpr = KERNEL * KERNEL * C if INNER_IS_INPUT else 1
    STRIDE_TAP: tl.constexpr = C if INNER_IS_INPUT else N
    # Bit t of a row: whether its tap t is inside. One instruction a row tells it in the loop.
    reach = tl.zeros([BLOCK_M], tl.int32)
    if ONE_TAP and not INSIDE:
        reach_x = tl.zeros([BLOCK_M], tl.int32)
        for t in tl.static_range(TAPS):
            reach_x |= tl.where(within(left + STEP * t, W), 1 << t, 0)
        for t in tl.static_range(TAPS):
            reach |= tl.where(within(top + STEP * t, H), reach_x << TAPS * t, 0)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, TAPS * TAPS * C, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        # One division for the block, not one a lane. Not a remainder: the compiler would lose that
        # c is consecutive, and with it wide loads.
        tap = k // C if ONE_TAP else ks // C
        c = ks - tap * C
        ty, tx = tap // TAPS, tap % TAPS
        ky, kx = first_y + STEP_W * ty, first_x + STEP_W * tx
        shift = STEP * (ty * W + tx) * C + c
        at_w = (ky * KERNEL + kx) * STRIDE_TAP + c * STRIDE_C
        # What is always true is a constant, which the compiler leaves out.
        inside = tl.full([1, BLOCK_K], True, tl.int1)
        used = tl.full([BLOCK_K, 1], True, tl.int1)
        if ONE_TAP:
            if not INSIDE:
                inside &= ((reach & (1 << tap)) != 0)[:, None]
        else:
            inside &= (tap < TAPS * TAPS)[None, :]
            used &= (tap < TAPS * TAPS)[:, None]
            if not INSIDE:
                inside &= within(top[:, None] + STEP * ty[None, :], H)
                inside &= within(left[:, None] + STEP * tx[None, :], W)
        if STEP_W * TAPS > KERNEL:
            fits = (ky < KERNEL) & (kx < KERNEL)
            used &= as_mask(fits) if ONE_TAP else fits[:, None]
        if N % BLOCK_N:
            used &= (cols < N)[None, :]
        x_ptrs = through(x_ptr, at_x[:, None] + shift[None, :], BY_L1)
        x = tl.load(x_ptrs, mask=inside, other=0.0)
        if KIND != "none":
            a_ptrs = through(x_ptr, at_a[:, None] + shift[None, :], BY_L1)
            a = tl.load(a_ptrs, mask=inside, other=0.0)
            x = moved(x, a, is_primal[:, None], inside, KIND, P0, P1)
        w = tl.load(w_ptr + at_w[:, None] + cols[None, :] * STRIDE_N, mask=used, other=0.0)
        acc = dot(readied(x, ROUND_X), w, acc, PRECISION)
    return acc


# Row and sample counts are not specialised: a value of 1 or a multiple of 16 compiles nothing new.
@triton.jit(do_not_specialize=["first_slot", "rows", "slots", "B", "x_apart", "a_apart", "y_apart"])
def tangent_product_kernel(
    x_ptr,  # [S, B, H, W, C]
    w_ptr,  # [N, KERNEL * KERNEL, C] where INNER_IS_INPUT, else [C, KERNEL * KERNEL, N]
    bias_ptr,  # [BIAS_SIZE]; not read without HAS_BIAS
    a_ptr,  # [S, B, OH, OW, N], slot 0 of which tells the slope; not read where none is taken
    y_ptr,  # [S, B, OH, OW, N]
    first_slot,
    rows,  # slots of the launch, from first_slot on
    slots,  # all
    B,
    x_apart,  # samples from one slot to the next; read where APART
    a_apart,
    y_apart,
    GRID_H: tl.constexpr,
    GRID_W: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    OH: tl.constexpr,
    OW: tl.constexpr,
    N: tl.constexpr,
    BIAS_SIZE: tl.constexpr,
    INNER_IS_INPUT: tl.constexpr,
    KIND: tl.constexpr,  # of the activation that the input is in front of
    P0: tl.constexpr,
    P1: tl.constexpr,
    RESULT_KIND: tl.constexpr,  # of the one behind the result, or with PULL in front of it
    R0: tl.constexpr,
    R1: tl.constexpr,
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
    INSIDE: tl.constexpr,  # no tap is ever outside
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
    # Columns and phases of the same rows are neighbours in launch order: they share x through L2.
    pid = tl.program_id(0)
    COL_TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    cols = pid % COL_TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    phase = pid // COL_TILES % (PHASES * PHASES)
    phase_y, phase_x = phase // PHASES, phase % PHASES
    slot, row = rows_of(pid // (COL_TILES * PHASES * PHASES), rows, BLOCK_M, UNIT)
    values = B * GRID_H * GRID_W
    # Rows beyond the end read what the last one does: nothing is outside for their sake.
    primal, y, x = position(tl.minimum(row, values - 1), GRID_H, GRID_W)
    slot += first_slot
    out_y, out_x = y * PHASES + phase_y, x * PHASES + phase_x
    row_mask = row < values
    if OH % PHASES or OW % PHASES:
        row_mask &= (out_y < OH) & (out_x < OW)
    mask = row_mask[:, None]
    if N % BLOCK_N:
        mask &= (cols < N)[None, :]
    at = ((out_y * OW + out_x) * N)[:, None] + cols[None, :]
    top, left = y * STRIDE + OFFSET + phase_y, x * STRIDE + OFFSET + phase_x
    corner = (top * W + left) * C
    image, image_x = tl.full([], OH * OW * N, tl.int64), tl.full([], H * W * C, tl.int64)

    dot = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # All slots in one program where phi'' sums over them, the value's own last; else they are rows.
    for i in range(0, slots if CURVED else 1):
        s = slot + (slots - 1 - i) if CURVED else slot
        n = image_of(s, primal, B, x_apart, APART)
        acc = _product_tile(
            *(x_ptr, w_ptr, n * image_x + corner, primal * image_x + corner, n < B, top, left),
            *(cols, FIRST_W - phase_y, FIRST_W - phase_x, H, W, C, N, INNER_IS_INPUT),
            *(KIND, P0, P1, KERNEL, TAPS, STEP, STEP_W, INSIDE, BY_L1),
            *(BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, ROUND_X),
        )
        out = acc
        a_ptrs = a_ptr + (primal * image)[:, None] + at
        if CURVED:
            # Loaded anew for each slot, so that it takes no registers during the product.
            a = tl.load(a_ptrs, mask=mask, other=0.0)
            _, d1, d2 = activation(a.to(tl.float32), RESULT_KIND, R0, R1)
            n = image_of(s, primal, B, a_apart, APART)
            t = tl.load(a_ptr + (n * image)[:, None] + at, mask=mask, other=0.0)
            is_primal = i == slots - 1
            out = d1 * acc + tl.where(is_primal, d2 * dot, 0.0)
            dot += tl.where(is_primal, 0.0, t.to(tl.float32) * acc)
        elif PULL:
            if RESULT_KIND != "none":
                out = sloped(acc, a_ptrs, mask, RESULT_KIND, R0, R1)
        elif first_slot == 0:
            if HAS_BIAS:
                bias = tl.load(bias_ptr + cols % BIAS_SIZE, mask=cols < N, other=0.0)
                out = acc + tl.where((n < B)[:, None], bias.to(tl.float32)[None, :], 0.0)
            if RESULT_KIND != "none":
                out = activation(out, RESULT_KIND, R0, R1)[0]
        elif RESULT_KIND != "none":
            # Tangents alone: the values were there before them.
            out = sloped(acc, a_ptrs, mask, RESULT_KIND, R0, R1)
        n = image_of(s, primal, B, y_apart, APART)
        tl.store(y_ptr + (n * image)[:, None] + at, rounded(out, ROUND), mask=mask)
