"""What a last layer's values leave of the data, r = x - y, by the launch that makes them.

`_narrow_gemm` has the product. Its values are not written: whoever wants a gradient reads r alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._stack_geometry import Front, doubling
from ._stack_product import product


def takes(data: Tensor, front: Front) -> bool:
    """Whether `residual` does: dense data, and no activation that the layer has to apply first.

    Args:
        data: ``[B, Co, 2H, 2W]``.
        front: of the layer.
    """
    orders = torch.contiguous_format, torch.channels_last
    dense = any(data.is_contiguous(memory_format=order) for order in orders)
    known = data.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return dense and known and (front.applied or front.kind == "none")


def residual(x: Tensor, weight: Tensor, bias: Tensor | None, data: Tensor, front: Front) -> Tensor:
    """Data minus the layer's values, float32 ``[B, Co, 2H, 2W]`` in channels-last order.

    Args:
        x: the values that go into the layer, ``[B, Ci, H, W]``; channels-last ones are not copied.
        weight: ``[Ci, Co <= 4, 4, 4]`` of a transposed convolution with stride 2 and padding 1, in
            the same dtype; likewise.
        bias: ``[Co]`` or None.
        data: ``[B, Co, 2H, 2W]``; what `takes` takes.
        front: of the layer, likewise.
    """
    pixels, taps = (t.permute(0, 2, 3, 1).contiguous() for t in (x, weight))
    shape = data.shape[0], *data.shape[2:], data.shape[1]
    out = torch.empty((1, *shape), dtype=torch.float32, device=x.device)
    product(
        *(pixels[None], taps.flatten(1, 2), doubling(4), (shape[1], shape[2]), front),
        inner_is_input=False,
        bias=bias,
        data=data,
        out=out,
    )
    return out[0].permute(0, 3, 1, 2)
