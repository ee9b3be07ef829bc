"""What a table or figure is made of: cells that are trained and measured, and what is shown."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import nn

from fastsfvae.training.checkpoint import load, newest_checkpoint
from fastsfvae.training.config import TrainConfig
from fastsfvae.training.run import Run


class Published(NamedTuple):
    """A value that the paper prints.

    Attributes:
        value: as it is printed.
        spread: its standard deviation over runs, None where none is printed.
        steps: after which it was measured, where ours beside it is not.
    """

    value: float
    spread: float | None = None
    steps: int | None = None

    def __str__(self) -> str:
        spread = "" if self.spread is None else f" ± {self.spread:g}"
        return f"{self.value:g}{spread}" + (f" at {self.steps:,}" if self.steps else "")


class Measure(Protocol):
    """How a trained cell is evaluated: a frozen dataclass of its settings, called with the run."""

    @property
    def conventions(self) -> dict[str, str]:
        """What its numbers' meaning depends on."""
        ...

    def __call__(self, run: Run) -> dict[str, float]:
        """Evaluate: quantity -> number."""
        ...


@dataclass(frozen=True)
class Cell:
    """One training configuration, trained once for each seed.

    Attributes:
        name: unique within its table or figure.
        config: what is trained; its seed and steps are the runner's.
        measure: evaluates the run.
        at: the steps after which it is measured, rising; training ends at the last.
        seeds: number of runs, of seeds 0, 1, ...
        paper: quantity -> step -> the paper's value.
        fixed_steps: whether ``--steps`` leaves `at` as it is: it follows that already, or is no
            length of training.
        step_ratio: where an earlier step of `at` is a budget of time: the ratio of step times that
            it follows from, which is stored with the run as it begins.
    """

    name: str
    config: TrainConfig
    measure: Measure
    at: tuple[int, ...]
    seeds: int = 1
    paper: Mapping[str, Mapping[int, Published]] = field(default_factory=dict)
    fixed_steps: bool = False
    step_ratio: float | None = None

    @property
    def continues(self) -> bool:
        """Whether a run of more steps passes through the same states: no schedule is stretched."""
        if self.config.schedule_steps:
            return True
        return all(schedule.constant for schedule in self.config.schedules.values())

    @property
    def slug(self) -> str:
        """Its name as a file name."""
        return re.sub(r"[^a-z0-9.]+", "-", self.name.lower()).strip("-")


@dataclass(frozen=True)
class Result:
    """A run of a cell that was measured at least once.

    Attributes:
        cell: what was run.
        seed: its seed.
        folder: the run's folder, with its last checkpoint.
        record: what was stored; `measured` maps steps to quantities to numbers.
    """

    cell: Cell
    seed: int
    folder: Path
    record: dict[str, Any]

    @property
    def steps(self) -> list[int]:
        """Those of the cell's steps that it was measured after."""
        return [step for step in self.cell.at if str(step) in self.record["measured"]]

    def measured(self, step: int) -> dict[str, float]:
        """The quantities after so many steps."""
        return self.record["measured"][str(step)]

    @property
    def trained_steps(self) -> int:
        """Steps behind the weights that `load` gives: a run may be past its last measurement."""
        return newest_checkpoint(self.folder)[1]["step"]

    def load(self) -> tuple[nn.Module, nn.Module]:
        """The trained (encoder, decoder), on the CPU.

        Raises:
            FileNotFoundError: for a run of which only the numbers are here.
        """
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder} is not here")
        encoder, decoder, _ = load(self.folder)
        return encoder, decoder


@dataclass(frozen=True)
class Options:
    """What the command line asks of a protocol.

    Attributes:
        quick: a minute-scale version on the bundled digits.
        data: the only data set wanted; "" takes the protocol's own.
        data_dir: where the sets lie.
        steps: steps of each cell in place of the protocol's; 0 keeps those.
        seeds: runs of each cell in place of the protocol's; 0 keeps those.
        inception: path of Inception's weights for the FID; "" leaves the FID out.
        step_ratios: of a data set, a sampling-free step's time over a sampling one's.
    """

    quick: bool = False
    data: str = ""
    data_dir: str = ""
    steps: int = 0
    seeds: int = 0
    inception: str = ""
    step_ratios: Mapping[str, float] = field(default_factory=dict)

    def data_sets(self, *own: str) -> tuple[str, ...]:
        """The data sets to take, of a protocol that has these."""
        if self.quick:
            return ("digits",)
        return (self.data,) if self.data else own

    def place(self, data: str) -> dict[str, Any]:
        """The settings of a `TrainConfig` that name a data set."""
        return {"data": data, "data_dir": "" if data == "digits" else self.data_dir}

    def apply(self, cell: Cell) -> Cell:
        """Give a cell the steps and seeds that were asked for.

        Of the steps at which it is measured those remain that lie before its new end.
        """
        if self.steps and not cell.fixed_steps:
            earlier = tuple(step for step in cell.at if step < self.steps)
            cell = replace(cell, at=(*earlier, self.steps))
        return replace(cell, seeds=self.seeds) if self.seeds else cell

    def widen(self, cell: Cell) -> Cell:
        """The cell with what was asked for besides its protocol, not in its place.

        What earlier calls have finished, under other options, is shown with it.
        """
        asked = self.apply(cell)
        at = tuple(sorted({*cell.at, *asked.at})) if cell.continues else asked.at
        return replace(cell, at=at, seeds=max(cell.seeds, asked.seeds))


@dataclass(frozen=True)
class Experiment:
    """A table or figure of the paper.

    Attributes:
        title: what it shows, in one line.
        cells: its protocol.
        draw: makes its picture of the finished runs, a matplotlib figure; None where it needs more
            of them.
        assumptions: choices that the paper leaves open.
        last_only: whether the table shows the last step alone: the others are a curve.
        columns: quantities of the table for people, in this order; () takes all.
        reading: what follows from the finished runs, as Markdown below the table; "" for nothing.
    """

    title: str
    cells: Callable[[Options], Sequence[Cell]]
    draw: Callable[[Sequence[Result]], Any]
    assumptions: tuple[str, ...]
    last_only: bool = False
    columns: tuple[str, ...] = ()
    reading: Callable[[Sequence[Result]], str] = lambda _: ""
