"""Which tiles are the fastest: each launch of the fused kernels with others than it chooses.

Of a case's launches, the heaviest cases first, each field of a tile is tried with its neighbours,
and then those together that were faster. All is compiled ahead by other processes
(`bench.gpu.tile_jobs`) while the device times what is compiled already. A tile has to give the
right result, and to be faster than the one there was by `FASTER`, timed in turn with it; then
DIR/tiles.json has it, and --merge takes it over into the library's `kernels/tiles.json`.

A tile's row: the kernel, the case's mode, the launch and the fields that are others; its ratio is
to the tile as it is. A case's own row says that all its launches are through.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench.gpu.tile_jobs import (
    SPILLS,
    Compiled,
    Job,
    cases,
    combined,
    compile_tries,
    neighbours,
    rank,
    weighs,
)
from bench.launches import import_kernels
from bench.ledger import SWEEP, times
from bench.measure import Case, Context, OutOfTime, Run, Wrong, check
from bench.timing import Timing, captured, time_events, time_wall
from fastsfvae.ground.atomic import write_text
from fastsfvae.kernels._launch import device_limits
from fastsfvae.kernels._tiles import TILES, Asked, Fields, asking, trying, version

# A tile takes the place of another where it takes at most so much of its time.
FASTER = 0.97
# It changes the order of sums alone: its error is at most so many times that of the tile as it is,
# and so much more of numbers that are nearly exact.
_WORSE, _LEAST = 4, 1e-6
# Cases that are compiled while one before them is timed.
_AHEAD = 2
# Of the tile as it is and the other one, in turn.
_TURNS, _SECONDS = 3, 0.02
# Processes that compile: each may take 2 GB.
_MOST = 24
# Tiles of a launch that a rehearsal tries.
_QUICK = 2

_Compiling = Future[list[Compiled]]


@dataclass
class _Launch:
    """One launch of a case while its tiles are tried.

    Attributes:
        case: that makes it.
        runs: of the case, one per input set.
        key: its name.
        asked: its tile as it is.
        error: of the case with that, against float64.
        jobs: tiles that are compiled now, some in each, and where.
        first: whether these are the neighbours, tried before any are combined.
        ratios: of what was timed, its time over that of the tile as it is.
        spilt: what wanted more registers than it may have.
    """

    case: Case
    runs: Sequence[Run]
    key: str
    asked: Asked
    error: float
    jobs: list[tuple[Job, Executor, _Compiling]] = field(default_factory=list)
    first: bool = True
    ratios: list[tuple[float, Fields]] = field(default_factory=list)
    spilt: list[Fields] = field(default_factory=list)

    def labels(self, fields: Fields) -> dict[str, str]:
        """Of a tile's row."""
        changes = " ".join(f"{name}={value}" for name, value in fields.items())
        given = self.key.removeprefix(self.asked.kernel).strip()
        return self.case.labels | {
            **{"op": SWEEP, "implementation": self.asked.kernel},
            "shape": f"{given}; {changes or 'as it is'}",
        }

    @property
    def best(self) -> Fields | None:
        """The whole tile that is faster than the one there is."""
        ratio, fields = min(self.ratios, key=lambda tried: tried[0], default=(1.0, {}))
        return asdict(replace(self.asked.tile, **fields)) if ratio <= FASTER else None


def part(context: Context) -> None:
    """Sweep; what a second call finds in the rows is not timed again."""
    left = [case for case in _in_order(context) if not context.known(_labels(case))]
    if not left:
        return
    sweep = _Sweep(context)
    try:
        for case in left:
            sweep.begin(case)
            sweep.go_on(_AHEAD)
        sweep.go_on(0)
    finally:
        sweep.end()


def merge(folder: Path) -> int:
    """Take a folder's tiles over into the library; return how many.

    Newer ones replace those of the same launch. A device's tiles of another version of Triton are
    replaced whole.
    """
    path = folder / TILES.name
    if not path.exists():
        return 0
    table, count = json.loads(TILES.read_text()), 0
    for name, found in json.loads(path.read_text()).items():
        if not found["tiles"]:
            continue
        count += len(found["tiles"])
        before = table.get(name, found)
        if before["triton"] != found["triton"]:
            before = found
        older, newer = sorted((before, found), key=lambda of: of["date"])
        table[name] = newer | {"tiles": older["tiles"] | newer["tiles"]}
    if count:
        write_text(TILES, _text(table))
    return count


def _text(table: Mapping[str, Any]) -> str:
    return json.dumps(table, indent=1, sort_keys=True) + "\n"


def _labels(case: Case) -> dict[str, str]:
    """Of the row that says that a case is through."""
    return case.labels | {"op": SWEEP}


