"""The Wasserstein auto-encoder with the maximum mean discrepancy."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsfvae.objectives.auto_encoder import Matched

# Of the kernels' widths, as in the paper's code; their values add up.
_SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


def maximum_mean_discrepancy(z: Tensor, prior: Tensor) -> Tensor:
    """The squared discrepancy of two samples, unbiased: zero on average where both are of one law.

    sum_{i != j} (k(z_i, z_j) + k(p_i, p_j)) / (n (n - 1)) - 2 sum_{ij} k(z_i, p_j) / n^2 with
    k(a, b) = sum_s C_s / (C_s + |a - b|^2), C_s = 2 m s for s in .1, .2, .5, 1, 2, 5, 10: inverse
    multiquadratics of a standard normal prior's scale. It may be negative.

    Args:
        z: ``[n, m]``, n at least 2.
        prior: draws of N(0, I), ``[n, m]``.

    Returns:
        0-d.

    Raises:
        ValueError: for samples of other shapes.
    """
    n = len(z)
    if n < 2 or z.shape != prior.shape or z.dim() != 2:
        raise ValueError(
            f"z {tuple(z.shape)} and prior {tuple(prior.shape)} must both be [n, m] with n >= 2: "
            "a discrepancy takes pairs"
        )

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        # By differences: of near points, |a|^2 + |b|^2 - 2 a.b would leave no digits.
        squared = (a.unsqueeze(1) - b.unsqueeze(0)).square().sum(-1)
        return sum((w / (w + squared) for w in widths), torch.zeros_like(squared))

    widths = [2 * z.shape[1] * scale for scale in _SCALES]
    within = kernel(z, z) + kernel(prior, prior)
    # A point's kernel with itself is its largest value, 1 of each width.
    pairs = within.sum() - 2 * n * len(_SCALES)
    return pairs / (n * (n - 1)) - 2 * kernel(z, prior).sum() / n**2


class WassersteinAutoEncoder(Matched):
    """`Matched` by `maximum_mean_discrepancy` (Tolstikhin et al. 2018, WAE-MMD).

    The encoder is deterministic: the mean alone. The arguments are those of `Matched`; a batch has
    at least two images.
    """

    def _distance(self, z: Tensor, noise: Tensor) -> Tensor:
        return maximum_mean_discrepancy(z, noise)
