"""Figure A.1: the Taylor expansion of a decoder of one latent dimension."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastsfvae.data.pixels import to_unit
from fastsfvae.jacobian.api import decode_with_jacobian
from fastsfvae.reproduce.cells import Cell, Experiment, Options, Result
from fastsfvae.reproduce.figures import row_of_panels, tidy
from fastsfvae.reproduce.measures import Likelihoods
from fastsfvae.training.config import TrainConfig

_IMAGES = 3
_LIMIT = 3.0


def _cells(options: Options) -> list[Cell]:
    measure = Likelihoods(samples=500, proposal="posterior", images=200)
    steps = 300 if options.quick else 5000
    return [
        Cell(
            data,
            TrainConfig(**options.place(data), model="mlp", latent_dim=1),
            measure,
            (steps,),
        )
        for data in options.data_sets("digits")
    ]


@torch.no_grad()
def _draw(results: Sequence[Result]):
    """The pixel that moves most, along z, with its tangents at three posterior means."""
    result = results[0]
    encoder, decoder = result.load()
    x = to_unit(result.cell.config.load_images("test")[:_IMAGES])
    mean, log_var = encoder(x)
    centre, jacobian = decode_with_jacobian(decoder, mean)
    z = torch.linspace(-_LIMIT, _LIMIT, 601)[:, None]
    curve = decoder(z).flatten(1)
    figure, panels = row_of_panels(_IMAGES, 3.4, 3.0)
    for i, axes in enumerate(panels):
        pixel = int(jacobian[i].abs().argmax())
        value, slope = float(centre[i].flatten()[pixel]), float(jacobian[i].flatten()[pixel])
        at, deviation = float(mean[i]), float(log_var[i].mul(0.5).exp())
        axes.axvspan(at - 2 * deviation, at + 2 * deviation, color="C1", alpha=0.15, linewidth=0)
        axes.plot(z, curve[:, pixel], color="gray", linewidth=1.6, label="f")
        tangent = value + slope * (z - at)
        axes.plot(z, tangent, color="C1", linewidth=1.2, label="its Taylor expansion at g(x)")
        axes.plot([at], [value], "o", color="C1", markersize=4)
        low, high = float(curve[:, pixel].min()), float(curve[:, pixel].max())
        axes.set_ylim(low - 0.3 * (high - low), high + 0.3 * (high - low))
        tidy(axes, f"test image {i + 1}, pixel {pixel}", "z; shaded: g(x) ± 2 sqrt h(x)")
    panels[0].legend(fontsize=8, frameon=False)
    return figure


FIGURE_A1 = Experiment(
    title="A decoder of one latent dimension and its Taylor expansion",
    cells=_cells,
    draw=_draw,
    assumptions=(
        "the paper's network is an example of its own: here the digits' MLP, m = 1, the "
        "pixel of the steepest slope at each image",
    ),
)
