"""A convolution of a stack of values and tangents, behind an activation.

Square kernels 1, 3 and 4 with stride 1 and any padding; kernels 3 and 4 with stride 2 and padding
1. `_implicit_gemm` has the formulas and the kernels, and the floor for any layer.

Floor, 32 -> 32 channels at 32 x 32, kernel 3, a chunk of 64 samples and 16 tangents, bfloat16: X
and Y are 71 MB each, so each of the three passes moves 143 MB and does 20.5 GFLOP, 144 a byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from ._launch import Configuration, check_dtypes
from ._stack_product import (
    Weight,
    audited,
    channels_last,
    doubling,
    mirrored,
    product,
    weight_gradient,
    window,
)


def tangent_conv_fwd(
    stack: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kind: str = "none",
    params: Sequence[float] = (),
    *,
    stride: int = 1,
    padding: int = 0,
    input_precision: str = "ieee",
) -> Tensor:
    """Values and tangents of the layer: ``[S, B, C_out, OH, OW]`` in channels-last order.

    Args:
        stack: ``[S, B, C_in, H, W]``, slot 0 the values, float32, bfloat16 or float16; copied only
            where its slots are not dense in channels-last order.
        weight: ``[C_out, C_in, k, k]``; likewise, and converted to the stack's dtype.
        bias: ``[C_out]`` or None, added to the values.
        kind: of the activation in front: "none" or a key of `PARAMETERS`.
        params: that kind's parameters; compiled in.
        stride: of both axes.
        padding: of both axes.
        input_precision: how float32 products are formed: "ieee", "tf32x3" or "tf32".

    Raises:
        TypeError: another dtype.
        ValueError: an unknown kind or a wrong number of parameters.
    """
    check_dtypes(stack=stack)
    x, taps = channels_last(stack), channels_last(weight.to(stack.dtype))
    C_out, k, _, C_in = taps.shape
    height, width = ((size + 2 * padding - k) // stride + 1 for size in x.shape[2:4])
    y = product(
        *(x, Weight(taps, C_in, C_out, inner_is_input=True), window(k, stride, padding)),
        *((height, width),),
        **{"kind": kind, "params": params, "bias": bias, "precision": input_precision},
    )
    return y.permute(0, 1, 4, 2, 3)


def tangent_conv_bwd(
    grad: Tensor,
    stack: Tensor,
    weight: Tensor,
    kind: str = "none",
    params: Sequence[float] = (),
    *,
    stride: int = 1,
    padding: int = 0,
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
        stride: as in the forward.
        padding: as in the forward.
        needs: which of the two are wanted; the other is None.
        input_precision: as in the forward.

    Returns:
        ``[S, B, C_in, H, W]`` in the gradient's dtype and ``[C_out, C_in, k, k]`` in float32, both
        in channels-last order.

    Raises:
        TypeError, ValueError: as the forward.
    """
    check_dtypes(grad=grad)
    x, taps, g = (channels_last(t.to(grad.dtype)) for t in (stack, weight, grad))
    C_out, k, _, C_in = taps.shape
    options = {"kind": kind, "params": params, "precision": input_precision}
    grad_x = grad_w = None
    if needs[0]:
        gather = mirrored(k, padding) if stride == 1 else doubling(k)
        backwards = Weight(taps, C_out, C_in, inner_is_input=False)
        grad_x = product(g, backwards, gather, tuple(x.shape[2:4]), pull=x, **options)
        grad_x = grad_x.permute(0, 1, 4, 2, 3)
    if needs[1]:
        reads = window(k, stride, padding)
        summed = weight_gradient(g, x, reads, activate="windowed", **options)
        grad_w = summed.view(C_out, k, k, C_in).permute(0, 3, 1, 2)
    return grad_x, grad_w


def configurations() -> Iterator[Configuration]:
    """Compilations of both strides; kernel and padding change addresses only."""
    yield from audited("conv 3/1", window(3, 1, 1), mirrored(3, 1))
    yield from audited("conv 4/2", window(4, 2, 1), doubling(4))
