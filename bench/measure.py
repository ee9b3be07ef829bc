"""One case: what is computed, how it is checked, timed and recorded.

A case is first compared with float64 and gets no time where it is wrong. On CUDA it is timed by
events over input sets that together exceed the L2 cache, launched one by one ("eager") or replayed
from a CUDA graph ("graph"); on the CPU by the wall clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from bench.ledger import Recorder, ceiling, read_rows, times
from bench.problems import TOLERANCE
from bench.timing import Timing, time_events, time_graph, time_wall

Run = Callable[[], tuple[Tensor, ...]]


class OutOfTime(Exception):
    """The section's time is used up."""


class Wrong(RuntimeError):
    """A result is off by more than rounding: there is no time for it."""


class Prepared(NamedTuple):
    """A case with its inputs.

    Attributes:
        runs: one callable per input set; each returns its results.
        error: the largest relative error of those results; None where there is no oracle.
    """

    runs: Sequence[Run]
    error: Callable[[tuple[Tensor, ...]], float] | None = None


@dataclass(frozen=True)
class Case:
    """One row, or two where it is also replayed from a graph.

    Attributes:
        op: what is computed.
        implementation: by whom.
        mode: "forward", "backward", "both" or "step".
        shape: its size, for the reader.
        dtype: "float32" (ieee products), "tf32" or "bfloat16".
        prepare: makes the inputs.
        bytes: least traffic with device memory, where it is known.
        flops: floating-point operations, where they are known.
        launches: "eager", "graph" or both; the CPU has only the first.
        child: arguments of `bench.memory` that measure this case's memory in a process of its own.
    """

    op: str
    implementation: str
    mode: str
    shape: str
    dtype: str
    prepare: Callable[[], Prepared]
    bytes: float | None = None
    flops: float | None = None
    launches: tuple[str, ...] = ("eager",)
    child: tuple[str, ...] = ()

    @property
    def labels(self) -> dict[str, str]:
        """The columns that name it."""
        names = ("op", "implementation", "mode", "shape", "dtype")
        return {name: getattr(self, name) for name in names}


def check(case: Case, device: str) -> tuple[Sequence[Run], dict[str, str]]:
    """Prepare a case and compare it with float64: its runs, and the columns that are known then.

    Raises:
        Wrong: for a result that is off.
    """
    runs, measure_error = case.prepare()
    outputs, peak = first_run(runs[0], device)
    columns = {"peak_mib": "" if peak is None else f"{peak / 2**20:.1f}"}
    if measure_error is not None:
        error = measure_error(tuple(t.detach() for t in outputs))
        columns["error"] = f"{error:.2e}"
        # Written so that NaN is wrong too.
        if not error <= TOLERANCE[case.dtype]:
            raise Wrong(f"not timed: wrong against float64 by {error:.2e}")
    return runs, columns


def why(reason: BaseException) -> str:
    """A failure in one line."""
    if isinstance(reason, Wrong):
        return str(reason)
    lines = str(reason).strip().splitlines()
    return f"failed: {type(reason).__name__}: {lines[0][:200] if lines else ''}"


@dataclass
class Context:
    """What a section needs to run its cases.

    Attributes:
        device: "cuda" or "cpu".
        quick: small sizes and few repetitions: a test of the benchmarks, not a measurement.
        recorder: where the rows go.
        deadline: `time.monotonic()` after which no case starts.
        limit: rate ceilings by the name of a dtype, and "copy"; read from the rows before.
    """

    device: str
    quick: bool
    recorder: Recorder
    deadline: float = float("inf")
    limit: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        # Of this device and software only: a ledger holds those of others too.
        own = self.recorder.provenance.items()
        rows = (row for row in read_rows(self.recorder.path) if row.items() >= own)
        self.limit = dict(filter(None, map(ceiling, rows)))

    def run(self, case: Case, baseline: dict[str, Timing] | None = None) -> dict[str, Timing]:
        """Check, time and record a case; a failure becomes a row that says why.

        Args:
            case: what to run.
            baseline: the sampling VAE's times by launch, for the ratio.

        Returns:
            The times by launch.

        Raises:
            OutOfTime: before the case, where the deadline has passed.
            RuntimeError: where the device no longer works.
        """
        if time.monotonic() > self.deadline:
            raise OutOfTime
        timings: dict[str, Timing] = {}
        base = case.labels
        try:
            runs, known = check(case, self.device)
        except Exception as reason:
            self.fail(base, reason)
            return timings
        launches = case.launches if self.device == "cuda" else ("eager",)
        for launch in launches:
            if self.device == "cuda":
                base["mode"] = f"{case.mode}, {launch}"
            try:
                timing = self.time(runs, launch)
            except Exception as reason:
                self.fail(base | known, reason)
                continue
            timings[launch] = timing
            compared = {}
            if baseline and launch in baseline:
                ratio = timing.p50 / baseline[launch].p50
                compared = {"ratio": f"{ratio:.3f}", "ratio_to": "sampling"}
            self.recorder.write(**base | known | self.columns(case, timing) | compared)
        return timings

    def time(self, runs: Sequence[Run], launch: str = "eager") -> Timing:
        """Time checked runs."""
        seconds = 0.02 if self.quick else 0.3
        if self.device == "cpu":
            return time_wall(runs, seconds)
        return time_graph(runs, seconds) if launch == "graph" else time_events(runs, seconds)

    def columns(self, case: Case, timing: Timing) -> dict[str, str]:
        """The columns of a time, with its rates and their share of what the device can do."""
        columns = times(timing)
        seconds = timing.p50 / 1e3
        floors = []
        for amount, column, limit in (
            (case.bytes, "bytes_per_s", self.limit.get("copy")),
            (case.flops, "flop_per_s", self.limit.get(case.dtype)),
        ):
            if amount is not None:
                columns[column] = f"{amount / seconds:.4g}"
                floors += [amount / limit] if limit else []
        if floors and case.op != "ceiling":
            columns["share_of_ceiling"] = f"{max(floors) / seconds:.3f}"
        return columns

    def fail(self, base: dict[str, str], reason: Exception) -> None:
        """Record why a case has no time."""
        error = {"error": str(reason).rpartition(" ")[2]} if isinstance(reason, Wrong) else {}
        self.recorder.write(**base | error, note=why(reason))
        if self.device == "cuda":
            # Raises where the failure has broken the device for this process.
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def first_run(run: Run, device: str) -> tuple[tuple[Tensor, ...], int | None]:
    """Run twice, so that compilation is past; return the results and the second's peak in bytes.

    The peak counts what the run allocates on top of its inputs; None on the CPU.
    """
    run()
    if device == "cpu":
        return run(), None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = run()
    torch.cuda.synchronize()
    return outputs, torch.cuda.max_memory_allocated() - before
