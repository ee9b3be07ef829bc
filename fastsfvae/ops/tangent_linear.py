"""A linear layer on a sweep's stack, fused with the activation in front of it.

As `fastsfvae.ops.tangent_conv_transpose`, where the design is described.
"""

from __future__ import annotations

import math

from torch import Tensor

from fastsfvae.ops import _library, _precision


def supports(stack: Tensor, weight: Tensor) -> bool:
    """Whether the kernels take a layer; the library's product takes all others.

    Args:
        stack: ``[1 + m, B, *, C_in]``; only shape and dtype are read.
        weight: ``[C_out, C_in]``; likewise.
    """
    if stack.ndim < 3:
        return False
    positions = (stack.shape[0], math.prod(stack.shape[1:-1]), 1)
    return _precision.kernels_take(stack, positions, max(weight.shape))


def stack_linear(
    stack: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kind: str = "none",
    params: tuple[float, ...] = (),
) -> Tensor:
    """The layer on phi(stack[0]), and on the tangents that phi makes of stack[1:].

    Args:
        stack: ``[1 + m, B, *, C_in]``, in front of the activation.
        weight: ``[C_out, C_in]``.
        bias: ``[C_out]`` or None.
        kind: "none", or as in `fastsfvae.ops.tangent_activation.tangent_activation`.
        params: likewise.

    Returns:
        ``[1 + m, B, *, C_out]`` in the stack's dtype or autocast's.

    Raises:
        RuntimeError: a device that Triton cannot reach.
        TypeError: a dtype that the kernels do not take.
        ValueError: float64, an unknown kind or a wrong number of parameters.
    """
    from fastsfvae.kernels.tangent_linear import tangent_linear_fwd

    _library.require_triton(stack)
    return tangent_linear_fwd(
        *(_precision.autocast(stack), weight, bias, kind, params),
        input_precision=_precision.of_products(),
    )


def stack_linear_backward(
    grad: Tensor,
    stack: Tensor,
    weight: Tensor,
    kind: str = "none",
    params: tuple[float, ...] = (),
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Pullback of `stack_linear`: gradients of the stack, the weight and the bias.

    Args:
        grad: ``[1 + m, B, *, C_out]``, of its result.
        stack: as in the forward.
        weight: likewise.
        kind: likewise.
        params: likewise.
        needs: which of the three are wanted; the others are None.

    Returns:
        The stack's gradient, in front of the activation and in the dtype of `grad`, then the
        weight's and the bias's in float32.
    """
    from fastsfvae.kernels.tangent_linear import tangent_linear_bwd

    _library.require_triton(grad)
    grad_stack, grad_weight = tangent_linear_bwd(
        *(grad, stack, weight, kind, params),
        needs=needs[:2],
        input_precision=_precision.of_products(),
    )
    return grad_stack, grad_weight, _precision.bias_gradient(grad, -1) if needs[2] else None
