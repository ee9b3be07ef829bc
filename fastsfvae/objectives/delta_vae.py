"""Posteriors of a minimum rate, for the delta-VAE."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastsfvae.likelihoods import wide

_HALVINGS = 60


class MinimumRate(nn.Module):
    """An encoder whose every KL_i is at least `rate`: it cannot collapse (Razavi et al. 2019).

    KL(N(mu, s^2) || N(0, 1)) >= rate where mu^2 >= 2 rate + 1 + log s^2 - s^2 = b(s). With s_l < 1
    < s_u the zeros of b, the encoder's two numbers a and log v of a dimension become

        s = s_l + (s_u - s_l) sigmoid(log v),   mu = sqrt(b(s)) + max(0, a),

    which is the paper's posterior of independent dimensions. As mu > 0, the latents keep to the
    positive half of the prior's range: the decoder is hardly trained on what N(0, I) draws
    elsewhere. The rest of the method is `Sampling`.

    Args:
        encoder: x -> (a, log v), each ``[B, m]``.
        rate: nats of each dimension, positive.

    Raises:
        ValueError: for a rate that is not.
    """

    def __init__(self, encoder: nn.Module, rate: float) -> None:
        super().__init__()
        if not 0 < rate < math.inf:
            raise ValueError(f"min_rate={rate!r} must be finite and positive (nats)")
        self.encoder, self.rate = encoder, rate

        def excess(s: float) -> float:
            return 2 * rate + 1 + 2 * math.log(s) - s * s

        # At both far ends it is negative, whatever the rate.
        low = _zero(excess, math.exp(-rate - 1), 1.0)
        self.ends = low, _zero(lambda s: -excess(s), 1.0, 3 * (1 + math.sqrt(2 * rate)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log_var, each ``[B, m]``."""
        a, log_v = self.encoder(x)
        # A posterior's density is no place for eight bits.
        with torch.autocast(a.device.type, enabled=False):
            a, log_v = wide(a), wide(log_v)
            low, high = self.ends
            std = low + (high - low) * torch.sigmoid(log_v)
            log_var = 2 * std.log()
            bound = 2 * self.rate + 1 + log_var - std.square()
            # At the interval's very ends rounding may leave it below zero, and a root no slope.
            return bound.clamp_min(1e-6).sqrt() + a.clamp_min(0), log_var


def _zero(rising: Callable[[float], float], low: float, high: float) -> float:
    """Where a rising function is 0, by halving the interval."""
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if rising(middle) > 0 else (middle, high)
    return (low + high) / 2
