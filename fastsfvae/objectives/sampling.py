"""The sampling VAE's ELBO, with reparameterised samples of the posterior."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsfvae import _checks
from fastsfvae.loss import gaussian_kl
from fastsfvae.objectives.draws import Decoder, check_settings, decode, draw
from fastsfvae.objectives.terms import Terms, make_terms


class Sampling:
    """E_q[log N(x; f(z), cI)] by Monte Carlo, minus the closed-form KL divergence.

    With a `kl_weight` beta other than 1 this is the beta-VAE (Higgins et al. 2017).

    Args:
        decoder: f, ``z [B, m] -> [B, *out]``.
        noise_var: c, variance of the observation noise in squared units of x.
        kl_weight: factor of the KL divergence, a number or a 0-d tensor; 1 makes the objective
            an estimate of the ELBO.
        samples: draws of z per image.

    Raises:
        ValueError: for a setting out of range.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        noise_var: float = 0.5,
        kl_weight: float | Tensor = 1.0,
        samples: int = 1,
    ) -> None:
        check_settings(noise_var, samples)
        _checks.kl_weight(kl_weight)
        self.decoder = decoder
        self.noise_var = noise_var
        self.kl_weight = kl_weight
        self.samples = samples

    def __call__(
        self, x: Tensor, mean: Tensor, log_var: Tensor, *, generator: torch.Generator | None = None
    ) -> Terms:
        """Evaluate; see `Objective`. `squared_error` is the mean over the drawn z."""
        z = draw(mean, log_var, self.samples, generator).z
        decoded = decode(self.decoder, x, z, self.noise_var)
        log_likelihood = decoded.log_likelihood.mean(0)
        kl = gaussian_kl(mean, log_var)
        objective = log_likelihood - self.kl_weight * kl
        return make_terms(objective, log_likelihood, kl, decoded.squared_error.mean(0))
