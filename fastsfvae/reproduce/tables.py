"""Results of many runs beside the paper's: CSV for programs, Markdown for people."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastsfvae.reproduce.cells import Cell, Experiment, Published, Result
from fastsfvae.training.config import CHANGEABLE, TrainConfig

# Of a row of `runs_csv`, what is no quantity: its configuration, and where it comes from.
_CONFIG = {field.name for field in dataclasses.fields(TrainConfig)} - {"steps", "device"}
_ORIGIN = ("folder", "measure", "device", "threads", "torch", "commit", "step_ratio")
_NOT_COMPARED = {*CHANGEABLE, "seed", "schedule_steps"}


class Summary(NamedTuple):
    """One quantity of one cell after so many steps, over seeds.

    Attributes:
        cell: name of the cell.
        step: steps it was trained for.
        quantity: what was measured.
        mean: over seeds.
        spread: standard deviation over seeds; NaN for a single one.
        seeds: number of finished runs.
        paper: what the paper prints.
    """

    cell: str
    step: int
    quantity: str
    mean: float
    spread: float
    seeds: int
    paper: Published | None

    @property
    def fits(self) -> bool:
        """Whether it lies within the paper's spread and ours, together, of the printed value."""
        if self.paper is None:
            return False
        ours = 0.0 if math.isnan(self.spread) else self.spread
        return abs(self.mean - self.paper.value) <= math.hypot(ours, self.paper.spread or 0.0)


def summarise(results: Iterable[Result]) -> list[Summary]:
    """Average the runs of each cell, in their order."""
    by_cell: dict[str, list[Result]] = {}
    for result in results:
        by_cell.setdefault(result.cell.name, []).append(result)
    summaries = []
    for name, runs in by_cell.items():
        cell = runs[0].cell
        for step in sorted({step for run in runs for step in run.steps}):
            measured = [run.measured(step) for run in runs if step in run.steps]
            for quantity in dict.fromkeys(quantity for row in measured for quantity in row):
                # A table that was read back leaves out what is not a number.
                numbers = [row.get(quantity, math.nan) for row in measured]
                values = torch.tensor(numbers, dtype=torch.float64)
                mean = float(values.mean())
                spread = float(values.std()) if len(values) > 1 else math.nan
                paper = cell.paper.get(quantity, {}).get(step)
                summaries.append(Summary(name, step, quantity, mean, spread, len(values), paper))
    return summaries


def last_summaries(results: Sequence[Result]) -> list[Summary]:
    """`summarise`, of each cell after its last step alone."""
    last = {result.cell.name: result.steps[-1] for result in results}
    return [s for s in summarise(results) if s.step == last[s.cell]]


def grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    above, *below = (f"| {' | '.join(cells)} |" for cells in (head, *rows))
    return [above, "|---" * len(head) + "|", *below]


def summary_csv(results: Sequence[Result]) -> str:
    """A row for each cell, step and quantity, ours beside the paper's."""
    rows = [
        {
            "cell": s.cell,
            "steps": s.step,
            "quantity": s.quantity,
            "mean": _digits(s.mean),
            "standard deviation over seeds": _digits(s.spread),
            "seeds": s.seeds,
            "paper": "" if s.paper is None else s.paper.value,
            "paper's standard deviation": "" if s.paper is None else s.paper.spread,
            "paper's steps": "" if s.paper is None else s.paper.steps or s.step,
        }
        for s in summarise(results)
    ]
    return _csv(rows)


def runs_csv(results: Sequence[Result]) -> str:
    """A row for each run and step: what was measured, its whole configuration and its origin."""
    rows = []
    for result in results:
        record = result.record
        origin = {k: v for k, v in record.items() if k not in ("config", "measured", "cell")}
        # The seed is the configuration's; the steps are the row's; a path says nothing elsewhere.
        config = {k: v for k, v in record["config"].items() if k not in ("steps", "data_dir")}
        for step in result.steps:
            measured = {k: _digits(v) for k, v in result.measured(step).items()}
            rows.append({"cell": result.cell.name, "steps": step} | measured | config | origin)
    return _csv(rows)


