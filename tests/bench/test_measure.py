"""Cases, checked, timed and recorded on the CPU; and that what is known is not run again."""

import contextlib
import json
import time
from types import SimpleNamespace

import pytest
import torch

from bench.ledger import Recorder, read_rows
from bench.measure import RUNNING, Case, Context, OutOfTime, Prepared
from bench.problems import relative_error
from bench.timing import captured


@pytest.fixture
def context(tmp_path):
    recorder = Recorder(tmp_path / "rows.csv", "cpu", "abc1234")
    return Context("cpu", True, recorder, time.monotonic() + 60)


def rows_of(context):
    return read_rows(context.recorder.path)


def case(run, error=None, **kwargs):
    prepared = Prepared([run], error)
    return Case("op", "someone", "forward", "n=3", "float32", lambda: prepared, **kwargs)


@pytest.mark.parametrize("error", [1.0, float("nan")])
def test_a_wrong_result_gets_no_time(context, error):
    assert context.run(case(lambda: (torch.ones(3),), lambda outputs: error)) == {}
    (row,) = rows_of(context)
    assert not row["p50_ms"] and row["note"].startswith("not timed: wrong against float64")


def test_a_failing_case_becomes_a_row_and_the_next_one_runs(context):
    def broken():
        raise ValueError("no such kernel\nsecond line")

    context.run(case(broken))
    context.run(case(lambda: (torch.ones(3),), lambda outputs: 0.0))
    failed, good = rows_of(context)
    assert failed["note"] == "failed: ValueError: no such kernel" and not failed["p50_ms"]
    assert float(good["p50_ms"]) >= 0 and good["error"] == "0.00e+00"


def test_no_case_starts_after_the_deadline(context):
    context.deadline = time.monotonic() - 1
    with pytest.raises(OutOfTime):
        context.run(case(lambda: (torch.ones(3),)))
    assert rows_of(context) == []


def test_cuda_rows_name_their_launch_and_peak_memory(context, pretended_cuda):
    context.device = "cuda"
    made = case(lambda: (torch.ones(3),), lambda outputs: 0.0, launches=("eager", "graph"))
    timings = context.run(made)
    eager, graph = rows_of(context)
    assert [row["mode"] for row in (eager, graph)] == ["forward, eager", "forward, graph"]
    assert eager["p50_ms"] == graph["p50_ms"] == "6" and timings["graph"].p50 == 6.0
    assert eager["peak_mib"] == "2.0"


def test_what_cannot_be_captured_keeps_its_eager_time(context, pretended_cuda, monkeypatch):
    def refuse(graph):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    context.device = "cuda"
    context.run(case(lambda: (torch.ones(3),), launches=("eager", "graph")))
    eager, graph = rows_of(context)
    assert eager["p50_ms"] == "6" and not graph["p50_ms"]
    assert graph["mode"] == "forward, graph" and "stream is capturing" in graph["note"]


def test_relative_error_takes_the_worst_and_hands_on_nan():
    want = torch.tensor([3.0, 4.0]).double()
    got = [want.float(), torch.tensor([3.0, 4.5])]
    assert relative_error(got, [want, want]) == pytest.approx(0.1)
    assert torch.tensor(relative_error([want, want * float("nan")], [want, want])).isnan()


def again(context):
    """A second call on the same file."""
    return Context("cpu", True, context.recorder, time.monotonic() + 60, goes_on=True)


def test_a_second_call_runs_what_is_missing(context):
    ran = []
    one = case(lambda: ran.append(1) or (torch.ones(3),))
    broken = Case(*("op", "other", "forward", "n=3", "float32"), lambda: 1 / 0)
    first = context.run(one)
    context.run(broken)
    before = len(ran), rows_of(context)
    second = again(context)
    # To the digits that a row has.
    assert second.run(one)["eager"].p50 == pytest.approx(first["eager"].p50, rel=1e-3)
    assert second.run(broken) == {}
    assert (len(ran), rows_of(context)) == before
    # Another commit's rows tell nothing.
    other = Recorder(context.recorder.path, "cpu", "def5678")
    assert Context("cpu", True, other, second.deadline, goes_on=True).run(one)
    assert len(ran) > before[0]
    # Nor do those of a benchmark that is asked to measure anew.
    assert context.run(one) and len(rows_of(context)) == len(before[1]) + 2


def test_what_had_no_time_is_run_by_a_second_call(context):
    labels = {"op": "op", "implementation": "someone"}
    context.recorder.write(**labels, note="not run to its end: stopped after 3 s")
    assert again(context).known(labels) is None
    context.recorder.write(**labels, note="3 passed")
    assert again(context).known(labels)["note"] == "3 passed"


def test_what_ends_a_process_is_left_behind(context):
    second = again(context)
    marker = second.folder / RUNNING
    with pytest.raises(KeyError), second.running({"op": "a"}):
        assert json.loads(marker.read_text())["op"] == "a"
        raise KeyError
    assert json.loads(marker.read_text())["op"] == "a"
    with second.running({"op": "b"}):
        pass
    assert not marker.exists()
    # A part that runs out of time has done nothing wrong.
    with pytest.raises(OutOfTime), second.running({"op": "c"}):
        raise OutOfTime
    assert not marker.exists()


def test_the_last_row_of_a_case_counts(context):
    for note in ("old", "new"):
        context.recorder.write(op="a", implementation="x", note=note)
    context.recorder.write(op="a", implementation="y", note="other")
    Recorder(context.recorder.path, "cpu", "def5678").write(op="a", implementation="z")
    assert [row["note"] for row in context.rows("a")] == ["new", "other"]


def test_a_broken_capture_tells_what_the_run_says_and_leaves_no_stream(monkeypatch):
    set_to = []

    @contextlib.contextmanager
    def graph(_):
        try:
            yield
        finally:
            raise RuntimeError("failed due to a previous error during capture")

    before, its = (SimpleNamespace(wait_stream=lambda other: None, at=at) for at in range(2))
    current = iter([before, before, its])
    for name, value in {
        "Stream": lambda: before,
        "stream": lambda _: contextlib.nullcontext(),
        "current_stream": lambda: next(current),
        "synchronize": lambda: None,
        "CUDAGraph": lambda: None,
        "graph": graph,
        "set_stream": set_to.append,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    runs = iter([lambda: 1, lambda: 2, lambda: 1 / 0])
    with pytest.raises(ZeroDivisionError):
        captured(lambda: next(runs)())
    assert set_to == [before]
