"""The Cramer-Wold auto-encoder."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastsfvae.likelihoods import wide
from fastsfvae.objectives.auto_encoder import AutoEncoder, check_weight
from fastsfvae.objectives.draws import Decoder
from fastsfvae.objectives.noise_variance import NoiseVar
from fastsfvae.objectives.terms import Terms


def _sliced_kernel(squared: Tensor, variance: float, m: int) -> Tensor:
    """1 / sqrt(v) phi_m(d / (2 v)), for squared distances d and the variance v of their slices.

    phi_m(s) = 1F1(1/2; m/2; -s) is the average of exp(-s u_1^2) over unit vectors u in m
    dimensions. In one and two it is elementary; above, the paper's (1 + 4s / (2m - 3))^(-1/2).
    """
    s = squared / (2 * variance)
    if m == 1:
        phi = torch.exp(-s)
    elif m == 2:
        phi = torch.special.i0e(s / 2)
    else:
        phi = (1 + 4 * s / (2 * m - 3)).rsqrt()
    return phi / math.sqrt(variance)


def cramer_wold(z: Tensor) -> Tensor:
    """The squared Cramer-Wold distance between a sample and N(0, I), in closed form.

    Both are projected onto a line and smoothed by N(0, g), g = (4 / (3n))^(2/5); their squared L2
    distance is averaged over all lines (Knop et al. 2020, Theorem 3): with the sliced kernel k_v
    above, of variance v,

        (sum_ij k_2g(|z_i - z_j|^2) / n^2 + k_(2 + 2g)(0) - 2 sum_i k_(1 + 2g)(|z_i|^2) / n)
        / sqrt(2 pi).

    For m of one and two phi is exact; for m >= 3 it is the paper's approximation, made for m >= 20,
    whose largest error falls from .092 at m = 3 to .0098 at m = 16, where phi(0) = 1. With it the
    distance of draws of the prior does not fall to 0 as they grow in number, but to .040 at m = 3,
    .013 at m = 8 and .0066 at m = 16: a sample that minimises it is too wide by as little as 4% at
    m = 16 and by as much as 45% at m = 3.

    Args:
        z: ``[n, m]``.

    Returns:
        0-d float64.

    Raises:
        ValueError: for a sample of another shape.
    """
    if z.dim() != 2 or 0 in z.shape:
        raise ValueError(f"z {tuple(z.shape)} must be [n, m]")
    # In float64: near the prior, three terms of size 1 leave some thousandths.
    z, (n, m) = z.double(), z.shape
    g = (4 / (3 * n)) ** 0.4
    pairs = (z.unsqueeze(1) - z.unsqueeze(0)).square().sum(-1)
    within = _sliced_kernel(pairs, 2 * g, m).mean()
    across = _sliced_kernel(z.square().sum(-1), 1 + 2 * g, m).mean()
    return (within + 1 / math.sqrt(2 + 2 * g) - 2 * across) / math.sqrt(2 * math.pi)


class CramerWoldAutoEncoder(AutoEncoder):
    """log N(x; f(mean), cI) - weight * log `cramer_wold` of a batch's means (Knop et al. 2020).

    The logarithm stands in the paper: it needs no weight that suits the data. Nothing is drawn. The
    distance is the batch's, as in `Matched`.

    Args:
        decoder: f, ``z [B, m] -> [B, *out]``.
        weight: factor of the logarithm, not negative.
        noise_var: as in `AutoEncoder`.

    Raises:
        ValueError: for a setting out of range.
    """

    def __init__(self, decoder: Decoder, *, weight: float = 1.0, noise_var: NoiseVar = 0.5) -> None:
        super().__init__(decoder, noise_var=noise_var)
        check_weight("weight", weight)
        self.weight = weight

    def __call__(
        self, x: Tensor, mean: Tensor, log_var: Tensor, *, generator: torch.Generator | None = None
    ) -> Terms:
        """Evaluate; see `Objective`. Draws nothing; `kl` is reported, not minimised."""
        distance = cramer_wold(mean).to(wide(mean).dtype)
        return self._evaluate(x, mean, log_var, self.weight * distance.log())
