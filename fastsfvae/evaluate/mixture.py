"""A density for latents that no prior was trained on. Needs scikit-learn."""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor

from fastsfvae import _checks


class GaussianMixture(NamedTuple):
    """sum_k w_k N(loc_k, L_k L_k^T), on the CPU in float64.

    Attributes:
        weight: w, ``[k]``, adding up to 1.
        loc: ``[k, m]``.
        factor: L, ``[k, m, m]``, lower triangular.
    """

    weight: Tensor
    loc: Tensor
    factor: Tensor

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``[count, m]``; `generator` is one of the CPU."""
        which = self.weight.multinomial(count, replacement=True, generator=generator)
        noise = torch.randn(count, self.loc.shape[1], 1, dtype=self.loc.dtype, generator=generator)
        return self.loc[which] + (self.factor[which] @ noise).squeeze(-1)


@torch.no_grad()
def fit_mixture(latents: Tensor, components: int = 10, seed: int = 0) -> GaussianMixture:
    """Fit Gaussians of full covariance to latents, by scikit-learn's EM.

    The ex-post density of Ghosh et al. (2020): what an auto-encoder without a prior draws images
    from, fitted to the encoder's means of its training images once it is trained.

    Args:
        latents: ``[N, m]``.
        components: number of Gaussians, at most N.
        seed: of the first assignment of latents to Gaussians.

    Raises:
        TypeError: for latents that are not floating point.
        ValueError: for fewer than two latents, or than components, or for one that is not finite.
        RuntimeError: where scikit-learn is missing.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise RuntimeError(
            "scikit-learn is missing: install what is needed with pip install 'fastsfvae[train]'"
        )
    _checks.floating("latents", latents)
    if latents.dim() != 2 or not 1 <= components <= len(latents) or len(latents) < 2:
        raise ValueError(
            f"latents {tuple(latents.shape)} for {components} components: give [N, m] with N >= 2 "
            "and at most N components, at least one"
        )
    if not latents.isfinite().all():
        raise ValueError("latents that are not finite have no density: look at the encoder")
    from sklearn.mixture import GaussianMixture as Fitted
    from threadpoolctl import threadpool_limits

    # Thousands of products too small for threads, which wait for each other where other work runs.
    with threadpool_limits(1):
        fitted = Fitted(components, random_state=seed).fit(latents.double().cpu().numpy())
    weight, loc, covariance = (
        torch.from_numpy(array) for array in (fitted.weights_, fitted.means_, fitted.covariances_)
    )
    return GaussianMixture(weight, loc, torch.linalg.cholesky(covariance))
