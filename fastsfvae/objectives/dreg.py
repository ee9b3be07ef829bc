"""The importance-weighted bound with the doubly reparameterised gradient."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastsfvae.objectives.draws import Draws, at_deviation, deviate
from fastsfvae.objectives.iwae import ImportanceWeighted


class DoublyReparameterized(ImportanceWeighted):
    """`ImportanceWeighted`'s bound; the encoder's gradient is the doubly reparameterised one.

    With normalised weights v_k = w_k / sum_j w_j the encoder gets sum_k v_k^2 dlog w_k/dz_k dz_k,
    unbiased, and of a signal-to-noise ratio that grows with K (Tucker et al. 2019). The
    decoder's gradient is the bound's own. K = 1 is `StickingTheLanding`.
    """

    @staticmethod
    def _draw(
        mean: Tensor, log_var: Tensor, samples: int, generator: torch.Generator | None
    ) -> Draws:
        deviation, nothing = _WeightedOnceMore.apply(deviate(mean, log_var, samples, generator))
        z, log_ratio = at_deviation(mean, log_var, deviation)
        return Draws(z, log_ratio + nothing)


class _WeightedOnceMore(torch.autograd.Function):
    """(deviation ``[K, B, m]``, zeros ``[K, B]``); the first's gradient is multiplied by v_k.

    Log-sum-exp sends v_k dlog w_k/dz_k to the deviation. The zeros, added to log w_k, get v_k
    itself, times what the loss makes of the bound; as the v_k add up to 1, that cancels. So the
    weights come with the gradient, and no hook has to wait for them, which could not be compiled.
    """

    @staticmethod
    def forward(ctx, deviation: Tensor) -> tuple[Tensor, Tensor]:
        return deviation.clone(), deviation.new_zeros(deviation.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor, of_weight: Tensor) -> Tensor:
        total = of_weight.sum(0)
        # An image that the loss leaves out has no gradient.
        weight = torch.where(total == 0, 0.0, of_weight / total)
        return gradient * weight.unsqueeze(-1)
