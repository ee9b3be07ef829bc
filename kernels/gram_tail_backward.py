"""The pullback of `gram_tail`: gradients of a last layer whose Jacobian was never written.

    dJ = M J + u r^T      dr = J^T u + 2 g_rr r      dZ = slope dJ      d slope = sum_i Z_i dJ_i
    dT_i = phi'(a) conv(dZ_i)      da = phi''(a) sum_i T_i conv(dZ_i)      dW = sum_i T'_i dZ_i

with M = dG + dG^T and u = dp, as in `gram_project`, and T' = phi'(a) T. Two launches: (a) Z again,
as in the forward, and dZ from it; (b) dT as an ordinary convolution with stride 2, K = 64: a window
of 4 x 4 gradients of up to 4 channels. The same windows give dW, one product of K = 64 columns a
block of positions, in partial sums that are added in a fixed order.

Floor, in bytes through device memory: (a) T and r once, dZ written once; (b) dZ and T read, dT
written. Against J at hand, (a) reads T instead of J and does the forward's FLOPs again: which is
faster is for a measurement to say.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._blocks import dot
from ._contract import PIECEWISE_LINEAR, empty_tangents
from ._launch import Configuration, cdiv, device_limits, pointer
from .activations import activation
from .gram_tail import (
    PRODUCTS,
    activation_variants,
    even_and_odd,
    launch_options,
    prepare,
    shares,
    tail_tile,
    tail_variants,
    tile_values,
)

# Input positions that a program of the second launch takes at a time.
_POSITIONS = 32


@triton.jit(do_not_specialize=["m", "tiles", "tiles_x", "channels_out"])
def _gram_tail_bwd_image_kernel(
    t_ptr,  # T [m, B, H, W, Ci]
    a_ptr,  # [B, H, W, Ci]; not read without KIND
    w_ptr,  # [Ci, Co, 4, 4]
    slope_ptr,  # [B, 2H, 2W, Co] float32; not read without SLOPED
    r_ptr,  # [B, 2H, 2W, Co] float32
    m_ptr,  # M [B, m, m]
    u_ptr,  # [B, m]
    g_rr_ptr,  # [B]
    dz_ptr,  # [m, B, 2H, 2W, Co]
    dr_ptr,  # [B, 2H, 2W, Co] float32
    d_slope_ptr,  # [B, 2H, 2W, Co] float32; not written without SLOPED
    m, height, width, channels_in, channels_out, tiles, tiles_x, stride_t_m, stride_dz_m,
    BLOCK_M: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BLOCK_C: tl.constexpr,
    KIND: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
    SLOPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    tile = pid % tiles
    b = (pid // tiles).to(tl.int64)
    i = tl.arange(0, BLOCK_M)
    Z, slope, r, at, present = tile_values(
        t_ptr, a_ptr, w_ptr, slope_ptr, r_ptr, b, tile, tiles_x,
        m, height, width, channels_in, channels_out, stride_t_m,
        BLOCK_M, TILE_Y, TILE_X, BLOCK_C, KIND, P0, P1, SLOPED, PRECISION,
    )  # fmt: skip
    J = Z
    if SLOPED:
        J = Z * slope[None, :]
    u = tl.load(u_ptr + b * m + i, mask=i < m, other=0.0)
    M = tl.load(
        m_ptr + b * m * m + (i[:, None] * m + i[None, :]),
        mask=(i < m)[:, None] & (i < m)[None, :],
        other=0.0,
    )
    dr = tl.sum(u[:, None] * J, 0) + 2.0 * tl.load(g_rr_ptr + b) * r
    tl.store(dr_ptr + at, dr, mask=present)
    dJ = tl.dot(M, J, u[:, None] * r[None, :], input_precision="ieee")
    if SLOPED:
        tl.store(d_slope_ptr + at, tl.sum(Z * dJ, 0), mask=present)
        dJ = dJ * slope[None, :]
    dz_ptrs = dz_ptr + i.to(tl.int64)[:, None] * stride_dz_m + at[None, :]
    tl.store(dz_ptrs, dJ, mask=(i < m)[:, None] & present[None, :])


@triton.jit(do_not_specialize=["m", "blocks", "splits", "channels_out"])
def _gram_tail_bwd_tangent_kernel(
    t_ptr,  # T [m, B * H * W, Ci]
    a_ptr,  # [B * H * W, Ci]; not read without KIND
    w_ptr,  # [Ci, Co, 4, 4]
    dz_ptr,  # [m, B, 2H, 2W, Co]
    dt_ptr,  # [m, B * H * W, Ci]
    da_ptr,  # [B * H * W, Ci]; not written without CURVED
    dw_ptr,  # [splits, Ci, 64] float32
    numel, m, height, width, channels_in, channels_out, blocks, splits,
    stride_t_m, stride_dz_m, stride_dt_m,
    POSITIONS: tl.constexpr, BLOCK_C: tl.constexpr,
    KIND: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
    CURVED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0)
    ci = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    # A window's axis: rows and columns of the kernel, then channels out, padded to four.
    k = tl.arange(0, 64)
    ky, kx, co = k // 16, k // 4 % 4, k % 4
    W = tl.load(
        w_ptr + (ci[None, :] * channels_out + co[:, None]) * 16 + (ky * 4 + kx)[:, None],
        mask=(ci < channels_in)[None, :] & (co < channels_out)[:, None],
        other=0.0,
    ).to(dz_ptr.dtype.element_ty)
    dW = tl.zeros([BLOCK_C, 64], tl.float32)
    for block in range(split, blocks, splits):
        at = tl.cast(block, tl.int64) * POSITIONS + tl.arange(0, POSITIONS)
        b = at // (height * width)
        Y = 2 * (at // width % height)[:, None] - 1 + ky[None, :]
        X = 2 * (at % width)[:, None] - 1 + kx[None, :]
        framed = (Y >= 0) & (Y < 2 * height) & (X >= 0) & (X < 2 * width)
        framed = framed & (at < numel)[:, None] & (co < channels_out)[None, :]
        at_z = ((b[:, None] * 2 * height + Y) * 2 * width + X) * channels_out + co[None, :]
        present = (at < numel)[:, None] & (ci < channels_in)[None, :]
        at_in = at[:, None] * channels_in + ci[None, :]
        if KIND != "none":
            a = tl.load(a_ptr + at_in, mask=present, other=0.0).to(tl.float32)
            _, d1, d2 = activation(a, KIND, P0, P1)
        bend = tl.zeros([POSITIONS, BLOCK_C], tl.float32)
        for i in range(0, m):
            tangent = tl.cast(i, tl.int64)
            dZ = tl.load(dz_ptr + tangent * stride_dz_m + at_z, mask=framed, other=0.0)
            T = tl.load(t_ptr + tangent * stride_t_m + at_in, mask=present, other=0.0)
            dT = dot(dZ, W, tl.zeros([POSITIONS, BLOCK_C], tl.float32), PRECISION)
            if CURVED:
                bend += T.to(tl.float32) * dT
            if KIND != "none":
                dT = dT * d1
                T = (T.to(tl.float32) * d1).to(T.dtype)
            tl.store(dt_ptr + tangent * stride_dt_m + at_in, dT, mask=present)
            dW = dot(tl.trans(T), dZ, dW, PRECISION)
        if CURVED:
            tl.store(da_ptr + at_in, d2 * bend, mask=present)
    dw_ptrs = dw_ptr + (split * channels_in + ci[:, None]) * 64 + k[None, :]
    tl.store(dw_ptrs, dW, mask=(ci < channels_in)[:, None])


def _block_c(channels_in: int) -> int:
    return min(32, max(16, triton.next_power_of_2(channels_in)))


def _tangent_options(block_c: int, dtype: torch.dtype) -> dict:
    num_warps = 4 if block_c == 16 and dtype == torch.float32 else 8
    # Here four warps spill without a bound as well, on sm_80.
    return launch_options(num_warps) | {"maxnreg": 255}


def _tangent_precision(input_precision: str) -> str:
    # Both parts of both operands of three TF32 products do not fit into registers.
    return "ieee" if input_precision == "tf32x3" else input_precision


def gram_tail_bwd(
    T: Tensor,
    weight: Tensor,
    r: Tensor,
    M: Tensor,
    u: Tensor,
    g_rr: Tensor,
    *,
    a: Tensor | None = None,
    kind: str = "none",
    params: Sequence[float] = (),
    slope: Tensor | None = None,
    input_precision: str = "ieee",
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Pull cotangents of G, p and rr back.

    Args:
        T: as in the forward.
        weight: as in the forward.
        r: as in the forward.
        M: dG + dG^T, ``[B, m, m]``.
        u: dp, ``[B, m]``.
        g_rr: d rr, ``[B]``.
        a: as in the forward.
        kind: as in the forward.
        params: as in the forward.
        slope: as in the forward.
        input_precision: as in the forward; "tf32x3" holds for the first launch alone, the second
            is "ieee".
        out: where dT goes, each dT[i] in channels-last order; None for new memory.

    Returns:
        ``(dT, d weight, dr, da, d slope)`` with the inputs' shapes: dT in T's dtype, the others
        float32; da, what curvature adds, None where phi'' = 0; d slope None without a slope.

    Raises:
        TypeError, ValueError: as `gram_tail_partials`.
    """
    T, weight, r, a, slope, constexprs = prepare(T, weight, r, a, kind, params, slope)
    M, u, g_rr = (t.to(torch.float32).contiguous() for t in (M, u, g_rr))
    m, B, channels_in, height, width = T.shape
    channels_out = weight.shape[1]
    tile = tail_tile(m, channels_in, T.dtype, backward=True)
    tiles, tiles_x = tile.count(height, width)
    dr, d_slope = torch.empty_like(r), None if slope is None else torch.empty_like(r)
    dZ, dT = empty_tangents(r, T), empty_tangents(T[0], T) if out is None else out
    curved = kind not in ("none", *PIECEWISE_LINEAR)
    da = None
    if curved:
        da = torch.empty_like(T[0], dtype=torch.float32, memory_format=torch.channels_last)
    numel, block_c = B * height * width, _block_c(channels_in)
    blocks, c_blocks = cdiv(numel, _POSITIONS), cdiv(channels_in, block_c)
    splits = shares(blocks, c_blocks, device_limits(T))
    dW = torch.empty((splits, channels_in, 64), dtype=torch.float32, device=T.device)
    with torch.cuda.device_of(T):
        _gram_tail_bwd_image_kernel[(B * tiles,)](
            *(T, T if a is None else a, weight, r if slope is None else slope, r, M, u, g_rr),
            *(dZ, dr, dr if d_slope is None else d_slope),
            *(m, height, width, channels_in, channels_out, tiles, tiles_x),
            *(T.stride(0), dZ.stride(0)),
            **constexprs,
            **tile.constexprs,
            SLOPED=slope is not None,
            PRECISION=input_precision,
            **launch_options(tile.num_warps),
        )
        _gram_tail_bwd_tangent_kernel[(splits, c_blocks)](
            *(T, T if a is None else a, weight, dZ, dT, dT if da is None else da, dW),
            *(numel, m, height, width, channels_in, channels_out, blocks, splits),
            *(T.stride(0), dZ.stride(0), dT.stride(0)),
            **constexprs,
            POSITIONS=_POSITIONS,
            BLOCK_C=block_c,
            CURVED=curved,
            PRECISION=_tangent_precision(input_precision),
            **_tangent_options(block_c, T.dtype),
        )
    taps = dW.sum(0).view(channels_in, 4, 4, 4)[..., :channels_out]
    return dT, taps.permute(0, 3, 1, 2).contiguous(), dr, da, d_slope


