"""The exact log p(x) of a piecewise affine decoder with one or two latents."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastsfvae import _checks
from fastsfvae.likelihoods import gaussian_kl
from fastsfvae.objectives.terms import Terms
from fastsfvae.piecewise import integrals
from fastsfvae.piecewise.trace import layers


def check_model(model: str, latent_dim: int, output_activation: str) -> None:
    """Refuse a model of the training command that has no pieces, or too many of them.

    Raises:
        ValueError: in one line.
    """
    given = f"method='exact-marginal' with model={model!r}"
    if model == "tanh" or output_activation != "none":
        raise ValueError(
            f"{given} and output_activation={output_activation!r}: a smooth decoder has no pieces, "
            "give --model mlp and --output-activation none"
        )
    if model == "conv":
        raise ValueError(f"{given}: its thousands of ReLUs would take too long, give --model mlp")
    if latent_dim != 1:
        raise ValueError(
            f"{given} and latent_dim={latent_dim}: training by log p(x) is for --latent-dim 1"
        )


class ExactMarginal:
    """The exact log p(x), in place of a bound (Balestriero, Paris & Baraniuk 2020, by gradients).

    The decoder is trained by log p(x), which knows no encoder. The encoder is trained by the exact
    ELBO of the decoder as it is, which leads q(z|x) to the posterior, so that it can be used, and
    evaluated. Nothing is drawn. Time grows with pieces times pixels: for tiny decoders.
    With two latents a step takes seconds to minutes.

    Args:
        decoder: f, as `fastsfvae.evaluate.exact_log_marginal_likelihood` takes it.
        noise_var: c, variance of the observation noise in squared units of x.

    Raises:
        TypeError: for a layer that is not known to be piecewise affine.
        ValueError: for a setting out of range, or a layer whose training mode is another function.
    """

    def __init__(self, decoder: nn.Module, *, noise_var: float = 0.5) -> None:
        _checks.noise_var(noise_var)
        for _ in layers(decoder):
            pass
        self.decoder, self.noise_var = decoder, noise_var

    def __call__(
        self, x: Tensor, mean: Tensor, log_var: Tensor, *, generator: torch.Generator | None = None
    ) -> Terms:
        """Evaluate; see `Objective`.

        `objective` is log p(x); the other terms are those of the exact ELBO. The loss has
        KL(q(z|x) || p(z|x)) besides, and so the negative ELBO's value.
        """
        _checks.latent(mean, log_var)
        _checks.batch(x, mean)
        m = integrals.check_batch(self.decoder, x, mean)
        c, n = torch.tensor(self.noise_var, dtype=torch.float64, device=x.device), x[0].numel()
        constant = -0.5 * n * math.log(2 * math.pi * self.noise_var)
        log_marginal = constant + integrals.log_marginal(self.decoder, x, c, m)
        error = integrals.expected_squared_error(self.decoder, x, mean, log_var, hold=True)
        log_likelihood = constant - error / (2 * c)
        kl = gaussian_kl(mean.double(), log_var.double())
        gap = log_marginal.detach() - (log_likelihood - kl)
        terms = (log_marginal, log_likelihood, kl, error)
        loss = (gap - log_marginal).mean().to(mean.dtype)
        return Terms(loss, *(t.detach().to(mean.dtype) for t in terms))
