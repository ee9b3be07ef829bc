"""A transposed convolution of a stack of values and tangents, behind an activation.

Two geometries: stride 2 and padding 1 with kernel 3 or 4, and any kernel on a 1 x 1 input without
padding, which is a linear layer with kh * kw * C_out outputs. `_implicit_gemm` has the formulas and
the kernels.

Floor, celeba16's 64 -> 32 channels from 8 x 8 to 16 x 16, a chunk of 64 samples, bfloat16: X and Y
are 8.9 and 17.8 MB, so each of the three passes moves 27 MB and does 4.6 GFLOP, 170 a byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from ._launch import Configuration, check_dtypes
from ._stack_product import (
    EVERY,
    POINTWISE,
    Weight,
    audited,
    channels_last,
    doubling,
    product,
    weight_gradient,
    window,
)


def tangent_conv_transpose_fwd(
    stack: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kind: str = "none",
    params: Sequence[float] = (),
    *,
    padding: int = 1,
    output_padding: tuple[int, int] = (0, 0),
    input_precision: str = "ieee",
) -> Tensor:
    """Values and tangents of the layer: ``[S, B, C_out, OH, OW]`` in channels-last order.

    Args:
        stack: ``[S, B, C_in, H, W]``, slot 0 the values, float32, bfloat16 or float16; copied only
            where its slots are not dense in channels-last order.
        weight: ``[C_in, C_out, kh, kw]``; likewise, and converted to the stack's dtype.
        bias: ``[C_out]`` or None, added to the values.
        kind: of the activation in front: "none" or a key of `PARAMETERS`.
        params: that kind's parameters; compiled in.
        padding: 1, where the stride is 2; or 0, where the input is 1 x 1.
        output_padding: rows and columns that the layer adds at the end; none with padding 0.
        input_precision: how float32 products are formed: "ieee", "tf32x3" or "tf32".

    Raises:
        TypeError: another dtype.
        ValueError: an unknown kind or a wrong number of parameters.
    """
    check_dtypes(stack=stack)
    x, taps = channels_last(stack), channels_last(weight.to(stack.dtype))
    (S, B, H, W, C_in), (_, kh, kw, C_out) = x.shape, taps.shape
    options = {"kind": kind, "params": params, "bias": bias, "precision": input_precision}
    if padding == 0:
        flat = Weight(taps, C_in, kh * kw * C_out, inner_is_input=False)
        y = product(x, flat, POINTWISE, (1, 1), **options).view(S, B, kh, kw, C_out)
    else:
        by_channel = Weight(taps, C_in, C_out, inner_is_input=False)
        size = (2 * H - 4 + kh + output_padding[0], 2 * W - 4 + kw + output_padding[1])
        y = product(x, by_channel, doubling(kh), size, **options)
    return y.permute(0, 1, 4, 2, 3)


def tangent_conv_transpose_bwd(
    grad: Tensor,
    stack: Tensor,
    weight: Tensor,
    kind: str = "none",
    params: Sequence[float] = (),
    *,
    padding: int = 1,
    needs: tuple[bool, bool] = (True, True),
    input_precision: str = "ieee",
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the stack in front of the activation, and of the weight.

    Args:
        grad: ``[S, B, C_out, OH, OW]``, of what the forward returned.
        stack: as in the forward.
        weight: as in the forward.
        kind: as in the forward.
        params: as in the forward.
        padding: as in the forward.
        needs: which of the two are wanted; the other is None.
        input_precision: as in the forward.

    Returns:
        ``[S, B, C_in, H, W]`` in the gradient's dtype and ``[C_in, C_out, kh, kw]`` in float32,
        both in channels-last order.

    Raises:
        TypeError, ValueError: as the forward.
    """
    check_dtypes(grad=grad)
    x, taps, g = (channels_last(t.to(grad.dtype)) for t in (stack, weight, grad))
    (S, B, H, W, C_in), (_, kh, kw, C_out) = x.shape, taps.shape
    if padding == 0:
        g, gather = g.reshape(S, B, 1, 1, kh * kw * C_out), POINTWISE
    else:
        gather = window(kh, stride=2, padding=1)
    options = {"kind": kind, "params": params, "precision": input_precision}
    grad_x = grad_w = None
    if needs[0]:
        backwards = Weight(taps, g.shape[-1], C_in, inner_is_input=True)
        grad_x = product(g, backwards, gather, (H, W), pull=x, **options).permute(0, 1, 4, 2, 3)
    if needs[1]:
        summed = weight_gradient(x, g, gather, activate="plain", **options)
        grad_w = summed.view(C_in, kh, kw, C_out).permute(0, 3, 1, 2)
    return grad_x, grad_w


def configurations() -> Iterator[Configuration]:
    """Every compilation of kernel 4, stride 2: blocks, dtypes and precisions, example kinds."""
    geometries = doubling(4), window(4, stride=2, padding=1)
    yield from audited("deconv 4/2", *geometries, forward_inner_is_input=False, variants=EVERY)
