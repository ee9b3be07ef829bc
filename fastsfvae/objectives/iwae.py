"""The importance-weighted auto-encoder's bound."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from fastsfvae import _checks
from fastsfvae.likelihoods import gaussian_kl, wide
from fastsfvae.objectives.draws import Decoder, Drawn, MonteCarlo, decode
from fastsfvae.objectives.linearized import divergence, linearized_posterior
from fastsfvae.objectives.noise_variance import log_normalizer
from fastsfvae.objectives.terms import Terms

TrainingProposal: TypeAlias = Literal["posterior", "linearized"]
TRAINING_PROPOSALS: tuple[TrainingProposal, ...] = get_args(TrainingProposal)


def check_proposal(proposal: str, method: str, captured: bool) -> None:
    """Refuse a proposal that a method or a mode of training does not have.

    Args:
        proposal: one of `TRAINING_PROPOSALS`.
        method: the training method's name.
        captured: whether the step is compiled, or one CUDA graph.

    Raises:
        ValueError: in one line that says why.
    """
    _checks.choice("proposal", proposal, TRAINING_PROPOSALS)
    if proposal == "linearized" and method == "dreg":
        raise ValueError(
            "method='dreg': proposal='linearized' passes no gradient on that could be "
            "reparameterised, give --method iwae"
        )
    if proposal == "linearized" and captured:
        raise ValueError(
            "proposal='linearized' is not captured: leave out --compile and --cuda-graph"
        )


class ImportanceWeighted(MonteCarlo):
    """log 1/K sum_k p(x|z_k) p(z_k) / q(z_k|x) (Burda, Grosse & Salakhutdinov 2016).

    A lower bound of log p(x) in expectation that tightens with K; K = 1 is the ELBO with a sampled
    KL divergence.

    With the proposal "linearized" z_k comes from the posterior of the decoder linearised at the
    encoder's mean, which takes q's place and passes no gradient on. The bound is one as well, and
    log p(x) itself for a linear decoder, whatever K and the encoder. It trains the decoder alone.
    The encoder is trained to predict the proposal, by KL(q || proposal), as `VariationalLaplace`
    does: that is the ELBO of q under the linearised decoder, up to a constant. Where they agree the
    encoder's mean is a mode of the posterior, and q can be evaluated without a linearisation.

    Args:
        decoder: f, ``z [B, m] -> [B, *out]``.
        proposal: "posterior", q(z|x), or "linearized".
        backend: of the linearisation's tangents, as in `SamplingFreeLoss`.
        **settings: those of `MonteCarlo`.

    Raises:
        ValueError: for a setting out of range.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        proposal: TrainingProposal = "posterior",
        backend: _checks.Backend = "auto",
        **settings: Any,
    ) -> None:
        super().__init__(decoder, **settings)
        _checks.choice("proposal", proposal, TRAINING_PROPOSALS)
        self.proposal, self.backend = proposal, backend

    def at_noise(self, x: Tensor, mean: Tensor, log_var: Tensor, noise: Tensor) -> Terms:
        """Evaluate at given noise, as `noise` draws it."""
        _checks.latent(mean, log_var)
        if self.proposal == "posterior":
            return super().at_noise(x, mean, log_var, noise)
        given = mean.dtype
        mean, log_var = wide(mean), wide(log_var)
        with torch.no_grad():
            c, _ = log_normalizer(1, self.noise_var)
            at = self.decoder, x, mean.detach()
            loc, factor = linearized_posterior(*at, c, self.backend)
            # The draw is no layer: autocast would leave eight bits of it.
            with torch.autocast(mean.device.type, enabled=False):
                z = (loc + (factor @ noise.unsqueeze(-1)).squeeze(-1)).to(given)
            # At the z that is decoded, whatever it was rounded to.
            off = (wide(z) - loc).unsqueeze(-1)
            whitened = torch.linalg.solve_triangular(factor, off, upper=False).squeeze(-1)
            log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            log_ratio = log_det + 0.5 * (whitened.square() - wide(z).square()).sum(-1)
        log_likelihood, squared_error = decode(self.decoder, x, z, self.noise_var)
        kl = gaussian_kl(mean, log_var)
        objective = self._objective(log_likelihood, Drawn(z, log_ratio), kl, (mean, log_var))
        loss = divergence(loc, factor, mean, log_var).mean() - objective.mean()
        logged = (
            t.detach() for t in (objective, log_likelihood.mean(0), kl, squared_error.mean(0))
        )
        return Terms(loss, *logged)

    def _objective(
        self, log_likelihood: Tensor, drawn: Drawn, kl: Tensor, posterior: tuple[Tensor, Tensor]
    ) -> Tensor:
        return log_mean_weight(log_likelihood + drawn.log_ratio)


def log_mean_weight(log_weight: Tensor) -> Tensor:
    """The logarithm ``[B]`` of the mean of weights given by theirs, ``[K, B]``."""
    # Below eps^2 of the largest a weight is lost in the sum. Its gradient, a subnormal number
    # before long, would take a CPU several times as long as a zero does.
    least = log_weight.detach().amax(0) + 2 * math.log(torch.finfo(log_weight.dtype).eps)
    log_weight = log_weight.masked_fill(log_weight < least, -math.inf)
    return log_weight.logsumexp(0) - math.log(len(log_weight))
