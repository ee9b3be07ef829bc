"""Reweighted expectation maximisation."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsfvae import _checks
from fastsfvae.likelihoods import gaussian_kl, wide
from fastsfvae.objectives.draws import Decoded, Decoder, MonteCarlo, decode, draw
from fastsfvae.objectives.iwae import log_mean_weight
from fastsfvae.objectives.terms import Terms


class _Matched(NamedTuple):
    """N(loc, std (I + w w^T) std), each ``[B, m]``: a diagonal Gaussian and one direction more."""

    loc: Tensor
    std: Tensor
    w: Tensor

    def draw(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Turn noise ``[K, B, m]`` into draws, and log p(z) - log density there ``[K, B]``."""
        s = self.w.square().sum(-1, keepdim=True)
        root = (1 + s).sqrt()
        # The symmetric root of I + w w^T, times the noise.
        whitened = noise + self.w * (self.w * noise).sum(-1, keepdim=True) / (1 + root)
        z = self.loc + self.std * whitened
        log_det = self.std.log().sum(-1) + root.log().squeeze(-1)
        return z, 0.5 * (noise.square() - z.square()).sum(-1) + log_det


class ReweightedExpectationMaximization(MonteCarlo):
    """The decoder by self-normalised weights, the encoder by KL(p(z|x) || q).

    Reweighted expectation maximisation, REM (Dieng & Paisley 2019).

    K draws z_k of q(z|x) have weights a_k in proportion to p(x, z_k) / q(z_k|x). Their mean
    mu = sum_k a_k z_k and the covariance of q about it, D + (mu - mean)(mu - mean)^T, D =
    diag(exp(log_var)), make a proposal r whose own K draws y_k have weights b_k. (The paper's code
    averages (z_k - mu)(z_k - mu)^T over the draws, which is singular for K <= m; D + ... is what
    the average tends to.) The encoder is trained by sum_k b_k log q(y_k|x): it never follows the
    decoder's gradient. The decoder is trained

    - in version 1 by sum_k a_k log p(x, z_k), the gradient of log 1/K sum_k p(x, z_k) / q(z_k|x);
    - in version 2 by sum_k b_k log p(x, y_k), that of the same with r in q's place.

    That bound of log p(x), in expectation, is the `objective`; a step decodes 2K draws. With few of
    them mu is uncertain, and r may be the worse proposal of the two.

    Args:
        decoder: f, ``z [B, m] -> [B, *out]``.
        version: 1 or 2.
        **settings: those of `MonteCarlo`.

    Raises:
        ValueError: for a setting out of range.
    """

    def __init__(self, decoder: Decoder, *, version: int = 2, **settings: Any) -> None:
        super().__init__(decoder, **settings)
        if version not in (1, 2):
            raise ValueError(f"version={version} must be 1 or 2")
        self.version = version

    def noise(self, mean: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The noise that a call draws, ``[2, K, B, m]``: of q's draws, and of r's."""
        return torch.stack([MonteCarlo.noise(self, mean, generator) for _ in range(2)])

    def at_noise(self, x: Tensor, mean: Tensor, log_var: Tensor, noise: Tensor) -> Terms:
        """Evaluate at given noise, as `noise` draws it."""
        _checks.latent(mean, log_var)
        given = mean.dtype
        mean, log_var = wide(mean), wide(log_var)
        of_q, ratio_q = draw(mean.detach(), log_var.detach(), noise[0])
        # What no loss is differentiated by needs no graph.
        with torch.set_grad_enabled(self.version == 1 and torch.is_grad_enabled()):
            decoded_q = decode(self.decoder, x, of_q.to(given), self.noise_var)
        matched = self._match(mean, log_var, of_q, decoded_q, ratio_q)
        of_r, ratio_r = matched.draw(noise[1])
        with torch.set_grad_enabled(self.version == 2 and torch.is_grad_enabled()):
            decoded_r = decode(self.decoder, x, of_r.to(given), self.noise_var)
        weight = (decoded_r.log_likelihood + ratio_r).detach().softmax(0)
        whitened = (of_r - mean) / torch.exp(0.5 * log_var)
        log_q = -0.5 * (whitened.square() + log_var).sum(-1)
        log_likelihood, squared_error = decoded_q if self.version == 1 else decoded_r
        bound = log_mean_weight(log_likelihood + (ratio_q if self.version == 1 else ratio_r))
        loss = -(bound + (weight * log_q).sum(0)).mean()
        logged = (bound, log_likelihood.mean(0), gaussian_kl(mean, log_var), squared_error.mean(0))
        return Terms(loss, *(t.detach() for t in logged))

    @staticmethod
    def _match(
        mean: Tensor, log_var: Tensor, z: Tensor, decoded: Decoded, log_ratio: Tensor
    ) -> _Matched:
        with torch.no_grad():
            weight = (decoded.log_likelihood + log_ratio).softmax(0)
            loc = (weight.unsqueeze(-1) * z).sum(0)
            std = torch.exp(0.5 * log_var)
            return _Matched(loc, std, (loc - mean) / std)
