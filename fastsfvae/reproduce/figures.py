"""Pictures of many runs. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fastsfvae.reproduce.cells import Result
from fastsfvae.reproduce.tables import Summary, summarise
from fastsfvae.results.pictures import new_figure

_LABEL_SIZE = 7


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


def legend_below(figure, *panels) -> None:
    """Name the curves of these panels once for all, in rows of five below them."""
    curves: dict[str, Any] = {}
    for axes in panels:
        for curve, label in zip(*axes.get_legend_handles_labels(), strict=True):
            curves.setdefault(label, curve)
    named = list(curves.values()), list(curves)
    figure.legend(*named, loc="outside lower center", ncols=5, fontsize=8, frameon=False)


def log_counts(axes, counts: Sequence[int]) -> None:
    """A logarithmic axis with these ticks; of two numbers that would touch, the larger's alone."""
    room = math.log(max(counts) / min(counts)) / 11
    labels: dict[int, str] = {}
    above = math.inf  # the number that was written last
    for count in sorted(counts, reverse=True):
        touches = math.log(above / count) < room
        labels[count] = "" if touches else f"{count:,}"
        above = above if touches else count
    axes.set_xscale("log")
    axes.set_xticks(list(labels), list(labels.values()))
    axes.minorticks_off()


def log_seconds(axes) -> None:
    """A logarithmic axis of seconds whose numbers are plain: 1, 3, 10, 30, ..."""
    from matplotlib.ticker import LogLocator

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()


def log_numbers(axis) -> None:
    """A logarithmic axis (an axes' xaxis or yaxis) whose numbers are plain: 1, 2, 5, 10, ..."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def label_points(axes, points: Sequence[tuple[float, float, str]], labels: Sequence[str]) -> None:
    """Write labels above or below the points (x, y, colour), those alone that stay clear.

    What a label must stay clear of are the points and the labels before it, by the axes' limits and
    scales as they are when this is called.
    """
    # The limits follow the data only where they are asked for.
    axes.get_xlim(), axes.get_ylim()
    to_axes = axes.transData + axes.transAxes.inverted()
    places = [tuple(to_axes.transform(point[:2])) for point in points]
    # The height of a line, in parts of the axes: a digit is less than that wide.
    size = axes.figure.get_size_inches() * axes.get_position().size
    digit, line = _LABEL_SIZE / 72 / size
    taken = [(x - 0.3 * digit, y - 0.3 * line, x + 0.3 * digit, y + 0.3 * line) for x, y in places]
    for (x, y), (*_, color), text in zip(places, points, labels, strict=True):
        half = 0.35 * digit * len(text)
        for side in (1, -1):
            middle = y + side * 0.95 * line
            wanted = (x - half, middle - 0.5 * line, x + half, middle + 0.5 * line)
            if not any(_overlap(wanted, other) for other in taken):
                taken.append(wanted)
                align = {"ha": "center", "va": "center", "transform": axes.transAxes}
                axes.text(x, middle, text, fontsize=_LABEL_SIZE, color=color, **align)
                break


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    """Whether two boxes (left, bottom, right, top) do."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


class Panel(NamedTuple):
    """A quantity and how its panel is labelled."""

    quantity: str
    label: str


def dots(results: Sequence[Result], panels: Sequence[Panel]):
    """Draw each quantity as dots, one a cell, a row of panels for each step of measurement.

    A row holds the cells that were measured there. Lines are standard deviations over seeds; a
    black mark is the paper's value, and a dot that it fits is filled. Cells of one objective share
    a colour.
    """
    summaries = summarise(results)
    steps = sorted({row.step for row in summaries})
    objectives = {r.cell.name: (r.cell.config.method, r.cell.config.likelihood) for r in results}
    kinds = list(dict.fromkeys(objectives.values()))
    colors = {cell: f"C{kinds.index(kind)}" for cell, kind in objectives.items()}
    measured = {(row.step, row.cell) for row in summaries}
    cells = [[cell for cell in colors if (step, cell) in measured] for step in steps]
    heights = [max(0.23 * len(names) + 0.7, 1.6) for names in cells]
    figure = new_figure(2.4 * len(panels) + 2.2, sum(heights))
    grid = figure.subplots(
        *(len(steps), len(panels)),
        squeeze=False,
        sharex="col",
        sharey="row",
        height_ratios=heights,
    )
    for row, step, names in zip(grid, steps, cells, strict=True):
        for axes, panel in zip(row, panels, strict=True):
            shown = [s for s in summaries if (s.step, s.quantity) == (step, panel.quantity)]
            _dot_panel(axes, shown, {name: colors[name] for name in names})
            tidy(axes, panel.label if step == steps[0] else "")
        row[0].set_ylabel(f"after {step:,} steps", fontsize=9)
    figure.align_ylabels(grid[:, 0])
    words = "dots: mean and standard deviation over seeds"
    if any(summary.paper for summary in summaries):
        words += "; black: the paper; filled: within both spreads of it"
    figure.supxlabel(words, fontsize=8)
    return figure


def _dot_panel(axes, shown: Sequence[Summary], colors: Mapping[str, str]) -> None:
    rows = {cell: len(colors) - 1 - i for i, cell in enumerate(colors)}
    for summary in shown:
        y, color = rows[summary.cell], colors[summary.cell]
        inside = color if summary.fits or summary.paper is None else "white"
        axes.errorbar(summary.mean, y, xerr=summary.spread, fmt="o", color=color, mfc=inside)
        if summary.paper is not None:
            axes.plot([summary.paper.value] * 2, [y - 0.45, y + 0.45], color="black", linewidth=1.6)
    axes.set_yticks(list(rows.values()), list(rows))
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.tick_params(axis="y", length=0)
    axes.locator_params(axis="x", nbins=5)
    axes.grid(axis="y", alpha=0.3)
