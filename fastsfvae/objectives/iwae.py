"""The importance-weighted auto-encoder's bound."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastsfvae.objectives.draws import Drawn, MonteCarlo


class ImportanceWeighted(MonteCarlo):
    """log 1/K sum_k p(x|z_k) p(z_k) / q(z_k|x) (Burda, Grosse & Salakhutdinov 2016).

    A lower bound of log p(x) in expectation that tightens with K; K = 1 is the ELBO with a sampled
    KL divergence. The arguments are those of `MonteCarlo`.
    """

    def _objective(self, log_likelihood: Tensor, drawn: Drawn, kl: Tensor) -> Tensor:
        log_weight = log_likelihood + drawn.log_ratio
        # Below eps^2 of the largest a weight is lost in the sum. Its gradient, a subnormal number
        # before long, would take a CPU several times as long as a zero does.
        least = log_weight.detach().amax(0) + 2 * math.log(torch.finfo(log_weight.dtype).eps)
        log_weight = log_weight.masked_fill(log_weight < least, -math.inf)
        return log_weight.logsumexp(0) - math.log(self.samples)
