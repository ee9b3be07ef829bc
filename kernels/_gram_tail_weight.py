"""The gradients of a last layer's weight and bias, of what tangents and values give.

    dW = sum_i T'_i dZ_i + x dy      db = sum dy

The tangents' share is made by `gram_tail_backward`, in parts; the values' is a layer's like any
other's, so `_stack_weight` makes it, in parts that lie behind those. One launch adds up all of them
and the bias's, in a fixed order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._launch import device_limits
from ._stack_geometry import Front, window
from ._stack_sums import sum_parts
from ._stack_walk import walk_of
from ._stack_weight import weight_parts

_READS = window(4, stride=2, padding=1)


def parts_of_values(x: Tensor, channels: int, front: Front) -> int:
    """How many parts the values' share has.

    Args:
        x: the layer's input, ``[B, Ci, H, W]``.
        channels: Co.
        front: of the layer.
    """
    B, Ci, H, W = x.shape
    grids = (1, B, H, W, Ci), (1, B, 2 * H, 2 * W, channels)
    walk = walk_of(*grids, x.dtype, _READS, front, device_limits(x), on_window=False)
    return walk.parts


def weight_and_bias(
    parts: Tensor, x: Tensor, grad: Tensor, weight: Tensor, front: Front, has_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """Both gradients, float32, the weight's in its memory order.

    Args:
        parts: of `gram_tail_bwd`, with room for those of `parts_of_values`, ``[P, Ci, 16, Co]``.
        x: the values that go into the layer, ``[B, Ci, H, W]``; channels-last ones are not copied.
        grad: of those that come out of it, ``[B, Co, 2H, 2W]``, in the same dtype; likewise.
        weight: ``[Ci, Co, 4, 4]``.
        front: of the layer.
        has_bias: whether the bias's is wanted; it is None otherwise.
    """
    channels = weight.shape[1]
    own = parts_of_values(x, channels, front)
    pair = (t.permute(0, 2, 3, 1).contiguous()[None] for t in (x, grad))
    _, bias_parts = weight_parts(
        *(*pair, _READS, front),
        on_window=False,
        bias_size=channels if has_bias else 0,
        room=parts[-own:],
    )
    out = torch.empty_like(weight, dtype=torch.float32)
    turned = not out.is_contiguous(memory_format=torch.channels_last)
    if turned and not out.is_contiguous():
        out = torch.empty_like(out, memory_format=torch.contiguous_format)
    return sum_parts(parts, bias_parts, out, turned=turned)
