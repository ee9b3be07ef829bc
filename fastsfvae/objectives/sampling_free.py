"""The sampling-free objective: the decoder is linearised at the mean, nothing is drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsfvae.elbo import Elbo
from fastsfvae.loss import SamplingFreeLoss
from fastsfvae.objectives.noise_variance import NoiseVar, NoiseVariance
from fastsfvae.objectives.terms import Terms


class SamplingFree:
    """`SamplingFreeLoss` behind the common call.

    Args:
        decoder: ``z [B, m] -> [B, *out]``.
        noise_var: c, a number, or a `NoiseVariance` to be learned.
        **settings: those of `SamplingFreeLoss`, except `reduction`.
    """

    def __init__(
        self, decoder: Callable[[Tensor], Tensor], *, noise_var: NoiseVar = 0.5, **settings: Any
    ) -> None:
        if isinstance(noise_var, NoiseVariance):
            settings |= {"noise_var": noise_var().item(), "learned_noise_var": True}
        else:
            settings |= {"noise_var": noise_var}
        self.loss = SamplingFreeLoss(decoder, reduction="mean", **settings)
        if isinstance(noise_var, NoiseVariance):
            held: Any = self.loss.parametrizations
            # Both hold its logarithm.
            held.noise_var.original = noise_var.log

    def __call__(
        self, x: Tensor, mean: Tensor, log_var: Tensor, *, generator: torch.Generator | None = None
    ) -> Terms:
        """Evaluate; see `Objective`. `squared_error` is the one at the mean."""
        loss, elbo = self.loss(x, mean, log_var, return_terms=True)
        return terms_of(loss, elbo)


def terms_of(loss: Tensor, elbo: Elbo) -> Terms:
    """What `SamplingFreeLoss` returns, in the objectives' common form."""
    return Terms(loss, elbo.elbo, elbo.log_likelihood, elbo.kl, elbo.squared_error)
