"""The sampling VAE's ELBO, with reparameterised samples of the posterior."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastsfvae import _checks
from fastsfvae.elbo import gaussian_kl
from fastsfvae.objectives.terms import Terms


class Sampling:
    """E_q[log N(x; f(z), cI)] by Monte Carlo, minus the closed-form KL divergence.

    Args:
        decoder: f, ``z [B, m] -> [B, *out]``.
        noise_var: c, variance of the observation noise in squared units of x.
        kl_weight: factor of the KL divergence; 1 makes the objective an estimate of the ELBO.
        samples: draws of z per image.

    Raises:
        ValueError: for a setting out of range.
    """

    def __init__(
        self,
        decoder: Callable[[Tensor], Tensor],
        *,
        noise_var: float = 0.5,
        kl_weight: float = 1.0,
        samples: int = 1,
    ) -> None:
        _checks.noise_var(noise_var)
        _checks.kl_weight(kl_weight)
        if samples < 1:
            raise ValueError(f"samples={samples} must be at least 1")
        self.decoder = decoder
        self.noise_var = noise_var
        self.kl_weight = kl_weight
        self.samples = samples

    def __call__(
        self, x: Tensor, mean: Tensor, log_var: Tensor, *, generator: torch.Generator | None = None
    ) -> Terms:
        """Evaluate; see `Objective`. `squared_error` is the mean over the drawn z."""
        noise = torch.randn(
            (self.samples, *mean.shape), generator=generator, device=mean.device, dtype=mean.dtype
        )
        z = mean + torch.exp(0.5 * log_var) * noise
        output = self.decoder(z.flatten(0, 1)).unflatten(0, (self.samples, -1))
        squared_error = (output - x).square().flatten(2).sum(-1).mean(0)
        kl = gaussian_kl(mean, log_var)
        constant = 0.5 * x[0].numel() * math.log(2 * math.pi * self.noise_var)
        log_likelihood = -constant - squared_error / (2 * self.noise_var)
        objective = log_likelihood - self.kl_weight * kl
        return Terms(
            -objective.mean(),
            objective.detach(),
            log_likelihood.detach(),
            kl.detach(),
            squared_error.detach(),
        )
