"""Densities that the importance samples of a latent are drawn from."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from fastsfvae.evaluate._decode import Decoder, Proposal
from fastsfvae.jacobian.api import decode_with_jacobian

ProposalName: TypeAlias = Literal["posterior", "linearized", "defensive"]
PROPOSALS: tuple[ProposalName, ...] = get_args(ProposalName)

_DEFENSIVE_SHARE = 0.1
# A standard normal number lies below it with that probability.
_DEFENSIVE_BELOW = -1.2815515655446004


class Posterior:
    """q(z|x) = N(mean, diag(exp(log_var))), each ``[b, m]``."""

    def __init__(self, mean: Tensor, log_var: Tensor) -> None:
        self.columns = mean.shape[1]
        self._mean, self._log_var = mean, log_var
        self._std = torch.exp(0.5 * log_var)

    def draw(self, images: slice, noise: Tensor) -> tuple[Tensor, Tensor]:
        """See `Proposal`."""
        z = self.shift(images, noise)
        return z, self._normalise(images, noise.double())

    def shift(self, images: slice, noise: Tensor) -> Tensor:
        """Turn noise ``[b, k, m]`` into draws."""
        return self._mean[images, None] + self._std[images, None] * noise

    def log_density(self, images: slice, z: Tensor) -> Tensor:
        """Evaluate at z ``[b, k, m]`` from anywhere: ``[b, k]`` float64, without (2 pi)^(-m/2)."""
        mean, std = self._mean[images, None].double(), self._std[images, None].double()
        return self._normalise(images, (z.double() - mean) / std)

    def _normalise(self, images: slice, whitened: Tensor) -> Tensor:
        log_det = self._log_var[images].double().sum(-1, keepdim=True)
        return -0.5 * (whitened.square().sum(-1) + log_det)


class Linearized:
    """The exact posterior of the decoder linearised at a = mean.

    With r = x - f(a) and p = J^T r its precision is Lambda = I + J^T J / c and its mean
    a + Lambda^-1 (p / c - a). For a linear decoder every importance weight then equals p(x).

    Args:
        decoder: f.
        x: ``[b, *out]``.
        mean: a, ``[b, m]``.
        noise_var: c.
    """

    def __init__(self, decoder: Decoder, x: Tensor, mean: Tensor, noise_var: float | Tensor):
        self.columns = mean.shape[1]
        output, jacobian = decode_with_jacobian(decoder, mean)
        # In float64: a float32 Gram matrix may cost Lambda its positive definiteness.
        J = jacobian.flatten(2).double()
        r = (x - output).flatten(1).double().unsqueeze(-1)
        a, c = mean.double(), torch.as_tensor(noise_var, dtype=torch.float64, device=mean.device)
        identity = torch.eye(self.columns, dtype=torch.float64, device=mean.device)
        # cholesky_ex does not wait for the device; a broken image gives NaN weights, no exception.
        self._factor = torch.linalg.cholesky_ex(identity + J @ J.mT / c).L
        score = J @ r / c - a.unsqueeze(-1)
        self._loc = a + torch.cholesky_solve(score, self._factor).squeeze(-1)
        # eps -> L^-T eps, for rows of eps.
        inverse = torch.linalg.solve_triangular(self._factor, identity, upper=False)
        self._spread = inverse.to(mean.dtype)
        self._log_det = self._factor.diagonal(dim1=-2, dim2=-1).log().sum(-1, keepdim=True)

    def draw(self, images: slice, noise: Tensor) -> tuple[Tensor, Tensor]:
        """See `Proposal`."""
        log_density = self._log_det[images] - 0.5 * noise.double().square().sum(-1)
        return self.shift(images, noise), log_density

    def shift(self, images: slice, noise: Tensor) -> Tensor:
        """Turn noise ``[b, k, m]`` into draws."""
        return self._loc[images, None].to(noise.dtype) + noise @ self._spread[images]

    def log_density(self, images: slice, z: Tensor) -> Tensor:
        """Evaluate at z ``[b, k, m]`` from anywhere: ``[b, k]`` float64, without (2 pi)^(-m/2)."""
        whitened = (z.double() - self._loc[images, None]) @ self._factor[images]
        return self._log_det[images] - 0.5 * whitened.square().sum(-1)


class Defensive:
    """A tenth of the draws from q(z|x), the others from the linearised posterior.

    Its density is the mixture's, so that no weight exceeds ten times that under q alone.
    """

    def __init__(self, posterior: Posterior, linearized: Linearized) -> None:
        # The last number of a row chooses the component.
        self.columns = posterior.columns + 1
        self._posterior, self._linearized = posterior, linearized

    def draw(self, images: slice, noise: Tensor) -> tuple[Tensor, Tensor]:
        """See `Proposal`."""
        from_posterior, noise = noise[..., -1:] < _DEFENSIVE_BELOW, noise[..., :-1]
        z = torch.where(
            from_posterior,
            self._posterior.shift(images, noise),
            self._linearized.shift(images, noise),
        )
        return z, torch.logaddexp(
            math.log(_DEFENSIVE_SHARE) + self._posterior.log_density(images, z),
            math.log1p(-_DEFENSIVE_SHARE) + self._linearized.log_density(images, z),
        )


def make_proposal(
    name: str, decoder: Decoder, x: Tensor, mean: Tensor, log_var: Tensor, noise_var: float | Tensor
) -> Proposal:
    """Build a proposal of `PROPOSALS` for images x ``[b, *out]``."""
    if name == "posterior":
        return Posterior(mean, log_var)
    linearized = Linearized(decoder, x, mean, noise_var)
    return linearized if name == "linearized" else Defensive(Posterior(mean, log_var), linearized)
