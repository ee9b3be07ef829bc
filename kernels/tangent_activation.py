"""An activation on a value and on the m tangents it carries, and their pullback.

    forward     out = phi(a)                                      out_T_i = phi'(a) T_i
    backward    g_a = phi'(a) g_out + phi''(a) sum_i T_i g_T_i    g_T_in_i = phi'(a) g_T_i

a is [B, *F]; T is tangent-major, [m, B, *F], or [m, 1, *F] where all samples share their tangents.
With a bias, phi is taken at a + bias: the layer in front leaves its bias, which tangents have none
of, to this pass. The sum is rounded to a's dtype, as a stored one would be.

Floor, in passes over T: the forward reads it once and writes as much, in place where the caller
allows it; the backward reads T and g_T and writes g_T_in, and where phi'' = 0 it does not read T.
A program keeps its part of a, and the derivatives, in registers for all the tangents it serves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._blocks import as_mask
from ._contract import (
    PARAMETERS,
    PIECEWISE_LINEAR,
    empty_tangents,
    memory_format,
    tangents_like,
)
from ._launch import (
    Configuration,
    DeviceLimits,
    begin,
    cdiv,
    check_dtypes,
    device_limits,
    launch,
    pointer,
)
from .activations import EXAMPLES, activation, activation_constexprs

# Four elements a thread: one 16-byte access in float32.
_BLOCK = 512
_NUM_WARPS = 4


@triton.jit
def _load_argument(a_ptr, bias_ptr, at, mask, channels, inner, HAS_BIAS: tl.constexpr):
    """What phi is taken at, in float32."""
    a = tl.load(a_ptr + at, mask=mask, other=0.0)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + at // inner % channels, mask=mask, other=0.0)
        a = (a.to(tl.float32) + bias.to(tl.float32)).to(a.dtype)
    return a.to(tl.float32)


@triton.jit(do_not_specialize=["m", "blocks", "tangents_per_program", "channels"])
def _tangent_activation_fwd_kernel(
    a_ptr,  # [B * F], in a's memory order
    bias_ptr,  # [channels]; not read without HAS_BIAS
    t_ptr,  # [m, B * F], or [m, F] with SHARED
    out_ptr,  # [B * F]
    out_t_ptr,  # [m, B * F]
    numel,
    sample_numel,
    m,
    blocks,
    tangents_per_program,
    channels,
    inner,
    stride_t_m,
    stride_out_t_m,
    KIND: tl.constexpr,
    P0: tl.constexpr,
    P1: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    begin()
    pid = tl.program_id(0)
    at = (pid % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < numel
    first = (pid // blocks) * tangents_per_program
    last = tl.minimum(first + tangents_per_program, m)

    a = _load_argument(a_ptr, bias_ptr, at, mask, channels, inner, HAS_BIAS)
    phi, d1, _ = activation(a, KIND, P0, P1)
    tl.store(out_ptr + at, phi, mask=mask & as_mask(first == 0))
    at_t = at % sample_numel if SHARED else at
    for i in range(first, last):
        tangent = tl.cast(i, tl.int64)
        T = tl.load(t_ptr + tangent * stride_t_m + at_t, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_t_ptr + tangent * stride_out_t_m + at, d1 * T, mask=mask)


@triton.jit(do_not_specialize=["m", "channels"])
def _tangent_activation_bwd_kernel(
    a_ptr,  # [B * F], in a's memory order
    bias_ptr,  # [channels]; not read without HAS_BIAS
    t_ptr,  # [m, B * F], or [m, F] with SHARED; not read where phi'' = 0
    g_out_ptr,  # [B * F]
    g_t_ptr,  # [m, B * F]
    g_a_ptr,  # [B * F]
    g_t_in_ptr,  # [m, B * F]
    numel,
    sample_numel,
    m,
    channels,
    inner,
    stride_t_m,
    stride_g_t_m,
    stride_g_t_in_m,
    KIND: tl.constexpr,
    P0: tl.constexpr,
    P1: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SHARED: tl.constexpr,
    CURVED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    begin()
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < numel
    a = _load_argument(a_ptr, bias_ptr, at, mask, channels, inner, HAS_BIAS)
    _, d1, d2 = activation(a, KIND, P0, P1)
    at_t = at % sample_numel if SHARED else at
    dot = tl.zeros([BLOCK], tl.float32)
    for i in range(0, m):
        tangent = tl.cast(i, tl.int64)
        g_T = tl.load(g_t_ptr + tangent * stride_g_t_m + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(g_t_in_ptr + tangent * stride_g_t_in_m + at, d1 * g_T, mask=mask)
        if CURVED:
            T = tl.load(t_ptr + tangent * stride_t_m + at_t, mask=mask, other=0.0).to(tl.float32)
            dot += T * g_T
    g_a = d1 * tl.load(g_out_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if CURVED:
        g_a += d2 * dot
    tl.store(g_a_ptr + at, g_a, mask=mask)


def _tangents_per_program(blocks: int, m: int, limits: DeviceLimits) -> int:
    """All of them where the blocks of a fill the chip; else the tangents are shared out too."""
    groups = min(m, max(1, 8 * limits.sm_count // blocks))
    return cdiv(m, groups)


def tangent_activation_fwd(
    a: Tensor,
    T: Tensor,
    kind: str,
    params: Sequence[float] = (),
    *,
    bias: Tensor | None = None,
    axis: int = 1,
    out: Tensor | None = None,
    out_T: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``(phi(a) [B, *F], phi'(a) T [m, B, *F])``, at a + bias where there is one.

    Args:
        a: ``[B, *F]``, float32, bfloat16 or float16; copied only if neither contiguous nor
            channels-last.
        T: ``[m, B, *F]`` or ``[m, 1, *F]``; copied only if T[i] is not in a's memory order.
        kind: a key of `PARAMETERS`.
        params: that kind's parameters; compiled in.
        bias: one number for each index of a's axis `axis`, float32, bfloat16 or float16.
        axis: see `bias`.
        out: where phi(a) goes, in a's memory order; may be a.
        out_T: where the tangents go, each in a's memory order; may be T where T is [m, B, *F].

    Raises:
        TypeError: another dtype.
        ValueError: an unknown kind, a wrong number of parameters, or shapes that do not fit.
    """
    constexprs = activation_constexprs(kind, params)
    _check(a, T)
    fmt = memory_format(a)
    a, T = a.contiguous(memory_format=fmt), tangents_like(T, fmt)
    out = torch.empty_like(a) if out is None else out
    out_T = empty_tangents(a, T) if out_T is None else out_T
    _check_results(a, fmt, out=out, out_T=out_T)
    bias, channels = _bias_arguments(a, bias, axis)
    m, numel = T.shape[0], a.numel()
    blocks = cdiv(numel, _BLOCK)
    # A program that shares its elements with others would read a after another has overwritten it.
    in_place = out.data_ptr() == a.data_ptr()
    tangents = m if in_place else _tangents_per_program(blocks, m, device_limits(a))
    launch(
        *(_tangent_activation_fwd_kernel, (blocks * cdiv(m, tangents),)),
        *(a, a if bias is None else bias, T, out, out_T),
        *(numel, numel // a.shape[0], m, blocks, tangents, *channels),
        *(T.stride(0), out_T.stride(0)),
        **constexprs,
        HAS_BIAS=bias is not None,
        SHARED=T.shape[1] < a.shape[0],
        BLOCK=_BLOCK,
        num_warps=_NUM_WARPS,
    )
    return out, out_T


def tangent_activation_bwd(
    a: Tensor,
    T: Tensor | None,
    g_out: Tensor,
    g_T: Tensor,
    kind: str,
    params: Sequence[float] = (),
    *,
    bias: Tensor | None = None,
    axis: int = 1,
    g_a: Tensor | None = None,
    g_T_in: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Pull cotangents back: ``(g_a [B, *F], g_T_in [m, B, *F])``.

    Args:
        a: ``[B, *F]`` as in the forward.
        T: as in the forward; may be None for a kind in `PIECEWISE_LINEAR`.
        g_out: cotangent of phi(a), ``[B, *F]``.
        g_T: cotangent of the tangents, ``[m, B, *F]``.
        kind: as in the forward.
        params: as in the forward.
        bias: as in the forward; its own gradient is g_a, summed over all axes but `axis`.
        axis: as in the forward.
        g_a: where the first result goes, in a's memory order; may be g_out.
        g_T_in: where the second goes, each in a's memory order; may be g_T.

    Returns:
        g_a in a's dtype, g_T_in in g_T's; g_T_in is per sample even where T was shared.

    Raises:
        TypeError: another dtype.
        ValueError: as the forward; T missing for a curved kind.
    """
    constexprs = activation_constexprs(kind, params)
    curved = kind not in PIECEWISE_LINEAR
    if T is None and curved:
        raise ValueError(f"kind={kind!r} has a second derivative: give the tangents T")
    T = T if curved and T is not None else g_T
    _check(a, T)
    fmt = memory_format(a)
    a, g_out = a.contiguous(memory_format=fmt), g_out.contiguous(memory_format=fmt)
    T, g_T = tangents_like(T, fmt), tangents_like(g_T, fmt)
    g_a = torch.empty_like(a) if g_a is None else g_a
    g_T_in = empty_tangents(a, g_T) if g_T_in is None else g_T_in
    _check_results(a, fmt, g_a=g_a, g_T_in=g_T_in)
    bias, channels = _bias_arguments(a, bias, axis)
    m, numel = T.shape[0], a.numel()
    launch(
        *(_tangent_activation_bwd_kernel, (cdiv(numel, _BLOCK),)),
        *(a, a if bias is None else bias, T, g_out, g_T, g_a, g_T_in),
        *(numel, numel // a.shape[0], m, *channels),
        *(T.stride(0), g_T.stride(0), g_T_in.stride(0)),
        **constexprs,
        HAS_BIAS=bias is not None,
        SHARED=T.shape[1] < a.shape[0],
        CURVED=curved,
        BLOCK=_BLOCK,
        num_warps=_NUM_WARPS,
    )
    return g_a, g_T_in


def _check(a: Tensor, T: Tensor) -> None:
    check_dtypes(a=a, T=T)
    if T.shape[2:] != a.shape[1:] or T.dim() < 2 or T.shape[1] not in (1, a.shape[0]):
        raise ValueError(
            f"a {tuple(a.shape)} and T {tuple(T.shape)} do not fit: T is [m, *a.shape], "
            "or [m, 1, *a.shape[1:]] where samples share their tangents"
        )


def _check_results(a: Tensor, fmt: torch.memory_format, **results: Tensor) -> None:
    for name, given in results.items():
        first = given if given.dim() == a.dim() else given[0]
        if first.shape != a.shape or not first.is_contiguous(memory_format=fmt):
            raise ValueError(
                f"{name} has shape {tuple(given.shape)} and strides {given.stride()}: "
                f"give one in a's memory order, {tuple(a.shape)} with strides {a.stride()}"
            )


def _bias_arguments(
    a: Tensor, bias: Tensor | None, axis: int
) -> tuple[Tensor | None, tuple[int, int]]:
    """The bias as one dense vector, and dense a's extent and stride along its axis."""
    if bias is None:
        return None, (1, 1)
    check_dtypes(bias=bias)
    if bias.shape != a.shape[axis : axis + 1 or None]:
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}: give one number for each index of axis {axis} "
            f"of a, {tuple(a.shape)}"
        )
    return bias.contiguous(), (a.shape[axis], a.stride(axis))


