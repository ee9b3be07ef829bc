"""What the Monte Carlo objectives share: draws of the posterior, and what they decode to."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastsfvae import _checks

Decoder = Callable[[Tensor], Tensor]


class Draws(NamedTuple):
    """Reparameterised z ~ q(z|x), ``[K, B, m]``, and log p(z) - log q(z|x), ``[K, B]``."""

    z: Tensor
    log_ratio: Tensor


class Decoded(NamedTuple):
    """log N(x; f(z), cI) in nats and |x - f(z)|^2, each ``[K, B]``."""

    log_likelihood: Tensor
    squared_error: Tensor


def check_settings(noise_var: float, samples: int) -> None:
    """Raise unless c is a variance and there is at least one draw."""
    _checks.noise_var(noise_var)
    if samples < 1:
        raise ValueError(f"samples={samples} must be at least 1")


def draw(mean: Tensor, log_var: Tensor, samples: int, generator: torch.Generator | None) -> Draws:
    """Draw z = mean + std * noise; gradients are total derivatives."""
    noise = _noise(mean, samples, generator)
    z = mean + torch.exp(0.5 * log_var) * noise
    # The (2 pi)^(m/2) of the two densities cancel.
    return Draws(z, 0.5 * (noise.square() - z.square() + log_var).sum(-1))


def draw_path(
    mean: Tensor,
    log_var: Tensor,
    samples: int,
    generator: torch.Generator | None,
) -> tuple[Draws, Tensor]:
    """Draw the same z as `draw`, with gradients that reach the posterior through z alone.

    The score of log q, whose expectation is zero, is left out (Roeder, Wu & Duvenaud 2017).

    Returns:
        The draws, and the tensor ``[K, B, m]`` that the whole gradient passes.
    """
    std = torch.exp(0.5 * log_var)
    # Exactly std * noise. As z - mean, a narrow posterior would lose its digits.
    deviation = (mean - mean.detach()) + std * _noise(mean, samples, generator)
    z = mean.detach() + deviation
    whitened = deviation / std.detach()
    ratio = 0.5 * (whitened.square() - z.square() + log_var.detach()).sum(-1)
    return Draws(z, ratio), deviation


def decode(decoder: Decoder, x: Tensor, z: Tensor, noise_var: float) -> Decoded:
    """Decode all draws in one call.

    Raises:
        ValueError: where the decoder's output is not shaped like x.
    """
    output = decoder(z.flatten(0, 1)).unflatten(0, z.shape[:2])
    if output.shape[1:] != x.shape:
        raise ValueError(
            f"x has shape {tuple(x.shape)} but the decoder returns {tuple(output.shape[1:])}: "
            "they must match"
        )
    squared_error = (output - x).square().flatten(2).sum(-1)
    constant = 0.5 * x[0].numel() * math.log(2 * math.pi * noise_var)
    return Decoded(-constant - squared_error / (2 * noise_var), squared_error)


def _noise(mean: Tensor, samples: int, generator: torch.Generator | None) -> Tensor:
    return torch.randn(
        (samples, *mean.shape), generator=generator, device=mean.device, dtype=mean.dtype
    )
