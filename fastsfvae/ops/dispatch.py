"""Which implementation a layer's tangents take: a fused Triton kernel, or the library's product.

A fused kernel saves the pass of the activation in front, which reads and writes all that goes into
the layer; the library's product is the better one where there is none, and where arithmetic and not
memory sets the time. Where a layer was measured on the device at hand, the faster one is taken.
Elsewhere a model decides, and says so: fused where the layer's FLOPs take less time at the device's
peak than its bytes at its bandwidth.

The choice does not depend on the batch size: a decoder's plan serves all of them, whichever came
first, and gives the same bits.

Nothing was measured on a GPU yet.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import NamedTuple

import torch

from fastsfvae.ops import _precision

ENVIRONMENT = "FASTSFVAE_FUSED"
SETTINGS = ("auto", "always", "never")
_forced: ContextVar[str | None] = ContextVar("fused_layers", default=None)

# Device name -> (operation, one sample's input, weight, dtype) -> "fused" or "library", as measured
# there.
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


@contextlib.contextmanager
def fused_layers(setting: str) -> Iterator[None]:
    """Choose inside a block whether layers run on the fused Triton kernels; a context manager.

        with sf.fused_layers("never"):
            loss(x, mean, log_var).backward()

    It goes before $FASTSFVAE_FUSED, and is read when a decoder's tangents are computed: a step that
    was captured or compiled before keeps what it has.

    Args:
        setting: "always" or "never", where the kernels take a layer at all; or "auto", which
            chooses for each layer (`check_decoder` shows what and why).

    Raises:
        ValueError: another setting.
    """
    _checked(setting, f"fused_layers({setting!r})")
    token = _forced.set(setting)
    try:
        yield
    finally:
        _forced.reset(token)


def state() -> tuple[str, str, str]:
    """All that a choice depends on besides `decide`'s arguments.

    Raises:
        ValueError: an unknown $FASTSFVAE_FUSED.
    """
    return _setting()[0], _precision.of_convolutions(), _precision.of_products()


def decide(
    operation: str,
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    out_shape: Sequence[int],
    *,
    device: torch.device | Device,
    dtype: torch.dtype,
    activated: bool = True,
) -> Choice:
    """How a layer runs that a fused kernel supports, and why.

    Args:
        operation: the ATen name, such as "conv_transpose2d" or "linear".
        x_shape: of one sample's value, ``[C_in, ...]`` or ``[*, C_in]``.
        weight_shape: of the layer's weight.
        out_shape: of one sample's result.
        device: where it runs, on the Triton backend.
        dtype: of values and tangents.
        activated: whether there is an activation in front for the kernel to take in.

    Raises:
        ValueError: an unknown $FASTSFVAE_FUSED.
    """
    setting, source = _setting()
    cuda = device if isinstance(device, Device) else _properties(device)
    if cuda is not None and cuda.capability < 80:
        return Choice("library", "no tensor cores in Triton's code for this device")
    if setting != "auto":
        return Choice("fused" if setting == "always" else "library", source)
    if cuda is None:
        return Choice("library", "the interpreter is slow")
    if not activated:
        return Choice("library", "no activation to take in")
    key = (operation, tuple(x_shape), tuple(weight_shape), dtype)
    if key in MEASURED.get(cuda.name, {}):
        return Choice(MEASURED[cuda.name][key], f"measured on {cuda.name}")
    return _modelled(operation, x_shape, weight_shape, out_shape, cuda, dtype)


def _setting() -> tuple[str, str]:
    forced = _forced.get()
    if forced is not None:
        return forced, f"fused_layers({forced!r})"
    setting = os.environ.get(ENVIRONMENT) or "auto"
    return _checked(setting, f"{ENVIRONMENT}={setting}")


def _checked(setting: str, source: str) -> tuple[str, str]:
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
    x, out = math.prod(x_shape), math.prod(out_shape)
    # The weight's first axis counts inputs where it is transposed, and outputs elsewhere.
    per_first = x if operation.startswith("conv_transpose") else out
    flops = 2 * per_first * math.prod(weight_shape[1:])
    # The weight is read once for all values and tangents of a batch.
    intensity = flops / ((x + out) * dtype.itemsize)
    ridge = _rate(operation, device, dtype) * device.clocks / device.bandwidth
    how, relation = ("fused", "below") if intensity < ridge else ("library", "above")
    return Choice(how, f"model: {intensity:.0f} FLOP/byte, {relation} {ridge:.0f}; not measured")


def _rate(operation: str, device: Device, dtype: torch.dtype) -> int:
    """FLOPs a clock of one multiprocessor; an unknown device counts as the newest known."""
    known = max(c for c in _TENSOR_RATE if c <= device.capability)
    if dtype != torch.float32:
        return _TENSOR_RATE[known]
    is_linear = operation == "linear"
    tf32 = (_precision.of_products if is_linear else _precision.of_convolutions)() == "tf32"
    return max(_PLAIN_RATE[known], _TENSOR_RATE[known] // 2 if tf32 else 0)
