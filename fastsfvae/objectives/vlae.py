"""The variational Laplace auto-encoder's objective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from fastsfvae import _checks
from fastsfvae._noise import Draws, check_draws, standard_normal
from fastsfvae.elbo import sampling_free_elbo
from fastsfvae.fit import fit_latents
from fastsfvae.likelihoods import gaussian_kl_of_factor
from fastsfvae.objectives.draws import decode
from fastsfvae.objectives.linearized import divergence, linearized_posterior
from fastsfvae.objectives.terms import Terms

Bound: TypeAlias = Literal["sampled", "closed-form"]
BOUNDS: tuple[Bound, ...] = get_args(Bound)


class VariationalLaplace:
    """The ELBO of the Laplace approximation at the posterior's mode (Park, Kim & Kim 2019).

    A few steps of `fit_latents` lead from the encoder's mean to a mode of the posterior. There one
    Gauss-Newton step more, `kalman_update` at the mode, gives q*(z|x) with a full covariance,
    N(z*, (I + J^T J / c)^-1), as a function of the decoder's parameters. The decoder is trained by
    the ELBO of q*, through q* as well: how far a linearisation holds is up to the decoder. The
    encoder is trained to predict q*, by KL(q || q*), which is the ELBO of q up to a constant where
    q* is the posterior; so that q(z|x) can be used, and evaluated, without a search. (Park et al.
    differentiate through every step of the search, to the encoder too.)

    Args:
        decoder: f, ``z [B, m] -> [B, *out]``.
        noise_var: c, variance of the observation noise in squared units of x.
        mode_steps: of the search, each with m tangents; one step more is differentiated.
        bound: "sampled", by `samples` draws of q*; "closed-form", by "expected" of
            `sampling_free_elbo` with the full covariance, which draws nothing and is no bound.
        samples: K.
        draws: how they hang together, as in `MonteCarlo`.
        backend: of the tangents, as in `SamplingFreeLoss`.

    Raises:
        ValueError: for a setting out of range.
    """

    def __init__(
        self,
        decoder: Callable[..., Tensor],
        *,
        noise_var: float = 0.5,
        mode_steps: int = 1,
        bound: Bound = "sampled",
        samples: int = 1,
        draws: Draws = "iid",
        backend: _checks.Backend = "auto",
    ) -> None:
        _checks.noise_var(noise_var)
        _checks.choice("bound", bound, BOUNDS)
        for name, value in (("mode_steps", mode_steps), ("samples", samples)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        check_draws(draws, samples)
        self.decoder, self.noise_var, self.mode_steps = decoder, noise_var, mode_steps
        self.bound, self.backend = bound, backend
        self.samples, self.draws = samples, draws

    def __call__(
        self, x: Tensor, mean: Tensor, log_var: Tensor, *, generator: torch.Generator | None = None
    ) -> Terms:
        """Evaluate; see `Objective`.

        `objective` is the ELBO of q*, `kl` its divergence from the prior; the loss has
        KL(q || q*) besides.
        """
        _checks.latent(mean, log_var)
        # Every step is taken, so that no batch waits for its slowest image.
        found = fit_latents(
            *(self.decoder, x, mean),
            steps=self.mode_steps,
            prior_var=1.0,
            noise_var=self.noise_var,
            tol=0.0,
            backend=self.backend,
        )
        at = self.decoder, x, found.z, self.noise_var
        mode, factor = linearized_posterior(*at, self.backend)
        kl = gaussian_kl_of_factor(mode, factor)
        if self.bound == "closed-form":
            terms = sampling_free_elbo(
                *(self.decoder, x, mode, factor),
                noise_var=self.noise_var,
                likelihood="expected",
                backend=self.backend,
            )
            log_likelihood, squared_error = terms.log_likelihood, terms.squared_error
        else:
            shape = (self.samples, *mode.shape)
            options: Any = {"device": mode.device, "dtype": mode.dtype, "generator": generator}
            noise = standard_normal(shape, self.draws, **options)
            # The draw is no layer: autocast would leave eight bits of it.
            with torch.autocast(mode.device.type, enabled=False):
                z = mode + (factor @ noise.unsqueeze(-1)).squeeze(-1)
            log_likelihood, squared_error = (
                t.mean(0) for t in decode(self.decoder, x, z, self.noise_var)
            )
        elbo = log_likelihood - kl
        loss = divergence(mode.detach(), factor.detach(), mean, log_var).mean() - elbo.mean()
        detached = (t.detach() for t in (elbo, log_likelihood, kl, squared_error))
        return Terms(loss, *detached)
