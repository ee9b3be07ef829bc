"""The tables of these benchmarks: rows that are printed and written to bench/results/uses/."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from bench.command import ROOT
from bench.timing import take_turns

FOLDER = ROOT / "bench" / "results" / "uses"


class Row(NamedTuple):
    """A measurement; `value` is what `quantity` says, `ratio` the time by ours."""

    case: str
    method: str
    quantity: str
    steps: int | str = ""
    ms: float | None = None
    ratio: float | None = None
    value: float | None = None
    note: str = ""

    def cells(self) -> list[str]:
        """As text, numbers to four digits."""
        cells = ["" if cell is None else cell for cell in self]
        return [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells]


def times(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each, all in turn, with a second round of warming up."""
    samples = take_turns(dict(runs), rounds, warmup=2)
    return {name: statistics.median(values) for name, values in samples.items()}


def compare(
    case: str, quantity: str, runs: Mapping[str, Callable[[], object]], rounds: int
) -> list[Row]:
    """A row for each, with ratios to the first one's time."""
    found = times(runs, rounds)
    first = next(iter(found.values()))
    return [Row(case, name, quantity, "", ms, ms / first) for name, ms in found.items()]


def publish(name: str, rows: Sequence[Row], keeps: bool = False) -> None:
    """Print the rows and write them to bench/results/uses/<name>.csv.

    Args:
        name: of the table.
        rows: in order.
        keeps: whether rows of other cases, which are there from before, stay.
    """
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    table = [list(Row._fields), *(row.cells() for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        print("  ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)).rstrip())
    FOLDER.mkdir(parents=True, exist_ok=True)
    path, own = FOLDER / f"{name}.csv", {row.case for row in rows}
    if keeps and path.exists():
        with path.open(newline="") as file:
            table[1:1] = [cells for cells in list(csv.reader(file))[1:] if cells[0] not in own]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(table)
