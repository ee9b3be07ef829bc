"""The sampling-free objective: as a loss module, per sample, and the log-density it rests on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from fastsfvae import _checks, _constants
from fastsfvae._checks import Backend, Likelihood, Reduction
from fastsfvae.gram.query import Query, head_outputs, weighted_total
from fastsfvae.jacobian.backend import resolve_backend
from fastsfvae.jacobian.run.known import remember
from fastsfvae.jacobian.validate import check_chunk_size, unwrap
from fastsfvae.likelihoods import gaussian_kl as gaussian_kl
from fastsfvae.likelihoods import low_rank_log_prob as low_rank_log_prob
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


class SamplingFreeLoss(nn.Module):
    """Negative sampling-free objective of a decoder (paper, eq. 20 with the precision of eq. 21).

        loss_fn = sf.SamplingFreeLoss(decoder)
        mean, log_var = encoder(x)
        loss_fn(x, mean, log_var).backward()

    Its negative is no bound of log p(x): judge models by `fastsfvae.evaluate`.

    The decoder is referred to, not registered: `parameters()` and `state_dict()` hold only what is
    the loss's own, a learned `noise_var`. The attributes `noise_var`, `gamma`, `kl_weight` may be
    changed between steps.

    Args:
        decoder: f, an ``nn.Module`` ``z [B, m] -> [B, *out]``; not wrapped in DDP or FSDP (wrap the
            module that computes the loss).
        noise_var: c, variance of the observation noise in squared units of x; a number, a 0-d
            tensor, or a Parameter to be learned.
        gamma: weight of the low-rank precision in [0, 1], a number or a 0-d tensor; "expected" has
            none.
        kl_weight: factor of the KL divergence, a number or a 0-d tensor.
        likelihood: "precision" (the paper's), "mixture", "normalized" or "expected"; their formulas
            are in `fastsfvae.likelihoods`.
        reduction: "mean", "sum" or "none" (``[B]``).
        backend: "auto" is "triton" on CUDA (but for float64) and "torch" elsewhere; "reference" is
            the plain formulas, slow.
        chunk_size: samples whose tangents exist at one time; None chooses.
        probes: of "expected", K random tangents in place of all m: its log_det, a trace, is then an
            unbiased estimate, and so are the gradients. For m in the hundreds and more.

    Raises:
        TypeError, ValueError: for a setting out of range or a wrapped decoder, in one line.
    """

    def __init__(
        self,
        decoder: Callable[..., Tensor],
        *,
        noise_var: float | Tensor = 0.5,
        gamma: float | Tensor = 0.5,
        kl_weight: float | Tensor = 1.0,
        likelihood: Likelihood = "precision",
        reduction: Reduction = "mean",
        backend: Backend = "auto",
        chunk_size: int | None = None,
        probes: int | None = None,
    ):
        super().__init__()
        _checks.settings(noise_var, gamma, kl_weight, likelihood)
        _checks.probes(probes, likelihood)
        warn_of_weak(likelihood, gamma)
        _checks.choice("reduction", reduction, _checks.REDUCTIONS)
        _checks.choice("backend", backend, _checks.BACKENDS)
        check_chunk_size(chunk_size)
        unwrap(decoder)
        remember(decoder)
        # A plain entry of __dict__ is not registered as a submodule.
        self.__dict__["decoder"] = decoder
        self.noise_var = noise_var
        self.gamma = gamma
        self.kl_weight = kl_weight
        self.likelihood: Likelihood = likelihood
        self.reduction: Reduction = reduction
        self.backend: Backend = backend
        self.chunk_size = chunk_size
        self.probes = probes

    def forward(
        self,
        x: Tensor,
        mean: Tensor,
        log_var: Tensor,
        *args: Any,
        sample_weight: Tensor | None = None,
        return_terms: bool = False,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Elbo]:
        """Return the loss, and with `return_terms` also the detached `Elbo` of each sample.

        Args:
            x: data ``[B, *out]``, floating point.
            mean: mu ``[B, m]``.
            log_var: log h ``[B, m]``; or, for a full covariance L L^T, its factor L ``[B, m, m]``,
                such as the Cholesky factor.
            *args: passed to the decoder after z; tensors whose first axis is B are chunked with it.
            sample_weight: ``[B]``, multiplies each sample's loss; "mean" divides by its sum.
            return_terms: also return the terms, for logging at no second pass.
            generator: source of the probes' signs, on the latents' device.
            **kwargs: passed to the decoder, chunked like `args`.

        Returns:
            A 0-d tensor, or ``[B]`` with reduction "none"; with `return_terms`, a pair.

        Raises:
            TypeError, ValueError, RuntimeError: as `sampling_free_elbo`, in one line.
        """
        if getattr(self, "_is_replica", False):
            raise RuntimeError(
                "nn.DataParallel copies the loss but not its decoder: "
                "use DistributedDataParallel around the module that computes the loss"
            )
        # Before a mean over the batch is taken.
        _checks.latent(mean, log_var, factor=True)
        if sample_weight is not None:
            _checks.tensors(sample_weight=sample_weight)
        if sample_weight is not None and sample_weight.shape != mean.shape[:1]:
            raise ValueError(
                f"sample_weight has shape {tuple(sample_weight.shape)}: "
                f"give [B] = {tuple(mean.shape[:1])}"
            )
        weight = None if self.reduction == "none" else self._share(mean, sample_weight)
        settings = _Settings(*(getattr(self, name) for name in _Settings._fields))
        inputs = self.decoder, x, mean, log_var, args, kwargs
        elbo, total = _objective(settings, *inputs, generator, weight)
        loss = -elbo.elbo if total is None else total
        if self.reduction == "none" and sample_weight is not None:
            loss = loss * sample_weight
        return (loss, Elbo(*(t.detach() for t in elbo))) if return_terms else loss

    if TYPE_CHECKING:
        # nn.Module's own takes and returns anything.

        @overload
        def __call__(
            self,
            x: Tensor,
            mean: Tensor,
            log_var: Tensor,
            *args: Any,
            sample_weight: Tensor | None = None,
            return_terms: Literal[False] = False,
            generator: torch.Generator | None = None,
            **kwargs: Any,
        ) -> Tensor: ...

        @overload
        def __call__(
            self,
            x: Tensor,
            mean: Tensor,
            log_var: Tensor,
            *args: Any,
            sample_weight: Tensor | None = None,
            return_terms: Literal[True],
            generator: torch.Generator | None = None,
            **kwargs: Any,
        ) -> tuple[Tensor, Elbo]: ...

        @overload
        def __call__(
            self,
            x: Tensor,
            mean: Tensor,
            log_var: Tensor,
            *args: Any,
            sample_weight: Tensor | None = None,
            return_terms: bool,
            generator: torch.Generator | None = None,
            **kwargs: Any,
        ) -> Tensor | tuple[Tensor, Elbo]: ...

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            """As `forward`."""

    def _share(self, mean: Tensor, sample_weight: Tensor | None) -> Tensor:
        """What each sample's objective is multiplied by before all are added up to the loss."""
        if sample_weight is not None:
            total = sample_weight.sum() if self.reduction == "mean" else 1
            return sample_weight / -total
        share = -1 / mean.shape[0] if self.reduction == "mean" else -1.0
        dtype = torch.promote_types(mean.dtype, torch.float32)
        return _constants.full(mean.shape[:1], share, dtype, mean.device)

    def __setstate__(self, state: dict) -> None:
        """Take up the state of a copy or of a pickle."""
        super().__setstate__(state)
        remember(self.decoder)

    def extra_repr(self) -> str:
        """The settings, as they would be written in a call."""
        names = ["noise_var", "gamma", "kl_weight", "likelihood", "reduction", "backend"]
        names += ["probes"] * (self.probes is not None)
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


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
        noise_var: c, variance of the observation noise in squared units of x.
        gamma: weight of the low-rank precision, in [0, 1]; "expected" has none.
        kl_weight: factor of the KL divergence.
        likelihood: "precision", "mixture", "normalized" or "expected" (`fastsfvae.likelihoods`).
        probes: see `SamplingFreeLoss`.
        generator: source of the probes' signs, on the latents' device.
        backend: "auto" is "triton" on CUDA (but for float64) and "torch" elsewhere; "reference" is
            the plain formulas, slow.
        chunk_size: samples whose tangents exist at one time; None chooses. Changes rounding only.
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
    settings = _Settings(noise_var, gamma, kl_weight, likelihood, backend, chunk_size, probes)
    terms, _ = _objective(settings, decoder, x, mean, log_var, args, kwargs, generator)
    warn_of_weak(likelihood, gamma)
    return terms


class _Settings(NamedTuple):
    noise_var: float | Tensor
    gamma: float | Tensor
    kl_weight: float | Tensor
    likelihood: Likelihood
    backend: Backend
    chunk_size: int | None
    probes: int | None


def _objective(
    settings: _Settings,
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
    noise_var, gamma, kl_weight, likelihood, backend, chunk_size, probes = settings
    if not torch.compiler.is_compiling():
        # A compiler may hold the numbers as symbols.
        _checks.settings(noise_var, gamma, kl_weight, likelihood)
    _checks.probes(probes, likelihood)
    _checks.latent(mean, log_var, factor=True)
    _checks.batch(x, mean)
    dtype = torch.promote_types(torch.promote_types(mean.dtype, x.dtype), torch.float32)
    scalars = [
        t.to(mean.device)
        if isinstance(t, Tensor)
        # Filled on the device: a copy from the host would wait for it, and not be captured.
        else _constants.full((), t, dtype, mean.device)
        for t in (noise_var, gamma, kl_weight)
    ]
    spread = tangents = None
    if log_var.dim() == 3 or probes is not None:
        # Late: seldom needed.
        from fastsfvae._spread import spread_of

        spread = spread_of(mean, log_var, probes, generator)
    # The mean again, as an alias: one tensor in two places has no gradient for each.
    latents = mean.view_as(mean), log_var
    if spread is not None:
        # Unit variances along its directions, whose own KL divergence is 0.
        tangents = spread.tangents
        latents = (mean.new_zeros(tangents.shape[1::-1]),) * 2
    resolved = resolve_backend(backend, mean)
    given = x, (*latents, *scalars), args, kwargs, resolved, chunk_size, tangents
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
