"""The runbook's parts, in the order of their importance."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple


class Part(NamedTuple):
    """What runs in a process of its own, and may take a share of the minutes.

    Attributes:
        function: "module:name" of what takes a `bench.measure.Context`.
        share: of all minutes; what parts before it have left comes on top.
        says: what it asks, for the page.
        most: of all minutes, whatever is left.
        needs: a part that runs before it, whether it is asked for or not.
    """

    function: str
    share: float
    says: str
    most: float = 1.0
    needs: str = ""


PARTS = {
    "compile": Part(
        *("bench.gpu.compile:part", 0.05),
        "compiles the kernels of the next two ahead, on every core",
    ),
    "smoke": Part(
        *("bench.gpu.smoke:part", 0.10),
        "are loss and gradients right at full size, and the same twice?",
        needs="compile",
    ),
    "profile": Part(
        *("bench.gpu.kernel_profile:part", 0.12),
        "where does a step's time go, kernel by kernel?",
        needs="compile",
    ),
    "ceilings": Part(
        *("bench.ceilings:part", 0.05),
        "what can the card do at most?",
    ),
    "compile_larger": Part(
        *("bench.gpu.compile:larger", 0.05),
        "compiles the headlines' other sizes ahead",
    ),
    "headlines": Part(
        *("bench.gpu.timings:headlines", 0.16),
        "how long do this library's loss and steps take, and the sampling VAE's?",
        needs="compile_larger",
    ),
    "peers": Part(
        *("bench.gpu.timings:peers", 0.08),
        "how long does everybody else take?",
    ),
    "layers": Part(
        *("bench.gpu.timings:layers", 0.10),
        "which layers are faster on the fused kernels, and which by the library?",
    ),
    "sweep": Part(
        *("bench.gpu.sweep:part", 0.09),
        "which tiles are the fastest?",
    ),
    "operations": Part(
        *("bench.gpu.timings:operations", 0.04),
        "how long do the single operations take?",
    ),
    "compiled_peers": Part(
        *("bench.gpu.timings:compiled_peers", 0.04),
        "and everybody else compiled?",
    ),
    "curves": Part(
        *("bench.gpu.timings:curves", 0.02),
        "does training give the same curve on the kernels?",
    ),
    "correctness": Part(
        *("bench.gpu.correctness:part", 0.10),
        "do the kernels' own tests pass?",
        most=0.10,
    ),
}


def with_needed(names: Collection[str]) -> list[str]:
    """These parts, in the order of their importance, each behind what it needs."""
    needed = {PARTS[name].needs for name in names}
    return [name for name in PARTS if name in names or name in needed]
