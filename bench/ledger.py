"""The append-only record of every benchmark row: bench/results/ledger.csv."""

from __future__ import annotations

import csv
import datetime
import platform
import subprocess
from pathlib import Path

import torch

from bench.timing import Timing

RESULTS = Path(__file__).parent / "results"
LEDGER = RESULTS / "ledger.csv"
COLUMNS = (
    "op", "implementation", "mode", "shape", "dtype", "p50_ms", "p20_ms", "p80_ms", "threads",
    "device", "torch", "triton", "commit", "date",
)  # fmt: skip


def append(op: str, mode: str, shape: str, dtype: str, timings: dict[str, Timing], device: str):
    """Add one row for each implementation; rows that stand are never changed."""
    RESULTS.mkdir(exist_ok=True)
    new = not LEDGER.exists()
    with LEDGER.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(COLUMNS)
        for implementation, timing in timings.items():
            times = [f"{value:.3f}" for value in timing]
            writer.writerow(
                [op, implementation, mode, shape, dtype, *times, torch.get_num_threads(), device]
                + [
                    torch.__version__,
                    _triton_version(),
                    commit(),
                    datetime.date.today().isoformat(),
                ]
            )


def device_name(device: str) -> str:
    """What a reader needs to know of the hardware: the GPU's or the processor's name."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """The checkout's short commit, with a + when files differ from it."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    result = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True)
    return result.stdout.strip() or "unknown"


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return triton.__version__
