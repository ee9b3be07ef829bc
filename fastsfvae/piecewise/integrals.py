"""log p(x) and E_q|x - f(z)|^2 of a piecewise affine decoder of one latent, or of two.

With one latent a single line is all of the latent space, and its integral is a sum of closed forms.
With two, lines along the first axis are integrated in closed form, and the second latent y is
integrated over by Gauss's rule on panels that are halved until their halves agree. Along y the
integrand is smooth but for its second derivative, which jumps at vertices of the arrangement: there
the panels become small.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from fastsfvae import _checks
from fastsfvae.piecewise import gaussian as on_pieces
from fastsfvae.piecewise.trace import Pieces, latent_dim, trace

# Nodes of a panel.
_NODES = 8
# A panel whose halves change the whole by less than that share is done.
_TOLERANCE = 1e-10
# Nodes that hold less than that of the whole, for all images, are left out.
_NEGLIGIBLE = math.log(1e-18)
# What lies beyond the outer panels holds at most exp(-that) of the whole.
_BEYOND = 30.0
_LINES_AT_ONCE = 512
_MOST_LINES = 2**17
# Standard deviations of q around its mean: erfc(9 / sqrt 2) is 2e-19.
_REACH = 9.0


def log_marginal(decoder: nn.Module, x: Tensor, c: Tensor, m: int) -> Tensor:
    """Evaluate log p(x) without the constant -(n/2) log(2 pi c): ``[B]`` float64, in nats.

    Differentiable, once, in whatever has a gradient.

    Args:
        decoder: as `fastsfvae.piecewise.trace.trace` takes it.
        x: ``[B, *out]``.
        c: the noise variance, 0-d float64.
        m: latent dimensions, as `check_batch` counts them.

    Raises:
        TypeError, ValueError: as `trace`, or where two latents take too many lines.
    """
    if m == 1:
        return on_pieces.log_marginal(_line(decoder, x), x, c)[:, 0]

    def along(y: Tensor) -> Tensor:
        logs = [on_pieces.log_marginal(_lines(decoder, part), x, c) for part in _split(y)]
        return torch.cat(logs, 1) - 0.5 * (y.square() + math.log(2 * math.pi))

    y, log_width = _marginal_panels(decoder, x, c, along)
    return (along(y) + log_width).logsumexp(1)


def expected_squared_error(
    decoder: nn.Module, x: Tensor, mean: Tensor, log_var: Tensor, *, hold: bool = False
) -> Tensor:
    """E_q|x - f(z)|^2 for q = N(mean, diag(exp(log_var))): ``[B]`` float64.

    Differentiable, once, in whatever has a gradient.

    Args:
        decoder: as `fastsfvae.piecewise.trace.trace` takes it.
        x: ``[B, *out]``.
        mean: ``[B, m]``, as `check_batch` takes it.
        log_var: ``[B, m]``.
        hold: whether the decoder gets no gradient.

    Raises:
        TypeError, ValueError: as `log_marginal`.
    """
    mean, std = mean.double(), torch.exp(0.5 * log_var.double())
    first = mean[:, 0], std[:, 0]
    with_graph = torch.is_grad_enabled() and not hold
    if mean.shape[1] == 1:
        with torch.set_grad_enabled(with_graph):
            pieces = _line(decoder, x)
        return on_pieces.expected_squared_error(pieces, x, *first)[:, 0]

    def errors(y: Tensor) -> Tensor:
        found = []
        for part in _split(y):
            with torch.set_grad_enabled(with_graph and torch.is_grad_enabled()):
                pieces = _lines(decoder, part)
            found.append(on_pieces.expected_squared_error(pieces, x, *first))
        return torch.cat(found, 1)

    def log_density(y: Tensor) -> Tensor:
        e = (y - mean[:, 1:]) / std[:, 1:]
        return -0.5 * (e.square() + math.log(2 * math.pi)) - std[:, 1:].log()

    with torch.no_grad():
        low = float((mean - _REACH * std)[:, 1].min())
        high = float((mean + _REACH * std)[:, 1].max())
        edges = _edges(low, high, float(2 * std[:, 1].min()), x)
        # Of what is positive the logarithm; 0 has none.
        y, log_width = _refine(lambda y: errors(y).clamp_min(1e-300).log() + log_density(y), edges)
    return (errors(y) * torch.exp(log_density(y) + log_width)).sum(1)


def check_batch(decoder: nn.Module, x: Tensor, mean: Tensor | None = None) -> int:
    """Count the decoder's latents, once x is a batch of its data and mean one of its latents.

    Raises:
        TypeError: for a decoder that is not known to be piecewise affine, or data of another type.
        ValueError: for shapes that do not fit, or other than one or two latents.
    """
    m = latent_dim(decoder)
    if m not in (1, 2):
        raise ValueError(
            f"the decoder has m={m} latent dimensions: exact integrals take 1 or 2, use "
            "log_marginal_likelihood or sampled_elbo"
        )
    _checks.floating("x", x)
    if x.dim() < 2 or x.numel() == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}: give a batch [B, *out] that is not empty")
    if mean is not None and mean.shape[1] != m:
        raise ValueError(f"mean has shape {tuple(mean.shape)} but the decoder takes m={m} latents")
    return m


def _line(decoder: nn.Module, x: Tensor) -> Pieces:
    origin = torch.zeros(1, 1, dtype=torch.float64, device=x.device)
    return trace(decoder, origin, torch.ones_like(origin[0]))


def _lines(decoder: nn.Module, y: Tensor, axis: int = 0) -> Pieces:
    """Lines along an axis of the plane at the other coordinate y, ``[K]``."""
    unit = torch.eye(2, dtype=y.dtype, device=y.device)
    return trace(decoder, y.unsqueeze(1) * unit[1 - axis], unit[axis])


def _split(y: Tensor) -> tuple[Tensor, ...]:
    return y.split(_LINES_AT_ONCE)


@torch.no_grad()
def _marginal_panels(
    decoder: nn.Module, x: Tensor, c: Tensor, along: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    reach = _REACH
    while True:
        # The integrand is nowhere narrower than the steepest slope makes it.
        across = torch.linspace(-reach, reach, 65, dtype=torch.float64, device=x.device)
        pieces = _lines(decoder, across, axis=1)
        near = (pieces.left < reach) & (pieces.right > -reach)
        steepest = pieces.slope[near].flatten(1).square().sum(1).max()
        edges = _edges(-reach, reach, float(2 / (1 + steepest / c).sqrt()), x)
        # To a few percent, which is enough here.
        least = float((along(edges) + (edges[1] - edges[0]).log()).logsumexp(1).min())
        # p(x | z) is at most 1 in these units, so that exp(-reach^2 / 2) bounds what lies beyond.
        needed = math.sqrt(2 * (_BEYOND - least))
        if not needed > reach:
            return _refine(along, edges)
        reach = needed


def _edges(low: float, high: float, width: float, like: Tensor) -> Tensor:
    count = (high - low) / width
    if not count * _NODES <= _MOST_LINES:
        raise _too_many()
    return torch.linspace(low, high, math.ceil(count) + 1, dtype=torch.float64, device=like.device)


def _refine(log_integrand: Callable[[Tensor], Tensor], edges: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes y and logarithms of their weights, ``[K]`` each, for integrals of exp(log_integrand).

    Args:
        log_integrand: of y ``[K]``, ``[B, K]``: of B functions that share the nodes.
        edges: of the panels to begin with, rising.

    Raises:
        ValueError: where more than `_MOST_LINES` nodes do not suffice.
    """
    unit, weight = (
        torch.from_numpy(t).to(edges.device) for t in np.polynomial.legendre.leggauss(_NODES)
    )

    def panels(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        half = 0.5 * (high - low).unsqueeze(1)
        nodes, log_width = half * unit + (low.unsqueeze(1) + half), (half * weight).log()
        values = log_integrand(nodes.flatten()).unflatten(1, nodes.shape) + log_width
        return nodes, log_width, values

    low, high = edges[:-1], edges[1:]
    coarse = panels(low, high)[2].logsumexp(2)
    whole = torch.full_like(coarse[:, 0], -math.inf)
    used, kept = coarse.shape[1] * _NODES, []
    while len(low):
        middle = 0.5 * (low + high)
        low, high = (torch.stack(ends, 1).flatten() for ends in ((low, middle), (middle, high)))
        used += len(low) * _NODES
        if used > _MOST_LINES:
            raise _too_many()
        nodes, log_width, values = panels(low, high)
        halves = values.logsumexp(2)
        fine = halves.unflatten(1, (-1, 2)).logsumexp(2)
        total = torch.logaddexp(whole, fine.logsumexp(1)).unsqueeze(1)
        change = (torch.exp(fine - total) - torch.exp(coarse - total)).abs().amax(0)
        # NaN is no reason to go on: it is to be seen.
        open_ = (change > _TOLERANCE).repeat_interleave(2)
        whole = torch.logaddexp(whole, halves[:, ~open_].logsumexp(1))
        kept.append((nodes[~open_], log_width[~open_], values[:, ~open_]))
        low, high, coarse = low[open_], high[open_], halves[:, open_]
    nodes, log_width = (torch.cat([k[i] for k in kept]).flatten() for i in (0, 1))
    share = torch.cat([k[2] for k in kept], 1).flatten(1) - whole.unsqueeze(1)
    matters = ~(share.amax(0) < _NEGLIGIBLE)
    return nodes[matters], log_width[matters]


def _too_many() -> ValueError:
    return ValueError(
        f"two latents take more than {_MOST_LINES} lines here: give fewer images at a time or a "
        "larger noise_var, or use log_marginal_likelihood or sampled_elbo"
    )
