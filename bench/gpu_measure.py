"""How the GPU runbook checks, times and records one case.

A case is first compared with float64 and gets no time where it is wrong. On CUDA it is timed by
events over input sets that together exceed the L2 cache, launched one by one ("eager") or replayed
from a CUDA graph ("graph"); on the CPU by the wall clock.
"""

from __future__ import annotations

import contextlib
import csv
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from bench import ledger
from bench.timing import Timing, quantiles

Run = Callable[[], tuple[Tensor, ...]]
EXTRA = ("bytes_per_s", "flop_per_s", "share_of_ceiling", "error", "peak_mib", "note")
COLUMNS = (*ledger.COLUMNS, *EXTRA)

# What tells rounding (and the ReLUs that it flips) from a wrong formula; the error itself stands in
# every row.
TOLERANCE = {"float32": 1e-3, "tf32": 5e-2, "bfloat16": 2e-1}


class OutOfTime(Exception):
    """The section's time is used up."""


@dataclass(frozen=True)
class Case:
    """One row, or two where it is also replayed from a graph.

    Attributes:
        op: what is computed.
        implementation: by whom.
        mode: "forward", "backward", "both" or "step".
        shape: its size, for the reader.
        dtype: "float32" (ieee products), "tf32" or "bfloat16".
        prepare: builds one callable per input set; each returns its results.
        error: the largest relative error of those results; None where there is no oracle.
        bytes: least traffic with device memory, where it is known.
        flops: floating-point operations, where they are known.
        launches: "eager", "graph" or both; the CPU has only the first.
    """

    op: str
    implementation: str
    mode: str
    shape: str
    dtype: str
    prepare: Callable[[], Sequence[Run]]
    error: Callable[[tuple[Tensor, ...]], float] | None = None
    bytes: float | None = None
    flops: float | None = None
    launches: tuple[str, ...] = ("eager",)


class Recorder:
    """Appends each row to the CSV file as soon as it is known."""

    def __init__(self, path: Path, device: str, commit: str | None = None):
        self.path = path
        names = ledger.COLUMNS[ledger.COLUMNS.index("threads") :]
        values = ledger.provenance(ledger.device_name(device))
        self.provenance = dict(zip(names, values, strict=True))
        if commit:
            self.provenance["commit"] = commit

    def write(self, **columns) -> None:
        """Add a row; columns that are not given stay empty."""
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow({**self.provenance, **columns})


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a recorder's file, or none where it does not exist."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@dataclass
class Context:
    """What a section needs to run its cases.

    Attributes:
        device: "cuda" or "cpu".
        quick: small sizes and few repetitions: a test of the runbook, not a measurement.
        recorder: where the rows go.
        deadline: `time.monotonic()` after which no case starts.
        limit: rate ceilings by the name of a dtype, and "copy"; read from the rows before.
    """

    device: str
    quick: bool
    recorder: Recorder
    deadline: float
    limit: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        self.limit = {}
        for row in read_rows(self.recorder.path):
            if row["op"] == "ceiling" and row["p50_ms"]:
                is_copy = bool(row["bytes_per_s"])
                name = "copy" if is_copy else row["dtype"]
                self.limit[name] = float(row["bytes_per_s" if is_copy else "flop_per_s"])

    def run(self, case: Case, baseline: dict[str, Timing] | None = None) -> dict[str, Timing]:
        """Check, time and record a case; a failure becomes a row that says why.

        Args:
            case: what to run.
            baseline: times by launch that the note compares with.

        Returns:
            The times by launch.

        Raises:
            OutOfTime: before the case, where the deadline has passed.
            RuntimeError: where the device no longer works.
        """
        if time.monotonic() > self.deadline:
            raise OutOfTime
        timings: dict[str, Timing] = {}
        base = dict(op=case.op, implementation=case.implementation, mode=case.mode)
        base |= dict(shape=case.shape, dtype=case.dtype)
        try:
            runs = list(case.prepare())
            outputs, peak = first_run(runs[0], self.device)
            base["peak_mib"] = "" if peak is None else f"{peak / 2**20:.1f}"
            if case.error is not None:
                error = case.error(tuple(t.detach() for t in outputs))
                base["error"] = f"{error:.2e}"
                # Written so that NaN fails.
                if not error <= TOLERANCE[case.dtype]:
                    self.recorder.write(**base, note="not timed: wrong against float64")
                    return timings
            del outputs
        except Exception as reason:
            self._failed(base, reason)
            return timings
        launches = case.launches if self.device == "cuda" else ("eager",)
        for launch in launches:
            mode = f"{case.mode}, {launch}" if self.device == "cuda" else case.mode
            try:
                timing = self._time(runs, launch)
            except Exception as reason:
                self._failed(base | {"mode": mode}, reason)
                continue
            timings[launch] = timing
            note = ""
            if baseline and launch in baseline:
                note = f"{timing.p50 / baseline[launch].p50:.2f} times the sampling VAE's step"
            self.recorder.write(**base | {"mode": mode}, **self._columns(case, timing), note=note)
        return timings

    def _time(self, runs: Sequence[Run], launch: str) -> Timing:
        seconds = 0.02 if self.quick else 0.3
        if self.device == "cpu":
            return time_wall(runs, seconds)
        return time_graph(runs, seconds) if launch == "graph" else time_events(runs, seconds)

    def _columns(self, case: Case, timing: Timing) -> dict[str, str]:
        names = ("p50_ms", "p20_ms", "p80_ms")
        columns = {name: f"{value:.5g}" for name, value in zip(names, timing, strict=True)}
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

    def _failed(self, base: dict, reason: Exception) -> None:
        text = str(reason).strip().splitlines()
        note = f"failed: {type(reason).__name__}: {text[0][:200] if text else ''}"
        self.recorder.write(**base, note=note)
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


