"""Peak memory of a decoder's loss with its gradients, in a process of its own.

    python -m bench.memory celeba64 "vmap(jacfwd)" [batch]

prints the bytes by which the process's resident memory rose at its highest. Two samples go before,
so that imports, traces and thread pools do not count. On CUDA the allocator's peak is in every row.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

from bench.command import ROOT
from bench.peers import DECODER_LOSSES, loss_and_gradients
from bench.problems import build_problem

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_extra(workload: str, implementation: str, batch: str | None = None) -> int:
    """Bytes, measured in a child process.

    Raises:
        RuntimeError: where the child fails, with its last line.
    """
    command = [sys.executable, "-m", "bench.memory", workload, implementation]
    command += [str(batch)] if batch else []
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"{' '.join(command[2:])} ended with {done.returncode}: {last}")
    return int(done.stdout)


def main(workload: str, implementation: str, batch: str | None = None) -> None:
    """Measure in this process and print."""
    problem = build_problem(workload, int(batch) if batch else None)
    loss = DECODER_LOSSES[implementation](problem.decoder)
    loss_and_gradients(loss, problem.head(2), "float32")
    # Give what is free back to the system, and restart the kernel's own high-water mark.
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR.write_text("5")
    before = resident("VmRSS")
    loss_and_gradients(loss, problem, "float32")
    print(resident("VmHWM") - before)


def resident(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return 1024 * int(lines[field].split()[0])


if __name__ == "__main__":
    main(*sys.argv[1:])
