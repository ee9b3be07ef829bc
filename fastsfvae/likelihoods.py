"""The objective as scalar arithmetic on a decoder's Gram, by four likelihoods; gradients by hand.

With n outputs, c = noise_var and rr = |x - f(mu)|^2 (all per sample):

    log_likelihood = -(n/2) log(2 pi c) - (lambda/2) log_det - rr / (2c) + gamma / (2c) explained

    precision    lambda = 1                     only Sigma^-1 is mixed (paper, eq. 21 to the letter)
    mixture      lambda = gamma                 gamma log N(x; f, Sigma)
                                                + (1 - gamma) log N(x; f, cI)
    normalized   lambda = 1, and log_det is     the Gaussian whose precision is eq. 21's mix
                 logdet(I + A/c) - logdet(I + (1 - gamma) A/c)
    expected     lambda = 1, gamma = 0, and     E_q of log N(x; f_lin(z), cI): the exact ELBO's
                 log_det is trace(A)/c          likelihood term for a linear decoder

With cotangents a of log_likelihood and b_rr, b_ld, b_ex of the terms:

    g_ld = b_ld - lambda a / 2        g_ex = b_ex + gamma a / (2c)        g_rr = b_rr - a / (2c)
    dc = sum a ((rr - gamma explained) / (2 c^2) - n / (2c)) + what the primitive gives
    dgamma = sum a explained / (2c)   (- sum a log_det / 2 for "mixture")

With cotangents a of the objective, log_likelihood - w_kl kl, its part of h adds up in log h:

    d log h = h dh - a w_kl (h - 1) / 2        dmean = -a w_kl mean

"normalized" subtracts a second log-determinant at (1 - gamma) h, through which gamma enters again.
"expected" reads the row norms of J alone: log_det = sum h_i |J_i|^2 / c.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastsfvae import _checks
from fastsfvae._checks import Backend, Likelihood
from fastsfvae.gram.heads import HEADS, ChunkGram, Found, Gradients, Shape
from fastsfvae.jacobian.backend import resolve_backend
from fastsfvae.ops.elbo import elbo_of_parts
from fastsfvae.ops.low_rank import (
    Solved,
    gram_cotangents,
    low_rank_terms,
    squared_norms,
    variance_gradients,
)


class LikelihoodTerms(NamedTuple):
    """A likelihood and the terms that it was made of, each ``[B]``.

    `lost` (bool) marks samples whose factorisation rests on the floor of the pivot rule.
    """

    log_likelihood: Tensor
    squared_error: Tensor
    log_det: Tensor
    explained: Tensor
    lost: Tensor


def likelihood_terms(
    jacobian: Tensor,
    residual: Tensor,
    latent_var: Tensor,
    *,
    noise_var: float | Tensor,
    gamma: float | Tensor,
    likelihood: Likelihood,
    backend: str,
) -> LikelihoodTerms:
    """Evaluate a likelihood on validated inputs, differentiable in all of them.

    Args:
        jacobian: J, ``[B, m, n]``.
        residual: r = x - f(mu), ``[B, n]``.
        latent_var: h, ``[B, m]``.
        noise_var: c, a number or 0-d tensor.
        gamma: the mixing weight, a number or 0-d tensor.
        likelihood: one of `LIKELIHOODS`.
        backend: "torch", "triton" or "reference" (resolved: not "auto").
    """
    batch, n = residual.shape
    dtype = torch.promote_types(jacobian.dtype, torch.float32)
    if isinstance(noise_var, Tensor):
        c = noise_var.to(residual.device, dtype)
    else:
        # Filled on the device: a copy from the host would wait for it, and not be captured.
        c = torch.full((), noise_var, dtype=dtype, device=residual.device)
    if likelihood == "expected":
        rr, row_norms = squared_norms(jacobian, residual, c.dtype)
        log_det = _expected_log_det(row_norms, latent_var, c)
        explained, lost = torch.zeros_like(rr), torch.zeros_like(rr, dtype=torch.bool)
    else:
        second_var = _second_variance(latent_var, gamma, likelihood)
        log_det, explained, rr, second, lost = low_rank_terms(
            jacobian, residual, latent_var, c.expand(batch), second_var, backend=backend
        )
        if second is not None:
            log_det = log_det - second
    value = _log_likelihood(rr, log_det, explained, n, c, gamma, likelihood)
    return LikelihoodTerms(value, rr, log_det, explained, lost)


def low_rank_log_prob(
    residual: Tensor,
    jacobian: Tensor,
    latent_var: Tensor,
    *,
    noise_var: float | Tensor,
    gamma: float | Tensor = 1.0,
    likelihood: Likelihood = "precision",
    backend: Backend = "auto",
) -> Tensor:
    """Log-density of a residual under N(0, J diag(h) J^T + cI), gamma-regularised (eq. 19, 21).

    Args:
        residual: r = x - f(mu), ``[B, n]``.
        jacobian: J, tangent-major ``[B, m, n]``, any strides.
        latent_var: h >= 0, ``[B, m]``.
        noise_var: c > 0.
        gamma: in [0, 1]; 1 is the Gaussian itself.
        likelihood: as in `sampling_free_elbo`.
        backend: as in `sampling_free_elbo`.

    Returns:
        ``[B]``, in nats; differentiable in every tensor.

    Raises:
        TypeError: for tensors that are not floating point.
        ValueError: for shapes, devices or settings that do not fit.
        RuntimeError: for `backend="triton"` on a CPU without TRITON_INTERPRET=1.
    """
    _checks.settings(noise_var, gamma, 1.0, likelihood)
    warn_of_weak(likelihood, gamma)
    _checks.low_rank(residual, jacobian, latent_var)
    return likelihood_terms(
        jacobian,
        residual,
        latent_var,
        noise_var=noise_var,
        gamma=gamma,
        likelihood=likelihood,
        backend=resolve_backend(backend, jacobian),
    ).log_likelihood


def gaussian_kl(mean: Tensor, log_var: Tensor) -> Tensor:
    """KL(N(mean, exp(log_var)) || N(0, I)) per sample, ``[B]``, in nats; in float32 at least."""
    mean, log_var = wide(mean), wide(log_var)
    # exp(a) - 1 as one function keeps its digits where a is small.
    return 0.5 * (log_var.expm1() - log_var + mean.square()).sum(-1)


def gaussian_kl_of_factor(mean: Tensor, factor: Tensor) -> Tensor:
    """KL(N(mean, L L^T) || N(0, I)) per sample, ``[B]``, in nats, for any factor ``[B, m, m]``.

    In float32 at least.
    """
    mean, factor = wide(mean), wide(factor)
    squares = factor.square().sum((-2, -1)) + mean.square().sum(-1)
    return 0.5 * (squares - mean.shape[1]) - torch.linalg.slogdet(factor).logabsdet


def posterior_kl(mean: Tensor, log_var: Tensor) -> Tensor:
    """KL(q(z|x) || N(0, I)) per sample, ``[B]``; log_var ``[B, m]`` or a factor ``[B, m, m]``."""
    kl = gaussian_kl_of_factor if log_var.dim() == 3 else gaussian_kl
    return kl(mean, log_var)


def marginal_log_var(log_var: Tensor) -> Tensor:
    """The log-variances ``[B, m]`` of each latent alone, of log_var or a factor ``[B, m, m]``."""
    return log_var.square().sum(-1).log() if log_var.dim() == 3 else log_var


def wide(tensor: Tensor) -> Tensor:
    """A tensor in float32 at least, as variances and sums are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class LikelihoodHead:
    """The objective as what a decoder's Gram is used for (see `fastsfvae.gram.heads`).

    Its inputs are mean and log h ``[B, m]``, c, gamma and the weight of the KL divergence, all
    three 0-d; its outputs log_likelihood - kl_weight kl, log_likelihood, kl, and the fields of
    `LikelihoodTerms` behind `log_likelihood` but for `lost`.
    """

    along: tuple[bool, ...] = (True, True, False, False, False)
    fresh = True

    def __init__(self, likelihood: Likelihood):
        self._likelihood = likelihood

    def shapes(
        self, batch: int, m: int, out: tuple[int, ...], dtype: torch.dtype, sums: torch.dtype
    ) -> list[Shape]:
        """Six of ``[B]``."""
        return [((batch,), sums)] * 6

    def find(
        self,
        gram: ChunkGram,
        inputs: Sequence[Tensor],
        cotangents: Sequence[Tensor] | None = None,
    ) -> Found:
        """The terms of a chunk; by one kernel with all that `pull` returns, if that can be."""
        (mean, log_var, c, gamma, kl_weight), likelihood = inputs, self._likelihood
        if cotangents is not None and len(cotangents) == 1:
            parts = gram.parts()
            if parts is not None:
                kernel = elbo_of_parts(parts, inputs, cotangents[0], gram.n, likelihood)
                return Found(kernel.terms, kernel)
        h = log_var.exp()
        kept: Solved | Tensor
        if likelihood == "expected":
            rr, kept = gram.norms(c.dtype)
            log_det, explained = _expected_log_det(kept, h, c), torch.zeros_like(rr)
        else:
            kept = gram.solve(h, c.expand(len(h)), _second_variance(h, gamma, likelihood))
            rr, log_det, explained = kept.squared_error, kept.first.log_det, kept.first.explained
            if kept.second is not None:
                log_det = log_det - kept.second.log_det
        value = _log_likelihood(rr, log_det, explained, gram.n, c, gamma, likelihood)
        kl = gaussian_kl(mean, log_var)
        return Found((value - kl_weight * kl, value, kl, rr, log_det, explained), kept)

    def pull(
        self,
        gram: ChunkGram,
        found: Found,
        inputs: Sequence[Tensor],
        cotangents: Sequence[Tensor],
        needs: Sequence[bool] = (True,) * 5,
    ) -> Gradients:
        """The gradients of a chunk."""
        kept = found.kept
        if isinstance(kept, (Solved, Tensor)):
            return self._pull(gram, found, inputs, cotangents, needs)
        of_scalars = [
            part.sum() if need else None
            for part, need in zip(kept.d_scalars, needs[2:], strict=True)
        ]
        pulled = gram.pull(kept.M, kept.u, kept.g_rr)
        return Gradients(pulled, (kept.d_mean, kept.d_log_var, *of_scalars))

    def _pull(
        self,
        gram: ChunkGram,
        found: Found,
        inputs: Sequence[Tensor],
        cotangents: Sequence[Tensor],
        needs: Sequence[bool],
    ) -> Gradients:
        """The same in torch, for any cotangents."""
        (mean, log_var, c, gamma, kl_weight), likelihood = inputs, self._likelihood
        zeros = [torch.zeros_like(cotangents[0])] * (6 - len(cotangents))
        total, a, b_kl, b_rr, b_ld, b_ex = (*cotangents, *zeros)
        _, _, kl, rr, log_det, explained = found.outputs
        a, g_kl, h = a + total, b_kl - kl_weight * total, log_var.exp()
        g_ld = b_ld - 0.5 * _log_det_weight(likelihood, gamma) * a
        g_ex = b_ex + gamma / (2 * c) * a
        g_rr = b_rr - a / (2 * c)
        d_mean, d_log_var = g_kl.unsqueeze(-1) * mean, 0.5 * g_kl.unsqueeze(-1) * (h - 1)
        dc = dgamma = d_kl_weight = None
        if needs[2]:
            dc = (a * (rr - gamma * explained)).sum() / (2 * c * c) - a.sum() * gram.n / (2 * c)
        if needs[3]:
            dgamma = (a * explained).sum() / (2 * c)
            if likelihood == "mixture":
                dgamma = dgamma - 0.5 * (a * log_det).sum()
        if needs[4]:
            d_kl_weight = -(total * kl).sum()
        if likelihood == "expected":
            rate = g_ld.unsqueeze(-1) / c * h
            dc = None if dc is None else dc - (g_ld * log_det).sum() / c
            dgamma = None if dgamma is None else torch.zeros_like(dgamma)
            pulled = gram.pull_norms(rate, g_rr)
            d_log_var += rate * found.kept
            return Gradients(pulled, (d_mean, d_log_var, dc, dgamma, d_kl_weight))
        second_var = _second_variance(h, gamma, likelihood)
        g_second = None if second_var is None else -g_ld
        dh, dc_each, d_second = variance_gradients(
            found.kept,
            (h, c.expand(len(h)), second_var),
            (g_ld, g_ex, g_second),
            (True, needs[2], True),
        )
        assert dh is not None
        if d_second is not None:
            dh = dh + (1 - gamma) * d_second
            dgamma = None if dgamma is None else dgamma - (d_second * h).sum()
        if dc is not None and dc_each is not None:
            dc = dc + dc_each.sum()
        d_log_var += h * dh
        pulled = gram.pull(*gram_cotangents(found.kept, g_ld, g_ex, g_second), g_rr)
        return Gradients(pulled, (d_mean, d_log_var, dc, dgamma, d_kl_weight))

    def plain(
        self, output: Tensor, J: Tensor, r: Tensor, inputs: Sequence[Tensor], backend: str
    ) -> tuple[Tensor, ...]:
        """The terms by autograd."""
        mean, log_var, c, gamma, kl_weight = inputs
        value, *terms, _ = likelihood_terms(
            *(J, r, log_var.exp()),
            noise_var=c,
            gamma=gamma,
            likelihood=self._likelihood,
            backend=backend,
        )
        kl = gaussian_kl(mean, log_var)
        return value - kl_weight * kl, value, kl, *terms


