"""Where a chunk's Gram G = J J^T comes from, and its cotangents go to.

`Written` has J at hand. `Unwritten` has what goes into the decoder's last layer, which gives the
same sums on the way (`fastsfvae.ops.gram_tail`), and so has `Contracted`, whose last layer is
linear: the same four functions, no J.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastsfvae import reference
from fastsfvae._ranges import ranged
from fastsfvae.jacobian.plan.last_layer import LastLayer, Linear
from fastsfvae.jacobian.rules.jet import Jet, from_stack, full_tangent
from fastsfvae.jacobian.run.chunks import empty_gradient, flatten_in_memory_order
from fastsfvae.ops.gram_project import full_products, gram_project_backward
from fastsfvae.ops.gram_tail import Tail, tail_backward, tail_partials, tail_values
from fastsfvae.ops.low_rank import (
    Solved,
    low_rank_forward,
    low_rank_of_partials,
    low_rank_of_sums,
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
        tail: the layer on what goes into it.
        x: data ``[b, *out]``.
    """

    def __init__(self, tail: Tail, x: Tensor):
        self._tail, self._values = tail, tail_values(tail)
        r = (x - self._values.output).to(torch.float32)
        self._r = r.contiguous(memory_format=torch.channels_last)
        self.n = r[0].numel()

    def _partials(self, lost: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        return tail_partials(self._tail, self._values, self._r, lost)

    def solve(self, h: Tensor, c: Tensor, second_var: Tensor | None) -> Solved:
        """As `Written`."""
        # Rounded tangents cannot be rescued.
        redo = self._partials if self._tail.stack.dtype == torch.float32 else None
        return low_rank_of_partials(self._partials(), h, c, second_var, redo)

    def norms(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """As `Written`, from G's diagonal."""
        G, _, rr = self._partials()
        return rr.sum(0).to(dtype), G.sum(0).diagonal(dim1=-2, dim2=-1).to(dtype)

    def pull(self, M: Tensor, u: Tensor, g_rr: Tensor) -> Pulled:
        """As `Written`."""
        tail = self._tail
        grads = tail_backward(tail, self._values, self._r, M, u, g_rr)
        pairs = (tail.weight, grads.weight), (tail.bias, grads.bias)
        others = tuple((t, g) for t, g in pairs if t is not None and g is not None)
        return Pulled(from_stack(grads.stack), grads.x, others)

    def pull_norms(self, rate: Tensor, g_rr: Tensor) -> Pulled:
        """As `Written`."""
        return self.pull(torch.diag_embed(2 * rate), torch.zeros_like(rate), g_rr)


class Contracted:
    """A chunk whose last layer is linear, f = W a + b, and n wider than what goes into it.

    With T ``[m, k]`` the tangents of a, J = T W^T is not needed: with H = W^T W, U = T H and
    q = W^T r

        G = U T^T                   p = T q
        dT = M U + u q^T            dH = T^T M T / 2            t = T^T u
        dr = W t + 2 g_rr r         dW = r t^T + df a^T + what H gives, W (dH + dH^T)

    in 2 k^2 + 3 m k multiplications a tangent, and 2 n k^2 for all, where J takes 3 n k + 2 m n.

    G's rounding is that of |T|^2 |W|^2. Where a tangent keeps less than half the digits of that,
    or a number leaves the dtype's range, `contracts` is False, and `ThroughLayer` does without H.

    Args:
        source: a and T.
        tail: the layer.
        x: data ``[b, *out]``.
    """

    def __init__(self, source: Jet, tail: Linear, x: Tensor):
        self._source, self._tail, self._shape = source, tail, x.shape
        self._dtype = torch.promote_types(tail.metric.dtype, x.dtype)
        tangent, metric = full_tangent(source), tail.metric.to(self._dtype)
        with full_products(tangent):
            self._a, self._W = source.primal.to(self._dtype), tail.weight.to(self._dtype)
            f = self._a @ self._W.mT
            f = f if tail.bias is None else f + tail.bias
            self._r = x.flatten(1).to(self._dtype) - f
            self.n = self._r.shape[1]
            self._q = self._r @ self._W
            T = tangent.to(self._dtype)
            # One product for all tangents of the chunk.
            U = (T.flatten(0, 1) @ metric).view(T.shape)
            self._T, self._U = T.transpose(0, 1), U.transpose(0, 1)
        self._squares = (self._T * self._U).sum(-1)
        self.contracts = self._keeps_digits(tail.metric)

    def _keeps_digits(self, metric: Tensor) -> bool:
        range_ = torch.finfo(metric.dtype)
        total = metric.diagonal().sum()
        summed = self._T.square().sum(-1) * total
        kept = torch.isfinite(self._squares) & (self._squares >= range_.eps**0.5 * summed)
        return bool(kept.all()) and float(total) >= range_.tiny / range_.eps

    def solve(self, h: Tensor, c: Tensor, second_var: Tensor | None) -> Solved:
        """As `Written`."""
        T, r = self._T, self._r

        def redo(lost: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            J = T[lost].double() @ self._W.double().mT
            return reference.gram_project(J, r[lost].double())

        with full_products(T):
            G = torch.bmm(self._U, T.mT)
            p = torch.bmm(T, self._q.unsqueeze(-1)).squeeze(-1)
            # Its two halves are rounded apart.
            sums = 0.5 * (G + G.mT), p, r.square().sum(-1)
        # Rounded tangents cannot be rescued.
        rescues = self._source.tangent.dtype == self._tail.weight.dtype == torch.float32
        return low_rank_of_sums(sums, h, c, second_var, redo if rescues else None)

    def norms(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """As `Written`."""
        return self._r.to(dtype).square().sum(-1), self._squares.to(dtype)

    @ranged("gram backward")
    def pull(self, M: Tensor, u: Tensor, g_rr: Tensor) -> Pulled:
        """As `Written`."""
        M, u, g_rr = (t.to(self._dtype) for t in (M, u, g_rr))
        with full_products(self._T):
            dT = torch.baddbmm(u.unsqueeze(-1) * self._q.unsqueeze(-2), M, self._U)
            return self._pulled(dT, torch.bmm(0.5 * M, self._T), u, g_rr)

    @ranged("gram backward")
    def pull_norms(self, rate: Tensor, g_rr: Tensor) -> Pulled:
        """As `Written`."""
        rate, g_rr = rate.to(self._dtype), g_rr.to(self._dtype)
        each = rate.unsqueeze(-1)
        with full_products(self._T):
            return self._pulled(2 * each * self._U, each * self._T, None, g_rr)

    def _pulled(self, dT: Tensor, half: Tensor, u: Tensor | None, g_rr: Tensor) -> Pulled:
        """`half` is M T / 2; `u` None stands for zeros."""
        W, r, T = self._W, self._r, self._T
        dr = 2 * g_rr.unsqueeze(-1) * r
        d_weight = torch.zeros_like(W)
        if u is not None:
            t = torch.bmm(u.unsqueeze(-2), T).squeeze(-2)
            dr.addmm_(t, W.mT)
            d_weight.addmm_(r.mT, t)
        # r = x - f
        df = -dr
        d_weight.addmm_(df.mT, self._a)
        d_metric = _tangent_major(half).mT @ _tangent_major(T)
        layer = (self._tail.weight, d_weight), (self._tail.metric, d_metric)
        others = *layer, *_of_bias(self._tail, df)
        return Pulled(_gradient(self._source, dT, df @ W), dr.view(self._shape), others)


class ThroughLayer:
    """The same chunk with J at hand, and its gradients pulled through the layer.

    Args:
        source: what goes into the layer.
        tail: the layer.
        x: data ``[b, *out]``.
    """

    def __init__(self, source: Jet, tail: Linear, x: Tensor):
        self._source, self._tail, self._shape = source, tail, x.shape
        # Autocast rounds what goes into the layer, and not its weight.
        dtype = torch.promote_types(source.primal.dtype, tail.weight.dtype)
        self._W = W = tail.weight.to(dtype)
        self._a, T = source.primal.to(dtype), full_tangent(source).to(dtype)
        self._T = T.flatten(0, 1)
        with full_products(T):
            f = self._a @ W.mT
            f = f if tail.bias is None else f + tail.bias
            J = (self._T @ W.mT).unflatten(0, T.shape[:2])
        self._written = Written(Jet(f, J), x.flatten(1), "torch")
        self.n, self.solve, self.norms = self._written.n, self._written.solve, self._written.norms

    def pull(self, M: Tensor, u: Tensor, g_rr: Tensor) -> Pulled:
        """As `Written`."""
        return self._through(self._written.pull(M, u, g_rr))

    def pull_norms(self, rate: Tensor, g_rr: Tensor) -> Pulled:
        """As `Written`."""
        return self._through(self._written.pull_norms(rate, g_rr))

    def _through(self, pulled: Pulled) -> Pulled:
        df, dJ, W = pulled.jet.primal, pulled.jet.tangent.flatten(0, 1), self._W
        with full_products(W):
            d_weight = dJ.mT @ self._T + df.mT @ self._a
            dT = (dJ @ W).unflatten(0, (-1, len(df))).transpose(0, 1)
            grad = _gradient(self._source, dT, df @ W)
        others = (self._tail.weight, d_weight), *_of_bias(self._tail, df)
        return Pulled(grad, pulled.x.view(self._shape), others)


def _tangent_major(rows: Tensor) -> Tensor:
    """``[b, m, k]`` as ``[m * b, k]``."""
    return rows.transpose(0, 1).flatten(0, 1)


def _of_bias(tail: Linear, df: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
    return () if tail.bias is None else ((tail.bias, df),)


def _gradient(source: Jet, dT: Tensor, da: Tensor) -> Jet:
    grad, of_tangents, of_value = empty_gradient(source)
    of_tangents.copy_(dT)
    of_value.copy_(da)
    return grad


ChunkGram = Written | Unwritten | Contracted | ThroughLayer


def gram_of(output: Jet | LastLayer, x: Tensor, backend: str) -> ChunkGram:
    """The Gram of a chunk.

    Args:
        output: what its plan returned.
        x: data ``[b, *out]``.
        backend: "torch" or "triton".
    """
    if not isinstance(output, LastLayer):
        return Written(output, x, backend)
    if isinstance(output.tail, Linear):
        contracted = Contracted(output.source, output.tail, x)
        return contracted if contracted.contracts else ThroughLayer(output.source, output.tail, x)
    return Unwritten(output.tail, x)
