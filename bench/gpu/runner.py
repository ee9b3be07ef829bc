"""Runs each part in a process of its own, so that a kernel which breaks the device costs one case.

What ends a process leaves behind what it was at (`bench.measure.Context.running`): that becomes a
row, and the part begins again behind it, unless the same has ended it before.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench.command import ROOT
from bench.gpu.parts import PARTS
from bench.ledger import Recorder, read_rows
from bench.measure import RUNNING, is_final

LOG = "parts.log"
# The operation of a row that says how a part went, and the status of one that ran out of time.
PART, OUT_OF_TIME = "part", 75
# Seconds that a part has to end its last case before it is stopped.
GRACE = 20.0


class Runner:
    """One call of the runbook.

    Args:
        recorder: where rows go.
        minutes: for everything together.
        arguments: of `python -m bench.gpu`, for each part.
        device: "cuda" or "cpu".
    """

    def __init__(self, recorder: Recorder, minutes: float, arguments: Sequence[str], device: str):
        self._recorder, self._folder = recorder, recorder.path.parent
        self._seconds, self._arguments = 60 * minutes, arguments
        self._deadline = time.monotonic() + self._seconds
        self._environment = dict(os.environ)
        if device == "cpu":
            # So that the Triton rows run too, interpreted.
            self._environment["TRITON_INTERPRET"] = "1"

    def run(self, names: Sequence[str]) -> None:
        """Run these parts in order; what has no time left becomes a row."""
        for at, name in enumerate(names):
            seconds = self._allowed(names, at)
            if seconds < GRACE / 2:
                self._recorder.write(op=PART, implementation=name, note="not run: out of time")
                continue
            started = time.monotonic()
            ends = self._part(name, started + seconds) or ["done"]
            note = f"{'; '.join(ends)} in {time.monotonic() - started:.0f} s"
            self._recorder.write(op=PART, implementation=name, note=note)
            print(f"{name}: {note}", flush=True)

    def _allowed(self, names: Sequence[str], at: int) -> float:
        """Seconds of a part: its share, and what is left over the shares of those behind it."""
        left = self._deadline - time.monotonic() - GRACE / 2
        others = self._seconds * sum(PARTS[name].share for name in names[at + 1 :])
        own = max(PARTS[names[at]].share * self._seconds, left - others)
        return min(own, PARTS[names[at]].most * self._seconds, left)

    def _part(self, name: str, deadline: float) -> list[str]:
        """Run a part until it ends by itself; return what ended its processes before."""
        failures: list[str] = []
        blamed: list[dict[str, str]] = []
        while time.monotonic() < deadline:
            running = self._folder / RUNNING
            running.unlink(missing_ok=True)
            failure = self._process(name, deadline)
            if not failure:
                break
            failures.append(failure)
            if not running.exists():
                break
            labels = json.loads(running.read_text())
            self._blame(labels, failure)
            running.unlink()
            if labels in blamed:
                break
            blamed.append(labels)
        return failures

    def _blame(self, labels: dict[str, str], failure: str) -> None:
        """Write down what a case has done to its process, unless its own words stand there."""
        rows = read_rows(self._recorder.path)[-2:]
        said = [row for row in rows if row.items() >= labels.items() and is_final(row["note"])]
        if not said:
            self._recorder.write(**labels, note=failure)

    def _process(self, name: str, deadline: float) -> str:
        """Run a part in a process of its own; return why it failed, or nothing."""
        seconds = deadline - time.monotonic()
        command = [sys.executable, "-m", "bench.gpu", *self._arguments]
        # By the clock that all processes share: a start takes seconds.
        command += ["--part", name, "--until", str(deadline)]
        with Path(self._folder, LOG).open("a") as log:
            log.write(f"== {name}\n")
            log.flush()
            place = {"cwd": ROOT, "env": self._environment, "stdout": log, "stderr": log}
            process = subprocess.Popen(command, **place, start_new_session=True)
            try:
                status = process.wait(seconds + GRACE / 2)
            except subprocess.TimeoutExpired:
                # No word on whether it would have ended: a second call tries again.
                return f"not run to its end: stopped after {seconds:.0f} s; see {LOG}"
            finally:
                # Whatever it started as well: it would hold the GPU under the next one's timings.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if status == OUT_OF_TIME:
            return "out of time"
        return f"ended its process with status {status}; see {LOG}" if status else ""
