"""Figures 3 and C.3 to C.8: reconstructions and traversals of the latent space (4.2, C.4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsfvae.data.pixels import to_unit
from fastsfvae.reproduce.cells import Cell, Experiment, Options, Result
from fastsfvae.reproduce.images import ASSUMPTIONS, image_protocol
from fastsfvae.reproduce.measures import Likelihoods
from fastsfvae.results.pictures import centres, draw_images, new_figure
from fastsfvae.training.config import TrainConfig

_METHODS: dict[str, dict[str, Any]] = {
    "sampling-free VAE": {"method": "sampling-free"},
    "sampling beta-VAE": {"method": "beta-vae", "kl_weight": 4.0},
    "sampling VAE": {"method": "sampling"},
    "auto-encoder": {"method": "auto-encoder"},
}
_IMAGES = 3
_COLUMNS = 7
_LIMIT = 3.0


def _cells(options: Options, methods: Sequence[str]) -> list[Cell]:
    measure = Likelihoods(samples=500, proposal="posterior", images=200)
    cells = []
    for data in options.data_sets("celeba", "chairs", "digits"):
        protocol = image_protocol(options, data)
        for name in methods:
            config = TrainConfig(
                **protocol.settings, **_METHODS[name], latent_dim=protocol.latent_dim
            )
            cells.append(Cell(f"{data}, {name}", config, measure, (protocol.steps,)))
    return cells


def _draw(results: Sequence[Result], dimensions: int):
    """One block a method and image: the image, its reconstruction, traversals below."""
    shown = [result for result in results if result.seed == 0]
    rows = 1 + (dimensions or max(result.cell.config.latent_dim for result in shown))
    figure = new_figure(0.32 * (_COLUMNS + 0.6) * len(shown), 0.32 * (rows + 0.6) * _IMAGES + 0.5)
    grid = figure.subplots(_IMAGES, len(shown), squeeze=False)
    for column, result in enumerate(shown):
        encoder, decoder = result.load()
        x = to_unit(result.cell.config.load_images("test")[:_IMAGES])
        # Every image's dimensions in one order: those that carry most first.
        order = _most_informative(encoder, result)[: dimensions or None]
        for row in range(_IMAGES):
            draw_images(grid[row, column], _block(encoder, decoder, x[row], order), _COLUMNS)
        first, *_, last = centres(_COLUMNS, x.shape[-1])
        ends = [f"{value:g}" for value in (-_LIMIT, 0, _LIMIT)]
        grid[-1, column].set_xticks([first, (first + last) / 2, last], ends, fontsize=8)
        grid[-1, column].tick_params(length=0)
        grid[-1, column].set_xlabel("value of the dimension", fontsize=8)
        title = f"{result.cell.name}\n{result.trained_steps:,} steps"
        grid[0, column].set_title(title, fontsize=8)
    figure.supylabel("latent dimension, the largest KL first", fontsize=8)
    figure.supxlabel(
        "each block: an image and its reconstruction;\nbelow, the decoder along latent dimensions",
        fontsize=8,
    )
    return figure


@torch.no_grad()
def _most_informative(encoder, result: Result) -> list[int]:
    x = to_unit(result.cell.config.load_images("test")[:250])
    mean, log_var = encoder(x)
    if result.cell.config.method == "auto-encoder":
        # Its variances are never trained.
        return mean.var(0).argsort(descending=True).tolist()
    return (log_var.exp() + mean.square() - log_var).mean(0).argsort(descending=True).tolist()


@torch.no_grad()
def _block(encoder, decoder, x: Tensor, order: Sequence[int]) -> Tensor:
    """The images ``[(1 + len(order)) * columns, C, H, W]`` of one block, row by row."""
    mean, _ = encoder(x[None])
    latents = mean.repeat(len(order), _COLUMNS, 1)
    for row, dimension in enumerate(order):
        latents[row, :, dimension] = torch.linspace(-_LIMIT, _LIMIT, _COLUMNS)
    blank = torch.full((_COLUMNS - 2, *x.shape), torch.nan)
    return torch.cat([x[None], decoder(mean), blank, decoder(latents.flatten(0, 1))])


_ASSUMPTIONS = (
    "which images and which dimensions are shown is the paper's choice by eye: here the first test "
    "images, and the dimensions of largest KL",
    *ASSUMPTIONS,
)
FIGURE3 = Experiment(
    title="Reconstructions and traversals of two dimensions",
    cells=lambda options: _cells(options, ["sampling-free VAE"]),
    draw=lambda results: _draw(results, dimensions=2),
    assumptions=_ASSUMPTIONS,
)
FIGURES_C3_C8 = Experiment(
    title="Reconstructions and all traversals, four methods",
    cells=lambda options: _cells(options, list(_METHODS)),
    draw=lambda results: _draw(results, dimensions=0),
    assumptions=(
        "beta is not stated: 4",
        "the auto-encoder, which in the paper always converges to plain white on the chairs, has "
        "the other methods' settings",
        *_ASSUMPTIONS,
    ),
)
