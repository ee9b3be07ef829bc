"""Log marginal likelihood, evidence lower bound and reconstruction errors, per image."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastsfvae import _checks
from fastsfvae._checks import Likelihood
from fastsfvae._noise import Draws
from fastsfvae.elbo import sampling_free_elbo
from fastsfvae.evaluate._decode import (
    Decoder,
    Progress,
    block_size,
    constant,
    passes,
    resolve_chunk_size,
)
from fastsfvae.evaluate._decode import squared_error as _squared_error
from fastsfvae.evaluate.proposals import (
    DEFAULT_PROPOSAL,
    PROPOSALS,
    ProposalName,
    make_proposal,
    posterior,
)
from fastsfvae.likelihoods import posterior_kl

# Images whose objective is evaluated together: their tangents are chunked further below.
_OBJECTIVE_IMAGES = 250


class LogMarginalLikelihood(NamedTuple):
    """Importance-sampled log p(x), ``[N]`` float64 each, unless said otherwise.

    Attributes:
        estimate: log-mean-exp of the weights, in nats; biased low, less so with more samples. A
            draw that decodes to infinity has weight 0; -inf where all weights are 0, NaN where a
            draw decodes to NaN.
        standard_error: sd(w) / (sqrt(K) mean(w)), the Monte Carlo error; NaN for one sample, and
            where all weights are 0.
        effective_samples: (sum w)^2 / sum w^2, between 1 and K, or 0 where all weights are 0. Trust
            the estimate only where this is well above 1, and its error from some 30 on: below, the
            error is too small, as the largest weights are missing.
        constant: -(n/2) log(2 pi c), 0-d, in nats; part of `estimate`.
        bias: -(1/ESS - 1/K) / 2 with ESS = `effective_samples`, in nats: by how much `estimate`
            lies below log p(x) on average, to second order in the weights' spread. It means
            something only where ESS is well above 1; NaN where `standard_error` is.
    """

    estimate: Tensor
    standard_error: Tensor
    effective_samples: Tensor
    constant: Tensor
    bias: Tensor

    @property
    def without_constant(self) -> Tensor:
        """`estimate` without -(n/2) log(2 pi c), ``[N]``."""
        return self.estimate - self.constant


class SampledElbo(NamedTuple):
    """Monte Carlo ELBO, ``[N]`` float64 each, unless said otherwise.

    Attributes:
        elbo: log_likelihood - kl, in nats; -inf where a draw decodes to infinity.
        standard_error: Monte Carlo error of `elbo`, from the independent draws, or blocks of
            dependent ones; NaN where there is one only, or an `elbo` of -inf.
        log_likelihood: E_q[log N(x; f(z), cI)].
        kl: KL(q(z|x) || N(0, I)), closed form.
        squared_error: E_q|x - f(z)|^2, the sampled reconstruction error.
        constant: -(n/2) log(2 pi c), 0-d, in nats; part of `elbo` and `log_likelihood`.
    """

    elbo: Tensor
    standard_error: Tensor
    log_likelihood: Tensor
    kl: Tensor
    squared_error: Tensor
    constant: Tensor


class ObjectiveGap(NamedTuple):
    """By how much the sampling-free objective lies above the ELBO, ``[N]`` float64 each, in nats.

    Attributes:
        objective: the sampling-free objective, kl_weight 1. Not a bound of log p(x).
        elbo: the sampled ELBO.
        gap: objective - elbo; NaN where both are infinite.
        standard_error: Monte Carlo error of `elbo` and of `gap`, as in `SampledElbo`.
    """

    objective: Tensor
    elbo: Tensor
    gap: Tensor
    standard_error: Tensor


@torch.no_grad()
def log_marginal_likelihood(
    decoder: Decoder,
    x: Tensor,
    mean: Tensor,
    log_var: Tensor,
    *,
    noise_var: float | Tensor,
    samples: int = 50_000,
    proposal: ProposalName = DEFAULT_PROPOSAL,
    generator: torch.Generator | None = None,
    first_image: int = 0,
    chunk_size: int | None = None,
    progress: Progress | None = None,
) -> LogMarginalLikelihood:
    """Estimate log p(x) per image with K = `samples` importance weights p(x|z) p(z) / q(z).

    The weights are folded into running sums, so memory does not grow with K. An image's draws are a
    function of `generator`, K and its number alone: `chunk_size` and the other images change
    results by rounding only.

    Args:
        decoder: f, called with at most `chunk_size` latents.
        x: ``[N, *out]``, floating point.
        mean: ``[N, m]``.
        log_var: ``[N, m]``; or a factor of a full covariance, ``[N, m, m]``.
        noise_var: c, in squared units of x.
        samples: K.
        proposal: the density that z is drawn from: "posterior", i.e. q(z|x); "linearized", the
            exact posterior of the decoder linearised at `mean`; "defensive", a mixture of a tenth
            of the first, a twentieth of the prior, and the second; "laplace", the same with the
            Gaussian at the mode of p(z|x), found from `mean`, as its last part. The prior is there
            for modes that the others do not know. "linearized" and "defensive" differentiate the
            decoder once an image, "laplace" up to twelve times. An image where f or J are not
            finite there is drawn from q(z|x) in place of the Gaussian. "posterior" needs no
            Jacobian.
        generator: source of the noise, on x's device; one number is drawn from it.
        first_image: number of x's first image, where x is a part of the images: the parts of a
            split, evaluated with generators in the same state, give the numbers of the whole.
        chunk_size: latents decoded at one time; None keeps their outputs near 4 MiB.
        progress: called with the number of latents decoded since its last call.

    Raises:
        TypeError, ValueError: for inputs that do not fit, in one line.
        TypeError, ValueError, RuntimeError: for a decoder that has no Jacobian where the proposal
            needs it, in one line.
    """
    _checks.choice("proposal", proposal, PROPOSALS)
    _checks.tensors(x=x, mean=mean, log_var=log_var)
    peak = torch.full((len(x),), -torch.inf, dtype=torch.float64, device=x.device)
    total, total_square = torch.zeros_like(peak), torch.zeros_like(peak)
    for images, log_prior_ratio, squared_error in passes(
        *(decoder, x, mean, log_var),
        lambda x, mean, log_var: make_proposal(proposal, decoder, x, mean, log_var, noise_var),
        samples=samples,
        noise_var=noise_var,
        generator=generator,
        chunk_size=chunk_size,
        progress=progress,
        first_image=first_image,
        linearises=proposal != "posterior",
    ):
        log_weight = log_prior_ratio - squared_error / (2 * noise_var)
        new_peak = torch.maximum(peak[images], log_weight.amax(1))
        # A streaming log-sum-exp: earlier sums are rescaled to the new maximum. Where all weights
        # are 0 so far, there is none to measure them by.
        unit = new_peak.masked_fill(new_peak == -torch.inf, 0)
        rescale = torch.exp(peak[images] - unit)
        weight = torch.exp(log_weight - unit.unsqueeze(1))
        total[images] = total[images] * rescale + weight.sum(1)
        total_square[images] = total_square[images] * rescale.square() + weight.square().sum(1)
        peak[images] = new_peak
    effective = (total.square() / total_square).masked_fill(total == 0, 0)
    offset = constant(x, noise_var)
    estimate = peak + total.log() - math.log(samples) + offset
    # sd(w) / (sqrt(K) mean(w)) with the (K - 1) variance; K/ESS - 1 is clamped against rounding.
    excess = (samples / effective - 1).clamp_min(0)
    error = (excess / (samples - 1)).sqrt() if samples > 1 else excess * math.nan
    unknown = error.isnan() | (total == 0)
    error = error.masked_fill(unknown, math.nan)
    bias = (-0.5 * excess / samples).masked_fill(unknown, math.nan)
    return LogMarginalLikelihood(estimate, error, effective, offset, bias)


@torch.no_grad()
def sampled_elbo(
    decoder: Decoder,
    x: Tensor,
    mean: Tensor,
    log_var: Tensor,
    *,
    noise_var: float | Tensor,
    samples: int = 1,
    draws: Draws = "iid",
    generator: torch.Generator | None = None,
    first_image: int = 0,
    chunk_size: int | None = None,
    progress: Progress | None = None,
) -> SampledElbo:
    """Estimate the ELBO per image from K = `samples` draws of q(z|x); the KL is in closed form.

    Args:
        decoder: as in `log_marginal_likelihood`, like all that are not listed.
        x: ``[N, *out]``.
        mean: ``[N, m]``.
        log_var: ``[N, m]``, or a factor.
        noise_var: c.
        samples: K.
        draws: "iid"; "antithetic", in pairs mean +- e, K even; "orthogonal", in blocks of such
            pairs whose directions are orthogonal in units of the standard deviations: K even and at
            most 2 m, which is one block, or a multiple of 2 m. None changes the expectation.
        generator: source of the noise, on x's device.
        first_image: number of x's first image.
        chunk_size: latents decoded at one time.
        progress: called with the number of latents decoded since its last call.

    Raises:
        TypeError, ValueError: as `log_marginal_likelihood`, and for a K that `draws` cannot have.
    """
    _checks.tensors(x=x, mean=mean, log_var=log_var)
    _checks.latent(mean, log_var, factor=True)
    block = block_size(draws, samples, mean.shape[1])
    total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    total_square = torch.zeros_like(total)
    for images, _, squared_error in passes(
        *(decoder, x, mean, log_var),
        lambda _, mean, log_var: posterior(mean, log_var),
        samples=samples,
        noise_var=noise_var,
        generator=generator,
        chunk_size=chunk_size,
        progress=progress,
        first_image=first_image,
        draws=draws,
        block=block,
    ):
        of_blocks = squared_error.unflatten(1, (-1, block)).mean(2)
        total[images] += of_blocks.sum(1)
        total_square[images] += of_blocks.square().sum(1)
    # Blocks are independent, the draws within one are not.
    blocks = samples // block
    error = total / blocks
    variance = (total_square / blocks - error.square()).clamp_min(0)
    spread = (variance / (blocks - 1)).sqrt() if blocks > 1 else total * math.nan
    kl = posterior_kl(mean.double(), log_var.double())
    offset = constant(x, noise_var)
    log_likelihood = offset - error / (2 * noise_var)
    elbo = log_likelihood - kl
    return SampledElbo(elbo, spread / (2 * noise_var), log_likelihood, kl, error, offset)


@torch.no_grad()
def objective_gap(
    decoder: Decoder,
    x: Tensor,
    mean: Tensor,
    log_var: Tensor,
    *,
    noise_var: float | Tensor,
    gamma: float | Tensor = 0.5,
    likelihood: Likelihood = "precision",
    samples: int = 1,
    generator: torch.Generator | None = None,
    first_image: int = 0,
    chunk_size: int | None = None,
    progress: Progress | None = None,
) -> ObjectiveGap:
    """Compare the sampling-free objective with the ELBO, image by image.

    Args:
        decoder: as in `log_marginal_likelihood`, like all that are not listed.
        x: ``[N, *out]``.
        mean: ``[N, m]``.
        log_var: ``[N, m]``, or a factor.
        noise_var: c.
        gamma: the objective's, as in `sampling_free_elbo`.
        likelihood: the objective's reading, as in `sampling_free_elbo`.
        samples: draws of q(z|x) per image for the ELBO.
        generator: source of the noise.
        first_image: number of x's first image.
        chunk_size: latents decoded at one time.
        progress: as in `log_marginal_likelihood`.

    Raises:
        TypeError, ValueError, RuntimeError: as `sampling_free_elbo`, in one line.
    """
    _checks.tensors(x=x, mean=mean, log_var=log_var)
    chunks = zip(*(t.split(_OBJECTIVE_IMAGES) for t in (x, mean, log_var)), strict=True)
    parts = [
        sampling_free_elbo(
            decoder, *chunk, noise_var=noise_var, gamma=gamma, likelihood=likelihood
        ).elbo
        for chunk in chunks
    ]
    objective = torch.cat(parts).double()
    sampled = sampled_elbo(
        *(decoder, x, mean, log_var),
        noise_var=noise_var,
        samples=samples,
        generator=generator,
        first_image=first_image,
        chunk_size=chunk_size,
        progress=progress,
    )
    return ObjectiveGap(objective, sampled.elbo, objective - sampled.elbo, sampled.standard_error)


@torch.no_grad()
def squared_error_at_mean(
    decoder: Decoder, x: Tensor, mean: Tensor, *, chunk_size: int | None = None
) -> Tensor:
    """|x - f(mean)|^2 per image, ``[N]`` float64. `sampled_elbo` has the sampled counterpart.

    Args, raises: as `log_marginal_likelihood`.
    """
    _checks.tensors(x=x, mean=mean)
    _checks.batch(x, mean)
    rows = resolve_chunk_size(x, chunk_size)
    chunks = zip(x.split(rows), mean.split(rows), strict=True)
    errors = [_squared_error(decoder, part, z.unsqueeze(1)).squeeze(1) for part, z in chunks]
    return torch.cat(errors)
