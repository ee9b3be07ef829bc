"""Posteriors of a full covariance, by a Householder flow."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsfvae.likelihoods import wide


class Householder(nn.Module):
    """An encoder whose Gaussian is turned by T reflections (Tomczak & Welling 2016).

    z = H_T ... H_1 z_0 with z_0 ~ N(mean, diag(exp(log_var))) and H_t = I - 2 v_t v_t^T / |v_t|^2.
    The first v is an affine function of the encoder's outputs (in the paper of its last hidden
    layer, which an encoder of one's own need not show), each further one of the last. As U = H_T
    ... H_1 is orthogonal, z ~ N(U mean, U diag(exp(log_var)) U^T): a Gaussian of full covariance,
    whose KL divergence from N(0, I) is z_0's. The rest of the method is `Sampling`.

    Args:
        encoder: x -> (mean, log_var), each ``[B, m]``.
        latent_dim: m.
        flows: T, at least 1; m of them reach every rotation or reflection.

    Raises:
        ValueError: for fewer.
    """

    def __init__(self, encoder: nn.Module, latent_dim: int, flows: int) -> None:
        super().__init__()
        if flows < 1:
            raise ValueError(f"flows={flows} must be at least 1")
        self.encoder = encoder
        sizes = [2 * latent_dim, *[latent_dim] * (flows - 1)]
        self.vectors = nn.ModuleList([nn.Linear(inputs, latent_dim) for inputs in sizes])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean ``[B, m]`` and the covariance's Cholesky factor ``[B, m, m]``."""
        mean, log_var = self.encoder(x)
        # A covariance is no place for eight bits.
        with torch.autocast(mean.device.type, enabled=False):
            mean, log_var = wide(mean), wide(log_var)
            v = torch.cat([mean, log_var], -1)
            # The mean beside the columns of the root of the covariance.
            turned = torch.cat([mean.unsqueeze(-1), torch.diag_embed(torch.exp(0.5 * log_var))], -1)
            for vector in self.vectors:
                assert isinstance(vector, nn.Linear)
                v = F.linear(v, wide(vector.weight), wide(vector.bias))
                unit = F.normalize(v, dim=-1).unsqueeze(-1)
                turned = turned - 2 * unit * (unit.mT @ turned)
            # A A^T = R^T R with A^T = Q R: no precision is lost by squaring.
            upper = torch.linalg.qr(turned[..., 1:].mT).R
            signs = torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(upper.dtype)
            return turned[..., 0], (signs.unsqueeze(-1) * upper).mT
