"""The sweep over tiles, on the CPU: what it tries, compiles, times, keeps and takes over."""

import json
import os
import time
from contextlib import contextmanager
from dataclasses import asdict

import pytest
import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from bench import ledger
from bench.gpu import sweep, tile_jobs
from bench.gpu.tile_jobs import Compiled, Job
from bench.ledger import Recorder, read_rows
from bench.measure import Case, Context, OutOfTime, Prepared
from bench.timing import Timing
from fastsfvae.kernels import _tiles
from fastsfvae.kernels._launch import DeviceLimits, pretend
from fastsfvae.kernels._record import _Absent
from fastsfvae.kernels._stack_tile import Tile
from fastsfvae.kernels._tiles import Asked, asking, trying
from tests._triton import INTERPRETER

once = pytest.mark.skipif(INTERPRETER, reason="runs the same in either run of the suite")
TILE = Tile(64, 16, 32, 4, 2, None)
BLOCKS = {"block_m": 16, "block_n": 16, "block_k": 16}
LIMITS = DeviceLimits(4)


class Pool:
    """Compiles nothing: every tile is right, but for those that it is told of."""

    problems: dict[str, str] = {}

    def __init__(self, *_, **__):
        self.submitted = []

    def submit(self, function, *jobs):
        future = sweep.Future()
        for job in jobs:
            future.set_result(self.compile(job))
        return future

    def compile(self, job):
        self.submitted += job.tries
        told = [self.problems.get(str(fields), "") for fields in job.tries]
        return [Compiled(problem, "9 registers") for problem in told]

    def shutdown(self, **_):
        pass


