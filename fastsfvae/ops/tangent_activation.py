"""An activation on a value and the tangents it carries, by one fused kernel.

The plain torch form of each kind is its rule in `fastsfvae.jacobian.rules.activation`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsfvae.kernels._contract import PIECEWISE_LINEAR
from fastsfvae.ops import _library


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
        return _library.tangent_activation(a, T, kind, params)

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
        g_a, g_T_in = _library.tangent_activation_bwd(a, T, g_out, g_T, ctx.kind, ctx.params)
        return g_a, g_T_in.sum(1, keepdim=True) if ctx.shared else g_T_in, None, None
