"""Monte Carlo error of the sampling objective against the bias of the sampling-free one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastsfvae import _checks
from fastsfvae._checks import Likelihood
from fastsfvae._noise import Draws
from fastsfvae.elbo import sampling_free_elbo
from fastsfvae.evaluate._decode import Progress
from fastsfvae.objectives.sampling import Sampling

# Independent parts of the draws: products across them are free of the draws' noise, and leaving one
# out at a time gives the errors (the jackknife). Each holds a gradient in float64.
_BLOCKS = 10


class GradientPart(NamedTuple):
    """Scale and direction of a gradient's error, in the decoder's or the encoder's part of it.

    The true gradient g is that of the negative ELBO, from all draws. Its noise is taken off |g|^2,
    off |bias|^2 and off the inner product, which are means over pairs of independent parts of the
    draws; so a cosine may pass 1 by its error, and a bias within the noise may come out as 0.
    Errors are standard ones, by leaving out a part at a time; NaN for fewer than 3 repeats. All
    that is relative to g is NaN where g is 0 or lost in the noise.

    Attributes:
        norm: |g|.
        norm_error: its standard error.
        relative_bias: |objective's gradient - g| / |g|.
        relative_bias_error: its standard error.
        cosine: of the angle between the objective's gradient and g.
        cosine_error: its standard error.
        relative_deviation: of the sampled gradient, one for each K: the root of its summed
            variances over |g|. At a deviation d its cosine with g is about 1 / sqrt(1 + d^2).
        equal_samples: the K at which that deviation equals the bias, as `equal_loss_samples`; its
            relative error is about twice that of `relative_bias`.
    """

    norm: float
    norm_error: float
    relative_bias: float
    relative_bias_error: float
    cosine: float
    cosine_error: float
    relative_deviation: tuple[float, ...]
    equal_samples: float


class GradientError(NamedTuple):
    """Errors of one batch's loss and of its gradient, for K draws of q(z|x) an image.

    The gradient is that in the encoder's and the decoder's parameters, as one vector; variances
    are summed over it. Where no encoder was given, (mean, log_var) stand for its parameters. What
    is estimated is the negative ELBO, averaged over the batch: one image that decodes to what is
    not finite makes its numbers NaN.

    Attributes:
        samples: the K.
        loss_variance: of the loss, one for each K, in nats^2.
        gradient_variance: of the gradient, one for each K.
        loss_bias: sampling-free loss minus the mean of the sampled ones, in nats.
        gradient_bias: norm of the same difference of gradients, Monte Carlo noise subtracted.
        equal_loss_samples: the K at which the sampled loss's standard deviation equals |loss_bias|;
            infinite where the bias is within the noise.
        equal_gradient_samples: the same for the gradient.
        encoder: scale and direction in the encoder's part of the gradient.
        decoder: the same in the decoder's.
    """

    samples: tuple[int, ...]
    loss_variance: tuple[float, ...]
    gradient_variance: tuple[float, ...]
    loss_bias: float
    gradient_bias: float
    equal_loss_samples: float
    equal_gradient_samples: float
    encoder: GradientPart
    decoder: GradientPart


def gradient_error(
    decoder: nn.Module,
    x: Tensor,
    mean: Tensor,
    log_var: Tensor,
    *,
    noise_var: float,
    gamma: float = 0.5,
    likelihood: Likelihood = "precision",
    encoder: nn.Module | None = None,
    samples: Sequence[int] = (1, 2, 5, 10, 20, 50, 100),
    draws: Draws = "iid",
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
        encoder: x -> (mean, log_var), whose parameters' gradient is meant; None takes the gradient
            in the given mean and log_var in its place, which is another vector: a small error in
            one is not always small in the other.
        samples: the K.
        draws: how the draws of an image hang together, as in `sampled_elbo`. What falls as 1 / K
            of independent ones, and `equal_samples` with it, falls faster of orthogonal ones.
        repeats: evaluations for each K, at least 2.
        generator: source of the noise, on x's device.
        progress: called with the number of latents decoded since its last call.

    Raises:
        TypeError, ValueError, RuntimeError: as `sampling_free_elbo`, in one line; for an encoder
            that does not give this mean and log_var, or shares parameters with the decoder.
    """
    settings = {"gamma": gamma, "likelihood": likelihood}
    (error,) = gradient_errors(
        *(decoder, x, mean, log_var),
        noise_var=noise_var,
        objectives=[settings],
        encoder=encoder,
        samples=samples,
        draws=draws,
        repeats=repeats,
        generator=generator,
        progress=progress,
    )
    return error


