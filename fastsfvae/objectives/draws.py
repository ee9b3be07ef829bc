"""The Monte Carlo objectives' base: draws of the posterior, and what they decode to."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastsfvae import _checks
from fastsfvae._noise import Draws, check_draws, noise_like, standard_normal
from fastsfvae.likelihoods import posterior_kl, wide
from fastsfvae.objectives.noise_variance import NoiseVar, check_noise_var, log_normalizer
from fastsfvae.objectives.terms import Terms, make_terms

Decoder = Callable[[Tensor], Tensor]


class Drawn(NamedTuple):
    """Reparameterised z ~ q(z|x).

    Attributes:
        z: ``[K, B, m]``.
        log_ratio: log p(z) - log q(z|x), ``[K, B]``.
    """

    z: Tensor
    log_ratio: Tensor


class Decoded(NamedTuple):
    """log N(x; f(z), cI) in nats and |x - f(z)|^2, each ``[K, B]``."""

    log_likelihood: Tensor
    squared_error: Tensor


def draw(mean: Tensor, log_var: Tensor, noise: Tensor) -> Drawn:
    """The draws mean + std * noise, of noise ``[K, B, m]``; gradients are total derivatives.

    In place of log_var ``[B, m]`` there may be a factor L of the covariance, ``[B, m, m]``.
    """
    if log_var.dim() == 3:
        # The draw is no layer: autocast would leave eight bits of it.
        with torch.autocast(mean.device.type, enabled=False):
            z = mean + (log_var @ noise.unsqueeze(-1)).squeeze(-1)
        log_std = torch.linalg.slogdet(log_var).logabsdet
    else:
        z = mean + torch.exp(0.5 * log_var) * noise
        log_std = 0.5 * log_var.sum(-1)
    # The (2 pi)^(m/2) of the two densities cancel.
    return Drawn(z, 0.5 * (noise.square() - z.square()).sum(-1) + log_std)


def draw_path(mean: Tensor, log_var: Tensor, noise: Tensor) -> Drawn:
    """The same z as of `draw`, without the gradient of log q's score.

    The score's expectation is zero (Roeder, Wu & Duvenaud 2017).
    """
    return at_deviation(mean, log_var, deviate(mean, log_var, noise))


def deviate(mean: Tensor, log_var: Tensor, noise: Tensor) -> Tensor:
    """The deviation std * noise, ``[K, B, m]``, with the gradient of mean + std * noise."""
    # Exactly std * noise. As z - mean, a narrow posterior would lose its digits.
    return (mean - mean.detach()) + torch.exp(0.5 * log_var) * noise


def at_deviation(mean: Tensor, log_var: Tensor, deviation: Tensor) -> Drawn:
    """The draws mean + deviation; gradients reach the posterior through `deviation` alone."""
    z = mean.detach() + deviation
    whitened = deviation / torch.exp(0.5 * log_var.detach())
    return Drawn(z, 0.5 * (whitened.square() - z.square() + log_var.detach()).sum(-1))


def decode(decoder: Decoder, x: Tensor, z: Tensor, noise_var: NoiseVar) -> Decoded:
    """Decode all draws in one call.

    Raises:
        ValueError: where the decoder's output is not shaped like x.
    """
    output = decoder(z.flatten(0, 1)).unflatten(0, z.shape[:2])
    if output.shape[1:] != x.shape:
        raise ValueError(
            f"x has shape {tuple(x.shape)} but the decoder returns {tuple(output.shape[1:])}: "
            "they must match"
        )
    squared_error = (wide(output) - x).square().flatten(2).sum(-1)
    c, constant = log_normalizer(x[0].numel(), noise_var)
    return Decoded(-constant - squared_error / (2 * c), squared_error)


class MonteCarlo:
    """An objective on K draws of the posterior per image.

    Args:
        decoder: f, ``z [B, m] -> [B, *out]``.
        noise_var: c, variance of the observation noise in squared units of x: a number, or a
            `NoiseVariance` to be learned.
        samples: K.
        draws: "iid"; "antithetic", in pairs mean +- std * e; "orthogonal", in such pairs whose e
            are orthogonal, at most 2 m of them. Every draw alone is one of q(z|x): an average over
            them has the same expectation, and less variance.

    Raises:
        ValueError: for a setting out of range, when called for more orthogonal draws than 2 m.
    """

    _draw = staticmethod(draw)
    # Whether log_var may be a factor of the covariance.
    _full_covariance = False

    def __init__(
        self,
        decoder: Decoder,
        *,
        noise_var: NoiseVar = 0.5,
        samples: int = 1,
        draws: Draws = "iid",
    ) -> None:
        check_noise_var(noise_var)
        if samples < 1:
            raise ValueError(f"samples={samples} must be at least 1")
        check_draws(draws, samples)
        self.decoder = decoder
        self.noise_var = noise_var
        self.samples = samples
        self.draws = draws

    def __call__(
        self, x: Tensor, mean: Tensor, log_var: Tensor, *, generator: torch.Generator | None = None
    ) -> Terms:
        """Evaluate; see `Objective`.

        All but the objective are those of the ELBO, for logging: the likelihood and the error as
        means over the draws, the KL divergence in closed form.
        """
        return self.at_noise(x, mean, log_var, self.noise(mean, generator))

    def noise(self, mean: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The noise that a call draws, ``[K, B, m]``, for posteriors like this mean ``[B, m]``."""
        options = noise_like(mean, generator)
        return standard_normal((self.samples, *mean.shape), self.draws, **options)

    def at_noise(self, x: Tensor, mean: Tensor, log_var: Tensor, noise: Tensor) -> Terms:
        """Evaluate at given noise, as `noise` draws it."""
        _checks.latent(mean, log_var, factor=self._full_covariance)
        given = mean.dtype
        mean, log_var = wide(mean), wide(log_var)
        drawn = self._draw(mean, log_var, noise)
        z = drawn.z.to(given)
        log_likelihood, squared_error = decode(self.decoder, x, z, self.noise_var)
        kl = posterior_kl(mean, log_var)
        objective = self._objective(log_likelihood, drawn, kl, (mean, log_var))
        return make_terms(objective, log_likelihood.mean(0), kl, squared_error.mean(0))

    def _objective(
        self, log_likelihood: Tensor, drawn: Drawn, kl: Tensor, posterior: tuple[Tensor, Tensor]
    ) -> Tensor:
        """``[B]``, of the draws' log-likelihoods ``[K, B]``, the closed form ``[B]`` and q(z|x)."""
        raise NotImplementedError
