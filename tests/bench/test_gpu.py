"""The GPU runbook, run small on the CPU: its parts, its page, and how it survives."""

import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import choices, ledger
from bench.gpu import __main__ as gpu
from bench.gpu import correctness, page, runner, sections, timings
from bench.gpu.parts import PARTS, Part, with_needed
from bench.ledger import Recorder, read_rows
from bench.measure import LABELS, RUNNING, Case, Context, Prepared
from bench.peers import OURS, SAMPLING, TRITON
from bench.problems import TOLERANCE
from tests._triton import INTERPRETER

ROOT = Path(__file__).parents[2]
once = pytest.mark.skipif(INTERPRETER, reason="runs the same in either run of the suite")


@pytest.fixture
def context(tmp_path):
    recorder = Recorder(tmp_path / gpu.ROWS, "cpu", "abc1234")
    return Context("cpu", True, recorder, time.monotonic() + 60)


def rows_of(context):
    return read_rows(context.recorder.path)


@once
@pytest.mark.parametrize(
    "part, ours, others",
    [(timings.operations, 7, 4), (timings.headlines, 0, 1), (timings.peers, 2, 4)],
)
def test_a_part_times_what_is_right_and_says_why_it_leaves_out_the_rest(
    context, part, ours, others
):
    part(context)
    rows = rows_of(context)
    torch_rows = [row for row in rows if row["implementation"] == OURS]
    triton_rows = [row for row in rows if row["implementation"] == TRITON]
    peers = [row for row in rows if "fastsfvae" not in row["implementation"] and row["p50_ms"]]
    assert len(torch_rows) == ours and len(peers) >= others
    for row in torch_rows:
        assert float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert float(row["error"]) <= TOLERANCE[row["dtype"]]
        assert row["commit"] == "abc1234" and row["torch"] == torch.__version__
    # Without a GPU or the interpreter: each is a row that gives the reason, and no time.
    assert triton_rows or part is timings.peers
    assert all(not row["p50_ms"] and "TRITON_INTERPRET" in row["note"] for row in triton_rows)


def test_curves_compare_the_backends(context, monkeypatch):
    found = {"torch": [2.0, 1.0], "triton": [2.0, 1.1], "auto": [3.0, 2.0]}
    monkeypatch.setattr(timings, "_train", lambda config: (found[config.backend], 0.3))
    timings.curves(context)
    rows = {row["implementation"]: row for row in rows_of(context)}
    assert rows[TRITON]["error"] == "1.00e-01"
    assert "loss 2.000 to 1.000; 100.000 ms a step" in rows[OURS]["note"]
    assert not rows[SAMPLING]["error"]


def test_every_module_with_a_test_for_a_device_is_a_suite():
    chosen = set(correctness.suites())
    folder = Path(__file__).parents[1] / "kernels"
    kernels = {f"kernels/{path.stem}" for path in folder.glob("test_*.py")}
    # The interpreter's and the compiler's alone.
    names = "test_offsets", "test_audit", "test_machine_code", "test_launches", "test_options"
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
    correctness._record(context, "test_x", text, -9)
    whole, failed = rows_of(context)
    assert whole["note"].startswith("1 passed, 1 failed, 1 skipped; pytest ended with status -9")
    assert failed["shape"] == "test_c" and failed["note"] == "AssertionError: error 2 above 1"
    correctness._record(context, "test_y", "", -9)
    assert rows_of(context)[-1]["note"].endswith("pytest ended with status -9: no output")


@pytest.mark.slow
def test_a_suite_that_was_stopped_is_run_by_a_second_call(context, monkeypatch):
    monkeypatch.setattr(correctness, "suites", lambda: ("no/such", "neither/this"))
    context.quick, context.deadline = False, time.monotonic() + 0.3
    # The first is stopped while it starts, and there is no time for the second.
    with pytest.raises(gpu.OutOfTime):
        correctness.part(context)
    (row,) = rows_of(context)
    assert row["note"].startswith("not run to its end: 0 passed")
    later = Context("cpu", False, context.recorder, time.monotonic() + 60, goes_on=True)
    correctness.part(later)
    rows = later.rows("tests")
    assert [row["implementation"] for row in rows] == ["no/such", "neither/this"]
    assert all("pytest ended with status 4" in row["note"] for row in rows)


