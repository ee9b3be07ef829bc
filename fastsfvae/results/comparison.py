"""The numbers and the picture of `fastsfvae compare`: runs on the same images."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsfvae import evaluate
from fastsfvae.evaluate import ImageMean, LogMarginalLikelihood, mean_over_images
from fastsfvae.results import pictures, verdict
from fastsfvae.results.evaluation import Settings, understated, unresolved
from fastsfvae.results.evaluation import conventions as run_conventions
from fastsfvae.results.samples import posterior_noise, sample_latents, without_density
from fastsfvae.results.trained import Trained, over_images, progress
from fastsfvae.training.config import CHANGEABLE

_LOG_ML = "log ML, without constant"
_AT_MEAN = "squared error at the mean"


class Comparison(NamedTuple):
    """Quantities of several runs, or groups of runs that differ in their seed alone.

    Attributes:
        runs: folders, those of a group joined by commas; the first is what the others are compared
            with.
        verdict: what the numbers come to, in one line.
        means: quantity -> its mean for each group, over images and runs, with the standard error
            over images.
        differences: quantity -> that of (group - first group) image by image, for the others.
        seed_spreads: quantity -> standard deviation of the means of each group's runs; NaN for one
            run.
        seed_errors: quantity -> standard error over seeds of each difference, Welch's
            sqrt(s1^2/n1 + s2^2/n2); NaN where a group has one run.
        weights: of the importance weights of each group, over all its images and runs.
    """

    runs: list[str]
    verdict: str
    means: dict[str, list[ImageMean]]
    differences: dict[str, list[ImageMean]]
    seed_spreads: dict[str, list[float]]
    seed_errors: dict[str, list[float]]
    weights: dict[str, list[float]]


class _Group(NamedTuple):
    """What is measured of a group: quantity -> ``[runs, N]``; log ML as it comes, of each run.

    Where a run of any group has no density of x, there is no log ML.
    """

    values: dict[str, Tensor]
    log_ml: list[LogMarginalLikelihood]


def compare(groups: list[list[Trained]], settings: Settings) -> Comparison:
    """Compare runs by quantities that mean the same for all of them: paired differences.

    Args:
        groups: at least two, each of one run or of several that differ in their seed alone; all of
            the same data and noise variance.
        settings: importance weights and draws per image.

    Raises:
        ValueError: where images, noise variances, or settings within a group differ.
    """
    runs = [run for group in groups for run in group]
    _check(groups, runs)
    decodes = len(runs) * len(runs[0].x) * (settings.samples + settings.elbo_samples)
    reason = _reason(runs)
    if reason:
        measured = [_errors(group) for group in groups]
    else:
        with progress("decodes", decodes) as count:
            measured = [_measure(group, settings, count, _learns(runs)) for group in groups]
    first, *others = [group.values for group in measured]
    differences = {
        name: [mean_over_images(group[name].mean(0) - first[name].mean(0)) for group in others]
        for name in first
    }
    # Of each group: the number of runs with their spread.
    spreads = {
        name: [(len(g.values[name]), _spread(g.values[name].mean(1))) for g in measured]
        for name in first
    }
    seed_errors = {name: _welch(found) for name, found in spreads.items()}
    if reason:
        said = verdict.of_errors(names(groups), differences[_AT_MEAN], len(runs[0].x), reason)
    else:
        log_ml = _named(_LOG_ML, _learns(runs))
        log_mls = [found for group in measured for found in group.log_ml]
        said = verdict.of_comparison(
            names(groups),
            differences[log_ml],
            [max(map(unresolved, group.log_ml)) for group in measured],
            len(runs[0].x),
            settings.weights,
            understated=max(map(understated, log_mls)),
            seed_errors=seed_errors[log_ml],
        )
    return Comparison(
        [",".join(str(run.folder) for run in group) for group in groups],
        said,
        {name: [mean_over_images(g.values[name].mean(0)) for g in measured] for name in first},
        differences,
        {name: [spread for _, spread in found] for name, found in spreads.items()},
        seed_errors,
        {} if reason else _weights(measured),
    )


def _check(groups: list[list[Trained]], runs: list[Trained]) -> None:
    first = runs[0]
    for run in runs[1:]:
        if run.x.shape != first.x.shape or not torch.equal(run.x.to(first.x.device), first.x):
            raise ValueError(
                f"{run.folder} and {first.folder} have different test images: compare runs on one "
                "data set, prepared alike"
            )
        if run.config.noise_var != first.config.noise_var and not _learns(runs):
            raise ValueError(
                f"{run.folder} has noise_var={run.config.noise_var:g} but {first.folder} "
                f"{first.config.noise_var:g}: their densities do not compare"
            )
    for group in groups:
        _check_seeds(group)


def _reason(runs: list[Trained]) -> str:
    """Why densities cannot be compared; "" where all runs have one."""
    return next((reason for run in runs if (reason := without_density(run.config))), "")


def _errors(group: list[Trained]) -> _Group:
    return _Group({_AT_MEAN: torch.stack([_error_at_mean(run) for run in group])}, [])


def _error_at_mean(run: Trained) -> Tensor:
    """``[N]``, on the CPU: runs may have been loaded onto different devices."""

    def measure(part: Trained) -> Tensor:
        return evaluate.squared_error_at_mean(part.decoder, part.x, part.mean)

    return over_images(run, measure).cpu()


def _learns(runs: list[Trained]) -> bool:
    """Whether each run may have a noise variance of its own."""
    return any(run.config.learned_noise_var for run in runs)


def _named(name: str, learns: bool) -> str:
    """A log-density's name: where the constants differ they are part of what is compared."""
    return name.partition(", without")[0] if learns else name


