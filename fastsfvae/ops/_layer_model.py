"""How long a layer's product takes, fused or by the library, where neither was measured.

Of one stack slot of one sample, with F FLOPs and x and y bytes of input and output:

    fused     max(F / peak, F / issued, 3 (x + y) / L2, (x + y) / memory)
    library   max(F / (peak share), 3 (x + y) / L2, (x + y) / memory) + 2 x / memory

A fused kernel issues instructions besides its tensor-core ones: `issued.json` has the FLOPs that
one of them does on average, counted in the machine code of celeba16's layers. The library is taken
to reach a share of the peak, and reads and writes the activation in a pass of its own. Both read an
input for several of the layer's taps: L2 gives about three bytes for each one of memory's. That
number, the share and L2's rate are guesses that no GPU has confirmed.
"""

from __future__ import annotations

import json
from pathlib import Path

from fastsfvae.ops._gpu import Gpu

# FLOPs of one issued instruction, by capability and product; written by
# `python -m fastsfvae.kernels.audit --write-bounds`.
ISSUED: dict[str, dict[str, float]] = json.loads(
    Path(__file__).with_name("issued.json").read_text()
)
_SCHEDULERS = 4
_LIBRARY_SHARE = 0.6
_L2_READS = 3
# Bytes a clock that L2 gives one multiprocessor: of data centre cards, and of others.
_L2_RATES = {80: 24.0, 90: 24.0, 100: 24.0}
_L2_RATE = 14.0


def fused_times(gpu: Gpu, product: str, flops: float, inputs: float, outputs: float) -> dict:
    """Seconds of each of a fused kernel's limits, by name.

    Args:
        gpu: the device.
        product: "half", "tf32", "tf32x3" or "ieee".
        flops: of the layer.
        inputs: bytes.
        outputs: bytes.
    """
    moved = inputs + outputs
    return {
        "arithmetic": flops / gpu.rate(product),
        "issue": flops / (_per_instruction(gpu, product) * _SCHEDULERS * gpu.clocks),
        "L2": _L2_READS * moved / (_L2_RATES.get(gpu.capability, _L2_RATE) * gpu.clocks),
        "memory": moved / gpu.bandwidth,
    }


def library_seconds(gpu: Gpu, product: str, flops: float, inputs: float, outputs: float) -> float:
    """Seconds of the library's product and of the activation's pass; arguments as there."""
    limits = fused_times(gpu, product, flops, inputs, outputs)
    # The library forms float32 products as float32 does, not by three TF32 ones.
    own = "ieee" if product == "tf32x3" else product
    arithmetic = flops / (_LIBRARY_SHARE * gpu.rate(own))
    return max(arithmetic, limits["L2"], limits["memory"]) + 2 * inputs / gpu.bandwidth


def _per_instruction(gpu: Gpu, product: str) -> float:
    """A device that is not known counts as the newest known one before it."""
    known = max(int(c) for c in ISSUED if int(c) <= gpu.capability)
    of = ISSUED[str(known)]
    # Three TF32 products make one.
    return of["tf32"] / 3 if product == "tf32x3" else of[product]
