"""Statistics of a trained VAE that any pair of callables can be judged by.

Everything here takes a decoder ``z [B, m] -> [B, *out]``, data ``x [N, *out]`` and its posterior
N(mean, diag(exp(log_var))), both ``[N, m]``. The model is z ~ N(0, I), x | z ~ N(f(z), cI) with
c = noise_var; log-densities hold the constant -(n/2) log(2 pi c). Nothing is differentiated.

Results are per image. Two uncertainties must be kept apart: a `standard_error` field is the Monte
Carlo error of one image's estimate, and `mean_over_images` adds the spread over images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from fastsfvae import _checks
from fastsfvae.elbo import gaussian_kl

Decoder = Callable[[Tensor], Tensor]

# Output elements decoded at one time unless the caller says otherwise: 16 MiB of float32.
_CHUNK_ELEMENTS = 2**22
_ACTIVE_VARIANCE = 0.01


class LogMarginalLikelihood(NamedTuple):
    """Importance-sampled log p(x), each ``[N]``, float64.

    Attributes:
        estimate: log-mean-exp of the weights, in nats; biased low, less so with more samples.
        standard_error: sd(w) / (sqrt(K) mean(w)), the Monte Carlo error; NaN for one sample.
        effective_samples: (sum w)^2 / sum w^2, between 1 and K. Trust the estimate and its error
            only where this is well above 1.
    """

    estimate: Tensor
    standard_error: Tensor
    effective_samples: Tensor


class SampledElbo(NamedTuple):
    """Monte Carlo ELBO, each ``[N]``, float64.

    Attributes:
        elbo: log_likelihood - kl, in nats.
        standard_error: Monte Carlo error of `elbo`; NaN for one sample.
        log_likelihood: E_q[log N(x; f(z), cI)].
        kl: KL(q(z|x) || N(0, I)), closed form.
        squared_error: E_q|x - f(z)|^2, the sampled reconstruction error.
    """

    elbo: Tensor
    standard_error: Tensor
    log_likelihood: Tensor
    kl: Tensor
    squared_error: Tensor


class PosteriorCollapse(NamedTuple):
    """How many latent dimensions carry information.

    Attributes:
        collapsed: dimensions in which at most floor(delta N) images have KL_i >= epsilon.
        active: dimensions with Var_x(E_q[z_i]) > 0.01 (population variance).
        latent_dim: m.
        informative_images: ``[m]`` int64, images with KL_i >= epsilon.
        kl: ``[m]``, mean KL_i over images, in nats.
    """

    collapsed: int
    active: int
    latent_dim: int
    informative_images: Tensor
    kl: Tensor


class ImageMean(NamedTuple):
    """A mean over images and its standard error (spread over images), as Python floats."""

    mean: float
    standard_error: float


def mean_over_images(values: Tensor) -> ImageMean:
    """Average per-image values ``[N]``; the error is sd / sqrt(N), NaN for one image."""
    values = values.double()
    error = values.std() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return ImageMean(float(values.mean()), float(error))


@torch.no_grad()
def log_marginal_likelihood(
    decoder: Decoder,
    x: Tensor,
    mean: Tensor,
    log_var: Tensor,
    *,
    samples: int,
    noise_var: float | Tensor,
    proposal: str = "posterior",
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
) -> LogMarginalLikelihood:
    """Estimate log p(x) per image with K = `samples` importance weights p(x|z) p(z) / q(z).

    The weights are folded into running sums, so memory does not grow with K.

    Args:
        decoder: f, called with at most `chunk_size` latents.
        x: ``[N, *out]``, floating point.
        mean: ``[N, m]``.
        log_var: ``[N, m]``.
        samples: K.
        noise_var: c, in squared units of x.
        proposal: the density that z is drawn from: "posterior", i.e. q(z|x).
        generator: source of the noise, on x's device.
        chunk_size: decoder outputs held at one time; None keeps them near 16 MiB.

    Raises:
        TypeError, ValueError: for inputs that do not fit, in one line.
    """
    _checks.choice("proposal", proposal, tuple(_PROPOSALS))
    draw = _PROPOSALS[proposal]
    peak = torch.full((len(x),), -torch.inf, dtype=torch.float64, device=x.device)
    total, total_square = torch.zeros_like(peak), torch.zeros_like(peak)
    for images, log_prior_ratio, squared_error in _draws(
        decoder, x, mean, log_var, draw, samples, noise_var, generator, chunk_size
    ):
        log_weight = log_prior_ratio - squared_error / (2 * noise_var)
        new_peak = torch.maximum(peak[images], log_weight.amax(0))
        # A streaming log-sum-exp: earlier sums are rescaled to the new maximum.
        rescale = torch.exp(peak[images] - new_peak)
        weight = torch.exp(log_weight - new_peak)
        total[images] = total[images] * rescale + weight.sum(0)
        total_square[images] = total_square[images] * rescale.square() + weight.square().sum(0)
        peak[images] = new_peak
    effective = total.square() / total_square
    estimate = peak + total.log() - math.log(samples) - _constant(x, noise_var)
    # sd(w) / (sqrt(K) mean(w)) with the (K - 1) variance; K/ESS - 1 is clamped against rounding.
    excess = (samples / effective - 1).clamp_min(0)
    error = (excess / (samples - 1)).sqrt() if samples > 1 else excess * math.nan
    return LogMarginalLikelihood(estimate, error, effective)


@torch.no_grad()
def sampled_elbo(
    decoder: Decoder,
    x: Tensor,
    mean: Tensor,
    log_var: Tensor,
    *,
    noise_var: float | Tensor,
    samples: int = 1,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
) -> SampledElbo:
    """Estimate the ELBO per image from `samples` draws of q(z|x); the KL is in closed form.

    Args, raises: as `log_marginal_likelihood`.
    """
    total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    total_square = torch.zeros_like(total)
    for images, _, squared_error in _draws(
        decoder, x, mean, log_var, _draw_posterior, samples, noise_var, generator, chunk_size
    ):
        total[images] += squared_error.sum(0)
        total_square[images] += squared_error.square().sum(0)
    error = total / samples
    variance = (total_square / samples - error.square()).clamp_min(0)
    spread = (variance / (samples - 1)).sqrt() if samples > 1 else total * math.nan
    kl = gaussian_kl(mean.double(), log_var.double())
    log_likelihood = -_constant(x, noise_var) - error / (2 * noise_var)
    return SampledElbo(log_likelihood - kl, spread / (2 * noise_var), log_likelihood, kl, error)


@torch.no_grad()
def squared_error_at_mean(
    decoder: Decoder, x: Tensor, mean: Tensor, *, chunk_size: int | None = None
) -> Tensor:
    """|x - f(mean)|^2 per image, ``[N]`` float64. `sampled_elbo` has the sampled counterpart.

    Args, raises: as `log_marginal_likelihood`.
    """
    _checks.batch(x, mean)
    rows = _chunk_size(x, chunk_size)
    return torch.cat(
        [
            _squared_error(decoder, x[start : start + rows], mean[None, start : start + rows])[0]
            for start in range(0, len(x), rows)
        ]
    )


@torch.no_grad()
def posterior_collapse(
    mean: Tensor, log_var: Tensor, epsilon: float = 0.05, delta: float = 0.01
) -> PosteriorCollapse:
    """Count (epsilon, delta)-collapsed latent dimensions, in integers (paper, 4.4).

    Args:
        mean: ``[N, m]``.
        log_var: ``[N, m]``.
        epsilon: nats below which an image's KL_i counts as collapsed.
        delta: fraction of images that may exceed epsilon, in [0, 1].

    Raises:
        TypeError, ValueError: for inputs that do not fit, in one line.
    """
    _checks.latent(mean, log_var)
    if not epsilon > 0:
        raise ValueError(f"epsilon={epsilon!r} must be positive (nats)")
    if not 0 <= delta <= 1:
        raise ValueError(f"delta={delta!r} must lie in [0, 1]")
    kl = gaussian_kl(mean.double().reshape(-1, 1), log_var.double().reshape(-1, 1))
    kl = kl.reshape(mean.shape)
    # Written so that a NaN counts as informative: a broken dimension is not a collapsed one.
    informative = (~(kl < epsilon)).sum(0)
    # Exact decimal arithmetic: floor(0.29 * 100) is 28 in floating point.
    allowed = math.floor(Fraction(str(delta)) * len(mean))
    variance = mean.double().var(0, correction=0)
    return PosteriorCollapse(
        collapsed=int((informative <= allowed).sum()),
        active=int((variance > _ACTIVE_VARIANCE).sum()),
        latent_dim=mean.shape[1],
        informative_images=informative,
        kl=kl.mean(0),
    )


def _draw_posterior(
    mean: Tensor, log_var: Tensor, samples: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Draw z ``[K, B, m]`` from q(z|x); return it and log p(z) - log q(z|x), ``[K, B]``."""
    noise = torch.randn(
        (samples, *mean.shape), generator=generator, device=mean.device, dtype=mean.dtype
    )
    z = mean + torch.exp(0.5 * log_var) * noise
    # The (2 pi)^(m/2) of the two densities cancel.
    log_ratio = 0.5 * (noise.double().square() - z.double().square() + log_var.double()).sum(-1)
    return z, log_ratio


