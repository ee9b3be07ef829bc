"""The figures that training leaves in a run's folder, and its snapshots. Needs matplotlib."""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from torch import Tensor

from fastsfvae.data.pixels import to_unit
from fastsfvae.ground.atomic import replacing
from fastsfvae.results import pictures
from fastsfvae.results.samples import posterior_noise, sample_latents
from fastsfvae.training.methods import DETERMINISTIC, WITHOUT_PRIOR
from fastsfvae.training.metrics_csv import METRICS
from fastsfvae.training.run import Run, evaluation_generator

_DPI = 150


@torch.no_grad()
def save_figures(run: Run) -> list[Path]:
    """Write reconstructions, samples, curves and, with m = 2, the manifold; return the paths."""
    run.encoder.eval()
    run.decoder.eval()
    generator = evaluation_generator(run.config, run.device)
    m, drawn = run.config.latent_dim, posterior_noise(run.config, generator)
    test = to_unit(run.config.load_images("test")[:16].to(run.device))
    written = {
        "reconstructions.png": pictures.rows_of_images(
            pictures.reconstructions(run.encoder, run.decoder, test, drawn)
        ),
        "curves.png": _curves(run),
    }
    z, origin = sample_latents(run.config, run.encoder, 128, generator)
    title = f"Decoder output f(z), z drawn from {origin}"
    written["samples.png"] = pictures.image_grid(run.decoder(z), columns=16, title=title)
    if m == 2:
        written["manifold.png"] = pictures.manifold(run.decoder, run.device)
    paths = []
    for name, figure in written.items():
        with replacing(run.folder / name) as file:
            figure.savefig(file, format="png", dpi=_DPI, bbox_inches="tight")
        paths.append(run.folder / name)
    return paths


@torch.no_grad()
def snapshot(run: Run, x: Tensor):
    """Draw images ``[N, C, H, W]``, their reconstructions and N samples of the prior; a figure.

    A method without a prior has no samples before it is trained.
    Leaves the modules' mode and every generator but its own as they are.
    """
    training = run.model.training
    run.model.eval()
    generator = evaluation_generator(run.config, run.device)
    drawn = posterior_noise(run.config, generator)
    rows = pictures.reconstructions(run.encoder, run.decoder, x, drawn)
    if run.config.method not in WITHOUT_PRIOR:
        z, origin = sample_latents(run.config, run.encoder, len(x), generator)
        rows[f"f(z), z ~ {origin}"] = run.decoder(z)
    figure = pictures.rows_of_images(rows)
    figure.suptitle(f"step {run.step:,}", fontsize=10)
    run.model.train(training)
    return figure


def _curves(run: Run):
    with (run.folder / METRICS).open(newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    at_the_mean = run.config.method in ("sampling-free", *DETERMINISTIC)
    where, switch = "at the mean" if at_the_mean else "sampled", run.config.start.steps
    if switch and not at_the_mean:
        where = "at the mean, then sampled"
    panels = {
        "objective": "objective (nats)",
        "kl": "KL(q || p) (nats)",
        "squared_error": f"squared error, {where}",
    }
    if run.config.method in DETERMINISTIC:
        # Of a variance that nothing trains.
        del panels["kl"]
    figure = pictures.new_figure(3.0 * len(panels), 2.6)
    for axes, (column, label) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        steps, values = [row["step"] for row in rows], [row[column] for row in rows]
        axes.plot(steps, values, linewidth=1.2, marker=pictures.marker(len(steps)))
        # The first steps would flatten everything that follows.
        settled = values[max(1, len(values) // 20) :] or values
        margin = 0.05 * (max(settled) - min(settled)) or 1.0
        axes.set_ylim(min(settled) - margin, max(settled) + margin)
        axes.set_title(label, fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        if switch:
            # There the warm start ends, and the objective is another one.
            axes.axvline(switch, color="gray", linestyle=":", linewidth=1)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
