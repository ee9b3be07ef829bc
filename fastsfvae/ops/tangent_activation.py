"""An activation on a value and the tangents it carries, by one kernel.

`tangent_activation` is for autograd, by two operators of torch.library. The `stack_` functions are
for a sweep, which keeps value and tangents in one stack, saves memory by overwriting and pulls
gradients back by hand; no compiler sees them, so they call the launchers themselves.

The plain torch form of each kind is its rule in `fastsfvae.jacobian.rules.activation`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsfvae.kernels._contract import PIECEWISE_LINEAR, empty_tangents, memory_format
from fastsfvae.kernels._contract import reads_result as reads_result
from fastsfvae.ops import _library


@torch.library.custom_op("fastsfvae::tangent_activation", mutates_args=())
def activation_op(
    a: Tensor, T: Tensor, kind: str, params: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """A ``[B, *F]``, T ``[m, B or 1, *F]`` -> phi(a) ``[B, *F]``, phi'(a) T ``[m, B, *F]``."""
    from fastsfvae.kernels.tangent_activation import tangent_activation_fwd

    return tangent_activation_fwd(a, T, kind, params)


@activation_op.register_fake
def _(a, T, kind, params):
    a = a.contiguous(memory_format=memory_format(a))
    return torch.empty_like(a), empty_tangents(a, T)


@torch.library.custom_op("fastsfvae::tangent_activation_bwd", mutates_args=())
def activation_bwd_op(
    a: Tensor, T: Tensor | None, g_out: Tensor, g_T: Tensor, kind: str, params: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Pull g_out ``[B, *F]`` and g_T ``[m, B, *F]`` back to a and, per sample, to T."""
    from fastsfvae.kernels.tangent_activation import tangent_activation_bwd

    return tangent_activation_bwd(a, T, g_out, g_T, kind, params)


@activation_bwd_op.register_fake
def _(a, T, g_out, g_T, kind, params):
    a = a.contiguous(memory_format=memory_format(a))
    return torch.empty_like(a), empty_tangents(a, g_T)


def tangent_activation(
    a: Tensor, T: Tensor, kind: str, params: tuple[float, ...] = (), backend: str = "triton"
) -> tuple[Tensor, Tensor]:
    """Differentiable ``(phi(a) [B, *F], phi'(a) T [m, B, *F])``; first order.

    Args:
        a: ``[B, *F]``, float32, bfloat16 or float16, contiguous or channels-last.
        T: ``[m, B, *F]``, or ``[m, 1, *F]`` where all samples share their tangents.
        kind: a key of `fastsfvae.kernels._contract.PARAMETERS`: "relu", "leaky_relu", "elu",
            "selu", "silu", "gelu", "gelu_tanh", "tanh", "sigmoid", "softplus" or "hardtanh".
        params: the kind's parameters, in that table's order.
        backend: "triton", the only one.

    Raises:
        RuntimeError: a device that Triton cannot reach; a second derivative.
        TypeError: a dtype that the kernels do not take.
        ValueError: float64, another backend, an unknown kind or shapes that do not fit.
    """
    if backend != "triton":
        raise ValueError(f'tangent_activation has no backend {backend!r}: give "triton"')
    _library.require_triton(a)
    return _TangentActivation.apply(a, T, kind, params)


class _TangentActivation(torch.autograd.Function):
    @staticmethod
    def forward(a, T, kind, params):
        return activation_op(a, T, kind, params)

    @staticmethod
    def setup_context(ctx, inputs, output):
        a, T, ctx.kind, ctx.params = inputs
        # With phi'' = 0 the pullback does not read the tangents, so they need not outlive this.
        ctx.save_for_backward(a, None if ctx.kind in PIECEWISE_LINEAR else T)
        ctx.shared = T.shape[1] < a.shape[0]

    @staticmethod
    def backward(ctx, g_out, g_T):
        _library.refuse_second_order()
        a, T = ctx.saved_tensors
        g_a, g_T_in = activation_bwd_op(a, T, g_out, g_T, ctx.kind, ctx.params)
        return g_a, g_T_in.sum(1, keepdim=True) if ctx.shared else g_T_in, None, None


def stack_activation(
    a: Tensor,
    T: Tensor,
    kind: str,
    params: tuple[float, ...],
    bias: Tensor | None = None,
    axis: int = 1,
    out: Tensor | None = None,
) -> Tensor:
    """phi(a + bias) and its m tangents in one stack ``[1 + m, B, *F]``; no graph of its own.

    Args:
        a: ``[B, *F]`` as in `tangent_activation`.
        T: ``[m, B, *F]`` or ``[m, 1, *F]``, of a's dtype.
        kind: as in `tangent_activation`.
        params: likewise.
        bias: one number for each index of a's axis `axis`, or None.
        axis: see `bias`.
        out: the stack whose slices a and T are, to be overwritten; None for a new one.

    Raises:
        RuntimeError, TypeError, ValueError: as `tangent_activation`.
    """
    from fastsfvae.kernels.tangent_activation import tangent_activation_fwd

    _library.require_triton(a)
    out = _empty_stack(a, len(T)) if out is None else out
    tangent_activation_fwd(a, T, kind, params, bias=bias, axis=axis, out=out[0], out_T=out[1:])
    return out


def stack_activation_backward(
    a: Tensor,
    T: Tensor | None,
    g_out: Tensor,
    g_T: Tensor,
    kind: str,
    params: tuple[float, ...],
    bias: Tensor | None = None,
    axis: int = 1,
    out: Tensor | None = None,
) -> Tensor:
    """Pullback of `stack_activation`: g_a and the tangents' gradients in one ``[1 + m, B, *F]``.

    Args:
        a: as in the forward; or, where `reads_result`, phi(a), without a bias.
        T: as in the forward; not read where phi'' = 0.
        g_out: of phi(a).
        g_T: of its tangents, ``[m, B, *F]``.
        kind: as in the forward.
        params: likewise.
        bias: likewise; its gradient is g_a summed over the other axes.
        axis: likewise.
        out: the stack whose slices g_out and g_T are, overwritten if it lies in a's memory order;
            None for a new one.
    """
    from fastsfvae.kernels.tangent_activation import tangent_activation_bwd

    _library.require_triton(a)
    if out is None or not out[0].is_contiguous(memory_format=memory_format(a)):
        out = _empty_stack(a, len(g_T))
    tangent_activation_bwd(
        *(a, T, g_out, g_T, kind, params), bias=bias, axis=axis, g_a=out[0], g_T_in=out[1:]
    )
    return out


def _empty_stack(a: Tensor, m: int) -> Tensor:
    """Uninitialised ``[1 + m, *a.shape]``, each in the memory order that a has once it is dense."""
    a = a.contiguous(memory_format=memory_format(a))
    shape, strides = (1 + m, *a.shape), (a.numel(), *a.stride())
    return torch.empty_strided(shape, strides, dtype=a.dtype, device=a.device)
