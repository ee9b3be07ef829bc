"""A chunk whose decoder ends in a linear layer, with and without the Jacobian.

`Contracted` needs none: it takes the Gram through W^T W. `ThroughLayer` is the same chunk with J,
where that would lose digits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsfvae import reference
from fastsfvae._ranges import ranged
from fastsfvae.gram.written import Pulled, Written
from fastsfvae.jacobian.plan.last_layer import Linear
from fastsfvae.jacobian.rules.jet import Jet, full_tangent
from fastsfvae.jacobian.run.chunks import empty_gradient
from fastsfvae.ops.gram_project import full_products
from fastsfvae.ops.low_rank import Redo, Solved, low_rank_of_sums


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
        x: data ``[b, *out]``; None for the output itself.
    """

    def __init__(self, source: Jet, tail: Linear, x: Tensor | None):
        self._source, self._tail = source, tail
        # Of x the dtype counts, and that of the output without it.
        given = source.primal if x is None else x
        self._dtype = torch.promote_types(tail.metric.dtype, given.dtype)
        tangent, metric = full_tangent(source), tail.metric.to(self._dtype)
        with full_products(tangent):
            self._a, self._W = source.primal.to(self._dtype), tail.weight.to(self._dtype)
            f = self._a @ self._W.mT
            f = f if tail.bias is None else f + tail.bias
            self.output = f
            self._shape = f.shape if x is None else x.shape
            self._r = torch.zeros_like(f) if x is None else x.flatten(1).to(self._dtype) - f
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

    @ranged("gram")
    def sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """As `Written`."""
        T = self._T
        with full_products(T):
            G = torch.bmm(self._U, T.mT)
            p = torch.bmm(T, self._q.unsqueeze(-1)).squeeze(-1)
            # Its two halves are rounded apart.
            return 0.5 * (G + G.mT), p, self._r.square().sum(-1)

    def parts(self) -> None:
        """As `Written`, and never on the kernels."""

    def solve(self, h: Tensor, c: Tensor, second_var: Tensor | None) -> Solved:
        """As `Written`."""
        return low_rank_of_sums(self.sums(), h, c, second_var, self.redo())

    def redo(self) -> Redo | None:
        """As `Written`; of float64 as well, as J keeps digits that W^T W does not."""

        def redo(lost: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            J = self._T[lost].double() @ self._W.double().mT
            return reference.gram_project(J, self._r[lost].double())

        # Rounded tangents cannot be rescued.
        given = {self._source.tangent.dtype, self._tail.weight.dtype}
        return redo if given <= {torch.float32, torch.float64} else None

    def scale(self) -> Tensor:
        """As `Written`: |T_k|^2 |H|, of which the sum T_k H T_k^T may be a small rest."""
        return self._T.square().sum(-1) * self._tail.metric.norm().to(self._dtype)

    def norms(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """As `Written`."""
        return self._r.to(dtype).square().sum(-1), self._squares.to(dtype)

    @ranged("gram backward")
    def pull(self, M: Tensor, u: Tensor, g_rr: Tensor, df: Tensor | None = None) -> Pulled:
        """As `Written`."""
        M, u, g_rr = (t.to(self._dtype) for t in (M, u, g_rr))
        with full_products(self._T):
            dT = torch.baddbmm(u.unsqueeze(-1) * self._q.unsqueeze(-2), M, self._U)
            return self._pulled(dT, torch.bmm(0.5 * M, self._T), u, g_rr, df)

    @ranged("gram backward")
    def pull_root(self, R: Tensor, g: Tensor) -> Pulled:
        """As `Written`."""
        R, g = R.to(self._dtype), g.to(self._dtype)
        back = g[:, None, None] * R.mT
        with full_products(R):
            dT, half = back @ (R @ self._U), (0.5 * back) @ (R @ self._T)
            return self._pulled(dT, half, None, torch.zeros_like(g))

    @ranged("gram backward")
    def pull_norms(self, rate: Tensor, g_rr: Tensor) -> Pulled:
        """As `Written`."""
        rate, g_rr = rate.to(self._dtype), g_rr.to(self._dtype)
        each = rate.unsqueeze(-1)
        with full_products(self._T):
            return self._pulled(2 * each * self._U, each * self._T, None, g_rr)

    def _pulled(
        self, dT: Tensor, half: Tensor, u: Tensor | None, g_rr: Tensor, df: Tensor | None = None
    ) -> Pulled:
        """`half` is M T / 2; `u` None stands for zeros."""
        W, r, T = self._W, self._r, self._T
        dr = 2 * g_rr.unsqueeze(-1) * r
        d_weight = torch.zeros_like(W)
        if u is not None:
            t = torch.bmm(u.unsqueeze(-2), T).squeeze(-2)
            dr.addmm_(t, W.mT)
            d_weight.addmm_(r.mT, t)
        # r = x - f
        df = -dr if df is None else df.flatten(1) - dr
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
        x: as in `Contracted`.
    """

    def __init__(self, source: Jet, tail: Linear, x: Tensor | None):
        self._source, self._tail = source, tail
        # Autocast rounds what goes into the layer, and not its weight.
        dtype = torch.promote_types(source.primal.dtype, tail.weight.dtype)
        self._W = W = tail.weight.to(dtype)
        self._a, T = source.primal.to(dtype), full_tangent(source).to(dtype)
        self._T = T.flatten(0, 1)
        with full_products(T):
            f = self._a @ W.mT
            f = f if tail.bias is None else f + tail.bias
            J = (self._T @ W.mT).unflatten(0, T.shape[:2])
        self.output, self._shape = f, f.shape if x is None else x.shape
        self._written = flat = Written(Jet(f, J), None if x is None else x.flatten(1), "torch")
        self.n, self.sums, self.parts = flat.n, flat.sums, flat.parts
        self.solve, self.norms = flat.solve, flat.norms
        self.redo, self.scale = flat.redo, flat.scale

    def pull(self, M: Tensor, u: Tensor, g_rr: Tensor, df: Tensor | None = None) -> Pulled:
        """As `Written`."""
        return self._through(self._written.pull(M, u, g_rr, None if df is None else df.flatten(1)))

    def pull_root(self, R: Tensor, g: Tensor) -> Pulled:
        """As `Written`."""
        return self._through(self._written.pull_root(R, g))

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
        assert pulled.x is not None
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