def configurations() -> Iterator[Configuration]:
    """Every compilation of the two kernels, even and odd sizes."""
    for label, dtype, constexprs, tile in tail_variants(backward=True):
        types = {f"{name}_ptr": pointer(dtype) for name in ("t", "a", "dz")}
        names = "w slope r m u g_rr dr d_slope".split()
        types |= {f"{name}_ptr": "*fp32" for name in names}
        yield from even_and_odd(
            Configuration(
                *(_gram_tail_bwd_image_kernel, label, types, constexprs),
                **launch_options(tile.num_warps),
            )
        )
    of_tangents = [(d, p) for d, p in PRODUCTS if p == _tangent_precision(p)]
    for block_c, (dtype, precision) in product((16, 32), of_tangents):
        for name, constexprs in activation_variants():
            kind = constexprs["KIND"]
            exact = "" if dtype != torch.float32 else f" {precision}"
            types = {f"{n}_ptr": pointer(dtype) for n in ("t", "a", "dz", "dt")}
            types |= {f"{n}_ptr": "*fp32" for n in ("w", "da", "dw")}
            options = {
                **{n: constexprs[n] for n in ("KIND", "P0", "P1")},
                **{"POSITIONS": _POSITIONS, "BLOCK_C": block_c, "PRECISION": precision},
                "CURVED": kind not in ("none", *PIECEWISE_LINEAR),
            }
            label = f"Ci={block_c} {pointer(dtype)[1:]}{exact} {name}"
            launch = _tangent_options(block_c, dtype)
            yield from even_and_odd(
                Configuration(*(_gram_tail_bwd_tangent_kernel, label, types, options), **launch)
            )
