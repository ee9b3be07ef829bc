"""The importance-weighted bound with the doubly reparameterised gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastsfvae.objectives.draws import Decoder, Drawn, at_deviation, deviate
from fastsfvae.objectives.iwae import ImportanceWeighted

ORTHOGONAL_BIAS = (
    "draws='orthogonal' would bias the doubly reparameterised gradient, as such a draw given the "
    "others is none of q(z|x): give iid or antithetic"
)


class DoublyReparameterized(ImportanceWeighted):
    """`ImportanceWeighted`'s bound; the encoder's gradient is the doubly reparameterised one.

    With normalised weights v_k = w_k / sum_j w_j and s_k = dlog w_k/dz_k the encoder gets
    sum_k v_k^2 s_k dz_k, unbiased, and of a signal-to-noise ratio that grows with K (Tucker et al.
    2019). The decoder's gradient is the bound's own. K = 1 is `StickingTheLanding`.

    The score of q(z_k) is reparameterised with all else held. Of an antithetic pair the other draw,
    l, moves as well, against z_k: sum_k v_k (v_k s_k - v_l s_l) dz_k is then what is unbiased.

    Args:
        decoder: f, ``z [B, m] -> [B, *out]``.
        **settings: those of `MonteCarlo`; `draws` "iid" or "antithetic".

    Raises:
        ValueError: for a setting out of range, and for orthogonal draws.
    """

    def __init__(self, decoder: Decoder, **settings: Any) -> None:
        super().__init__(decoder, **settings)
        if self.draws == "orthogonal":
            raise ValueError(ORTHOGONAL_BIAS)

    def _draw(self, mean: Tensor, log_var: Tensor, noise: Tensor) -> Drawn:
        deviation, nothing = _WeightedOnceMore.apply(
            deviate(mean, log_var, noise), self.draws == "antithetic"
        )
        z, log_ratio = at_deviation(mean, log_var, deviation)
        return Drawn(z, log_ratio + nothing)


class _WeightedOnceMore(torch.autograd.Function):
    """(deviation ``[K, B, m]``, zeros ``[K, B]``); the first's gradient is multiplied by v_k.

    Log-sum-exp sends v_k s_k to the deviation. The zeros, added to log w_k, get v_k itself, times
    what the loss makes of the bound; as the v_k add up to 1, that cancels. So the weights come with
    the gradient, and no hook has to wait for them, which could not be compiled.
    """

    @staticmethod
    def forward(ctx, deviation: Tensor, in_pairs: bool) -> tuple[Tensor, Tensor]:
        ctx.in_pairs = in_pairs
        return deviation.clone(), deviation.new_zeros(deviation.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor, of_weight: Tensor) -> tuple[Tensor, None]:
        total = of_weight.sum(0)
        # An image that the loss leaves out has no gradient.
        weight = torch.where(total == 0, 0.0, of_weight / total)
        if ctx.in_pairs:
            gradient = gradient - gradient.roll(len(gradient) // 2, 0)
        return gradient * weight.unsqueeze(-1), None
