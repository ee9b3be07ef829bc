"""Sampled ELBO and log ML against steps and seconds, of every recipe (beyond 4.5)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from fastsfvae.reproduce.cells import Cell, Experiment, Options, Result
from fastsfvae.reproduce.figures import legend_below, log_counts, log_seconds, row_of_panels, tidy
from fastsfvae.reproduce.measures import LIKELIHOOD_COLUMNS, Likelihoods
from fastsfvae.reproduce.recipes import (
    ANTITHETIC,
    LENGTHS,
    PRECISION,
    RECIPES,
    SAMPLING,
    WEIGHTS,
    Recipe,
    scaled,
    step_seconds_of,
)
from fastsfvae.reproduce.runtime import STEP_RATIO, STEP_TIME
from fastsfvae.reproduce.seconds import (
    Curve,
    curves,
    step_seconds,
    step_time_cell,
    steps_to_reach,
    trained,
    value_at,
)
from fastsfvae.reproduce.tables import Summary, grid, summarise
from fastsfvae.training.config import TrainConfig

STEPS = 2000
_PLAIN = "vmap(jacfwd)"
_LOG_ML = "log ML"
_QUANTITIES = (_LOG_ML, "sampled ELBO")
_KNOWN = RECIPES | WEIGHTS | LENGTHS
# Measured after these eighths of STEPS; what takes less time is trained so many times as long.
_EIGHTHS = (1, 2, 4, 6, 8)
_LONGER = {SAMPLING: 8, ANTITHETIC: 8, "KL warm-up 250, antithetic": 8}
_LONGER |= {"4 orthogonal pairs": 4, "DReG, K=5": 4}
_LONGER |= {name: 4 for name, recipe in RECIPES.items() if recipe.start}
# Other observation noise, by what stands in front of a recipe's name.
_NOISE: dict[str, dict[str, Any]] = {
    "c = 0.03, ": {"noise_var": 0.03},
    "c learned, ": {"learned_noise_var": True},
}


def _cells(options: Options) -> list[Cell]:
    steps = options.steps or (128 if options.quick else STEPS)
    if steps < 16:
        raise ValueError(f"--steps {steps}: the curves take at least 16")
    measure = Likelihoods(samples=500, images=100 if options.quick else 250)
    (data,) = options.data_sets("digits")
    base = TrainConfig(**options.place(data), model="mlp")
    seeds = 1 if options.quick else 3

    def cell(name: str, recipe: Recipe, longer: int = 1, **settings: Any) -> Cell:
        shown = recipe if steps == STEPS else scaled(recipe, steps / STEPS)
        at = [steps * eighths // 8 for eighths in _EIGHTHS]
        while at[-1] < min(longer, 2 if options.quick else longer) * steps:
            at.append(2 * at[-1])
        config = replace(base, **(dict(shown.settings) | settings))
        return Cell(name, config, measure, tuple(at), seeds, fixed_steps=True)

    recipes = RECIPES if options.quick else RECIPES | WEIGHTS
    cells = [cell(name, recipe, _LONGER.get(name, 1)) for name, recipe in recipes.items()]
    timed = [step_time_cell(c) for c in cells if not recipes[c.name].step]
    plain = replace(next(c for c in cells if c.name == PRECISION), name=_PLAIN)
    timed.append(step_time_cell(plain, plain=True))
    if not options.quick:
        cells += [cell(name, recipe) for name, recipe in LENGTHS.items()]
        for prefix, noise in _NOISE.items():
            cells += [cell(prefix + name, recipe, **noise) for name, recipe in RECIPES.items()]
    return [*cells, *timed]


def _recipes(results: Sequence[Result]) -> dict[str, Recipe]:
    """Of the cells that are trained at the default c, each with a start as long as its own."""
    found = {}
    for cell in (result.cell for result in trained(results)):
        if (recipe := _KNOWN.get(cell.name)) is not None:
            start = {"warm_start": cell.config.warm_start}
            found[cell.name] = replace(recipe, settings=dict(recipe.settings) | start)
    return found


def _against_seconds(results: Sequence[Result], quantity: str) -> dict[str, dict[float, float]]:
    """Cell -> a quantity against seconds of training, of the recipes whose steps were timed."""
    found, seconds, recipes = curves(results, quantity), step_seconds(results), _recipes(results)
    curves_in_time = {}
    for name, recipe in recipes.items():
        times = {n: step_seconds_of(name, recipe, n, seconds) for n in found.get(name, {})}
        if times and None not in times.values():
            curves_in_time[name] = {t: found[name][n] for n, t in times.items() if t is not None}
    return curves_in_time


class _Ratio(NamedTuple):
    """A ratio of step times; a bound where the baselines' curves are too short to tell."""

    value: float
    sign: str = ""

    def __str__(self) -> str:
        return f"{self.sign}{self.value:.2f}"


