"""The auto-encoder: the reconstruction at the mean, with nothing to regularise it."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsfvae.likelihoods import gaussian_kl
from fastsfvae.objectives.draws import Decoder, decode
from fastsfvae.objectives.noise_variance import NoiseVar, check_noise_var
from fastsfvae.objectives.terms import Terms, make_terms


class AutoEncoder:
    """log N(x; f(mean), cI). The posterior's variance has no part in it and gets no gradient.

    Args:
        decoder: f, ``z [B, m] -> [B, *out]``.
        noise_var: c, variance of the observation noise in squared units of x; it scales the loss.

    Raises:
        ValueError: for a setting out of range.
    """

    def __init__(self, decoder: Decoder, *, noise_var: NoiseVar = 0.5) -> None:
        check_noise_var(noise_var)
        self.decoder = decoder
        self.noise_var = noise_var

    def __call__(
        self, x: Tensor, mean: Tensor, log_var: Tensor, *, generator: torch.Generator | None = None
    ) -> Terms:
        """Evaluate; see `Objective`. Draws nothing; `kl` is reported, not minimised."""
        log_likelihood, squared_error = decode(self.decoder, x, mean[None], self.noise_var)
        kl = gaussian_kl(mean, log_var)
        return make_terms(log_likelihood[0], log_likelihood[0], kl, squared_error[0])
