"""A convolution without bias and its two gradients, on [N, C, *space], outside autograd.

Values and tangents of a chunk come here as one batch. Each product goes to the library's own
convolution, except where another form of the same work is faster.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsfvae.ops import transposed_forms as forms
from fastsfvae.ops._geometry import Geometry as Geometry

_LIBRARY = (F.conv1d, F.conv2d, F.conv3d)
_LIBRARY_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


def convolve(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """``[N, C_in, *space] -> [N, C_out, *other space]``; autocasts as the library does."""
    if forms.is_product(x, weight, geometry):
        return forms.product(x, weight)
    if forms.has_phases(x, weight, geometry):
        return forms.by_phases(x, weight, geometry)
    stride, padding, dilation, groups, transposed, output_padding = geometry
    spatial = len(stride) - 1
    if transposed:
        options = stride, padding, output_padding, groups, dilation
        return _LIBRARY_TRANSPOSED[spatial](x, weight, None, *options)
    return _LIBRARY[spatial](x, weight, None, stride, padding, dilation, groups)


def convolve_backward(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of `convolve` in x and in the weight, None where `needs` is False."""
    x, weight = x.to(grad.dtype), weight.to(grad.dtype)
    if forms.is_product(x, weight, geometry):
        return forms.product_backward(grad, x, weight, needs)
    stride, padding, dilation, groups, transposed, output_padding = geometry
    if groups > 1 and x.is_contiguous():
        # One position may have channels-last strides as well, at which PyTorch 2.14's own fails.
        x = x.view(-1).view(x.shape)
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        *(grad, x, weight, None, stride, padding, dilation, transposed, output_padding, groups),
        [*needs, False],
    )
    return (grad_x if needs[0] else None), (grad_weight if needs[1] else None)