def _break_even(results: Sequence[Result], quantity: str) -> dict[tuple[str, int], list[_Ratio]]:
    """(recipe, steps) -> of each seed, the ratio of step times that breaks even.

    The baseline is, at each value, the one that reaches it in the least time; runs of one seed
    share their initial weights and batches.
    """
    seconds, recipes = step_seconds(results), _recipes(results)
    ratios: dict[tuple[str, int], list[_Ratio]] = {}
    for seed in sorted({result.seed for result in results}) if SAMPLING in seconds else ():
        found = curves([result for result in results if result.seed == seed], quantity)
        baselines = [
            (curve, seconds[step])
            for name, curve in found.items()
            if name in recipes
            and recipes[name].is_baseline
            and (step := recipes[name].step or name) in seconds
        ]
        for name, curve in found.items():
            recipe = recipes.get(name)
            if recipe is None or recipe.is_baseline or not baselines:
                continue
            for steps, value in curve.items():
                free = min(steps, recipe.start_steps) if recipe.start else steps
                # The time that is left for the sampling-free steps.
                spent = (steps - free) * seconds.get(recipe.step, math.nan) if recipe.start else 0.0
                budget, sign = min(_time_to_reach(*baseline, value) for baseline in baselines)
                ratio = max(budget - spent, 0.0) / free / seconds[SAMPLING]
                ratios.setdefault((name, steps), []).append(_Ratio(ratio, sign))
    return ratios


def _time_to_reach(curve: Curve, step: float, value: float) -> tuple[float, str]:
    """Seconds until a curve is at a value, or those of its first or last point as a bound."""
    steps = steps_to_reach(curve, value)
    if math.isinf(steps):
        return step * max(curve), "> "
    return (step * steps, "") if steps else (step * min(curve), "< ")


def _reading(results: Sequence[Result]) -> str:
    seconds = step_seconds(results)
    lines = [*_equal_steps(results), *_equal_seconds(results), *_break_even_table(results)]
    if SAMPLING in seconds:
        measured = (
            f"{name} {1e3 * t:.2f} ms ({t / seconds[SAMPLING]:.2f})" for name, t in seconds.items()
        )
        lines += ["", f"Time of a step (over that of {SAMPLING}): {', '.join(measured)}."]
    return "\n".join(lines)


def _equal_steps(results: Sequence[Result]) -> Iterator[str]:
    """Both quantities after as many steps, of all that is trained."""
    found: dict[str, dict[int, dict[str, Summary]]] = {}
    for row in summarise(trained(results)):
        found.setdefault(row.cell, {}).setdefault(row.step, {})[row.quantity] = row
    steps = sorted({step for by_step in found.values() for step in by_step})
    rows = [
        [name, *(" / ".join(map(_value, _both(by_step.get(step, {})))) for step in steps)]
        for name, by_step in found.items()
    ]
    yield f"At equal steps, {' / '.join(_QUANTITIES)} (nats; ± over seeds):"
    yield ""
    yield from grid(["trained by", *(f"{step:,}" for step in steps)], rows)


def _both(row: Mapping[str, Summary]) -> list[Summary]:
    return [row[quantity] for quantity in _QUANTITIES if quantity in row]


def _value(summary: Summary) -> str:
    spread = "" if math.isnan(summary.spread) else f" ± {summary.spread:.2f}"
    return f"{summary.mean:.2f}{spread}"


def _equal_seconds(results: Sequence[Result]) -> Iterator[str]:
    """Both quantities in as much time, by the times of a step."""
    found = [_against_seconds(results, quantity) for quantity in _QUANTITIES]
    if SAMPLING not in found[0]:
        return
    budgets = list(found[0][SAMPLING])[2:]
    rows = [
        [name, *(" / ".join(_shown(value_at(c[name], t)) for c in found) for t in budgets)]
        for name in found[0]
    ]
    yield ""
    yield (
        f"At equal seconds, {' / '.join(_QUANTITIES)}: steps times the time of a step; the columns "
        f"are the times of {SAMPLING}'s own points, the others are interpolated."
    )
    yield ""
    yield from grid(["trained by", *(f"{t:.3g} s" for t in budgets)], rows)


