"""The ELBO with the Sticking-the-Landing gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsfvae.loss import gaussian_kl
from fastsfvae.objectives.draws import Decoder, check_settings, decode, draw_path
from fastsfvae.objectives.terms import Terms, make_terms


class StickingTheLanding:
    """1/K sum_k log p(x|z_k) + log p(z_k) - log q(z_k|x), its gradient without log q's score.

    The gradient is unbiased, and its variance vanishes where q(z|x) is the true posterior (Roeder,
    Wu & Duvenaud 2017). The draws are averaged: left out of an importance-weighted bound, the score
    would leave a bias, which `DoublyReparameterized` has not.

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
        """Evaluate; see `Objective`. `kl` is the closed form, the objective's is the drawn one."""
        (z, log_ratio), _ = draw_path(mean, log_var, self.samples, generator)
        decoded = decode(self.decoder, x, z, self.noise_var)
        log_likelihood = decoded.log_likelihood.mean(0)
        objective = log_likelihood + log_ratio.mean(0)
        kl = gaussian_kl(mean, log_var)
        return make_terms(objective, log_likelihood, kl, decoded.squared_error.mean(0))
