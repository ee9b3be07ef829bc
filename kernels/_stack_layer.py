"""Whole layers of images, forward and backward, on `_stack_product`'s launchers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._contract import dense_slots
from ._launch import check_dtypes
from ._stack_back import both_gradients, takes
from ._stack_geometry import POINTWISE, Front, Geometry
from ._stack_product import product
from ._stack_sums import Partial, Rooms, totals
from ._stack_weight import weight_parts


def layer_fwd(
    geometry: Geometry,
    stack: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_size: tuple[int, ...],
    front: Front,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Values and tangents of a layer: ``[S, B, C_out, OH, OW]`` in channels-last order.

    Args:
        geometry: of the layer.
        stack: ``[S, B, C_in, H, W]``, slot 0 the values, float32, bfloat16 or float16; copied only
            where its slots are not dense in channels-last order: some samples of a larger stack
            are taken where they lie. In front of the activation, or behind it where `front` has it
            applied.
        weight: ``[outer, inner, kh, kw]``; likewise, and converted to the stack's dtype.
        bias: ``[C_out]`` or None, added to the values.
        out_size: ``(OH, OW)``.
        front: of the layer; where it names an activation behind, the result lies behind it.
        out_dtype: of the result: float32 or, like None, the stack's.

    Raises:
        TypeError: another dtype.
        ValueError: an unknown kind, a wrong number of parameters, or a stack behind an activation
            that does not tell its slope by its result.
    """
    check_dtypes(stack=stack)
    x, taps = _slots(stack), _channels_last(weight.to(stack.dtype))
    grid, dense = _grid(geometry, x, out_size), _dense(geometry, taps)
    out = None
    if out_dtype is not None:
        columns = dense.shape[0 if geometry.inner_is_input else 2]
        out = x.new_empty((*x.shape[:2], *grid, columns), dtype=out_dtype)
    y = product(
        *(x, dense, geometry.forward, grid, front),
        inner_is_input=geometry.inner_is_input,
        bias=bias,
        out=out,
    )
    C_out = weight.shape[0 if geometry.inner_is_input else 1]
    return y.view(*x.shape[:2], *out_size, C_out).permute(0, 1, 4, 2, 3)


def layer_bwd(
    geometry: Geometry,
    grad: Tensor,
    stack: Tensor,
    weight: Tensor,
    front: Front,
    needs: tuple[bool, bool, bool] = (True, True, True),
    out: Tensor | None = None,
    rooms: Sequence[Rooms] | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the stack in front of the activation, of the weight and of the bias.

    Args:
        geometry: as in the forward.
        grad: ``[S, B, C_out, OH, OW]``, of the forward's result in front of an activation behind.
        stack: as in the forward.
        weight: as in the forward.
        front: as in the forward.
        needs: which of the three are wanted; the others are None.
        out: where the stack's goes, of its shape, slots dense in channels-last order, in the
            gradient's dtype or float32; None for new memory.
        rooms: for parts of the weight's and, if it has one, the bias's, in channels-last order,
            which are then left there; None for their sums at once.

    Returns:
        The stack's in the gradient's dtype or `out`, the weight's and the bias's in float32, None
        with `rooms`; the first two in channels-last order.

    Raises:
        TypeError, ValueError: as the forward; also of an `out` of another shape, dtype or order.
    """
    check_dtypes(grad=grad)
    x, g = (_slots(t.to(grad.dtype)) for t in (stack, grad))
    taps = _channels_last(weight.to(grad.dtype))
    if out is not None:
        out = out.permute(0, 1, 3, 4, 2)
    (forward, backward, inner_is_input), dense = geometry, _dense(geometry, taps)
    columns, bias = dense.shape[0 if inner_is_input else 2], grad.shape[2]
    g = g.view(*x.shape[:2], *_grid(geometry, x, g.shape[2:4]), columns)
    grad_x = grad_w = grad_b = None
    of_weight, *of_bias = rooms or (Partial(taps.numel(), g.device), Partial(bias, g.device))
    bias_rooms = of_bias[0] if needs[2] else None
    both = all(needs[:2]) and not inner_is_input and takes(backward, x, g, front)
    if both:
        grad_x = both_gradients(x, g, dense, front, rooms=of_weight, bias_rooms=bias_rooms, out=out)
    elif needs[0]:
        grad_x = product(
            *(g, dense, backward, x.shape[2:4], front),
            inner_is_input=not inner_is_input,
            pull=x,
            out=out,
        )
    if not both and any(needs[1:]):
        # The bias's gradient is summed beside the weight's, which is seldom not wanted with it.
        pair = (g, x, forward) if inner_is_input else (x, g, backward)
        weight_parts(
            *(*pair, front),
            on_window=inner_is_input,
            rooms=of_weight,
            bias_size=bias,
            bias_rooms=bias_rooms,
        )
    if any(needs[1:]) and rooms is None:
        summed, grad_b = totals(of_weight, bias_rooms, taps.shape)
        grad_w = summed.permute(0, 3, 1, 2) if needs[1] else None
    return None if grad_x is None else grad_x.permute(0, 1, 4, 2, 3), grad_w, grad_b


def _slots(stack: Tensor) -> Tensor:
    """``[S, B, C, H, W]`` as ``[S, B, H, W, C]`` of dense slots; a copy where they are not."""
    return dense_slots(stack.movedim(2, -1))


def _channels_last(t: Tensor) -> Tensor:
    """``[..., C, H, W]`` as dense ``[..., H, W, C]``; no copy of channels-last storage."""
    return t.movedim(-3, -1).contiguous()


def _dense(geometry: Geometry, taps: Tensor) -> Tensor:
    """[outer, kh, kw, inner] as a product takes it; for a pointwise one [outer, 1, kh kw inner]."""
    return taps.view(len(taps), geometry.forward.kernel**2, -1)


def _grid(geometry: Geometry, x: Tensor, out_size: tuple[int, ...]) -> tuple[int, ...]:
    """Positions of the output; a pointwise product has its input's, and all else as columns."""
    return x.shape[2:4] if geometry.forward == POINTWISE else out_size
