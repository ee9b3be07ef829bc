"""The paper's tables and figures, each by one command.

A table or figure is a list of cells (a training configuration, how it is measured, the paper's
values) and a picture. One runner trains the cells through the ordinary training stack, measures
them by `fastsfvae.evaluate` and stores every run; what is finished is not done again.
"""

from __future__ import annotations

import dataclasses
from fnmatch import fnmatch
from pathlib import Path

from fastsfvae.ground.atomic import replacing, write_text
from fastsfvae.ground.options import nearest, say
from fastsfvae.reproduce import tables
from fastsfvae.reproduce.bias import BIAS
from fastsfvae.reproduce.cells import Cell, Experiment, Options
from fastsfvae.reproduce.gamma import FIGURE1, FIGURE_C2
from fastsfvae.reproduce.manifold import FIGURE2
from fastsfvae.reproduce.neighbours import NEIGHBOURS
from fastsfvae.reproduce.runner import RUNS, Interrupted, run_cells, stored_results
from fastsfvae.reproduce.runtime import RUNTIME
from fastsfvae.reproduce.sizes import FIGURE4, FIGURE_C1, TABLE2
from fastsfvae.reproduce.table1 import TABLE1
from fastsfvae.reproduce.table3 import TABLE3
from fastsfvae.reproduce.table4 import TABLE4
from fastsfvae.reproduce.taylor_curve import FIGURE_A1
from fastsfvae.reproduce.traversals import FIGURE3, FIGURES_C3_C8
from fastsfvae.reproduce.wallclock import WALLCLOCK

EXPERIMENTS: dict[str, Experiment] = {
    "table1": TABLE1,
    "table2": TABLE2,
    "table3": TABLE3,
    "table4": TABLE4,
    # Table 2 with standard deviations, which all of these tables have.
    "table5": TABLE2,
    "figure1": FIGURE1,
    "figure2": FIGURE2,
    "figure3": FIGURE3,
    "figure4": FIGURE4,
    "figureA1": FIGURE_A1,
    "figureC1": FIGURE_C1,
    "figureC2": FIGURE_C2,
    "figuresC3-C8": FIGURES_C3_C8,
    "runtime": RUNTIME,
    "wallclock": WALLCLOCK,
    "bias": BIAS,
    "neighbours": NEIGHBOURS,
}
_DPI = 150


def choose(name: str, options: Options, only: str = "") -> list[Cell]:
    """The cells of a table or figure's protocol.

    Args:
        name: one of `EXPERIMENTS`.
        options: what is asked of the protocol.
        only: a cell's name, or a pattern with * and ?; "" takes all.

    Raises:
        ValueError: for a pattern that no cell has, naming those that there are.
    """
    cells = EXPERIMENTS[name].cells(options)
    chosen = [cell for cell in cells if not only or fnmatch(cell.name, only)]
    if not chosen:
        names = [cell.name for cell in cells]
        listed = "; ".join(names)
        raise ValueError(
            f"--only {only!r} is no cell of {name}: it has {listed}{nearest(only, names)}"
        )
    return chosen


def reproduce(name: str, options: Options, out: Path, only: str = "") -> bool:
    """Run what is not finished of a table or figure, and write what is.

    Writes ``<name>.csv`` (beside the paper), ``<name>-runs.csv`` (every run), ``<name>.md`` and
    ``<name>.png`` of all its stored runs into `out`, with ``-quick`` behind the name for a quick
    version; the runs themselves lie in ``out/runs``.

    Args:
        name: one of `EXPERIMENTS`.
        options: what is asked of its protocol.
        out: the folder of results; other results in it stay.
        only: as in `choose`.

    Returns:
        Whether all that was asked for is finished.

    Raises:
        ValueError: for a cell or setting that does not exist.
        Interrupted: after the files were written.
        OSError: where they cannot be.
    """
    chosen = choose(name, options, only)
    asked = [options.apply(cell) for cell in chosen]
    out.mkdir(parents=True, exist_ok=True)
    try:
        run_cells(asked, out, lambda line: say(f"{name}: {line}"))
    finally:
        _write(name, _shown(name, options), out, options.quick)
    done = [result.steps == list(result.cell.at) for result in stored_results(asked, out)]
    return all(done) and len(done) == sum(cell.seeds for cell in asked)


def _shown(name: str, options: Options) -> list[Cell]:
    """The cells of every data set, so that ``--data`` does not drop what others have finished."""
    everything = dataclasses.replace(options, data="")
    cells = {cell.name: cell for o in (everything, options) for cell in choose(name, o)}
    return [options.widen(cell) for cell in cells.values()]


def _write(name: str, cells: list[Cell], out: Path, quick: bool) -> None:
    experiment, results = EXPERIMENTS[name], stored_results(cells, out)
    if not results:
        return
    stem = f"{name}-quick" if quick else name
    # What was measured elsewhere, or before out/runs was removed, stays.
    results += tables.earlier_runs(out / f"{stem}-runs.csv", cells, results, out / RUNS)
    place = {cell.name: i for i, cell in enumerate(cells)}
    results.sort(key=lambda result: place[result.cell.name])
    title = f"{experiment.title}{' (quick version, not the protocol)' if quick else ''}"
    experiment = dataclasses.replace(experiment, title=title)
    write_text(out / f"{stem}.csv", tables.summary_csv(results))
    write_text(out / f"{stem}-runs.csv", tables.runs_csv(results))
    write_text(out / f"{stem}.md", tables.markdown(name, experiment, results, cells))
    try:
        figure = experiment.draw(results)
    except FileNotFoundError as error:
        say(f"{name}: {stem}.png is left as it was, as {error}")
        return
    if figure is not None:
        figure.suptitle(title, fontsize=10)
        with replacing(out / f"{stem}.png") as file:
            figure.savefig(file, format="png", dpi=_DPI, bbox_inches="tight")


__all__ = ["EXPERIMENTS", "Interrupted", "Options", "choose", "reproduce"]