def _pool(count: int) -> Executor:
    """So many processes that compile."""
    spawning = multiprocessing.get_context("spawn")
    # On one thread each, as there is one for every core.
    pool = ProcessPoolExecutor(count, spawning, torch.set_num_threads, (1,))
    for _ in range(count):
        # They load what they need while a case is prepared.
        _submit(pool, import_kernels)
    return pool


def _submit(pool: Executor, function: Callable[..., Any], *given: Any) -> Future[Any]:
    """Run a function in another process, which may have to start: it is to compile."""
    with mock.patch.dict(os.environ):
        # The interpreter compiles nothing.
        os.environ.pop("TRITON_INTERPRET", None)
        try:
            return pool.submit(function, *given)
        except BrokenExecutor as reason:
            broken: Future[Any] = Future()
            broken.set_exception(reason)
            return broken


def _in_order(context: Context) -> list[Case]:
    found = [*cases(context.device, context.quick)]
    measured: dict[tuple[str, ...], float] = {}
    for row in (row for op in {case.op for case in found} for row in context.rows(op)):
        if row["p50_ms"]:
            # How it was launched stands behind the comma.
            labels = row | {"mode": row["mode"].partition(",")[0]}
            measured[tuple(labels[name] for name in found[0].labels)] = float(row["p50_ms"])
    rate = context.limit.get("copy", 1e12) / 1e3
    return sorted(found, key=lambda case: rank(case, measured, rate))


