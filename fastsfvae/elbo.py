"""The sampling-free objective of each sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsfvae import _checks, _constants
from fastsfvae._checks import Backend, Likelihood
from fastsfvae.gram.query import Query, head_outputs, weighted_total
from fastsfvae.jacobian.backend import resolve_backend
from fastsfvae.jacobian.validate import Shared
from fastsfvae.likelihoods import warn_of_weak


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


def sampling_free_elbo(
    decoder: Callable[..., Tensor],
    x: Tensor,
    mean: Tensor,
    log_var: Tensor,
    *args: Any,
    noise_var: float | Tensor = 0.5,
    gamma: float | Tensor = 0.5,
    kl_weight: float | Tensor = 1.0,
    likelihood: Likelihood = "precision",
    probes: int | None = None,
    generator: torch.Generator | None = None,
    backend: Backend = "auto",
    chunk_size: int | None = None,
    shared: Shared = (),
    **kwargs: Any,
) -> Elbo:
    """Evaluate the sampling-free objective, the decoder linearised at `mean` (paper, eq. 20, 21).

    Args:
        decoder: f, an ``nn.Module`` (or callable) ``z [B, m] -> [B, *out]``.
        x: data ``[B, *out]``, floating point, in the units of the decoder's output.
        mean: mu ``[B, m]``.
        log_var: log h ``[B, m]``; or, for a full covariance L L^T, its factor L ``[B, m, m]``, such
            as the Cholesky factor.
        *args: passed to the decoder after z; tensors whose first axis is B are chunked with it.
        noise_var: c > 0, variance of the observation noise in squared units of x.
        gamma: weight of the low-rank precision, in [0, 1]; "expected" has none.
        kl_weight: factor of the KL divergence, not negative. A number out of range is refused. A
            0-d tensor is not read, which would wait for the device: with one out of range all of
            `elbo` is NaN, as it is for the other two (`check_settings` reads them).
        likelihood: "precision", "mixture", "normalized" or "expected" (`fastsfvae.likelihoods`).
        probes: see `SamplingFreeLoss`.
        generator: source of the probes' signs, on the latents' device.
        backend: "auto" is "triton" on CUDA (but for float64) and "torch" elsewhere; "reference" is
            the plain formulas, slow.
        chunk_size: samples whose tangents exist at one time; None chooses. Changes rounding only.
        shared: see `decode_with_jacobian`.
        **kwargs: passed to the decoder, chunked like `args`.

    Returns:
        `Elbo`, each field ``[B]``, differentiable in every tensor and in the decoder's parameters.

    Some samples have a Gram matrix J^T J that float32 cannot resolve against c;
    `fastsfvae.evaluate.conditioning` counts them. On the CPU, and in the Triton kernels up to
    m = 64, they are computed again in float64. On CUDA with `backend="torch"` or m > 64, and with
    half-precision tangents, a lower bound of the pivots bounds their terms instead.

    Raises:
        TypeError: for tensors that are not floating point.
        ValueError: for shapes, devices or settings that do not fit, in one line that quotes them.
        RuntimeError: for `backend="triton"` on a CPU without TRITON_INTERPRET=1.
    """
    given = noise_var, gamma, kl_weight, likelihood, backend, chunk_size, probes, shared
    settings = Settings(*given)
    terms, _ = objective(settings, decoder, x, mean, log_var, args, kwargs, generator)
    warn_of_weak(likelihood, gamma)
    return terms


class Settings(NamedTuple):
    """What `sampling_free_elbo` takes besides its inputs; each is explained there."""

    noise_var: float | Tensor
    gamma: float | Tensor
    kl_weight: float | Tensor
    likelihood: Likelihood
    backend: Backend
    chunk_size: int | None
    probes: int | None
    shared: Shared


def objective(
    settings: Settings,
    decoder: Any,
    x: Tensor,
    mean: Tensor,
    log_var: Tensor,
    args: tuple,
    kwargs: dict[str, Any],
    generator: torch.Generator | None,
    weight: Tensor | None = None,
) -> tuple[Elbo, Tensor | None]:
    """The objective of each sample; for a weight ``[B]`` of each also their weighted sum (0-d).

    With weights the sum alone is sure to be differentiable (see `weighted_total`).
    """
    noise_var, gamma, kl_weight, likelihood, backend, chunk_size, probes, shared = settings
    if not torch.compiler.is_compiling():
        # A compiler may hold the numbers as symbols.
        _checks.settings(noise_var, gamma, kl_weight, likelihood)
    _checks.probes(probes, likelihood)
    _checks.latent(mean, log_var, factor=True)
    _checks.batch(x, mean)
    dtype = torch.promote_types(torch.promote_types(mean.dtype, x.dtype), torch.float32)
    weights = _checks.in_range("gamma", gamma), _checks.in_range("kl_weight", kl_weight)
    scalars = [
        t.to(mean.device)
        if isinstance(t, Tensor)
        # Filled on the device: a copy from the host would wait for it, and not be captured.
        else _constants.full((), t, dtype, mean.device)
        for t in (noise_var, *weights)
    ]
    spread = tangents = None
    if log_var.dim() == 3 or probes is not None:
        # Late: seldom needed.
        from fastsfvae._spread import spread_of

        spread = spread_of(mean, log_var, probes, generator)
    # A variance or divergence of eight bits would be none. The mean again, as an alias: one tensor
    # in two places has no gradient for each.
    wide = torch.promote_types(mean.dtype, torch.float32)
    latents = mean.view_as(mean).to(wide), log_var.to(wide)
    if spread is not None:
        # Unit variances along its directions, whose own KL divergence is 0.
        tangents = spread.tangents
        latents = (mean.new_zeros(tangents.shape[1::-1], dtype=wide),) * 2
    resolved = resolve_backend(backend, mean)
    given = x, (*latents, *scalars), args, kwargs, resolved, chunk_size, tangents, shared
    query = Query(likelihood, decoder, mean, *given)
    if weight is None:
        total, found = None, head_outputs(query)
    else:
        total, found = weighted_total(query, weight)
    terms = Elbo(*found)
    if spread is None:
        return terms, total
    cost = scalars[2] * spread.kl
    if total is not None and weight is not None:
        total = total - (cost * weight).sum()
    return terms._replace(elbo=terms.elbo - cost, kl=spread.kl), total


def check_settings(
    *,
    noise_var: float | Tensor = 0.5,
    gamma: float | Tensor = 0.5,
    kl_weight: float | Tensor = 1.0,
) -> None:
    """Refuse settings of the objective that are out of range, those in tensors as well.

    It reads the tensors and so waits for the device: call it before training, or where a loss has
    become NaN. `SamplingFreeLoss.check_settings` does so with the loss's own.

    Args:
        noise_var: c > 0, a number or a 0-d tensor.
        gamma: in [0, 1], likewise.
        kl_weight: not negative, likewise.

    Raises:
        TypeError: for what is no number.
        ValueError: for one out of range, in one line that quotes it.
    """
    settings = {"noise_var": noise_var, "gamma": gamma, "kl_weight": kl_weight}
    for name, value in settings.items():
        check = getattr(_checks, name)
        check(value)
        if isinstance(value, Tensor):
            check(float(value))
