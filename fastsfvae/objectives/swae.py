"""The sliced Wasserstein auto-encoder."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fastsfvae.objectives.auto_encoder import Matched
from fastsfvae.objectives.draws import Decoder


def sliced_wasserstein(z: Tensor, prior: Tensor, directions: Tensor) -> Tensor:
    """The squared 2-Wasserstein distance of two samples along directions, on average.

    Along each unit vector d it is sum_i (d.z_(i) - d.p_(i))^2 / n of the sorted projections. Two
    different samples of one law are not at distance 0: each point is off by the spread of the order
    statistics.

    Args:
        z: ``[n, m]``.
        prior: draws of N(0, I), ``[n, m]``.
        directions: ``[L, m]``, of any length but 0.

    Returns:
        0-d.

    Raises:
        ValueError: for samples of other shapes.
    """
    if z.dim() != 2 or z.shape != prior.shape or directions.shape[1:] != z.shape[1:]:
        raise ValueError(
            f"z {tuple(z.shape)}, prior {tuple(prior.shape)} and directions "
            f"{tuple(directions.shape)} must be [n, m], [n, m] and [L, m]"
        )
    unit = F.normalize(directions, dim=-1)
    ours, theirs = ((sample @ unit.T).sort(0).values for sample in (z, prior))
    return (ours - theirs).square().mean()


class SlicedWassersteinAutoEncoder(Matched):
    """`Matched` by `sliced_wasserstein` along random directions (Kolouri et al. 2019, SWAE).

    Args:
        decoder: f, ``z [B, m] -> [B, *out]``.
        projections: L, directions drawn anew for every batch.
        **settings: those of `Matched`.

    Raises:
        ValueError: for a setting out of range.
    """

    def __init__(self, decoder: Decoder, *, projections: int = 50, **settings: Any) -> None:
        super().__init__(decoder, **settings)
        if projections < 1:
            raise ValueError(f"projections={projections} must be at least 1")
        self.projections = self._further_rows = projections

    def _distance(self, z: Tensor, noise: Tensor) -> Tensor:
        # Normal rows, made unit vectors, are uniform on the sphere.
        return sliced_wasserstein(z, noise[: len(z)], noise[len(z) :])
