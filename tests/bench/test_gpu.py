"""The GPU runbook's code, run small on the CPU: its rows, its checks, and how it survives."""

import contextlib
import json
import os
import select
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import cases_layers, ceilings, choices, gpu, gpu_correctness, gpu_sections, ledger
from bench.ledger import Recorder, read_rows
from bench.measure import Case, Context, OutOfTime, Prepared
from bench.problems import TOLERANCE, relative_error
from bench.timing import Timing, time_graph
from fastsfvae.ops import _gpu
from fastsfvae.ops.dispatch import decide


@pytest.fixture
def context(tmp_path):
    recorder = Recorder(tmp_path / gpu.ROWS, "cpu", "abc1234")
    return Context("cpu", True, recorder, time.monotonic() + 60)


def rows_of(context):
    return read_rows(context.recorder.path)


def case(run, error=None, **kwargs):
    prepared = Prepared([run], error)
    return Case("op", "someone", "forward", "n=3", "float32", lambda: prepared, **kwargs)


@pytest.mark.parametrize(
    "section, ours, peers",
    [
        (gpu_sections.kernels, 5, 0),
        (gpu_sections.loss_only, 2, 6),
        (gpu_sections.decoder_loss, 3, 9),
        (gpu_sections.training_step, 3, 6),
    ],
)
def test_a_section_times_what_is_right_and_says_why_it_leaves_out_the_rest(
    context, section, ours, peers
):
    section(context)
    rows = rows_of(context)
    torch_rows = [row for row in rows if row["implementation"] == "fastsfvae[torch]"]
    triton_rows = [row for row in rows if row["implementation"] == "fastsfvae[triton]"]
    others = [row for row in rows if "fastsfvae" not in row["implementation"] and row["p50_ms"]]
    assert len(torch_rows) == ours and len(others) >= peers
    for row in torch_rows:
        assert float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert float(row["error"]) <= TOLERANCE[row["dtype"]]
        assert row["commit"] == "abc1234" and row["torch"] == torch.__version__
    # Without a GPU or the interpreter: each is a row that gives the reason, and no time.
    assert triton_rows
    assert all(not row["p50_ms"] and "TRITON_INTERPRET" in row["note"] for row in triton_rows)


def test_step_rows_state_their_ratio_to_the_sampling_step(context):
    gpu_sections.training_step(context)
    rows = rows_of(context)
    ours = next(row for row in rows if row["implementation"] == "fastsfvae[torch]")
    sampling = next(row for row in rows if row["implementation"] == "sampling")
    ratio = float(ours["p50_ms"]) / float(sampling["p50_ms"])
    assert float(ours["ratio"]) == pytest.approx(ratio, abs=6e-4 + 1e-3 * ratio)
    assert ours["ratio_to"] == "sampling" and not sampling["ratio"]


def test_ceilings_become_shares(context):
    ceilings.section(context)
    later = Context("cpu", True, context.recorder, context.deadline)
    assert later.limit.keys() == {"copy", *ceilings.PRODUCTS}
    seconds = float(rows_of(context)[0]["p50_ms"]) / 1e3
    assert later.limit["copy"] == pytest.approx(2 * 4 * 2**16 / seconds, rel=1e-3)
    later.limit = {"copy": 1e9, "float32": 1e12}
    x = torch.ones(3)
    # 1 ms of traffic and 2 ms of arithmetic: the larger is the floor.
    columns = later.columns(case(lambda: (x,), bytes=1e6, flops=2e9), Timing(8.0, 7.0, 9.0))
    assert float(columns["share_of_ceiling"]) == 0.25
    assert float(columns["bytes_per_s"]) == pytest.approx(1.25e8)


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


@pytest.fixture
def pretended_cuda(monkeypatch):
    """Stands in for what the timing calls of torch.cuda; 6 ms pass between any two events."""
    event = SimpleNamespace(record=lambda: None, elapsed_time=lambda end: 6.0)
    stream = SimpleNamespace(wait_stream=lambda other: None)
    replays = []
    stubs = {
        "Event": lambda enable_timing: event,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": contextlib.nullcontext,
        "graph": contextlib.nullcontext,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: replays.append(1)),
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 2**20,
        "max_memory_allocated": lambda: 3 * 2**20,
    }
    for name, stub in stubs.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    return replays