def configurations() -> Iterator[Configuration]:
    """Compilations by kind and dtype, with example parameters."""
    for kind, dtype in product(PARAMETERS, (torch.float32, torch.bfloat16, torch.float16)):
        # Bias, sharing and odd sizes change addresses only, so one kind stands for all.
        variants = [(), ("biased",), ("shared",), ("shared", "odd"), ("biased", "odd")]
        for variant in variants if kind == "tanh" else variants[:1]:
            label = " ".join((kind, pointer(dtype)[1:], *variant))
            is_odd = "odd" in variant
            constexprs = {
                **activation_constexprs(kind, EXAMPLES.get(kind, ())),
                **{"HAS_BIAS": "biased" in variant, "SHARED": "shared" in variant},
                "BLOCK": _BLOCK,
            }
            for kernel, names, more in (
                (_tangent_activation_fwd_kernel, "a t out out_t", {}),
                (
                    _tangent_activation_bwd_kernel,
                    "a t g_out g_t g_a g_t_in",
                    {"CURVED": kind not in PIECEWISE_LINEAR},
                ),
            ):
                types = {f"{name}_ptr": pointer(dtype) for name in names.split()}
                types["bias_ptr"] = "*fp32"
                sizes = [
                    n for n in kernel.arg_names if "numel" in n or "stride" in n or n == "inner"
                ]
                yield Configuration(
                    kernel,
                    label,
                    types,
                    constexprs | more,
                    _NUM_WARPS,
                    odd=(*types, *sizes) if is_odd else (),
                )
