"""The importance-weighted bound with the doubly reparameterised gradient."""

from __future__ import annotations

from torch import Tensor

from fastsfvae.objectives.draws import Draws, draw_path
from fastsfvae.objectives.iwae import ImportanceWeighted


class DoublyReparameterized(ImportanceWeighted):
    """`ImportanceWeighted`'s bound; the encoder's gradient is the doubly reparameterised one.

    With normalised weights v_k = w_k / sum_j w_j the encoder gets sum_k v_k^2 dlog w_k/dz_k dz_k,
    unbiased, and of a signal-to-noise ratio that grows with K (Tucker et al. 2019). The
    decoder's gradient is the bound's own. K = 1 is `StickingTheLanding`.
    """

    _draw = staticmethod(draw_path)

    def _objective(self, log_likelihood: Tensor, drawn: Draws, kl: Tensor) -> Tensor:
        if drawn.path.requires_grad:
            # log-sum-exp sends v_k dlog w_k/dz_k here; the encoder's gradient takes v_k once more.
            log_weight = log_likelihood + drawn.log_ratio
            weight = log_weight.detach().softmax(0).unsqueeze(-1)
            drawn.path.register_hook(lambda gradient: gradient * weight)
        return super()._objective(log_likelihood, drawn, kl)