def _shown(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def _break_even_table(results: Sequence[Result]) -> Iterator[str]:
    tables = [_break_even(results, quantity) for quantity in _QUANTITIES]
    if not tables[0]:
        return
    yield ""
    yield (
        "Break-even ratio: as many steps of sampling as one sampling-free step may cost, for the "
        "recipe to be ahead of every baseline at equal seconds; its range over seeds."
    )
    yield ""
    rows = [
        [name, f"{steps:,}", *(_range(table[name, steps]) for table in tables)]
        for name, steps in tables[0]
    ]
    yield from grid(["recipe", "steps", *(f"break-even ratio, {q}" for q in _QUANTITIES)], rows)


def _range(ratios: Sequence[_Ratio]) -> str:
    low, high = str(min(ratios)), str(max(ratios))
    return low if low == high else f"{low} to {high}"


def _draw(results: Sequence[Result]):
    """Both quantities against seconds, and the break-even ratio against steps."""
    if SAMPLING not in step_seconds(results) or len(_against_seconds(results, _LOG_ML)) < 2:
        return None
    figure, panels = row_of_panels(len(_QUANTITIES) + 1, 4.8, 4.0)
    colors = {name: f"C{i}" for i, name in enumerate(RECIPES)}
    for axes, quantity in zip(panels, _QUANTITIES, strict=False):
        for name, curve in _against_seconds(results, quantity).items():
            if name in RECIPES:
                style = "--" if RECIPES[name].is_baseline else "-"
                points = list(curve), list(curve.values())
                axes.plot(*points, style, color=colors[name], marker=".", label=name)
        log_seconds(axes)
        _settle(axes)
        tidy(axes, f"{quantity} of test images (nats)", "seconds of training")
    legend_below(figure, panels[0])
    axes, by_point = panels[-1], _break_even(results, _LOG_ML)
    for name in dict.fromkeys(name for name, _ in by_point if name in RECIPES):
        middle = {
            steps: math.nan if (ratio := sorted(ratios)[len(ratios) // 2]).sign else ratio.value
            for (of, steps), ratios in by_point.items()
            if of == name
        }
        axes.plot(list(middle), list(middle.values()), color=colors[name], marker=".", label=name)
    seconds = step_seconds(results)
    for name in (PRECISION, "expected"):
        if name in seconds:
            measured = seconds[name] / seconds[SAMPLING]
            axes.axhline(measured, color=colors[name], linewidth=0.8, linestyle=":")
    log_counts(axes, sorted({steps for _, steps in by_point}))
    axes.set_ylim(bottom=0)
    tidy(axes, "break-even ratio for log ML (median seed); dotted: measured", "steps")
    return figure


def _settle(axes) -> None:
    """Let what all curves come to fill the axes, not their first points."""
    values = [y for line in axes.get_lines() for y in line.get_ydata()]
    last = [line.get_ydata()[-1] for line in axes.get_lines()]
    top = max(values)
    axes.set_ylim(max(min(values), top - 4 * max(top - min(last), 0.5)), top + 0.3)


WALLCLOCK = Experiment(
    title="Sampled ELBO and log ML of every recipe, at equal steps and at equal seconds",
    cells=_cells,
    draw=_draw,
    reading=_reading,
    columns=("log ML", *LIKELIHOOD_COLUMNS, STEP_TIME, STEP_RATIO),
    assumptions=(
        "seconds: steps times the time of a step: its ratio to a sampling step that is timed in "
        "turn with it, times the median of those sampling steps",
        "the paper has a matching budget on CelebA alone: here the digits' network "
        "(16-256-512-784), B = 64, Adam at 1e-3, gamma = 0.5, c = 0.5 unless said otherwise",
        "KL warm-up N: the KL divergence weighs 0.2 for N steps, then 1",
        "precision N, antithetic: N steps by the sampling-free objective, then by an antithetic "
        "pair of draws per image",
        "IWAE, linearized: importance weights drawn from the linearised posterior at the mean",
        "c learned: with the weights, from 0.5 on; each model is judged at the c that it learned",
        "what takes less time is trained for more steps",
        "runs of one seed share their initial weights and batches",
    ),
)
