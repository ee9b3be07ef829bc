"""Dtypes and float32 products of the layers' fused kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsfvae.ops._gpu import MEASURED, Gpu


def layer_dtype(t: Tensor) -> torch.dtype:
    """The dtype in which the library's products take a tensor; autocast leaves float64 alone."""
    device = t.device.type
    if t.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return t.dtype
    return torch.get_autocast_dtype(device)


def autocast(stack: Tensor) -> Tensor:
    """The stack in the dtype that the library's product would take it in."""
    return stack.to(layer_dtype(stack))


def allows_tf32(operation: str) -> bool:
    """Whether float32 products of a layer may be TF32: cuBLAS's setting, or cuDNN's.

    Args:
        operation: "linear", or a convolution's ATen name.
    """
    # The submodules are made at run time, where a type checker does not see them.
    backends: Any = torch.backends
    setting = backends.cuda.matmul if operation == "linear" else backends.cudnn.conv
    return setting.fp32_precision == "tf32"


def product_of(operation: str, gpu: Gpu | None) -> str:
    """How a layer's kernel multiplies float32 numbers: "tf32", "tf32x3" or "ieee".

    Where TF32 is not allowed, a product is as exact as float32's in either of two ways: plain ones,
    or three TF32 products on the tensor cores, which lose at most the last bit or two. Which one a
    device takes was measured there, or follows from its peaks: data centre cards (sm_80, sm_90)
    have tensor cores enough for three, RTX cards have not.

    Args:
        operation: as in `allows_tf32`.
        gpu: where it runs; None in the interpreter.
    """
    if allows_tf32(operation):
        return "tf32"
    if gpu is None:
        return "ieee"
    if "float32" in MEASURED.get(gpu.name, {}):
        return MEASURED[gpu.name]["float32"]
    return max("ieee", "tf32x3", key=gpu.rate)


def rounded_to_tf32(weight: Tensor) -> Tensor:
    """A dense float32 weight in the numbers that tensor cores read; they cut off all other bits."""
    from fastsfvae.kernels.round_tf32 import round_tf32

    return round_tf32(weight)
