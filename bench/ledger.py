"""The append-only record of every benchmark row: bench/results/ledger.csv."""

from __future__ import annotations

import csv
import datetime
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from bench.timing import Timing
from fastsfvae.ground.provenance import commit, device_name

RESULTS = Path(__file__).parent / "results"
LEDGER = RESULTS / "ledger.csv"
# Rows that are older than a column end before it.
COLUMNS = (
    "op", "implementation", "mode", "shape", "dtype", "p50_ms", "p20_ms", "p80_ms", "threads",
    "device", "torch", "triton", "commit", "date",
    "bytes_per_s", "flop_per_s", "share_of_ceiling", "error", "peak_mib", "ratio", "ratio_to",
    "note",
)  # fmt: skip
# What a ceiling's row was measured with, where others are held to it.
COPY, PRODUCT = "copy_", "mm"
TIMES = "p50_ms", "p20_ms", "p80_ms"
# The operation of a tile that was tried.
SWEEP = "sweep"


def provenance(device: str) -> dict[str, str]:
    """What a time holds for: the columns from `threads` to `date`."""
    return {
        "threads": str(torch.get_num_threads()),
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "commit": commit() or "unknown",
        "date": datetime.date.today().isoformat(),
    }


class Recorder:
    """Appends each row to a CSV file as soon as it is known; rows that stand are never changed."""

    def __init__(self, path: Path, device: str, commit: str | None = None):
        self.path = path
        self.provenance = provenance(device)
        if commit:
            self.provenance["commit"] = commit

    def write(self, timing: Timing | None = None, **columns: object) -> None:
        """Add a row; columns that are not given stay empty."""
        new = not self.path.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow({**self.provenance, **times(timing), **columns})


def times(timing: Timing | None) -> dict[str, str]:
    """The columns of a timing."""
    return {name: f"{value:.5g}" for name, value in zip(TIMES, timing or (), strict=False)}


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a file, or none where it does not exist."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file, restval=""))


def ceiling(row: Mapping[str, str]) -> tuple[str, float] | None:
    """What a row says that bounds others: "copy" and bytes/s, or a dtype and FLOP/s; else None.

    Of `bench.ceilings`' rows those of device memory and of products do, no others.
    """
    if row["op"] != "ceiling" or not row["p50_ms"]:
        return None
    if row["implementation"] == COPY:
        return "copy", float(row["bytes_per_s"])
    if row["implementation"] == PRODUCT:
        return row["dtype"], float(row["flop_per_s"])
    return None


def merge(rows: Iterable[Mapping[str, str]]) -> int:
    """Append the rows that carry a time and do not stand in the ledger yet; return how many.

    Not those of tiles that were tried: what comes of them stands in a table of its own.
    """

    def key(row: Mapping[str, str]) -> tuple[str, ...]:
        return tuple(row.get(column, "") for column in COLUMNS)

    known = {key(row) for row in read_rows(LEDGER)}
    # A dictionary keeps the order in which the rows were measured.
    timed = dict.fromkeys(key(row) for row in rows if row["p50_ms"] and row["op"] != SWEEP)
    new = [row for row in timed if row not in known]
    with LEDGER.open("a", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(new)
    return len(new)


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return triton.__version__
