"""A chunk whose decoder has stopped in front of its last layer, which kernels take with the Gram.

They give the same sums on the way (`fastsfvae.ops.gram_tail`), and write J, in an order of their
own, where a gradient will want it.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastsfvae.gram.written import Pulled
from fastsfvae.jacobian.rules.jet import from_stack
from fastsfvae.ops.elbo import Parts
from fastsfvae.ops.gram_tail import (
    Tail,
    empty_rows,
    tail_backward,
    tail_output,
    tail_partials,
    tail_values,
    with_dense,
)
from fastsfvae.ops.low_rank import Solved, low_rank_of_partials


class Unwritten:
    """The same as `fastsfvae.gram.written.Written`, without a J in its order.

    Args:
        tail: the layer on what goes into it.
        x: data ``[b, *out]``; None for the output itself.
        pulled: whether a gradient will be wanted, for which the kernels keep J.
        of_data: whether the data's will be, too.
    """

    def __init__(self, tail: Tail, x: Tensor | None, pulled: bool = True, of_data: bool = True):
        self._tail = tail = with_dense(tail)
        self._values, self._of_data = tail_values(tail, x), of_data
        self._Z = empty_rows(tail) if pulled else None
        self.n = self._values.r[0].numel()

    @functools.cached_property
    def output(self) -> Tensor:
        """As `Written`."""
        output = self._values.output
        # No objective reads it, so that it is not made with the residual.
        return tail_output(self._tail) if output is None else output

    def _partials(self) -> tuple[Tensor, Tensor, Tensor]:
        return tail_partials(self._tail, self._values, Z=self._Z)

    def _redo(self, lost: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tail_partials(self._tail, self._values, lost)

    def sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """As `Written`."""
        G, p, rr = self._partials()
        return G.sum(0), p.sum(0), rr.sum(0)

    def parts(self) -> Parts:
        """As `Written`."""
        # Rounded tangents cannot be rescued.
        redo = self._redo if self._tail.stack.dtype == torch.float32 else None
        return Parts(self._partials(), redo)

    def solve(self, h: Tensor, c: Tensor, second_var: Tensor | None) -> Solved:
        """As `Written`."""
        parts = self.parts()
        return low_rank_of_partials(parts.sums, h, c, second_var, parts.redo)

    def norms(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """As `Written`, from G's diagonal."""
        G, _, rr = self.sums()
        return rr.to(dtype), G.diagonal(dim1=-2, dim2=-1).to(dtype)

    def pull(self, M: Tensor, u: Tensor, g_rr: Tensor, df: Tensor | None = None) -> Pulled:
        """As `Written`."""
        tail = self._tail
        if self._Z is None:
            self._Z = empty_rows(tail)
            self._partials()
        given = self._values, self._Z, M, u, g_rr, df
        grads = tail_backward(tail, *given, self._of_data)
        pairs = (tail.weight, grads.weight), (tail.bias, grads.bias)
        others = tuple((t, g) for t, g in pairs if t is not None and g is not None)
        return Pulled(from_stack(grads.stack), grads.x, others)

    def pull_norms(self, rate: Tensor, g_rr: Tensor) -> Pulled:
        """As `Written`."""
        return self.pull(torch.diag_embed(2 * rate), torch.zeros_like(rate), g_rr)
