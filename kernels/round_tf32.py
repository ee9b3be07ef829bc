"""Weights in the numbers that tensor cores read: float32 rounded to TF32, once for all products.

Floor: the weight read and written once, 8 bytes an element; a convolution's weight is some hundred
KiB, so the launch itself is what it takes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._blocks import rounded
from ._launch import Configuration, begin, cdiv, launch

# Four elements a thread: one 16-byte access.
_BLOCK, _NUM_WARPS = 512, 4


@triton.jit(do_not_specialize=["numel"])
def _round_tf32_kernel(x_ptr, out_ptr, numel, BLOCK: tl.constexpr):
    begin()
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < numel)
    tl.store(out_ptr + at, rounded(x, "tf32"), mask=at < numel)


def round_tf32(weight: Tensor) -> Tensor:
    """The nearest TF32 numbers, ties away from 0, in float32; NaN and the infinities stay.

    Args:
        weight: float32, dense in any order of its axes, which the result keeps.

    Raises:
        TypeError: another dtype.
    """
    if weight.dtype != torch.float32:
        raise TypeError(f"weight has dtype {weight.dtype}: TF32 is rounded from float32")
    out = torch.empty_like(weight)
    if out.stride() != weight.stride():
        weight = torch.empty_like(out).copy_(weight)
    numel = weight.numel()
    grid = (cdiv(numel, _BLOCK),)
    launch(_round_tf32_kernel, grid, weight, out, numel, BLOCK=_BLOCK, num_warps=_NUM_WARPS)
    return out


def configurations() -> Iterator[Configuration]:
    """The one compilation."""
    types = {"x_ptr": "*fp32", "out_ptr": "*fp32"}
    yield Configuration(_round_tf32_kernel, "", types, {"BLOCK": _BLOCK}, _NUM_WARPS)
