"""Where a chunk's Gram G = J J^T comes from, and its cotangents go to.

`Written` has J at hand. `Unwritten` has what goes into the decoder's last layer, which gives the
same sums on the way (`fastsfvae.ops.gram_tail`): the same four functions, no J.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastsfvae.jacobian.chunked import empty_gradient, flatten_in_memory_order
from fastsfvae.jacobian.jet import Jet, from_stack, full_tangent
from fastsfvae.jacobian.tail import LastLayer
from fastsfvae.ops.gram_project import gram_project_backward
from fastsfvae.ops.gram_tail import tail_backward, tail_partials, tail_values
from fastsfvae.ops.low_rank import (
    Solved,
    low_rank_forward,
    low_rank_of_partials,
    squared_norms,
)


class Pulled(NamedTuple):
    """Gradients of what a chunk's Gram was made of.

    Attributes:
        jet: of the decoder's output and its tangents, or of the last layer's input.
        x: of the data, ``[b, *out]``.
        others: of the last layer's own tensors, as pairs (tensor, gradient).
    """

    jet: Jet
    x: Tensor
    others: tuple[tuple[Tensor, Tensor], ...] = ()


class Written:
    """A chunk whose J exists.

    Args:
        output: the decoder's output with its tangents.
        x: data ``[b, *out]``.
        backend: "torch" or "triton".
    """

    def __init__(self, output: Jet, x: Tensor, backend: str):
        self._output, self._backend = output, backend
        self._J, self._r = flatten_in_memory_order(full_tangent(output), x - output.primal)
        self.n = self._r.shape[1]

    def solve(self, h: Tensor, c: Tensor, second_var: Tensor | None) -> Solved:
        """As `low_rank_forward`, with h ``[b, m]`` and c ``[b]``."""
        return low_rank_forward(self._J, self._r, h, c, second_var, self._backend)

    def norms(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """r^T r ``[b]`` and the squared norms of J's rows ``[b, m]``, without any G."""
        return squared_norms(self._J, self._r, dtype)

    def pull(self, M: Tensor, u: Tensor, g_rr: Tensor) -> Pulled:
        """The gradients for cotangents as `gram_project_backward` takes them."""
        grad, dJ, df = empty_gradient(self._output)
        _, dr = gram_project_backward(self._J, self._r, M, u, g_rr, self._backend, dJ)
        return self._pulled(grad, df, dr)

    def pull_norms(self, rate: Tensor, g_rr: Tensor) -> Pulled:
        """The gradients for cotangents of `norms`: ``[b, m]`` of the rows', ``[b]`` of r's."""
        grad, dJ, df = empty_gradient(self._output)
        torch.mul(self._J, (2 * rate).unsqueeze(-1).to(dJ.dtype), out=dJ)
        return self._pulled(grad, df, 2 * g_rr.unsqueeze(-1) * self._r)

    def _pulled(self, grad: Jet, df: Tensor, dr: Tensor) -> Pulled:
        # r = x - f
        df.copy_(dr).neg_()
        return Pulled(grad, -grad.primal)


class Unwritten:
    """A chunk whose decoder has stopped in front of its last layer.

    Args:
        last: where it stopped.
        x: data ``[b, *out]``.
    """

    def __init__(self, last: LastLayer, x: Tensor):
        self._last, self._values = last, tail_values(last.tail)
        r = (x - self._values.output).to(torch.float32)
        self._r = r.contiguous(memory_format=torch.channels_last)
        self.n = r[0].numel()

    def _partials(self, lost: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        return tail_partials(self._last.tail, self._values, self._r, lost)

    def solve(self, h: Tensor, c: Tensor, second_var: Tensor | None) -> Solved:
        """As `Written`."""
        # Rounded tangents cannot be rescued.
        redo = self._partials if self._last.tail.stack.dtype == torch.float32 else None
        return low_rank_of_partials(self._partials(), h, c, second_var, redo)

    def norms(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """As `Written`, from G's diagonal."""
        G, _, rr = self._partials()
        return rr.sum(0).to(dtype), G.sum(0).diagonal(dim1=-2, dim2=-1).to(dtype)

    def pull(self, M: Tensor, u: Tensor, g_rr: Tensor) -> Pulled:
        """As `Written`."""
        tail = self._last.tail
        grads = tail_backward(tail, self._values, self._r, M, u, g_rr)
        pairs = (tail.weight, grads.weight), (tail.bias, grads.bias)
        others = tuple((t, g) for t, g in pairs if t is not None and g is not None)
        return Pulled(from_stack(grads.stack), grads.x, others)

    def pull_norms(self, rate: Tensor, g_rr: Tensor) -> Pulled:
        """As `Written`."""
        return self.pull(torch.diag_embed(2 * rate), torch.zeros_like(rate), g_rr)
