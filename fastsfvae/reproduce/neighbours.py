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
from fastsfvae.reproduce.runtime import STEP_RATIO
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
from fastsfvae.training.checkpoint import load
from fastsfvae.training.config import TrainConfig

STEPS = 2000
_SAMPLING = "sampling"
# Those of the first table and the README have three seeds, as all of them.
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
    "VLAE": {"method": "vlae"},
    "auto-encoder": {"method": "auto-encoder"},
    "RAE, L2": {"method": "rae"},
    "RAE, gradient penalty": {"method": "rae", "regularizer": "gradient-penalty"},
    "RAE, spectral norm": {"method": "rae", "regularizer": "spectral-norm"},
    "WAE-MMD": {"method": "wae-mmd"},
    "SWAE": {"method": "swae"},
    "CWAE": {"method": "cwae"},
}
_COLUMNS = 14
# What is compared at equal seconds.
_IN_TIME = (LOG_ML, AT_MEAN, KID)


def _cells(options: Options) -> list[Cell]:
    steps = options.steps or (32 if options.quick else STEPS)
    if steps < 16:
        raise ValueError(f"--steps {steps}: the curves take at least 16")
    measure = Judges()
    if options.quick:
        measure = Judges(samples=50, images=50, generated=200, extractor_steps=50)
    (data,) = options.data_sets("digits")
    base = TrainConfig(**options.place(data))
    at = (steps,) if options.quick else doublings(steps, 5)
    cells = []
    for name, settings in METHODS.items():
        own = dict(settings)
        if "warm_start" in own and steps != STEPS:
            own["warm_start"] = f"precision:{max(1, round(100 * steps / STEPS))}"
        config = replace(base, **own)
        cells.append(Cell(name, config, measure, at, 1 if options.quick else 3, fixed_steps=True))
    if options.quick:
        return cells
    return [*cells, *(step_time_cell(cell) for cell in cells if not cell.config.warm_start)]


def _reading(results: Sequence[Result]) -> str:
    lines = ["-, where it does not apply:", ""]
    lines += [f"- {names}: {reason}." for names, reason in BLANKS.items()]
    return "\n".join([*lines, *_equal_seconds(results)])


def _equal_seconds(results: Sequence[Result]) -> Iterator[str]:
    """The judges of all kinds in the time of the baseline's own points."""
    seconds = step_seconds(results)
    if _SAMPLING not in seconds:
        return
    found = {quantity: curves(results, quantity) for quantity in _IN_TIME}
    last = max(found[AT_MEAN][_SAMPLING])
    # Not its end: what takes a little less time has no point behind.
    steps = [last * quarters // 4 for quarters in (1, 2, 3)]
    budgets = [seconds[_SAMPLING] * step for step in steps]
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
            cells.append(" / ".join("" if math.isnan(v) else f"{v:.4g}" for v in values))
        rows.append([name, f"{seconds[name] / seconds[_SAMPLING]:.2f}", *cells])
    yield ""
    yield (
        f"At equal seconds, {' / '.join(_IN_TIME)}: steps times the time of a step, interpolated "
        f"over log seconds. The columns are the times of {', '.join(f'{n:,}' for n in steps)} "
        f"steps of {_SAMPLING}. Blank: a method has no such quantity, or no point before or behind."
    )
    yield ""
    head = ["trained by", "time of a step", *(f"{budget:.3g} s" for budget in budgets)]
    yield from grid(head, rows)


@torch.no_grad()
def _draw(results: Sequence[Result]):
    """A row of test images, then of each method a row of samples, of seed 0."""
    shown = [result for result in trained(results) if result.seed == 0]
    if not shown:
        return None
    config = shown[0].cell.config
    rows = {"test images": to_unit(config.load_images("test")[:_COLUMNS])}
    for result in shown:
        result.load()
        encoder, decoder, loaded = load(result.folder)
        z, _ = sample_latents(loaded, encoder, _COLUMNS, torch.Generator().manual_seed(0))
        rows[result.cell.name] = decoder(z)
    figure = new_figure(0.42 * _COLUMNS + 2.2, 0.42 * len(rows) + 0.5)
    axes = figure.subplots()
    draw_images(axes, torch.cat(list(rows.values())), _COLUMNS)
    size = config.model_config.image_shape[-1]
    axes.set_yticks(centres(len(rows), size), list(rows), fontsize=8)
    axes.tick_params(length=0)
    return figure


NEIGHBOURS = Experiment(
    title="The paper's neighbourhood: samples and judges of every method",
    cells=_cells,
    draw=_draw,
    reading=_reading,
    last_only=True,
    columns=(*QUANTITIES, STEP_RATIO),
    assumptions=(
        "the default networks (16-256-512-784), B = 64, Adam at 1e-3, c = .5, gamma = .5, 2,000 "
        "steps; runs of one seed share their initial weights and batches",
        "weights of penalties as `fastsfvae train --help` has them: the papers', but RAE's, which "
        "were chosen by KID on the digits after 2,000 steps of seed 100; nothing else was tuned",
    ),
)
