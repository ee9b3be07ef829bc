"""The four likelihoods as scalar arithmetic on the primitive's results.

With n outputs, c = noise_var and rr = |x - f(mu)|^2 (all per sample):

    log_likelihood = -(n/2) log(2 pi c) - (lambda/2) log_det - rr / (2c) + gamma / (2c) explained

    precision    lambda = 1                     only Sigma^-1 is mixed (paper, eq. 21 to the letter)
    mixture      lambda = gamma                 gamma log N(x; f, Sigma)
                                                + (1 - gamma) log N(x; f, cI)
    normalized   lambda = 1, and log_det is     the Gaussian whose precision is eq. 21's mix
                 logdet(I + A/c) - logdet(I + (1 - gamma) A/c)
    expected     lambda = 1, gamma = 0, and     E_q of log N(x; f_lin(z), cI): the exact ELBO's
                 log_det is trace(A)/c          likelihood term for a linear decoder

`likelihood_terms` is differentiable; `fastsfvae.likelihood_adjoint` has the same gradients by hand.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastsfvae._checks import Likelihood
from fastsfvae.ops.low_rank import low_rank_terms, squared_norms


class LikelihoodTerms(NamedTuple):
    """A likelihood and the terms that it was made of, each ``[B]``.

    `lost` (bool) marks samples whose factorisation rests on the floor of the pivot rule.
    """

    log_likelihood: Tensor
    squared_error: Tensor
    log_det: Tensor
    explained: Tensor
    lost: Tensor


def log_det_weight(likelihood: str, gamma: float | Tensor) -> float | Tensor:
    """The formula's lambda."""
    return gamma if likelihood == "mixture" else 1.0


def second_variance(latent_var: Tensor, gamma: float | Tensor, likelihood: str) -> Tensor | None:
    """The h of the log-determinant that "normalized" subtracts, None elsewhere."""
    return (1 - gamma) * latent_var if likelihood == "normalized" else None


def log_likelihood(
    squared_error: Tensor,
    log_det: Tensor,
    explained: Tensor,
    n: int,
    c: Tensor,
    gamma: float | Tensor,
    likelihood: str,
) -> Tensor:
    """The module's formula, ``[B]``, from its terms."""
    return (
        -0.5 * n * (math.log(2 * math.pi) + c.log())
        - 0.5 * log_det_weight(likelihood, gamma) * log_det
        - (squared_error - gamma * explained) / (2 * c)
    )


def expected_log_det(row_norms: Tensor, h: Tensor, c: Tensor) -> Tensor:
    """What stands for log_det in "expected": trace(A)/c, ``[B]``.

    Args:
        row_norms: squared norms of J's rows, ``[B, m]``, in c's dtype.
        h: ``[B, m]``.
        c: 0-d, in float32 at least, like every sum here.
    """
    return (h.to(c.dtype) * row_norms).sum(-1) / c


def likelihood_terms(
    jacobian: Tensor,
    residual: Tensor,
    latent_var: Tensor,
    *,
    noise_var: float | Tensor,
    gamma: float | Tensor,
    likelihood: Likelihood,
    backend: str,
) -> LikelihoodTerms:
    """Evaluate a likelihood on validated inputs.

    Args:
        jacobian: J, ``[B, m, n]``.
        residual: r = x - f(mu), ``[B, n]``.
        latent_var: h, ``[B, m]``.
        noise_var: c, a number or 0-d tensor.
        gamma: the mixing weight, a number or 0-d tensor.
        likelihood: one of `LIKELIHOODS`.
        backend: "torch", "triton" or "reference" (resolved: not "auto").
    """
    batch, n = residual.shape
    dtype = torch.promote_types(jacobian.dtype, torch.float32)
    if isinstance(noise_var, Tensor):
        c = noise_var.to(residual.device, dtype)
    else:
        # Filled on the device: a copy from the host would wait for it, and not be captured.
        c = torch.full((), noise_var, dtype=dtype, device=residual.device)
    if likelihood == "expected":
        rr, row_norms = squared_norms(jacobian, residual, c.dtype)
        log_det = expected_log_det(row_norms, latent_var, c)
        explained, lost = torch.zeros_like(rr), torch.zeros_like(rr, dtype=torch.bool)
    else:
        second_var = second_variance(latent_var, gamma, likelihood)
        log_det, explained, rr, second, lost = low_rank_terms(
            jacobian, residual, latent_var, c.expand(batch), second_var, backend=backend
        )
        if second is not None:
            log_det = log_det - second
    value = log_likelihood(rr, log_det, explained, n, c, gamma, likelihood)
    return LikelihoodTerms(value, rr, log_det, explained, lost)
