"""Kernels in a trace of torch.profiler, as `export_chrome_trace` writes it.

A kernel is launched by a call of the driver or the runtime with its correlation; all kernels of a
CUDA graph have that of the graph's launch. Whatever a trace does not tell is None.
"""

from __future__ import annotations

import gzip
import json
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# What a device does, and what launches it.
_DEVICE = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
_LAUNCHES = frozenset({"cuda_runtime", "cuda_driver"})


class Kernel(NamedTuple):
    """One run of a kernel, times in microseconds.

    Attributes:
        name: of the binary's function.
        start: of the run.
        us: how long it took.
        launched: when it was launched.
        correlation: of its launch.
        of_graph: whether that launched a graph.
        registers: of a thread.
        shared: bytes of a program.
    """

    name: str
    start: float
    us: float
    launched: float | None = None
    correlation: int | None = None
    of_graph: bool = False
    registers: int | None = None
    shared: int | None = None


class Range(NamedTuple):
    """A named range on the host, times in microseconds."""

    name: str
    start: float
    end: float


class Trace(NamedTuple):
    """Kernels in the order of their start, and ranges."""

    kernels: list[Kernel]
    ranges: list[Range]


def read(path: Path) -> Trace:
    """Read a trace, which may be compressed."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    return of_events(event for event in events if event.get("ph") == "X")


def of_events(events: Iterable[dict[str, Any]]) -> Trace:
    """The same, of a trace's complete events."""
    of: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        of.setdefault(event.get("cat", ""), []).append(event)
    launched = {
        event["args"]["correlation"]: (float(event["ts"]), "GraphLaunch" in event.get("name", ""))
        for category in _LAUNCHES
        for event in of.get(category, ())
        if "correlation" in event.get("args", ())
    }
    ran = [event for category in _DEVICE for event in of.get(category, ())]
    kernels = [_kernel(event, launched) for event in ran]
    ranges = [
        Range(event["name"], float(event["ts"]), float(event["ts"]) + float(event["dur"]))
        for event in of.get("user_annotation", ())
    ]
    return Trace(sorted(kernels, key=lambda kernel: kernel.start), ranges)


def _kernel(event: dict[str, Any], launched: dict[int, tuple[float, bool]]) -> Kernel:
    args = event.get("args", {})
    correlation = args.get("correlation")
    at, of_graph = launched.get(correlation, (None, False))
    return Kernel(
        *(event["name"], float(event["ts"]), float(event["dur"])),
        *(at, correlation, of_graph),
        *(args.get("registers per thread"), args.get("shared memory")),
    )


def within(trace: Trace, prefix: str, times: Iterable[float | None]) -> list[str | None]:
    """For each time the innermost range of such a name around it, None where there is none."""
    ranges = [r for r in trace.ranges if r.name.startswith(prefix)]
    found: list[str | None] = []
    for at in times:
        around = [r for r in ranges if at is not None and r.start <= at <= r.end]
        found.append(max(around, key=lambda r: r.start).name if around else None)
    return found


def replays(trace: Trace, count: int) -> list[list[Kernel]]:
    """Kernels of each replay of a graph, in order; of so many replays.

    A session may lose what it began with: where launches of graphs are told, it is their kernels,
    however many are left. Where no correlation tells replays apart, they are as many equal parts;
    nothing where they are not.
    """
    of: dict[int | None, list[Kernel]] = {}
    for kernel in trace.kernels:
        of.setdefault(kernel.correlation, []).append(kernel)
    if graphs := [kernels for kernels in of.values() if kernels[0].of_graph]:
        return graphs
    found = [kernels for number, kernels in of.items() if number is not None]
    if len(found) != count:
        size, rest = divmod(len(trace.kernels), count)
        parts = [trace.kernels[i * size : (i + 1) * size] for i in range(count)]
        found = [] if rest or not size else parts
    return found


def medians(runs: Sequence[Sequence[Kernel]]) -> list[Kernel]:
    """One run's kernels, each with its median time over the runs that have the same kernels."""
    names = Counter(tuple(kernel.name for kernel in run) for run in runs)
    if not names:
        return []
    common = names.most_common(1)[0][0]
    alike = [run for run in runs if tuple(kernel.name for kernel in run) == common]
    return [
        same[0]._replace(us=statistics.median(kernel.us for kernel in same))
        for same in zip(*alike, strict=True)
    ]
