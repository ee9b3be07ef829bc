"""Everything a GPU can tell, unattended: `python -m bench.gpu --out DIR --minutes 8`.

Sections run in the order of their importance, each in a process of its own, so that a kernel which
breaks the device costs one section. Every row is written to DIR/rows.csv (quick.csv with --quick)
when it is known; what fails becomes a row that says why. A plain checkout with torch, triton, numpy
and pytest is enough, and the C compiler with Python's headers that Triton builds its launcher with;
the tests of hostile numbers want hypothesis and mpmath too.

    python -m bench.gpu --out DIR --device cpu --quick     the same code, tiny, interpreted
    python -m bench.gpu --out DIR --merge                  append DIR's times to the ledger, and
                                                           have the library choose by them
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench import choices, ledger
from bench.command import ROOT, make_parser
from bench.ledger import Recorder, read_rows
from bench.measure import Context, OutOfTime

ROWS = "rows.csv"
# Apart from the measurements: --merge must not find them.
QUICK_ROWS = "quick.csv"
LOG = "sections.log"
# Name, where it is, and the share of all minutes that it may take.
SECTIONS = {
    "correctness": ("bench.gpu_correctness:section", 0.30),
    "ceilings": ("bench.ceilings:section", 0.15),
    "kernels": ("bench.gpu_sections:kernels", 0.20),
    "layers": ("bench.gpu_sections:layers", 0.20),
    "loss_only": ("bench.gpu_sections:loss_only", 0.25),
    "decoder_loss": ("bench.gpu_sections:decoder_loss", 0.40),
    "training_step": ("bench.gpu_sections:training_step", 0.30),
    "short_training": ("bench.gpu_sections:short_training", 0.30),
}
# Seconds that a section has to end its last case before it is stopped.
GRACE = 20.0


def main(arguments: list[str] | None = None) -> int:
    """Run the sections, or one of them, or merge."""
    options = _parse(arguments)
    if options.merge:
        print(f"{ledger.merge(read_rows(options.out / ROWS))} rows appended to {ledger.LEDGER}")
        print(f"{choices.update()} devices with measured layers in {choices.MEASURED}")
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "no CUDA device is usable: give --device cpu --quick to try the runbook",
            file=sys.stderr,
        )
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    if options.section:
        _run_section(options)
    else:
        _run_all(options)
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = make_parser("gpu", __doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of rows.csv and the logs")
    parser.add_argument("--minutes", type=float, default=8, help="for everything together")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: tests the runbook only")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="these sections alone")
    parser.add_argument("--commit", help="for a copy of the files that has no git history")
    parser.add_argument("--merge", action="store_true", help="append the times to the ledger")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _run_all(options: argparse.Namespace) -> None:
    deadline = time.monotonic() + 60 * options.minutes
    environment = dict(os.environ)
    if options.device == "cpu":
        # So that the Triton rows run too, interpreted.
        environment["TRITON_INTERPRET"] = "1"
    recorder = _recorder(options)
    for name in options.only or SECTIONS:
        left = deadline - time.monotonic()
        if left < GRACE:
            recorder.write(op=name, note="not run: out of time")
            continue
        seconds = min(60 * options.minutes * SECTIONS[name][1], left - GRACE / 2)
        started = time.monotonic()
        failure = _spawn(options, name, seconds, environment)
        took = time.monotonic() - started
        print(f"{name}: {failure or 'done'} in {took:.0f} s", flush=True)
        if failure:
            recorder.write(op=name, note=failure)
    _summarise(read_rows(recorder.path))


def _recorder(options: argparse.Namespace) -> Recorder:
    path = options.out / (QUICK_ROWS if options.quick else ROWS)
    return Recorder(path, options.device, options.commit)


def _spawn(options: argparse.Namespace, name: str, seconds: float, environment: dict) -> str:
    """Run a section in a process of its own; return why it failed, or nothing."""
    command = [sys.executable, "-m", "bench.gpu", "--section", name, "--out", str(options.out)]
    command += ["--device", options.device, "--minutes", str(seconds / 60)]
    command += ["--quick"] * options.quick
    command += ["--commit", options.commit] * bool(options.commit)
    with (options.out / LOG).open("a") as log:
        log.write(f"== {name}\n")
        log.flush()
        place = {"cwd": ROOT, "env": environment, "stdout": log, "stderr": log}
        process = subprocess.Popen(command, **place, start_new_session=True)
        try:
            status = process.wait(seconds + GRACE / 2)
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s; see {LOG}"
        finally:
            # Whatever it started as well: it would hold the GPU under the next section's timings.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return f"ended with status {status}; see {LOG}" if status else ""


def _run_section(options: argparse.Namespace) -> None:
    started = time.monotonic()
    module, function = SECTIONS[options.section][0].split(":")
    # For every candidate alike.
    torch.backends.cudnn.benchmark = True
    recorder = _recorder(options)
    context = Context(options.device, options.quick, recorder, started + 60 * options.minutes)
    try:
        getattr(importlib.import_module(module), function)(context)
    except OutOfTime:
        recorder.write(op=options.section, note="its remaining cases were not run: out of time")


def _summarise(rows: list[dict[str, str]]) -> None:
    for row in rows:
        ceiling = f"{row['share_of_ceiling']} of ceiling" if row["share_of_ceiling"] else ""
        cells = [row["op"], row["implementation"], row["mode"], row["shape"], row["dtype"]]
        ratio = f"{row['ratio']} times {row['ratio_to']}" if row["ratio"] else ""
        cells += [f"{row['p50_ms']} ms" if row["p50_ms"] else "", row["error"], ceiling, ratio]
        print(" | ".join(cell for cell in [*cells, row["note"]] if cell))


if __name__ == "__main__":
    sys.exit(main())
