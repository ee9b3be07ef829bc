"""A convolution of a sweep's stack, fused with the activation in front of it.

As `fastsfvae.ops.tangent_conv_transpose`, where the design is described.
"""

from __future__ import annotations

from torch import Tensor

from fastsfvae.ops import _library, _precision
from fastsfvae.ops.convolution import Geometry


def supports(stack: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether the kernels take a layer; the library's convolution takes all others.

    Args:
        stack: ``[1 + m, B, C_in, H, W]``; only shape and dtype are read.
        weight: ``[C_out, C_in, kh, kw]``; likewise.
        geometry: of the layer.
    """
    g = geometry
    if g.transposed or stack.ndim != 5 or g.groups != 1 or g.dilation != (1, 1):
        return False
    kernel, padding = tuple(weight.shape[2:]), g.padding[0]
    plain = kernel in ((1, 1), (3, 3), (4, 4)) and g.stride == (1, 1) and g.padding[1] == padding
    halves = kernel in ((3, 3), (4, 4)) and g.stride == (2, 2) and g.padding == (1, 1)
    height, width = (size + 2 * padding for size in stack.shape[3:])
    fits = (plain or halves) and min(height, width) >= kernel[0]
    positions = (stack.shape[0], stack.shape[1], height * width)
    return fits and _precision.kernels_take(stack, positions, max(weight.shape[:2]))


def stack_conv(
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
        weight: ``[C_out, C_in, k, k]``.
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
    from fastsfvae.kernels.tangent_conv import tangent_conv_fwd

    _library.require_triton(stack)
    return tangent_conv_fwd(
        *(_precision.autocast(stack), weight, bias, kind, params),
        stride=geometry.stride[0],
        padding=geometry.padding[0],
        input_precision=_precision.of_convolutions(),
    )


def stack_conv_backward(
    grad: Tensor,
    stack: Tensor,
    weight: Tensor,
    geometry: Geometry,
    kind: str = "none",
    params: tuple[float, ...] = (),
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Pullback of `stack_conv`: gradients of the stack, the weight and the bias.

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
    from fastsfvae.kernels.tangent_conv import tangent_conv_bwd

    _library.require_triton(grad)
    grad_stack, grad_weight = tangent_conv_bwd(
        *(grad, stack, weight, kind, params),
        stride=geometry.stride[0],
        padding=geometry.padding[0],
        needs=needs[:2],
        input_precision=_precision.of_convolutions(),
    )
    return grad_stack, grad_weight, _precision.bias_gradient(grad, 1) if needs[2] else None
