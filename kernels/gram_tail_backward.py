"""The pullback of `gram_tail`, from the Z that its forward has written; dJ never is.

    dJ = M J + u r^T      dr = J^T u + 2 g_rr r      dZ = slope dJ      d slope = sum_i Z_i dJ_i
    dT_i = phi'(a) conv(dZ_i)      da = phi''(a) sum_i T_i conv(dZ_i)      dW = sum_i T'_i dZ_i

with M = dG + dG^T and u = dp, as in `gram_project`, and T' = phi'(a) T, or T itself where the stack
lies behind the activation. One launch: dT is an ordinary convolution with stride 2, so a position
reads a window of 4 x 4 outputs of up to 4 channels, K = 64. A program holds all tangents of a few
positions' windows, where M J + u r^T is a product from the left; dJ is made there, four times over,
for a product that is small beside reading it. Those windows give dW as well, one product of 64
columns, in partial sums, as `_stack_sums` has them; and dr, as a position's own four outputs
lie in its window. It is stored twice: its negative in the stack's dtype, for the layer's values
and rounded to TF32 where products read it so, and itself where the data's gradient is wanted. M
enters as two numbers of the products' dtype, so that Z alone is rounded.

Floor, celeba16's last layer (m = 16, B = 64, 32 -> 3 channels from 32 x 32) in bfloat16: T and dT
are 67 MB each, Z 34, all else 12: 180 MB through device memory. 5.4 GFLOP for each of dT and dW.

Counted there, a warp of 4 and 2 positions: 356 instructions on sm_86 and sm_89, 325 on sm_90, 331
on sm_120 (24 HMMA); with TF32 495, 487 and 519 (48 HMMA). Windows are copied 8 bytes at a time, T
loaded and dT stored 16. -dr takes one store of 2 bytes a thread (4 with TF32): the 24 numbers of 2
positions are one instruction of each warp as they are, and wider ones would want them handed over
first. 128 registers and 14 KiB: four programs an SM (191 and 26 KiB with TF32: two). So 48 M warp
instructions (44 on sm_90), a fifth of the time that a 4090 takes for the bytes, and 0.9 of what an
H100 takes for them. Not measured on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._blocks import as_mask, dot, readied, rounded
from ._contract import empty_tangents
from ._gram_tail_tile import (
    CASES,
    COLUMNS,
    Tile,
    at_weight,
    backward_tile,
    block_of,
    prepare,
    shares,
    tuned_tile,
    variants,
)
from ._launch import (
    INTERPRET,
    NEWER,
    Configuration,
    begin,
    cdiv,
    device_limits,
    launch,
    pointer,
)
from ._stack_sums import Room, Rooms, room_of_width
from ._stack_tile import is_curved
from ._tiles import tunes
from .activations import activation


@triton.jit
def _mixed(M, Z, PRECISION: tl.constexpr):
    """M Z [BLOCK_M, N] for a symmetric float32 M, as exact as float32 but for Z's rounding."""
    zero = tl.zeros(Z.shape, tl.float32)
    if NEWER and Z.dtype == tl.float32 and PRECISION == "ieee" and M.shape[0] == 64:
        # Z first, and M = M^T: Triton 3.9 has a barrier in front of the read of Z, which is stored
        # last, and what is read before that, 256 numbers of M a thread, would be spilled.
        return tl.trans(tl.dot(tl.trans(Z), M, tl.trans(zero), input_precision=PRECISION))
    elif INTERPRET:
        return tl.dot(M, Z.to(tl.float32), zero, input_precision="ieee")
    elif Z.dtype == tl.float32 and PRECISION != "tf32":
        return tl.dot(M, Z, zero, input_precision=PRECISION)
    elif Z.dtype == tl.bfloat16:
        high = M.to(tl.bfloat16)
        low = (M - high.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(low, Z, tl.dot(high, Z, zero))
    else:
        # TF32 holds every number of these dtypes; M may pass the range of half precision.
        high, Z = rounded(M, "tf32"), Z.to(tl.float32)
        MZ = tl.dot(high, Z, zero, input_precision="tf32")
        return tl.dot(M - high, Z, MZ, input_precision="tf32")


@triton.jit(do_not_specialize=["B", "m", "splits", "filled"])
def _gram_tail_bwd_kernel(
    t_ptr,  # T [m, B, H, W, C]
    a_ptr,  # [B, H, W, C]; not read where KIND is "none"
    z_ptr,  # Z [m, B, H, W, 16], by cells
    w_ptr,  # [C, CO, 4, 4] float32
    slope_ptr,  # [B, 2H, 2W, CO] float32; not read without SLOPED
    r_ptr,  # [B, 2H, 2W, CO] float32
    m_ptr,  # M [B, m, m]
    u_ptr,  # [B, m]
    g_rr_ptr,  # [B]
    dt_ptr,  # [m, B, H, W, C]
    da_ptr,  # [B, H, W, C] float32; not written without CURVED
    dw_ptr,  # [programs along axis 0, C, 16, CO] float32; added to where `filled`
    dr_ptr,  # [B, 2H, 2W, CO] float32; not written without DATA
    dv_ptr,  # -dr [B, 2H, 2W, CO], in a dtype of its own
    d_slope_ptr,  # [B, 2H, 2W, CO] float32; not written without SLOPED
    B, m, splits, stride_t_m, stride_dt_m, filled,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, CO: tl.constexpr, LAST: tl.constexpr,
    BLOCK_M: tl.constexpr, POSITIONS: tl.constexpr, BLOCK_C: tl.constexpr,
    KIND: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
    APPLIED: tl.constexpr, CURVED: tl.constexpr, SLOPED: tl.constexpr, DATA: tl.constexpr,
    ROUND: tl.constexpr,
    PRECISION: tl.constexpr, ROUND_T: tl.constexpr, ROUND_DT: tl.constexpr,
):  # fmt: skip
    begin()
    pid = tl.program_id(0)
    split = pid % splits
    b = (pid // splits).to(tl.int64)
    ROWS: tl.constexpr = BLOCK_M * POSITIONS
    BLOCKS: tl.constexpr = (H * W + POSITIONS - 1) // POSITIONS
    i = tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    # A window's axis: rows and columns of the kernel, then channels out, padded to four.
    k = tl.arange(0, 64)
    at_w = at_weight(c[None, :], (k % 4)[:, None], (k // 4)[:, None], CO, LAST)
    has_w = (c < C)[None, :] & (k % 4 < CO)[:, None]
    w = tl.load(w_ptr + at_w, mask=has_w, other=0.0).to(tl.float32)
    w = rounded(w, PRECISION).to(z_ptr.dtype.element_ty)
    M = tl.load(
        m_ptr + b * m * m + (i[:, None] * m + i[None, :]),
        mask=(i < m)[:, None] & (i < m)[None, :],
        other=0.0,
    )
    u = tl.load(u_ptr + b * m + i, mask=i < m, other=0.0)
    g_rr = tl.load(g_rr_ptr + b)

    row = tl.arange(0, ROWS)
    slot = (row // POSITIONS).to(tl.int64)
    sample = b * (H * W * C)
    t_ptr, a_ptr, dt_ptr, da_ptr = t_ptr + sample, a_ptr + sample, dt_ptr + sample, da_ptr + sample
    at_t, at_dt = slot * stride_t_m, slot * stride_dt_m
    at_z = (i.to(tl.int64) * B + b) * (H * W * 16)
    # Columns of the windows: window row ky of output row 2y - 1 + ky is of position
    # y + (ky + 1) // 2 - 1, of parity (ky + 1) % 2.
    q = tl.arange(0, POSITIONS * 64)
    ky, kx, co = q // 16 % 4, q // 4 % 4, q % 4
    down, right = (ky + 1) // 2 - 1, (kx + 1) // 2 - 1
    own = (down == 0) & (right == 0) & as_mask(tl.program_id(1) == 0)
    image = b * (4 * H * W * CO)
    r_ptr, dr_ptr, dv_ptr = r_ptr + image, dr_ptr + image, dv_ptr + image
    slope_ptr, d_slope_ptr = slope_ptr + image, d_slope_ptr + image
    # Told otherwise than below, so that the loop does not keep it in registers.
    has_dw = (c < C)[:, None] & (k % 4 < CO)[None, :]
    in_dw = k // 4 * CO + k % 4
    if NEWER:
        # Which sees that both are the same; where this is read `filled` is 1.
        in_dw *= filled
    at_dw = c[:, None] * (16 * CO) + in_dw[None, :]
    dw_ptr += pid.to(tl.int64) * (C * 16 * CO)
    dW = tl.zeros([BLOCK_C, 64], tl.float32)
    if filled:
        dW = tl.load(dw_ptr + at_dw, mask=has_dw, other=0.0)
    # Neighbours one after another, whose windows overlap.
    share = (BLOCKS + splits - 1) // splits
    for block in range(split * share, tl.minimum(split * share + share, BLOCKS)):
        first = block * POSITIONS
        position = first + row % POSITIONS
        live = (row // POSITIONS < m) & (position < H * W)
        live = live[:, None] & (c < C)[None, :]
        in_t = position[:, None] * C + c[None, :]
        T = tl.load(t_ptr + at_t[:, None] + in_t, mask=live, other=0.0)
        at_q = first + q // 64
        y, x = at_q // W + down, at_q % W + right
        framed = (at_q < H * W) & (y >= 0) & (y < H) & (x >= 0) & (x < W)
        # The four channels of a sub-pixel lie behind one another.
        framed = tl.max_constancy(framed, [4])
        # Cell row H is row 0, as in `_gram_tail_cells`, and so are columns.
        of_y = (y + (ky + 1) % 2).to(tl.uint32, bitcast=True) % H
        of_x = (x + (kx + 1) % 2).to(tl.uint32, bitcast=True) % W
        cell = (of_y * W + of_x).to(tl.int32)
        in_z = cell * 16 + ky % 2 * 8 + kx % 2 * 4 + co
        in_z = tl.max_contiguous(tl.multiple_of(in_z, [4]), [4])
        Z = tl.load(
            z_ptr + at_z[:, None] + in_z[None, :],
            mask=(i < m)[:, None] & framed[None, :],
            other=0.0,
        )
        at_r = ((2 * y + (ky + 1) % 2) * (2 * W) + 2 * x + (kx + 1) % 2) * CO + co
        has_r = framed & (co < CO)
        r = tl.load(r_ptr + at_r, mask=has_r, other=0.0)
        of_r = tl.sum(u[:, None] * Z.to(tl.float32), 0)
        if SLOPED:
            slope = tl.load(slope_ptr + at_r, mask=has_r, other=0.0)
            of_r *= slope
        dr = of_r + 2.0 * g_rr * r
        if DATA:
            tl.store(dr_ptr + at_r, dr, mask=has_r & own)
        tl.store(dv_ptr + at_r, rounded(-dr, ROUND), mask=has_r & own)

        dJ = _mixed(M, Z, PRECISION)
        if SLOPED:
            dJ = slope[None, :] * dJ + u[:, None] * r[None, :]
            d_slope = tl.sum(Z.to(tl.float32) * dJ, 0)
            tl.store(d_slope_ptr + at_r, d_slope, mask=has_r & own)
            dJ *= slope[None, :]
        else:
            dJ += u[:, None] * r[None, :]
        dZ = tl.reshape(rounded(dJ, PRECISION).to(Z.dtype), [ROWS, 64])
        dT = dot(dZ, w, tl.zeros([ROWS, BLOCK_C], tl.float32), PRECISION)
        if APPLIED:
            # Of what has been applied the sign tells the slope.
            a = tl.load(a_ptr + in_t, mask=live, other=0.0)
            dT = tl.where(a.to(tl.float32) > 0.0, dT, dT * P0)
        elif KIND != "none":
            position = first + tl.arange(0, POSITIONS)
            at_a = position[:, None] * C + c[None, :]
            in_a = (position < H * W)[:, None] & (c < C)[None, :]
            a = tl.load(a_ptr + at_a, mask=in_a, other=0.0)
            _, d1, d2 = activation(a.to(tl.float32), KIND, P0, P1)
            full = tl.reshape(T, [BLOCK_M, POSITIONS, BLOCK_C]).to(tl.float32)
            dT = tl.reshape(dT, [BLOCK_M, POSITIONS, BLOCK_C])
            if CURVED:
                tl.store(da_ptr + at_a, d2 * tl.sum(full * dT, 0), mask=in_a)
            dT = tl.reshape(dT * d1[None, :, :], [ROWS, BLOCK_C])
            T = rounded(tl.reshape(full * d1[None, :, :], [ROWS, BLOCK_C]), ROUND_T).to(T.dtype)
        if APPLIED or KIND == "none":
            T = readied(T, ROUND_T)
        dT = rounded(dT, ROUND_DT).to(dt_ptr.dtype.element_ty)
        tl.store(dt_ptr + at_dt[:, None] + in_t, dT, mask=live)
        dW = dot(tl.trans(T), dZ, dW, PRECISION)
    at_dw = c[:, None] * (16 * CO) + ((k >> 2) * CO + (k & 3))[None, :]
    tl.store(dw_ptr + at_dw, dW, mask=(c < C)[:, None] & ((k & 3) < CO)[None, :])


def _precision(constexprs: dict, block_m: int, channels: int) -> dict:
    """How products of float32 are formed here, and what is rounded; all else as elsewhere."""
    # The parts of both operands of three products, and an address for each element of a row without
    # alignment, find no room in the registers beside M.
    three, odd = constexprs["PRECISION"] == "tf32x3", channels % 16 > 0
    crowded = {16: False, 32: three and odd, 64: three or odd}[block_m]
    own = {"PRECISION": "ieee", "ROUND_T": "none"} if crowded else {}
    # The layer in front multiplies dT as it would be here.
    return {"ROUND_DT": constexprs["PRECISION"], **own}


class Pulled(NamedTuple):
    """Gradients of a last layer.

    Attributes:
        T: ``[m, B, Ci, H, W]`` in T's dtype, in front of the activation.
        room: float32 ``[P, Ci * 16 * Co]``, whose sum is the weight's, of those and others behind.
        r: float32 ``[B, Co, 2H, 2W]``; None where it is not wanted.
        output: its negative, that of what r was subtracted from, in the dtype asked for.
        a: float32 ``[B, Ci, H, W]``, what curvature adds; None where phi'' = 0.
        slope: float32 ``[B, Co, 2H, 2W]``; None without one.
    """

    T: Tensor
    room: Room
    r: Tensor | None
    output: Tensor
    a: Tensor | None
    slope: Tensor | None


def gram_tail_bwd(
    T: Tensor,
    weight: Tensor,
    r: Tensor,
    Z: Tensor,
    M: Tensor,
    u: Tensor,
    g_rr: Tensor,
    *,
    a: Tensor | None = None,
    kind: str = "none",
    params: Sequence[float] = (),
    applied: bool = False,
    rounded: bool = False,
    slope: Tensor | None = None,
    input_precision: str = "ieee",
    out: Tensor | None = None,
    output_dtype: torch.dtype = torch.float32,
    output_product: str = "ieee",
    rooms: Rooms,
    spare: int = 0,
    of_data: bool = True,
) -> Pulled:
    """Pull cotangents of G, p and rr back.

    Args:
        T: as in the forward.
        weight: as in the forward.
        r: as in the forward.
        Z: as the forward has filled it.
        M: dG + dG^T, ``[B, m, m]``.
        u: dp, ``[B, m]``.
        g_rr: d rr, ``[B]``.
        a: as in the forward.
        kind: as in the forward.
        params: as in the forward.
        applied: as in the forward.
        rounded: as in the forward.
        slope: as in the forward.
        input_precision: as in the forward.
        out: where dT goes, each dT[i] in channels-last order; None for new memory.
        output_dtype: of the gradient of the layer's output.
        output_product: how its reader multiplies float32 numbers; in TF32 they are rounded to that.
        rooms: for parts of the weight's gradient, in channels-last order.
        spare: parts that others will leave behind those from here.
        of_data: whether the gradient of r itself is wanted.

    Raises:
        TypeError, ValueError: as `gram_tail_partials`.
    """
    given = a, kind, params, applied, rounded, slope, input_precision
    T, a, weight, r, slope, constexprs = prepare(T, weight, r, *given)
    M, u, g_rr = (t.to(torch.float32).contiguous() for t in (M, u, g_rr))
    m, B, channels_in, height, width = T.shape
    if Z.shape != (m, B, height, width, COLUMNS) or Z.dtype != T.dtype or not Z.is_contiguous():
        raise ValueError(
            f"Z {tuple(Z.shape)}, {Z.dtype} is not what the forward has filled for T "
            f"{tuple(T.shape)}, {T.dtype}: give it what `empty_rows` makes"
        )
    constexprs |= _precision(constexprs, block_of(m), channels_in)
    plain = (applied or kind == "none") and slope is None
    limits = device_limits(T)
    tile = backward_tile(m, channels_in, T.dtype, constexprs["PRECISION"], plain, limits)
    if tunes(limits):
        tile = tuned_tile(
            *("gram_tail_bwd", tile, m, T.dtype, constexprs, limits),
            **{"applied": applied, "of_data": of_data, "output": output_dtype},
        )
    dT = empty_tangents(T[0], T) if out is None else out
    dr, d_output = torch.empty_like(r) if of_data else None, torch.empty_like(r, dtype=output_dtype)
    d_slope = None if slope is None else torch.empty_like(r)
    da = None
    if is_curved(kind):
        da = torch.empty_like(T[0], dtype=torch.float32, memory_format=torch.channels_last)
    c_blocks = cdiv(channels_in, tile.block_c)
    splits = shares(tile.count(1, height * width), B * c_blocks, tile, limits)
    room = room_of_width(rooms, B * splits + spare, weight.numel())
    launch(
        *(_gram_tail_bwd_kernel, (B * splits, c_blocks)),
        *(T, T if a is None else a, Z, weight, r if slope is None else slope, r, M, u, g_rr),
        *(dT, r if da is None else da, room.parts[: B * splits]),
        *(r if dr is None else dr, d_output, r if d_slope is None else d_slope),
        *(B, m, splits, T.stride(0), dT.stride(0), int(room.filled)),
        **constexprs,
        **_constexprs(tile, kind, applied, of_data, output_product, output_dtype),
        **tile.options,
    )
    return Pulled(dT, room, dr, d_output, da, d_slope)


def _constexprs(
    tile: Tile, kind: str, applied: bool, of_data: bool, product: str, output_dtype: torch.dtype
) -> dict:
    rounds = output_dtype == torch.float32
    return {
        "ROUND": product if rounds else "none",
        **{"BLOCK_M": tile.block_m, "POSITIONS": tile.tile_x, "BLOCK_C": tile.block_c},
        **{"APPLIED": applied, "CURVED": is_curved(kind), "DATA": of_data},
    }


def configurations() -> Iterator[Configuration]:
    """Every compilation of the kernel, even and odd sizes."""
    limits = device_limits(torch.empty(0))
    names = "w slope r m u g_rr da dw dr d_slope".split()
    half = variants(CASES[:1], ((torch.float16, "ieee"),))
    for label, m, channels, dtype, constexprs, applied, odd in (*variants(), *half):
        types = {f"{name}_ptr": pointer(dtype) for name in ("t", "a", "z", "dt")}
        types |= dict.fromkeys([f"{name}_ptr" for name in names], "*fp32")
        types["dv_ptr"] = "*fp32" if constexprs["SLOPED"] else pointer(dtype)
        chosen = _precision(constexprs, block_of(m), channels)
        precision = constexprs["PRECISION"]
        constexprs |= chosen
        label += " by ieee" if precision != constexprs["PRECISION"] else ""
        plain = (applied or constexprs["KIND"] == "none") and not constexprs["SLOPED"]
        tile = backward_tile(m, channels, dtype, constexprs["PRECISION"], plain, limits)
        # As where a decoder is trained, and as where the data's gradient is wanted as well.
        output = torch.float32 if constexprs["SLOPED"] else dtype
        product = "ieee" if constexprs["SLOPED"] else constexprs["PRECISION"]
        of_tile = _constexprs(tile, constexprs["KIND"], applied, not applied, product, output)
        yield Configuration(
            *(_gram_tail_bwd_kernel, label, types),
            {**constexprs, **of_tile},
            **tile.options,
            odd=("t_ptr", "a_ptr", "dt_ptr", "stride_t_m", "stride_dt_m") if odd else (),
        )
