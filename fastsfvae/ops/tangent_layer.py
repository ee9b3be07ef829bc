"""Layers of a sweep's stack, each fused with the activation in front of it.

The kernels keep no result of the activation: they take the stack that goes into it, apply it as
they load, and pull gradients back through it as they store. No autograd and no compiler sees these
functions, so they call the launchers themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastsfvae.ops import _library, _precision
from fastsfvae.ops._geometry import Geometry

if TYPE_CHECKING:
    from fastsfvae.kernels._stack_geometry import Front
    from fastsfvae.kernels._stack_sums import Rooms

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Positions of a stack, and elements of a sample, are counted in int32 up to a block beyond the end.
_COUNTED = 2**31 - 2**16


class Layer(NamedTuple):
    """A layer and the activations around it.

    Attributes:
        geometry: of a convolution or its transpose; None of a linear layer.
        kind: in front: "none", or as in `fastsfvae.ops.tangent_activation.tangent_activation`.
        params: likewise.
        product: of float32 numbers: "ieee", "tf32x3" or "tf32".
        applied: whether the layer in front has applied that activation, whose slope is told by its
            result; gradients are pulled through it all the same.
        behind: the activation that this layer applies to its result, "none" or one whose result
            tells its slope; whoever reads the result pulls gradients through it.
        behind_params: likewise.
        rounded: whether what makes the stack rounds it to TF32, if products are TF32's.
        grad_rounded: likewise the gradient of the result.
    """

    geometry: Geometry | None = None
    kind: str = "none"
    params: tuple[float, ...] = ()
    product: str = "ieee"
    applied: bool = False
    behind: str = "none"
    behind_params: tuple[float, ...] = ()
    rounded: bool = False
    grad_rounded: bool = False

    @property
    def front(self) -> Front:
        """All but the geometry, as the launchers take it."""
        from fastsfvae.kernels._stack_geometry import Front

        return Front(
            *(self.kind, self.params, self.product),
            *(self.applied, self.behind, self.behind_params),
            *(self.rounded, self.grad_rounded),
        )


def largest_batch(
    layer: Layer,
    slots: int,
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    dtype: torch.dtype,
) -> int:
    """How many samples one call takes at most; 0 where only the library can take the layer.

    Args:
        layer: its geometry alone matters.
        slots: of the stack, 1 + m.
        x_shape: of one sample, ``[*, C_in]`` for a linear layer and ``[C_in, H, W]`` elsewhere.
        weight_shape: as in `stack_layer`.
        dtype: of the stack.
    """
    positions = _positions(layer.geometry, tuple(x_shape), tuple(weight_shape))
    sample = positions * max(weight_shape[:2])
    if dtype not in _DTYPES or not 0 < sample < _COUNTED:
        return 0
    return (_COUNTED - 1) // (slots * positions)


def _positions(g: Geometry | None, x_shape: tuple[int, ...], weight_shape: tuple[int, ...]) -> int:
    """Positions of one sample on the layer's larger side; 0 where no kernel has its geometry."""
    if g is None:
        return math.prod(x_shape[:-1])
    if len(x_shape) != 3 or g.groups != 1 or g.dilation != (1, 1):
        return 0
    (height, width), kernel, padding = x_shape[1:], weight_shape[2:], g.padding[0]
    square = kernel[0] == kernel[1]
    halves = square and kernel[0] in (3, 4) and g.stride == (2, 2) and g.padding == (1, 1)
    if g.transposed:
        if (height, width) == (1, 1) and g.padding == (0, 0) and g.output_padding == (0, 0):
            return kernel[0] * kernel[1]
        # With output padding, one row and column more than twice the input's.
        return (2 * height + 1) * (2 * width + 1) if halves else 0
    plain = square and kernel[0] in (1, 3, 4) and g.stride == (1, 1) and g.padding[1] == padding
    height, width = height + 2 * padding, width + 2 * padding
    return height * width if (plain or halves) and min(height, width) >= kernel[0] else 0


def stack_layer(
    layer: Layer,
    stack: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The layer on phi(stack[0]), and on the tangents that phi makes of stack[1:].

    Args:
        layer: one that `largest_batch` takes.
        stack: in front of the activation: ``[1 + m, B, *, C_in]`` for a linear layer, elsewhere
            ``[1 + m, B, C_in, H, W]``, where channels-last slots are not copied, be they those of
            some samples of a larger stack.
        weight: ``[C_out, C_in]``, ``[C_out, C_in, k, k]`` of a convolution or
            ``[C_in, C_out, kh, kw]`` of a transposed one.
        bias: ``[C_out]`` or None.
        out_dtype: of the result: float32, or None for that of the products.

    Returns:
        ``[1 + m, B, *, C_out]``, or ``[1 + m, B, C_out, OH, OW]`` in channels-last order; in the
        stack's dtype or autocast's unless `out_dtype` says otherwise.

    Raises:
        RuntimeError: a device that Triton cannot reach.
        TypeError: a dtype that the kernels do not take.
        ValueError: float64, an unknown kind or a wrong number of parameters.
    """
    _library.require_triton(stack)
    forward, _ = _launchers(layer.geometry)
    options = _options(layer.geometry)
    if layer.geometry is not None and layer.geometry.transposed:
        options["output_padding"] = layer.geometry.output_padding
    stack = _precision.autocast(stack)
    return forward(stack, weight, bias, layer.front, out_dtype=out_dtype, **options)


def stack_layer_backward(
    layer: Layer,
    grad: Tensor,
    stack: Tensor,
    weight: Tensor,
    needs: tuple[bool, bool, bool] = (True, True, True),
    out: Tensor | None = None,
    rooms: Sequence[Rooms] | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Pullback of `stack_layer`: gradients of the stack, the weight and the bias.

    Args:
        layer: as in the forward.
        grad: of its result.
        stack: as in the forward.
        weight: likewise.
        needs: which of the three are wanted; the others are None.
        out: where the stack's goes, of its shape, its slots dense in channels-last order, in the
            dtype of `grad` or float32; None for new memory.
        rooms: of `PartialSums`, for parts of the weight's and the bias's; None for their sums at
            once.

    Returns:
        The stack's gradient, in front of the activation and in the dtype of `grad` or of `out`,
        then the weight's and the bias's in float32, None with `rooms`.
    """
    _library.require_triton(grad)
    _, backward = _launchers(layer.geometry)
    options = _options(layer.geometry)
    given = grad, stack, weight, layer.front
    return backward(*given, needs=needs, out=out, rooms=rooms, **options)


def _launchers(g: Geometry | None) -> tuple[Callable[..., Any], Callable[..., Any]]:
    # Late, as every kernel: `import fastsfvae` needs no Triton.
    if g is None:
        from fastsfvae.kernels import tangent_linear

        return tangent_linear.tangent_linear_fwd, tangent_linear.tangent_linear_bwd
    if g.transposed:
        from fastsfvae.kernels import tangent_conv_transpose as transposed

        return transposed.tangent_conv_transpose_fwd, transposed.tangent_conv_transpose_bwd
    from fastsfvae.kernels import tangent_conv

    return tangent_conv.tangent_conv_fwd, tangent_conv.tangent_conv_bwd


def _options(g: Geometry | None) -> dict[str, Any]:
    """What either half of a launcher is told of the geometry besides the weight's shape."""
    if g is None:
        return {}
    return {"padding": g.padding[0]} | ({} if g.transposed else {"stride": g.stride[0]})
