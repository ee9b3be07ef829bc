"""What is known of a GPU: its peak rates, and what benchmarks found to be faster on it."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

# What was measured, by the device's name; written by `python -m bench.choices` from the ledger.
MEASURED: dict[str, dict[str, Any]] = json.loads(
    Path(__file__).with_name("measured.json").read_text()
)

# FLOPs a clock of one multiprocessor: dense bfloat16 products on the tensor cores with float32
# sums, and plain float32, by compute capability; from the vendor's data sheets.
_TENSOR_RATE = {80: 2048, 86: 512, 89: 512, 90: 4096, 100: 8192, 120: 512}
_PLAIN_RATE = {80: 128, 86: 256, 89: 256, 90: 256, 100: 256, 120: 256}


class Gpu(NamedTuple):
    """What the cost model knows of a device.

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

    def rate(self, product: str) -> float:
        """Peak FLOPs a second of "half", "tf32", "tf32x3" or "ieee" products.

        A device that is not known counts as the newest known one before it.
        """
        known = max(c for c in _TENSOR_RATE if c <= self.capability)
        half = _TENSOR_RATE[known]
        # Three TF32 products make one of nearly float32's precision.
        rates = {"half": half, "tf32": half / 2, "tf32x3": half / 6, "ieee": _PLAIN_RATE[known]}
        return rates[product] * self.clocks


def gpu_of(device: torch.device) -> Gpu | None:
    """The GPU that a device is; None for any other."""
    if device.type != "cuda":
        return None
    return _cuda_device(torch.cuda.current_device() if device.index is None else device.index)


def cache_bytes(device: torch.device) -> int:
    """A GPU's L2; 0 of any other device."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).L2_cache_size


@functools.cache
def _cuda_device(index: int) -> Gpu:
    found = torch.cuda.get_device_properties(index)
    # The driver gives kHz, and bits that are moved twice a clock.
    return Gpu(
        name=found.name,
        capability=10 * found.major + found.minor,
        clocks=found.multi_processor_count * found.clock_rate * 1e3,
        bandwidth=2 * found.memory_clock_rate * 1e3 * found.memory_bus_width / 8,
    )