def test_a_graph_of_several_runs_is_divided_by_their_number(pretended_cuda):
    ran = []
    timing = time_graph([lambda i=i: ran.append(i) or () for i in range(3)], 1e-9)
    assert timing == Timing(2.0, 2.0, 2.0)
    # Twice to warm up, once to capture; only replays are timed.
    assert ran == [0, 1, 2] * 3 and len(pretended_cuda) >= 6


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


def test_short_training_compares_the_backends(context, monkeypatch):
    curves = {"torch": [2.0, 1.0], "triton": [2.0, 1.1], "auto": [3.0, 2.0]}
    monkeypatch.setattr(gpu_sections, "_train", lambda config: (curves[config.backend], 0.3))
    gpu_sections.short_training(context)
    rows = {row["implementation"]: row for row in rows_of(context)}
    assert rows["fastsfvae[triton]"]["error"] == "1.00e-01"
    assert "loss 2.000 to 1.000; 100.000 ms a step" in rows["fastsfvae[torch]"]["note"]
    assert not rows["sampling"]["error"]


def test_every_module_with_a_test_for_a_device_is_a_suite():
    chosen = set(gpu_correctness.suites())
    folder = Path(__file__).parents[1] / "kernels"
    kernels = {f"kernels/{path.stem}" for path in folder.glob("test_*.py")}
    # The interpreter's and the compiler's alone.
    names = "test_offsets", "test_audit", "test_machine_code", "test_launches"
    assert kernels - chosen == {f"kernels/{name}" for name in names}
    loss = {"loss/test_graphed", "loss/test_compose", "loss/test_elbo_triton"}
    assert loss | {"gram/test_sources"} <= chosen
    assert "cli/test_train" not in chosen


def test_suites_are_counted_line_by_line(context):
    text = (
        "tests/test_x.py::TestKernel::test_a[1-2] PASSED [ 33%]\n"
        "tests/test_x.py::test_b SKIPPED (no GPU) [ 66%]\n"
        "tests/test_x.py::test_c FAILED [100%]\n"
        "FAILED tests/test_x.py::test_c - AssertionError: error 2 above 1\n"
    )
    gpu_correctness._record(context, "test_x", text, -9)
    whole, failed = rows_of(context)
    assert whole["note"].startswith("1 passed, 1 failed, 1 skipped; pytest ended with status -9")
    assert failed["shape"] == "test_c" and failed["note"] == "AssertionError: error 2 above 1"
    gpu_correctness._record(context, "test_y", "", -9)
    assert rows_of(context)[-1]["note"].endswith("pytest ended with status -9: no output")


def test_late_suites_are_stopped_together(context, monkeypatch):
    started = []

    def start(suite, selection, log):
        log.touch()
        started.append(subprocess.Popen(["sleep", "60"]))
        return started[-1]

    monkeypatch.setattr(gpu_correctness, "_start", start)
    monkeypatch.setattr(gpu_correctness, "suites", lambda: tuple(map(str, range(8))))
    context.quick, context.deadline = False, time.monotonic()
    before = time.monotonic()
    gpu_correctness.section(context)
    # Not a second each.
    assert time.monotonic() - before < 4
    assert len(started) == 8 and all(process.returncode for process in started)


def test_command_runs_a_section_in_a_process_of_its_own(tmp_path, capsys):
    arguments = ["--out", str(tmp_path), "--device", "cpu", "--quick", "--only", "ceilings"]
    assert gpu.main(arguments) == 0
    rows = read_rows(tmp_path / gpu.QUICK_ROWS)
    assert [row["dtype"] for row in rows] == ["float32", *ceilings.PRODUCTS]
    assert all(float(row["p50_ms"]) > 0 for row in rows)
    assert "ceilings: done" in capsys.readouterr().out


def test_command_survives_a_section_that_dies_and_one_that_hangs(tmp_path, monkeypatch):
    spawn, (reading, writing) = subprocess.Popen, os.pipe()

    def spawned(command, **kwargs):
        script = "kill -SEGV $$" if "ceilings" in command else "sleep 60 & wait"
        return spawn(["sh", "-c", script], pass_fds=[writing], **kwargs)

    # Provenance asks git, by the same function.
    monkeypatch.setattr(ledger, "commit", lambda: "x")
    monkeypatch.setattr(gpu, "Recorder", lambda path, device, commit: Recorder(path, device, "x"))
    monkeypatch.setattr(gpu.subprocess, "Popen", spawned)
    monkeypatch.setattr(gpu, "GRACE", 2.0)
    arguments = ["--out", str(tmp_path), "--device", "cpu", "--only", "ceilings", "kernels"]
    assert gpu.main([*arguments, "--minutes", "0.1"]) == 0
    died, hung = read_rows(tmp_path / gpu.ROWS)
    assert died["op"] == "ceilings" and "status -11" in died["note"]
    assert hung["op"] == "kernels" and "stopped after 1 s" in hung["note"]
    # What a section had started is gone as well: nobody is left to write.
    os.close(writing)
    assert select.select([reading], [], [], 10)[0] and os.read(reading, 1) == b""
    os.close(reading)


