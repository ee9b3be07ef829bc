"""The ELBO with free bits."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastsfvae.likelihoods import gaussian_kl
from fastsfvae.objectives.auto_encoder import check_weight
from fastsfvae.objectives.draws import Decoder, Drawn, MonteCarlo


class FreeBits(MonteCarlo):
    """E_q[log N(x; f(z), cI)] - sum_i max(free_bits, mean over the batch of KL_i).

    Below so many nats a dimension's KL divergence costs nothing more, so that it has no reason to
    collapse (Kingma et al. 2016, eq. 15, one group a dimension). No bound of log p(x) where a
    dimension is below. The average is the batch's; processes that train together each take their
    own share's. The logged `kl` is the posterior's own.

    Args:
        decoder: f, ``z [B, m] -> [B, *out]``.
        free_bits: nats that each dimension has for nothing, not negative; 0 is `Sampling`
            but for the KL divergence in an image's `objective`, which is the batch's.
        **settings: those of `MonteCarlo`.

    Raises:
        ValueError: for a setting out of range.
    """

    def __init__(self, decoder: Decoder, *, free_bits: float, **settings: Any) -> None:
        super().__init__(decoder, **settings)
        check_weight("free_bits", free_bits)
        self.free_bits = free_bits

    def _objective(
        self, log_likelihood: Tensor, drawn: Drawn, kl: Tensor, posterior: tuple[Tensor, Tensor]
    ) -> Tensor:
        mean, log_var = posterior
        each = gaussian_kl(mean.unsqueeze(-1), log_var.unsqueeze(-1))
        return log_likelihood.mean(0) - each.mean(0).clamp_min(self.free_bits).sum()
