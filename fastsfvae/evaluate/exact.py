"""Exact log p(x) and ELBO of piecewise affine decoders with one or two latents."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastsfvae import _checks
from fastsfvae.evaluate._decode import constant
from fastsfvae.likelihoods import gaussian_kl
from fastsfvae.piecewise import integrals

# Images whose integrals exist at one time, each with all pieces; two latents share their lines.
_IMAGES = 256


class ExactElbo(NamedTuple):
    """The ELBO without sampling, ``[N]`` float64 each, unless said otherwise.

    Attributes:
        elbo: log_likelihood - kl, in nats.
        log_likelihood: E_q[log N(x; f(z), cI)].
        kl: KL(q(z|x) || N(0, I)).
        squared_error: E_q|x - f(z)|^2.
        constant: -(n/2) log(2 pi c), 0-d, in nats; part of `elbo` and `log_likelihood`.
    """

    elbo: Tensor
    log_likelihood: Tensor
    kl: Tensor
    squared_error: Tensor
    constant: Tensor


def exact_log_marginal_likelihood(
    decoder: nn.Module, x: Tensor, *, noise_var: float | Tensor
) -> Tensor:
    """Evaluate log p(x) of a continuous piecewise affine decoder with m = 1 or 2.

    With one latent it is closed form: the decoder's knots are found as the roots that they are, and
    the integral over each piece is a Gaussian's between two knots (Balestriero, Paris & Baraniuk,
    "Analytical Probability Distributions and Exact Expectation-Maximization for Deep Generative
    Networks", NeurIPS 2020). Only float64 rounding is left, some 1e-15 of the largest of n,
    |x|^2 / c and |log p(x)|. With two latents lines along the first are integrated so, and Gauss's
    rule goes over the second on panels that are halved until each changes p(x) by less than 1e-10
    of it, for every image; in the tests the error stays below 1e-8 nats.

    Differentiable, once, in the decoder's parameters, x and noise_var. Computed in float64 whatever
    the decoder's dtype. Time and memory grow with pieces times pixels times images, and with two
    latents with some thousand lines besides: for tiny decoders.

    Args:
        decoder: an ``nn.Sequential`` (of such) of Linear, convolutions and transposed ones, ReLU,
            LeakyReLU, PReLU, ReLU6, Hardtanh, Flatten, Unflatten, Identity, and in evaluation mode
            Dropout and BatchNorm; z ``[B, m] -> [B, *out]``.
        x: ``[N, *out]``, floating point, on the decoder's device.
        noise_var: c, in squared units of x.

    Returns:
        ``[N]`` float64, in nats, the constant -(n/2) log(2 pi c) included.

    Raises:
        TypeError: for a layer that is not known to be piecewise affine, or data of another type.
        ValueError: for m >= 3, shapes that do not fit, a layer in training mode, or pieces or lines
            that are too many; all in one line.
    """
    _checks.noise_var(noise_var)
    m = integrals.check_batch(decoder, x)
    c = torch.as_tensor(noise_var, dtype=torch.float64, device=x.device)
    logs = [integrals.log_marginal(decoder, part, c, m) for part in x.split(_IMAGES)]
    return torch.cat(logs) + constant(x, noise_var)


def exact_elbo(
    decoder: nn.Module, x: Tensor, mean: Tensor, log_var: Tensor, *, noise_var: float | Tensor
) -> ExactElbo:
    """The ELBO of such a decoder, by the truncated Gaussian moments of q(z|x) on each piece.

    Differentiable, once, in the decoder's parameters, x, mean, log_var and noise_var. With two
    latents, as for `exact_log_marginal_likelihood`, to 1e-10 of the squared error a panel.

    Args:
        decoder: as `exact_log_marginal_likelihood`, with the posterior's m.
        x: ``[N, *out]``, floating point.
        mean: ``[N, m]``.
        log_var: ``[N, m]``; q(z|x) = N(mean, diag(exp(log_var))).
        noise_var: c, in squared units of x.

    Raises:
        TypeError, ValueError: as `exact_log_marginal_likelihood`.
    """
    _checks.noise_var(noise_var)
    _checks.latent(mean, log_var)
    _checks.batch(x, mean)
    integrals.check_batch(decoder, x, mean)
    parts = zip(*(t.split(_IMAGES) for t in (x, mean, log_var)), strict=True)
    error = torch.cat([integrals.expected_squared_error(decoder, *part) for part in parts])
    offset = constant(x, noise_var)
    log_likelihood = offset - error / (2 * noise_var)
    kl = gaussian_kl(mean.double(), log_var.double())
    return ExactElbo(log_likelihood - kl, log_likelihood, kl, error, offset)