HEADS.update({name: LikelihoodHead(name) for name in _checks.LIKELIHOODS})


def _log_det_weight(likelihood: str, gamma: float | Tensor) -> float | Tensor:
    """The formula's lambda."""
    return gamma if likelihood == "mixture" else 1.0


def _second_variance(latent_var: Tensor, gamma: float | Tensor, likelihood: str) -> Tensor | None:
    """The h of the log-determinant that "normalized" subtracts, None elsewhere."""
    return (1 - gamma) * latent_var if likelihood == "normalized" else None


def _log_likelihood(
    squared_error: Tensor,
    log_det: Tensor,
    explained: Tensor,
    n: int,
    c: Tensor,
    gamma: float | Tensor,
    likelihood: str,
) -> Tensor:
    """The module's formula, ``[B]``, from its terms."""
    return (
        -0.5 * n * (math.log(2 * math.pi) + c.log())
        - 0.5 * _log_det_weight(likelihood, gamma) * log_det
        - (squared_error - gamma * explained) / (2 * c)
    )


def _expected_log_det(row_norms: Tensor, h: Tensor, c: Tensor) -> Tensor:
    """What stands for log_det in "expected": trace(A)/c, ``[B]``.

    Args:
        row_norms: squared norms of J's rows, ``[B, m]``, in c's dtype.
        h: ``[B, m]``.
        c: 0-d, in float32 at least, like every sum here.
    """
    return (h.to(c.dtype) * row_norms).sum(-1) / c


def warn_of_weak(likelihood: str, gamma: float | Tensor) -> None:
    """Warn the caller's caller of a gamma with which the objective is pointless."""
    # A compiler may hold the number as a symbol.
    if isinstance(gamma, Tensor) or torch.compiler.is_compiling():
        return
    if likelihood in ("mixture", "normalized") and gamma < 0.5:
        warnings.warn(
            f'likelihood="{likelihood}" with gamma={gamma!r} hardly penalises the decoder\'s noise '
            'and trains an auto-encoder: use gamma >= 0.5, or likelihood="precision"',
            stacklevel=3,
        )