def _check_seeds(group: list[Trained]) -> None:
    """Refuse a group whose runs differ in more than their seed, or not even in that."""
    first, seen = group[0], {group[0].config.seed: group[0]}
    for run in group[1:]:
        settings, expected = (
            dataclasses.asdict(r.config) | {"trained steps": r.step} for r in (run, first)
        )
        # Where and for how long a run may go on says nothing of its model; the steps are its own.
        own = {*CHANGEABLE, "seed"} | ({"noise_var"} if _learns(group) else set())
        for name, value in settings.items():
            if name not in own and value != expected[name]:
                raise ValueError(
                    f"{run.folder} has {name}={value!r} but {first.folder} {expected[name]!r}: "
                    "runs of a group, joined by a comma, differ in their seed alone"
                )
        other = seen.setdefault(run.config.seed, run)
        if other is not run:
            raise ValueError(
                f"{run.folder} has the seed of {other.folder}, {run.config.seed}: runs of a group, "
                "joined by a comma, differ in their seed"
            )


def _spread(means: Tensor) -> float:
    return float(means.std()) if len(means) > 1 else math.nan


def _welch(spreads: list[tuple[int, float]]) -> list[float]:
    """Standard errors of the others' means against the first's: two samples of unlike variance."""
    first, *others = [spread**2 / runs for runs, spread in spreads]
    return [math.sqrt(first + other) for other in others]


def _measure(group: list[Trained], settings: Settings, count, learns: bool) -> _Group:
    found = [_quantities(run, settings, count, learns) for run in group]
    values = [of_run for of_run, _ in found]
    return _Group(
        {name: torch.stack([of_run[name] for of_run in values]) for name in values[0]},
        [log_ml for _, log_ml in found],
    )


def _quantities(
    run: Trained, settings: Settings, count, learns: bool
) -> tuple[dict[str, Tensor], LogMarginalLikelihood]:
    """Per image ``[N]``, and log ML with its weights."""
    c = run.config.noise_var
    log_ml = over_images(
        run,
        lambda part: evaluate.log_marginal_likelihood(
            *part.posterior,
            noise_var=c,
            samples=settings.samples,
            proposal=settings.proposal,
            generator=part.generator(),
            first_image=part.first_image,
            progress=count,
        ),
    )
    elbo = over_images(
        run,
        lambda part: evaluate.sampled_elbo(
            *part.posterior,
            noise_var=c,
            samples=settings.elbo_samples,
            generator=part.generator(),
            first_image=part.first_image,
            progress=count,
        ),
    )
    left_out = 0.0 if learns else log_ml.constant
    values = {
        _named(_LOG_ML, learns): log_ml.estimate - left_out,
        _named("sampled ELBO, without constant", learns): elbo.elbo - left_out,
        "KL": elbo.kl,
        "squared error, sampled": elbo.squared_error,
        _AT_MEAN: _error_at_mean(run),
    }
    return {name: value.cpu() for name, value in values.items()}, log_ml


