"""A decoder's last transposed convolution together with the Gram of its Jacobian.

The layer (kernel 4, stride 2, padding 1, at most 4 channels out) takes tangents T [m, B, H, W, C]
through the derivative of the activation in front of it (unless the stack lies behind that already),
its weight, and the slope of the activation behind it:

    Z_i = conv_transpose(phi'(a) T_i)      J_i = slope Z_i      G = J J^T   p = J r   rr = r^T r

A program holds all m tangents of a tile of input positions. Output (2y + q, 2x + q') needs inputs
(y + d, x + d') with d in {-1, 0, 1}, at tap k = q + 1 - 2 d: so the tile's outputs are nine
products [m * positions, C] x [C, 16], whose columns are the four parities times up to four
channels. Taps that a parity lacks are zeros: 2.25 times the multiplications, in the width that
tensor cores have. The backward wants Z: it is written as it lies in the registers, [m, B, H, W,
16] in T's dtype, a row of 16 a position, and not at all where no gradient is wanted. G, p and rr
come from the float32 Z.

Floor, celeba16's last layer (m = 16, B = 64, 32 -> 3 channels from 32 x 32) in bfloat16: T is 67,
Z 34 and r 3 MB, so 104 MB through device memory, 70 without Z; 151 MB of T from L2, for a tile's
border. 9.7 GFLOP on tensor cores, and 0.5 in float32 for the Gram.

Counted there, a warp of 8 and a tile of 16 positions: 1,230 instructions on sm_86, sm_89 (72 HMMA)
and sm_90 (36 HGMMA), 1,175 on sm_120. A fifth are the Gram's multiplications in float32. Of few
tangents T is copied 8 bytes at a time, through L1, where the nine taps find it again: past L1, by
16 bytes in 1,008 instructions, an H100's L2 would take 116 us and not 27, and the issue of
instructions 44 (computed). Z is stored 16 bytes at a time. Two programs share an SM, on sm_120 one
has it alone (138 registers). Device memory
bounds it on a 4090, issue on an H100. Not measured on a GPU yet.

A rescue of lost samples (`woodbury_float64`) makes their J again and sums in float64; where none is
lost it reads B flags.

The pullback is in `gram_tail_backward`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._blocks import add_gram_float64, dot, rounded, store_sums
from ._gram_tail_tile import (
    COLUMNS,
    Tile,
    block_of,
    of_tap,
    packed_configurations,
    packed_weight,
    prepare,
    shares,
    variants,
)
from ._implicit_gemm import through
from ._launch import Configuration, device_limits, empty_sums, launch, pointer
from .activations import activation, front_constexprs


@triton.jit
def _tile_rows(
    t_ptr, a_ptr, w_ptr, at_slot, b, y0, x0, m,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, CO: tl.constexpr, LAST: tl.constexpr,
    BLOCK_M: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BLOCK_C: tl.constexpr,
    KIND: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
    PRECISION: tl.constexpr, PACKED: tl.constexpr, BY_L1: tl.constexpr,
):  # fmt: skip
    """Z [BLOCK_M * positions, 16] of a tile that begins at (y0, x0) of sample b."""
    POSITIONS: tl.constexpr = TILE_Y * TILE_X
    ROWS: tl.constexpr = BLOCK_M * POSITIONS
    C_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    row = tl.arange(0, ROWS)
    y, x = y0 + row % POSITIONS // TILE_X, x0 + row % TILE_X
    at = at_slot + (y * W + x) * C
    live = row // POSITIONS < m
    column = tl.arange(0, 16)
    Z = tl.zeros([ROWS, 16], tl.float32)
    for step in range(0, 9 * C_BLOCKS):
        tap = step // C_BLOCKS
        ci = step % C_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
        down, right = tap // 3 - 1, tap % 3 - 1
        inside = live & (y + down >= 0) & (y + down < H) & (x + right >= 0) & (x + right < W)
        T = tl.load(
            through(t_ptr, at[:, None] + ((down * W + right) * C + ci)[None, :], BY_L1),
            mask=inside[:, None] & (ci < C)[None, :],
            other=0.0,
        )
        if KIND != "none":
            position = tl.arange(0, POSITIONS)
            ya, xa = y0 + position // TILE_X + down, x0 + position % TILE_X + right
            in_a = (ya >= 0) & (ya < H) & (xa >= 0) & (xa < W)
            a = tl.load(
                a_ptr + b * (H * W * C) + ((ya * W + xa) * C)[:, None] + ci[None, :],
                mask=in_a[:, None] & (ci < C)[None, :],
                other=0.0,
            )
            _, d1, _ = activation(a.to(tl.float32), KIND, P0, P1)
            moved = tl.reshape(T, [BLOCK_M, POSITIONS, BLOCK_C]).to(tl.float32) * d1[None, :, :]
            T = rounded(tl.reshape(moved, [ROWS, BLOCK_C]), PRECISION).to(T.dtype)
        if PACKED:
            at_w = w_ptr + ((tap * C + ci) * 16)[:, None] + column[None, :]
            w = tl.load(at_w, mask=(ci < C)[:, None], other=0.0)
        else:
            at_w, has_tap = of_tap(w_ptr, tap, ci[:, None], column[None, :], C, CO, LAST)
            w = tl.load(at_w, mask=has_tap, other=0.0)
        Z = dot(T, w, Z, PRECISION)
    return Z


@triton.jit(do_not_specialize=["B", "m", "splits"])
def _gram_tail_fwd_kernel(
    t_ptr,  # T [m, B, H, W, C]
    a_ptr,  # [B, H, W, C]; not read where KIND is "none"
    w_ptr,  # [9, C, 16] of `packed_weight`; in a RESCUE the layer's own, [C, CO, 4, 4]
    slope_ptr,  # [B, 2H, 2W, CO] float32; not read without SLOPED
    r_ptr,  # [B, 2H, 2W, CO] float32
    lost_ptr,  # [B], uint8; not read without RESCUE
    z_ptr,  # Z [m, B, H, W, 16]; not written without WRITE
    g_ptr,  # [splits, B, m, m], float64 in a RESCUE and else float32
    p_ptr,  # [splits, B, m], likewise
    rr_ptr,  # [splits, B], likewise
    B, m, splits, stride_t_m,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, CO: tl.constexpr, LAST: tl.constexpr,
    BLOCK_M: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BLOCK_C: tl.constexpr,
    KIND: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
    SLOPED: tl.constexpr, PRECISION: tl.constexpr, RESCUE: tl.constexpr, WRITE: tl.constexpr,
    BY_L1: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    split = pid % splits
    b = (pid // splits).to(tl.int64)
    if RESCUE:
        if tl.load(lost_ptr + b) == 0:
            return
    dtype: tl.constexpr = tl.float64 if RESCUE else tl.float32
    POSITIONS: tl.constexpr = TILE_Y * TILE_X
    TILES_X: tl.constexpr = (W + TILE_X - 1) // TILE_X
    TILES: tl.constexpr = (H + TILE_Y - 1) // TILE_Y * TILES_X
    row = tl.arange(0, BLOCK_M * POSITIONS)
    slot = (row // POSITIONS).to(tl.int64)
    at_slot = slot * stride_t_m + b * (H * W * C)
    i = tl.arange(0, BLOCK_M)
    column = tl.arange(0, 16)
    # Of the tile's outputs, one a position and a column.
    q = tl.arange(0, POSITIONS * 16)
    q_y, q_x = 2 * (q // 16 // TILE_X) + q // 8 % 2, 2 * (q // 16 % TILE_X) + q // 4 % 2
    image = b * (4 * H * W * CO)
    G = tl.zeros([BLOCK_M, BLOCK_M], dtype)
    p = tl.zeros([BLOCK_M], dtype)
    rr_lanes = tl.zeros([POSITIONS * 16], dtype)
    for tile in range(split, TILES, splits):
        y0, x0 = tile // TILES_X * TILE_Y, tile % TILES_X * TILE_X
        Z = _tile_rows(
            t_ptr, a_ptr, w_ptr, at_slot, b, y0, x0, m,
            H, W, C, CO, LAST, BLOCK_M, TILE_Y, TILE_X, BLOCK_C,
            KIND, P0, P1, PRECISION, not RESCUE, BY_L1,
        )  # fmt: skip
        if WRITE:
            y, x = y0 + row % POSITIONS // TILE_X, x0 + row % TILE_X
            at_z = (slot * B + b) * (H * W * 16) + (y * W + x) * 16
            live = (row // POSITIONS < m) & (y < H) & (x < W)
            tl.store(
                z_ptr + at_z[:, None] + column[None, :],
                rounded(Z, PRECISION).to(z_ptr.dtype.element_ty),
                mask=live[:, None],
            )
        at = ((2 * y0 + q_y) * (2 * W) + 2 * x0 + q_x) * CO + q % 4
        present = (2 * y0 + q_y < 2 * H) & (2 * x0 + q_x < 2 * W)
        # Positions outside of the image have neighbours inside.
        J = tl.where(present[None, :], tl.reshape(Z, [BLOCK_M, POSITIONS * 16]), 0.0)
        has = present & (q % 4 < CO)
        r = tl.load(r_ptr + image + at, mask=has, other=0.0)
        if SLOPED:
            J = J * tl.load(slope_ptr + image + at, mask=has, other=0.0)[None, :]
        J, r = J.to(dtype), r.to(dtype)
        if RESCUE:
            G = add_gram_float64(G, J, m)
        else:
            G = tl.dot(J, tl.trans(J), G, input_precision="ieee")
        p += tl.sum(J * r[None, :], 1)
        rr_lanes += r * r
    rr = tl.sum(rr_lanes, 0)
    store_sums(g_ptr, p_ptr, rr_ptr, split * B + b, m, i, i, G, p, rr, True, True)


def forward_tile(m: int, channels: int, dtype: torch.dtype, precision: str) -> Tile:
    """For m tangents of that many channels: the rows, m * positions, stay within the registers.

    Args:
        m: tangents.
        channels: of T.
        dtype: of T.
        precision: of float32 products.
    """
    block_m = block_of(m)
    # Of other channels no row is as long as a wide load; float32 fills the registers earlier.
    half = dtype.itemsize == 2
    tile_y, tile_x = {16: (4, 4), 32: (2, 4), 64: (1, 2)}[block_m]
    block_c = 32 if half and channels % 32 == 0 else 16
    stages = 3 if half or precision == "tf32" else 1 if precision == "ieee" else 2
    # Without a bound the assembler spills a few bytes for the sake of two programs an SM.
    odd = channels % 4 > 0
    crowded = not half and (block_m > 16 or precision != "tf32" or odd)
    return Tile(
        *(block_m, tile_y, tile_x, block_c, 8, stages),
        programs=1 if crowded else 2,
        maxnreg=255 if crowded else None,
    )


def rescue_tile(block_m: int) -> Tile:
    """Small, as it is there to be compiled in every first step and to run in few."""
    return Tile(block_m, 1, 2, 16, 8, 1, 4, 255)


def empty_rows(T: Tensor) -> Tensor:
    """Room for Z of tangents T, ``[m, B, H, W, 16]``."""
    m, B, _, height, width = T.shape
    return torch.empty((m, B, height, width, COLUMNS), dtype=T.dtype, device=T.device)


def gram_tail_partials(
    T: Tensor,
    weight: Tensor,
    r: Tensor,
    *,
    a: Tensor | None = None,
    kind: str = "none",
    params: Sequence[float] = (),
    applied: bool = False,
    slope: Tensor | None = None,
    input_precision: str = "ieee",
    lost: Tensor | None = None,
    Z: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over parts of the image, in a fixed split, as `gram_project_partials` gives them.

    Args:
        T: ``[m, B, Ci, H, W]`` with m <= 64; copied only where T[i] is not channels-last.
        weight: ``[Ci, Co, 4, 4]`` of a transposed convolution with stride 2 and padding 1, Co <= 4.
        r: ``[B, Co, 2H, 2W]``; copied where it is not channels-last.
        a: ``[B, Ci, H, W]``, where the activation in front of the layer is taken; or, where that is
            told by its result, the result. None without one.
        kind: that activation, a key of `PARAMETERS`, or "none".
        params: its parameters.
        applied: whether T lies behind it already.
        slope: the derivative of the activation behind the layer, ``[B, Co, 2H, 2W]``, or None.
        input_precision: how float32 products of the layer are formed; the Gram's are "ieee".
        lost: bool ``[B]``; then the samples that it marks are summed in float64, by "ieee" products
            of the layer, and the results of all others stay uninitialised.
        Z: of `empty_rows`, filled for the backward; None where none is wanted.

    Returns:
        ``(G [S, B, m, m], p [S, B, m], rr [S, B])``, float64 with `lost` and else float32.

    Raises:
        TypeError: a tensor that is not float32, bfloat16 or float16; T not float32 with `lost`.
        ValueError: shapes that do not fit, or m or Co above the limit.
    """
    given = a, kind, params, applied, slope, input_precision
    T, a, weight, r, slope, constexprs = prepare(T, weight, r, *given)
    m, B, channels_in, height, width = T.shape
    if lost is not None and T.dtype != torch.float32:
        raise TypeError(f"T has dtype {T.dtype}: rounded tangents cannot be rescued in float64")
    if lost is not None and lost.shape != (B,):
        raise ValueError(
            f"lost {tuple(lost.shape)} does not fit: give a flag for each of {B} samples"
        )
    if applied:
        constexprs |= front_constexprs("none", ())
    if lost is None:
        tile = forward_tile(m, channels_in, T.dtype, constexprs["PRECISION"])
        weight = packed_weight(weight, T.dtype, constexprs["PRECISION"])
    else:
        tile = rescue_tile(block_of(m))
        constexprs["PRECISION"] = "ieee"
    splits = shares(tile.count(height, width), B, tile, device_limits(T))
    sums = empty_sums(splits, B, m, T.device, torch.float32 if lost is None else torch.float64)
    launch(
        *(_gram_tail_fwd_kernel, (B * splits,)),
        *(T, T if a is None else a, weight, r if slope is None else slope, r),
        *(r if lost is None else lost.contiguous().view(torch.uint8), T if Z is None else Z, *sums),
        *(B, m, splits, T.stride(0)),
        **constexprs,
        **_constexprs(tile, lost is not None, Z is not None),
        BY_L1=lost is None and _by_l1(T, tile),
        **tile.options,
    )
    return sums


