"""Gaussian integrals along a piecewise affine decoder's lines, piece by piece in closed form.

On a piece f(z) = v + b u with u = z - s. With A = |x - v|^2 / c, Q = b.(x - v) / c, G = |b|^2 / c

    log N(x; f(z), cI) N(z; 0, 1) = -(n/2) log(2 pi c) - (A - 2 Q u + G u^2)/2 - z^2/2
                                    - log(2 pi)/2

is a parabola of curvature lambda = 1 + G, so that its exponential has the integral of a Gaussian
between two ends. With one latent the sum over a line's pieces is p(x): the exact marginal of
Balestriero, Paris & Baraniuk, "Analytical Probability Distributions and Exact
Expectation-Maximization for Deep Generative Networks" (NeurIPS 2020).

Each integral is taken in units of its largest integrand, which lies at the parabola's top or at the
end next to it. With the distance alpha of that point from the top, in units of lambda^-1/2, and
that delta to the other end, what is left is

    F_k(alpha, delta) = integral of t^k exp(-alpha t - t^2/2) over t from 0 to delta.

The gradients are those of the exact EM algorithm: the derivative of log p(x) is the posterior's
expectation of the parabola's, by its first two moments on each piece.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastsfvae.piecewise.trace import Pieces

# Integrals shorter than that times their scale lose their digits to a difference: their middle is
# taken instead. Either error is below 1e-11 of a piece that has 1e-5 of the mass.
_NARROW = 1e-5


class Forms(NamedTuple):
    """What a piece has of the data: |x - v|^2 and b.(x - v), ``[B, P]``, and |b|^2, ``[P]``."""

    squared: Tensor
    slope: Tensor
    curvature: Tensor


def forms(pieces: Pieces, x: Tensor) -> Forms:
    """Evaluate for x ``[B, n]``, in float64.

    Raises:
        ValueError: where the decoder's output is not shaped like x.
    """
    if pieces.value.shape[1:] != x.shape[1:]:
        raise ValueError(
            f"x has shape {tuple(x.shape)} but the decoder returns [B, "
            f"{', '.join(map(str, pieces.value.shape[1:]))}]: they must match"
        )
    x, value, slope = x.double().flatten(1), pieces.value.flatten(1), pieces.slope.flatten(1)
    # Of what the data's mean leaves, a difference of squares loses least.
    centre = x.detach().mean(0)
    x, value = x - centre, value - centre
    squared = x.square().sum(1, keepdim=True) - 2 * x @ value.T + value.square().sum(1)
    return Forms(squared, x @ slope.T - (value * slope).sum(1), slope.square().sum(1))


def log_marginal(pieces: Pieces, x: Tensor, c: Tensor) -> Tensor:
    """Integrate N(x; f(z), cI) N(s; 0, 1) ds over each of K lines; its logarithm ``[B, K]``, nats.

    Without the constant -(n/2) log(2 pi c).

    Args:
        pieces: of K lines.
        x: ``[B, *out]``.
        c: 0-d float64.
    """
    A, Q, G = (form / c for form in forms(pieces, x))
    return _LogIntegral.apply(A, Q, G, *pieces[:4])


class _LogIntegral(torch.autograd.Function):
    """log sum_p integral exp(-(A - 2 Q u + G u^2)/2) N(s; 0, 1) ds by line, ``[B, K]``."""

    @staticmethod
    def forward(ctx, A, Q, G, line, left, right, at):
        precision = 1 + G
        scale = precision.sqrt()
        low, high = left - at, right - at
        top = (Q - at) / precision
        peak = torch.minimum(torch.maximum(top, low), high)
        alpha = scale * (peak - top).abs()
        # One of the sides is empty unless the top lies within.
        rising = _moments(alpha, scale * (high - peak))
        falling = _moments(alpha, scale * (peak - low))
        F0 = rising[0] + falling[0]
        F1 = (rising[1] - falling[1]) / scale
        F2 = (rising[2] + falling[2]) / precision
        log_peak = -0.5 * (A - 2 * Q * peak + G * peak.square() + (at + peak).square())
        log_unit = log_peak - 0.5 * (precision.log() + math.log(2 * math.pi))
        result = _logsumexp(log_unit + F0.log(), line)
        unit = torch.exp(log_unit - result[:, line])
        # The posterior's mass on each piece, and its moments there of u.
        mass, first = unit * F0, unit * (peak * F0 + F1)
        second = unit * (peak.square() * F0 + 2 * peak * F1 + F2)
        ctx.save_for_backward(mass, first, second)
        ctx.line = line
        return result

    @staticmethod
    def backward(ctx, upstream):
        refuse_second_derivatives()
        mass, first, second = (upstream[:, ctx.line] * t for t in ctx.saved_tensors)
        return -0.5 * mass, first, -0.5 * second.sum(0), None, None, None, None


def _logsumexp(terms: Tensor, line: Tensor) -> Tensor:
    """Over the pieces ``[B, P]`` of each line: ``[B, K]``."""
    # The pieces are in order of their lines.
    shape = len(terms), int(line[-1]) + 1
    index = line.expand_as(terms)
    peak = terms.new_full(shape, -math.inf).scatter_reduce_(1, index, terms, "amax")
    total = terms.new_zeros(shape).index_add_(1, line, torch.exp(terms - peak[:, line]))
    return peak + total.log()


def refuse_second_derivatives() -> None:
    """Raise, in a backward, where create_graph asks for the gradient's own graph.

    Raises:
        RuntimeError: the backward runs with create_graph=True.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the exact log p(x) and ELBO have first derivatives only: leave out create_graph"
        )


