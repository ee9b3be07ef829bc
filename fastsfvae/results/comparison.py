"""The numbers and the picture of `fastsfvae compare`: runs on the same images."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsfvae import evaluate
from fastsfvae.evaluate import ImageMean, mean_over_images
from fastsfvae.ground.progress import counter
from fastsfvae.results import pictures, verdict
from fastsfvae.results.evaluation import Settings, Trained, unresolved
from fastsfvae.results.evaluation import conventions as run_conventions

_LOG_ML = "log ML, without constant"


class Comparison(NamedTuple):
    """Quantities of several runs.

    Attributes:
        runs: folders; the first is what the others are compared with.
        verdict: what the numbers come to, in one line.
        means: quantity -> its mean for each run.
        differences: quantity -> that of (run - first run) image by image, for the other runs.
    """

    runs: list[str]
    verdict: str
    means: dict[str, list[ImageMean]]
    differences: dict[str, list[ImageMean]]


def compare(runs: list[Trained], settings: Settings) -> Comparison:
    """Compare runs by quantities that mean the same for all of them: paired differences.

    Args:
        runs: at least two, of the same data and noise variance.
        settings: importance weights and draws per image.

    Raises:
        ValueError: where images or noise variances differ.
    """
    first = runs[0]
    for run in runs[1:]:
        if run.x.shape != first.x.shape or not torch.equal(run.x.to(first.x.device), first.x):
            raise ValueError(
                f"{run.folder} and {first.folder} have different test images: compare runs on one "
                "data set, prepared alike"
            )
        if run.config.noise_var != first.config.noise_var:
            raise ValueError(
                f"{run.folder} has noise_var={run.config.noise_var:g} but {first.folder} "
                f"{first.config.noise_var:g}: their densities do not compare"
            )
    decodes = len(runs) * len(first.x) * (settings.samples + settings.elbo_samples)
    with counter("decodes", decodes) as progress:
        measured = [_quantities(run, settings, progress) for run in runs]
    quantities = [of_run for of_run, _ in measured]
    differences = {
        name: [mean_over_images(q[name] - quantities[0][name]) for q in quantities[1:]]
        for name in quantities[0]
    }
    return Comparison(
        [str(run.folder) for run in runs],
        verdict.of_comparison(
            names(runs),
            differences[_LOG_ML],
            [few for _, few in measured],
            len(first.x),
            settings.weights,
        ),
        {name: [mean_over_images(q[name]) for q in quantities] for name in quantities[0]},
        differences,
    )


def _quantities(run: Trained, settings: Settings, progress) -> tuple[dict[str, Tensor], int]:
    """Per image ``[N]``; and of how many images log ML rests on too few weights."""
    posterior, c = (run.x, run.mean, run.log_var), run.config.noise_var
    log_ml = evaluate.log_marginal_likelihood(
        run.decoder,
        *posterior,
        noise_var=c,
        samples=settings.samples,
        proposal=settings.proposal,
        generator=run.generator(),
        progress=progress,
    )
    elbo = evaluate.sampled_elbo(
        run.decoder,
        *posterior,
        noise_var=c,
        samples=settings.elbo_samples,
        generator=run.generator(),
        progress=progress,
    )
    at_mean = evaluate.squared_error_at_mean(run.decoder, run.x, run.mean)
    values = {
        _LOG_ML: log_ml.without_constant,
        "sampled ELBO, without constant": elbo.elbo - elbo.constant,
        "KL": elbo.kl,
        "squared error, sampled": elbo.squared_error,
        "squared error at the mean": at_mean,
    }
    # Runs may have been loaded onto different devices.
    return {name: value.cpu() for name, value in values.items()}, unresolved(log_ml)


def conventions(runs: list[Trained], settings: Settings) -> dict[str, Any]:
    """Those that all runs share; where runs differ, each one's own after its folder's name."""
    each = [run_conventions(run, settings) for run in runs]
    shared = {
        key: each[0].get(key)
        for key in (
            "constant",
            "pixel_scale",
            "log_ml",
            "log_ml_elsewhere",
            "sampled_elbo",
            "squared_error",
            "split",
            "noise_var",
            "data",
            "commit",
            "torch",
            "fastsfvae",
        )
    }
    own = (
        "method",
        "likelihood",
        "gamma",
        "kl_weight",
        "samples",
        "draws",
        "training_proposal",
        "warm_start",
        "output_activation",
        "init",
        "seed",
        "trained_steps",
    )
    differing = {
        str(run.folder): ", ".join(f"{key} {of_run[key]}" for key in own)
        for run, of_run in zip(runs, each, strict=True)
    }
    return shared | differing


def names(runs: list[Trained]) -> list[str]:
    """Their folders' names, or, where two are alike, their whole paths."""
    short = [run.folder.name for run in runs]
    return short if len(set(short)) == len(runs) else [str(run.folder) for run in runs]


@torch.no_grad()
def side_by_side(runs: list[Trained], images: int = 16):
    """One figure: test images, then each run's decoder at the mean and at a draw of the posterior.

    The last row of each run shows samples of its prior.
    """
    rows = {"test image": runs[0].x[:images]}
    for name, run in zip(names(runs), runs, strict=True):
        generator = run.generator()
        x = run.x[:images]
        drawn = pictures.reconstructions(run.encoder, run.decoder, x, generator)
        z = torch.randn(len(x), run.mean.shape[1], generator=generator, device=x.device)
        drawn["f(z), z ~ N(0, I)"] = run.decoder(z)
        rows |= {f"{name}: {k}": v.cpu() for k, v in list(drawn.items())[1:]}
    rows["test image"] = rows["test image"].cpu()
    return pictures.rows_of_images(rows)
