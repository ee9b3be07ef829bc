"""The importance-weighted bound with the doubly reparameterised gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsfvae.objectives.draws import decode, draw_path
from fastsfvae.objectives.iwae import ImportanceWeighted
from fastsfvae.objectives.terms import Terms


class DoublyReparameterized(ImportanceWeighted):
    """`ImportanceWeighted`'s bound; the encoder's gradient is the doubly reparameterised one.

    With normalised weights v_k = w_k / sum_j w_j the encoder gets sum_k v_k^2 dlog w_k/dz_k dz_k,
    unbiased, and of a signal-to-noise ratio that grows with K (Tucker et al. 2019). The
    decoder's gradient is the bound's own.

    Args:
        decoder: f, ``z [B, m] -> [B, *out]``.
        noise_var: c, variance of the observation noise in squared units of x.
        samples: K, draws of z per image; K = 1 is `StickingTheLanding`.

    Raises:
        ValueError: for a setting out of range.
    """

    def __call__(
        self, x: Tensor, mean: Tensor, log_var: Tensor, *, generator: torch.Generator | None = None
    ) -> Terms:
        """Evaluate; see `Objective`. All but the objective are those of the ELBO, for logging."""
        (z, log_ratio), path = draw_path(mean, log_var, self.samples, generator)
        decoded = decode(self.decoder, x, z, self.noise_var)
        log_weight = decoded.log_likelihood + log_ratio
        if path.requires_grad:
            # log-sum-exp sends v_k dlog w_k/dz_k here; the encoder's gradient takes v_k once more.
            weight = log_weight.detach().softmax(0).unsqueeze(-1)
            path.register_hook(lambda gradient: gradient * weight)
        return self._terms(decoded, log_weight, mean, log_var)
