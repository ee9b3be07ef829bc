"""A decoder's last transposed convolution together with the Gram of its Jacobian, J never written.

The layer (kernel 4, stride 2, padding 1, at most 4 channels out) takes tangents T [m, B, H, W, Ci]
through the derivative of the activation in front of it, its weight, and the slope of the activation
behind it:

    Z_i = conv_transpose(phi'(a) T_i)      J_i = slope Z_i      G = J J^T   p = J r   rr = r^T r

A program holds all m tangents of a tile of input positions. Output (2y + q, 2x + q') needs inputs
(y + d, x + d') with d in {-1, 0, 1}, at tap k = q + 1 - 2 d: so the tile's outputs are nine
products [m * positions, Ci] x [Ci, 16], whose columns are the four parities times up to four
channels. Taps that a parity lacks are zeros: 2.25 times the multiplications, in the width that
tensor cores have.

Floor, in bytes through device memory: T once (2.25 times from L2, for a 4 x 4 tile's border) and r.
What it saves is to write and read J, and a pass over T for phi'. FLOPs a sample: 72 m Ci 4 H W for
the layer, whatever Co is, and 2 m^2 n for the Gram.

A rescue of lost samples (`woodbury_float64`) makes their J again and sums in float64; where none is
lost it reads B flags.

The pullback is in `gram_tail_backward`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._blocks import add_gram_float64, dot, store_sums
from ._contract import GRAM_TAIL_MAX_CHANNELS, GRAM_TAIL_MAX_M, tangents_like
from ._launch import (
    Configuration,
    DeviceLimits,
    cdiv,
    check_dtypes,
    device_limits,
    empty_sums,
    pointer,
)
from .activations import activation, activation_constexprs, front_constexprs


@triton.jit
def _tile_rows(
    t_ptr, a_ptr, w_ptr, b, y, x, m, height, width, channels_in, channels_out, stride_t_m,
    BLOCK_M: tl.constexpr, POSITIONS: tl.constexpr, BLOCK_C: tl.constexpr,
    KIND: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Z [BLOCK_M, POSITIONS * 16] of the input positions (y, x) of sample b."""
    i = tl.arange(0, BLOCK_M)
    column = tl.arange(0, 16)
    co = column % 4
    Z = tl.zeros([BLOCK_M * POSITIONS, 16], tl.float32)
    for tap in range(0, 9):
        down, right = tap // 3 - 1, tap % 3 - 1
        ky = column // 8 + 1 - 2 * down
        kx = column // 4 % 2 + 1 - 2 * right
        has_tap = (ky >= 0) & (ky < 4) & (kx >= 0) & (kx < 4) & (co < channels_out)
        inside = (y + down >= 0) & (y + down < height) & (x + right >= 0) & (x + right < width)
        at = (b * height + y + down) * width + x + right
        for start in range(0, channels_in, BLOCK_C):
            ci = start + tl.arange(0, BLOCK_C)
            present = inside[:, None] & (ci < channels_in)[None, :]
            at_in = at[:, None] * channels_in + ci[None, :]
            T = tl.load(
                t_ptr + i.to(tl.int64)[:, None, None] * stride_t_m + at_in[None, :, :],
                mask=(i < m)[:, None, None] & present[None, :, :],
                other=0.0,
            )
            if KIND != "none":
                a = tl.load(a_ptr + at_in, mask=present, other=0.0).to(tl.float32)
                _, d1, _ = activation(a, KIND, P0, P1)
                T = (T.to(tl.float32) * d1[None, :, :]).to(T.dtype)
            W = tl.load(
                w_ptr + (ci[:, None] * channels_out + co[None, :]) * 16 + (ky * 4 + kx)[None, :],
                mask=(ci < channels_in)[:, None] & has_tap[None, :],
                other=0.0,
            ).to(T.dtype)
            Z = dot(tl.reshape(T, [BLOCK_M * POSITIONS, BLOCK_C]), W, Z, PRECISION)
    return tl.reshape(Z, [BLOCK_M, POSITIONS * 16])


