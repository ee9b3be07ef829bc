"""Kernels of a step by the profiler: read from a trace, told what they are for, and summed."""

import gzip
import json
import os
import time
from unittest import mock

import pytest
import torch

from bench import trace
from bench.cases_steps import decoder_loss
from bench.gpu import kernel_profile
from bench.gpu.kernel_profile import Origin
from bench.kernel_counts import flops_of
from bench.launches import import_kernels
from bench.ledger import Recorder
from bench.measure import Context
from bench.peers import DECODER_LOSSES, FUSED, OURS, SAMPLING, loss_and_gradients
from bench.problems import build_problem
from bench.trace import Kernel
from bench.triton_calls import intercepted


def event(category, name, ts, dur, **args):
    thread = 7 if category in ("kernel", "gpu_memset") else 4711
    of = {"ph": "X", "cat": category, "name": name, "pid": 0, "tid": thread, "ts": ts, "dur": dur}
    return of | {"args": args}


def eager_trace():
    """Two runs: a product and this library's kernel, as Kineto writes them on CUDA."""
    events = [{"ph": "M", "name": "process_name", "pid": 0, "args": {"name": "python"}}]
    for run in range(2):
        at, correlation = 1000 * run, 10 * run
        events += [
            event("user_annotation", f"run:{run}", at, 900),
            event("gpu_user_annotation", f"run:{run}", at + 200, 500),
            # One operation within another: the inner one's launch is its own.
            event("user_annotation", f"at:{2 * run}", at + 10, 80),
            event("cpu_op", "aten::mm", at + 12, 70, **{"External id": 5}),
            event("cuda_runtime", "cudaLaunchKernel", at + 20, 5, correlation=correlation + 1),
            event("cuda_runtime", "cudaMemsetAsync", at + 30, 5, correlation=correlation + 2),
            event("user_annotation", f"at:{2 * run + 1}", at + 100, 50),
            event("cuda_driver", "cuLaunchKernelEx", at + 110, 5, correlation=correlation + 3),
            # Ends of launches: later than the next one begins.
            event("kernel", "_own_kernel", at + 400, 30 + run, correlation=correlation + 3,
                  **{"registers per thread": 126, "shared memory": 22528, "grid": [4, 1, 1]}),
            event("kernel", "cutlass_gemm", at + 300, 50 + 10 * run, correlation=correlation + 1),
            event("gpu_memset", "Memset (Device)", at + 360, 2, correlation=correlation + 2),
        ]  # fmt: skip
    return events


def test_an_eager_step_tells_what_its_kernels_are_for(tmp_path):
    path = tmp_path / "a.json.gz"
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": eager_trace()}, file)
    read = trace.read(path)
    assert [kernel.name for kernel in read.kernels[:3]] == [
        *("cutlass_gemm", "Memset (Device)", "_own_kernel"),
    ]
    product, own = Origin("mm 2x3", 100.0, 200.0), Origin("_own_kernel 4", 40.0)
    origins = {"at:0": product, "at:1": own, "at:2": product, "at:3": own}
    found = kernel_profile.of_eager(read, origins)
    assert [origin for _, origin in found] == [product, product, own]
    # Medians of both runs.
    assert [kernel.us for kernel, _ in found] == [55, 2, 30.5]
    assert found[2][0].registers == 126 and found[2][0].shared == 22528
    assert found[0][0].registers is None


def test_without_launches_kernels_keep_their_times():
    events = [e for e in eager_trace() if not str(e.get("cat")).startswith("cuda_")]
    found = kernel_profile.of_eager(trace.of_events(events[1:]), {"at:0": Origin("mm")})
    assert [(kernel.us, origin) for kernel, origin in found] == [
        (55, None),
        (2, None),
        (30.5, None),
    ]


