"""The kernels' own tests on the device: one row a suite, and one for each test that fails."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.command import ROOT
from bench.measure import Context

# What marks a test for a device.
MARKED = re.compile(r"\brequires_triton\b|\bmark\.gpu\b")
LOG = "correctness.log"
# One suite and one of its tests, to show that the section works.
QUICK = ("kernels/test_gram_project",), ["-k", "second_order"]
# Failing tests of a suite that get a row of their own.
LISTED = 10


def suites() -> tuple[str, ...]:
    """Every module with a test of a kernel's values, or one that needs a GPU."""
    tests = ROOT / "tests"
    modules = (p for p in sorted(tests.rglob("test_*.py")) if MARKED.search(p.read_text()))
    return tuple(str(path.relative_to(tests).with_suffix("")) for path in modules)


def part(context: Context) -> None:
    """Run all suites side by side: most of their time goes into compilation on the host."""
    chosen, selection = QUICK if context.quick else (suites(), [])
    with tempfile.TemporaryDirectory() as folder:
        logs = {suite: Path(folder) / suite.replace("/", "-") for suite in chosen}
        running = {suite: _start(suite, selection, logs[suite]) for suite in chosen}
        for suite, process in running.items():
            try:
                process.wait(max(0.0, context.deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                # All at once: to leave the device takes each a while, and what outlived this
                # section would run beside the measurements of the next.
                for late in running.values():
                    late.kill()
                process.wait()
            _record(context, suite, logs[suite].read_text(), process.returncode)


def _start(suite: str, selection: list[str], log: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "pytest", "-vv", "--tb=short"]
    command += [
        "-p",
        "no:cacheprovider",
        "-m",
        "interpreter or gpu",
        *selection,
        f"tests/{suite}.py",
    ]
    with log.open("w") as file:
        return subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)


def _record(context: Context, suite: str, text: str, status: int) -> None:
    """Count the outcomes line by line, so that a suite that was stopped still counts."""
    with (context.recorder.path.parent / LOG).open("a") as file:
        file.write(text)
    outcomes = re.findall(r"^\S+::(.+?) (PASSED|FAILED|ERROR|SKIPPED)", text, re.MULTILINE)
    count = {word: sum(o == word for _, o in outcomes) for word in ("PASSED", "SKIPPED")}
    failed = [name for name, outcome in outcomes if outcome in ("FAILED", "ERROR")]
    note = f"{count['PASSED']} passed, {len(failed)} failed, {count['SKIPPED']} skipped"
    if status not in (0, 1):
        # One that was stopped while it started has said nothing.
        last = text.strip().splitlines()[-1:] or ["no output"]
        note += f"; pytest ended with status {status}: {last[0][:200]}"
    context.recorder.write(op="tests", implementation=suite, note=note)
    for name in failed[:LISTED]:
        reasons = re.findall(rf"^(?:FAILED|ERROR) \S+::{re.escape(name)} - (.*)$", text, re.M)
        reason = reasons[0][:200] if reasons else f"see {LOG}"
        context.recorder.write(op="tests", implementation=suite, shape=name, note=reason)