def time_wall(runs: Sequence[Run], seconds: float) -> Timing:
    """Wall clock of each run in turn, at least three times."""
    samples: list[float] = []
    stop = time.perf_counter() + seconds
    while len(samples) < 3 or time.perf_counter() < stop:
        for run in runs:
            start = time.perf_counter()
            run()
            samples.append((time.perf_counter() - start) * 1e3)
    return quantiles(samples)


def time_events(runs: Sequence[Run], seconds: float) -> Timing:
    """CUDA events around each run in turn, with no synchronisation in between."""
    events = []
    # The first pass warms up and tells how many passes fit.
    start = time.perf_counter()
    for run in runs:
        run()
    torch.cuda.synchronize()
    passes = _clamp(seconds / (time.perf_counter() - start))
    for _ in range(passes):
        for run in runs:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            events.append((begin, end))
    torch.cuda.synchronize()
    return quantiles([begin.elapsed_time(end) for begin, end in events])


def time_graph(runs: Sequence[Run], seconds: float) -> Timing:
    """Replays of one CUDA graph that holds all runs, divided by their number."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            for run in runs:
                run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    replayed = time_events([lambda: graph.replay() or ()], seconds)
    return Timing(*(value / len(runs) for value in replayed))


def _clamp(passes: float) -> int:
    return max(5, min(int(passes), 500))


def rotations(bytes_per_set: float, device: str) -> int:
    """How many input sets exceed twice the L2 cache together, 2 to 8; 1 on the CPU."""
    if device == "cpu":
        return 1
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return int(max(2, min(8, 2 * cache // bytes_per_set + 1)))


def relative_error(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """Largest norm of an error over the norm of its oracle; NaN where anything is NaN."""
    errors = [
        (g.detach().double() - w.detach()).norm() / w.detach().norm().clamp_min(1e-300)
        for g, w in zip(got, want, strict=True)
    ]
    # max() of a tensor, not of floats: it hands a NaN on.
    return float(torch.stack(errors).max())


@contextlib.contextmanager
def products(name: str) -> Iterator[None]:
    """Float32 products of matrices and convolutions in TF32 for "tf32", in ieee otherwise."""
    chosen = "tf32" if name == "tf32" else "ieee"
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [s.fp32_precision for s in settings]
    for s in settings:
        s.fp32_precision = chosen
    try:
        yield
    finally:
        for s, value in zip(settings, before, strict=True):
            s.fp32_precision = value


def autocast(name: str, device: str) -> torch.autocast:
    """Autocast to bfloat16 for "bfloat16"; to be entered in each run, for it caches the weights."""
    return torch.autocast(device, torch.bfloat16, enabled=name == "bfloat16")
