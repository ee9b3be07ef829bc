"""The gradients of a last layer's weight and bias, of what tangents and values give.

    dW = sum_i T'_i dZ_i + x dy      db = sum dy

The tangents' share is made by `gram_tail_backward`, in parts; the values' is a layer's like any
other's, so `_stack_weight` makes it, in parts that lie behind those.
"""

from __future__ import annotations

from torch import Tensor

from ._launch import device_limits
from ._stack_geometry import Front, window
from ._stack_sums import Room, Rooms
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


def leave_values(
    room: Room, x: Tensor, grad: Tensor, front: Front, bias_rooms: Rooms | None
) -> None:
    """Leave the values' share of both.

    Args:
        room: of `gram_tail_bwd`, with parts of `parts_of_values` behind its own.
        x: the values that go into the layer, ``[B, Ci, H, W]``; channels-last ones are not copied.
        grad: of those that come out of it, ``[B, Co, 2H, 2W]``, in the same dtype; likewise.
        front: of the layer.
        bias_rooms: for the bias's; None where it is not wanted.
    """
    pair = (t.permute(0, 2, 3, 1).contiguous()[None] for t in (x, grad))
    weight_parts(
        *(*pair, _READS, front),
        on_window=False,
        rooms=lambda count: Room(room.parts[-count:], room.filled),
        bias_size=grad.shape[1],
        bias_rooms=bias_rooms,
    )
