"""Systems of linear equations and inverses, and the cross product.

The former are one operation, `solve_system`. Its tangents come from a system with the same matrix,
never from a factorisation held constant, so that autograd differentiates them again.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from fastsfvae.jacobian.rules.indexing import diagonal
from fastsfvae.jacobian.rules.jet import Jet, align, broadcast_jet, full_tangent, join, primal_of
from fastsfvae.jacobian.rules.reduction import sum_
from fastsfvae.jacobian.rules.registry import adjoint, always, rule
from fastsfvae.jacobian.rules.shape import expand


def matrix_tangent(x: Jet, ndim: int | None = None) -> Tensor:
    """The tangents of matrices, with singleton axes inserted to broadcast against `ndim` axes.

    Those of a single matrix are expanded: its rows may be the samples.
    """
    if x.primal.ndim <= 2:
        x = Jet(x.primal, full_tangent(x))
    return align(x, x.primal.ndim if ndim is None else ndim)


def turned(x: Any) -> Any:
    """A matrix transposed, whether it is a Jet or a tensor."""
    return Jet(x.primal.mT, matrix_tangent(x).mT) if isinstance(x, Jet) else x.mT


def identity_like(matrix: Tensor) -> Tensor:
    """The identity of a square matrix's extent."""
    return torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)


@dataclasses.dataclass(frozen=True)
class _Matrix:
    """What is known of the matrix of a system A X = B.

    Attributes:
        upper: which triangle of it is read; None for all of it.
        unit: whether the diagonal counts as ones.
        check: whether a singular matrix is an error.
    """

    upper: bool | None
    unit: bool
    check: bool

    def transposed(self) -> _Matrix:
        upper = None if self.upper is None else not self.upper
        return _Matrix(upper, self.unit, False)

    def solve(self, a: Tensor, b: Tensor) -> Tensor:
        """X of A X = B for A [..., n, n] and B [..., n, k]."""
        if self.upper is not None:
            return torch.linalg.solve_triangular(a, b, upper=self.upper, unitriangular=self.unit)
        # With fewer axes than A, it might be taken for vectors.
        b = b[(None,) * (a.ndim - b.ndim)]
        return torch.linalg.solve_ex(a, b, check_errors=self.check).result

    def solve_all(self, a: Tensor, tangents: Tensor) -> Tensor:
        """The same for [m, ..., n, k] at once, as m * k columns of one system."""
        m, k = tangents.shape[0], tangents.shape[-1]
        wide = tangents.movedim(0, -2).flatten(-2)
        unchecked = dataclasses.replace(self, check=False)
        return unchecked.solve(a, wide).unflatten(-1, (m, k)).movedim(-2, 0)

    def used(self, t: Tensor) -> Tensor:
        """A matrix without what is not read."""
        if self.upper is None:
            return t
        return t.triu(int(self.unit)) if self.upper else t.tril(-int(self.unit))


def _normal_form(
    a: Any, b: Any, left: bool, transposed: bool, vector: bool, matrix: _Matrix
) -> tuple[Any, Any, _Matrix]:
    """The same system as A X = B with matrices on both sides."""
    if vector:
        b = Jet(b.primal[..., None], b.tangent[..., None]) if isinstance(b, Jet) else b[..., None]
    if transposed == left:
        # A^T X = B, or X A = B, which is A^T X^T = B^T.
        a, matrix = turned(a), dataclasses.replace(matrix.transposed(), check=matrix.check)
    return a, b if left else turned(b), matrix


