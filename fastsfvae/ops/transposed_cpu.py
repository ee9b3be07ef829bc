"""Transposed convolutions at a decoder's ends, in the form that a CPU does fastest.

Where the input is 1 x 1 the layer is a matrix product, ``[N, C_in] @ [C_in, kh kw C_out]``, whose
result already lies in channels-last order.

Where few channels come out (the image's), the library's forward has too little to vectorise over.
Tap k of input row i lands on output row s i + k - p = s j + q. So the s x s output phases q are
channels of an ordinary 3 x 3 convolution, provided that the steps j - i stay within one, and are
interleaved afterwards: 2.25 times the multiplications of kernel 4 and stride 2, in a third of the
time. The library's backward is fast as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from fastsfvae.ops.convolution import Geometry

_FEW_CHANNELS = 4


def _is_plain(x: Tensor, weight: Tensor, g: Geometry) -> bool:
    plain = g.transposed and g.groups == 1 and g.dilation == (1, 1) and weight.device.type == "cpu"
    exact = weight.dtype in (torch.float32, torch.float64) and x.dtype == weight.dtype
    return plain and exact and not torch.is_autocast_enabled("cpu")


def is_product(x: Tensor, weight: Tensor, g: Geometry) -> bool:
    """Whether `product` and `product_backward` apply."""
    whole = g.padding == (0, 0) and g.output_padding == (0, 0)
    return whole and x.shape[2:] == (1, 1) and _is_plain(x, weight, g)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """``[N, C_in, 1, 1] -> [N, C_out, kh, kw]``."""
    y = x.flatten(1) @ _taps_last(weight)
    return y.view(len(x), *weight.shape[2:], weight.shape[1]).permute(0, 3, 1, 2)


def product_backward(
    grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of `product` in x and in the weight, None where `needs` is False."""
    columns = grad.permute(0, 2, 3, 1).reshape(len(x), -1)
    grad_x = (columns @ _taps_last(weight).t()).view_as(x) if needs[0] else None
    if not needs[1]:
        return grad_x, None
    shape = len(weight), *weight.shape[2:], weight.shape[1]
    return grad_x, (x.flatten(1).t() @ columns).view(shape).permute(0, 3, 1, 2)


def _taps_last(weight: Tensor) -> Tensor:
    """[C_in, kh kw C_out], a view of channels-last storage."""
    return weight.permute(0, 2, 3, 1).reshape(len(weight), -1)


def has_phases(x: Tensor, weight: Tensor, g: Geometry) -> bool:
    """Whether `by_phases` applies: few channels, s times the input's extent, steps within one."""
    if not _is_plain(x, weight, g) or weight.shape[1] > _FEW_CHANNELS or max(g.stride) < 2:
        return False
    sizes = zip(weight.shape[2:], g.stride, g.padding, g.output_padding, strict=True)
    return all(k - 2 * p + more == s and p <= s and k - p <= 2 * s for k, s, p, more in sizes)


def by_phases(x: Tensor, weight: Tensor, g: Geometry) -> Tensor:
    """``[N, C_in, H, W] -> [N, C_out, s H, s W]``, channels-last."""
    n, inputs, height, width = x.shape
    (sy, sx), channels = g.stride, weight.shape[1]
    packed = weight.new_zeros((sy, sx, channels, inputs, 3, 3))
    for ky in range(weight.shape[2]):
        step_y, qy = divmod(ky - g.padding[0], sy)
        for kx in range(weight.shape[3]):
            step_x, qx = divmod(kx - g.padding[1], sx)
            packed[qy, qx, :, :, 1 - step_y, 1 - step_x] = weight[:, :, ky, kx].t()
    kernel = packed.flatten(0, 2).contiguous(memory_format=torch.channels_last)
    phases = F.conv2d(x, kernel, padding=1).permute(0, 2, 3, 1)
    apart = phases.reshape(n, height, width, sy, sx * channels)
    rows = apart.transpose(2, 3).reshape(n, sy * height, sx * width, channels)
    return rows.permute(0, 3, 1, 2)
