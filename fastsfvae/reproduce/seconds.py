"""Equal seconds: steps of training as seconds, by the time of a step that is measured apart.

A run's own seconds hold whatever else its machine did. Cells of their own measure a step, in turn
with a sampling one: ``--only "*step time"``.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from fastsfvae.reproduce.cells import Cell, Result
from fastsfvae.reproduce.runtime import STEP_RATIO, STEP_TIME, StepTime
from fastsfvae.reproduce.tables import summarise

# Steps of training -> what was measured after them.
Curve = Mapping[int, float]

_SUFFIX = ", step time"


def doublings(last: int, points: int) -> tuple[int, ...]:
    """So many steps of measurement up to the last, each twice the one before, in integers."""
    return tuple(last >> i for i in reversed(range(points)))


def step_time_cell(cell: Cell, plain: bool = False) -> Cell:
    """The cell that measures how long a step of another one takes.

    Args:
        cell: what is trained.
        plain: as in `StepTime`.
    """
    name, measure = f"{cell.name}{_SUFFIX}", StepTime(steps=50, plain=plain)
    return replace(cell, name=name, measure=measure, at=(1,), paper={}, fixed_steps=True)


def trained(results: Iterable[Result]) -> list[Result]:
    """The results that are no step times."""
    return [result for result in results if not result.cell.name.endswith(_SUFFIX)]


def step_seconds(results: Iterable[Result]) -> dict[str, float]:
    """Cell -> seconds of its step, of the cells whose step time is among the results.

    Each is the cell's ratio to a sampling step, which a machine that slows down for a while leaves
    alone, times one time for all, the median of the sampling steps beside them.
    """
    found: dict[str, dict[str, float]] = {}
    for row in summarise(results):
        if row.cell.endswith(_SUFFIX):
            found.setdefault(row.cell.removesuffix(_SUFFIX), {})[row.quantity] = row.mean
    timed = {cell: row for cell, row in found.items() if STEP_RATIO in row}
    if not timed:
        return {}
    unit = statistics.median(row[STEP_TIME] / row[STEP_RATIO] for row in timed.values()) / 1e3
    return {cell: unit * row[STEP_RATIO] for cell, row in timed.items()}


def curves(results: Sequence[Result], quantity: str) -> Mapping[str, Curve]:
    """Cell -> a quantity against steps, averaged over seeds."""
    found: dict[str, dict[int, float]] = {}
    for row in summarise(trained(results)):
        if row.quantity == quantity:
            found.setdefault(row.cell, {})[row.step] = row.mean
    return found


def steps_to_reach(curve: Curve, value: float) -> float:
    """Steps after which a curve first is at a value or above, interpolated over log steps.

    0 where the first point is above already, infinite where none is.
    """
    points = sorted(curve.items())
    if points[0][1] >= value:
        return 0.0
    for (before, low), (after, high) in zip(points, points[1:], strict=False):
        if high >= value:
            return before * (after / before) ** ((value - low) / (high - low))
    return math.inf


def value_at(curve: Mapping[int, float] | Mapping[float, float], place: float) -> float:
    """A curve's value after so many steps or seconds, interpolated over their logarithm.

    NaN outside of it.
    """
    points = sorted(curve.items())
    for (before, low), (after, high) in zip(points, points[1:], strict=False):
        if before <= place <= after:
            return low + (high - low) * math.log(place / before) / math.log(after / before)
    return math.nan