def earlier_runs(
    path: Path, cells: Sequence[Cell], results: Sequence[Result], runs: Path
) -> list[Result]:
    """The runs that `runs_csv` wrote before and that are not among the results, step by step.

    Args:
        path: what it wrote; there need be no such file.
        cells: the protocol's; rows of other cells, configurations or measures are left out.
        results: what is stored now, and counts where both have a step.
        runs: the folder that the runs were trained in.
    """
    if not path.is_file():
        return []
    by_name = {cell.name: cell for cell in cells}
    now = {(result.cell.name, result.seed, step) for result in results for step in result.steps}
    found: dict[tuple[str, int], Result] = {}
    for row in csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))):
        name, step, seed = row.pop("cell"), int(row.pop("steps")), int(row["seed"])
        cell = by_name.get(name)
        if cell is None or (name, seed, step) in now or not _is_of(cell, row):
            continue
        config = {key: row.pop(key) for key in list(row) if key in _CONFIG}
        origin = {key: row.pop(key) for key in _ORIGIN if row.get(key)}
        record = origin | {"config": config, "measured": {}}
        folder = runs / origin.get("folder", cell.slug)
        result = found.setdefault((name, seed), Result(cell, seed, folder, record))
        result.record["measured"][str(step)] = {k: float(v) for k, v in row.items() if v}
    return [
        dataclasses.replace(r, cell=dataclasses.replace(r.cell, at=tuple(map(int, steps))))
        for r in found.values()
        if (steps := sorted(r.record["measured"], key=int))
    ]


def _is_of(cell: Cell, row: dict[str, str]) -> bool:
    """Whether a row of `runs_csv` is of the cell's configuration and measure."""
    for field in dataclasses.fields(cell.config):
        # What a later version has added had its default.
        written = row.get(field.name) or str(field.default)
        if field.name not in _NOT_COMPARED and written != str(getattr(cell.config, field.name)):
            return False
    length = cell.config.schedule_steps
    return row["measure"] == repr(cell.measure) and length in (0, int(row["schedule_steps"]))


def markdown(
    name: str, experiment: Experiment, results: Sequence[Result], cells: Sequence[Cell]
) -> str:
    """The table for people, with its conventions and assumptions.

    Args:
        name: of the table or figure.
        experiment: its protocol.
        results: what is stored of it.
        cells: the protocol's.
    """
    measured: dict[tuple[str, int], set[int]] = {}
    for result in results:
        measured.setdefault((result.cell.name, result.seed), set()).update(result.steps)
    runs = [(cell, seed) for cell in cells for seed in range(cell.seeds)]
    finished = sum(measured.get((cell.name, seed), set()) >= set(cell.at) for cell, seed in runs)
    summaries = last_summaries(results) if experiment.last_only else summarise(results)
    quantities = list(dict.fromkeys(s.quantity for s in summaries))
    if experiment.columns:
        quantities = [quantity for quantity in experiment.columns if quantity in quantities]
        summaries = [s for s in summaries if s.quantity in quantities]
    rows: dict[tuple[str, int, int], dict[str, str]] = {}
    for s in summaries:
        rows.setdefault((s.cell, s.step, s.seeds), {})[s.quantity] = _beside(s)
    shown = (
        [cell, f"{step:,}", str(seeds), *(values.get(quantity, "-") for quantity in quantities)]
        for (cell, step, seeds), values in rows.items()
    )
    lines = [
        f"# {name}: {experiment.title}",
        "",
        f"{len(measured)} runs; {finished} of the protocol's {len(runs)} are finished.",
        "",
        *grid(["cell", "steps", "seeds", *quantities], shown),
    ]
    if reading := experiment.reading(results):
        lines += ["", reading]
    conventions: dict[str, str] = {}
    for result in results:
        conventions |= result.cell.measure.conventions
    lines += ["", "Conventions:", *(f"- {k}: {v}" for k, v in conventions.items())]
    lines += ["", "Assumptions, where the paper is silent:"]
    lines += [f"- {assumption}" for assumption in experiment.assumptions]
    return "\n".join(lines) + "\n"


def _beside(summary: Summary) -> str:
    spread = "" if math.isnan(summary.spread) else f" ± {summary.spread:.2g}"
    paper = "" if summary.paper is None else f" (paper {summary.paper})"
    return f"{_digits(summary.mean)}{spread}{paper}"


def _digits(value: float) -> str:
    """Five digits, or all those before the point."""
    if math.isnan(value):
        return ""
    return f"{value:.0f}" if abs(value) >= 1e5 else f"{value:.5g}"


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    file = io.StringIO(newline="")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()
