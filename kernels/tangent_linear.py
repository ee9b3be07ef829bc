"""A linear layer on a stack of values and tangents, behind an activation.

`_implicit_gemm` has the formulas and the kernels.

Floor, mnist2's 256 -> 512 features with a chunk of 64 samples and 2 tangents, float32: X, Y and the
weight are 0.2, 0.4 and 0.5 MB and a pass does 50 MFLOP: less than a launch takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from ._launch import Configuration, check_dtypes
from ._stack_product import POINTWISE, Weight, audited, product, weight_gradient


def tangent_linear_fwd(
    stack: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kind: str = "none",
    params: Sequence[float] = (),
    *,
    input_precision: str = "ieee",
) -> Tensor:
    """Values and tangents of the layer: ``[S, B, *, C_out]``.

    Args:
        stack: ``[S, B, *, C_in]``, slot 0 the values, float32, bfloat16 or float16; copied only
            where it is not contiguous.
        weight: ``[C_out, C_in]``; likewise, and converted to the stack's dtype.
        bias: ``[C_out]`` or None, added to the values.
        kind: of the activation in front: "none" or a key of `PARAMETERS`.
        params: that kind's parameters; compiled in.
        input_precision: how float32 products are formed: "ieee", "tf32x3" or "tf32".

    Raises:
        TypeError: another dtype.
        ValueError: an unknown kind or a wrong number of parameters.
    """
    check_dtypes(stack=stack)
    C_out, C_in = weight.shape
    dense = Weight(weight.to(stack.dtype).contiguous(), C_in, C_out, inner_is_input=True)
    options = {"kind": kind, "params": params, "bias": bias, "precision": input_precision}
    y = product(_pixels(stack), dense, POINTWISE, (1, 1), **options)
    return y.view(*stack.shape[:-1], C_out)


def tangent_linear_bwd(
    grad: Tensor,
    stack: Tensor,
    weight: Tensor,
    kind: str = "none",
    params: Sequence[float] = (),
    *,
    needs: tuple[bool, bool] = (True, True),
    input_precision: str = "ieee",
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the stack in front of the activation, and of the weight.

    Args:
        grad: ``[S, B, *, C_out]``, of what the forward returned.
        stack: as in the forward.
        weight: as in the forward.
        kind: as in the forward.
        params: as in the forward.
        needs: which of the two are wanted; the other is None.
        input_precision: as in the forward.

    Returns:
        ``[S, B, *, C_in]`` in the gradient's dtype and ``[C_out, C_in]`` in float32.

    Raises:
        TypeError, ValueError: as the forward.
    """
    check_dtypes(grad=grad)
    C_out, C_in = weight.shape
    x, g = _pixels(stack.to(grad.dtype)), _pixels(grad)
    options = {"kind": kind, "params": params, "precision": input_precision}
    grad_x = grad_w = None
    if needs[0]:
        dense = Weight(weight.to(grad.dtype).contiguous(), C_out, C_in, inner_is_input=False)
        grad_x = product(g, dense, POINTWISE, (1, 1), pull=x, **options).view(stack.shape)
    if needs[1]:
        summed = weight_gradient(g, x, POINTWISE, activate="windowed", **options)
        grad_w = summed.view(C_out, C_in)
    return grad_x, grad_w


def _pixels(stack: Tensor) -> Tensor:
    """[S, B, *, C] as [S, B *, 1, 1, C]."""
    return stack.contiguous().view(stack.shape[0], -1, 1, 1, stack.shape[-1])


def configurations() -> Iterator[Configuration]:
    """Compilations of the widest blocks, which narrower layers do not outgrow."""
    yield from audited("linear", POINTWISE, POINTWISE)