@triton.jit
def tile_values(
    t_ptr, a_ptr, w_ptr, slope_ptr, r_ptr, b, tile, tiles_x,
    m, height, width, channels_in, channels_out, stride_t_m,
    BLOCK_M: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BLOCK_C: tl.constexpr,
    KIND: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
    SLOPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Z [BLOCK_M, N], slope and r [N] of a tile's N outputs of sample b; slope is r if not SLOPED.

    Behind them, where the outputs lie in an image [B, 2H, 2W, Co], and which exist.
    """
    POSITIONS: tl.constexpr = TILE_Y * TILE_X
    position = tl.arange(0, POSITIONS)
    y = tile // tiles_x * TILE_Y + position // TILE_X
    x = tile % tiles_x * TILE_X + position % TILE_X
    Z = _tile_rows(
        t_ptr, a_ptr, w_ptr, b, y, x, m, height, width, channels_in, channels_out, stride_t_m,
        BLOCK_M, POSITIONS, BLOCK_C, KIND, P0, P1, PRECISION,
    )  # fmt: skip
    column = tl.arange(0, 16)
    co = column % 4
    rows = (b * 2 * height + 2 * y[:, None] + column[None, :] // 8) * 2 * width
    at = (rows + 2 * x[:, None] + column[None, :] // 4 % 2) * channels_out + co[None, :]
    present = ((y < height) & (x < width))[:, None] & (co < channels_out)[None, :]
    at, present = tl.reshape(at, [POSITIONS * 16]), tl.reshape(present, [POSITIONS * 16])
    # Positions outside of the image have neighbours inside.
    Z = tl.where(present[None, :], Z, 0.0)
    r = tl.load(r_ptr + at, mask=present, other=0.0)
    slope = r
    if SLOPED:
        slope = tl.load(slope_ptr + at, mask=present, other=0.0)
    return Z, slope, r, at, present


@triton.jit(do_not_specialize=["B", "m", "splits", "tiles", "tiles_x", "channels_out"])
def _gram_tail_fwd_kernel(
    t_ptr,  # T [m, B, H, W, Ci]
    a_ptr,  # [B, H, W, Ci]; not read without KIND
    w_ptr,  # [Ci, Co, 4, 4]
    slope_ptr,  # [B, 2H, 2W, Co] float32; not read without SLOPED
    r_ptr,  # [B, 2H, 2W, Co] float32
    lost_ptr,  # [B], uint8; not read without RESCUE
    g_ptr,  # [splits, B, m, m], float64 in a RESCUE and else float32
    p_ptr,  # [splits, B, m], likewise
    rr_ptr,  # [splits, B], likewise
    B, m, height, width, channels_in, channels_out, splits, tiles, tiles_x, stride_t_m,
    BLOCK_M: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BLOCK_C: tl.constexpr,
    KIND: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
    SLOPED: tl.constexpr, PRECISION: tl.constexpr, RESCUE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    split = pid % splits
    b = (pid // splits).to(tl.int64)
    if RESCUE:
        if tl.load(lost_ptr + b) == 0:
            return
    dtype: tl.constexpr = tl.float64 if RESCUE else tl.float32
    i = tl.arange(0, BLOCK_M)
    G = tl.zeros([BLOCK_M, BLOCK_M], dtype)
    p = tl.zeros([BLOCK_M], dtype)
    rr_lanes = tl.zeros([TILE_Y * TILE_X * 16], dtype)
    for tile in range(split, tiles, splits):
        J, slope, r, _, _ = tile_values(
            t_ptr, a_ptr, w_ptr, slope_ptr, r_ptr, b, tile, tiles_x,
            m, height, width, channels_in, channels_out, stride_t_m,
            BLOCK_M, TILE_Y, TILE_X, BLOCK_C, KIND, P0, P1, SLOPED, PRECISION,
        )  # fmt: skip
        if SLOPED:
            J = J * slope[None, :]
        J, r = J.to(dtype), r.to(dtype)
        if RESCUE:
            G = add_gram_float64(G, J, m)
        else:
            G = tl.dot(J, tl.trans(J), G, input_precision="ieee")
        p += tl.sum(J * r[None, :], 1)
        rr_lanes += r * r
    rr = tl.sum(rr_lanes, 0)
    store_sums(g_ptr, p_ptr, rr_ptr, split * B + b, m, i, i, G, p, rr, True, True)


def launch_options(num_warps: int) -> dict:
    """What a launch is given besides its arguments.

    Without a bound of its own the assembler spills a few bytes in programs of 8 warps for the sake
    of more programs an SM.
    """
    maxnreg = 255 if num_warps == 8 else None
    return {"num_warps": num_warps, "num_stages": 1, "maxnreg": maxnreg}


@dataclass(frozen=True)
class Tile:
    """Input positions and channels of a program, and its warps."""

    block_m: int
    tile_y: int
    tile_x: int
    block_c: int
    num_warps: int

    def count(self, height: int, width: int) -> tuple[int, int]:
        """Tiles of an image, and tiles of one of its rows."""
        in_a_row = cdiv(width, self.tile_x)
        return cdiv(height, self.tile_y) * in_a_row, in_a_row

    @property
    def constexprs(self) -> dict:
        """Of the kernels that take a tile."""
        return {
            **{"BLOCK_M": self.block_m, "TILE_Y": self.tile_y, "TILE_X": self.tile_x},
            "BLOCK_C": self.block_c,
        }


def tail_tile(m: int, channels_in: int, dtype: torch.dtype, backward: bool = False) -> Tile:
    """For m tangents of that many channels: the rows, m * positions, stay within the registers."""
    block_m = max(16, triton.next_power_of_2(m))
    tile_y, tile_x = {16: (4, 4), 32: (2, 4), 64: (1, 2)}[block_m]
    halves = dtype.itemsize == 2
    wide = halves and channels_in > 16 and block_m < 64
    # The backward holds Z, J and dJ.
    num_warps = 4 if halves and block_m == 16 and not backward else 8
    return Tile(block_m, tile_y, tile_x, 32 if wide else 16, num_warps)


def _rescue_tile(block_m: int) -> Tile:
    """Small, as it is there to be compiled in every first step and to run in few."""
    return Tile(block_m, 1, 2, 16, 8)


def shares(parts: int, others: int, limits: DeviceLimits) -> int:
    """Programs that share `parts` pieces of work, about four an SM together with `others`."""
    return min(parts, max(1, 4 * limits.sm_count // others))


def _channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def gram_tail_partials(
    T: Tensor,
    weight: Tensor,
    r: Tensor,
    *,
    a: Tensor | None = None,
    kind: str = "none",
    params: Sequence[float] = (),
    slope: Tensor | None = None,
    input_precision: str = "ieee",
    lost: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over parts of the image, in a fixed split, as `gram_project_partials` gives them.

    Args:
        T: ``[m, B, Ci, H, W]`` with m <= 64; copied only where T[i] is not channels-last.
        weight: ``[Ci, Co, 4, 4]`` of a transposed convolution with stride 2 and padding 1, Co <= 4.
        r: ``[B, Co, 2H, 2W]``.
        a: ``[B, Ci, H, W]``, where the activation in front of the layer is taken; or, for ReLU, its
            result. None without one.
        kind: that activation, a key of `PARAMETERS`, or "none".
        params: its parameters.
        slope: the derivative of the activation behind the layer, ``[B, Co, 2H, 2W]``, or None.
        input_precision: how float32 products of the layer are formed; the Gram's are "ieee".
        lost: bool ``[B]``; then the samples that it marks are summed in float64, by "ieee" products
            of the layer, and the results of all others stay uninitialised.

    Returns:
        ``(G [S, B, m, m], p [S, B, m], rr [S, B])``, float64 with `lost` and else float32.

    Raises:
        TypeError: a tensor that is not float32, bfloat16 or float16; T not float32 with `lost`.
        ValueError: shapes that do not fit, or m or Co above the limit.
    """
    T, weight, r, a, slope, constexprs = prepare(T, weight, r, a, kind, params, slope)
    m, B, channels_in, height, width = T.shape
    if lost is not None and T.dtype != torch.float32:
        raise TypeError(f"T has dtype {T.dtype}: rounded tangents cannot be rescued in float64")
    if lost is not None and lost.shape != (B,):
        raise ValueError(
            f"lost {tuple(lost.shape)} does not fit: give a flag for each of {B} samples"
        )
    tile = tail_tile(m, channels_in, T.dtype)
    if lost is not None:
        tile = _rescue_tile(tile.block_m)
    tiles, tiles_x = tile.count(height, width)
    splits = shares(tiles, B, device_limits(T))
    sums = empty_sums(splits, B, m, T.device, torch.float32 if lost is None else torch.float64)
    with torch.cuda.device_of(T):
        _gram_tail_fwd_kernel[(B * splits,)](
            *(T, T if a is None else a, weight, r if slope is None else slope, r),
            *(r if lost is None else lost.contiguous().view(torch.uint8), *sums),
            *(B, m, height, width, channels_in, weight.shape[1], splits, tiles, tiles_x),
            T.stride(0),
            **constexprs,
            **tile.constexprs,
            SLOPED=slope is not None,
            PRECISION=input_precision if lost is None else "ieee",
            RESCUE=lost is not None,
            **launch_options(tile.num_warps),
        )
    return sums


def prepare(T, weight, r, a, kind, params, slope):
    """Dense tensors in the kernels' order, checked, and the activation's constexprs."""
    given = {"T": T, "weight": weight, "r": r, "a": a, "slope": slope}
    check_dtypes(**{name: t for name, t in given.items() if t is not None})
    m, B, channels_in, height, width = T.shape if T.dim() == 5 else (0,) * 5
    image = (B, weight.shape[1], 2 * height, 2 * width)
    fits = (
        1 <= m <= GRAM_TAIL_MAX_M
        and weight.shape == (channels_in, weight.shape[1], 4, 4)
        and weight.shape[1] <= GRAM_TAIL_MAX_CHANNELS
        and r.shape == image
        and (slope is None or slope.shape == image)
        and (a is None) == (kind == "none")
        and (a is None or a.shape == T.shape[1:])
    )
    if not fits:
        shapes = ", ".join(f"{n} {tuple(t.shape)}" for n, t in given.items() if t is not None)
        raise ValueError(
            f"{shapes}, kind={kind!r} do not fit: give T [m <= {GRAM_TAIL_MAX_M}, B, Ci, H, W], "
            f"weight [Ci, Co <= {GRAM_TAIL_MAX_CHANNELS}, 4, 4], r and slope [B, Co, 2H, 2W], and "
            "a [B, Ci, H, W] with a kind"
        )
    return (
        tangents_like(T, torch.channels_last),
        weight.contiguous(),
        _channels_last(r.to(torch.float32)),
        None if a is None else _channels_last(a),
        None if slope is None else _channels_last(slope.to(torch.float32)),
        front_constexprs(kind, params),
    )


# float16 differs from bfloat16 in the instruction's name alone.
PRODUCTS = (
    (torch.bfloat16, "ieee"),
    *((torch.float32, precision) for precision in ("tf32", "tf32x3", "ieee")),
)


def activation_variants() -> Iterator[tuple[str, dict]]:
    """Label and constexprs: the least in front and behind, and the most, stand for all others."""
    yield "none", {**front_constexprs("none", ()), "SLOPED": False}
    yield "relu", {**activation_constexprs("relu", ()), "SLOPED": False}
    yield "tanh sloped", {**activation_constexprs("tanh", ()), "SLOPED": True}


def tail_variants(backward: bool = False) -> Iterator[tuple[str, torch.dtype, dict, Tile]]:
    """Label, dtype, constexprs and tile of every compilation of a kernel that takes a tile."""
    for m, channels, (dtype, precision) in product((16, 32, 64), (16, 32), PRODUCTS):
        tile = tail_tile(m, channels, dtype, backward)
        if tile.block_c != channels:
            continue
        for name, constexprs in activation_variants():
            exact = "" if dtype != torch.float32 else f" {precision}"
            label = f"m={m} Ci={channels} {pointer(dtype)[1:]}{exact} {name}"
            yield label, dtype, {**constexprs, **tile.constexprs, "PRECISION": precision}, tile


def even_and_odd(configuration: Configuration) -> Iterator[Configuration]:
    """It, and for one activation the same where neither sizes nor a stack's slices are aligned."""
    yield configuration
    if "relu" not in configuration.label:
        return
    given = configuration.types.keys() | configuration.constexprs.keys()
    sizes = [
        p.name
        for p in configuration.kernel.params
        if p.name not in given and not p.do_not_specialize
    ]
    slices = [name for name in ("t_ptr", "a_ptr", "dt_ptr") if name in configuration.types]
    yield replace(configuration, label=f"{configuration.label} odd", odd=(*slices, *sizes))


def configurations() -> Iterator[Configuration]:
    """Every compilation of the forward kernel, even and odd sizes."""
    sums = ("g_ptr", "p_ptr", "rr_ptr")
    for label, dtype, constexprs, tile in tail_variants():
        types = {f"{name}_ptr": pointer(dtype) for name in ("t", "a")}
        types |= dict.fromkeys(("w_ptr", "slope_ptr", "r_ptr", "lost_ptr", *sums), "*fp32")
        given = label, types, {**constexprs, "RESCUE": False}
        options = launch_options(tile.num_warps)
        yield from even_and_odd(Configuration(_gram_tail_fwd_kernel, *given, **options))
        if dtype == torch.float32 and constexprs["PRECISION"] == "ieee":
            tile = _rescue_tile(tile.block_m)
            types = types | dict.fromkeys(sums, "*fp64") | {"lost_ptr": "*u8"}
            constexprs = {**constexprs, **tile.constexprs, "RESCUE": True}
            given = f"{label} rescue", types, constexprs
            options = launch_options(tile.num_warps)
            yield from even_and_odd(Configuration(_gram_tail_fwd_kernel, *given, **options))