def _moments(alpha: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """F_0, F_1 and F_2 of alpha >= 0 and delta >= 0, which may be infinite."""
    fall = delta * (alpha + 0.5 * delta)
    left = torch.exp(-fall)
    root = math.sqrt(0.5)
    tail = torch.special.erfcx(root * (alpha + delta))
    F0 = math.sqrt(0.5 * math.pi) * (torch.special.erfcx(root * alpha) - left * tail)
    F1 = -torch.expm1(-fall) - alpha * F0
    F2 = F0 - alpha * F1 - torch.where(delta.isinf(), 0.0, delta * left)
    narrow = delta * (1 + alpha) < _NARROW
    middle = delta * torch.exp(-0.5 * delta * (alpha + 0.25 * delta))
    return (
        torch.where(narrow, middle, F0.clamp_min(0)),
        torch.where(narrow, 0.5 * delta * middle, F1.clamp_min(0)),
        torch.where(narrow, delta.square() / 3 * middle, F2.clamp_min(0)),
    )


def expected_squared_error(pieces: Pieces, x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """E|x - f|^2 over s ~ N(mean, std^2) on each of K lines: ``[B, K]``.

    Args:
        pieces: of K lines.
        x: ``[B, *out]``.
        mean: ``[B]``, float64.
        std: ``[B]``, float64.
    """
    given = forms(pieces, x)
    mean, std = mean.unsqueeze(1), std.unsqueeze(1)
    with torch.no_grad():
        E0, E1, E2 = _standard_moments((pieces.left - mean) / std, (pieces.right - mean) / std)
    # Of s = mean + std e the parts of e are held: the integrand is continuous where they meet.
    shift = mean - pieces.at
    first = shift * E0 + std * E1
    second = shift.square() * E0 + 2 * shift * std * E1 + std.square() * E2
    error = given.squared * E0 - 2 * given.slope * first + given.curvature * second
    lines = error.new_zeros(len(x), int(pieces.line[-1]) + 1)
    return _Once.apply(lines.index_add(1, pieces.line, error))


def _standard_moments(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The integrals of 1, e and e^2 under N(0, 1) from low to high."""
    # In the upper tail the difference of the complements.
    above = low > 0
    E0 = torch.special.ndtr(torch.where(above, -low, high)) - torch.special.ndtr(
        torch.where(above, -high, low)
    )
    density = [torch.exp(-0.5 * e.square()) / math.sqrt(2 * math.pi) for e in (low, high)]
    ends = [torch.where(e.isinf(), 0.0, e * p) for e, p in zip((low, high), density, strict=True)]
    return E0, density[0] - density[1], E0 + ends[0] - ends[1]


class _Once(torch.autograd.Function):
    """The identity, whose gradient has no graph: that of the held parts would not be whole."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, upstream):
        refuse_second_derivatives()
        return upstream
