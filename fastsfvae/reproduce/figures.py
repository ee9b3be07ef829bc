"""Pictures of many runs. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fastsfvae.pictures import new_figure
from fastsfvae.reproduce.cells import Result
from fastsfvae.reproduce.tables import Summary, summarise


def row_of_panels(count: int, width: float, height: float, share_y: bool = False):
    """A figure of `count` axes side by side, of so many inches each, and the axes."""
    figure = new_figure(width * count, height)
    return figure, list(figure.subplots(1, count, squeeze=False, sharey=share_y)[0])


def tidy(axes, title: str, x_label: str = "") -> None:
    """Give axes their words and no more ink than they need."""
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(x_label, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


class Panel(NamedTuple):
    """A quantity and how its panel is labelled."""

    quantity: str
    label: str


def bars(results: Sequence[Result], panels: Sequence[Panel]):
    """Draw each quantity as bars, one a cell, a row of panels for each step of measurement.

    Whiskers are standard deviations over seeds; a black mark is the paper's value.
    """
    summaries = summarise(results)
    steps = sorted({row.step for row in summaries})
    cells = list(dict.fromkeys(row.cell for row in summaries))
    height = 0.23 * len(cells) + 0.7
    figure = new_figure(2.4 * len(panels) + 2.2, height * len(steps))
    grid = figure.subplots(len(steps), len(panels), squeeze=False, sharey=True)
    for row, step in zip(grid, steps, strict=True):
        for axes, panel in zip(row, panels, strict=True):
            shown = [s for s in summaries if (s.step, s.quantity) == (step, panel.quantity)]
            _bar_panel(axes, shown, cells)
            tidy(axes, panel.label if step == steps[0] else "")
        row[0].set_ylabel(f"after {step:,} steps", fontsize=9)
    figure.supxlabel("bars: mean and standard deviation over seeds; black: the paper", fontsize=8)
    return figure


def _bar_panel(axes, shown: Sequence[Summary], cells: Sequence[str]) -> None:
    rows = {cell: len(cells) - 1 - i for i, cell in enumerate(cells)}
    methods = list(dict.fromkeys(cell.split(",")[0] for cell in cells))
    for summary in shown:
        y = rows[summary.cell]
        color = f"C{methods.index(summary.cell.split(',')[0])}"
        axes.barh(y, summary.mean, xerr=summary.spread or None, color=color, height=0.7)
        if summary.paper is not None:
            axes.plot([summary.paper.value] * 2, [y - 0.45, y + 0.45], color="black", linewidth=1.6)
    axes.set_yticks(list(rows.values()), list(rows))
    axes.tick_params(axis="y", length=0)
