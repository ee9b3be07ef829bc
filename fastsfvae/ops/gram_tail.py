"""The Gram and projection of a Jacobian whose last layer is done on the way, by fused kernels.

The Jacobian itself is never written. Where it is wanted, or the layer is not a transposed
convolution with kernel 4, stride 2, padding 1 and few channels out, `convolution` and
`gram_project` do the same in two steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsfvae.ops import _library


def gram_tail(
    T: Tensor,
    weight: Tensor,
    r: Tensor,
    a: Tensor | None = None,
    kind: str = "",
    params: tuple[float, ...] = (),
    slope: Tensor | None = None,
    input_precision: str = "ieee",
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiable ``(G [B, m, m], p [B, m], rr [B])`` of J = slope conv_transpose(phi'(a) T).

    Args:
        T: tangents in front of the activation phi, ``[m, B, Ci, H, W]`` with m <= 64.
        weight: ``[Ci, Co, 4, 4]``, of stride 2 and padding 1, with Co <= 4.
        r: residual ``[B, Co, 2H, 2W]``.
        a: phi's argument ``[B, Ci, H, W]``, or its result for ReLU; None where there is no phi.
        kind: phi, a key of `fastsfvae.kernels._contract.PARAMETERS`; "" for none.
        params: its parameters.
        slope: derivative of the activation behind the layer, ``[B, Co, 2H, 2W]``, or None.
        input_precision: how float32 products of the layer are formed: "ieee" or "tf32".

    Raises:
        RuntimeError: a device that Triton cannot reach; a second derivative.
        TypeError: a dtype that the kernels do not take.
        ValueError: shapes that do not fit.
    """
    _library.require_triton(T)
    return _GramTail.apply(T, weight, r, a, kind, params, slope, input_precision)


class _GramTail(torch.autograd.Function):
    @staticmethod
    def forward(T, weight, r, a, kind, params, slope, input_precision):
        from fastsfvae.kernels.gram_tail import gram_tail_partials

        options = {"a": a, "kind": kind, "params": params, "slope": slope}
        parts = gram_tail_partials(T, weight, r, input_precision=input_precision, **options)
        return tuple(part.sum(0) for part in parts)

    @staticmethod
    def setup_context(ctx, inputs, output):
        T, weight, r, a, ctx.kind, ctx.params, slope, ctx.input_precision = inputs
        ctx.save_for_backward(T, weight, r, a, slope)

    @staticmethod
    def backward(ctx, g_G, g_p, g_rr):
        from fastsfvae.kernels.gram_tail_backward import gram_tail_bwd

        _library.refuse_second_order()
        T, weight, r, a, slope = ctx.saved_tensors
        dT, d_weight, dr, da, d_slope = gram_tail_bwd(
            *(T, weight, r, g_G + g_G.mT, g_p, g_rr),
            a=a,
            kind=ctx.kind,
            params=ctx.params,
            slope=slope,
            input_precision=ctx.input_precision,
        )
        grads = (dT, d_weight, dr, da, None, None, d_slope, None)
        inputs = (T, weight, r, a, None, None, slope, None)
        return tuple(
            g if g is None or t is None else g.to(t.dtype)
            for g, t in zip(grads, inputs, strict=True)
        )
