"""The primitive (J, r, h, c) -> (log_det, explained, rr) as its formulas read."""

from torch import Tensor

from fastsfvae.reference.gram_project import gram_project
from fastsfvae.reference.woodbury import woodbury


def low_rank_terms(jacobian: Tensor, residual: Tensor, latent_var: Tensor, noise_var: Tensor):
    """Return ``(log_det, explained, rr)``, each ``[B]``, by autograd-differentiable dense algebra.

    Args:
        jacobian: J, ``[B, m, n]``.
        residual: r, ``[B, n]``.
        latent_var: h, ``[B, m]``.
        noise_var: c, ``[B]``.
    """
    gram, projection, squared_error = gram_project(jacobian, residual)
    log_det, explained = woodbury(gram, projection, latent_var, noise_var)
    return log_det, explained, squared_error
