"""The append-only record of every benchmark row: bench/results/ledger.csv."""

from __future__ import annotations

import csv
import datetime
import platform
import subprocess
from collections.abc import Iterable, Mapping
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
            writer.writerow([op, implementation, mode, shape, dtype, *times, *provenance(device)])


def provenance(device: str) -> list:
    """The columns from `threads` on: what a time holds for."""
    versions = [torch.__version__, _triton_version(), commit()]
    return [torch.get_num_threads(), device, *versions, datetime.date.today().isoformat()]


def merge(rows: Iterable[Mapping[str, str]]) -> int:
    """Append the rows that carry a time and do not stand in the ledger yet; return how many."""
    with LEDGER.open(newline="") as file:
        known = {tuple(row[column] for column in COLUMNS) for row in csv.DictReader(file)}
    timed = [tuple(row[column] for column in COLUMNS) for row in rows if row["p50_ms"]]
    # A dictionary keeps the order in which the rows were measured.
    new = [row for row in dict.fromkeys(timed) if row not in known]
    with LEDGER.open("a", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(new)
    return len(new)


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
    try:
        result = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True)
    except OSError:
        # A copy of the files on a machine without git.
        return "unknown"
    return result.stdout.strip() or "unknown"


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return triton.__version__
