"""Small tensors of fixed numbers, made once a device: a step need not fill them again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

# The number of different ones that are kept; more are made anew.
_MOST = 256
_kept: dict[tuple, Tensor] = {}


def full(shape: tuple[int, ...], value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.full`, of a tensor that nobody may write to."""
    make = lambda: torch.full(shape, value, dtype=dtype, device=device)  # noqa: E731
    return _once(device, ("full", tuple(shape), value, dtype), make)


def eye(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.eye`, likewise."""
    make = lambda: torch.eye(size, dtype=dtype, device=device)  # noqa: E731
    return _once(device, ("eye", size, dtype), make)


def _once(device: torch.device, what: tuple, make: Callable[[], Tensor]) -> Tensor:
    # What is made inside of these is theirs: symbols, wrappers, stand-ins.
    inside = (
        torch.compiler.is_compiling()
        or _get_current_dispatch_mode() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.is_inference_mode_enabled()
    )
    if inside:
        return make()
    key = device, *what
    if key not in _kept:
        on_gpu = device.type == "cuda"
        # What a graph fills belongs to its memory.
        if len(_kept) >= _MOST or (on_gpu and torch.cuda.is_current_stream_capturing()):
            return make()
        _kept[key] = make()
        if on_gpu:
            # Whoever reads it may do so on another stream.
            torch.cuda.current_stream(device).synchronize()
    return _kept[key]
