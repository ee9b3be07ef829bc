"""Transposed convolutions at a decoder's ends, in the form that a CPU does fastest.

Where the input is 1 x 1 the layer is a matrix product, ``[N, C_in] @ [C_in, kh kw C_out]``, whose
result already lies in channels-last order.

Where few channels come out (the image's), the library's forward has too little to vectorise over.
With kernel s t and stride s, output o = s P + q of the layer without padding reads the t inputs at
P - t + 1 .. P, whatever its phase q. So the s x s phases are channels of an ordinary t x t
convolution, which are interleaved and then cropped by the padding. The library's backward is fast
as it is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsfvae.ops._geometry import Geometry

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
    """Whether `by_phases` applies: few channels come out, the stride divides the kernel."""
    if not _is_plain(x, weight, g) or weight.shape[1] > _FEW_CHANNELS or max(g.stride) < 2:
        return False
    sizes = zip(weight.shape[2:], g.stride, g.padding, g.output_padding, strict=True)
    return all(k % s == 0 and more <= p for k, s, p, more in sizes)


def by_phases(x: Tensor, weight: Tensor, g: Geometry) -> Tensor:
    """``[N, C_in, H, W] -> [N, C_out, H', W']``, channels-last."""
    (sy, sx), (ci, co, ky, kx) = g.stride, weight.shape
    ty, tx = ky // sy, kx // sx
    taps = weight.reshape(ci, co, ty, sy, tx, sx).flip(2, 4).permute(3, 5, 1, 0, 2, 4)
    kernel = taps.reshape(-1, ci, ty, tx).contiguous(memory_format=torch.channels_last)
    phases = F.conv2d(x, kernel, padding=(ty - 1, tx - 1)).permute(0, 2, 3, 1)
    n, height, width, _ = phases.shape
    apart = phases.reshape(n, height, width, sy, sx * co).transpose(2, 3)
    whole = apart.reshape(n, sy * height, sx * width, co)
    ends = zip(whole.shape[1:3], g.padding, g.output_padding, strict=True)
    rows, columns = (slice(p, size - p + more) for size, p, more in ends)
    return whole[:, rows, columns].contiguous().permute(0, 3, 1, 2)
