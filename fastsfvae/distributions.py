"""The pushed-forward Gaussian as a `torch.distributions` distribution."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from fastsfvae import _checks
from fastsfvae.ops.low_rank import low_rank_terms


class LinearizedGaussian(Distribution):
    r"""N(f(mu), J diag(h) J^T + cI): a decoder's output under z ~ N(mu, diag(h)), linearised at mu.

    Eq. 13 of the paper. The covariance is never formed unless `covariance_matrix` is asked for;
    `log_prob` and `entropy` use the Woodbury identity and the determinant lemma (eq. 19).

    Args:
        loc: f(mu), ``[B, n]`` or ``[n]``.
        jacobian: J, tangent-major, ``[B, m, n]`` or ``[m, n]``.
        latent_var: h, ``[B, m]`` or ``[m]``.
        noise_var: c, a number or a 0-d tensor.
        validate_args: as in `torch.distributions`.

    Raises:
        TypeError: for integer tensors.
        ValueError: for shapes that do not fit together, or a noise_var that is not positive.
    """

    arg_constraints = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        loc: Tensor,
        jacobian: Tensor,
        latent_var: Tensor,
        noise_var: float | Tensor,
        validate_args: bool | None = None,
    ):
        _checks.noise_var(noise_var)
        _checks.tensors(loc=loc, jacobian=jacobian, latent_var=latent_var)
        if loc.dim() == 1:
            _checks.low_rank(loc[None], jacobian[None], latent_var[None])
        else:
            _checks.low_rank(loc, jacobian, latent_var)
        self.loc = loc
        self.jacobian = jacobian
        self.latent_var = latent_var
        self.noise_var = torch.as_tensor(noise_var, dtype=loc.dtype, device=loc.device)
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape, _instance=None) -> LinearizedGaussian:
        """Return the same distribution over a larger batch ``[B]`` (one leading axis at most)."""
        shape = torch.Size(batch_shape)
        return LinearizedGaussian(
            self.loc.expand(shape + self.event_shape),
            self.jacobian.expand(shape + self.jacobian.shape[-2:]),
            self.latent_var.expand(shape + self.latent_var.shape[-1:]),
            self.noise_var,
            validate_args=False,
        )

    @property
    def mean(self) -> Tensor:
        """f(mu), ``[..., n]``."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """Diagonal of the covariance, sum_i h_i J_i^2 + c, ``[..., n]``."""
        return (self.latent_var.unsqueeze(-1) * self.jacobian.square()).sum(-2) + self.noise_var

    @property
    def covariance_matrix(self) -> Tensor:
        """J diag(h) J^T + cI, ``[..., n, n]``: n^2 numbers a sample."""
        n = self.loc.shape[-1]
        eye = torch.eye(n, dtype=self.loc.dtype, device=self.loc.device)
        scaled = self.latent_var.unsqueeze(-1) * self.jacobian
        return self.jacobian.mT @ scaled + self.noise_var * eye

    def rsample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008
        """Draws f(mu) + J^T (sqrt(h) e1) + sqrt(c) e2, ``[*sample_shape, ..., n]``."""
        shape = torch.Size(sample_shape)
        latent_noise = self.latent_var.new_empty(shape + self.latent_var.shape).normal_()
        noise = self.loc.new_empty(shape + self.loc.shape).normal_()
        latent_noise = (self.latent_var.sqrt() * latent_noise).unsqueeze(-2)
        pushed = (latent_noise @ self.jacobian).squeeze(-2)
        return self.loc + pushed + self.noise_var.sqrt() * noise

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats of ``value [*sample_shape, ..., n]``: ``[*sample_shape, ...]``."""
        _checks.tensors(value=value)
        if self._validate_args:
            self._validate_sample(value)
        residual = value - self.loc
        lead = residual.shape[: residual.dim() - self.loc.dim()]
        batch = self._terms_batch()
        # One pass over J for each draw: copying J for all of them at once would cost more memory
        # than the draws are worth.
        draws = residual.reshape(-1, batch[0].shape[0], residual.shape[-1])
        log_probs = torch.stack([self._log_prob(draw, *batch) for draw in draws])
        return log_probs.reshape(lead + self.batch_shape)

    def entropy(self) -> Tensor:
        """n/2 (1 + log 2 pi c) + 1/2 logdet(I + A/c), in nats, ``[...]``."""
        jacobian, latent_var, noise_var = self._terms_batch()
        residual = jacobian.new_zeros(jacobian.shape[0], jacobian.shape[-1])
        log_det = low_rank_terms(jacobian, residual, latent_var, noise_var).log_det
        n = self.loc.shape[-1]
        constant = 0.5 * n * (1 + math.log(2 * math.pi) + self.noise_var.log())
        return (constant + 0.5 * log_det).reshape(self.batch_shape)

    def _terms_batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """J [B, m, n], h [B, m] and c [B], whatever the batch shape."""
        jacobian = self.jacobian.reshape(-1, *self.jacobian.shape[-2:])
        latent_var = self.latent_var.reshape(-1, self.latent_var.shape[-1])
        return jacobian, latent_var, self.noise_var.expand(jacobian.shape[0])

    @staticmethod
    def _log_prob(residual, jacobian, latent_var, noise_var) -> Tensor:
        terms = low_rank_terms(jacobian, residual, latent_var, noise_var)
        constant = residual.shape[-1] * (2 * math.pi * noise_var).log()
        mahalanobis = (terms.squared_error - terms.explained) / noise_var
        return -0.5 * (constant + terms.log_det + mahalanobis)
