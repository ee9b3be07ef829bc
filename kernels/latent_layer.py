"""A linear layer of the latents together with the activation behind it, and the pullback of both.

    a = z W^T + b        stack_0 = phi(a)        stack_i = phi'(a) W[:, i]

z is [B, m], W [F, m]: the layer's tangents are the weight's columns, the same for all samples. So
the stack [1 + m, B, F] is written once and nothing as large is read. The pullback computes a anew:

    da = phi'(a) g_0 + phi''(a) sum_i W[:, i] g_i
    dW[:, i] = sum_b phi'(a) g_i + da z[b, i]        db = sum_b da        dz = da W

One launch leaves the sums of W and b in parts by rows of samples, that of z by columns; another
adds them up, in a fixed order. All in float32, whatever the parameters and the stack are.

Floor, celeba16's 16 -> 256 features with 64 samples: the stack once each way, 0.56 MB of bfloat16,
and 0.5 MFLOP a product, of which there are five in all: less than a launch takes. A warp issues 839
instructions forward, 861 backward and 150 for the sums (sm_90, ReLU, bfloat16; 32, 64 and 84
programs): one wave each, bound by latency.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._blocks import rounded
from ._contract import PARAMETERS, PIECEWISE_LINEAR
from ._launch import Configuration, begin, cdiv, check_dtypes, launch, pointer
from .activations import EXAMPLES, activation, activation_constexprs

# Features of a program, and its samples with the warps that share them: a thread has sixteen bytes
# of one slot of a stack forward, and eight or sixteen backward.
_WIDTH = 64
_FORWARD = {"ROWS": 8, "num_warps": 2}
_BACKWARD = {"ROWS": 4, "num_warps": 2}
# Latents at a time; no more fit the registers, but for few of them backward.
_SLOTS, _FEW = 8, 16
# Parts and elements of a program that adds them up.
_BLOCK = 64
_SUM = {"PARTS": 16, "BLOCK": _BLOCK, "num_warps": 4}


@triton.jit
def _weights(w_ptr, slot, column, M: tl.constexpr, F: tl.constexpr, W_F: tl.constexpr,
             W_M: tl.constexpr):  # fmt: skip
    """W^T [slot, column] in float32, 0 outside."""
    at = slot[:, None] * W_M + column[None, :] * W_F
    inside = (slot < M)[:, None] & (column < F)[None, :]
    return tl.load(w_ptr + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _latents(z_ptr, slot, row, B, M: tl.constexpr):
    """z^T [slot, row] in float32, 0 outside."""
    at = slot[:, None] + row[None, :] * M
    inside = (slot < M)[:, None] & (row < B)[None, :]
    return tl.load(z_ptr + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _argument(
    z_ptr, w_ptr, b_ptr, row, column, B, M: tl.constexpr, F: tl.constexpr, W_F: tl.constexpr,
    W_M: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """What phi is taken at [row, column], in float32."""
    a = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    if b_ptr is not None:
        a += tl.load(b_ptr + column, mask=column < F, other=0.0).to(tl.float32)[None, :]
    for first in range(0, M, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        z = _latents(z_ptr, slot, row, B, M)
        w = _weights(w_ptr, slot, column, M, F, W_F, W_M)
        a += tl.sum(z[:, :, None] * w[:, None, :], 0)
    return a


@triton.jit
def _place(B, F: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """A program's (samples, features, offsets in a slot, where those are inside)."""
    pid = tl.program_id(0)
    blocks: tl.constexpr = (F + WIDTH - 1) // WIDTH
    row = (pid // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = pid % blocks * WIDTH + tl.arange(0, WIDTH)
    inside = (row < B)[:, None] & (column < F)[None, :]
    return row, column, row[:, None] * F + column[None, :], inside


@triton.jit(do_not_specialize=["B"])
def _latent_layer_fwd_kernel(
    z_ptr,  # [B, M]
    w_ptr,  # [F, M], by strides W_F and W_M
    b_ptr,  # [F], or None
    out_ptr,  # [1 + M, B, F]
    B,
    M: tl.constexpr,
    F: tl.constexpr,
    W_F: tl.constexpr,
    W_M: tl.constexpr,
    KIND: tl.constexpr,
    P0: tl.constexpr,
    P1: tl.constexpr,
    ROUND: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    begin()
    row, column, at, inside = _place(B, F, ROWS, WIDTH)
    a = _argument(z_ptr, w_ptr, b_ptr, row, column, B, M, F, W_F, W_M, SLOTS)
    phi, d1, _ = activation(a, KIND, P0, P1)
    tl.store(out_ptr + at, rounded(phi, ROUND), mask=inside)
    size = tl.cast(B, tl.int64) * F
    for first in range(0, M, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        w = _weights(w_ptr, slot, column, M, F, W_F, W_M)
        where = ((1 + slot) * size)[:, None, None] + at[None, :, :]
        mask = (slot < M)[:, None, None] & inside[None, :, :]
        moved = rounded(d1[None, :, :] * w[:, None, :], ROUND)
        tl.store(out_ptr + where, moved, mask=mask)


@triton.jit
def _gradients(g_ptr, slot, at, inside, size, M: tl.constexpr):
    """The tangents' gradients [row, slot, column] in float32, 0 outside.

    Samples in front: a thread holds all of a feature's, and adds them up alone.
    """
    where = at[:, None, :] + ((1 + slot) * size)[None, :, None]
    mask = inside[:, None, :] & (slot < M)[None, :, None]
    return tl.load(g_ptr + where, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["B"])
def _latent_layer_bwd_kernel(
    g_ptr,  # [1 + M, B, F]
    z_ptr,  # [B, M]
    w_ptr,  # [F, M], by strides W_F and W_M
    b_ptr,  # [F], or None
    part_w_ptr,  # [cdiv(B, ROWS), 1 + M, F], the bias's in front
    part_z_ptr,  # [cdiv(F, WIDTH), B, M]
    B,
    M: tl.constexpr,
    F: tl.constexpr,
    W_F: tl.constexpr,
    W_M: tl.constexpr,
    KIND: tl.constexpr,
    P0: tl.constexpr,
    P1: tl.constexpr,
    CURVED: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    begin()
    row, column, at, inside = _place(B, F, ROWS, WIDTH)
    a = _argument(z_ptr, w_ptr, b_ptr, row, column, B, M, F, W_F, W_M, SLOTS)
    _, d1, d2 = activation(a, KIND, P0, P1)
    size = tl.cast(B, tl.int64) * F
    da = d1 * tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if CURVED:
        for first in range(0, M, SLOTS):
            slot = first + tl.arange(0, SLOTS)
            g = _gradients(g_ptr, slot, at, inside, size, M)
            w = _weights(w_ptr, slot, column, M, F, W_F, W_M)
            da += d2 * tl.sum(g * w[None, :, :], 1)
    blocks: tl.constexpr = (F + WIDTH - 1) // WIDTH
    part_w = part_w_ptr + (tl.program_id(0) // blocks).to(tl.int64) * (1 + M) * F
    part_z = part_z_ptr + (tl.program_id(0) % blocks).to(tl.int64) * B * M
    tl.store(part_w + column, tl.sum(da, 0), mask=column < F)
    for first in range(0, M, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        g = _gradients(g_ptr, slot, at, inside, size, M)
        z = tl.trans(_latents(z_ptr, slot, row, B, M))
        sums = tl.sum(g * d1[:, None, :] + z[:, :, None] * da[:, None, :], 0)
        to = (1 + slot)[:, None] * F + column[None, :]
        tl.store(part_w + to, sums, mask=(slot < M)[:, None] & (column < F)[None, :])
        # Features in front, for the same reason.
        w = tl.trans(_weights(w_ptr, slot, column, M, F, W_F, W_M))
        sums_z = tl.sum(tl.trans(da)[:, :, None] * w[:, None, :], 0)
        to_z = row[:, None] * M + slot[None, :]
        tl.store(part_z + to_z, sums_z, mask=(row < B)[:, None] & (slot < M)[None, :])


@triton.jit
def _total(part_ptr, at, parts, size, PARTS: tl.constexpr):
    """The sum of elements `at` of [parts, size]."""
    i = tl.arange(0, PARTS)
    acc = tl.zeros([PARTS, at.shape[0]], tl.float32)
    for start in range(0, parts, PARTS):
        where = (start + i).to(tl.int64)[:, None] * size + at[None, :]
        mask = (start + i < parts)[:, None] & (at < size)[None, :]
        acc += tl.load(part_ptr + where, mask=mask, other=0.0)
    return tl.sum(acc, 0)


@triton.jit(do_not_specialize=["B"])
def _latent_layer_sum_kernel(
    part_w_ptr,  # [cdiv(B, ROWS), 1 + M, F]
    part_z_ptr,  # [cdiv(F, WIDTH), B, M]
    g_w_ptr,  # [F, M], or None
    g_b_ptr,  # [F], or None
    g_z_ptr,  # [B, M], or None
    B,
    M: tl.constexpr,
    F: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    begin()
    pid = tl.program_id(0)
    blocks: tl.constexpr = ((1 + M) * F + BLOCK - 1) // BLOCK
    if pid < blocks:
        at = pid * BLOCK + tl.arange(0, BLOCK)
        total = _total(part_w_ptr, at, tl.cdiv(B, ROWS), (1 + M) * F, PARTS)
        slot, column = at // F, at % F
        if g_w_ptr is not None:
            tl.store(g_w_ptr + column * M + slot - 1, total, mask=(slot > 0) & (slot <= M))
        if g_b_ptr is not None:
            tl.store(g_b_ptr + column, total, mask=slot == 0)
    elif g_z_ptr is not None:
        at_z = (pid - blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        size = tl.cast(B, tl.int64) * M
        total_z = _total(part_z_ptr, at_z, tl.cdiv(F, WIDTH), size, PARTS)
        tl.store(g_z_ptr + at_z, total_z, mask=at_z < size)


def latent_layer_fwd(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kind: str,
    params: Sequence[float] = (),
    *,
    dtype: torch.dtype | None = None,
    product: str = "ieee",
) -> Tensor:
    """phi(z W^T + b) and its tangents by z in one dense stack ``[1 + m, B, F]``.

    Args:
        z: ``[B, m]``, float32, bfloat16 or float16; copied where it is not dense.
        weight: ``[F, m]``, of any of these dtypes and any strides.
        bias: ``[F]`` or None; copied where it is not dense.
        kind: a key of `PARAMETERS`.
        params: that kind's parameters; compiled in.
        dtype: of the stack; z's where None is given.
        product: how its reader multiplies float32 numbers; where in TF32, they are rounded to that.

    Raises:
        TypeError: another dtype.
        ValueError: an unknown kind, a wrong number of parameters, or shapes that do not fit.
    """
    z, bias = _dense(z, weight, bias)
    B, F = len(z), len(weight)
    out = torch.empty((1 + z.shape[1], B, F), dtype=dtype or z.dtype, device=z.device)
    check_dtypes(out=out)
    launch(
        *(_latent_layer_fwd_kernel, (cdiv(B, _FORWARD["ROWS"]) * cdiv(F, _WIDTH),)),
        *(z, weight, bias, out, B),
        **_sizes(weight, kind, params, _SLOTS),
        **_FORWARD,
        ROUND=product if out.dtype == torch.float32 else "none",
    )
    return out


def latent_layer_bwd(
    grad: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kind: str,
    params: Sequence[float] = (),
    *,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of z, the weight and the bias, dense and each in its tensor's dtype.

    Args:
        grad: of the forward's result, ``[1 + m, B, F]``; copied where it is not dense.
        z: as in the forward.
        weight: as in the forward.
        bias: as in the forward.
        kind: as in the forward.
        params: as in the forward.
        needs: which of the three are wanted; the others are None.

    Raises:
        TypeError, ValueError: as the forward.
    """
    z, bias = _dense(z, weight, bias)
    (B, m), F = z.shape, len(weight)
    check_dtypes(grad=grad)
    if grad.shape != (1 + m, B, F):
        raise ValueError(f"grad has shape {tuple(grad.shape)}: give the stack's, {(1 + m, B, F)}")
    parts, columns = cdiv(B, _BACKWARD["ROWS"]), cdiv(F, _WIDTH)
    room = {"dtype": torch.float32, "device": z.device}
    part_w = torch.empty((parts, 1 + m, F), **room)
    part_z = torch.empty((columns, B, m), **room)
    launch(
        *(_latent_layer_bwd_kernel, (parts * columns,)),
        *(grad.contiguous(), z, weight, bias, part_w, part_z, B),
        **_sizes(weight, kind, params, _FEW),
        **_BACKWARD,
        CURVED=kind not in PIECEWISE_LINEAR,
    )
    g_z = torch.empty_like(z) if needs[0] else None
    g_w = torch.empty((F, m), dtype=weight.dtype, device=z.device) if needs[1] else None
    g_b = torch.empty_like(bias) if needs[2] and bias is not None else None
    programs = cdiv((1 + m) * F, _BLOCK) + (0 if g_z is None else cdiv(B * m, _BLOCK))
    launch(
        *(_latent_layer_sum_kernel, (programs,)),
        *(part_w, part_z, g_w, g_b, g_z, B, m, F, _BACKWARD["ROWS"], _WIDTH),
        **_SUM,
    )
    return g_z, g_w, g_b


def _dense(z: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The latents and the bias, checked, each dense."""
    check_dtypes(z=z, weight=weight, **({} if bias is None else {"bias": bias}))
    if z.dim() != 2 or weight.dim() != 2 or z.shape[1] != weight.shape[1]:
        raise ValueError(
            f"z {tuple(z.shape)} and weight {tuple(weight.shape)} do not fit: give [B, m], [F, m]"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}: give {tuple(weight.shape[:1])}")
    return z.contiguous(), None if bias is None else bias.contiguous()


def _sizes(weight: Tensor, kind: str, params: Sequence[float], few: int) -> dict[str, Any]:
    """What a layer's kernel has compiled in, but for its rows; all latents at once up to `few`."""
    F, m = weight.shape
    sizes = {"M": m, "F": F, "W_F": weight.stride(0), "W_M": weight.stride(1)}
    tiles = {"SLOTS": triton.next_power_of_2(m) if m <= few else _SLOTS, "WIDTH": _WIDTH}
    return activation_constexprs(kind, params) | sizes | tiles


def configurations() -> Iterator[Configuration]:
    """Compilations by kind and dtype, with example parameters, by sizes and what is left out."""
    dense, odd = torch.empty(256, 16), torch.empty(257, 33)
    for kind, dtype in product(PARAMETERS, (torch.float32, torch.bfloat16)):
        yield from _audited(kind, dtype, dense, "16 -> 256")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        # The kind with the most registers.
        for weight, label in (
            (torch.empty(256, 64), "64 -> 256"),
            (torch.empty(256, 2), "2 -> 256"),
            (odd, "33 -> 257"),
            (torch.empty(15, 257).mT, "15 -> 257 turned"),
        ):
            yield from _audited("gelu_tanh", dtype, weight, label)
        yield from _audited("relu", dtype, odd.to(dtype), "33 -> 257 without bias", bias=False)
    for of, left_out in (("all", ()), ("z", ("g_w_ptr", "g_b_ptr")), ("weight", ("g_z_ptr",))):
        for dtype in (torch.float32, torch.bfloat16):
            given = {name: pointer(dtype) for name in ("g_w_ptr", "g_b_ptr", "g_z_ptr")}
            parts = {"part_w_ptr": "*fp32", "part_z_ptr": "*fp32"}
            yield Configuration(
                _latent_layer_sum_kernel,
                f"{of} {pointer(dtype)[1:]}",
                parts | {name: t for name, t in given.items() if name not in left_out},
                {"M": 16, "F": 256, "ROWS": _BACKWARD["ROWS"], "WIDTH": _WIDTH}
                | {name: _SUM[name] for name in ("PARTS", "BLOCK")}
                | dict.fromkeys(left_out),
                _SUM["num_warps"],
            )


def _audited(
    kind: str, dtype: torch.dtype, weight: Tensor, label: str, bias: bool = True
) -> Iterator[Configuration]:
    """Both kernels of a layer with that weight, and a stack of that dtype."""
    types = {f"{name}_ptr": "*fp32" for name in ("z", "part_w", "part_z")}
    types |= {f"{name}_ptr": pointer(weight.dtype) for name in ("w", "b")[: 1 + bias]}
    types |= {f"{name}_ptr": pointer(dtype) for name in ("g", "out")}
    curved = {"CURVED": kind not in PIECEWISE_LINEAR}
    product = "tf32" if dtype == torch.float32 else "none"
    for kernel, tile, few, more in (
        (_latent_layer_fwd_kernel, _FORWARD, _SLOTS, {"ROUND": product}),
        (_latent_layer_bwd_kernel, _BACKWARD, _FEW, curved),
    ):
        sizes = _sizes(weight, kind, EXAMPLES.get(kind, ()), few)
        yield Configuration(
            kernel,
            f"{kind} {pointer(dtype)[1:]} {label}",
            {name: types[name] for name in kernel.arg_names if name in types},
            sizes | more | {"ROWS": tile["ROWS"]} | ({} if bias else {"b_ptr": None}),
            tile["num_warps"],
        )
