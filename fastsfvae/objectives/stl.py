"""The ELBO with the Sticking-the-Landing gradient."""

from __future__ import annotations

from torch import Tensor

from fastsfvae.objectives.draws import Drawn, MonteCarlo, draw_path


class StickingTheLanding(MonteCarlo):
    """1/K sum_k log p(x|z_k) + log p(z_k) - log q(z_k|x), its gradient without log q's score.

    The gradient is unbiased, and its variance vanishes where q(z|x) is the true posterior (Roeder,
    Wu & Duvenaud 2017). The draws are averaged: left out of an importance-weighted bound, the score
    would leave a bias, which `DoublyReparameterized` has not. The arguments are those of
    `MonteCarlo`.
    """

    _draw = staticmethod(draw_path)

    def _objective(
        self, log_likelihood: Tensor, drawn: Drawn, kl: Tensor, posterior: tuple[Tensor, Tensor]
    ) -> Tensor:
        return log_likelihood.mean(0) + drawn.log_ratio.mean(0)