def _by_l1(T: Tensor, tile: Tile) -> bool:
    """Whether T is copied by 8 bytes: positions begin at 16, and addresses fit the registers."""
    strides = T.data_ptr(), *(T.element_size() * n for n in (T.stride(0), T.shape[2]))
    return tile.block_m == 16 and all(n % 16 == 0 for n in strides)


def _constexprs(tile: Tile, rescue: bool, write: bool) -> dict:
    return {
        **{"BLOCK_M": tile.block_m, "TILE_Y": tile.tile_y, "TILE_X": tile.tile_x},
        **{"BLOCK_C": tile.block_c, "RESCUE": rescue, "WRITE": write},
    }


def configurations() -> Iterator[Configuration]:
    """Every compilation of the forward kernel, even and odd sizes, and of what packs its weight."""
    yield from packed_configurations()
    sums = ("g_ptr", "p_ptr", "rr_ptr")
    for label, m, channels, dtype, constexprs, applied, odd in variants():
        if applied:
            constexprs |= front_constexprs("none", ())
        types = {f"{name}_ptr": pointer(dtype) for name in ("t", "a", "w", "z")}
        types |= dict.fromkeys(("slope_ptr", "r_ptr", "lost_ptr", *sums), "*fp32")
        tile = forward_tile(m, channels, dtype, constexprs["PRECISION"])
        # Where no gradient is wanted, nothing is written.
        of_tile = _constexprs(tile, rescue=False, write=constexprs["KIND"] != "none" or applied)
        of_tile["BY_L1"] = not odd and tile.block_m == 16
        unaligned = ("t_ptr", "a_ptr", "stride_t_m") if odd else ()
        yield Configuration(
            *(_gram_tail_fwd_kernel, label, types, {**constexprs, **of_tile}),
            **tile.options,
            odd=unaligned,
        )
        if dtype == torch.float32 and constexprs["PRECISION"] == "ieee" and (applied or odd):
            tile = rescue_tile(block_of(m))
            types = types | dict.fromkeys(sums, "*fp64") | {"lost_ptr": "*u8"}
            of_tile = _constexprs(tile, rescue=True, write=False) | {"BY_L1": False}
            yield Configuration(
                *(_gram_tail_fwd_kernel, f"{label} rescue", types, {**constexprs, **of_tile}),
                **tile.options,
                odd=unaligned,
            )