def test_a_device_clock_apart_from_the_hosts_changes_nothing():
    apart = [e | {"ts": e["ts"] + 5000} if e.get("cat") in trace._DEVICE else e
             for e in eager_trace()[1:]]  # fmt: skip
    found = kernel_profile.of_eager(trace.of_events(apart), {"at:0": Origin("mm")})
    assert [kernel.us for kernel, _ in found] == [55, 2, 30.5]


def test_replays_that_a_session_lost_are_not_missed():
    events = []
    for at in range(1, 4):
        # Fills of the seeds, launched on their own, go before each replay.
        events += [event("cuda_runtime", "cudaLaunchKernel", 100 * at, 1, correlation=50 + at)]
        events += [event("kernel", "fill", 100 * at + 1, 1, correlation=50 + at)]
        events += [event("cuda_runtime", "cudaGraphLaunch", 100 * at + 2, 1, correlation=at)]
        events += [event("kernel", n, 100 * at + i, at, correlation=at)
                   for i, n in enumerate("ab", 10)]  # fmt: skip
    # Of four replays the first is lost, and half of the second.
    kept = [e for e in events if (e["name"], e["args"]["correlation"]) != ("a", 1)]
    found = trace.medians(trace.replays(trace.of_events(kept), 4))
    assert [(kernel.name, kernel.us) for kernel in found] == [("a", 2.5), ("b", 2.5)]


def test_replays_are_told_apart_by_their_launch_or_by_their_number():
    def kernels(correlations):
        return [
            Kernel(name, 10 * i + j, 1.0 + i, None, correlation)
            for i, correlation in enumerate(correlations)
            for j, name in enumerate(("a", "b"))
        ]

    for correlations in ((5, 6, 7), (None,) * 3):
        runs = trace.replays(trace.Trace(kernels(correlations), []), 3)
        assert [[kernel.name for kernel in run] for run in runs] == [["a", "b"]] * 3
        assert [kernel.us for kernel in trace.medians(runs)] == [2.0, 2.0]
    # One kernel is missing, and nothing tells of which replay.
    assert trace.replays(trace.Trace(kernels((None,) * 3)[:-1], []), 3) == []
    assert trace.medians([]) == []


def test_captured_kernels_are_told_by_the_order_of_their_names():
    def origins(*labels, kernel=None):
        return [Origin(label, 1.0, None, kernel) for label in labels]

    eager = [*zip([Kernel(n, 0, 1) for n in "xyx"], origins("x1", "y1", "x2"), strict=True)]
    captured = [Kernel(name, 0, 1) for name in ("x", "own", "x", "y", "y", "own")]
    found = kernel_profile.matching(captured, eager, origins("own1", "own2", kernel="own"))
    labels = [origin and origin.label for _, origin in found]
    # There is one y more than the eager step has: nobody knows which.
    assert labels == ["x1", "own1", "x2", None, None, "own2"]


def test_launches_of_one_kernel_for_alike_are_summed():
    own = Origin("own 3", 2e6, 4e9)
    found = [(Kernel("own", 0, us, None, None, False, 80, 1024), own) for us in (10.0, 30.0)]
    found += [(Kernel("own", 0, 5.0), None), (Kernel("fill", 0, 50.0), Origin("fill", 1e6))]
    fill, first, rest = kernel_profile.table_of(found, 200.0)
    assert (first["launches"], first["us"], first["share"]) == ("2", "40.000", "0.2000")
    assert (first["gb_per_s"], first["tflop_per_s"]) == ("100", "200")
    assert (first["registers"], first["shared"]) == ("80", "1024")
    assert fill["gb_per_s"] == "20" and "flops" not in fill
    assert rest["kernel"] == "own" and "bytes" not in rest and rest["registers"] == ""


