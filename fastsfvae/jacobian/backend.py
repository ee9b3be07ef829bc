"""Which implementation runs: the choice behind every `backend` argument."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from fastsfvae import _checks


def resolve_backend(backend: str, tensor: Tensor) -> str:
    """Resolve "auto" for a tensor and refuse what cannot run.

    Args:
        backend: "auto", "torch", "triton" or "reference".
        tensor: decides by its device and dtype.

    Returns:
        "torch", "triton" or "reference". "auto" is "triton" on CUDA where Triton can be imported
        and the dtype is not float64, and "torch" elsewhere. An explicit choice never falls back.

    Raises:
        ValueError: an unknown backend, or "triton" with float64.
        RuntimeError: "triton" on the CPU without the interpreter.
    """
    _checks.choice("backend", backend, _checks.BACKENDS)
    if backend == "auto":
        able = tensor.is_cuda and tensor.dtype != torch.float64
        return "triton" if able and _triton_installed() else "torch"
    if backend == "triton":
        from fastsfvae.ops._library import require_triton

        require_triton(tensor)
    return backend


def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
