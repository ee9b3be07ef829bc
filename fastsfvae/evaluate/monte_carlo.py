"""Monte Carlo error of the sampling objective against the bias of the sampling-free one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastsfvae import _checks
from fastsfvae._checks import Likelihood
from fastsfvae.elbo import sampling_free_elbo
from fastsfvae.evaluate._decode import Progress
from fastsfvae.objectives.sampling import Sampling


class GradientError(NamedTuple):
    """Errors of one batch's loss and of its gradient, for K draws of q(z|x) an image.

    The gradient is that in (mean, log_var) and the decoder's parameters, as one vector; variances
    are summed over it. What is estimated is the negative ELBO, averaged over the batch: one image
    that decodes to what is not finite makes its numbers NaN.

    Attributes:
        samples: the K.
        loss_variance: of the loss, one for each K, in nats^2.
        gradient_variance: of the gradient, one for each K.
        loss_bias: sampling-free loss minus the mean of the sampled ones, in nats.
        gradient_bias: norm of the same difference of gradients, Monte Carlo noise subtracted.
        equal_loss_samples: the K at which the sampled loss's standard deviation equals |loss_bias|;
            infinite where the bias is within the noise.
        equal_gradient_samples: the same for the gradient.
    """

    samples: tuple[int, ...]
    loss_variance: tuple[float, ...]
    gradient_variance: tuple[float, ...]
    loss_bias: float
    gradient_bias: float
    equal_loss_samples: float
    equal_gradient_samples: float


def gradient_error(
    decoder: nn.Module,
    x: Tensor,
    mean: Tensor,
    log_var: Tensor,
    *,
    noise_var: float,
    gamma: float = 0.5,
    likelihood: Likelihood = "precision",
    samples: Sequence[int] = (1, 2, 5, 10, 20, 50, 100),
    repeats: int = 100,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> GradientError:
    """Measure the variance of the sampled loss and gradient, and the sampling-free bias.

    Args:
        decoder: f.
        x: one batch ``[B, *out]``.
        mean: ``[B, m]``.
        log_var: ``[B, m]``.
        noise_var: c.
        gamma: of the sampling-free objective.
        likelihood: of the sampling-free objective.
        samples: the K.
        repeats: evaluations for each K, at least 2.
        generator: source of the noise, on x's device.
        progress: called with the number of latents decoded since its last call.

    Raises:
        TypeError, ValueError, RuntimeError: as `sampling_free_elbo`, in one line.
    """
    _checks.tensors(x=x, mean=mean, log_var=log_var)
    if repeats < 2:
        raise ValueError(f"repeats={repeats} must be at least 2: a variance is measured")
    mean, log_var = (t.detach().requires_grad_() for t in (mean, log_var))
    variables = [mean, log_var, *(p for p in decoder.parameters() if p.requires_grad)]

    def with_gradient(loss: Tensor) -> Tensor:
        """The loss, then its gradient, in one vector."""
        grads = torch.autograd.grad(loss, variables, materialize_grads=True)
        parts = (loss.detach(), *grads)
        return torch.cat([part.flatten().double() for part in parts])

    spreads = []
    for count in samples:
        objective = Sampling(decoder, noise_var=noise_var, samples=count)
        spread = _Spread()
        for _ in range(repeats):
            spread.add(with_gradient(objective(x, mean, log_var, generator=generator).loss))
            if progress is not None:
                progress(count * len(x))
        spreads.append(spread.finish())
    elbo = sampling_free_elbo(
        decoder, x, mean, log_var, noise_var=noise_var, gamma=gamma, likelihood=likelihood
    ).elbo
    truth = torch.stack([spread_mean for spread_mean, _, _ in spreads]).mean(0)
    bias = with_gradient(-elbo.mean()) - truth
    loss_variance = [loss for _, loss, _ in spreads]
    gradient_variance = [gradient for _, _, gradient in spreads]
    # The truth is a mean itself: its own noise is taken off the squared bias.
    averaged = repeats * len(samples) ** 2
    squared_loss_bias = float(bias[0].square()) - sum(loss_variance) / averaged
    squared_gradient_bias = float(bias[1:].square().sum()) - sum(gradient_variance) / averaged
    return GradientError(
        tuple(samples),
        tuple(loss_variance),
        tuple(gradient_variance),
        float(bias[0]),
        max(squared_gradient_bias, 0.0) ** 0.5,
        _equal(samples, loss_variance, squared_loss_bias),
        _equal(samples, gradient_variance, squared_gradient_bias),
    )


class _Spread:
    """Running mean and variance of vectors whose first entry counts apart."""

    def __init__(self) -> None:
        self._origin: Tensor | None = None
        self._count = 0

    def add(self, vector: Tensor) -> None:
        if self._origin is None:
            self._origin = vector
            self._sum, self._square = torch.zeros_like(vector), torch.zeros_like(vector)
        # Deviations from the first vector do not cancel.
        deviation = vector - self._origin
        self._sum += deviation
        self._square += deviation.square()
        self._count += 1

    def finish(self) -> tuple[Tensor, float, float]:
        """The mean; the variance of the first entry; the sum of the others' variances."""
        assert self._origin is not None
        mean = self._sum / self._count
        # Of numbers that are all alike, rounding may make it negative.
        variance = ((self._square - self._count * mean.square()) / (self._count - 1)).clamp_min(0)
        return self._origin + mean, float(variance[0]), float(variance[1:].sum())


def _equal(samples: Sequence[int], variance: Sequence[float], squared_bias: float) -> float:
    """The K with v / K = bias^2, v the average of K times the variances that were measured."""
    v = sum(k * value for k, value in zip(samples, variance, strict=True)) / len(samples)
    # A NaN is no bias of zero.
    return math.inf if squared_bias <= 0 else v / squared_bias
