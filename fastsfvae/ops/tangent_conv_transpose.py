"""A transposed convolution of a sweep's stack, fused with the activation in front of it.

The kernels keep no result of the activation: they take the stack that goes into it, apply it as
they load, and pull gradients back through it as they store. No autograd and no compiler sees these
functions, so they call the launchers themselves.
"""

from __future__ import annotations

from torch import Tensor

from fastsfvae.ops import _library, _precision
from fastsfvae.ops.convolution import Geometry


def supports(stack: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether the kernels take a layer; the library's convolution takes all others.

    Args:
        stack: ``[1 + m, B, C_in, H, W]``; only shape and dtype are read.
        weight: ``[C_in, C_out, kh, kw]``; likewise.
        geometry: of the layer.
    """
    g = geometry
    if not g.transposed or stack.ndim != 5 or g.groups != 1 or g.dilation != (1, 1):
        return False
    (height, width), kernel = stack.shape[3:], tuple(weight.shape[2:])
    whole = (height, width) == (1, 1) and g.padding == (0, 0) and g.output_padding == (0, 0)
    doubles = kernel in ((3, 3), (4, 4)) and g.stride == (2, 2) and g.padding == (1, 1)
    # With output padding, one row and column more than twice the input's.
    size = kernel[0] * kernel[1] if whole else (2 * height + 1) * (2 * width + 1)
    positions = (stack.shape[0], stack.shape[1], size)
    return (whole or doubles) and _precision.kernels_take(stack, positions, max(weight.shape[:2]))


def stack_conv_transpose(
    stack: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    kind: str = "none",
    params: tuple[float, ...] = (),
) -> Tensor:
    """The layer on phi(stack[0]), and on the tangents that phi makes of stack[1:].

    Args:
        stack: ``[1 + m, B, C_in, H, W]``, in front of the activation; channels-last slots are not
            copied.
        weight: ``[C_in, C_out, kh, kw]``.
        bias: ``[C_out]`` or None.
        geometry: one that `supports` takes.
        kind: "none", or as in `fastsfvae.ops.tangent_activation.tangent_activation`.
        params: likewise.

    Returns:
        ``[1 + m, B, C_out, OH, OW]``, channels-last, in the stack's dtype or autocast's.

    Raises:
        RuntimeError: a device that Triton cannot reach.
        TypeError: a dtype that the kernels do not take.
        ValueError: float64, an unknown kind or a wrong number of parameters.
    """
    from fastsfvae.kernels.tangent_conv_transpose import tangent_conv_transpose_fwd

    _library.require_triton(stack)
    return tangent_conv_transpose_fwd(
        *(_precision.autocast(stack), weight, bias, kind, params),
        padding=geometry.padding[0],
        output_padding=geometry.output_padding,
        input_precision=_precision.of_convolutions(),
    )


def stack_conv_transpose_backward(
    grad: Tensor,
    stack: Tensor,
    weight: Tensor,
    geometry: Geometry,
    kind: str = "none",
    params: tuple[float, ...] = (),
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Pullback of `stack_conv_transpose`: gradients of the stack, the weight and the bias.

    Args:
        grad: ``[1 + m, B, C_out, OH, OW]``, of its result.
        stack: as in the forward.
        weight: likewise.
        geometry: likewise.
        kind: likewise.
        params: likewise.
        needs: which of the three are wanted; the others are None.

    Returns:
        The stack's gradient, in front of the activation and in the dtype of `grad`, then the
        weight's and the bias's in float32.
    """
    from fastsfvae.kernels.tangent_conv_transpose import tangent_conv_transpose_bwd

    _library.require_triton(grad)
    grad_stack, grad_weight = tangent_conv_transpose_bwd(
        *(grad, stack, weight, kind, params),
        padding=geometry.padding[0],
        needs=needs[:2],
        input_precision=_precision.of_convolutions(),
    )
    return grad_stack, grad_weight, _precision.bias_gradient(grad, 1) if needs[2] else None
