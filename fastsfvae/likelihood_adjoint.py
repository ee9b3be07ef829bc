"""The likelihoods of `fastsfvae.likelihood` with their gradients by hand, for a chunk of samples.

With cotangents a of log_likelihood and b_rr, b_ld, b_ex of the terms, and lambda, gamma as there:

    g_ld = b_ld - lambda a / 2        g_ex = b_ex + gamma a / (2c)        g_rr = b_rr - a / (2c)
    dc = sum a ((rr - gamma explained) / (2 c^2) - n / (2c)) + what the primitive gives
    dgamma = sum a explained / (2c)   (- sum a log_det / 2 for "mixture")

"normalized" subtracts a second log-determinant at (1 - gamma) h, through which gamma enters again.
"expected" reads the row norms of J alone: log_det = sum h_i |J_i|^2 / c.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastsfvae.likelihood import (
    expected_terms,
    log_det_weight,
    log_likelihood,
    second_variance,
)
from fastsfvae.ops.low_rank import Solved, low_rank_backward, low_rank_forward

# Rows of a terms tensor [4, B].
LOG_LIKELIHOOD, SQUARED_ERROR, LOG_DET, EXPLAINED = range(4)


class Kind(NamedTuple):
    """What a likelihood is besides its tensors."""

    likelihood: str
    backend: str


class Gradients(NamedTuple):
    """Gradients of `evaluate`'s tensors; those of c and gamma are 0-d."""

    residual: Tensor
    latent_var: Tensor
    noise_var: Tensor
    gamma: Tensor


class Evaluated(NamedTuple):
    """A chunk's terms ``[4, b]`` in the order of the constants above, and what `pull` needs."""

    terms: Tensor
    solved: Solved | None
    row_norms: Tensor | None


def evaluate(J: Tensor, r: Tensor, h: Tensor, c: Tensor, gamma: Tensor, kind: Kind) -> Evaluated:
    """Terms of a chunk.

    Args:
        J: ``[b, m, n]``.
        r: ``[b, n]``.
        h: ``[b, m]``, in float32 at least, like c and gamma.
        c: 0-d.
        gamma: 0-d.
        kind: the likelihood and the resolved backend.
    """
    b, n = r.shape
    solved = row_norms = None
    if kind.likelihood == "expected":
        rr, log_det, explained, row_norms = expected_terms(J, r, h, c)
    else:
        second_var = second_variance(h, gamma, kind.likelihood)
        solved = low_rank_forward(J, r, h, c.expand(b), second_var, kind.backend)
        rr, log_det, explained = solved.squared_error, solved.first.log_det, solved.first.explained
        if solved.second is not None:
            log_det = log_det - solved.second.log_det
    value = log_likelihood(rr, log_det, explained, n, c, gamma, kind.likelihood)
    return Evaluated(torch.stack([value, rr, log_det, explained]), solved, row_norms)


def pull(
    evaluated: Evaluated,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    cotangents: Tensor,
    out: Tensor,
    kind: Kind,
) -> Gradients:
    """Gradients of a chunk; dJ is written into `out`.

    Args:
        evaluated: what `evaluate` returned.
        inputs: its tensors (J, r, h, c, gamma).
        cotangents: of the terms, ``[4, b]``.
        out: ``[b, m, n]``.
        kind: as in `evaluate`.
    """
    J, r, h, c, gamma = inputs
    a, b_rr, b_ld, b_ex = cotangents
    _, rr, log_det, explained = evaluated.terms
    g_ld = b_ld - 0.5 * log_det_weight(kind.likelihood, gamma) * a
    g_ex = b_ex + gamma / (2 * c) * a
    g_rr = b_rr - a / (2 * c)
    dc = (a * (rr - gamma * explained)).sum() / (2 * c * c) - a.sum() * r.shape[1] / (2 * c)
    dgamma = (a * explained).sum() / (2 * c)
    if kind.likelihood == "mixture":
        dgamma = dgamma - 0.5 * (a * log_det).sum()
    if evaluated.solved is None:
        assert evaluated.row_norms is not None
        rate = g_ld.unsqueeze(-1) / c
        torch.mul(J, (2 * rate * h).unsqueeze(-1).to(J.dtype), out=out)
        dh = rate * evaluated.row_norms
        dc = dc - (g_ld * log_det).sum() / c
        return Gradients((2 * g_rr.unsqueeze(-1) * r).to(r.dtype), dh, dc, torch.zeros_like(c))
    second_var = second_variance(h, gamma, kind.likelihood)
    normalized = second_var is not None
    g = low_rank_backward(
        evaluated.solved,
        (J, r, h, c.expand(len(r)), second_var),
        (g_ld, g_ex, g_rr, -g_ld if normalized else None),
        (True, True, True, True, normalized),
        kind.backend,
        out,
    )
    assert g.residual is not None and g.latent_var is not None and g.noise_var is not None
    dh = g.latent_var
    if g.second_var is not None:
        dh = dh + (1 - gamma) * g.second_var
        dgamma = dgamma - (g.second_var * h).sum()
    return Gradients(g.residual, dh, dc + g.noise_var.sum(), dgamma)