@pytest.fixture
def ran(monkeypatch):
    """Stands in for a kernel: one case, one launch, whose time depends on its tile."""
    launched = []

    def run():
        given = {"dtype": torch.bfloat16, "H": 3}
        launched.append(_tiles.tuned("kernel", TILE, LIMITS, BLOCKS, **given))
        return (torch.full((2,), float(launched[-1].block_n != 128)),)

    def prepare():
        return Prepared([run], lambda outputs: float((outputs[0] - 1).abs().max()))

    case = Case("layer", "fused", "forward", "n=3", "bfloat16", prepare)
    monkeypatch.setattr(sweep, "cases", lambda device, quick: [case])
    monkeypatch.setattr(sweep, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(Pool, "problems", {})
    cost = {"block_m": {128: 0.9, 256: 0.8}, "num_warps": {8: 0.95}, "block_k": {16: 0.98}}

    def timed(self, seconds):
        self._run()
        tile = asdict(launched[-1])
        ms = 1.0
        for name, factors in cost.items():
            ms *= factors.get(tile[name], 1.0)
        return Timing(ms, ms, ms)

    monkeypatch.setattr(sweep._Replay, "time", timed)
    run.cost = cost
    return run


def context_of(folder, deadline=60.0):
    recorder = Recorder(folder / "rows.csv", "cpu", "abc1234")
    return Context("cpu", False, recorder, time.monotonic() + deadline, goes_on=True)


def tiles_in(folder):
    ((_, of),) = json.loads((folder / "tiles.json").read_text()).items()
    return of["tiles"]


def rows_of(folder):
    """The rows of tiles, by what differs."""
    rows = read_rows(folder / "rows.csv")
    return {row["shape"].partition("; ")[2]: row for row in rows if row["op"] == "sweep"}


KEY = "kernel dtype=bfloat16 H=3"


@once
def test_the_fastest_is_kept_and_all_is_told(ran, tmp_path):
    Pool.problems["{'num_stages': 3}"] = "spills 8 bytes: 9 registers"
    sweep.part(context_of(tmp_path))
    rows = rows_of(tmp_path)
    # Each field by itself, then those that were faster: 0.98 alone is no more than noise.
    assert float(rows["block_m=128"]["ratio"]) == pytest.approx(0.9)
    assert float(rows["block_m=128 num_warps=8 block_k=16"]["ratio"]) < 0.85
    assert float(rows["block_m=256"]["ratio"]) == pytest.approx(0.8)
    assert not rows["num_stages=3"]["p50_ms"] and "spills 8" in rows["num_stages=3"]["note"]
    assert "9 registers" in rows["block_m=32"]["note"]
    assert rows["as it is"]["p50_ms"] == "1" and "block_n=16" in rows["as it is"]["note"]
    assert {row["implementation"] for row in rows.values()} == {"kernel", "fused"}
    assert tiles_in(tmp_path) == {KEY: asdict(TILE) | {"block_m": 256}}


@once
def test_a_tile_that_is_wrong_does_not_count(ran, tmp_path, monkeypatch):
    ran.cost["block_n"] = {32: 1.0, 128: 0.1}
    ran.cost["block_m"] = ran.cost["num_warps"] = {}
    tries = [{"block_n": 128}, {"block_n": 32}]
    monkeypatch.setattr(sweep, "neighbours", lambda asked: tries)
    sweep.part(context_of(tmp_path))
    rows = rows_of(tmp_path)
    assert "wrong against float64" in rows["block_n=128"]["note"]
    assert tiles_in(tmp_path) == {}


@once
def test_a_tile_is_as_exact_as_the_one_there_is(ran, tmp_path, monkeypatch):
    # Far below what bfloat16 is allowed against float64.
    errors = {64: 0.01, 128: 0.05, 32: 0.03}
    ran.cost |= {"block_m": {128: 0.5, 32: 0.9}, "num_warps": {}, "block_k": {}}
    monkeypatch.setattr(sweep, "check", lambda case, device: checked(case, errors))
    sweep.part(context_of(tmp_path))
    rows = rows_of(tmp_path)
    assert (
        rows["block_m=128"]["note"].startswith("not timed: wrong") and rows["block_m=32"]["ratio"]
    )
    assert float(rows["block_m=128"]["error"]) == 0.05 and not rows["block_m=128"]["p50_ms"]
    assert tiles_in(tmp_path)[KEY]["block_m"] == 32


def checked(case, errors):
    """What `check` finds where a tile's error depends on its rows."""
    runs = case.prepare().runs
    with asking() as asked:
        runs[0]()
    rows = (_tiles._tried or {}).get(KEY, {}).get("block_m", asked[KEY].tile.block_m)
    return runs, {"error": f"{errors.get(rows, 0.01):.2e}"}


@once
def test_what_spills_is_tried_with_more_registers(ran, tmp_path, monkeypatch):
    tile = Tile(64, 16, 32, 4, 2, 128)
    monkeypatch.setattr("tests.bench.test_sweep.TILE", tile)
    Pool.problems |= {"{'block_n': 32}": "spills 8 bytes", "{'maxnreg': 96}": "spills 8 bytes"}
    ran.cost["block_n"] = {32: 0.5}
    sweep.part(context_of(tmp_path))
    rows = rows_of(tmp_path)
    assert not rows["block_n=32"]["p50_ms"] and "maxnreg=96 maxnreg=255" not in rows
    assert float(rows["block_n=32 maxnreg=255"]["ratio"]) == pytest.approx(0.5)
    assert tiles_in(tmp_path) == {KEY: asdict(tile) | {"block_n": 32, "maxnreg": 255}}


@once
@pytest.mark.parametrize("factor, kept", [(0.96, True), (0.98, False), (1.2, False)])
def test_the_tile_stays_unless_another_is_3_percent_faster(ran, tmp_path, factor, kept):
    ran.cost |= {"block_m": {128: factor}, "num_warps": {}, "block_k": {}}
    sweep.part(context_of(tmp_path))
    assert (KEY in tiles_in(tmp_path)) == kept


@once
def test_a_compiler_that_aborts_costs_its_tile_alone(ran, tmp_path, monkeypatch):
    pools = []

    class Breaks(Pool):
        def __init__(self, *_, **__):
            super().__init__()
            self.broken = False
            pools.append(self)

        def submit(self, function, *jobs):
            bad = any({"block_m": 32} in job.tries for job in jobs)
            self.broken |= bad
            if not self.broken:
                return super().submit(function, *jobs)
            future = sweep.Future()
            future.set_exception(sweep.BrokenExecutor("a process has ended"))
            return future

    monkeypatch.setattr(sweep, "ProcessPoolExecutor", Breaks)
    sweep.part(context_of(tmp_path))
    rows = rows_of(tmp_path)
    assert rows["block_m=32"]["note"] == "the compiler aborts"
    assert [name for name, row in rows.items() if "aborts" in row["note"]] == ["block_m=32"]
    assert tiles_in(tmp_path) == {KEY: asdict(TILE) | {"block_m": 256}}


@once
def test_a_second_call_goes_on_with_what_is_missing(ran, tmp_path, monkeypatch):
    timed, pools = sweep._Sweep._try, []

    class Kept(Pool):
        def __init__(self, *_, **__):
            super().__init__()
            pools.append(self)

    monkeypatch.setattr(sweep, "ProcessPoolExecutor", Kept)
    with monkeypatch.context() as patch:
        done = []

        def stopped(*args):
            if len(done) == 3:
                raise OutOfTime
            done.append(timed(*args))

        patch.setattr(sweep._Sweep, "_try", stopped)
        with pytest.raises(OutOfTime):
            sweep.part(context_of(tmp_path))
    first = rows_of(tmp_path)
    assert [*first] == ["as it is", "block_m=128", "block_m=32", "block_n=32"]
    # What was found by then counts.
    assert tiles_in(tmp_path) == {KEY: asdict(TILE) | {"block_m": 128}}
    sweep.part(context_of(tmp_path))
    assert {"block_m": 128} not in pools[1].submitted and {"num_warps": 8} in pools[1].submitted
    assert tiles_in(tmp_path) == {KEY: asdict(TILE) | {"block_m": 256}}
    rows = read_rows(tmp_path / "rows.csv")
    sweep.part(context_of(tmp_path))
    assert read_rows(tmp_path / "rows.csv") == rows
    # None of them is a time of the ledger's.
    monkeypatch.setattr(ledger, "LEDGER", tmp_path / "ledger.csv")
    assert any(row["p50_ms"] for row in rows) and ledger.merge(rows) == 0


@once
def test_a_case_that_fails_is_a_row(ran, tmp_path, monkeypatch):
    case = Case("layer", "fused", "forward", "n=3", "bfloat16", lambda: 1 / 0)
    monkeypatch.setattr(sweep, "cases", lambda device, quick: [case])
    sweep.part(context_of(tmp_path))
    (row,) = read_rows(tmp_path / "rows.csv")
    assert row["note"].startswith("failed: ZeroDivisionError")


@once
def test_what_weighs_most_comes_first(tmp_path):
    names = {"small": 1, "large": 3, "timed": 2}
    made = [
        Case("op", "fused", name, "", "tf32", lambda: None, bytes=1e9 * size)
        for name, size in names.items()
    ]
    half = Case("op", "fused", "half", "", "bfloat16", lambda: None, bytes=1)
    context = context_of(tmp_path)
    context.recorder.write(
        op="op", implementation="fused", mode="timed, graph", dtype="tf32", p50_ms="50"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "cases", lambda device, quick: [*made, half])
        order = [case.mode for case in sweep._in_order(context)]
    assert order == ["half", "timed", "large", "small"]


def test_neighbours_and_what_is_tried_together():
    asked = Asked("kernel", TILE, BLOCKS)
    tries = tile_jobs.neighbours(asked)
    assert {"block_m": 32} in tries and {"block_n": 8} not in tries and {"maxnreg": 255} in tries
    assert {"by_l1": False} in tries and len(tries) <= 13
    ratios = [(0.9, {"num_warps": 8}), (0.95, {"block_m": 32}), (1.2, {"block_k": 64})]
    assert tile_jobs.combined(asked, ratios) == [{"num_warps": 8, "block_m": 32}]
    assert tile_jobs.combined(asked, [(0.9, {"block_m": 128})]) == [{"block_m": 256}]
    assert tile_jobs.combined(asked, [(0.995, {"block_m": 128})]) == []


@contextmanager
def without_a_device(arch):
    """The JIT's own way to machine code, short of the launch."""
    run, before = JITFunction.run, driver._active
    driver.set_active(_Absent(arch))
    with pretend(DeviceLimits(4, arch)), pytest.MonkeyPatch.context() as patch:

        def warm(self, *args, grid, warmup, **kwargs):
            return run(self, *args, grid=grid, warmup=True, **kwargs)

        patch.setattr(JITFunction, "run", warm)
        patch.setenv("TRITON_INTERPRET", "1")
        try:
            yield
        finally:
            driver._active = before


@pytest.mark.skipif(INTERPRETER, reason="the interpreter compiles nothing")
def test_what_is_compiled_ahead_is_what_a_launch_finds(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    case = next(case for case in tile_jobs.cases("cpu", True))
    limits = DeviceLimits(4, 89)
    run, usual = tile_jobs._recorded_case(tuple(case.labels.items()), True, limits)
    with asking() as asked, tile_jobs._recording(limits):
        run()
    (key,) = asked
    tries = [{"block_m": 128}, {"block_m": 48}, {"by_l1": False}, {"num_warps": 2}]
    job = Job(case.labels, True, key, tries, limits)
    right, refused, same, last = tile_jobs.compile_tries(job)
    assert "registers" in right.says and not right.problem and not last.problem
    assert refused.problem.startswith("refused: block_m=48") and "same" in same.problem
    ahead = sorted(os.listdir(tmp_path))
    for fields in (tries[0], tries[3]):
        with without_a_device(89), trying({key: fields}):
            run()
    assert sorted(os.listdir(tmp_path)) == ahead
    with without_a_device(89), trying({key: {"num_warps": 8}}):
        run()
    assert len(os.listdir(tmp_path)) > len(ahead)


@once
def test_merge_takes_tiles_over(tmp_path, monkeypatch):
    library = tmp_path / "library.json"
    monkeypatch.setattr(sweep, "TILES", library)

    def table(device, triton, date, **tiles):
        head = {"triton": triton, "torch": "2.11", "commit": "abc", "date": date}
        return {device: {**head, "tiles": tiles}}

    library.write_text("{}")
    assert sweep.merge(tmp_path / "nothing") == 0
    a, b, c = ({"block_m": n} for n in (1, 2, 3))
    folder = tmp_path / "out"
    folder.mkdir()

    def take(found):
        (folder / library.name).write_text(json.dumps(found))
        count = sweep.merge(folder)
        return count, json.loads(library.read_text())

    first = table("A", "3.6", "2026-01-02", x=a, y=a) | table("B", "3.6", "2026-01-02", x=a)
    assert take(first | table("C", "3.6", "2026-01-02")) == (3, first)
    _, now = take(table("A", "3.6", "2026-01-03", x=b, z=b))
    assert now["A"]["tiles"] == {"x": b, "y": a, "z": b} and now["B"] == first["B"]
    # An old folder does not undo a new one.
    _, now = take(table("A", "3.6", "2026-01-01", x=c, w=c))
    assert now["A"]["tiles"] == {"x": b, "y": a, "z": b, "w": c}
    assert now["A"]["date"] == "2026-01-03"
    other = table("A", "3.8", "2026-01-01", x=c)
    assert take(other)[1] == other | table("B", "3.6", "2026-01-02", x=a)


@pytest.mark.interpreter
@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETER, reason="needs TRITON_INTERPRET=1")
def test_rehearsal(tmp_path):
    recorder = Recorder(tmp_path / "quick.csv", "cpu", "abc1234")
    context = Context("cpu", True, recorder, time.monotonic() + 60, goes_on=True)
    sweep.part(context)
    rows = context.rows("sweep")
    timed = [row for row in rows if row["ratio"]]
    assert len(timed) >= 2 and all(float(row["error"]) < 0.05 for row in timed)
    assert all("registers" in row["note"] for row in timed)
    assert "are tried" in rows[-1]["note"]
    # Not where --merge looks.
    assert (tmp_path / "quick_tiles.json").exists() and not (tmp_path / "tiles.json").exists()