def _weights(measured: list[_Group]) -> dict[str, list[float]]:
    effective = [torch.cat([f.effective_samples.cpu() for f in g.log_ml]) for g in measured]
    bias = [torch.cat([f.bias.cpu() for f in g.log_ml]) for g in measured]
    return {
        "effective samples, median": [float(found.median()) for found in effective],
        "effective samples, smallest": [float(found.min()) for found in effective],
        "log ML, estimated bias (nats)": [float(found.mean()) for found in bias],
    }


def sections(found: Comparison) -> dict[str, dict[str, list[str]]]:
    """The rows of a comparison: its groups, then the differences; over seeds where groups are."""
    images = {
        name: [
            f"{v.mean:,.2f} ± {v.standard_error:.2f}" for v in (*means, *found.differences[name])
        ]
        for name, means in found.means.items()
    }
    # Differences have no weights of their own.
    empty = [""] * (len(found.runs) - 1)
    weights = {
        name: [f"{value:,.3g}" for value in values] + empty
        for name, values in found.weights.items()
    }
    # Short, as a terminal's first column is as wide as they are; `conventions` has the rest.
    tables = {"± over test images, not over seeds": images}
    if any(math.isfinite(s) for spreads in found.seed_spreads.values() for s in spreads):
        tables["± over seeds"] = {
            name: [
                f"± {value:,.2f}" if math.isfinite(value) else "-"
                for value in (*spreads, *found.seed_errors[name])
            ]
            for name, spreads in found.seed_spreads.items()
        }
    return tables | ({"Importance weights": weights} if weights else {})


def conventions(groups: list[list[Trained]], settings: Settings) -> dict[str, Any]:
    """Those that all runs share; where runs differ, each one's own after its folder's name."""
    runs = [run for group in groups for run in group]
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
            *(() if _learns(runs) else ("noise_var",)),
            "data",
            "commit",
            "torch",
            "fastsfvae",
        )
    }
    if reason := _reason(runs):
        of_densities = ("log_ml", "log_ml_elsewhere", "sampled_elbo")
        shared = {key: value for key, value in shared.items() if key not in of_densities}
        shared["not_judged"] = reason
    shared |= {
        "± over test images": "standard error of the mean, spread over images / sqrt(N), of the "
        "mean of a group's runs; differences are paired, image by image",
        "± over seeds": "standard deviation of the means of a group's runs; of a difference its "
        "standard error, sqrt(s1^2/n1 + s2^2/n2) (Welch); -: a group has one run",
    }
    own = (
        *(("noise_var",) if _learns(runs) else ()),
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
        str(run.folder): ", ".join(
            f"{key} {of_run[key]}" for key in (*own, *run.config.own_settings)
        )
        for run, of_run in zip(runs, each, strict=True)
    }
    return shared | differing


def names(groups: list[list[Trained]]) -> list[str]:
    """The first folder's name of each, or, where two are alike, the whole paths of all."""
    short = [
        group[0].folder.name + (f" ({len(group)} seeds)" if len(group) > 1 else "")
        for group in groups
    ]
    if len(set(short)) == len(groups):
        return short
    return [",".join(str(run.folder) for run in group) for group in groups]


@torch.no_grad()
def side_by_side(groups: list[list[Trained]], images: int = 16):
    """One figure: test images, then each run's decoder at the mean and at a draw of the posterior.

    The last row of each run shows samples of its prior, or of what stands for it. Of a group the
    first run is shown.
    """
    runs = [group[0] for group in groups]
    rows = {"test image": runs[0].x[:images]}
    for name, run in zip(names([[run] for run in runs]), runs, strict=True):
        generator = run.generator()
        x = run.x[:images]
        noise = posterior_noise(run.config, generator)
        drawn = pictures.reconstructions(run.encoder, run.decoder, x, noise)
        z, origin = sample_latents(run.config, run.encoder, len(x), generator)
        drawn[f"f(z), z ~ {origin}"] = run.decoder(z)
        rows |= {f"{name}: {k}": v.cpu() for k, v in list(drawn.items())[1:]}
    rows["test image"] = rows["test image"].cpu()
    return pictures.rows_of_images(rows)
