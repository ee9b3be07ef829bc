"""The ELBO with the Sticking-the-Landing gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsfvae.elbo import gaussian_kl
from fastsfvae.objectives.draws import Decoder, check_settings, decode, draw_path
from fastsfvae.objectives.terms import Terms, make_terms


class StickingTheLanding:
    """log p(x|z) + log p(z) - log q(z|x), its gradient without the score of log q.

    The gradient is unbiased, and its variance vanishes where q(z|x) is the true posterior (Roeder,
    Wu & Duvenaud 2017).

    Args:
        decoder: f, ``z [B, m] -> [B, *out]``.
        noise_var: c, variance of the observation noise in squared units of x.
        samples: 1. On an importance-weighted bound of more samples the gradient would be biased.

    Raises:
        ValueError: for a setting out of range, or more than one sample.
    """

    def __init__(self, decoder: Decoder, *, noise_var: float = 0.5, samples: int = 1) -> None:
        check_settings(noise_var, samples)
        if samples != 1:
            raise ValueError(
                f"samples={samples}: Sticking-the-Landing is biased on an importance-weighted "
                "bound; give samples=1, or use the doubly reparameterised gradient (dreg)"
            )
        self.decoder = decoder
        self.noise_var = noise_var

    def __call__(
        self, x: Tensor, mean: Tensor, log_var: Tensor, *, generator: torch.Generator | None = None
    ) -> Terms:
        """Evaluate; see `Objective`. `kl` is the closed form, the objective's is the drawn one."""
        (z, log_ratio), _ = draw_path(mean, log_var, 1, generator)
        (log_likelihood,), (squared_error,) = decode(self.decoder, x, z, self.noise_var)
        objective = log_likelihood + log_ratio[0]
        return make_terms(objective, log_likelihood, gaussian_kl(mean, log_var), squared_error)