class Children:
    """Stands in for the parts' processes: shell scripts, one a start of a part."""

    def __init__(self, monkeypatch, **scripts):
        self.scripts, self.started, spawn = scripts, [], subprocess.Popen

        def spawned(command, **kwargs):
            if "--part" not in command:
                # Provenance asks git, by the same function.
                return spawn(command, **kwargs)
            name = command[command.index("--part") + 1]
            self.started.append(name)
            script = self.scripts[name].pop(0)
            return spawn(["sh", "-c", script], **self.inherits, **kwargs)

        self.inherits = {}
        monkeypatch.setattr(runner.subprocess, "Popen", spawned)
        monkeypatch.setattr(runner, "GRACE", 2.0)


def run_parts(folder, names, minutes=1.0):
    recorder = Recorder(folder / "rows.csv", "cpu", "x")
    folder.mkdir(parents=True, exist_ok=True)
    runner.Runner(recorder, minutes, [], "cpu").run(names)
    return read_rows(recorder.path)


def test_a_part_begins_again_behind_what_ended_it(tmp_path, monkeypatch):
    dies = f'echo \'{{"op": "bad", "dtype": "tf32"}}\' > {tmp_path / RUNNING}; kill -SEGV $$'
    children = Children(monkeypatch, layers=[dies, "exit 0"], peers=["exit 3"], sweep=["exit 75"])
    rows = run_parts(tmp_path, ["layers", "peers", "sweep"])
    assert children.started == ["layers", "layers", "peers", "sweep"]
    bad, layers, peers, sweep = rows
    assert (bad["op"], bad["dtype"]) == ("bad", "tf32") and "status -11" in bad["note"]
    assert layers["op"] == "part" and "status -11" in layers["note"]
    # Without a word on what it was at there is nothing to begin behind.
    assert "status 3" in peers["note"] and sweep["note"].startswith("out of time")


def test_a_case_that_has_said_what_broke_the_device_is_not_told_again(tmp_path, monkeypatch):
    labels = dict.fromkeys(LABELS, "") | {"op": "bad"}
    Recorder(tmp_path / "said.csv", "cpu", "x").write(**labels, note="failed: illegal access")
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    dies = f"cd {tmp_path}; cp said.csv rows.csv; cp labels.json {RUNNING}; exit 1"
    children = Children(monkeypatch, layers=[dies, "exit 0"])
    bad, part = run_parts(tmp_path, ["layers"])
    assert bad["note"] == "failed: illegal access" and part["op"] == "part"
    assert children.started == ["layers", "layers"]


def test_a_part_does_not_begin_again_at_what_has_ended_it_twice(tmp_path, monkeypatch):
    dies = f'echo \'{{"op": "bad"}}\' > {tmp_path / RUNNING}; exit 1'
    children = Children(monkeypatch, layers=[dies] * 3)
    rows = run_parts(tmp_path, ["layers"])
    assert children.started == ["layers", "layers"] and rows[-1]["note"].count("status 1") == 2


def test_a_part_that_hangs_is_stopped_with_all_that_it_started(tmp_path, monkeypatch):
    reading, writing = os.pipe()
    children = Children(monkeypatch, layers=["sleep 60 & wait"])
    children.inherits = {"pass_fds": [writing]}
    monkeypatch.setitem(PARTS, "layers", Part("a:b", 0.1, "says", most=0.03))
    (row,) = run_parts(tmp_path, ["layers"])
    assert "stopped after 2 s" in row["note"]
    # Nobody is left to write.
    os.close(writing)
    assert select.select([reading], [], [], 10)[0] and os.read(reading, 1) == b""
    os.close(reading)


def test_what_a_part_leaves_over_the_next_one_has(tmp_path):
    recorder = Recorder(tmp_path / "rows.csv", "cpu", "x")
    run = runner.Runner(recorder, 10, [], "cpu")
    names = ["smoke", "layers", "correctness"]
    smoke, layers, last = (run._allowed(names, at) for at in range(3))
    # Nothing has been used yet: each may have all but the others' shares.
    assert smoke == pytest.approx(590 - 600 * (PARTS["layers"].share + 0.1), abs=1)
    assert layers == pytest.approx(590 - 600 * 0.1, abs=1)
    assert last == pytest.approx(600 * 0.1, abs=1)
    assert sum(part.share for part in PARTS.values()) == pytest.approx(1)


