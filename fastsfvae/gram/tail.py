"""A chunk whose decoder has stopped in front of its last layer, which kernels take with the Gram.

They give the same sums on the way (`fastsfvae.ops.gram_tail`); J is never written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsfvae.gram.written import Pulled
from fastsfvae.jacobian.rules.jet import from_stack
from fastsfvae.ops.elbo import Parts
from fastsfvae.ops.gram_tail import Tail, tail_backward, tail_partials, tail_values
from fastsfvae.ops.low_rank import Solved, low_rank_of_partials


class Unwritten:
    """The same as `fastsfvae.gram.written.Written`, without a J.

    Args:
        tail: the layer on what goes into it.
        x: data ``[b, *out]``; None for the output itself.
    """

    def __init__(self, tail: Tail, x: Tensor | None):
        self._tail, self._values = tail, tail_values(tail)
        self.output = self._values.output
        r = torch.zeros_like(self.output) if x is None else x - self.output
        self._r = r.to(torch.float32).contiguous(memory_format=torch.channels_last)
        self.n = r[0].numel()

    def _partials(self, lost: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        return tail_partials(self._tail, self._values, self._r, lost)

    def sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """As `Written`."""
        G, p, rr = self._partials()
        return G.sum(0), p.sum(0), rr.sum(0)

    def parts(self) -> Parts:
        """As `Written`."""
        # Rounded tangents cannot be rescued.
        redo = self._partials if self._tail.stack.dtype == torch.float32 else None
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
        grads = tail_backward(tail, self._values, self._r, M, u, g_rr, df)
        pairs = (tail.weight, grads.weight), (tail.bias, grads.bias)
        others = tuple((t, g) for t, g in pairs if t is not None and g is not None)
        return Pulled(from_stack(grads.stack), grads.x, others)

    def pull_norms(self, rate: Tensor, g_rr: Tensor) -> Pulled:
        """As `Written`."""
        return self.pull(torch.diag_embed(2 * rate), torch.zeros_like(rate), g_rr)
