"""The sampling-free objective as a loss module."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from fastsfvae import _checks, _constants
from fastsfvae._checks import Backend, Likelihood, Reduction
from fastsfvae.elbo import Elbo, Settings, check_settings, objective
from fastsfvae.jacobian.run.known import remember
from fastsfvae.jacobian.validate import Shared, check_chunk_size, unwrap
from fastsfvae.likelihoods import warn_of_weak


class SamplingFreeLoss(nn.Module):
    """Negative sampling-free objective of a decoder (paper, eq. 20 with the precision of eq. 21).

        loss_fn = sf.SamplingFreeLoss(decoder)
        mean, log_var = encoder(x)
        loss_fn(x, mean, log_var).backward()

    Its negative is no bound of log p(x): judge models by `fastsfvae.evaluate`.

    The decoder is referred to, not registered: `parameters()` and `state_dict()` hold only what is
    the loss's own, a learned `noise_var`. The attributes `noise_var`, `gamma`, `kl_weight` may be
    changed between steps. A number out of range is refused; a tensor is not read, and one out of
    range makes the loss NaN (`check_settings` reads them).

    Args:
        decoder: f, an ``nn.Module`` ``z [B, m] -> [B, *out]``; not wrapped in DDP or FSDP (wrap the
            module that computes the loss).
        noise_var: c > 0, variance of the observation noise in squared units of x; a number, a 0-d
            tensor, or a Parameter to be learned as it is, which may leave c > 0 behind.
        gamma: weight of the low-rank precision in [0, 1], a number or a 0-d tensor; "expected" has
            none.
        kl_weight: factor of the KL divergence, a number or a 0-d tensor.
        likelihood: "precision" (the paper's), "mixture", "normalized" or "expected"; their formulas
            are in `fastsfvae.likelihoods`.
        reduction: "mean", "sum" or "none" (``[B]``).
        backend: "auto" is "triton" on CUDA (but for float64) and "torch" elsewhere; "reference" is
            the plain formulas, slow.
        chunk_size: samples whose tangents exist at one time; None chooses.
        shared: further decoder inputs that all samples share, whatever their first extent: names
            of keyword arguments, and positions behind z, counted from 0.
        learned_noise_var: learn c from `noise_var` on, by its logarithm (with
            `torch.nn.utils.parametrize`), so that it stays positive: give `loss_fn.parameters()` to
            the optimizer as well. `loss_fn.noise_var` is then c as a tensor, and can be assigned.
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
        shared: Shared = (),
        learned_noise_var: bool = False,
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
        self.shared = shared
        if learned_noise_var:
            self._learn_noise_var()

    def forward(
        self,
        x: Tensor,
        mean: Tensor,
        log_var: Tensor,
        *args: Any,
        sample_weight: Tensor | None = None,
        loss_scale: float | Tensor = 1.0,
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
            loss_scale: what the loss will be multiplied by before its backward, where that is done
                for float16's sake: the gradients, which are finished in the forward, are then
                computed at that scale. The loss returned is unscaled, so that
                ``scaler.scale(loss_fn(..., loss_scale=scaler.get_scale())).backward()`` gives what
                GradScaler expects. A number or a 0-d tensor, > 0.
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
        if not torch.compiler.is_compiling():
            # A compiler may hold the number as a symbol.
            _checks.loss_scale(loss_scale)
        weight: Tensor | None = None
        scale: float | Tensor | None = None
        if self.reduction != "none":
            weight = self._share(mean, sample_weight)
            if isinstance(loss_scale, Tensor):
                scale = loss_scale.to(weight.device)
            elif loss_scale != 1:
                scale = loss_scale
            weight = weight if scale is None else weight * scale
        settings = Settings(*(getattr(self, name) for name in Settings._fields))
        inputs = self.decoder, x, mean, log_var, args, kwargs
        elbo, total = objective(settings, *inputs, generator, weight)
        loss = -elbo.elbo if total is None else total
        if scale is not None:
            loss = loss / scale
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
            loss_scale: float | Tensor = 1.0,
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
            loss_scale: float | Tensor = 1.0,
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
            loss_scale: float | Tensor = 1.0,
            return_terms: bool,
            generator: torch.Generator | None = None,
            **kwargs: Any,
        ) -> Tensor | tuple[Tensor, Elbo]: ...

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            """As `forward`."""

    def check_settings(self) -> None:
        """Refuse settings that are out of range, those in tensors as well: it waits for the device.

        Raises:
            ValueError: in one line that quotes the value.
        """
        given = {name: getattr(self, name) for name in ("noise_var", "gamma", "kl_weight")}
        check_settings(**given)

    def _learn_noise_var(self) -> None:
        self.check_settings()
        decoder, value = self.decoder, self.noise_var
        first = next(decoder.parameters(), None) if isinstance(decoder, nn.Module) else None
        device = None if first is None else first.device
        start = torch.as_tensor(value, dtype=torch.float32, device=device).detach().clone()
        del self.noise_var
        self.noise_var = nn.Parameter(start)
        nn.utils.parametrize.register_parametrization(self, "noise_var", _Exponential())

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
        names += ["probes"] * (self.probes is not None) + ["shared"] * bool(self.shared)
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


class _Exponential(nn.Module):
    """A positive number by its logarithm."""

    def forward(self, logarithm: Tensor) -> Tensor:
        return logarithm.exp()

    def right_inverse(self, value: float | Tensor) -> Tensor:
        # Assigned, which is no part of a step: it may be read.
        check_settings(noise_var=value)
        return torch.as_tensor(value, dtype=torch.float32).log()
