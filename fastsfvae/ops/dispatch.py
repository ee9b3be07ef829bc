"""Which implementation a layer's tangents take: a fused Triton kernel, or the library's product.

A fused kernel saves a pass over the layer's result, which the library's product followed by the
activation writes, reads and writes again; the library's product is the better one where arithmetic
and not memory sets the time. Where a layer was measured on the device at hand, the faster one is
taken. Elsewhere a model decides, and says so: fused where the layer's FLOPs take less time at the
device's peak than its bytes at its bandwidth.

Nothing was measured on a GPU yet.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

ENVIRONMENT = "FASTSFVAE_FUSED"
SETTINGS = ("auto", "always", "never")

# Device name -> (operation, input, weight, dtype) -> "fused" or "library", as measured there.
MEASURED: dict[str, dict[tuple, str]] = {}

# FLOPs a clock of one multiprocessor: dense bfloat16 products on the tensor cores with float32
# sums (TF32 has half), and plain float32, by compute capability; from the vendor's data sheets.
_TENSOR_RATE = {80: 2048, 86: 512, 89: 512, 90: 4096, 100: 8192, 120: 512}
_PLAIN_RATE = {80: 128, 86: 256, 89: 256, 90: 256, 100: 256, 120: 256}


class Choice(NamedTuple):
    """An implementation, "fused" or "library", and why."""

    how: str
    why: str


class Device(NamedTuple):
    """What the model knows of a device.

    Attributes:
        name: as the driver gives it.
        capability: 86 for 8.6.
        clocks: of all multiprocessors together, a second.
        bandwidth: of its memory, bytes a second.
    """

    name: str
    capability: int
    clocks: float
    bandwidth: float


@functools.cache
def _cuda_device(index: int) -> Device:
    found = torch.cuda.get_device_properties(index)
    # The driver gives kHz, and bits that are moved twice a clock.
    return Device(
        name=found.name,
        capability=10 * found.major + found.minor,
        clocks=found.multi_processor_count * found.clock_rate * 1e3,
        bandwidth=2 * found.memory_clock_rate * 1e3 * found.memory_bus_width / 8,
    )


def choose(
    operation: str,
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    out_shape: Sequence[int],
    *,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    setting: str | None = None,
) -> str:
    """`decide`'s "fused" or "library" alone."""
    return decide(
        *(operation, x_shape, weight_shape, out_shape),
        backend=backend, device=device, dtype=dtype, setting=setting,
    ).how  # fmt: skip


def decide(
    operation: str,
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    out_shape: Sequence[int],
    *,
    backend: str,
    device: torch.device | Device,
    dtype: torch.dtype,
    setting: str | None = None,
) -> Choice:
    """How a layer runs that a fused kernel supports, and why.

    Args:
        operation: the ATen name, such as "conv_transpose2d" or "linear".
        x_shape: of the stack of values and tangents as one batch, ``[N, C_in, ...]``.
        weight_shape: of the layer's weight.
        out_shape: of its result, ``[N, C_out, ...]``.
        backend: "torch" or "triton".
        device: where it runs.
        dtype: of values and tangents.
        setting: "auto", "always" or "never"; None reads it from $FASTSFVAE_FUSED, where "auto" is
            the default.

    Raises:
        ValueError: an unknown setting.
    """
    setting, source = _setting(setting)
    if backend != "triton":
        return Choice("library", f'backend="{backend}"')
    cuda = device if isinstance(device, Device) else _properties(device)
    if cuda is not None and cuda.capability < 80:
        return Choice("library", "no tensor cores in Triton's code for this device")
    if setting != "auto":
        return Choice("fused" if setting == "always" else "library", source)
    if cuda is None:
        return Choice("library", "the interpreter is slow")
    key = (operation, tuple(x_shape), tuple(weight_shape), dtype)
    if key in MEASURED.get(cuda.name, {}):
        return Choice(MEASURED[cuda.name][key], f"measured on {cuda.name}")
    return _modelled(operation, x_shape, weight_shape, out_shape, cuda, dtype)


def _setting(given: str | None) -> tuple[str, str]:
    setting, source = given, f"setting={given!r}"
    if setting is None:
        setting = os.environ.get(ENVIRONMENT) or "auto"
        source = f"{ENVIRONMENT}={setting}"
    if setting not in SETTINGS:
        raise ValueError(f"{source} is not one of {', '.join(SETTINGS)}")
    return setting, source


def _properties(device: torch.device) -> Device | None:
    if device.type != "cuda":
        return None
    return _cuda_device(torch.cuda.current_device() if device.index is None else device.index)


def _modelled(
    operation: str,
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    out_shape: Sequence[int],
    device: Device,
    dtype: torch.dtype,
) -> Choice:
    x, weight, out = math.prod(x_shape), math.prod(weight_shape), math.prod(out_shape)
    # The weight's first axis counts inputs where it is transposed, and outputs elsewhere.
    per_first = x if operation.startswith("conv_transpose") else out
    flops = 2 * per_first * weight // weight_shape[0]
    intensity = flops / ((x + weight + out) * dtype.itemsize)
    ridge = _rate(operation, device, dtype) * device.clocks / device.bandwidth
    how, relation = ("fused", "below") if intensity < ridge else ("library", "above")
    return Choice(how, f"model: {intensity:.0f} FLOP/byte, {relation} {ridge:.0f}; not measured")


def _rate(operation: str, device: Device, dtype: torch.dtype) -> int:
    """FLOPs a clock of one multiprocessor; an unknown device counts as the newest known."""
    known = max(c for c in _TENSOR_RATE if c <= device.capability)
    if dtype != torch.float32:
        return _TENSOR_RATE[known]
    # The submodule is made at run time, where a type checker does not see it.
    backends: Any = torch.backends
    settings = backends.cuda.matmul if operation == "linear" else backends.cudnn.conv
    tf32 = settings.fp32_precision == "tf32"
    return max(_PLAIN_RATE[known], _TENSOR_RATE[known] // 2 if tf32 else 0)
