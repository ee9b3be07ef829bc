"""Sampled ELBO and log ML against seconds: the speed at which sampling-free training wins (4.5)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from fastsfvae._checks import Likelihood
from fastsfvae.reproduce.cells import Cell, Experiment, Options, Result
from fastsfvae.reproduce.figures import log_counts, log_seconds, row_of_panels, tidy
from fastsfvae.reproduce.measures import LIKELIHOOD_COLUMNS, Likelihoods
from fastsfvae.reproduce.runtime import PAPER_RATIO, STEP_TIME
from fastsfvae.reproduce.seconds import (
    Curve,
    curves,
    doublings,
    step_seconds,
    step_time_cell,
    steps_to_reach,
    trained,
)
from fastsfvae.reproduce.tables import grid
from fastsfvae.training.config import TrainConfig

_SAMPLING, _PLAIN = "sampling", "vmap(jacfwd)"
_PAPERS = "precision .5"
_FREE: dict[str, Likelihood] = {_PAPERS: "precision", "expected": "expected"}
_QUANTITIES = ("log ML", "sampled ELBO")
STEPS = 2000
_POINTS = 4
# A sampling step is the faster one: it is trained 2^3 times as long.
_FURTHER_POINTS = 3


def _cells(options: Options) -> list[Cell]:
    steps = options.steps or (128 if options.quick else STEPS)
    least = 1 << (_POINTS - 1)
    if steps < least:
        raise ValueError(f"--steps {steps}: a curve of {_POINTS} doublings takes at least {least}")
    measure = Likelihoods(samples=500, images=100 if options.quick else 250)
    (data,) = options.data_sets("digits")
    base = TrainConfig(**options.place(data), model="mlp")
    configs = {_SAMPLING: replace(base, method="sampling")}
    configs |= {name: replace(base, likelihood=reading) for name, reading in _FREE.items()}
    cells = []
    for name, config in configs.items():
        further = _FURTHER_POINTS if name == _SAMPLING else 0
        at = doublings(steps << further, _POINTS + further)
        cells.append(Cell(name, config, measure, at, 1 if options.quick else 3, fixed_steps=True))
    timed = [step_time_cell(cell) for cell in cells]
    plain = replace(cells[1], name=_PLAIN)
    return [*cells, *timed, step_time_cell(plain, plain=True)]


def _ratios(results: Iterable[Result]) -> dict[str, float]:
    """Of each sampling-free step's time over the sampling one's, as far as they were timed."""
    seconds = step_seconds(results)
    if _SAMPLING not in seconds:
        return {}
    return {name: t / seconds[_SAMPLING] for name, t in seconds.items() if name != _SAMPLING}


def _break_even(sampling: Curve, free: Curve) -> dict[int, float]:
    """Steps -> the ratio of step times at which both objectives take as long to the same value."""
    return {step: steps_to_reach(sampling, value) / step for step, value in free.items()}


def _break_even_by_seed(
    results: Sequence[Result], name: str, quantity: str
) -> dict[int, list[float]]:
    """Steps -> `_break_even` of each seed, whose initial weights and batches both share."""
    ratios: dict[int, list[float]] = {}
    for seed in sorted({result.seed for result in results}):
        found = curves([result for result in results if result.seed == seed], quantity)
        if _SAMPLING in found and name in found:
            for step, ratio in _break_even(found[_SAMPLING], found[name]).items():
                ratios.setdefault(step, []).append(ratio)
    return ratios


def _reading(results: Sequence[Result]) -> str:
    rows = []
    sampled = [step for r in results if r.cell.name == _SAMPLING for step in r.steps]
    for name in _FREE:
        columns = [_break_even_by_seed(results, name, quantity) for quantity in _QUANTITIES]
        for step in columns[0]:
            shown = (
                _range(ratios[step], min(sampled) / step, max(sampled) / step) for ratios in columns
            )
            rows.append([name, f"{step:,}", *shown])
    measured = (f"{name} {ratio:.1f}" for name, ratio in _ratios(results).items())
    lines = [
        "Break-even ratio: sampling's steps to the same value, over the objective's own steps; "
        "its range over seeds. At equal seconds a sampling-free objective is ahead where one of "
        "its steps takes fewer sampling steps than that.",
        "",
        *grid(["objective", "steps", *(f"break-even ratio, {q}" for q in _QUANTITIES)], rows),
        "",
        f"Ratios of step times: {', '.join(measured) or 'not measured'}; the paper's "
        f"{PAPER_RATIO:.2f} is of another network and device.",
    ]
    return "\n".join(lines)


def _range(ratios: Sequence[float], least: float, greatest: float) -> str:
    """The smallest and the largest, or the bound that sampling's first or last point is."""

    def show(ratio: float) -> str:
        if math.isinf(ratio):
            return f"> {greatest:.2g}"
        return f"{ratio:.2f}" if ratio else f"< {least:.2g}"

    low, high = show(min(ratios)), show(max(ratios))
    return low if low == high else f"{low} to {high}"


