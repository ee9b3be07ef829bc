"""The importance-weighted auto-encoder's bound."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastsfvae.loss import gaussian_kl
from fastsfvae.objectives.draws import Decoded, Decoder, check_settings, decode, draw
from fastsfvae.objectives.terms import Terms, make_terms


class ImportanceWeighted:
    """log 1/K sum_k p(x|z_k) p(z_k) / q(z_k|x) (Burda, Grosse & Salakhutdinov 2016).

    A lower bound of log p(x) in expectation that tightens with K; K = 1 is the ELBO with a sampled
    KL divergence.

    Args:
        decoder: f, ``z [B, m] -> [B, *out]``.
        noise_var: c, variance of the observation noise in squared units of x.
        samples: K, draws of z per image.

    Raises:
        ValueError: for a setting out of range.
    """

    def __init__(self, decoder: Decoder, *, noise_var: float = 0.5, samples: int = 1) -> None:
        check_settings(noise_var, samples)
        self.decoder = decoder
        self.noise_var = noise_var
        self.samples = samples

    def __call__(
        self, x: Tensor, mean: Tensor, log_var: Tensor, *, generator: torch.Generator | None = None
    ) -> Terms:
        """Evaluate; see `Objective`. All but the objective are those of the ELBO, for logging."""
        z, log_ratio = draw(mean, log_var, self.samples, generator)
        decoded = decode(self.decoder, x, z, self.noise_var)
        return self._terms(decoded, decoded.log_likelihood + log_ratio, mean, log_var)

    def _terms(self, decoded: Decoded, log_weight: Tensor, mean: Tensor, log_var: Tensor) -> Terms:
        # Below eps^2 of the largest a weight is lost in the sum. Its gradient, a subnormal number
        # before long, would take a CPU several times as long as a zero does.
        least = log_weight.detach().amax(0) + 2 * math.log(torch.finfo(log_weight.dtype).eps)
        log_weight = log_weight.masked_fill(log_weight < least, -math.inf)
        objective = log_weight.logsumexp(0) - math.log(self.samples)
        kl = gaussian_kl(mean, log_var)
        return make_terms(
            objective, decoded.log_likelihood.mean(0), kl, decoded.squared_error.mean(0)
        )
