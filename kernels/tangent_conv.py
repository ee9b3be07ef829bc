"""A convolution of a stack of values and tangents, behind an activation.

Square kernels 1, 3 and 4 with stride 1 and any padding; kernels 3 and 4 with stride 2 and padding
1. `_implicit_gemm` has the formulas and the kernels, and the floor for any layer.

Floor, 32 -> 32 channels at 32 x 32, kernel 3, a chunk of 64 samples and 16 tangents, bfloat16: X
and Y are 71 MB each, so each of the three passes moves 143 MB and does 20.5 GFLOP, 144 a byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ._launch import Configuration
from ._stack_geometry import Front, Geometry, doubling, mirrored, window
from ._stack_layer import layer_bwd, layer_fwd
from ._stack_product import audited
from ._stack_sums import Rooms


def geometry(kernel: int, stride: int, padding: int) -> Geometry:
    """Of the layer, by what both axes have."""
    backward = mirrored(kernel, padding) if stride == 1 else doubling(kernel)
    return Geometry(window(kernel, stride, padding), backward, inner_is_input=True)


def tangent_conv_fwd(
    stack: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    front: Front,
    *,
    stride: int = 1,
    padding: int = 0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`layer_fwd` of a stack ``[S, B, C_in, H, W]`` and a weight ``[C_out, C_in, k, k]``."""
    k = weight.shape[-1]
    size = tuple((extent + 2 * padding - k) // stride + 1 for extent in stack.shape[3:])
    of = geometry(k, stride, padding)
    return layer_fwd(of, stack, weight, bias, size, front, out_dtype)


def tangent_conv_bwd(
    grad: Tensor,
    stack: Tensor,
    weight: Tensor,
    front: Front,
    *,
    stride: int = 1,
    padding: int = 0,
    needs: tuple[bool, bool, bool] = (True, True, True),
    out: Tensor | None = None,
    rooms: Sequence[Rooms] | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`layer_bwd` of the same."""
    of = geometry(weight.shape[-1], stride, padding)
    return layer_bwd(of, grad, stack, weight, front, needs, out, rooms)


def configurations() -> Iterator[Configuration]:
    """Compilations of both strides; kernel and padding change addresses only."""
    yield from audited("conv 3/1", geometry(3, stride=1, padding=1))
    yield from audited("conv 4/2", geometry(4, stride=2, padding=1))