class _Sweep:
    """The launches that are under way.

    Args:
        context: of the part.
    """

    def __init__(self, context: Context):
        self._context, self._pools = context, [_pool(_processes(context.quick))]
        self._limits = device_limits(torch.empty(0, device=context.device))
        self._queue: deque[_Launch] = deque()
        self._through: set[str] = set()

    def begin(self, case: Case) -> None:
        """Check a case as it is, and have the neighbours of its launches' tiles compiled."""
        labels = _labels(case)
        with self._context.running(labels):
            try:
                prepared = case.prepare()
                case = replace(case, prepare=lambda: prepared)
                runs, columns = check(case, self._context.device)
                with asking() as asked:
                    runs[0]()
            except Exception as reason:
                self._context.fail(labels, reason)
                return
        for key in [key for key in asked if key not in self._through and weighs(case, key)]:
            self._through.add(key)
            launch = _Launch(case, runs, key, asked[key], float(columns["error"]))
            self._compile(launch, neighbours(asked[key]))
        self._tell(case)

    def go_on(self, ahead: int) -> None:
        """Time what is compiled until no more cases than `ahead` wait.

        Raises:
            OutOfTime: what was timed by then counts.
        """
        while len({id(launch.case) for launch in self._queue}) > ahead:
            launch = self._queue.popleft()
            try:
                self._time(launch)
            finally:
                _keep(self._context, launch.key, launch.best)
            if not launch.first:
                self._tell(launch.case)
                continue
            launch.first = False
            self._compile(launch, combined(launch.asked, launch.ratios, launch.spilt))

    def _compile(self, launch: _Launch, tries: list[dict[str, Any]]) -> None:
        """Have tiles compiled that no row knows; of those that one does, take the times."""
        launch.jobs, left = [], []
        for fields in tries[:_QUICK] if self._context.quick else tries:
            row = self._context.known(launch.labels(fields))
            if row is None:
                left.append(fields)
            elif row["ratio"]:
                launch.ratios.append((float(row["ratio"]), fields))
            elif row["note"].startswith(SPILLS):
                launch.spilt.append(fields)
        each = -(-len(left) // _processes(self._context.quick))
        for at in range(0, len(left), max(each, 1)):
            given = launch.case.labels, self._context.quick, launch.key
            job = Job(*given, left[at : at + each], self._limits)
            pool = self._pools[-1]
            launch.jobs.append((job, pool, _submit(pool, compile_tries, job)))
        self._queue.append(launch)

    def _time(self, launch: _Launch) -> None:
        """Time a launch's tiles as they are compiled; each becomes a row."""
        as_it_is = None
        for job, pool, future in launch.jobs:
            found = self._compiled(job, pool, future)
            for compiled, fields in zip(found, job.tries, strict=True):
                labels = launch.labels(fields)
                if compiled.problem:
                    launch.spilt += [fields] * compiled.problem.startswith(SPILLS)
                    self._context.recorder.write(**labels, note=compiled.problem)
                    continue
                with self._context.running(labels):
                    as_it_is = as_it_is or _Replay(self._context.device, launch, {})
                    self._try(launch, fields, compiled.says, as_it_is)

    def _compiled(self, job: Job, pool: Executor, future: _Compiling) -> list[Compiled]:
        try:
            return self._result(future)
        except BrokenExecutor:
            # A compiler that aborts takes all that wait along: one by one tells which it is.
            if pool is self._pools[-1]:
                self._pools.append(_pool(_processes(self._context.quick)))
            return [self._alone(job._replace(tries=[fields])) for fields in job.tries]

    def _alone(self, job: Job) -> Compiled:
        pool = _pool(1)
        try:
            return self._result(_submit(pool, compile_tries, job))[0]
        except BrokenExecutor:
            return Compiled("the compiler aborts")
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _result(self, future: _Compiling) -> list[Compiled]:
        try:
            return future.result(max(1.0, self._context.deadline - time.monotonic()))
        except futures.TimeoutError:
            raise OutOfTime from None

    def end(self) -> None:
        """Wait for nothing that is still compiled."""
        for pool in self._pools:
            pool.shutdown(wait=False, cancel_futures=True)

    def _try(self, launch: _Launch, fields: Fields, says: str, as_it_is: _Replay) -> None:
        """Check a tile, time it in turn with the one that is, and write its row."""
        context, labels = self._context, launch.labels(fields)
        try:
            with trying({launch.key: fields}):
                known = check(launch.case, context.device)[1]
            if not float(known["error"]) <= _WORSE * launch.error + _LEAST:
                usual = f"{launch.error:.2e} as it is"
                raise Wrong(f"not timed: wrong against float64, {usual}, by {known['error']}")
            other = _Replay(context.device, launch, fields)
            before, timing = in_turn(context, as_it_is, other)
        except Exception as reason:
            context.fail(labels, reason)
            return
        if not context.known(launch.labels({})) and not launch.ratios:
            tile = " ".join(f"{n}={value}" for n, value in asdict(launch.asked.tile).items())
            context.recorder.write(**launch.labels({}), **times(before), note=tile)
        # As a second call reads it.
        ratio = float(f"{timing.p50 / before.p50:.4f}")
        launch.ratios.append((ratio, fields))
        compared = {"ratio": f"{ratio:.4f}", "ratio_to": "as it is"}
        note = f"{ratio:.3f} of the time as it is; {says}".removesuffix("; ")
        context.recorder.write(**labels, **known, **times(timing), **compared, note=note)

    def _tell(self, case: Case) -> None:
        """Say that a case is through, where none of its launches waits."""
        if all(launch.case is not case for launch in self._queue):
            self._context.recorder.write(**_labels(case), note="all its launches' tiles are tried")


class _Replay:
    """All runs of a case with some fields of a launch's tile: on CUDA one graph.

    Args:
        device: "cuda" or "cpu".
        launch: whose case it is.
        fields: those fields.
    """

    def __init__(self, device: str, launch: _Launch, fields: Fields):
        self._device, self.count = device, len(launch.runs)

        def run() -> list[tuple[torch.Tensor, ...]]:
            with trying({launch.key: fields}):
                return [run() for run in launch.runs]

        self._run: Callable[[], object] = run
        if device == "cuda":
            # The graph keeps the memory of its results, which nobody reads.
            self._run, _ = captured(run)

    def time(self, seconds: float) -> Timing:
        """Of one run."""
        by = time_events if self._device == "cuda" else time_wall
        return Timing(*(value / self.count for value in by([self._run], seconds)))


def in_turn(context: Context, *replays: _Replay) -> list[Timing]:
    """The median of some turns of each, so that a clock which drifts falls on all of them."""
    turns, seconds = (1, 0.0) if context.quick else (_TURNS, _SECONDS)
    found = [[replay.time(seconds) for replay in replays] for _ in range(turns)]
    return [sorted(of)[len(of) // 2] for of in zip(*found, strict=True)]


def _processes(quick: bool) -> int:
    """How many compile: all cores but the one that launches."""
    return 1 if quick else max(1, min(len(os.sched_getaffinity(0)) - 1, _MOST))


def _keep(context: Context, key: str, tile: Fields | None) -> None:
    """Write down the best tile of a launch, or that none is better than the one there is."""
    # Apart from the measurements: --merge must not find a rehearsal's.
    path = context.folder / (f"quick_{TILES.name}" if context.quick else TILES.name)
    table = json.loads(path.read_text()) if path.exists() else {}
    told = context.recorder.provenance
    head = {name: told[name] for name in ("torch", "commit")} | {"triton": version()}
    before = table.get(told["device"], {})
    # As with the rows: nothing holds for another compiler or commit.
    tiles = before["tiles"] if before.items() >= head.items() else {}
    if tile is not None:
        tiles[key] = tile
    table[told["device"]] = {**head, "date": told["date"], "tiles": tiles}
    write_text(path, _text(table))
