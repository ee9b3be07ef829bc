"""Figure 2: the latent plane of the digits (4.2, B.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastsfvae.reproduce.cells import Cell, Experiment, Options, Result
from fastsfvae.reproduce.figures import row_of_panels
from fastsfvae.reproduce.measures import Likelihoods
from fastsfvae.results.pictures import draw_manifold
from fastsfvae.training.config import TrainConfig
from fastsfvae.training.methods import Method

_METHODS: tuple[Method, ...] = ("sampling-free", "sampling")


def _cells(options: Options) -> list[Cell]:
    steps, lr = (800, 1e-3) if options.quick else (50_000, 1e-4)
    measure = Likelihoods(samples=500, images=200 if options.quick else 1000)
    cells = []
    for data in options.data_sets("digits"):
        place = options.place(data)
        for method in _METHODS:
            config = TrainConfig(**place, method=method, model="mlp", latent_dim=2, lr=lr)
            cells.append(Cell(f"{data}, {method}", config, measure, (steps,)))
    return cells


def _draw(results: Sequence[Result]):
    shown = [result for result in results if result.seed == 0]
    figure, panels = row_of_panels(len(shown), 5.2, 5.4)
    for axes, result in zip(panels, shown, strict=True):
        _, decoder = result.load()
        draw_manifold(axes, decoder, torch.device("cpu"))
        axes.set_title(f"{result.cell.name}, {result.trained_steps:,} steps", fontsize=10)
    return figure


FIGURE2 = Experiment(
    title="The latent plane, m = 2, [-5, 5] in both directions",
    cells=_cells,
    draw=_draw,
    assumptions=(
        "the batch size is not stated: 64",
        "gamma = 0.5, the paper's canonical choice; c = 0.5; identity output; torch's initial "
        "weights",
        "MNIST: the 9,000 bundled digits, or the whole set by --data mnist",
    ),
)