def _draw(results: Sequence[Result]):
    """Both quantities against seconds, and the break-even ratio against steps."""
    seconds = step_seconds(results)
    compared = {result.cell.name for result in trained(results)}
    if _SAMPLING not in seconds or _SAMPLING not in compared or len(compared) == 1:
        return None
    figure, panels = row_of_panels(len(_QUANTITIES) + 1, 4.6, 3.8)
    for axes, quantity in zip(panels, _QUANTITIES, strict=False):
        found = curves(results, quantity)
        _plot_against_seconds(axes, found, seconds)
        tidy(axes, f"{quantity} of test images (nats)", "seconds of training")
    panels[0].legend(fontsize=7, frameon=False, loc="lower right")
    _plot_break_even(panels[-1], results)
    tidy(panels[-1], "break-even ratio of step times (median seed)", "sampling-free steps")
    return figure


def _plot_break_even(axes, results: Sequence[Result]) -> None:
    for i, name in enumerate(_FREE):
        for quantity, style in zip(_QUANTITIES, ("-", "--"), strict=True):
            by_seed = _break_even_by_seed(results, name, quantity)
            # A bound is no value.
            middle = [sorted(found)[len(found) // 2] or math.nan for found in by_seed.values()]
            label = f"{name}, {quantity}"
            axes.plot(list(by_seed), middle, style, color=f"C{i + 1}", marker=".", label=label)
    marks = _ratios(results) | {"the paper's": PAPER_RATIO}
    for i, label in enumerate(sorted(marks, key=marks.__getitem__)):
        axes.axhline(marks[label], color="gray", linewidth=0.8, linestyle=":")
        # Neighbours stand at opposite ends.
        side = i % 2
        place = {"xy": (side, marks[label]), "xycoords": ("axes fraction", "data")}
        align = {"ha": "right" if side else "left", "va": "bottom"}
        axes.annotate(f"{label} {marks[label]:.2f}", **place, **align, fontsize=7)
    log_counts(axes, sorted({s for r in results if r.cell.name in _FREE for s in r.steps}))
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7, frameon=False)


def _plot_against_seconds(axes, found: Mapping[str, Curve], seconds: Mapping[str, float]) -> None:
    colors = {name: f"C{i}" for i, name in enumerate((_SAMPLING, *_FREE))}
    for name, curve in found.items():
        times = {name: ("-", seconds.get(name, math.nan))}
        if name == _PAPERS:
            times[f"{name}, {_PLAIN}"] = ("--", seconds.get(_PLAIN, math.nan))
            times[f"{name}, at the paper's ratio"] = (":", PAPER_RATIO * seconds[_SAMPLING])
        for label, (style, step) in times.items():
            x = [step * n for n in curve]
            axes.plot(x, list(curve.values()), style, color=colors[name], marker=".", label=label)
    log_seconds(axes)


WALLCLOCK = Experiment(
    title="Sampled ELBO and log ML against seconds; the ratio of step times that breaks even",
    cells=_cells,
    draw=_draw,
    reading=_reading,
    columns=("log ML", *LIKELIHOOD_COLUMNS, STEP_TIME),
    assumptions=(
        "seconds: steps times the time of a step, which has cells of its own, to be run with "
        "nothing else on the machine",
        "the paper has a matching budget on CelebA alone: here the digits' network "
        "(16-256-512-784), B = 64, Adam at 1e-3, gamma = 0.5, c = 0.5",
        "sampling is trained eight times as many steps",
        "sampling-free and sampling runs of one seed share their initial weights and batches",
    ),
)
