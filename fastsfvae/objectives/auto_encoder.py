"""Auto-encoders that decode the mean alone, and what may hold their latents to the prior."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsfvae import _checks
from fastsfvae._noise import noise_like
from fastsfvae.likelihoods import gaussian_kl, wide
from fastsfvae.objectives.draws import Decoder, decode
from fastsfvae.objectives.noise_variance import NoiseVar, check_noise_var
from fastsfvae.objectives.terms import Terms, make_terms


def check_weight(name: str, weight: float) -> None:
    """Raise ValueError for the weight of a penalty that is negative or not finite."""
    if not 0 <= weight < float("inf"):
        raise ValueError(f"{name}={weight!r} must be finite and not negative")


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
        return self._evaluate(x, mean, log_var, 0.0)

    def _evaluate(self, x: Tensor, mean: Tensor, log_var: Tensor, penalty: float | Tensor) -> Terms:
        """The terms less a penalty, a number, ``[B]``, or 0-d and so of the whole batch."""
        _checks.latent(mean, log_var)
        log_likelihood, squared_error = decode(self.decoder, x, mean[None], self.noise_var)
        kl = gaussian_kl(mean, log_var)
        objective = log_likelihood[0] - penalty
        return make_terms(objective, log_likelihood[0], kl, squared_error[0])


class Matched(AutoEncoder):
    """log N(x; f(mean), cI) - weight * distance, between a batch's means and draws of the prior.

    The distance is the batch's: of another batch size it is another estimate. Processes that train
    together each take their own share's.

    Args:
        decoder: f, ``z [B, m] -> [B, *out]``.
        weight: factor of the distance, not negative; it has the reconstruction's unit, nats.
        **settings: those of `AutoEncoder`.

    Raises:
        ValueError: for a setting out of range.
    """

    def __init__(self, decoder: Decoder, *, weight: float, **settings: Any) -> None:
        super().__init__(decoder, **settings)
        check_weight("weight", weight)
        self.weight = weight

    def __call__(
        self, x: Tensor, mean: Tensor, log_var: Tensor, *, generator: torch.Generator | None = None
    ) -> Terms:
        """Evaluate; see `Objective`. `kl` is reported, not minimised."""
        return self.at_noise(x, mean, log_var, self.noise(mean, generator))

    def noise(self, mean: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Standard normal rows ``[R, m]``, the first B of which are draws of the prior."""
        rows = len(mean) + self._further_rows
        return torch.randn(rows, mean.shape[1], **noise_like(mean, generator))

    def at_noise(self, x: Tensor, mean: Tensor, log_var: Tensor, noise: Tensor) -> Terms:
        """Evaluate at given noise, as `noise` draws it."""
        # A distance is no layer: autocast would leave eight bits of it.
        with torch.autocast(mean.device.type, enabled=False):
            distance = self._distance(wide(mean), noise)
        return self._evaluate(x, mean, log_var, self.weight * distance)

    _further_rows = 0

    def _distance(self, z: Tensor, noise: Tensor) -> Tensor:
        """0-d, of the means ``[B, m]`` and the rows of `noise`."""
        raise NotImplementedError
