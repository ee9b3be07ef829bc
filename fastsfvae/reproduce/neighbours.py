"""The paper's neighbourhood: other ways to train an auto-encoder with a latent prior, side by side.

The same networks, data, batches, initial weights and optimiser; each method's own objective; every
judge that means something for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from fastsfvae.data.pixels import to_unit
from fastsfvae.reproduce.cells import Cell, Experiment, Options, Result
from fastsfvae.reproduce.judges import (
    AT_MEAN,
    BLANKS,
    KID,
    LOG_ML,
    QUANTITIES,
    Judges,
)
from fastsfvae.reproduce.seconds import (
    curves,
    doublings,
    step_seconds,
    step_time_cell,
    trained,
    value_at,
)
from fastsfvae.reproduce.tables import grid
from fastsfvae.results.pictures import centres, draw_images, new_figure
from fastsfvae.results.samples import sample_latents
from fastsfvae.training.config import TrainConfig

STEPS = 2000
_SAMPLING = "sampling"
METHODS: dict[str, dict[str, Any]] = {
    _SAMPLING: {"method": "sampling"},
    "sampling-free, precision": {"likelihood": "precision"},
    "sampling-free, expected": {"likelihood": "expected"},
    "precision 100, antithetic": {
        **{"method": "sampling", "samples": 2, "draws": "antithetic"},
        "warm_start": "precision:100",
    },
    "beta-VAE, 4": {"method": "beta-vae", "kl_weight": 4.0},
    "free bits": {"method": "free-bits"},
    "delta-VAE": {"method": "delta-vae"},
    "Householder, 4": {"method": "householder"},
    "IWAE, K=5": {"method": "iwae", "samples": 5},
    "H-IWAE, K=5": {"method": "hiwae", "samples": 5},
    "DReG, K=5": {"method": "dreg", "samples": 5},
    "STL": {"method": "stl"},
    "REM, K=5": {"method": "rem", "samples": 5},
    "REM, K=20": {"method": "rem", "samples": 20},
    "VLAE": {"method": "vlae"},
    "auto-encoder": {"method": "auto-encoder"},
    "RAE, L2": {"method": "rae"},
    "RAE, gradient penalty": {"method": "rae", "regularizer": "gradient-penalty"},
    "RAE, spectral norm": {"method": "rae", "regularizer": "spectral-norm"},
    "WAE-MMD": {"method": "wae-mmd"},
    "SWAE": {"method": "swae"},
    "CWAE": {"method": "cwae"},
}
_COLUMNS = 12
# What is compared at equal seconds.
_IN_TIME = (LOG_ML, AT_MEAN, KID)


def _cells(options: Options) -> list[Cell]:
    steps = options.steps or (32 if options.quick else STEPS)
    if steps < 16:
        raise ValueError(f"--steps {steps}: the curves take at least 16")
    measure = Judges()
    if options.quick:
        measure = Judges(samples=50, images=50, generated=200, extractor_steps=50)
    at = (steps,) if options.quick else doublings(steps, 5)
    cells = []
    for data in options.data_sets("digits", "fashion-mnist"):
        base = TrainConfig(**options.place(data))
        for name, settings in METHODS.items():
            own = dict(settings)
            if "warm_start" in own and steps != STEPS:
                own["warm_start"] = f"precision:{max(1, round(100 * steps / STEPS))}"
            config, seeds = replace(base, **own), 1 if options.quick else 3
            name = _prefix(data) + name
            cells.append(Cell(name, config, measure, at, seeds, fixed_steps=True))
    if options.quick:
        return cells
    return [*cells, *(step_time_cell(cell) for cell in cells if not cell.config.warm_start)]


def _prefix(data: str) -> str:
    """What stands in front of a method's name in a cell's."""
    return "" if data == "digits" else f"{data}, "


def _by_data(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The results of each data set."""
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.cell.config.data, []).append(result)
    return found


