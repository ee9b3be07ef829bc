"""A decoder's last transposed convolution together with the Gram of its Jacobian.

The layer (kernel 4, stride 2, padding 1, at most 4 channels out) takes tangents T [m, B, H, W, C]
through the derivative of the activation in front of it (unless the stack lies behind that already),
its weight, and the slope of the activation behind it:

    Z_i = conv_transpose(phi'(a) T_i)      J_i = slope Z_i      G = J J^T   p = J r   rr = r^T r

Outputs are taken by cells of four, (2y - 1 + q, 2x - 1 + q'), which four inputs make: two products
[m * cells, 2 C] x [2 C, 16], of the inputs on the left and on the right, whose columns are the four
outputs times up to four channels (`_gram_tail_cells`). A program holds all m tangents of a few
cells at a time and walks along a row of them. The backward wants Z: it is written as it lies in the
registers, [m, B, H, W, 16] in T's dtype, a row of 16 a cell, and not at all where no gradient is
wanted. Cell row H is stored as what row 0 has no use for, so that there are no more rows than
inputs. G, p and rr come from the float32 Z. Where its operands were rounded, tensor cores form G of
three bfloat16 parts of Z, as exactly as float32 would: of 16 tangents each warp multiplies the
cells that it has made, which never leave its registers.

Floor, celeba16's last layer (m = 16, B = 64, 32 -> 3 channels from 32 x 32) in bfloat16: T is 67,
Z 34 and r 3 MB, so 104 MB through device memory, 70 without Z. 4.4 GFLOP for Z on tensor cores, and
0.5 for the Gram, four times in parts.

Counted there, a warp of 4 and 4 cells of 16 tangents, instructions of the loop:

                bfloat16               registers, KiB     TF32                  registers, KiB
    sm_86, 89   277 (24 HMMA)          126, 22            410 (40 HMMA)         128, 44
    sm_90       324 (8 HGMMA, 8 HMMA)  80, 54             437 (16 HGMMA, 8)     110, 108
    sm_120      259 (24 HMMA)          120, 22            418 (40 HMMA)         120, 44

With bfloat16 four programs share an SM, with TF32 two. T is copied 8 bytes at a time, through L1,
where a cell finds what its neighbour has read; Z is stored 16 bytes at a time. Device memory bounds
it on every card, computed: on an H100 32 us (64 with TF32), where issuing its instructions takes 26
(35), on a 4090 108 (212) and 15 (23). Not measured on a GPU yet.

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

from ._blocks import add_gram_float64, rounded, store_sums
from ._gram_tail_cells import add_gram_in_parts, add_side, place, side_weight
from ._gram_tail_tile import (
    COLUMNS,
    Tile,
    block_of,
    prepare,
    shares,
    tuned_tile,
    variants,
)
from ._implicit_gemm import within
from ._launch import (
    Configuration,
    DeviceLimits,
    begin,
    device_limits,
    empty_sums,
    launch,
    pointer,
)
from ._tiles import tunes
from .activations import front_constexprs


@triton.jit(do_not_specialize=["B", "m", "splits"])
def _gram_tail_fwd_kernel(
    t_ptr,  # T [m, B, H, W, C]
    a_ptr,  # [B, H, W, C]; not read where KIND is "none"
    w_ptr,  # [C, CO, 4, 4]
    slope_ptr,  # [B, 2H, 2W, CO] float32; not read without SLOPED
    r_ptr,  # [B, 2H, 2W, CO] float32
    lost_ptr,  # [B], uint8; not read without RESCUE
    z_ptr,  # Z [m, B, H, W, 16]; not written without WRITE
    g_ptr,  # [splits, B, m, m], float64 in a RESCUE and else float32
    p_ptr,  # [splits, B, m], likewise
    rr_ptr,  # [splits, B], likewise
    B, m, splits, stride_t_m,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, CO: tl.constexpr, LAST: tl.constexpr,
    BLOCK_M: tl.constexpr, CELLS: tl.constexpr, BLOCK_C: tl.constexpr,
    KIND: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
    SLOPED: tl.constexpr, PRECISION: tl.constexpr, ROUND_T: tl.constexpr,
    RESCUE: tl.constexpr, WRITE: tl.constexpr,
    IN_PARTS: tl.constexpr, GROUPS: tl.constexpr, BY_L1: tl.constexpr,
):  # fmt: skip
    begin()
    pid = tl.program_id(0)
    split = pid % splits
    b = (pid // splits).to(tl.int64)
    if RESCUE:
        if tl.load(lost_ptr + b) == 0:
            return
    dtype: tl.constexpr = tl.float64 if RESCUE else tl.float32
    element: tl.constexpr = t_ptr.dtype.element_ty
    ALL: tl.constexpr = (H + 1) * W
    TILES: tl.constexpr = (ALL + CELLS - 1) // CELLS
    ROWS: tl.constexpr = BLOCK_M * CELLS
    row = tl.arange(0, ROWS)
    i, column, k = tl.arange(0, BLOCK_M), tl.arange(0, 16), tl.arange(0, 2 * BLOCK_C)
    # Rows beyond m read what the last one does, and nobody reads them: they need no mask.
    slot = (row % BLOCK_M).to(tl.int64)
    at_slot = tl.minimum(slot, m - 1) * stride_t_m + b * (H * W * C)
    at_k = (k // BLOCK_C - 1) * (W * C) + k % BLOCK_C
    t_ptrs = t_ptr + (at_slot[:, None] + at_k[None, :])
    z_ptrs = z_ptr + ((slot * B + b) * (H * W * 16))[:, None] + column[None, :]
    a_ptr += b * (H * W * C)
    r_ptr += b * (4 * H * W * CO)
    slope_ptr += b * (4 * H * W * CO)
    if C <= BLOCK_C:
        w_l = side_weight(w_ptr, 0, False, C, CO, LAST, BLOCK_C, PRECISION, element)
        w_r = side_weight(w_ptr, 0, True, C, CO, LAST, BLOCK_C, PRECISION, element)
    G = tl.zeros([GROUPS, BLOCK_M, BLOCK_M] if GROUPS > 1 else [BLOCK_M, BLOCK_M], dtype)
    half = tl.zeros(G.shape, dtype)
    p_lanes = tl.zeros([CELLS, BLOCK_M, 16], dtype)
    rr_lanes = tl.zeros([CELLS, 16], dtype)
    q_y, q_x = (column // 8)[None, :], (column // 4 % 2)[None, :]
    # Neighbours one after another: what two of them read is at hand in L1.
    share = (TILES + splits - 1) // splits
    for tile in range(split * share, tl.minimum(split * share + share, TILES)):
        cell = tile * CELLS
        y, x = place((cell + tl.arange(0, CELLS))[:, None], W)
        out_y, out_x = 2 * y - 1 + q_y, 2 * x - 1 + q_x
        present = within(out_y, 2 * H)
        at = (out_y * (2 * W) + tl.where(out_x < 0, 2 * W - 1, out_x)) * CO + (column % 4)[None, :]
        has = present & (column % 4 < CO)[None, :]
        r = tl.load(r_ptr + at, mask=has, other=0.0)
        left, right = tl.zeros([ROWS, 16], tl.float32), tl.zeros([ROWS, 16], tl.float32)
        if C <= BLOCK_C:
            left = add_side(
                left, t_ptrs, a_ptr, w_l, cell, 0, False, H, W, C, BLOCK_M, CELLS, BLOCK_C,
                KIND, P0, P1, PRECISION, ROUND_T, BY_L1,
            )  # fmt: skip
            right = add_side(
                right, t_ptrs, a_ptr, w_r, cell, 0, True, H, W, C, BLOCK_M, CELLS, BLOCK_C,
                KIND, P0, P1, PRECISION, ROUND_T, BY_L1,
            )  # fmt: skip
        else:
            for first in range(0, C, BLOCK_C):
                w_l = side_weight(w_ptr, first, False, C, CO, LAST, BLOCK_C, PRECISION, element)
                w_r = side_weight(w_ptr, first, True, C, CO, LAST, BLOCK_C, PRECISION, element)
                left = add_side(
                    left, t_ptrs + first, a_ptr, w_l, cell, first, False, H, W, C, BLOCK_M, CELLS,
                    BLOCK_C, KIND, P0, P1, PRECISION, ROUND_T, BY_L1,
                )  # fmt: skip
                right = add_side(
                    right, t_ptrs + first, a_ptr, w_r, cell, first, True, H, W, C, BLOCK_M, CELLS,
                    BLOCK_C, KIND, P0, P1, PRECISION, ROUND_T, BY_L1,
                )  # fmt: skip
        # In column 0 the sides share nothing; outputs beyond the image have inputs within.
        of_left, of_right = present & ((x > 0) | (q_x == 0)), present & ((x > 0) | (q_x == 1))
        J = tl.where(of_left[:, None, :], tl.reshape(left, [CELLS, BLOCK_M, 16]), 0.0)
        J += tl.where(of_right[:, None, :], tl.reshape(right, [CELLS, BLOCK_M, 16]), 0.0)
        if WRITE:
            Z = rounded(tl.reshape(J, [ROWS, 16]), PRECISION).to(z_ptr.dtype.element_ty)
            n = cell + row // BLOCK_M
            live = (row % BLOCK_M < m)[:, None] & within(
                2 * place(n, W)[0][:, None] - 1 + q_y, 2 * H
            )
            at_z = tl.where(n < H * W, n, n - H * W) * 16
            tl.store(z_ptrs + at_z[:, None], Z, mask=tl.max_constancy(live, [1, 8]))
        if SLOPED:
            J = J * tl.load(slope_ptr + at, mask=has, other=0.0)[:, None, :]
        J, r = J.to(dtype), r.to(dtype)
        p_lanes += J * r[:, None, :]
        rr_lanes += r * r
        if GROUPS > 1:
            # Each warp adds up what it has made.
            J = tl.permute(tl.reshape(J, [CELLS // GROUPS, GROUPS, BLOCK_M, 16]), [1, 2, 0, 3])
            J = tl.reshape(J, [GROUPS, BLOCK_M, CELLS // GROUPS * 16])
        else:
            J = tl.reshape(tl.permute(J, [1, 0, 2]), [BLOCK_M, CELLS * 16])
        if RESCUE:
            G = add_gram_float64(G, J, m)
        elif IN_PARTS:
            G, half = add_gram_in_parts(G, half, J)
        else:
            G = tl.dot(J, tl.trans(J), G, input_precision="ieee")
    if GROUPS > 1:
        G, half = tl.sum(G, 0), tl.sum(half, 0)
    if IN_PARTS:
        G += half + tl.trans(half)
    p = tl.sum(tl.sum(p_lanes, 2), 0)
    rr = tl.sum(tl.sum(rr_lanes, 1), 0)
    store_sums(g_ptr, p_ptr, rr_ptr, split * B + b, m, i, i, G, p, rr, True, True)


def forward_tile(
    m: int, channels: int, dtype: torch.dtype, precision: str, plain: bool, limits: DeviceLimits
) -> Tile:
    """For m tangents of that many channels: 64 rows, which fill one tensor-core tile a warp.

    Args:
        m: tangents.
        channels: of T.
        dtype: of T.
        precision: of float32 products.
        plain: whether T is multiplied as it is.
        limits: of the device.
    """
    block_m, half, odd = block_of(m), dtype.itemsize == 2, channels % 4 > 0
    parts = half or precision == "tf32"
    simple = parts and plain and not odd
    wide = channels % 32 == 0 and simple
    narrow = not parts and (block_m == 64 or not plain)
    # Where there is room, two tiles are on their way while one is multiplied.
    roomy = limits.capability == 80 or limits.capability // 10 in (9, 10)
    return Tile(
        *(block_m, 1, 64 // block_m),
        block_c=8 if narrow else 32 if wide else 16,
        num_warps=4 if simple or half and plain else 8,
        num_stages=1 if not parts else 3 if roomy else 2,
        # With TF32 in two waves: 82 SMs share 320 programs more evenly than 128.
        programs=4 if parts and plain else 2,
        # Without a bound the assembler spills a few bytes for the sake of more programs an SM.
        maxnreg=None if simple and block_m < 64 else 255,
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
    rounded: bool = False,
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
        rounded: whether T was rounded to TF32 already, where it is multiplied so.
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
    given = a, kind, params, applied, rounded, slope, input_precision
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
    limits, aligned = device_limits(T), lost is None and _by_l1(T)
    if lost is None:
        tile = forward_tile(
            *(m, channels_in, T.dtype, constexprs["PRECISION"]),
            *(constexprs["KIND"] == "none", limits),
        )
        if tunes(limits):
            tile = tuned_tile(
                *("gram_tail_fwd", tile, m, T.dtype, constexprs, limits),
                **{"write": Z is not None, "aligned": aligned},
            )
    else:
        tile = rescue_tile(block_of(m))
        constexprs |= {"PRECISION": "ieee", "ROUND_T": "none"}
    splits = shares(tile.count(1, (height + 1) * width), B, tile, limits)
    sums = empty_sums(splits, B, m, T.device, torch.float32 if lost is None else torch.float64)
    launch(
        *(_gram_tail_fwd_kernel, (B * splits,)),
        *(T, T if a is None else a, weight, r if slope is None else slope, r),
        *(r if lost is None else lost.contiguous().view(torch.uint8), T if Z is None else Z, *sums),
        *(B, m, splits, T.stride(0)),
        **constexprs,
        **_constexprs(tile, T.dtype, constexprs["PRECISION"], lost is not None, Z is not None),
        BY_L1=aligned and tile.by_l1,
        **tile.options,
    )
    return sums


def _by_l1(T: Tensor) -> bool:
    """Whether T is copied by 8 bytes: positions begin at 16."""
    strides = T.data_ptr(), *(T.element_size() * n for n in (T.stride(0), T.shape[2]))
    return all(n % 16 == 0 for n in strides)


def _constexprs(tile: Tile, dtype: torch.dtype, precision: str, rescue: bool, write: bool) -> dict:
    # What J's operands were rounded to is less than its parts hold.
    in_parts = dtype.itemsize == 2 or precision == "tf32"
    return {
        **{"BLOCK_M": tile.block_m, "CELLS": tile.tile_x, "BLOCK_C": tile.block_c},
        **{"RESCUE": rescue, "WRITE": write, "IN_PARTS": in_parts},
        "GROUPS": tile.tile_x if in_parts and tile.block_m == 16 else 1,
    }


def configurations() -> Iterator[Configuration]:
    """Every compilation of the forward kernel, even and odd sizes, and of what packs its weight."""
    sums, limits = ("g_ptr", "p_ptr", "rr_ptr"), device_limits(torch.empty(0))
    for label, m, channels, dtype, constexprs, applied, odd in variants():
        if applied:
            constexprs |= front_constexprs("none", ())
        types = {f"{name}_ptr": pointer(dtype) for name in ("t", "a", "w", "z")}
        types |= dict.fromkeys(("slope_ptr", "r_ptr", "lost_ptr", *sums), "*fp32")
        tile = forward_tile(
            *(m, channels, dtype, constexprs["PRECISION"]),
            *(constexprs["KIND"] == "none", limits),
        )
        # Where no gradient is wanted, nothing is written.
        of_tile = _constexprs(
            *(tile, dtype, constexprs["PRECISION"]),
            rescue=False,
            write=constexprs["KIND"] != "none" or applied,
        )
        of_tile["BY_L1"] = not odd
        unaligned = ("t_ptr", "a_ptr", "stride_t_m") if odd else ()
        yield Configuration(
            *(_gram_tail_fwd_kernel, label, types, {**constexprs, **of_tile}),
            **tile.options,
            odd=unaligned,
        )
        if dtype == torch.float32 and constexprs["PRECISION"] == "ieee" and (applied or odd):
            tile = rescue_tile(block_of(m))
            types = types | dict.fromkeys(sums, "*fp64") | {"lost_ptr": "*u8"}
            of_tile = _constexprs(tile, dtype, "ieee", rescue=True, write=False) | {"BY_L1": False}
            yield Configuration(
                *(_gram_tail_fwd_kernel, f"{label} rescue", types, {**constexprs, **of_tile}),
                **tile.options,
                odd=unaligned,
            )
