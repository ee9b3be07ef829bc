"""A linear layer on a stack of values and tangents, behind an activation.

`_implicit_gemm` has the formulas and the kernels.

Floor, mnist2's 256 -> 512 features with a chunk of 64 samples and 2 tangents, float32: X, Y and the
weight are 0.2, 0.4 and 0.5 MB and a pass does 50 MFLOP: less than a launch takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ._contract import dense_slots
from ._launch import Configuration
from ._stack_geometry import POINTWISE, Front, Geometry
from ._stack_layer import layer_bwd, layer_fwd
from ._stack_product import audited
from ._stack_sums import Rooms

_GEOMETRY = Geometry(POINTWISE, POINTWISE, inner_is_input=True)


def tangent_linear_fwd(
    stack: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    front: Front,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`layer_fwd` of a stack ``[S, B, *, C_in]`` and a weight ``[C_out, C_in]``.

    Returns:
        ``[S, B, *, C_out]``.
    """
    images = _pixels(stack), _one_tap(weight)
    y = layer_fwd(_GEOMETRY, *images, bias, (1, 1), front, out_dtype)
    return y.view(*stack.shape[:-1], len(weight))


def tangent_linear_bwd(
    grad: Tensor,
    stack: Tensor,
    weight: Tensor,
    front: Front,
    *,
    needs: tuple[bool, bool, bool] = (True, True, True),
    out: Tensor | None = None,
    rooms: Sequence[Rooms] | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`layer_bwd` of the same, each gradient in its tensor's shape; an `out` of dense slots."""
    images = _pixels(grad), _pixels(stack), _one_tap(weight)
    into = None if out is None else out.view(images[1].shape)
    *found, grad_b = layer_bwd(_GEOMETRY, *images, front, needs, into, rooms)
    grad_x, grad_w = (
        None if g is None else g.view(t.shape) for g, t in zip(found, (stack, weight), strict=True)
    )
    return grad_x, grad_w, grad_b


def _pixels(stack: Tensor) -> Tensor:
    """[S, B, *, C] as [S, B *, C, 1, 1]."""
    C = stack.shape[-1]
    return dense_slots(stack).view(len(stack), stack.shape[1:-1].numel(), C, 1, 1)


def _one_tap(weight: Tensor) -> Tensor:
    return weight[..., None, None]


def configurations() -> Iterator[Configuration]:
    """Compilations of the widest blocks, which narrower layers do not outgrow."""
    yield from audited("linear", _GEOMETRY)
