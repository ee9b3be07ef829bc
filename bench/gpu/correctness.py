"""The kernels' own tests on the device: one row a suite, and one for each test that fails."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from typing import IO

from bench.command import ROOT
from bench.measure import Context

# What marks a test for a device.
MARKED = re.compile(r"\brequires_triton\b|\bmark\.gpu\b")
LOG = "correctness.log"
# One suite and one of its tests, to show that the part works.
QUICK = ("kernels/test_gram_project",), ["-k", "second_order"]
# Failing tests of a suite that get a row of their own.
LISTED = 10


def suites() -> tuple[str, ...]:
    """Every module with a test of a kernel's values, or one that needs a GPU."""
    tests = ROOT / "tests"
    modules = (p for p in sorted(tests.rglob("test_*.py")) if MARKED.search(p.read_text()))
    return tuple(str(path.relative_to(tests).with_suffix("")) for path in modules)


def part(context: Context) -> None:
    """Run one suite after the other: what runs beside it would be tested under its load."""
    chosen, selection = QUICK if context.quick else (suites(), [])
    for suite in chosen:
        labels = {"op": "tests", "implementation": suite}
        if context.known(labels):
            continue
        with context.running(labels), tempfile.TemporaryFile("w+") as log:
            status = _run(suite, selection, log, context.deadline)
            log.seek(0)
            _record(context, suite, log.read(), status)


def _run(suite: str, selection: list[str], log: IO[str], deadline: float) -> int | None:
    """Run a suite to its end, or to the deadline: its status, or None."""
    command = [sys.executable, "-m", "pytest", "-vv", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-m", "interpreter or gpu", *selection, f"tests/{suite}.py"]
    place = {"cwd": ROOT, "stdout": log, "stderr": subprocess.STDOUT}
    try:
        left = max(0.0, deadline - time.monotonic())
        return subprocess.run(command, **place, timeout=left, check=False).returncode
    except subprocess.TimeoutExpired:
        return None


def _record(context: Context, suite: str, text: str, status: int | None) -> None:
    """Count the outcomes line by line, so that a suite that was stopped still counts."""
    with (context.recorder.path.parent / LOG).open("a") as file:
        file.write(text)
    outcomes = re.findall(r"^\S+::(.+?) (PASSED|FAILED|ERROR|SKIPPED)", text, re.MULTILINE)
    count = {word: sum(o == word for _, o in outcomes) for word in ("PASSED", "SKIPPED")}
    failed = [name for name, outcome in outcomes if outcome in ("FAILED", "ERROR")]
    note = f"{count['PASSED']} passed, {len(failed)} failed, {count['SKIPPED']} skipped"
    if status is None:
        note = f"not run to its end: {note}"
    elif status not in (0, 1):
        # One that was stopped while it started has said nothing.
        last = text.strip().splitlines()[-1:] or ["no output"]
        note += f"; pytest ended with status {status}: {last[0][:200]}"
    context.recorder.write(op="tests", implementation=suite, note=note)
    for name in failed[:LISTED]:
        reasons = re.findall(rf"^(?:FAILED|ERROR) \S+::{re.escape(name)} - (.*)$", text, re.M)
        reason = reasons[0][:200] if reasons else f"see {LOG}"
        context.recorder.write(op="tests", implementation=suite, shape=name, note=reason)
