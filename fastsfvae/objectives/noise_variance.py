"""An observation noise whose variance is learned."""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from torch import Tensor, nn

from fastsfvae import _checks


class NoiseVariance(nn.Module):
    """c > 0, learned by its logarithm: objectives ask for it at every call.

    Args:
        start: c before the first step, in squared units of x.

    Raises:
        ValueError: where it is not positive.
    """

    def __init__(self, start: float = 0.5) -> None:
        super().__init__()
        _checks.noise_var(start)
        self.log = nn.Parameter(torch.tensor(math.log(start)))

    def forward(self) -> Tensor:
        """Give c, 0-d."""
        return self.log.exp()


NoiseVar: TypeAlias = float | NoiseVariance


def check_noise_var(noise_var: NoiseVar) -> None:
    """Raise for a number out of range."""
    if not isinstance(noise_var, NoiseVariance):
        _checks.noise_var(noise_var)


def log_normalizer(n: int, noise_var: NoiseVar) -> tuple[float | Tensor, float | Tensor]:
    """Give c and (n/2) log(2 pi c)."""
    if isinstance(noise_var, NoiseVariance):
        c = noise_var()
        return c, 0.5 * n * (math.log(2 * math.pi) + noise_var.log)
    return noise_var, 0.5 * n * math.log(2 * math.pi * noise_var)
