"""A transposed convolution of a stack of values and tangents, behind an activation.

Two geometries: stride 2 and padding 1 with kernel 3 or 4, and any kernel on a 1 x 1 input without
padding, which is a linear layer with kh * kw * C_out outputs. `_implicit_gemm` has the formulas and
the kernels.

Floor, celeba16's 64 -> 32 channels from 8 x 8 to 16 x 16, a chunk of 64 samples, bfloat16: X and Y
are 8.9 and 17.8 MB, so each of the three passes moves 27 MB and does 4.6 GFLOP, 170 a byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ._launch import Configuration
from ._stack_geometry import POINTWISE, Front, Geometry, doubling, window
from ._stack_layer import layer_bwd, layer_fwd
from ._stack_product import EVERY, PRODUCTS, audited
from ._stack_sums import Rooms


def geometry(kernel: int, padding: int) -> Geometry:
    """Of the layer that doubles the size, with padding 1; of the one on a single pixel, with 0."""
    forward, backward = doubling(kernel), window(kernel, stride=2, padding=1)
    if padding == 0:
        forward = backward = POINTWISE
    return Geometry(forward, backward, inner_is_input=False)


def tangent_conv_transpose_fwd(
    stack: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    front: Front,
    *,
    padding: int = 1,
    output_padding: tuple[int, int] = (0, 0),
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`layer_fwd` of a stack ``[S, B, C_in, H, W]`` and a weight ``[C_in, C_out, kh, kw]``.

    Args:
        stack: values and tangents.
        weight: of the layer.
        bias: ``[C_out]`` or None.
        front: of the layer.
        padding: 1, where the stride is 2; or 0, where the input is 1 x 1.
        output_padding: rows and columns that the layer adds at the end; none with padding 0.
        out_dtype: of the result: float32 or, like None, the stack's.
    """
    axes = zip(stack.shape[3:], weight.shape[2:], output_padding, strict=True)
    # The stride does not count where the input is 1 x 1.
    size = tuple(2 * (extent - 1) - 2 * padding + k + more for extent, k, more in axes)
    of = geometry(weight.shape[-1], padding)
    return layer_fwd(of, stack, weight, bias, size, front, out_dtype)


def tangent_conv_transpose_bwd(
    grad: Tensor,
    stack: Tensor,
    weight: Tensor,
    front: Front,
    *,
    padding: int = 1,
    needs: tuple[bool, bool, bool] = (True, True, True),
    out: Tensor | None = None,
    rooms: Sequence[Rooms] | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`layer_bwd` of the same."""
    of = geometry(weight.shape[-1], padding)
    return layer_bwd(of, grad, stack, weight, front, needs, out, rooms)


def configurations() -> Iterator[Configuration]:
    """Every compilation of kernel 4, stride 2, and of a decoder's first and last layer."""
    yield from audited("deconv 4/2", geometry(4, padding=1), variants=EVERY)
    # The last layers of a few samples at a time.
    few = [(*product, "relu", 32, 32) for product in PRODUCTS if product[1] == "tf32"]
    yield from audited("deconv 4/2 apart", geometry(4, padding=1), variants=few, apart=True)
    first = [(*product, "relu", 256, 1024) for product in PRODUCTS]
    yield from audited("first 4/1", geometry(4, padding=0), variants=first)
    last = [(*product, "relu", channels, 3) for product in PRODUCTS for channels in (3, 32)]
    yield from audited(
        *("last 4/2", geometry(4, padding=1)),
        **{"variants": last, "out_dtype": torch.float32, "data": ("first",)},
    )
