"""How cells are evaluated: each a frozen dataclass of its settings, called with a trained run."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsfvae import evaluate
from fastsfvae.data.pixels import to_unit
from fastsfvae.evaluate.proposals import ProposalName
from fastsfvae.results.report import objective_values
from fastsfvae.results.samples import encode
from fastsfvae.results.verdict import ENOUGH_EFFECTIVE
from fastsfvae.training.run import Run, evaluation_generator

_BATCH = 250
PIXELS = {"pixels": "[0, 1]"}
OWN_OBJECTIVE = "NLL, by its own objective"
# Of `Likelihoods`, what a table for people shows beside "NLL" or "log ML".
LIKELIHOOD_COLUMNS = (
    "NLL, Monte Carlo error",
    "median effective samples",
    "smallest effective samples",
    "bias of log ML",
    "sampled ELBO",
    "error at the mean",
    "error, sampled",
    "KL",
)


def images_of(run: Run, split: str, count: int = 0) -> Tensor:
    """The first `count` images of a split (0: all), ``[N, C, H, W]`` in [0, 1] on the device."""
    images = run.config.load_images(split)
    return to_unit(images[: count or None].to(run.device))


@dataclass(frozen=True)
class Collapse:
    """Table 4: collapse, both reconstruction errors and KL on the training images.

    Attributes:
        samples: draws of q(z|x) per image for the sampled error.
    """

    samples: int = 10

    @property
    def conventions(self) -> dict[str, str]:
        """See `Measure`."""
        return PIXELS | {
            "collapse": "epsilon = 0.05 nats, delta = 0.01, percent of the latent dimensions",
            "images": "the training images",
            "error at the mean": "|x - f(mean)|^2, summed over pixels, averaged over images",
            "error, sampled": f"the same at z ~ q(z|x), {self.samples} draws per image",
            "/ c": "the same over the noise variance c",
            "KL": "KL(q(z|x) || N(0, I)) in nats, summed over dimensions, averaged over images",
        }

    @torch.no_grad()
    def __call__(self, run: Run) -> dict[str, float]:
        """See `Measure`."""
        x, c = images_of(run, "train"), run.noise_var
        mean, log_var = encode(run.encoder, x)
        collapse = evaluate.posterior_collapse(mean, log_var)
        sampled = evaluate.sampled_elbo(
            *(run.decoder, x, mean, log_var),
            noise_var=c,
            samples=self.samples,
            generator=evaluation_generator(run.config, run.device),
        )
        at_mean = float(evaluate.squared_error_at_mean(run.decoder, x, mean).mean())
        drawn = float(sampled.squared_error.mean())
        return {
            "collapse %": 100 * collapse.collapsed / collapse.latent_dim,
            "error at the mean": at_mean,
            "error, sampled": drawn,
            "error at the mean / c": at_mean / c,
            "error, sampled / c": drawn / c,
            "KL": float(sampled.kl.mean()),
        }


@dataclass(frozen=True)
class Likelihoods:
    """Log marginal likelihood, sampled ELBO, errors and KL on held-out images.

    Attributes:
        samples: K, importance weights per image.
        proposal: of the importance weights.
        images: the first so many test images; 0 takes all.
    """

    samples: int
    proposal: ProposalName = "defensive"
    images: int = 0

    @property
    def conventions(self) -> dict[str, str]:
        """See `Measure`."""
        return PIXELS | {
            "images": f"the first {self.images:,} test images"
            if self.images
            else "all test images",
            "log ML": f"{self.samples:,} importance weights per image, proposal {self.proposal}; "
            "holds -(n/2) log(2 pi c)",
            "NLL": "-log ML without that constant",
            "effective samples": f"of {self.samples:,}; an image's error is too small below "
            f"{ENOUGH_EFFECTIVE}",
            "bias of log ML": "-(1/ESS - 1/K) / 2, estimated, averaged over images; in nats",
            "sampled ELBO": "10 draws of q(z|x) per image; holds the constant",
            "KL": "KL(q(z|x) || N(0, I)) in nats",
        }

    @torch.no_grad()
    def __call__(self, run: Run) -> dict[str, float]:
        """See `Measure`."""
        x = images_of(run, "test", self.images)
        mean, log_var = encode(run.encoder, x)
        generator = evaluation_generator(run.config, run.device)
        c = run.noise_var
        log_ml = evaluate.log_marginal_likelihood(
            *(run.decoder, x, mean, log_var),
            samples=self.samples,
            proposal=self.proposal,
            noise_var=c,
            generator=generator,
        )
        elbo = evaluate.sampled_elbo(
            *(run.decoder, x, mean, log_var), samples=10, noise_var=c, generator=generator
        )
        return {
            "NLL": -float(log_ml.without_constant.mean()),
            "NLL, Monte Carlo error": evaluate.monte_carlo_error(log_ml.standard_error),
            "median effective samples": float(log_ml.effective_samples.median()),
            "smallest effective samples": float(log_ml.effective_samples.min()),
            "bias of log ML": float(log_ml.bias.mean()),
            "log ML": float(log_ml.estimate.mean()),
            "sampled ELBO": float(elbo.elbo.mean()),
            "error at the mean": float(evaluate.squared_error_at_mean(run.decoder, x, mean).mean()),
            "error, sampled": float(elbo.squared_error.mean()),
            "KL": float(elbo.kl.mean()),
        }


@dataclass(frozen=True)
class LikelihoodsAndObjective(Likelihoods):
    """`Likelihoods`, and the value of what the method maximises, which may be no bound."""

    @property
    def conventions(self) -> dict[str, str]:
        """See `Measure`."""
        own = {
            OWN_OBJECTIVE: "-1 times what the method maximises, at its gamma or its K, without "
            "-(n/2) log(2 pi c); no bound of the NLL where the method is sampling-free"
        }
        return super().conventions | own

    @torch.no_grad()
    def __call__(self, run: Run) -> dict[str, float]:
        """See `Measure`."""
        x = images_of(run, "test", self.images)
        generator = evaluation_generator(run.config, run.device)
        value = objective_values(run.objective, x, *encode(run.encoder, x), generator).double()
        constant = -0.5 * x[0].numel() * math.log(2 * math.pi * run.noise_var)
        return super().__call__(run) | {OWN_OBJECTIVE: float(constant - value.mean())}


@dataclass(frozen=True)
class ObjectiveGap:
    """The sampling-free objective beside the sampled ELBO, on the first test images.

    Attributes:
        images: how many.
        samples: draws of q(z|x) per image.
    """

    images: int = 250
    samples: int = 4

    @property
    def conventions(self) -> dict[str, str]:
        """See `Measure`."""
        return PIXELS | {
            "images": f"the first {self.images:,} test images",
            "objective": "sampling-free, at gamma of that step; holds -(n/2) log(2 pi c); "
            "not a bound",
            "sampled ELBO": f"{self.samples} draws of q(z|x) per image; holds the constant",
            "gap": "objective - sampled ELBO",
        }

    @torch.no_grad()
    def __call__(self, run: Run) -> dict[str, float]:
        """See `Measure`."""
        config = run.config
        x = images_of(run, "test", self.images)
        mean, log_var = encode(run.encoder, x)
        # What the last step was trained with.
        gamma = config.schedules["gamma"].at(run.step - 1)
        gap = evaluate.objective_gap(
            *(run.decoder, x, mean, log_var),
            noise_var=run.noise_var,
            gamma=gamma,
            likelihood=config.likelihood,
            samples=self.samples,
            generator=evaluation_generator(config, run.device),
        )
        return {
            "gamma": gamma,
            "objective": float(gap.objective.mean()),
            "sampled ELBO": float(gap.elbo.mean()),
            "gap": float(gap.gap.mean()),
        }


@dataclass(frozen=True)
class Covariances:
    """Table 1: the linearised decoder's covariances against those of samples.

    Attributes:
        images: the first so many test images.
        covariance: whether whole covariances are compared, which takes 8 n^2 bytes.
        reference_samples: draws that stand for the truth.
    """

    images: int = 100
    covariance: bool = True
    reference_samples: int = 15_000

    @property
    def conventions(self) -> dict[str, str]:
        """See `Measure`."""
        return PIXELS | {
            "images": f"the first {self.images:,} test images, each at its posterior",
            "truth": f"{self.reference_samples:,} draws an image, apart from those judged",
            "variance correlation": "Pearson's over all pixels of all images, without observation "
            "noise",
            "covariance error": "squared Frobenius norm, (K - 1) covariance, averaged over images, "
            "the truth's own noise subtracted",
            "variance ratio": "total estimated over total true variance",
            "equivalent samples": "the K whose covariance error is the Taylor expansion's",
        }

    @torch.no_grad()
    def __call__(self, run: Run) -> dict[str, float]:
        """See `Measure`."""
        mean, log_var = encode(run.encoder, images_of(run, "test", self.images))
        quality = evaluate.taylor_quality(
            run.decoder,
            mean,
            log_var,
            covariance=self.covariance,
            reference_samples=self.reference_samples,
            generator=evaluation_generator(run.config, run.device),
        )
        columns = {"Taylor": quality.taylor}
        columns |= {f"K={count}": agreement for count, agreement in quality.sampling.items()}
        numbers = {}
        for name, agreement in columns.items():
            numbers[f"{name}, variance correlation"] = agreement.pooled_correlation
            if self.covariance:
                numbers[f"{name}, covariance error"] = agreement.covariance_error
        numbers["Taylor, variance correlation within images"] = quality.taylor.per_image_correlation
        numbers["Taylor, variance ratio"] = quality.taylor.variance_ratio
        if self.covariance:
            numbers["equivalent samples"] = quality.equivalent_samples
        return numbers


@dataclass(frozen=True)
class Quality:
    """Tables 2 and 5, Figures 4 and C.1: log ML and FID.

    Attributes:
        likelihoods: the former.
        inception: path of Inception's weights; "" leaves the FID out.
        images: generated images, and at most so many test images.
    """

    likelihoods: Likelihoods
    inception: str = ""
    images: int = 10_000

    @property
    def conventions(self) -> dict[str, str]:
        """See `Measure`."""
        fid = (
            f"{self.images:,} images f(z), z ~ N(0, I), no observation noise, clamped to [0, 1]; "
            "against as many test images"
            if self.inception
            else "left out: --inception names no weights"
        )
        return self.likelihoods.conventions | {"FID": fid}

    @torch.no_grad()
    def __call__(self, run: Run) -> dict[str, float]:
        """See `Measure`."""
        numbers = self.likelihoods(run)
        if not self.inception:
            return numbers
        generator = evaluation_generator(run.config, run.device)
        shape = (self.images, run.config.latent_dim)
        z = torch.randn(shape, generator=generator, device=run.device)
        extractor = evaluate.Inception(self.inception).to(run.device)
        distance = evaluate.frechet_distance(
            images_of(run, "test", self.images).split(_BATCH),
            (run.decoder(part) for part in z.split(_BATCH)),
            extractor,
        )
        return numbers | {"FID": distance.fid}
