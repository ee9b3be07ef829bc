"""A posterior's covariance as directions: what the objective needs of one that is not diagonal.

Along the columns of a factor L of the covariance L L^T, the latents have unit variances: with J L
for J and h = 1 the four likelihoods are those of the full Gaussian. `expected` reads the trace of
L^T G L alone, so that random directions in their place give an unbiased estimate of it.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsfvae.likelihoods import gaussian_kl, gaussian_kl_of_factor


class Spread(NamedTuple):
    """A posterior by its directions.

    Attributes:
        tangents: ``[k, B, m]``, whose outer products add up to the covariance (in expectation); in
            the mean's dtype.
        kl: KL(N(mean, L L^T) || N(0, I)), ``[B]``, in nats.
    """

    tangents: Tensor
    kl: Tensor


def spread_of(
    mean: Tensor, log_var: Tensor, probes: int | None, generator: torch.Generator | None
) -> Spread | None:
    """The directions of a posterior; None where the unit vectors and its variances do.

    Args:
        mean: ``[B, m]``.
        log_var: log h ``[B, m]``, or L ``[B, m, m]``.
        probes: directions; None for all m.
        generator: source of the probes' signs, on the latents' device.
    """
    is_full, m = log_var.dim() == 3, mean.shape[1]
    few = probes is not None and probes < m
    if not is_full and not few:
        return None
    kl = gaussian_kl_of_factor(mean, log_var) if is_full else gaussian_kl(mean, log_var)
    if not few:
        return Spread(log_var.permute(2, 0, 1), kl)
    assert probes is not None
    wide = torch.promote_types(mean.dtype, torch.float32)
    signs, spread = _hadamard_probes(mean, probes, generator).to(wide), log_var.to(wide)
    if is_full:
        with torch.autocast(mean.device.type, enabled=False):
            tangents = torch.einsum("bij,kbj->kbi", spread, signs)
    else:
        tangents = torch.exp(0.5 * spread) * signs
    return Spread((tangents * probes**-0.5).to(mean.dtype), kl)


def _hadamard_probes(mean: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Signs ``[count, B, m]``: of each sample v v^T is the identity in expectation.

    Different rows of a Hadamard matrix, behind signs of each sample's own. They are orthogonal, and
    so estimate a trace with less variance than independent ones, with none where all are taken.
    """
    options: Any = {"device": mean.device, "generator": generator}
    m = mean.shape[1]
    rows = _hadamard(m, mean.device, mean.dtype)
    chosen = rows[torch.randperm(len(rows), **options)[:count]]
    signs = torch.randint(0, 2, mean.shape, **options).to(mean.dtype) * 2 - 1
    return chosen.unsqueeze(1) * signs


@functools.lru_cache(maxsize=16)
def _hadamard(m: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The first m columns of Sylvester's matrix, whose size is a power of two."""
    matrix = torch.ones(1, 1, dtype=dtype, device=device)
    while len(matrix) < m:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix[:, :m].contiguous()
