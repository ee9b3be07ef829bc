"""The sampling-free objective as a loss module for a user's own training loop."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastsfvae import _checks
from fastsfvae._checks import Likelihood
from fastsfvae.elbo import Elbo, evaluate
from fastsfvae.jacobian.run.known import remember
from fastsfvae.jacobian.validate import check_chunk_size, unwrap
from fastsfvae.settings import Settings, check_settings, warn_of_weak


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

    Raises:
        TypeError, ValueError: for a setting out of range or a wrapped decoder, in one line.
    """

    def __init__(
        self,
        decoder,
        *,
        noise_var: float | Tensor = 0.5,
        gamma: float | Tensor = 0.5,
        kl_weight: float | Tensor = 1.0,
        likelihood: Likelihood = "precision",
        reduction: str = "mean",
        backend: str = "auto",
        chunk_size: int | None = None,
    ):
        super().__init__()
        check_settings(noise_var, gamma, kl_weight, likelihood)
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
        self.reduction = reduction
        self.backend = backend
        self.chunk_size = chunk_size

    def forward(
        self,
        x: Tensor,
        mean: Tensor,
        log_var: Tensor,
        *args,
        sample_weight: Tensor | None = None,
        return_terms: bool = False,
        **kwargs,
    ) -> Tensor | tuple[Tensor, Elbo]:
        """Return the loss, and with `return_terms` also the detached `Elbo` of each sample.

        Args:
            x: data ``[B, *out]``, floating point.
            mean: mu ``[B, m]``.
            log_var: log h ``[B, m]``.
            *args: passed to the decoder after z; tensors whose first axis is B are chunked with it.
            sample_weight: ``[B]``, multiplies each sample's loss; "mean" divides by its sum.
            return_terms: also return the terms, for logging at no second pass.
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
        _checks.latent(mean, log_var)
        if sample_weight is not None and sample_weight.shape != mean.shape[:1]:
            raise ValueError(
                f"sample_weight has shape {tuple(sample_weight.shape)}: "
                f"give [B] = {tuple(mean.shape[:1])}"
            )
        settings = Settings(
            self.noise_var,
            self.gamma,
            self.kl_weight,
            self.likelihood,
            self.backend,
            self.chunk_size,
        )
        weight = None if self.reduction == "none" else self._share(mean, sample_weight)
        elbo, total = evaluate(self.decoder, x, mean, log_var, args, kwargs, settings, weight)
        loss = -total
        if self.reduction == "none":
            loss = -elbo.elbo if sample_weight is None else -elbo.elbo * sample_weight
        return (loss, Elbo(*(t.detach() for t in elbo))) if return_terms else loss

    def _share(self, mean: Tensor, sample_weight: Tensor | None) -> Tensor:
        """What each sample's loss is multiplied by before all are added up."""
        if sample_weight is not None:
            total = sample_weight.sum() if self.reduction == "mean" else 1
            return sample_weight / total
        share = 1 / mean.shape[0] if self.reduction == "mean" else 1.0
        dtype = torch.promote_types(mean.dtype, torch.float32)
        return torch.full(mean.shape[:1], share, dtype=dtype, device=mean.device)

    def __setstate__(self, state: dict) -> None:
        """Take up the state of a copy or of a pickle."""
        super().__setstate__(state)
        remember(self.decoder)

    def extra_repr(self) -> str:
        """The settings, as they would be written in a call."""
        names = ("noise_var", "gamma", "kl_weight", "likelihood", "reduction", "backend")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
