"""Gram matrix and projection of a tangent-major Jacobian: G = J J^T, p = J r, rr = r^T r."""

from torch import Tensor


def gram_project(jacobian: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(G [B, m, m], p [B, m], rr [B])`` of ``J [B, m, n]`` and ``r [B, n]``."""
    gram = jacobian @ jacobian.mT
    projection = (jacobian @ residual.unsqueeze(-1)).squeeze(-1)
    squared_error = residual.square().sum(-1)
    return gram, projection, squared_error
