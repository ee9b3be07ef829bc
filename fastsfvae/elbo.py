"""The sampling-free objective of a decoder, and the log-density that it rests on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsfvae import _checks
from fastsfvae._checks import Likelihood
from fastsfvae.gram import operator as fused
from fastsfvae.jacobian import flatten_in_memory_order, map_chunks, resolve_backend
from fastsfvae.likelihoods import LikelihoodTerms, likelihood_terms
from fastsfvae.settings import Settings, check_settings, warn_of_weak


class Elbo(NamedTuple):
    """The sampling-free objective and its parts, each ``[B]``, in nats unless said otherwise.

    Attributes:
        elbo: the objective, log_likelihood - kl_weight * kl. A surrogate: by Jensen's inequality it
            lies above the evidence lower bound and may exceed log p(x) (only
            `likelihood="expected"` with a linear decoder gives the exact bound).
        log_likelihood: see `fastsfvae.likelihoods`; holds the constant -(n/2) log(2 pi c).
        kl: KL(N(mean, h) || N(0, I)) = 1/2 sum(h + mean^2 - 1 - log h).
        squared_error: |x - f(mean)|^2, in squared units of x.
        log_det: the log-determinant term that the likelihood uses.
        explained: the part of `squared_error` that the latent variance explains, in its units.
    """

    elbo: Tensor
    log_likelihood: Tensor
    kl: Tensor
    squared_error: Tensor
    log_det: Tensor
    explained: Tensor


def gaussian_kl(mean: Tensor, log_var: Tensor) -> Tensor:
    """KL(N(mean, exp(log_var)) || N(0, I)) per sample, ``[B]``, in nats."""
    return 0.5 * (log_var.exp() + mean.square() - 1 - log_var).sum(-1)


def sampling_free_elbo(
    decoder,
    x: Tensor,
    mean: Tensor,
    log_var: Tensor,
    *args,
    noise_var: float | Tensor = 0.5,
    gamma: float | Tensor = 0.5,
    kl_weight: float | Tensor = 1.0,
    likelihood: Likelihood = "precision",
    backend: str = "auto",
    chunk_size: int | None = None,
    **kwargs,
) -> Elbo:
    """Evaluate the sampling-free objective, the decoder linearised at `mean` (paper, eq. 20, 21).

    Args:
        decoder: f, an ``nn.Module`` (or callable) ``z [B, m] -> [B, *out]``.
        x: data ``[B, *out]``, floating point, in the units of the decoder's output.
        mean: mu ``[B, m]``.
        log_var: log h ``[B, m]``.
        *args: passed to the decoder after z; tensors whose first axis is B are chunked with it.
        noise_var: c, variance of the observation noise in squared units of x.
        gamma: weight of the low-rank precision, in [0, 1]; "expected" has none.
        kl_weight: factor of the KL divergence.
        likelihood: "precision", "mixture", "normalized" or "expected" (`fastsfvae.likelihoods`).
        backend: "auto" is "triton" on CUDA (but for float64) and "torch" elsewhere; "reference" is
            the plain formulas, slow.
        chunk_size: samples whose tangents exist at one time; None chooses. Changes rounding only.
        **kwargs: passed to the decoder, chunked like `args`.

    Returns:
        `Elbo`, each field ``[B]``, differentiable in every tensor and in the decoder's parameters.

    Some samples have a Gram matrix J^T J that float32 cannot resolve against c;
    `fastsfvae.evaluate.conditioning` counts them. On the CPU, and in the Triton kernels up to
    m = 64, they are computed again in float64. On CUDA with `backend="torch"` or m > 64, with
    half-precision tangents, and behind a last layer that is fused with the Gram
    (`fused_layers("never")` forbids that), a lower bound of the pivots bounds their terms instead.

    Raises:
        TypeError: for tensors that are not floating point.
        ValueError: for shapes, devices or settings that do not fit, in one line that quotes them.
        RuntimeError: for `backend="triton"` on a CPU without TRITON_INTERPRET=1.
    """
    settings = Settings(noise_var, gamma, kl_weight, likelihood, backend, chunk_size)
    terms, _ = evaluate(decoder, x, mean, log_var, args, kwargs, settings)
    warn_of_weak(likelihood, gamma)
    return terms


def evaluate(
    decoder,
    x: Tensor,
    mean: Tensor,
    log_var: Tensor,
    args: tuple,
    kwargs: dict[str, Any],
    settings: Settings,
    weight: Tensor | None = None,
) -> tuple[Elbo, Tensor]:
    """The objective of each sample and, for given weights, their weighted sum (0-d).

    With weights the sum alone is sure to be differentiable: its gradients are finished while it is
    evaluated, where the decoder's operations allow it and the weights need none themselves.

    Args:
        decoder: as in `sampling_free_elbo`, like all that follow.
        x: ``[B, *out]``.
        mean: ``[B, m]``.
        log_var: ``[B, m]``.
        args: further decoder inputs.
        kwargs: further decoder inputs by name.
        settings: the keyword arguments.
        weight: ``[B]``, or None.
    """
    if not torch.compiler.is_compiling():
        # A compiler may hold the numbers as symbols.
        check_settings(*settings[:4])
    _checks.latent(mean, log_var)
    _checks.batch(x, mean)
    backend = resolve_backend(settings.backend, mean)
    settings = settings._replace(backend=backend)
    latent_var = log_var.exp()
    total: Tensor | None = None
    terms: Sequence[Tensor] | Tensor
    problem = fused.prepare(decoder, x, mean, latent_var, args, kwargs, settings)
    if problem is None:
        terms = _recomputed_terms(decoder, x, mean, latent_var, args, kwargs, settings)
    elif weight is None or weight.requires_grad:
        terms = fused.log_likelihood_terms(problem)
    else:
        total, terms = fused.total_log_likelihood(problem, weight)
    log_likelihood, squared_error, log_det, explained = terms
    kl = gaussian_kl(mean, log_var)
    objective = log_likelihood - settings.kl_weight * kl
    if weight is None:
        total = objective.sum()
    elif total is None:
        total = (weight * objective).sum()
    else:
        total = total - settings.kl_weight * (weight * kl).sum()
    return Elbo(objective, log_likelihood, kl, squared_error, log_det, explained), total


def _recomputed_terms(
    decoder, x, mean, latent_var, args, kwargs, settings: Settings
) -> tuple[Tensor, ...]:
    """The four terms by autograd, for what has no adjoints; several chunks are computed twice."""

    def finish(output: Tensor, tangents: Tensor, start: int, stop: int) -> LikelihoodTerms:
        if x.shape[1:] != output.shape[1:]:
            raise ValueError(
                f"x has shape {tuple(x.shape)} but the decoder returns "
                f"{(x.shape[0], *output.shape[1:])}: they must match"
            )
        return likelihood_terms(
            *flatten_in_memory_order(tangents, x[start:stop] - output),
            latent_var[start:stop],
            noise_var=settings.noise_var,
            gamma=settings.gamma,
            likelihood=settings.likelihood,
            backend=settings.backend,
        )

    return map_chunks(
        *(finish, decoder, mean, args, kwargs),
        backend=settings.backend,
        chunk_size=settings.chunk_size,
        also=(x, latent_var, settings.noise_var, settings.gamma),
    )[:4]


def low_rank_log_prob(
    residual: Tensor,
    jacobian: Tensor,
    latent_var: Tensor,
    *,
    noise_var: float | Tensor,
    gamma: float | Tensor = 1.0,
    likelihood: Likelihood = "precision",
    backend: str = "auto",
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
    check_settings(noise_var, gamma, 1.0, likelihood)
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
