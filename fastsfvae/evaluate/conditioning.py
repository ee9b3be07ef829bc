"""How far apart the eigenvalues of the likelihood's covariance lie (paper, 3.3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastsfvae import _checks
from fastsfvae.evaluate._decode import Decoder
from fastsfvae.gram.pullback import pullback
from fastsfvae.ops.woodbury import woodbury_native

_IMAGES_AT_ONCE = 250


class Conditioning(NamedTuple):
    """Spectrum of J diag(h) J^T + cI, per image ``[N]``.

    Attributes:
        log10_ratio: log10(1 + lambda_max(A) / c) with A = S J^T J S, float64: the largest over the
            smallest eigenvalue, in powers of ten; NaN where J is not finite.
        lost: bool, images whose factorisation cannot be resolved against c in the decoder's dtype,
            before the float64 repair.
    """

    log10_ratio: Tensor
    lost: Tensor


@torch.no_grad()
def conditioning(
    decoder: Decoder, mean: Tensor, log_var: Tensor, *, noise_var: float
) -> Conditioning:
    """Measure the spread of eigenvalues at every image's posterior.

    Args:
        decoder: f.
        mean: ``[N, m]``.
        log_var: log h, ``[N, m]``.
        noise_var: c.

    Raises:
        TypeError, ValueError, RuntimeError: as `pullback`, in one line.
    """
    _checks.latent(mean, log_var)
    _checks.noise_var(noise_var)
    ratios, lost = [], []
    for mu, log_h in zip(mean.split(_IMAGES_AT_ONCE), log_var.split(_IMAGES_AT_ONCE), strict=True):
        gram = pullback(decoder, mu).gram
        s = torch.exp(0.5 * log_h.double())
        A = s.unsqueeze(-1) * gram.double() * s.unsqueeze(-2)
        # One image that is not finite would end the whole decomposition.
        broken = ~A.isfinite().all(2).all(1)
        A = A.masked_fill(broken[:, None, None], 0)
        largest = torch.linalg.eigvalsh(A)[:, -1].clamp_min(0)
        ratios.append(torch.log10(1 + largest / noise_var).masked_fill(broken, torch.nan))
        # The projection and the squared error have no part in the pivots.
        nothing = torch.zeros_like(mu)
        c = torch.full_like(mu[:, 0], noise_var)
        lost.append(woodbury_native(gram, nothing, nothing[:, 0], log_h.exp(), c).lost)
    return Conditioning(torch.cat(ratios), torch.cat(lost))