def _reading(results: Sequence[Result]) -> str:
    lines = ["-, where it does not apply:", ""]
    lines += [f"- {names}: {reason}." for names, reason in BLANKS.items()]
    for data, of_set in _by_data(results).items():
        lines += _equal_seconds(data, of_set)
    return "\n".join(lines)


def _equal_seconds(data: str, results: Sequence[Result]) -> Iterator[str]:
    """The judges of all kinds in the time of three quarters of the baseline's steps, and less."""
    seconds, baseline = step_seconds(results), _prefix(data) + _SAMPLING
    found = {quantity: curves(results, quantity) for quantity in _IN_TIME}
    if baseline not in seconds or baseline not in found[AT_MEAN]:
        return
    last = max(found[AT_MEAN][baseline])
    # Not its end: what takes a little less time has no point behind.
    steps = [last * quarters // 4 for quarters in (1, 2, 3)]
    budgets = [seconds[baseline] * step for step in steps]
    rows = []
    for name in found[AT_MEAN]:
        if name not in seconds:
            continue
        cells = []
        for budget in budgets:
            values = []
            for quantity in _IN_TIME:
                curve = found[quantity].get(name, {})
                in_time = {n * seconds[name]: value for n, value in curve.items()}
                values.append(value_at(in_time, budget))
            cells.append(" / ".join("-" if math.isnan(v) else f"{v:.4g}" for v in values))
        ratio = seconds[name] / seconds[baseline]
        rows.append([name.removeprefix(_prefix(data)), f"{ratio:.2f}", *cells])
    yield ""
    yield (
        f"On {data} at equal seconds, {' / '.join(_IN_TIME)}: steps times the time of a step, "
        f"interpolated over log seconds. The columns are the times of "
        f"{', '.join(f'{n:,}' for n in steps)} steps of {_SAMPLING}. -: a method has no such "
        "quantity, or no point before or behind."
    )
    yield ""
    head = ["trained by", "time of a step", *(f"{budget:.3g} s" for budget in budgets)]
    yield from grid(head, rows)


@torch.no_grad()
def _draw(results: Sequence[Result]):
    """Of each data set a row of test images, then of each method a row of samples, of seed 0."""
    sets = _by_data([result for result in trained(results) if result.seed == 0])
    if not sets:
        return None
    rows = 1 + max(map(len, sets.values()))
    figure = new_figure(0.42 * _COLUMNS * len(sets) + 2.2, 0.42 * rows + 0.5)
    panels = figure.subplots(1, len(sets), squeeze=False)[0]
    for axes, (data, of_set) in zip(panels, sets.items(), strict=True):
        images = {"test images": to_unit(of_set[0].cell.config.load_images("test")[:_COLUMNS])}
        for result in of_set:
            encoder, decoder = result.load()
            generator = torch.Generator().manual_seed(0)
            z, _ = sample_latents(result.cell.config, encoder, _COLUMNS, generator)
            images[result.cell.name.removeprefix(_prefix(data))] = decoder(z)
        draw_images(axes, torch.cat(list(images.values())), _COLUMNS)
        size = images["test images"].shape[-1]
        axes.set_yticks(centres(len(images), size), list(images), fontsize=8)
        axes.tick_params(length=0)
        axes.set_title(data, fontsize=9)
    return figure


NEIGHBOURS = Experiment(
    title="The paper's neighbourhood: samples and judges of every method",
    cells=_cells,
    draw=_draw,
    reading=_reading,
    last_only=True,
    columns=QUANTITIES,
    assumptions=(
        "the default networks (16-256-512-784), B = 64, Adam at 1e-3, c = .5, gamma = .5, 2,000 "
        "steps; runs of one seed share their initial weights and batches",
        "weights of penalties as `fastsfvae train --help` has them: WAE-MMD's and CWAE's are their "
        "papers', SWAE's is its paper's for another reconstruction cost, and RAE's were chosen by "
        "KID on the digits after 2,000 steps of seed 100; nothing else was tuned",
    ),
)
