"""Transposed convolutions at a decoder's ends, in forms that are faster than the library's own.

Where the input is 1 x 1 the layer is a matrix product, ``[N, C_in] @ [C_in, kh kw C_out]``, whose
result already lies in channels-last order. So it is on every device and in every dtype.

With kernel s t and stride s, output o = s P + q of the layer without padding reads the t inputs at
P - t + 1 .. P, whatever its phase q. So the s x s phases are channels of an ordinary t x t
convolution, which are interleaved and then cropped by the padding. A CPU takes that form where few
channels come out (the image's), as the library's forward has too little to vectorise over. Its
backward is fast as it is, and so is its forward in float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsfvae.ops._geometry import Geometry
from fastsfvae.ops._precision import allows_tf32, layer_dtype

_FEW_CHANNELS = 4


def _is_plain(x: Tensor, weight: Tensor, g: Geometry) -> bool:
    plain = g.transposed and g.groups == 1 and g.dilation == (1, 1) and weight.is_floating_point()
    # The library says so where they differ.
    return plain and layer_dtype(x) == layer_dtype(weight)


def is_product(x: Tensor, weight: Tensor, g: Geometry) -> bool:
    """Whether `product` and `product_backward` apply."""
    whole = g.padding == (0, 0) and g.output_padding == (0, 0)
    if not whole or x.shape[2:] != (1, 1) or not _is_plain(x, weight, g):
        return False
    if not x.is_cuda or layer_dtype(x) != torch.float32:
        return True
    # Products of matrices may be allowed fewer digits than convolutions are.
    return allows_tf32("conv_transpose2d") or not allows_tf32("linear")


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
    """Whether `by_phases` applies, as the stride divides the kernel, and pays."""
    if not weight.is_cpu or not _is_plain(x, weight, g) or layer_dtype(x) == torch.float64:
        return False
    if weight.shape[1] > _FEW_CHANNELS or max(g.stride) < 2:
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
