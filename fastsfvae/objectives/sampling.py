"""The sampling VAE's ELBO, with reparameterised samples of the posterior."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastsfvae import _checks
from fastsfvae.objectives.draws import Decoder, Drawn, MonteCarlo


class Sampling(MonteCarlo):
    """E_q[log N(x; f(z), cI)] by Monte Carlo, minus the closed-form KL divergence.

    With a `kl_weight` beta other than 1 this is the beta-VAE (Higgins et al. 2017).

    Args:
        decoder: f, ``z [B, m] -> [B, *out]``.
        kl_weight: factor of the KL divergence, a number or a 0-d tensor; 1 makes the objective
            an estimate of the ELBO.
        **settings: those of `MonteCarlo`.

    The posterior may have a full covariance: its factor L ``[B, m, m]`` in place of log_var.

    Raises:
        ValueError: for a setting out of range.
    """

    _full_covariance = True

    def __init__(
        self, decoder: Decoder, *, kl_weight: float | Tensor = 1.0, **settings: Any
    ) -> None:
        super().__init__(decoder, **settings)
        _checks.kl_weight(kl_weight)
        self.kl_weight = kl_weight

    def _objective(
        self, log_likelihood: Tensor, drawn: Drawn, kl: Tensor, posterior: tuple[Tensor, Tensor]
    ) -> Tensor:
        return log_likelihood.mean(0) - self.kl_weight * kl
