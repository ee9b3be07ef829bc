"""A chunk whose J exists."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastsfvae.jacobian.rules.jet import Jet, full_tangent
from fastsfvae.jacobian.run.chunks import empty_gradient, flatten_in_memory_order
from fastsfvae.ops.elbo import Parts, jacobian_parts
from fastsfvae.ops.gram_project import (
    full_products,
    gram_project_backward,
    gram_project_forward,
)
from fastsfvae.ops.low_rank import Redo, Solved, float64_sums, low_rank_forward, squared_norms


class Pulled(NamedTuple):
    """Gradients of what a chunk's Gram was made of.

    Attributes:
        jet: of the decoder's output and its tangents, or of the last layer's input.
        x: of the data, ``[b, *out]``; None where it was said that it is not wanted.
        others: of the last layer's own tensors, as pairs (tensor, gradient).
    """

    jet: Jet
    x: Tensor | None
    others: tuple[tuple[Tensor, Tensor], ...] = ()


class Written:
    """A chunk whose J exists.

    Args:
        result: the decoder's output with its tangents.
        x: data ``[b, *out]``; None for the output itself, so that r = 0.
        backend: "torch" or "triton".

    Attributes:
        output: f(z), ``[b, *out]`` (of other sources perhaps flat, ``[b, n]``).
        n: its elements of one sample.
    """

    def __init__(self, result: Jet, x: Tensor | None, backend: str):
        self._result, self._backend, self.output = result, backend, result.primal
        residual = torch.zeros_like(self.output) if x is None else x - self.output
        self._J, self._r = flatten_in_memory_order(full_tangent(result), residual)
        self.n = self._r.shape[1]

    def sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """G ``[b, m, m]``, p ``[b, m]`` and rr ``[b]``, in float32 at least."""
        return gram_project_forward(self._J, self._r, self._backend)

    def parts(self) -> Parts | None:
        """The sums in parts, as the kernels that finish an objective take them; None without."""
        return jacobian_parts(self._J, self._r) if self._backend == "triton" else None

    def solve(self, h: Tensor, c: Tensor, second_var: Tensor | None) -> Solved:
        """As `low_rank_forward`, with h ``[b, m]`` and c ``[b]``."""
        return low_rank_forward(self._J, self._r, h, c, second_var, self._backend)

    def redo(self) -> Redo | None:
        """As `low_rank_of_sums` takes it."""
        return float64_sums(self._J, self._r)

    def scale(self) -> Tensor | None:
        """What G_kk is rounded against, ``[b, m]``; None for G_kk itself."""
        return None

    def norms(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """r^T r ``[b]`` and the squared norms of J's rows ``[b, m]``, without any G."""
        return squared_norms(self._J, self._r, dtype)

    def pull(self, M: Tensor, u: Tensor, g_rr: Tensor, df: Tensor | None = None) -> Pulled:
        """The gradients for cotangents as `gram_project_backward` takes them.

        Args:
            M: dG + dG^T, ``[b, m, m]``.
            u: dp, ``[b, m]``.
            g_rr: of rr, ``[b]``.
            df: of `output`, besides; None for nothing.
        """
        grad, dJ, of_value = empty_gradient(self._result)
        _, dr = gram_project_backward(self._J, self._r, M, u, g_rr, self._backend, dJ)
        return self._pulled(grad, of_value, dr, df)

    def pull_root(self, R: Tensor, g: Tensor) -> Pulled:
        """As `pull` with M = g R^T R alone, by two products: see `fastsfvae.ops.log_det`.

        Args:
            R: ``[b, m, m]``.
            g: ``[b]``.
        """
        grad, dJ, of_value = empty_gradient(self._result)
        with full_products(self._J):
            J = R @ self._J.to(R.dtype)
        back, zeros = g[:, None, None] * R.mT, (torch.zeros_like(R[:, 0]), torch.zeros_like(g))
        _, dr = gram_project_backward(J, self._r, back, *zeros, self._backend, dJ)
        return self._pulled(grad, of_value, dr, None)

    def pull_norms(self, rate: Tensor, g_rr: Tensor) -> Pulled:
        """The gradients for cotangents of `norms`: ``[b, m]`` of the rows', ``[b]`` of r's."""
        grad, dJ, of_value = empty_gradient(self._result)
        torch.mul(self._J, (2 * rate).unsqueeze(-1).to(dJ.dtype), out=dJ)
        return self._pulled(grad, of_value, 2 * g_rr.unsqueeze(-1) * self._r, None)

    def _pulled(self, grad: Jet, of_value: Tensor, dr: Tensor, df: Tensor | None) -> Pulled:
        # r = x - f
        of_value.copy_(dr).neg_()
        of_x = -grad.primal
        if df is not None:
            grad.primal.add_(df)
        return Pulled(grad, of_x)
