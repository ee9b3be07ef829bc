"""The likelihoods of `fastsfvae.likelihoods` with their gradients by hand, for a chunk of samples.

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

from fastsfvae.gram.sources import ChunkGram, Pulled
from fastsfvae.likelihoods import (
    expected_log_det,
    log_det_weight,
    log_likelihood,
    second_variance,
)
from fastsfvae.ops.low_rank import Solved, gram_cotangents, variance_gradients

# Rows of a terms tensor [4, B].
LOG_LIKELIHOOD, SQUARED_ERROR, LOG_DET, EXPLAINED = range(4)


class Gradients(NamedTuple):
    """Gradients of the chunk itself, and of `evaluate`'s other tensors; of c and gamma 0-d."""

    chunk: Pulled
    latent_var: Tensor
    noise_var: Tensor
    gamma: Tensor


class Evaluated(NamedTuple):
    """A chunk's terms ``[4, b]`` in the order of the constants above, and what `pull` needs."""

    terms: Tensor
    solved: Solved | None
    row_norms: Tensor | None


def evaluate(chunk: ChunkGram, h: Tensor, c: Tensor, gamma: Tensor, likelihood: str) -> Evaluated:
    """Terms of a chunk.

    Args:
        chunk: b samples.
        h: ``[b, m]``, in float32 at least, like c and gamma.
        c: 0-d.
        gamma: 0-d.
        likelihood: one of `LIKELIHOODS`.
    """
    solved = row_norms = None
    if likelihood == "expected":
        rr, row_norms = chunk.norms(c.dtype)
        log_det, explained = expected_log_det(row_norms, h, c), torch.zeros_like(rr)
    else:
        second_var = second_variance(h, gamma, likelihood)
        solved = chunk.solve(h, c.expand(len(h)), second_var)
        rr, log_det, explained = solved.squared_error, solved.first.log_det, solved.first.explained
        if solved.second is not None:
            log_det = log_det - solved.second.log_det
    value = log_likelihood(rr, log_det, explained, chunk.n, c, gamma, likelihood)
    return Evaluated(torch.stack([value, rr, log_det, explained]), solved, row_norms)


def pull(
    evaluated: Evaluated,
    chunk: ChunkGram,
    variances: tuple[Tensor, Tensor, Tensor],
    cotangents: Tensor,
    likelihood: str,
) -> Gradients:
    """Gradients of a chunk.

    Args:
        evaluated: what `evaluate` returned.
        chunk: as in `evaluate`.
        variances: its tensors (h, c, gamma).
        cotangents: of the terms, ``[4, b]``.
        likelihood: as in `evaluate`.
    """
    h, c, gamma = variances
    a, b_rr, b_ld, b_ex = cotangents
    _, rr, log_det, explained = evaluated.terms
    g_ld = b_ld - 0.5 * log_det_weight(likelihood, gamma) * a
    g_ex = b_ex + gamma / (2 * c) * a
    g_rr = b_rr - a / (2 * c)
    dc = (a * (rr - gamma * explained)).sum() / (2 * c * c) - a.sum() * chunk.n / (2 * c)
    dgamma = (a * explained).sum() / (2 * c)
    if likelihood == "mixture":
        dgamma = dgamma - 0.5 * (a * log_det).sum()
    solved = evaluated.solved
    if solved is None:
        assert evaluated.row_norms is not None
        rate = g_ld.unsqueeze(-1) / c
        dc = dc - (g_ld * log_det).sum() / c
        dh = rate * evaluated.row_norms
        return Gradients(chunk.pull_norms(rate * h, g_rr), dh, dc, torch.zeros_like(c))
    second_var = second_variance(h, gamma, likelihood)
    g_second = None if second_var is None else -g_ld
    dh, dc_each, d_second = variance_gradients(
        solved, (h, c.expand(len(h)), second_var), (g_ld, g_ex, g_second)
    )
    assert dh is not None and dc_each is not None
    if d_second is not None:
        dh = dh + (1 - gamma) * d_second
        dgamma = dgamma - (d_second * h).sum()
    pulled = chunk.pull(*gram_cotangents(solved, g_ld, g_ex, g_second), g_rr)
    return Gradients(pulled, dh, dc + dc_each.sum(), dgamma)