@pytest.mark.parametrize("workload", ["celeba16", "mnist2"])
def test_flops_of_the_kernels_are_those_of_the_step(workload):
    import_kernels()
    problem, total = build_problem(workload, 4), []
    loss = DECODER_LOSSES[FUSED](problem.decoder)
    with (
        mock.patch.dict(os.environ, TRITON_INTERPRET="1"),
        # Nothing runs: only what is launched counts.
        intercepted(lambda call, go: total.append(flops_of(call.kernel, call.arguments) or 0)),
    ):
        loss_and_gradients(loss, problem, "bfloat16")
    (case,) = decoder_loss("cpu", [workload], 4, ["bfloat16"], [FUSED])
    # All but the layer of the latents, whose products are no products of matrices there.
    assert 0.99 * case.flops < sum(total) < case.flops


def test_launches_count_the_slots_that_they_take():
    import_kernels()
    problem, found = build_problem("celeba16", 4), {}
    loss = DECODER_LOSSES[FUSED](problem.decoder)

    def note(call, go):
        origin = kernel_profile.of_call(call)
        found.setdefault(origin.label, (origin, call.moved))

    with (
        mock.patch.dict(os.environ, TRITON_INTERPRET="1"),
        intercepted(note),
    ):
        loss_and_gradients(loss, problem, "bfloat16")
    stacks = "tangent_doubling_kernel 17x4x16x16x32 17x4x32x32x32"
    values, tangents = (found[f"{stacks} {part}"][0] for part in ("values", "tangents"))
    x, y, weight = 2 * 4 * 16 * 16 * 32, 2 * 4 * 32 * 32 * 32, 2 * 32 * 16 * 32
    assert values.bytes == pytest.approx(x + y + weight + 4 * 32, abs=4 * 32)
    # The slope is read off the values' result.
    assert tangents.bytes == pytest.approx(16 * x + 17 * y + weight)
    # Whatever takes no part of a stack moves what it is given.
    for origin, moved in found.values():
        assert origin.bytes <= moved
        if not origin.label.startswith(("tangent_product", "tangent_doubling", "tangent_narrow")):
            assert origin.bytes == moved


def test_operations_tell_their_bytes_and_flops():
    a, b = torch.ones(4, 8), torch.ones(8, 2)
    found = kernel_profile.of_operation(torch.ops.aten.mm.default, ((a, b), {}), a @ b)
    assert found == Origin("mm 4x8 8x2", 4 * (32 + 16 + 8), 2 * 4 * 8 * 2)


def test_the_part_writes_a_table_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_profile, "TRITON", OURS)
    monkeypatch.setattr(kernel_profile, "FUSED", OURS)
    recorder = Recorder(tmp_path / "rows.csv", "cpu", "abc1234")
    context = Context("cpu", True, recorder, time.monotonic() + 60, goes_on=True)
    kernel_profile.part(context)
    rows = context.rows("profile")
    assert {row["implementation"] for row in rows if "kernels of" in row["note"]} == {
        OURS,
        SAMPLING,
    }
    # Without the interpreter or a GPU the library's products have none of their activations.
    (failed,) = (row for row in rows if "kernels of" not in row["note"])
    assert "TRITON_INTERPRET" in failed["note"]
    kernels = kernel_profile.read_kernels(tmp_path)
    assert any(row["kernel"].startswith("addmm ") and float(row["flops"]) > 0 for row in kernels)
    again = Context("cpu", True, recorder, context.deadline, goes_on=True)
    before = recorder.path.read_text()
    kernel_profile.part(again)
    assert recorder.path.read_text() == before


def test_a_case_that_has_ended_its_process_is_not_profiled_again(tmp_path, monkeypatch):
    recorder = Recorder(tmp_path / "rows.csv", "cpu", "abc1234")
    context = Context("cpu", True, recorder, time.monotonic() + 60, goes_on=True)
    for step, case in kernel_profile._steps(context):
        ended = f"ended its process with status {step}"
        recorder.write(**case.labels | {"op": "profile"}, note=ended)
    monkeypatch.setattr(kernel_profile, "_profiled", lambda *_: pytest.fail("profiled"))
    kernel_profile.part(Context("cpu", True, recorder, context.deadline, goes_on=True))
