"""Clocks: the wall clock on a CPU, where candidates take turns; events and graphs on CUDA.

Taking turns survives a noisy machine: a slow spell falls on all candidates, so that their ratios
hold where their single times do not. On CUDA nothing synchronises between two runs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from fastsfvae.ground.garbage import uncollected

Run = Callable[[], object]


class Timing(NamedTuple):
    """Quantiles over the rounds, in milliseconds."""

    p50: float
    p20: float
    p80: float


def quantiles(values: Sequence[float]) -> Timing:
    """Median and the quantiles at 0.2 and 0.8 of at least two times in milliseconds."""
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return Timing(statistics.median(values), fifths[0], fifths[3])


def wall_ms(run: Run) -> float:
    """One run by the wall clock, in milliseconds; nothing here waits for a device."""
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def take_turns(candidates: dict[str, Run], rounds: int = 15, warmup: int = 2):
    """Run each candidate once per round, in turn; return ``{name: list of milliseconds}``."""
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for round_number in range(warmup + rounds):
        for name, run in candidates.items():
            elapsed = wall_ms(run)
            if round_number >= warmup:
                samples[name].append(elapsed)
    return samples


def time_wall(runs: Sequence[Run], seconds: float) -> Timing:
    """Wall clock of each run in turn, at least three times."""
    samples: list[float] = []
    stop = time.perf_counter() + seconds
    while len(samples) < 3 or time.perf_counter() < stop:
        samples += [wall_ms(run) for run in runs]
    return quantiles(samples)


def time_events(runs: Sequence[Run], seconds: float) -> Timing:
    """CUDA events around each run in turn, with no synchronisation in between."""
    events = []
    # The first pass warms up and tells how many passes fit.
    start = time.perf_counter()
    for run in runs:
        run()
    torch.cuda.synchronize()
    passes = max(5, min(int(seconds / (time.perf_counter() - start)), 500))
    for _ in range(passes):
        for run in runs:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            events.append((begin, end))
    torch.cuda.synchronize()
    return quantiles([begin.elapsed_time(end) for begin, end in events])


def captured(run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """A run in a CUDA graph: what replays it, and its results, which every replay overwrites.

    Raises:
        Exception: the run's own, where it has broken the capture.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    before = torch.cuda.current_stream()
    before.wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    own: Exception | None = None
    try:
        with uncollected(), torch.cuda.graph(graph):
            try:
                results = run()
            except Exception as reason:
                own = reason
                raise
    except Exception as reason:
        # The end of a broken capture raises once more, less to the point, and leaves its stream.
        if torch.cuda.current_stream() != before:
            torch.cuda.set_stream(before)
        raise own or reason from None
    return graph.replay, results


def time_graph(runs: Sequence[Run], seconds: float) -> Timing:
    """Replays of one CUDA graph that holds all runs, divided by their number."""
    replay, _ = captured(lambda: [run() for run in runs])
    replayed = time_events([replay], seconds)
    return Timing(*(value / len(runs) for value in replayed))
