"""The runbook's parts, in the order of their importance."""

from __future__ import annotations

from typing import NamedTuple


class Part(NamedTuple):
    """What runs in a process of its own, and may take a share of the minutes.

    Attributes:
        function: "module:name" of what takes a `bench.measure.Context`.
        share: of all minutes; what parts before it have left comes on top.
        most: of all minutes, whatever is left.
        says: what it answers, for the page.
    """

    function: str
    share: float
    says: str
    most: float = 1.0


PARTS = {
    "compile": Part(
        *("bench.gpu.compile:part", 0.06),
        "compiles the kernels of the next two ahead, on every core",
    ),
    "smoke": Part(
        *("bench.gpu.smoke:part", 0.10),
        "are loss and gradients right at full size, and the same twice?",
    ),
    "profile": Part(
        *("bench.gpu.kernel_profile:part", 0.12),
        "where does a step's time go, kernel by kernel?",
    ),
    "ceilings": Part(
        *("bench.ceilings:part", 0.06),
        "what can the card do at most?",
    ),
    "compile_larger": Part(
        *("bench.gpu.compile:larger", 0.05),
        "compiles the headlines' other sizes ahead",
    ),
    "headlines": Part(
        *("bench.gpu.timings:headlines", 0.18),
        "how long do this library's loss and steps take, and the sampling VAE's?",
    ),
    "peers": Part(
        *("bench.gpu.timings:peers", 0.10),
        "how long does everybody else take?",
    ),
    "layers": Part(
        *("bench.gpu.timings:layers", 0.12),
        "which layers are faster on the fused kernels, and which by the library?",
    ),
    "sweep": Part(
        *("bench.gpu.sweep:part", 0.12),
        "which tiles are the fastest?",
    ),
    "operations": Part(
        *("bench.gpu.timings:operations", 0.05),
        "how long do the single operations take?",
    ),
    "compiled_peers": Part(
        *("bench.gpu.timings:compiled_peers", 0.05),
        "and everybody else compiled?",
    ),
    "curves": Part(
        *("bench.gpu.timings:curves", 0.04),
        "does training give the same curve on the kernels?",
    ),
    "correctness": Part(
        *("bench.gpu.correctness:part", 0.10),
        "do the kernels' own tests pass?",
        most=0.10,
    ),
}