def gradient_errors(
    decoder: nn.Module,
    x: Tensor,
    mean: Tensor,
    log_var: Tensor,
    *,
    noise_var: float,
    objectives: Sequence[Mapping[str, Any]],
    encoder: nn.Module | None = None,
    samples: Sequence[int] = (1, 2, 5, 10, 20, 50, 100),
    draws: Draws = "iid",
    repeats: int = 100,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> list[GradientError]:
    """`gradient_error` of several objectives against the same sampled gradients.

    Args, raises: as `gradient_error`; `objectives` are the `gamma` and `likelihood` of each.
    """
    _checks.tensors(x=x, mean=mean, log_var=log_var)
    if repeats < 2:
        raise ValueError(f"repeats={repeats} must be at least 2: a variance is measured")
    if not samples:
        raise ValueError("samples is empty: name at least one K, as in samples=(1, 10)")
    if encoder is None:
        mean, log_var = (t.detach().requires_grad_() for t in (mean, log_var))
        of_encoder = [mean, log_var]
    else:
        mean, log_var = _encoded(encoder, x, mean, log_var)
        of_encoder = [p for p in encoder.parameters() if p.requires_grad]
    of_decoder = [p for p in decoder.parameters() if p.requires_grad]
    if {id(p) for p in of_encoder} & {id(p) for p in of_decoder}:
        raise ValueError("encoder and decoder share parameters: a gradient has no part of either")
    variables = [*of_encoder, *of_decoder]

    def with_gradient(loss: Tensor) -> Tensor:
        """The loss, then its gradient, in one vector."""
        grads = torch.autograd.grad(
            loss, variables, materialize_grads=True, retain_graph=encoder is not None
        )
        parts = (loss.detach(), *grads)
        return torch.cat([part.flatten().double() for part in parts])

    given = decoder, x, mean, log_var
    judged = [
        with_gradient(-sampling_free_elbo(*given, noise_var=noise_var, **settings).elbo.mean())
        for settings in objectives
    ]
    variances, blocks = [], _Blocks(judged[0], min(repeats, _BLOCKS))
    for count in samples:
        sampled = Sampling(decoder, noise_var=noise_var, samples=count, draws=draws)
        spread = _Spread()
        for repeat in range(repeats):
            vector = with_gradient(sampled(x, mean, log_var, generator=generator).loss)
            spread.add(vector)
            blocks.add(repeat * len(blocks) // repeats, vector, count)
            if progress is not None:
                progress(count * len(x))
        variances.append(spread.variance())
    end = 1 + sum(v.numel() for v in of_encoder)
    return [_error(objective, blocks, variances, samples, end) for objective in judged]


def _error(
    objective: Tensor,
    blocks: _Blocks,
    variances: Sequence[Tensor],
    samples: Sequence[int],
    end: int,
) -> GradientError:
    """Of one objective's loss and gradient, whose encoder's part ends at `end`."""
    differences = blocks.minus(objective)
    loss, *parts = (
        _Truth(objective[part], differences[:, part], [float(v[part].sum()) for v in variances])
        for part in (slice(1), slice(1, end), slice(end, None))
    )
    squared_bias = sum(part.squared_bias for part in parts)
    gradient_variance = [sum(both) for both in zip(*(p.variances for p in parts), strict=True)]
    return GradientError(
        tuple(samples),
        tuple(loss.variances),
        tuple(gradient_variance),
        -blocks.mean_difference(objective),
        max(squared_bias, 0.0) ** 0.5,
        _equal(samples, loss.variances, loss.squared_bias),
        _equal(samples, gradient_variance, squared_bias),
        *(part.summary(samples) for part in parts),
    )


def _encoded(encoder: nn.Module, x: Tensor, mean: Tensor, log_var: Tensor) -> list[Tensor]:
    """The encoder's mean and log_var of x, in its graph; they must be the given ones."""
    if not isinstance(encoder, nn.Module):
        raise TypeError(f"encoder is a {type(encoder).__name__}: give the nn.Module that made mean")
    if not any(p.requires_grad for p in encoder.parameters()):
        raise ValueError("encoder has no parameter that requires a gradient: leave it out")
    found = encoder(x)
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise TypeError(f"encoder returned a {type(found).__name__}: it must be (mean, log_var)")
    for name, given, own in zip(("mean", "log_var"), (mean, log_var), found, strict=True):
        # Another batch size may round it differently; another encoder, or dropout, is further off.
        if given.shape != own.shape or not torch.allclose(
            given.to(own), own, rtol=1e-2, atol=1e-2, equal_nan=True
        ):
            raise ValueError(
                f"{name} {tuple(given.shape)} is not encoder(x)'s {tuple(own.shape)}, or holds "
                "other numbers: give what this encoder returns for x, in evaluation mode"
            )
    return list(found)


class _Truth:
    """What one part of the vectors says of the true gradient and of the objective's.

    Args:
        objective: the objective's gradient a, ``[D]``.
        differences: g_b - a of each block of draws, ``[blocks, D]``.
        variances: of the sampled gradient, one for each K.
    """

    def __init__(self, objective: Tensor, differences: Tensor, variances: list[float]) -> None:
        self._gram = differences @ differences.mT
        self._along = differences @ objective
        self._square = objective.square().sum()
        self.variances = variances
        self._moments = self._without(None)
        self.squared_bias = float(self._moments[1])

    def _without(self, block: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """|g|^2, |bias|^2 and a^T g, of all blocks but one."""
        kept = [i for i in range(len(self._gram)) if i != block]
        gram, along = self._gram[kept][:, kept], self._along[kept].mean()
        pairs = len(kept) * (len(kept) - 1)
        squared_bias = (gram.sum() - gram.trace()) / pairs
        # g = a + (g - a).
        return self._square + 2 * along + squared_bias, squared_bias, self._square + along

    def _numbers(self, moments: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """|g|, relative bias and cosine."""
        truth, squared_bias, inner = moments
        truth = torch.where(truth > 0, truth, math.nan)
        relative = (squared_bias.clamp_min(0) / truth).sqrt()
        return torch.stack([truth.sqrt(), relative, inner / (self._square * truth).sqrt()])

    def summary(self, samples: Sequence[int]) -> GradientPart:
        """Both gradients' numbers, with their errors."""
        numbers, blocks = self._numbers(self._moments), len(self._gram)
        errors = torch.full_like(numbers, math.nan)
        if blocks > 2:
            left = torch.stack([self._numbers(self._without(i)) for i in range(blocks)])
            errors = ((blocks - 1) * left.var(0, correction=0)).sqrt()
        (norm, bias, cosine), error = numbers.tolist(), errors.tolist()
        return GradientPart(
            *(norm, error[0], bias, error[1], cosine, error[2]),
            tuple(v**0.5 / norm if norm > 0 else math.nan for v in self.variances),
            _equal(samples, self.variances, self.squared_bias),
        )


class _Blocks:
    """Means of the vectors of each block, evaluations weighted by their K.

    Held as differences from an origin near them, which do not cancel where an objective is nearly
    right.
    """

    def __init__(self, origin: Tensor, count: int) -> None:
        self._origin = origin
        self._sums = origin.new_zeros(count, len(origin))
        self._weights = origin.new_zeros(count, 1)

    def __len__(self) -> int:
        return len(self._sums)

    def add(self, block: int, vector: Tensor, weight: int) -> None:
        self._sums[block].add_(vector - self._origin, alpha=weight)
        self._weights[block] += weight

    def mean_difference(self, objective: Tensor) -> float:
        """The first entry's mean over all draws, minus the objective's."""
        mean = self._sums[:, 0].sum() / self._weights.sum()
        return float(mean + (self._origin[0] - objective[0]))

    def minus(self, objective: Tensor) -> Tensor:
        """The means minus the objective's vector, ``[blocks, D]``."""
        return self._sums / self._weights + (self._origin - objective)


class _Spread:
    """Running variance of vectors, entry by entry."""

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

    def variance(self) -> Tensor:
        """Of each entry."""
        mean = self._sum / self._count
        # Of numbers that are all alike, rounding may make it negative.
        return ((self._square - self._count * mean.square()) / (self._count - 1)).clamp_min(0)


def _equal(samples: Sequence[int], variance: Sequence[float], squared_bias: float) -> float:
    """The K with v / K = bias^2, v the average of K times the variances that were measured."""
    v = sum(k * value for k, value in zip(samples, variance, strict=True)) / len(samples)
    # A NaN is no bias of zero.
    return math.inf if squared_bias <= 0 else v / squared_bias
