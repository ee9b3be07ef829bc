"""Figures of a run. Needs matplotlib."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastsfvae.report import encode
from fastsfvae.training import METRICS, Run, evaluation_generator, to_unit

_DPI = 150


@torch.no_grad()
def save_figures(run: Run) -> list[Path]:
    """Write reconstructions, samples, curves and, with m = 2, the manifold; return the paths."""
    run.encoder.eval()
    run.decoder.eval()
    generator = evaluation_generator(run.config, run.device)
    m = run.config.latent_dim
    test = to_unit(run.config.load_images("test")[:16].to(run.device))
    written = {
        "reconstructions.png": _rows_of_images(_reconstruct(run, test, generator)),
        "samples.png": _image_grid(
            run.decoder(torch.randn(128, m, generator=generator, device=run.device)),
            columns=16,
            title="Decoder output f(z), z drawn from N(0, I)",
        ),
        "curves.png": _curves(run),
    }
    if m == 2:
        written["manifold.png"] = _manifold(run.decoder, run.device)
    paths = []
    for name, figure in written.items():
        figure.savefig(run.folder / name, dpi=_DPI, bbox_inches="tight")
        paths.append(run.folder / name)
    return paths


@torch.no_grad()
def snapshot(run: Run, x: Tensor):
    """Draw images ``[N, C, H, W]``, their reconstructions and N samples of the prior; a figure.

    Leaves the modules' mode and every generator but its own as they are.
    """
    training = run.model.training
    run.model.eval()
    generator = evaluation_generator(run.config, run.device)
    rows = _reconstruct(run, x, generator)
    z = torch.randn(len(x), run.config.latent_dim, generator=generator, device=run.device)
    figure = _rows_of_images(rows | {"f(z), z ~ N(0, I)": run.decoder(z)})
    figure.suptitle(f"step {run.step:,}", fontsize=10)
    run.model.train(training)
    return figure


def _figure(width: float, height: float):
    # The object-oriented interface needs no display and leaves no global state behind.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _tile(images: Tensor, columns: int) -> np.ndarray:
    """Lay images ``[N, C, H, W]`` out row by row: ``[H', W']`` or, in colour, ``[H', W', 3]``."""
    rows = images.clamp(0, 1).cpu().unflatten(0, (-1, columns))
    sheet = rows.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    return sheet.squeeze(-1).numpy()


def _show(axes, images: Tensor, columns: int) -> None:
    axes.imshow(_tile(images, columns), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _image_grid(images: Tensor, columns: int, title: str):
    rows = len(images) // columns
    figure = _figure(0.5 * columns, 0.5 * rows + 0.3)
    axes = figure.subplots()
    _show(axes, images, columns)
    axes.set_title(title, fontsize=10)
    return figure


def _reconstruct(run: Run, x: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    mean, log_var = encode(run.encoder, x)
    noise = torch.randn(mean.shape, generator=generator, device=mean.device)
    sampled = mean + torch.exp(0.5 * log_var) * noise
    return {
        "test image": x,
        "f(mean)": run.decoder(mean),
        "f(z), z ~ q(z|x)": run.decoder(sampled),
    }


def _rows_of_images(rows: dict[str, Tensor]):
    columns, _, size, _ = next(iter(rows.values())).shape
    figure = _figure(0.5 * columns + 1.2, 0.5 * len(rows) + 0.1)
    axes = figure.subplots()
    _show(axes, torch.cat(list(rows.values())), columns)
    axes.set_yticks([size * (row + 0.5) for row in range(len(rows))], list(rows), fontsize=9)
    axes.tick_params(left=False)
    return figure


def _curves(run: Run):
    with (run.folder / METRICS).open(newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    at_the_mean = run.config.method in ("sampling-free", "auto-encoder")
    where = "at the mean" if at_the_mean else "sampled"
    panels = {
        "objective": "objective (nats)",
        "kl": "KL(q || p) (nats)",
        "squared_error": f"squared error, {where}",
    }
    figure = _figure(9.0, 2.6)
    for axes, (column, label) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        steps, values = [row["step"] for row in rows], [row[column] for row in rows]
        axes.plot(steps, values, linewidth=1.2)
        # The first steps would flatten everything that follows.
        settled = values[len(values) // 20 :]
        margin = 0.05 * (max(settled) - min(settled)) or 1.0
        axes.set_ylim(min(settled) - margin, max(settled) + margin)
        axes.set_title(label, fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _manifold(decoder: nn.Module, device: torch.device, count: int = 20, limit: float = 5.0):
    ticks = torch.linspace(-limit, limit, count, device=device)
    # Rows from the top: z_2 falls, as on the page.
    z = torch.cartesian_prod(ticks.flip(0), ticks).flip(1)
    images = decoder(z)
    figure = _figure(6.4, 6.4)
    axes = figure.subplots()
    half_cell = limit / (count - 1)
    edge = limit + half_cell
    axes.imshow(
        _tile(images, count),
        cmap="gray",
        vmin=0,
        vmax=1,
        interpolation="nearest",
        extent=(-edge, edge, -edge, edge),
    )
    axes.set_xlabel("$z_1$")
    axes.set_ylabel("$z_2$")
    axes.set_title("Decoder output f(z) over the latent plane", fontsize=10)
    return figure
