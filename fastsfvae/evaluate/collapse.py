"""Which latent dimensions carry information."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from fastsfvae import _checks
from fastsfvae.likelihoods import gaussian_kl, marginal_log_var

_ACTIVE_VARIANCE = 0.01


class PosteriorCollapse(NamedTuple):
    """How many latent dimensions carry information.

    Attributes:
        collapsed: dimensions in which at most floor(delta N) images have KL_i >= epsilon.
        active: dimensions with Var_x(E_q[z_i]) > 0.01 (population variance).
        latent_dim: m.
        informative_images: ``[m]`` int64, images with KL_i >= epsilon.
        kl: ``[m]``, mean KL_i over images, in nats.
    """

    collapsed: int
    active: int
    latent_dim: int
    informative_images: Tensor
    kl: Tensor


@torch.no_grad()
def posterior_collapse(
    mean: Tensor, log_var: Tensor, epsilon: float = 0.05, delta: float = 0.01
) -> PosteriorCollapse:
    """Count (epsilon, delta)-collapsed latent dimensions, in integers (paper, 4.4).

    Args:
        mean: ``[N, m]``.
        log_var: ``[N, m]``; or a factor of a full covariance, ``[N, m, m]``, each of whose
            dimensions is then judged by its marginal.
        epsilon: nats below which an image's KL_i counts as collapsed.
        delta: fraction of images that may exceed epsilon, in [0, 1].

    Raises:
        TypeError, ValueError: for inputs that do not fit, in one line.
    """
    _checks.latent(mean, log_var, factor=True)
    log_var = marginal_log_var(log_var)
    if not epsilon > 0:
        raise ValueError(f"epsilon={epsilon!r} must be positive (nats)")
    if not 0 <= delta <= 1:
        raise ValueError(f"delta={delta!r} must lie in [0, 1]")
    kl = gaussian_kl(mean.double().reshape(-1, 1), log_var.double().reshape(-1, 1))
    kl = kl.reshape(mean.shape)
    # Written so that a NaN counts as informative: a broken dimension is not a collapsed one.
    informative = (~(kl < epsilon)).sum(0)
    # Exact decimal arithmetic: floor(0.29 * 100) is 28 in floating point.
    allowed = math.floor(Fraction(str(delta)) * len(mean))
    variance = mean.double().var(0, correction=0)
    return PosteriorCollapse(
        collapsed=int((informative <= allowed).sum()),
        active=int((variance > _ACTIVE_VARIANCE).sum()),
        latent_dim=mean.shape[1],
        informative_images=informative,
        kl=kl.mean(0),
    )
