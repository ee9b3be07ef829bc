"""Wall-clock timing that survives a noisy machine: all candidates take turns in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple


class Timing(NamedTuple):
    """Quantiles over the rounds, in milliseconds."""

    p50: float
    p20: float
    p80: float


def interleave(candidates: dict[str, Callable[[], object]], rounds: int = 15, warmup: int = 2):
    """Run each candidate once per round, in turn; return ``{name: Timing}``.

    A slow spell of the machine then falls on all of them, so that their ratios hold where their
    single times do not. CPU only: nothing here waits for a device.
    """
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for round_number in range(warmup + rounds):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            elapsed = (time.perf_counter() - start) * 1e3
            if round_number >= warmup:
                samples[name].append(elapsed)
    return {name: quantiles(values) for name, values in samples.items()}


def quantiles(values: list[float]) -> Timing:
    """Median and the quantiles at 0.2 and 0.8 of at least two times in milliseconds."""
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return Timing(statistics.median(values), fifths[0], fifths[3])
