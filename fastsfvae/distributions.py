"""Gaussians through a linearised decoder: pushed forward, and conditioned on what it shows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from fastsfvae import _checks
from fastsfvae._checks import Backend
from fastsfvae.gram.pullback import pullback
from fastsfvae.jacobian.api import decode_with_jacobian
from fastsfvae.jacobian.validate import Shared
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

    @classmethod
    def from_decoder(
        cls,
        decoder: Callable[..., Tensor],
        mean: Tensor,
        cov: Tensor,
        noise_var: float | Tensor,
        *args: Any,
        backend: Backend = "auto",
        chunk_size: int | None = None,
        shared: Shared = (),
        **kwargs: Any,
    ) -> LinearizedGaussian:
        """Push N(mean, cov) through a decoder linearised at the mean; outputs are flattened.

        A full covariance P = L L^T is pushed forward along the columns of L: J is then J L and the
        latent variances are 1. Differentiable as `decode_with_jacobian`.

        Args:
            decoder: see `decode_with_jacobian`.
            mean: ``[B, m]``.
            cov: variances ``[B, m]``, or positive definite covariances ``[B, m, m]``.
            noise_var: c, in squared units of the output.
            *args: further decoder inputs.
            backend: see `decode_with_jacobian`.
            chunk_size: likewise.
            shared: likewise.
            **kwargs: further decoder inputs by name.

        Raises:
            TypeError, ValueError, RuntimeError: see `decode_with_jacobian`; a covariance of another
                shape, or one that is not positive definite.
        """
        _checks.noise_var(noise_var)
        factor = _factor(mean, cov)
        tangents = None if factor is None else factor.permute(2, 0, 1)
        output, jacobian = decode_with_jacobian(
            *(decoder, mean, *args),
            tangents=tangents,
            backend=backend,
            chunk_size=chunk_size,
            shared=shared,
            **kwargs,
        )
        variances = cov if factor is None else torch.ones_like(mean)
        return cls(output.flatten(1), jacobian.flatten(2), variances, noise_var)

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


class KalmanUpdate(NamedTuple):
    """A latent Gaussian after an observation, in the latents' dtype.

    Attributes:
        mean: ``[B, m]``.
        cov: ``[B, m, m]``, symmetric.
        log_prob: of the observation beforehand, ``[B]``, in nats.
    """

    mean: Tensor
    cov: Tensor
    log_prob: Tensor


def kalman_update(
    decoder: Callable[..., Tensor],
    x: Tensor,
    mean: Tensor,
    cov: Tensor,
    noise_var: float | Tensor,
    *args: Any,
    at: Tensor | None = None,
    backend: Backend = "auto",
    chunk_size: int | None = None,
    shared: Shared = (),
    **kwargs: Any,
) -> KalmanUpdate:
    """Condition z ~ N(mean, cov) on x = f(z) + noise, f linearised at the mean, or at `at`.

    The extended Kalman filter's update with the observation noise cI, by m x m systems whatever the
    size of x. With cov = L L^T, J_L = J L, G = J_L^T J_L, p = J_L^T (x - f(mean)), C = cI + G:

        mean + L C^-1 p        c L C^-1 L^T        log N(x; f(mean), J_L J_L^T + cI)

    where with `at` f(mean) is the linearisation's, f(at) + J (mean - at). At the mean of an update
    before, that is the iterated filter's next one, which ends at the posterior's mode.

    For a linear decoder that is the Kalman filter, and the posterior exact. Differentiable in every
    tensor and in the decoder's parameters. Where rounding of G costs C its positive definiteness,
    4 eps of G's largest diagonal entry is added to c.

    Args:
        decoder: see `decode_with_jacobian`.
        x: observations ``[B, *out]``.
        mean: ``[B, m]``.
        cov: variances ``[B, m]``, or positive definite covariances ``[B, m, m]``.
        noise_var: c, in squared units of x.
        *args: further decoder inputs.
        at: ``[B, m]``, where f is linearised; it needs variances above 0. None for the mean.
        backend: see `decode_with_jacobian`.
        chunk_size: likewise.
        shared: likewise.
        **kwargs: further decoder inputs by name.

    Raises:
        TypeError, ValueError, RuntimeError: as `LinearizedGaussian.from_decoder`; an x that does
            not match the decoder's output.
    """
    _checks.noise_var(noise_var)
    factor = _factor(mean, cov)
    if at is not None:
        _checks.latent(mean, at, names=("mean", "at"))
    tangents = None if factor is None else factor.permute(2, 0, 1)
    found = pullback(
        *(decoder, mean if at is None else at, x, *args),
        tangents=tangents,
        backend=backend,
        chunk_size=chunk_size,
        shared=shared,
        **kwargs,
    )
    assert found.projection is not None and found.squared_error is not None
    G, p, rr = (t.double() for t in (found.gram, found.projection, found.squared_error))
    c = torch.as_tensor(noise_var, dtype=torch.float64, device=mean.device)
    L = torch.diag_embed(cov.double().sqrt()) if factor is None else factor.double()
    if factor is None:
        G, p = L @ G @ L, (L @ p.unsqueeze(-1)).squeeze(-1)
    if at is not None:
        # Of at - mean in L's terms: the residual is that of the linearisation at the mean.
        ahead = (at - mean).double().unsqueeze(-1)
        w = torch.linalg.solve_triangular(L, ahead, upper=False).squeeze(-1)
        moved = (G @ w.unsqueeze(-1)).squeeze(-1)
        rr = rr + (w * (2 * p + moved)).sum(-1)
        p = p + moved
    root = _root(G, c, torch.finfo(found.gram.dtype).eps)
    # Rows of (L C^-1/2)^T and C^-1/2 p.
    whitened = torch.linalg.solve_triangular(root, L.mT, upper=False)
    score = torch.linalg.solve_triangular(root, p.unsqueeze(-1), upper=False)
    n, m = found.output[0].numel(), mean.shape[1]
    log_det = 2 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1) + (n - m) * c.log()
    mahalanobis = (rr - score.square().sum((-2, -1))) / c
    log_prob = -0.5 * (n * math.log(2 * math.pi) + log_det + mahalanobis)
    step = (whitened.mT @ score).squeeze(-1)
    updated = mean + step, c * (whitened.mT @ whitened), log_prob
    return KalmanUpdate(*(t.to(mean.dtype) for t in updated))


def _root(G: Tensor, c: Tensor, eps: float) -> Tensor:
    """The lower Cholesky factor of cI + G, of a larger c where there is none."""
    C = G + c * torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
    with torch.no_grad():
        broken = torch.linalg.cholesky_ex(C).info > 0
        largest = G.diagonal(dim1=-2, dim2=-1).amax(-1)
        more = torch.where(broken, 4 * eps * largest, 0).unsqueeze(-1)
    return torch.linalg.cholesky_ex(C + torch.diag_embed(more.expand(G.shape[:-1]))).L


def _factor(mean: Tensor, cov: Tensor) -> Tensor | None:
    """The Cholesky factor ``[B, m, m]`` of full covariances; None for variances ``[B, m]``.

    Raises:
        TypeError, ValueError: what is neither.
    """
    _checks.floating("mean", mean)
    _checks.floating("cov", cov)
    _checks.same_device(("mean", mean), ("cov", cov))
    if mean.dim() == 2 and cov.shape == mean.shape:
        if cov.is_cpu and bool((cov < 0).any()):
            raise ValueError(f"cov holds a variance of {float(cov.min())}: give none below 0")
        return None
    if mean.dim() != 2 or cov.shape != (*mean.shape, mean.shape[1]):
        raise ValueError(
            f"mean {tuple(mean.shape)} and cov {tuple(cov.shape)} do not fit: give mean [B, m] and "
            "variances [B, m] or covariances [B, m, m]"
        )
    factor, info = torch.linalg.cholesky_ex(cov.to(mean.dtype))
    # Read where that is free; a GPU would be waited for.
    if info.is_cpu and bool(info.any()):
        sample = int(info.nonzero()[0])
        raise ValueError(f"cov of sample {sample} is not positive definite: add to its diagonal")
    return factor
