"""``fastsfvae reproduce``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from fastsfvae.ground.options import UsageError, fail, parse, say
from fastsfvae.reproduce import EXPERIMENTS, Interrupted, Options, choose, reproduce
from fastsfvae.reproduce.runtime import projected_hours
from fastsfvae.reproduce.sizes import step_ratios
from fastsfvae.training.config import DataSet

_PROG = "fastsfvae reproduce"
if TYPE_CHECKING:
    Name = str
else:
    Name = Literal[tuple(EXPERIMENTS)]


@dataclasses.dataclass(frozen=True)
class ReproduceArguments:
    """Train and measure what a table or figure of the paper is made of; set it beside the paper.

    Finished runs are stored and not done again: the same command goes on where it was stopped.
    """

    name: Annotated[Positional[Name], arg(metavar="NAME", help=", ".join(EXPERIMENTS))]

    quick: bool = False
    """A version of about a minute on the bundled digits, through the same code."""

    data: DataSet | Literal["all"] = "all"
    """This data set alone; all: the paper's own, those that are missing left out."""

    data_dir: str = ""
    """Where the data sets lie."""

    steps: int = 0
    """Steps of each cell; 0: the protocol's."""

    seeds: int = 0
    """Runs of each cell; 0: the protocol's."""

    only: str = ""
    """One cell by its name, or several by a pattern, e.g. "sampling,*"."""

    list: bool = False
    """Print the names of the cells, their steps and seeds, and the hours of those whose step time
    `runtime` has measured into the same folder; run nothing."""

    inception: str = ""
    """File of Inception's weights, for the FID of tables 2 and 5, figures 4 and C1."""

    out: Annotated[str, arg(metavar="FOLDER")] = "runs/paper"
    """Folder of the results; what is in it stays and is gone on with."""


def reproduce_command(options: list[str]) -> int:
    """Run the command; 0: done, 1: a run failed or data is missing, 2: bad input, 130: interrupted.

    Whatever is finished is written in all cases.
    """
    try:
        arguments = parse(_PROG, ReproduceArguments, options)
        if min(arguments.steps, arguments.seeds) < 0:
            raise UsageError("--steps and --seeds must not be negative")
        if arguments.quick and arguments.data != "all":
            raise UsageError(f"--quick takes the bundled digits: leave out --data {arguments.data}")
        return _reproduce(arguments)
    except Interrupted:
        say(f"{_PROG}: interrupted; the same command goes on from here")
        return 130
    except BrokenPipeError:
        raise
    except (UsageError, TypeError, ValueError, RuntimeError, OSError) as error:
        return fail(_PROG, str(error))


def _reproduce(arguments: ReproduceArguments) -> int:
    name, fields = arguments.name, {field.name for field in dataclasses.fields(Options)}
    given = {key: value for key, value in vars(arguments).items() if key in fields}
    options = Options(**given | {"data": "" if arguments.data == "all" else arguments.data})
    options = dataclasses.replace(options, step_ratios=step_ratios(options, Path(arguments.out)))
    if arguments.list:
        _list(options, arguments)
        return 0
    out = Path(arguments.out)
    complete = reproduce(name, options, out, arguments.only)
    table = out / f"{name}{'-quick' if arguments.quick else ''}.md"
    if table.is_file():
        print(table.read_text(encoding="utf-8"))
        print(f"{table.with_suffix('.csv')}, {table.with_suffix('.png')}")
    return 0 if complete else 1


def _list(options: Options, arguments: ReproduceArguments) -> None:
    cells = [options.apply(cell) for cell in choose(arguments.name, options, arguments.only)]
    hours = projected_hours(cells, options, Path(arguments.out))
    for cell in cells:
        steps = ", ".join(f"{step:,}" for step in cell.at[-3:])
        projected = f", about {hours[cell.name]:.3g} hours" if cell.name in hours else ""
        print(f"{cell.name}: measured after {steps} steps, {cell.seeds} seeds{projected}")
    if hours:
        print(f"hours: of training, by the step times of `runtime` in {arguments.out}")
