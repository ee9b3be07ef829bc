"""The exponential and the pseudo-inverse of a matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsfvae.jacobian.rules.jet import Jet, full_tangent
from fastsfvae.jacobian.rules.linalg import identity_like, matrix_tangent
from fastsfvae.jacobian.rules.registry import adjoint, rule


def _corner(rows: list[list[Tensor | None]], last: int) -> Tensor:
    """The block (0, last) of the exponential of a matrix of blocks, None for zeros."""
    shape = torch.broadcast_shapes(*(b.shape for row in rows for b in row if b is not None))
    zeros = next(b for row in rows for b in row if b is not None).new_zeros(shape)
    blocks = [[zeros if b is None else b.expand(shape) for b in row] for row in rows]
    n = shape[-1]
    exponential = torch.linalg.matrix_exp(torch.cat([torch.cat(row, -1) for row in blocks], -2))
    return exponential[..., :n, n * last : n * (last + 1)]


def _slope(a: Tensor, e: Tensor) -> Tensor:
    """The derivative of exp(A) along E."""
    return _corner([[a, e], [None, a]], 1)


def _curvature(a: Tensor, e: Tensor, f: Tensor) -> Tensor:
    """The second derivative of exp(A) along E and F."""
    return _corner([[a, e, f, None], [None, a, None, f], [None, None, a, e], [None] * 3 + [a]], 3)


@rule("linalg_matrix_exp", "matrix_exp")
def matrix_exp(x: Jet) -> Jet:
    """The derivative is a block of the exponential of a matrix of twice the size."""
    moved = _slope(x.primal, full_tangent(x))
    return Jet(torch.linalg.matrix_exp(x.primal), moved)


@adjoint("linalg_matrix_exp", "matrix_exp")
def _matrix_exp_adjoint(grad: Jet, out: Jet, needs: tuple, x: Jet) -> tuple[Jet]:
    a = x.primal.mT
    bend = _curvature(a, full_tangent(x).mT, grad.tangent).sum(0)
    return (Jet(_slope(a, grad.primal) + bend, _slope(a, grad.tangent)),)


@rule("linalg_pinv")
def pinv(
    x: Jet, rcond: Any = None, hermitian: bool = False, *, atol: Any = None, rtol: Any = None
) -> Jet:
    """DP = -P dA P + P P^T dA^T (1 - A P) + (1 - P A) dA^T P^T P, where the rank stays."""
    if rcond is not None:
        rtol = rcond
    p = torch.linalg.pinv(x.primal, atol=atol, rtol=rtol, hermitian=hermitian)
    a, e = x.primal, matrix_tangent(x)
    left, right = identity_like(a.mT) - a @ p, identity_like(a) - p @ a
    moved = -p @ e @ p + p @ p.mT @ e.mT @ left + right @ e.mT @ p.mT @ p
    return Jet(p, moved)


@adjoint("linalg_pinv")
def _pinv_adjoint(grad: Jet, out: Jet, needs: tuple, x: Jet, *_: Any, **__: Any) -> tuple[Jet]:
    a, e, p, g = x.primal, matrix_tangent(x), out.primal, grad.tangent
    at, et, pt = a.mT, e.mT, p.mT
    left, right = identity_like(at) - a @ p, identity_like(a) - p @ a

    def pulled(h: Tensor) -> Tensor:
        """The gradient of dA for one of dP."""
        return -pt @ h @ pt + left @ h.mT @ p @ pt + pt @ p @ h.mT @ right

    # The tangents depend on A itself and through P: -P E P, then P P^T E^T (1 - A P), then the
    # mirrored term.
    by_p = -(g @ pt @ et + et @ pt @ g)
    first = et @ left
    through = (e @ p) @ pt @ g
    by_p = by_p + g @ first.mT @ p + first @ g.mT @ p - at @ through
    by_a = -through @ pt
    second, kept = et @ pt @ p, right @ g
    through = g @ second.mT
    by_p = by_p - through @ at + p @ kept.mT @ et + p @ e @ kept
    by_a = by_a - pt @ through
    return (Jet(pulled(grad.primal + by_p.sum(0)) + by_a.sum(0), pulled(g)),)
