"""One case: what is computed, how it is checked, timed and recorded.

A case is first compared with float64 and gets no time where it is wrong. On CUDA it is timed by
events over input sets that together exceed the L2 cache, launched one by one ("eager") or replayed
from a CUDA graph ("graph"); on the CPU by the wall clock.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bench.ledger import TIMES, Recorder, ceiling, read_rows, times
from bench.problems import TOLERANCE
from bench.timing import Timing, time_events, time_graph, time_wall

Run = Callable[[], tuple[Tensor, ...]]


# What a case is named by, and what else of a row must be the same for it to hold.
LABELS = "op", "implementation", "mode", "shape", "dtype"
HOLDS = "threads", "device", "torch", "triton", "commit"
# Names, while it runs, what a process is at; what ends the process leaves it behind.
RUNNING = "running.json"


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
        return {name: getattr(self, name) for name in LABELS}


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
        goes_on: whether what the recorder's file says already is not run again.
        limit: rate ceilings by the name of a dtype, and "copy"; read from the rows before.
    """

    device: str
    quick: bool
    recorder: Recorder
    deadline: float = float("inf")
    goes_on: bool = False
    limit: dict[str, float] = field(init=False)
    _known: dict[tuple[str, ...], dict[str, str]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        rows = self._own_rows()
        self.limit = dict(filter(None, map(ceiling, rows)))
        told = [row for row in rows if row["p50_ms"] or is_final(row["note"])]
        self._known = {_key(row): row for row in told if self.goes_on}

    @property
    def folder(self) -> Path:
        """Where the rows and all other files go."""
        return self.recorder.path.parent

    def known(self, labels: Mapping[str, str]) -> dict[str, str] | None:
        """The row that says already how a case went, where such are not run again."""
        return self._known.get(_key(labels))

    def rows(self, op: str) -> list[dict[str, str]]:
        """The recorder's last rows of an operation's cases, of this device, software and commit."""
        rows = [row for row in self._own_rows() if row["op"] == op]
        return [*{_key(row): row for row in rows}.values()]

    def _own_rows(self) -> list[dict[str, str]]:
        # A ledger holds those of others too.
        own = [self.recorder.provenance[name] for name in HOLDS]
        every = read_rows(self.recorder.path)
        return [row for row in every if [row[name] for name in HOLDS] == own]

    @contextlib.contextmanager
    def running(self, labels: Mapping[str, str]) -> Iterator[None]:
        """Leave behind, should the process end inside, what it was at.

        Raises:
            OutOfTime: before anything, where the deadline has passed.
        """
        if time.monotonic() > self.deadline:
            raise OutOfTime
        marker = self.folder / RUNNING
        if self.goes_on:
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.write_text(json.dumps({**dict.fromkeys(LABELS, ""), **labels}))
        # Not in a finally: an error that nobody takes ends the process.
        with contextlib.suppress(OutOfTime):
            yield
            marker.unlink(missing_ok=True)
            return
        marker.unlink(missing_ok=True)
        raise OutOfTime

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
        timings: dict[str, Timing] = {}
        left = []
        for launch in case.launches if self.device == "cuda" else ("eager",):
            # What failed before it was timed has no launch in its mode.
            row = self.known(self._labels(case, launch)) or self.known(case.labels)
            if row is None:
                left.append(launch)
            elif row["p50_ms"]:
                timings[launch] = Timing(*(float(row[name]) for name in TIMES))
        if left:
            with self.running(case.labels):
                timings |= self._run(case, left, baseline)
        return timings

    def _labels(self, case: Case, launch: str) -> dict[str, str]:
        """As `Case.labels`, with how it is launched."""
        mode = f"{case.mode}, {launch}" if self.device == "cuda" else case.mode
        return case.labels | {"mode": mode}

    def _run(
        self, case: Case, launches: Sequence[str], baseline: dict[str, Timing] | None
    ) -> dict[str, Timing]:
        timings: dict[str, Timing] = {}
        base = case.labels
        try:
            runs, known = check(case, self.device)
        except Exception as reason:
            self.fail(base, reason)
            return timings
        for launch in launches:
            base = self._labels(case, launch)
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


def is_final(note: str) -> bool:
    """Whether a note says how a case went, rather than that there was no time for it."""
    return bool(note) and not note.startswith("not run")


def _key(row: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(row.get(name, "") for name in LABELS)


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
