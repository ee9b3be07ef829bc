"""Dtypes and float32 products of the layers' fused kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def autocast(stack: Tensor) -> Tensor:
    """The stack in the dtype that the library's product would take it in."""
    device = stack.device.type
    if not torch.is_autocast_enabled(device):
        return stack
    return stack.to(torch.get_autocast_dtype(device))


def of_convolutions() -> str:
    """The kernels' float32 products, as cuDNN's convolutions have them set."""
    return _input_precision("cudnn", "conv")


def of_products() -> str:
    """The kernels' float32 products, as cuBLAS has them set."""
    return _input_precision("cuda", "matmul")


def _input_precision(backend: str, operation: str) -> str:
    # The submodules are made at run time, where a type checker does not see them.
    backends: Any = torch.backends
    setting = getattr(getattr(backends, backend), operation).fp32_precision
    return "tf32" if setting == "tf32" else "ieee"


def bias_gradient(grad: Tensor, axis: int) -> Tensor:
    """The sum of the values' gradient, slot 0, over all axes but `axis`; float32."""
    value = grad[0]
    others = [i for i in range(value.ndim) if i != axis % value.ndim]
    return value.sum(others, dtype=torch.float32)