def test_sections_without_time_left_are_named(tmp_path):
    arguments = ["--out", str(tmp_path), "--device", "cpu", "--quick", "--minutes", "0.1"]
    assert gpu.main(arguments) == 0
    rows = read_rows(tmp_path / gpu.QUICK_ROWS)
    assert [row["op"] for row in rows] == list(gpu.SECTIONS)
    assert {row["note"] for row in rows} == {"not run: out of time"}


def test_merge_appends_each_time_once(tmp_path, monkeypatch, context):
    book = tmp_path / "ledger.csv"
    book.write_text(",".join(ledger.COLUMNS) + "\n")
    monkeypatch.setattr(ledger, "LEDGER", book)
    monkeypatch.setattr(choices, "MEASURED", tmp_path / "measured.json")
    context.run(case(lambda: (torch.ones(3),)))
    context.run(case(lambda: 1 / 0))
    for _ in range(2):
        assert gpu.main(["--out", str(tmp_path), "--merge"]) == 0
    (row,) = read_rows(book)
    assert row["op"] == "op" and row["commit"] == "abc1234" and float(row["p50_ms"]) >= 0


def layer_rows(device, milliseconds):
    """Rows of every layer's cases; the backward takes twice as long as the forward."""
    cases = (
        (n, d, i)
        for n in cases_layers.LAYERS
        for d in cases_layers.DTYPES
        for i in [*cases_layers.implementations(d)]
    )
    for name, dtype, implementation in cases:
        for mode, factor in (("forward, graph", 1), ("backward, graph", 2)):
            yield {
                "op": cases_layers.OPERATION,
                "implementation": implementation,
                "shape": cases_layers.label(name),
                "dtype": dtype,
                "mode": mode,
                "device": device,
                "p50_ms": str(factor * milliseconds(name, dtype, implementation)),
            }


def test_the_ledger_tells_which_layers_to_fuse(monkeypatch):
    def milliseconds(name, dtype, implementation):
        if implementation == cases_layers.LIBRARY:
            return 2.0
        exact = {"fused, ieee": 1.9, "fused, tf32x3": 1.5}.get(implementation, 1.0)
        return exact if name != "deconv3" else 3.0

    old = [
        row | {"p50_ms": "0.1"}
        for row in layer_rows("a card", milliseconds)
        if row["implementation"] == cases_layers.LIBRARY
    ]
    table = choices.choose([*old, *layer_rows("a card", milliseconds)])
    assert table.keys() == {"a card"} and table["a card"]["float32"] == "tf32x3"
    for name, size in cases_layers.LAYERS.items():
        for product in ("tf32", "tf32x3", "half"):
            how = "library" if name == "deconv3" else "fused"
            assert table["a card"]["layers"][size.key(product)] == how
    assert len(table["a card"]["layers"]) == 12
    # What the table says, the library does.
    monkeypatch.setitem(_gpu.MEASURED, "a card", table["a card"])
    card = _gpu.Gpu("a card", 90, 1e11, 1e12)
    shapes = (64, 4, 4), (64, 64, 4, 4), (64, 8, 8)
    choice = decide("conv_transpose2d", *shapes, device=card, dtype=torch.bfloat16)
    assert choice[:2] == ("fused", "measured on a card")


def test_half_measured_layers_are_not_chosen():
    rows = list(layer_rows("a card", lambda *_: 1.0))
    assert choices.choose(row for row in rows if "forward" in row["mode"]) == {}
    assert choices.choose(row | {"p50_ms": ""} for row in rows) == {}
    plain = choices.choose(row for row in rows if "tf32x3" not in row["implementation"])
    assert "float32" not in plain["a card"]
    assert not any(key.endswith(("ieee", "x3")) for key in plain["a card"]["layers"])


def test_the_shipped_table_is_what_the_ledger_says():
    assert json.loads(choices.MEASURED.read_text()) == choices.choose(read_rows(ledger.LEDGER))