def test_what_a_part_needs_runs_before_it():
    assert with_needed(["profile", "smoke"]) == ["compile", "smoke", "profile"]
    assert with_needed(["layers"]) == ["layers"] and with_needed(PARTS) == [*PARTS]


def test_parts_without_time_left_are_named(tmp_path):
    arguments = ["--out", str(tmp_path), "--device", "cpu", "--quick", "--minutes", "0.1"]
    assert gpu.main(arguments) == 0
    rows = read_rows(tmp_path / gpu.QUICK_ROWS)
    assert [row["implementation"] for row in rows] == list(PARTS)
    assert {row["note"] for row in rows} == {"not run: out of time"}


@pytest.mark.slow
def test_a_call_goes_on_from_another_folder(tmp_path, capsys):
    before, now = tmp_path / "before", tmp_path / "now"
    for folder, options in ((before, []), (now, ["--after", str(before)])):
        arguments = ["--out", str(folder), "--device", "cpu", "--quick", "--commit", "abc1234"]
        assert gpu.main([*arguments, "--only", "ceilings", *options]) == 0
    first, second = (read_rows(folder / gpu.QUICK_ROWS) for folder in (before, now))
    assert any(row["op"] == "ceiling" and row["p50_ms"] for row in first)
    # Nothing is measured again, and nothing of the first call's is changed.
    assert [row["op"] for row in second[len(first) :]] == ["part"]
    assert second[: len(first)] == first
    assert "ceilings: done" in capsys.readouterr().out


def test_merge_appends_each_time_once(tmp_path, monkeypatch, context):
    book = tmp_path / "ledger.csv"
    book.write_text(",".join(ledger.COLUMNS) + "\n")
    monkeypatch.setattr(ledger, "LEDGER", book)
    monkeypatch.setattr(choices, "MEASURED", tmp_path / "measured.json")
    right = Prepared([lambda: (torch.ones(3),)])
    for prepare in (lambda: right, lambda: 1 / 0):
        context.run(Case("op", "someone", "forward", "n=3", "float32", prepare))
    for _ in range(2):
        assert gpu.main(["--out", str(tmp_path), "--merge"]) == 0
    (row,) = read_rows(book)
    assert row["op"] == "op" and row["commit"] == "abc1234" and float(row["p50_ms"]) >= 0


@once
@pytest.mark.slow
def test_rehearsal(tmp_path):
    """The whole runbook as on a GPU, tiny and interpreted, and its page."""
    command = [sys.executable, "-m", "bench.gpu", "--out", str(tmp_path), "--device", "cpu"]
    command += ["--quick", "--commit", "abc1234", "--minutes", "15"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = read_rows(tmp_path / gpu.QUICK_ROWS)
    log = (tmp_path / runner.LOG).read_text()
    ends = {row["implementation"]: row["note"] for row in rows if row["op"] == "part"}
    assert ends.keys() == PARTS.keys() and all(n.startswith("done") for n in ends.values()), log
    wanted = {"smoke", "profile", "ceiling", "decoder+loss", "training step", "sweep", "tests"}
    assert wanted | {"training on digits"} <= {row["op"] for row in rows}
    # What failed is a peer that is not installed, and nothing else.
    failed = sections.failures(rows)
    assert all("ModuleNotFoundError" in row["note"] for row in failed), failed
    text = (tmp_path / page.PAGE).read_text()
    assert "A rehearsal" in text and all(f"## {title}" in text for title in sections.SECTIONS)
    for name in ("kernels.png", "peers.png"):
        assert f"({name})" in text and (tmp_path / name).stat().st_size > 10_000
    # A second call finds nothing left to do.
    command += ["--only", "smoke", "peers", "layers"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    again = read_rows(tmp_path / gpu.QUICK_ROWS)[len(rows) :]
    assert {row["op"] for row in again} == {"part", "compile"}, done.stdout