_PROPOSALS = {"posterior": _draw_posterior}


def _draws(
    decoder: Decoder,
    x: Tensor,
    mean: Tensor,
    log_var: Tensor,
    draw: Callable[..., tuple[Tensor, Tensor]],
    samples: int,
    noise_var: float | Tensor,
    generator: torch.Generator | None,
    chunk_size: int | None,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield (images, log p(z) - log q(z), |x - f(z)|^2), float64 ``[k, b]`` each."""
    _checks.latent(mean, log_var)
    _checks.batch(x, mean)
    _checks.noise_var(noise_var)
    if samples < 1:
        raise ValueError(f"samples={samples} must be at least 1")
    rows = _chunk_size(x, chunk_size)
    images_at_once = min(len(x), rows)
    samples_at_once = max(1, rows // images_at_once)
    for start in range(0, len(x), images_at_once):
        images = slice(start, start + images_at_once)
        for done in range(0, samples, samples_at_once):
            count = min(samples_at_once, samples - done)
            z, log_ratio = draw(mean[images], log_var[images], count, generator)
            yield images, log_ratio, _squared_error(decoder, x[images], z)


def _chunk_size(x: Tensor, chunk_size: int | None) -> int:
    if chunk_size is None:
        return max(1, _CHUNK_ELEMENTS // max(1, x[0].numel()))
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1")
    return chunk_size


def _squared_error(decoder: Decoder, x: Tensor, z: Tensor) -> Tensor:
    """|x - f(z)|^2 of x ``[b, *out]`` and z ``[k, b, m]``: ``[k, b]``, float64."""
    output = decoder(z.flatten(0, 1))
    if not isinstance(output, Tensor) or output.shape != (z.shape[0] * z.shape[1], *x.shape[1:]):
        given = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"the decoder returned {given} for {z.shape[0] * z.shape[1]} latents, but x is "
            f"{tuple(x.shape)}: it must map z [B, m] to [B, {', '.join(map(str, x.shape[1:]))}]"
        )
    difference = output.unflatten(0, z.shape[:2]) - x
    return difference.square_().flatten(2).sum(-1).double()


def _constant(x: Tensor, noise_var: float | Tensor) -> float | Tensor:
    """(n/2) log(2 pi c), which every log-density of this model holds with a minus sign."""
    n = x[0].numel()
    if isinstance(noise_var, Tensor):
        return 0.5 * n * torch.log(2 * math.pi * noise_var.double())
    return 0.5 * n * math.log(2 * math.pi * noise_var)
