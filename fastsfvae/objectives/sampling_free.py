"""The sampling-free objective: the decoder is linearised at the mean, nothing is drawn."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastsfvae.elbo import Elbo
from fastsfvae.loss import SamplingFreeLoss
from fastsfvae.objectives.terms import Terms


class SamplingFree:
    """`SamplingFreeLoss` behind the common call.

    Args:
        decoder: ``z [B, m] -> [B, *out]``.
        **settings: those of `SamplingFreeLoss`, except `reduction`.
    """

    def __init__(self, decoder: Callable[[Tensor], Tensor], **settings) -> None:
        self.loss = SamplingFreeLoss(decoder, reduction="mean", **settings)

    def __call__(
        self, x: Tensor, mean: Tensor, log_var: Tensor, *, generator: torch.Generator | None = None
    ) -> Terms:
        """Evaluate; see `Objective`. `squared_error` is the one at the mean."""
        loss, elbo = self.loss(x, mean, log_var, return_terms=True)
        return terms_of(loss, elbo)


def terms_of(loss: Tensor, elbo: Elbo) -> Terms:
    """What `SamplingFreeLoss` returns, in the objectives' common form."""
    return Terms(loss, elbo.elbo, elbo.log_likelihood, elbo.kl, elbo.squared_error)
