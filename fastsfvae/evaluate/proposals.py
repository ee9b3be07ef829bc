"""Densities that the importance samples of a latent are drawn from."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from fastsfvae.evaluate._decode import Decoder, Proposal, checked_output
from fastsfvae.fit import fit_latents
from fastsfvae.jacobian.api import decode_with_jacobian

ProposalName: TypeAlias = Literal["posterior", "linearized", "defensive", "laplace"]
PROPOSALS: tuple[ProposalName, ...] = get_args(ProposalName)
# What all functions and commands take unless told otherwise.
DEFAULT_PROPOSAL: ProposalName = "defensive"

# Towards the posterior's mode.
_STEPS = 10
# Of a defensive mixture: what q(z|x) and the prior have of the draws.
_POSTERIOR_SHARE, _PRIOR_SHARE = 0.1, 0.05
# A standard normal number lies below the first with the first's probability, below the second with
# that of both.
_POSTERIOR_BELOW, _PRIOR_BELOW = -1.2815515655446004, -1.0364333894937898


class Posterior:
    """q(z|x) = N(mean, diag(exp(log_var))), each ``[b, m]``."""

    def __init__(self, mean: Tensor, log_var: Tensor) -> None:
        self.columns = mean.shape[1]
        self._mean = mean
        self._std = torch.exp(0.5 * log_var)
        self._log_det = log_var.double().sum(-1, keepdim=True)

    @property
    def precision(self) -> Tensor:
        """The inverse of the covariance, ``[b, m, m]`` float64."""
        return torch.diag_embed(self._std.double() ** -2)

    def draw(self, images: slice, noise: Tensor) -> tuple[Tensor, Tensor]:
        """See `Proposal`."""
        z = self.shift(images, noise)
        return z, self._normalise(images, noise.double())

    def shift(self, images: slice, noise: Tensor) -> Tensor:
        """Turn noise ``[b, k, m]`` into draws."""
        return self._mean[images, None] + self._std[images, None] * noise

    def log_density(self, images: slice, z: Tensor) -> Tensor:
        """Evaluate at z ``[b, k, m]`` from anywhere: ``[b, k]`` float64, without (2 pi)^(-m/2)."""
        return self._normalise(images, self._whiten(images, z.double() - self._at(images)))

    def _at(self, images: slice) -> Tensor:
        return self._mean[images, None].double()

    def _whiten(self, images: slice, deviation: Tensor) -> Tensor:
        return deviation / self._std[images, None].double()

    def _normalise(self, images: slice, whitened: Tensor) -> Tensor:
        return -0.5 * (whitened.square().sum(-1) + self._log_det[images])


class FullPosterior(Posterior):
    """q(z|x) = N(mean, L L^T), with mean ``[b, m]`` and any factor L ``[b, m, m]``."""

    def __init__(self, mean: Tensor, factor: Tensor) -> None:
        self.columns = mean.shape[1]
        self._mean, self._factor = mean, factor
        self._log_det = 2 * torch.linalg.slogdet(factor.double()).logabsdet.unsqueeze(-1)

    @property
    def precision(self) -> Tensor:
        """The inverse of the covariance, ``[b, m, m]`` float64."""
        inverse = torch.linalg.inv(self._factor.double())
        return inverse.mT @ inverse

    def shift(self, images: slice, noise: Tensor) -> Tensor:
        """Turn noise ``[b, k, m]`` into draws."""
        return self._mean[images, None] + noise @ self._factor[images].mT

    def _whiten(self, images: slice, deviation: Tensor) -> Tensor:
        return torch.linalg.solve(self._factor[images].double(), deviation.mT).mT


def posterior(mean: Tensor, log_var: Tensor) -> Posterior:
    """q(z|x) of log_var ``[b, m]``, or of a factor of the covariance ``[b, m, m]``."""
    return FullPosterior(mean, log_var) if log_var.dim() == 3 else Posterior(mean, log_var)


class Gaussian:
    """N(loc, precision^-1), with loc ``[b, m]`` and precision ``[b, m, m]``, both float64."""

    def __init__(self, loc: Tensor, precision: Tensor, dtype: torch.dtype) -> None:
        self.columns = loc.shape[1]
        self._loc, self._precision = loc, precision
        # cholesky_ex does not wait for the device; a broken image gives no exception.
        self._factor, self._info = torch.linalg.cholesky_ex(precision)
        # eps -> L^-T eps, for rows of eps.
        identity = torch.eye(self.columns, dtype=loc.dtype, device=loc.device)
        inverse = torch.linalg.solve_triangular(self._factor, identity, upper=False)
        self._spread = inverse.to(dtype)
        self._log_det = self._factor.diagonal(dim1=-2, dim2=-1).log().sum(-1, keepdim=True)

    def or_posterior(self, mean: Tensor, posterior: Posterior) -> Gaussian:
        """The same with the posterior of this mean for the images where it is no density."""
        finite = self._loc.isfinite().all(1) & self._precision.isfinite().all(2).all(1)
        whole = (finite & (self._info == 0)).unsqueeze(-1)
        return Gaussian(
            torch.where(whole, self._loc, mean.double()),
            torch.where(whole.unsqueeze(-1), self._precision, posterior.precision),
            mean.dtype,
        )

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


def linearized(decoder: Decoder, x: Tensor, mean: Tensor, noise_var: float | Tensor) -> Gaussian:
    """The exact posterior of the decoder linearised at a = mean.

    With r = x - f(a) and p = J^T r its precision is Lambda = I + J^T J / c and its mean
    a + Lambda^-1 (p / c - a). For a linear decoder every importance weight then equals p(x).

    Args:
        decoder: f.
        x: ``[b, *out]``.
        mean: a, ``[b, m]``.
        noise_var: c.
    """
    output, J, precision, c = _linearise(decoder, x, mean, noise_var)
    r = (x - output).flatten(1).double().unsqueeze(-1)
    score = J @ r / c - mean.double().unsqueeze(-1)
    step = torch.cholesky_solve(score, torch.linalg.cholesky_ex(precision).L).squeeze(-1)
    return Gaussian(mean.double() + step, precision, mean.dtype)


def laplace(decoder: Decoder, x: Tensor, mean: Tensor, noise_var: float | Tensor) -> Gaussian:
    """Laplace's approximation: around the posterior's mode, with the precision Lambda there.

    Args:
        decoder: f.
        x: ``[b, *out]``.
        mean: where the mode is looked for, ``[b, m]``.
        noise_var: c.
    """
    # What cannot be linearised is refused in the words that all proposals have.
    _linearise(decoder, x[:1], mean[:1], noise_var)
    mode = fit_latents(decoder, x, mean, steps=_STEPS, prior_var=1.0, noise_var=noise_var, tol=0).z
    # Not the fit's covariance, which is in the latents' own dtype.
    _, _, precision, _ = _linearise(decoder, x, mode, noise_var)
    return Gaussian(mode.double(), precision, mean.dtype)


def _linearise(
    decoder: Decoder, x: Tensor, z: Tensor, noise_var: float | Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """f(z) like x, J ``[b, m, n]``, Lambda and c, the last three in float64."""
    try:
        output, jacobian = decode_with_jacobian(decoder, z)
    except (TypeError, ValueError, RuntimeError) as error:
        words = " ".join(str(error).split())
        error.args = (f'{words}; proposal="posterior" needs no Jacobian',)
        raise
    checked_output(output, len(z), x)
    # In float64: a float32 Gram matrix may cost Lambda its positive definiteness.
    J = jacobian.flatten(2).double()
    c = torch.as_tensor(noise_var, dtype=torch.float64, device=z.device)
    identity = torch.eye(z.shape[1], dtype=torch.float64, device=z.device)
    return output, J, identity + J @ J.mT / c, c


class Defensive:
    """A tenth of the draws from q(z|x), a twentieth from the prior, the others from a Gaussian.

    Its density is the mixture's, so that no weight exceeds ten times that under q alone, nor twenty
    times p(x|z). The prior reaches the modes that q and the Gaussian know nothing of: where one
    holds much of p(z|x), some draws meet it, and the effective sample size tells of them.
    """

    def __init__(self, posterior: Posterior, gaussian: Gaussian) -> None:
        # The last number of a row chooses the component.
        self.columns = posterior.columns + 1
        self._posterior, self._gaussian = posterior, gaussian

    def draw(self, images: slice, noise: Tensor) -> tuple[Tensor, Tensor]:
        """See `Proposal`."""
        choice, noise = noise[..., -1:], noise[..., :-1]
        z = torch.where(
            choice < _POSTERIOR_BELOW,
            self._posterior.shift(images, noise),
            torch.where(choice < _PRIOR_BELOW, noise, self._gaussian.shift(images, noise)),
        )
        log_prior = -0.5 * z.double().square().sum(-1)
        wide = torch.logaddexp(
            math.log(_POSTERIOR_SHARE) + self._posterior.log_density(images, z),
            math.log(_PRIOR_SHARE) + log_prior,
        )
        share = 1 - _POSTERIOR_SHARE - _PRIOR_SHARE
        return z, torch.logaddexp(wide, math.log(share) + self._gaussian.log_density(images, z))


def make_proposal(
    name: str, decoder: Decoder, x: Tensor, mean: Tensor, log_var: Tensor, noise_var: float | Tensor
) -> Proposal:
    """Build a proposal of `PROPOSALS` for images x ``[b, *out]``.

    Raises:
        TypeError, ValueError, RuntimeError: for a decoder without the Jacobian that it needs, in
            one line.
    """
    of_encoder = posterior(mean, log_var)
    if name == "posterior":
        return of_encoder
    make = laplace if name == "laplace" else linearized
    # Any density that covers p(z|x) is right: where one is not finite, q(z|x) is at hand.
    gaussian = make(decoder, x, mean, noise_var).or_posterior(mean, of_encoder)
    if name == "linearized":
        return gaussian
    return Defensive(of_encoder, gaussian)
