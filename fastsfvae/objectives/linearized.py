"""The posterior of the decoder linearised at a point, for the objectives that draw from it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastsfvae._checks import Backend
from fastsfvae.distributions import kalman_update
from fastsfvae.likelihoods import gaussian_kl_of_factor


def linearized_posterior(
    decoder: Callable[..., Tensor],
    x: Tensor,
    at: Tensor,
    noise_var: float | Tensor,
    backend: Backend,
) -> tuple[Tensor, Tensor]:
    """N(a + Lambda^-1 (p/c - a), Lambda^-1), Lambda = I + J^T J / c, p = J^T (x - f(a)).

    Args:
        decoder: f, ``z [B, m] -> [B, *out]``.
        x: ``[B, *out]``.
        at: a, ``[B, m]``.
        noise_var: c.
        backend: of the tangents, as in `SamplingFreeLoss`.

    Returns:
        Its mean ``[B, m]`` and its covariance's Cholesky factor ``[B, m, m]``.
    """
    prior = torch.zeros_like(at), torch.ones_like(at)
    posterior = kalman_update(decoder, x, *prior, noise_var, at=at, backend=backend)
    return posterior.mean, torch.linalg.cholesky_ex(posterior.cov).L


def divergence(loc: Tensor, factor: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """KL(N(mean, diag(exp(log_var))) || N(loc, L L^T)), ``[B]``, in nats.

    Args:
        loc: ``[B, m]``.
        factor: L, ``[B, m, m]``, lower triangular.
        mean: ``[B, m]``.
        log_var: ``[B, m]``.
    """
    given = torch.cat([(mean - loc).unsqueeze(-1), torch.diag_embed(torch.exp(0.5 * log_var))], -1)
    # By L^-1 the second one becomes N(0, I).
    whitened = torch.linalg.solve_triangular(factor, given, upper=False)
    return gaussian_kl_of_factor(whitened[..., 0], whitened[..., 1:])