@rule("solve_system", several=True)
def solve_system(
    a: Any,
    b: Any,
    *,
    left: bool = True,
    transposed: bool = False,
    vector: bool = False,
    upper: bool | None = None,
    unit: bool = False,
    check: bool = True,
) -> Jet:
    """X of op(A) X = B, or X op(A) = B: dX = op(A)^-1 (dB - op(dA) X).

    Args:
        a: [..., n, n].
        b: [..., n, k] or, as a vector, [..., n].
        left: on which side of X the matrix stands.
        transposed: whether op is the transposition.
        vector: whether B is a vector.
        upper: which triangle of A alone is read; None for all of it.
        unit: whether A's diagonal counts as ones.
        check: whether a singular matrix is an error.
    """
    a, b, matrix = _normal_form(a, b, left, transposed, vector, _Matrix(upper, unit, check))
    value = primal_of(a)
    x = matrix.solve(value, primal_of(b))
    moved: Any = matrix_tangent(b, x.ndim) if isinstance(b, Jet) else 0
    if isinstance(a, Jet):
        moved = moved - matrix.used(matrix_tangent(a, x.ndim)) @ x
    solution = broadcast_jet(x, matrix.solve_all(value, moved))
    if not left:
        solution = turned(solution)
    return _squeezed(solution) if vector else solution


def _squeezed(x: Jet) -> Jet:
    return Jet(x.primal.squeeze(-1), x.tangent.squeeze(-1))


@adjoint("solve_system", covers=always)
def _solve_system_adjoint(
    grad: Jet,
    out: Jet,
    needs: tuple,
    a: Any,
    b: Any,
    *,
    left: bool = True,
    transposed: bool = False,
    vector: bool = False,
    upper: bool | None = None,
    unit: bool = False,
    check: bool = True,
):
    a, b, matrix = _normal_form(a, b, left, transposed, vector, _Matrix(upper, unit, False))
    if vector:
        grad, out = (Jet(y.primal[..., None], y.tangent[..., None]) for y in (grad, out))
    if not left:
        grad, out = turned(grad), turned(out)
    flipped, value = matrix.transposed(), primal_of(a).mT
    # The gradients of the right-hand side A dX of the tangents, then of the values.
    by_tangents = flipped.solve_all(value, grad.tangent)
    of_value = grad.primal
    if isinstance(a, Jet):
        moved = matrix.used(matrix_tangent(a, out.primal.ndim))
        of_value = join(of_value, -(moved.mT @ by_tangents).sum(0))
    by_value = flipped.solve(value, of_value)
    grad_a: Any = None
    grad_b: Any = None
    if needs[0]:
        bend = (by_tangents @ out.tangent.mT).sum(0)
        grad_a = matrix.used(-join(by_value @ out.primal.mT, bend))
        if isinstance(a, Jet):
            grad_a = Jet(grad_a, matrix.used(-(by_tangents @ out.primal.mT)))
        if transposed == left:
            grad_a = turned(grad_a)
    if needs[1]:
        grad_b = Jet(by_value, by_tangents) if isinstance(b, Jet) else by_value
        if not left:
            grad_b = turned(grad_b)
        if vector:
            grad_b = _squeezed(grad_b) if isinstance(b, Jet) else grad_b.squeeze(-1)
    return grad_a, grad_b


def _are_vectors(a: Any, b: Any) -> bool:
    """Whether torch.linalg.solve takes the right-hand side for vectors."""
    a, b = primal_of(a), primal_of(b)
    return b.ndim == 1 or (b.ndim == a.ndim - 1 and b.shape == a.shape[:-1])


@rule("linalg_solve", several=True, composed=True, covers=always)
def solve(a: Any, b: Any, *, left: bool = True) -> Jet:
    """A^-1 B, or B A^-1."""
    return solve_system(a, b, left=left, vector=_are_vectors(a, b))


@rule("linalg_solve_ex", several=True, composed=True, covers=always)
def solve_ex(
    a: Any, b: Any, *, left: bool = True, check_errors: bool = False
) -> tuple[Jet, Tensor]:
    """The same, and whether A is singular."""
    x = solve_system(a, b, left=left, vector=_are_vectors(a, b), check=check_errors)
    return x, torch.linalg.inv_ex(primal_of(a)).info


