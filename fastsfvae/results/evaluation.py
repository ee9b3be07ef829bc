"""The numbers of `fastsfvae evaluate`: all that is measured of a run on its test images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from fastsfvae import evaluate
from fastsfvae.evaluate import (
    LogMarginalLikelihood,
    TaylorQuality,
    mean_over_images,
    monte_carlo_error,
)
from fastsfvae.evaluate.proposals import DEFAULT_PROPOSAL, ProposalName
from fastsfvae.ground.progress import counter
from fastsfvae.likelihoods import posterior_kl
from fastsfvae.results import report, verdict
from fastsfvae.results.samples import without_density
from fastsfvae.results.trained import Trained, load_trained, over_images, progress
from fastsfvae.training import distributed

__all__ = ["Evaluation", "Number", "Settings", "Trained", "evaluate_trained", "load_trained"]

_ESS_SAMPLES = 256
_GRADIENT_SAMPLES = (1, 10, 100)
_GRADIENT_IMAGES = 64
_EPSILON, _DELTA = 0.05, 0.01


@dataclass(frozen=True)
class Settings:
    """How much work an evaluation is."""

    samples: int = report.WEIGHTS["evaluate"]
    """Importance weights per image of the log marginal likelihood."""

    proposal: ProposalName = DEFAULT_PROPOSAL
    """What they are drawn from: posterior, linearized, defensive or laplace."""

    elbo_samples: int = 100
    """Draws of the posterior per image of the sampled ELBO."""

    images: int = 0
    """Test images that are evaluated, the first so many; 0: all."""

    taylor_images: int = 10
    """Images whose output covariances are compared with the linearisation's; 0: none."""

    taylor_reference: int = 15_000
    """Draws per image that the true covariance is taken from."""

    gradient_repeats: int = 20
    """Repetitions that the variance of loss and gradient is taken from; 0: leave it out."""

    @property
    def weights(self) -> str:
        """Number and origin of the importance weights."""
        return f"K = {self.samples:,}, {self.proposal}"

    def __post_init__(self) -> None:
        if self.proposal not in evaluate.PROPOSALS:
            raise ValueError(
                f"proposal={self.proposal!r} is not one of {', '.join(evaluate.PROPOSALS)}"
            )
        for name, least in (("samples", 1), ("elbo_samples", 1), ("taylor_reference", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        for name in ("images", "taylor_images", "gradient_repeats"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.gradient_repeats == 1:
            raise ValueError("gradient_repeats=1 gives no variance: at least 2, or 0")


class Number(NamedTuple):
    """A result.

    Attributes:
        value: the number; a mean over images where there is a standard error.
        standard_error: spread over images / sqrt(N).
        monte_carlo_error: what repeating it on the same images would change it by.
    """

    value: float
    standard_error: float | None = None
    monte_carlo_error: float | None = None


class Evaluation(NamedTuple):
    """Results of a run.

    Attributes:
        run: its folder.
        verdict: what the numbers come to, in one line.
        conventions: everything that a number's meaning depends on.
        sections: title -> label -> number.
        kl_per_dimension: mean KL_i over images, in nats; empty without a density of x.
    """

    run: str
    verdict: str
    conventions: dict[str, Any]
    sections: dict[str, dict[str, Number]]
    kl_per_dimension: list[float]


def evaluate_trained(trained: Trained, settings: Settings) -> Evaluation:
    """Evaluate everything that needs no further network; progress goes to stderr.

    Under torchrun the processes share the images of what is per image, and all have the same
    numbers; the rest each process computes by itself.
    """
    reason = without_density(trained.config)
    if reason:
        return _without_density(trained, settings, reason)
    # What is known of diagonal covariances alone.
    diagonal = trained.log_var.dim() == 2
    # First, as it takes no time and refuses a decoder that cannot be linearised.
    covariance = _conditioning(trained) if diagonal else {}
    collapse = evaluate.posterior_collapse(trained.mean, trained.log_var, _EPSILON, _DELTA)
    log_ml = _log_ml(trained, settings)
    at_mean = over_images(
        trained, lambda part: evaluate.squared_error_at_mean(part.decoder, part.x, part.mean)
    )
    sections = {
        "Log-densities (nats)": _log_densities(trained, settings, log_ml),
        "Reconstruction and latent dimensions": {
            "squared error at the mean": _mean(at_mean),
            f"dimensions collapsed (KL < {_EPSILON:g} on {1 - _DELTA:.0%})": Number(
                collapse.collapsed
            ),
            "dimensions active": Number(collapse.active),
            "dimensions in all": Number(collapse.latent_dim),
        },
        f"Effective samples of {_ESS_SAMPLES}, median": _effective_samples(trained),
        **({"Covariance of the likelihood": covariance} if covariance else {}),
    }
    # The sampled error belongs beside the one at the mean.
    moved = ("squared error, sampled", "KL")
    densities = sections["Log-densities (nats)"]
    sections["Reconstruction and latent dimensions"] |= {k: densities.pop(k) for k in moved}
    if settings.gradient_repeats and diagonal:
        sections["Monte Carlo error against sampling-free bias"] = _gradient(trained, settings)
    taylor = _taylor(trained, settings) if settings.taylor_images and diagonal else None
    if taylor is not None:
        sections["Linearisation (paper, Table 1)"] = _taylor_numbers(taylor)
    return Evaluation(
        str(trained.folder),
        verdict.of_evaluation(
            mean_over_images(log_ml.estimate),
            unresolved(log_ml),
            len(trained.x),
            settings.weights,
            collapse,
            taylor,
            understated=understated(log_ml),
        ),
        conventions(trained, settings),
        sections,
        collapse.kl.tolist(),
    )


def _without_density(trained: Trained, settings: Settings, reason: str) -> Evaluation:
    """What is left: the error at the mean, and how many dimensions are in use."""
    at_mean = over_images(
        trained, lambda part: evaluate.squared_error_at_mean(part.decoder, part.x, part.mean)
    )
    collapse = evaluate.posterior_collapse(trained.mean, trained.log_var, _EPSILON, _DELTA)
    error = _mean(at_mean)
    numbers = {
        "squared error at the mean": error,
        "dimensions active": Number(collapse.active),
        "dimensions in all": Number(collapse.latent_dim),
    }
    return Evaluation(
        str(trained.folder),
        f"squared error {error.value:.2f} at the mean on {len(trained.x):,} test images; "
        f"{collapse.active} of {collapse.latent_dim} latent dimensions active; {reason}",
        conventions(trained, settings),
        {"Reconstruction and latent dimensions": numbers},
        [],
    )


def unresolved(log_ml: LogMarginalLikelihood) -> int:
    """Images whose log ML rests on too few weights."""
    # A NaN counts.
    return int((~(log_ml.effective_samples >= verdict.FEW_EFFECTIVE)).sum())


def understated(log_ml: LogMarginalLikelihood) -> int:
    """Images whose log ML has an error that is too small."""
    return int((~(log_ml.effective_samples >= verdict.ENOUGH_EFFECTIVE)).sum())


def conventions(trained: Trained, settings: Settings) -> dict[str, Any]:
    """What a number's meaning depends on, as JSON-able values."""
    config = trained.config
    shared = report.conventions(config, settings.samples, settings.proposal)
    if "not_judged" in shared:
        error = "summed over pixels, at the posterior mean"
        split = f"{len(trained.x):,} test images"
        return shared | {"squared_error": error, "split": split, "trained_steps": trained.step}
    if trained.log_var.dim() == 3:
        shared["not_judged"] = (
            "a posterior of full covariance: the likelihood's covariance, the Monte Carlo error "
            "and the linearisation are measured of diagonal ones"
        )
    return shared | {
        "sampled_elbo": f"{settings.elbo_samples} draws of q(z|x) per image",
        "squared_error": "summed over pixels; at the posterior mean, and sampled: both listed",
        "objective": f"sampling-free, kl_weight 1, likelihood {config.likelihood}, "
        f"gamma {config.gamma:g}",
        "split": f"{len(trained.x):,} test images",
        "collapse": f"epsilon={_EPSILON:g} nats, delta={_DELTA:g}, counted in integers",
        "linearisation": f"{settings.taylor_images} images, {settings.taylor_reference} reference "
        "draws, covariance error is the squared Frobenius norm, reference noise subtracted",
        "monte_carlo": f"one batch of {min(_GRADIENT_IMAGES, len(trained.x))} images, "
        f"{settings.gradient_repeats} repetitions; gradient of the negative ELBO in the "
        "weights of both networks",
        "trained_steps": trained.step,
    }


def _log_ml(trained: Trained, settings: Settings) -> LogMarginalLikelihood:
    with progress("log ML, decodes", len(trained.x) * settings.samples) as count:
        return over_images(
            trained,
            lambda part: evaluate.log_marginal_likelihood(
                *part.posterior,
                noise_var=part.config.noise_var,
                samples=settings.samples,
                proposal=settings.proposal,
                generator=part.generator(),
                first_image=part.first_image,
                progress=count,
            ),
        )


def _log_densities(
    trained: Trained, settings: Settings, log_ml: LogMarginalLikelihood
) -> dict[str, Number]:
    config = trained.config
    with progress("ELBO, decodes", len(trained.x) * settings.elbo_samples) as count:
        gap = over_images(
            trained,
            lambda part: evaluate.objective_gap(
                *part.posterior,
                noise_var=config.noise_var,
                gamma=config.gamma,
                likelihood=config.likelihood,
                samples=settings.elbo_samples,
                generator=part.generator(),
                first_image=part.first_image,
                progress=count,
            ),
        )
    kl = posterior_kl(trained.mean.double(), trained.log_var.double())
    constant = log_ml.constant
    error = (constant - gap.elbo - kl) * 2 * config.noise_var
    return {
        "log ML": _mean(log_ml.estimate, log_ml.standard_error),
        "log ML, without constant": _mean(log_ml.without_constant, log_ml.standard_error),
        "effective samples, median": Number(float(log_ml.effective_samples.median())),
        "effective samples, smallest": Number(float(log_ml.effective_samples.min())),
        f"images with fewer than {verdict.FEW_EFFECTIVE}": Number(unresolved(log_ml)),
        f"images with fewer than {verdict.ENOUGH_EFFECTIVE}, error too small": Number(
            understated(log_ml)
        ),
        "log ML, estimated bias": _mean(log_ml.bias),
        "sampled ELBO": _mean(gap.elbo, gap.standard_error),
        "sampled ELBO, without constant": _mean(gap.elbo - constant, gap.standard_error),
        "objective (not a bound)": _mean(gap.objective),
        "objective, without constant": _mean(gap.objective - constant),
        "objective - sampled ELBO": _mean(gap.gap, gap.standard_error),
        "squared error, sampled": _mean(error, gap.standard_error * 2 * config.noise_var),
        "KL": _mean(kl),
    }


def _effective_samples(trained: Trained) -> dict[str, Number]:
    def median(proposal: ProposalName) -> Number:
        found = over_images(
            trained,
            lambda part: evaluate.log_marginal_likelihood(
                *part.posterior,
                noise_var=part.config.noise_var,
                samples=_ESS_SAMPLES,
                proposal=proposal,
                generator=part.generator(),
                first_image=part.first_image,
            ),
        )
        return Number(float(found.effective_samples.median()))

    return {f"proposal {name}": median(name) for name in evaluate.PROPOSALS}


def _conditioning(trained: Trained) -> dict[str, Number]:
    found = over_images(
        trained,
        lambda part: evaluate.conditioning(
            part.decoder, part.mean, part.log_var, noise_var=part.config.noise_var
        ),
    )
    ratio = found.log10_ratio
    return {
        "log10(1 + lambda_max / c), median": Number(float(ratio.median())),
        "log10(1 + lambda_max / c), largest": Number(float(ratio.max())),
        "images lost before repair": Number(int(found.lost.sum())),
    }


def _gradient(trained: Trained, settings: Settings) -> dict[str, Number]:
    config, images = trained.config, min(_GRADIENT_IMAGES, len(trained.x))
    decodes = settings.gradient_repeats * sum(_GRADIENT_SAMPLES) * images
    with counter("Monte Carlo error, decodes", decodes, shown=distributed.rank() == 0) as count:
        found = evaluate.gradient_error(
            trained.decoder,
            *(t[:images] for t in (trained.x, trained.mean, trained.log_var)),
            noise_var=config.noise_var,
            gamma=config.gamma,
            likelihood=config.likelihood,
            samples=_GRADIENT_SAMPLES,
            repeats=settings.gradient_repeats,
            encoder=trained.encoder,
            generator=trained.generator(),
            progress=count,
        )
    spreads = zip(found.samples, found.loss_variance, found.gradient_variance, strict=True)
    numbers = {}
    for k, loss, gradient in spreads:
        numbers[f"sd of the loss, {k} samples (nats)"] = Number(math.sqrt(loss))
        numbers[f"sd of the gradient, {k} samples"] = Number(math.sqrt(gradient))
    numbers |= {
        "sampling-free loss - sampled loss (nats)": Number(found.loss_bias),
        "samples with an sd as large as the loss's bias": Number(found.equal_loss_samples),
    }
    for name, part in (("decoder", found.decoder), ("encoder", found.encoder)):
        relative = Number(part.relative_bias, monte_carlo_error=part.relative_bias_error)
        cosine = Number(part.cosine, monte_carlo_error=part.cosine_error)
        numbers |= {
            f"{name}: norm of the gradient's bias / of the true gradient": relative,
            f"{name}: cosine of the two gradients": cosine,
            f"{name}: samples with an sd as large as the bias": Number(part.equal_samples),
        }
    return numbers


def _taylor(trained: Trained, settings: Settings) -> TaylorQuality:
    images = slice(settings.taylor_images)
    counts = evaluate.PAPER_SAMPLES
    decodes = len(trained.mean[images]) * (settings.taylor_reference + sum(counts))
    with counter("linearisation, decodes", decodes, shown=distributed.rank() == 0) as count:
        return evaluate.taylor_quality(
            *(trained.decoder, trained.mean[images], trained.log_var[images]),
            samples=counts,
            reference_samples=settings.taylor_reference,
            generator=trained.generator(),
            progress=count,
        )


def _taylor_numbers(found: TaylorQuality) -> dict[str, Number]:
    columns = {"linearised": found.taylor}
    columns |= {f"{k} samples": agreement for k, agreement in found.sampling.items()}
    numbers = {}
    for name, agreement in columns.items():
        numbers[f"variance correlation, pooled, {name}"] = Number(agreement.pooled_correlation)
        if name == "linearised":
            numbers[f"variance correlation, per image, {name}"] = Number(
                agreement.per_image_correlation
            )
            numbers["images without a variance correlation"] = Number(agreement.uncorrelated_images)
            numbers["images left out, not finite"] = Number(found.broken_images)
            numbers["variance ratio, linearised / true"] = Number(agreement.variance_ratio)
        numbers[f"covariance error, {name}"] = Number(
            agreement.covariance_error, agreement.covariance_error_se
        )
    numbers["samples with the linearisation's covariance error"] = Number(found.equivalent_samples)
    return numbers


def _mean(values: Tensor, standard_error: Tensor | None = None) -> Number:
    mean = mean_over_images(values)
    return Number(*mean, None if standard_error is None else monte_carlo_error(standard_error))