@rule("linalg_solve_triangular", several=True, composed=True, covers=always)
def solve_triangular(
    a: Any, b: Any, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> Jet:
    """The same, with one triangle of A."""
    return solve_system(a, b, left=left, upper=upper, unit=unitriangular)


def _no_trained_matrix(args: tuple, kwargs: dict) -> bool:
    # As a result of its own, it would be one without a gradient.
    return isinstance(args[1], Jet) or not args[1].requires_grad


@rule("triangular_solve", several=True, composed=True, covers=_no_trained_matrix)
def triangular_solve(
    b: Any, a: Any, upper: bool = True, transpose: bool = False, unitriangular: bool = False
) -> tuple[Jet, Jet]:
    """The old name, which returns A as well."""
    x = solve_system(a, b, transposed=transpose, upper=upper, unit=unitriangular)
    shape = [*x.primal.shape[:-2], *primal_of(a).shape[-2:]]
    if isinstance(a, Jet):
        return x, expand(a, shape)
    return x, Jet(a.expand(shape), a.new_zeros(len(x.tangent), *shape))


@rule("cholesky_solve", several=True, composed=True, covers=always)
def cholesky_solve(b: Any, factor: Any, upper: bool = False) -> Jet:
    """A^-1 B from A's factor L L^T or U^T U."""
    half = solve_system(factor, b, upper=upper, transposed=upper)
    return solve_system(factor, half, upper=upper, transposed=not upper)


@rule("cholesky_inverse", composed=True)
def cholesky_inverse(factor: Jet, upper: bool = False) -> Jet:
    """A^-1 from A's factor."""
    return cholesky_solve(identity_like(factor.primal), factor, upper)


@rule("linalg_inv", "inverse", composed=True)
def inv(a: Jet) -> Jet:
    """A^-1."""
    return solve_system(a, identity_like(a.primal))


@rule("linalg_inv_ex", composed=True)
def inv_ex(a: Jet, *, check_errors: bool = False) -> tuple[Jet, Tensor]:
    """A^-1, and whether A is singular."""
    x = solve_system(a, identity_like(a.primal), check=check_errors)
    return x, torch.linalg.inv_ex(a.primal).info


@rule("trace", composed=True)
def trace(a: Jet) -> Jet:
    """The sum of the diagonal."""
    return sum_(diagonal(a))


@rule("linalg_cross", several=True)
def cross(a: Any, b: Any, *, dim: int = -1) -> Jet:
    """D (a x b) = da x b + a x db."""
    value_a, value_b = primal_of(a), primal_of(b)
    primal = torch.linalg.cross(value_a, value_b, dim=dim)
    axis = dim if dim < 0 else dim - primal.ndim
    moved: Any = 0
    if isinstance(a, Jet):
        moved = torch.linalg.cross(*_level(align(a, primal.ndim), value_b), dim=axis)
    if isinstance(b, Jet):
        moved = moved + torch.linalg.cross(*_level(value_a, align(b, primal.ndim)), dim=axis)
    return broadcast_jet(primal, moved)


def _level(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both with as many axes as torch.linalg.cross wants: equally many."""
    ndim = max(a.ndim, b.ndim)
    return a[(None,) * (ndim - a.ndim)], b[(None,) * (ndim - b.ndim)]


@adjoint("linalg_cross", covers=always)
def _cross_adjoint(grad: Jet, out: Jet, needs: tuple, a: Any, b: Any, *, dim: int = -1):
    ndim = out.primal.ndim
    axis = dim if dim < 0 else dim - ndim

    def product(x: Tensor, y: Tensor) -> Tensor:
        return torch.linalg.cross(*_level(x, y), dim=axis)

    def pulled(operand: Any, other: Any, sign: int) -> Any:
        # <g, a x b> is <b x g, a> and <g x a, b>.
        value = sign * product(primal_of(other), grad.primal)
        if isinstance(other, Jet):
            value = join(value, (sign * product(align(other, ndim), grad.tangent)).sum(0))
        if not isinstance(operand, Jet):
            return value
        return Jet(value, sign * product(primal_of(other), grad.tangent))

    return (
        pulled(a, b, 1) if needs[0] else None,
        pulled(b, a, -1) if needs[1] else None,
    )
