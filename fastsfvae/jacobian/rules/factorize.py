"""Factorisations into triangular and orthogonal matrices."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsfvae.jacobian.rules.arithmetic import add, mul, sub
from fastsfvae.jacobian.rules.indexing import tril, triu
from fastsfvae.jacobian.rules.jet import Jet, primal_of
from fastsfvae.jacobian.rules.linalg import (
    identity_like,
    matrix_tangent,
    solve_system,
)
from fastsfvae.jacobian.rules.linear import matmul
from fastsfvae.jacobian.rules.pieces import cat, slice_
from fastsfvae.jacobian.rules.registry import adjoint, rule
from fastsfvae.jacobian.rules.shape import transpose, unsqueeze


def _inverse(triangle: Tensor, upper: bool, unit: bool = False) -> Tensor:
    unity = identity_like(triangle)
    return torch.linalg.solve_triangular(triangle, unity, upper=upper, unitriangular=unit)


def _halved(t: Tensor) -> Tensor:
    """The lower triangle with half of the diagonal: L + L^T gives a symmetric matrix back."""
    return t.tril() - 0.5 * t.diagonal(dim1=-2, dim2=-1).diag_embed()


def _symmetric(t: Tensor) -> Tensor:
    return 0.5 * (t + t.mT)


@rule("cholesky_of_symmetric")
def lower_factor(x: Jet, check: bool = True) -> tuple[Jet, Tensor]:
    """L of A = L L^T: dL = L halved(L^-1 dA L^-T). And which A is not positive definite.

    Only A's lower triangle is read, but its derivative is that of a symmetric A, as PyTorch's is.
    """
    factor, info = torch.linalg.cholesky_ex(x.primal, check_errors=check)
    inverse = _inverse(factor, upper=False)
    moved = inverse @ _symmetric(matrix_tangent(x)) @ inverse.mT
    return Jet(factor, factor @ _halved(moved)), info


@adjoint("cholesky_of_symmetric")
def _lower_factor_adjoint(
    grads: tuple, out: tuple, needs: tuple, x: Jet, check: bool = True
) -> tuple[Jet]:
    grad, factor = grads[0], out[0].primal
    inverse = _inverse(factor, upper=False)
    moved = inverse @ _symmetric(matrix_tangent(x)) @ inverse.mT
    weights = _halved(factor.mT @ grad.tangent)
    # The tangents depend on A through L as well: on its first factor, and on both inverses.
    bend = grad.tangent @ _halved(moved).mT - inverse.mT @ (weights + weights.mT) @ moved
    by_value = _halved(factor.mT @ (grad.primal + bend.sum(0)))

    def pulled(t: Tensor) -> Tensor:
        return _symmetric(inverse.mT @ t @ inverse)

    return (Jet(pulled(by_value), pulled(weights)),)


@rule("linalg_cholesky_ex", composed=True)
def cholesky_ex(x: Jet, *, upper: bool = False, check_errors: bool = False) -> tuple[Jet, Tensor]:
    """The factor L, or L^T of the upper triangle; and which matrix has none."""
    if not upper:
        return lower_factor(x, check_errors)
    factor, info = lower_factor(transpose(x, -2, -1), check_errors)
    return transpose(factor, -2, -1), info


@rule("linalg_cholesky", "cholesky", composed=True)
def cholesky(x: Jet, upper: bool = False) -> Jet:
    """The factor alone."""
    return cholesky_ex(x, upper=upper, check_errors=True)[0]


@rule("lu_corner")
def lu_corner(x: Jet, pivot: bool = True, check: bool = True) -> tuple[Jet, Tensor, Tensor]:
    """L and U of A = P L U in one matrix, the pivots, and which A is singular.

    With M = L^-1 P^T dA U^-1 it is dL = L lower(M) and dU = upper(M) U. Of an A that is not square
    these are the factors of as many rows of P^T A as columns, or columns as rows, from the first.
    """
    compact, pivots, info = torch.linalg.lu_factor_ex(x.primal, pivot=pivot, check_errors=check)
    k = pivots.shape[-1]
    corner = compact[..., :k, :k]
    swap, (lower, upper) = _permutation(x.primal, pivots)[..., :k], _triangles(corner)
    moved = _lu_moved(x, swap, lower, upper)
    return Jet(corner, lower @ moved.tril(-1) + moved.triu() @ upper), pivots, info


def _permutation(matrix: Tensor, pivots: Tensor) -> Tensor:
    """P, for a matrix of A's extents."""
    return torch.lu_unpack(matrix.detach(), pivots, unpack_data=False)[0]


def _triangles(compact: Tensor) -> tuple[Tensor, Tensor]:
    return compact.tril(-1) + identity_like(compact), compact.triu()


def _lu_moved(x: Jet, swap: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    moved = swap.mT @ matrix_tangent(x)[..., : upper.shape[-1]]
    return _inverse(lower, False, unit=True) @ moved @ _inverse(upper, True)


@adjoint("lu_corner")
def _lu_adjoint(
    grads: tuple, out: tuple, needs: tuple, x: Jet, pivot: bool = True, check: bool = True
) -> tuple[Jet]:
    grad, (corner, pivots, _) = grads[0], out
    swap = _permutation(x.primal, pivots)[..., : pivots.shape[-1]]
    lower, upper = _triangles(corner.primal)
    to_left, to_right = _inverse(lower, False, unit=True).mT, _inverse(upper, True).mT

    def weights(g: Tensor) -> Tensor:
        return (lower.mT @ g.tril(-1)).tril(-1) + (g.triu() @ upper.mT).triu()

    moved, by_tangents = _lu_moved(x, swap, lower, upper), weights(grad.tangent)
    # The tangents depend on A through L and U as well.
    by_lower = grad.tangent.tril(-1) @ moved.tril(-1).mT - to_left @ by_tangents @ moved.mT
    by_upper = moved.triu().mT @ grad.tangent.triu() - moved.mT @ by_tangents @ to_right
    bend = by_lower.tril(-1).sum(0) + by_upper.triu().sum(0)

    def pulled(t: Tensor) -> Tensor:
        return F.pad(swap @ (to_left @ t @ to_right), (0, x.primal.shape[-1] - t.shape[-1]))

    return (Jet(pulled(weights(grad.primal + bend)), pulled(by_tangents)),)


@rule("linalg_lu_factor_ex", composed=True)
def lu_factor_ex(
    x: Jet, *, pivot: bool = True, check_errors: bool = False
) -> tuple[Jet, Tensor, Tensor]:
    """L and U in one matrix, the pivots, and which matrix is singular."""
    corner, pivots, info = lu_corner(x, pivot, check_errors)
    rows, columns = x.primal.shape[-2:]
    if rows == columns:
        return corner, pivots, info
    swapped = matmul(_permutation(x.primal, pivots).mT, x)
    if rows > columns:
        rest = slice_(swapped, -2, columns, rows)
        rest = solve_system(corner, rest, left=False, upper=True, check=check_errors)
    else:
        rest = slice_(swapped, -1, rows, columns)
        rest = solve_system(corner, rest, upper=False, unit=True)
    return cat([corner, rest], -2 if rows > columns else -1), pivots, info


@rule("_lu_with_info", composed=True)
def lu_with_info(x: Jet, pivot: bool = True, check_errors: bool = True):
    """The old name."""
    return lu_factor_ex(x, pivot=pivot, check_errors=check_errors)


@rule("linalg_lu_factor", composed=True)
def lu_factor(x: Jet, *, pivot: bool = True) -> tuple[Jet, Tensor]:
    """L and U in one matrix, and the pivots."""
    return lu_factor_ex(x, pivot=pivot, check_errors=True)[:2]


@rule("lu_unpack", composed=True)
def lu_unpack(
    factors: Jet, pivots: Tensor, unpack_data: bool = True, unpack_pivots: bool = True
) -> tuple[Any, Any, Any]:
    """P, L and U from both in one matrix."""
    swap, lower, upper = torch.lu_unpack(
        factors.primal.detach(), pivots, unpack_data=False, unpack_pivots=unpack_pivots
    )
    permutation = Jet(swap, torch.zeros_like(swap).expand(len(factors.tangent), *swap.shape))
    if not unpack_data:
        return permutation, lower, upper
    rows, columns = factors.primal.shape[-2:]
    least = min(rows, columns)
    unity = torch.eye(rows, least, dtype=swap.dtype, device=swap.device)
    lower = add(tril(slice_(factors, -1, 0, least), -1), unity)
    return permutation, lower, triu(slice_(factors, -2, 0, least))


@rule("linalg_lu", composed=True)
def lu(x: Jet, *, pivot: bool = True) -> tuple[Jet, Jet, Jet]:
    """P, L and U of A = P L U."""
    return lu_unpack(*lu_factor_ex(x, pivot=pivot)[:2])


def _solves(args: tuple, kwargs: dict) -> bool:
    # A parameter on the right is permuted by plain operations, which no adjoint sees.
    return isinstance(args[2], Jet) or not args[2].requires_grad


@rule("linalg_lu_solve", several=True, composed=True, covers=_solves)
def lu_solve(
    factors: Any, pivots: Tensor, b: Any, *, left: bool = True, adjoint: bool = False
) -> Jet:
    """X of A X = B, A^T X = B, X A = B or X A^T = B for A = P L U."""
    swap = _permutation(primal_of(factors), pivots)
    b = b if left else _transposed(b)

    def permuted(matrix: Tensor, x: Any) -> Any:
        return matmul(matrix, x) if isinstance(x, Jet) else matrix @ x

    if adjoint == left:
        half = solve_system(factors, b, transposed=True, upper=True)
        x = permuted(swap, solve_system(factors, half, transposed=True, upper=False, unit=True))
    else:
        half = solve_system(factors, permuted(swap.mT, b), upper=False, unit=True)
        x = solve_system(factors, half, upper=True)
    return x if left else transpose(x, -2, -1)


def _transposed(x: Any) -> Any:
    return transpose(x, -2, -1) if isinstance(x, Jet) else x.mT


@rule("linalg_qr", composed=True)
def qr(x: Jet, mode: str = "reduced") -> tuple[Any, Jet]:
    """Q and R of A = Q R.

    With R' = R at this point, held constant, W = A R'^-1 has orthonormal columns, and S S^T = W^T W
    gives Q = W S^-T and R = S^T R' for every A nearby: nothing is squared that is not the identity.

    Raises:
        RuntimeError: columns of Q that A does not determine.
    """
    rows, columns = x.primal.shape[-2:]
    if mode == "complete" and rows > columns:
        raise RuntimeError(
            f"torch.linalg.qr of {rows} rows and {columns} columns in mode 'complete' has no "
            "derivative: use mode 'reduced'"
        )
    square = x if rows >= columns else slice_(x, -1, 0, rows)
    constant = torch.linalg.qr(square.primal.detach()).R
    frame = solve_system(constant, square, left=False, upper=True)
    factor = lower_factor(matmul(transpose(frame, -2, -1), frame))[0]
    q = solve_system(factor, frame, left=False, transposed=True, upper=False)
    r = matmul(transpose(factor, -2, -1), constant)
    if rows < columns:
        rest = matmul(transpose(q, -2, -1), slice_(x, -1, rows, columns))
        r = cat([r, rest], -1)
    return (x.primal.new_empty(0) if mode == "r" else q), r


def _reflect(vectors: Any, scales: Any, x: Any, forwards: bool) -> Any:
    """Apply the reflections I - scale v v^T one after another.

    Args:
        vectors: v as columns [..., r, k]: zeros, a one on the diagonal, and what is below it.
        scales: [..., k].
        x: what is reflected, [..., r, n].
        forwards: whether the first reflection is the first to be applied.
    """
    m = next(len(y.tangent) for y in (vectors, scales, x) if isinstance(y, Jet))
    vectors, scales = _as_jet(vectors, m), _as_jet(scales, m)
    unity = torch.ones_like(vectors.primal)
    vectors = add(tril(vectors, -1), unity.tril() - unity.tril(-1))
    order = range(scales.primal.shape[-1])
    for i in order if forwards else reversed(order):
        v, scale = slice_(vectors, -1, i, i + 1), slice_(scales, -1, i, i + 1)
        x = sub(x, matmul(mul(v, unsqueeze(scale, -1)), matmul(transpose(v, -2, -1), x)))
    return x


def _all_jets(args: tuple, kwargs: dict) -> bool:
    # Parameters are cut by plain operations, which no adjoint sees.
    return all(isinstance(x, Jet) or not x.requires_grad for x in args[:3])


@rule("linalg_householder_product", "orgqr", several=True, composed=True, covers=_all_jets)
def householder_product(vectors: Any, scales: Any) -> Jet:
    """The first columns of a product of reflections."""
    value = vectors.primal if isinstance(vectors, Jet) else vectors
    rows, columns = value.shape[-2:]
    unity = torch.eye(rows, columns, dtype=value.dtype, device=value.device)
    return _reflect(vectors, scales, unity, forwards=False)


@rule("ormqr", several=True, composed=True, covers=_all_jets)
def ormqr(vectors: Any, scales: Any, x: Any, left: bool = True, transpose: bool = False) -> Jet:
    """Q X, X Q, Q^T X or X Q^T for a product Q of reflections."""
    if not left:
        x = _transposed(x)
    y = _reflect(vectors, scales, x, forwards=transpose == left)
    return y if left else _transposed(y)


def _as_jet(x: Any, m: int) -> Jet:
    """A value as a Jet, with tangents of zero where it does not depend on z."""
    return x if isinstance(x, Jet) else Jet(x, x.new_zeros(m, *x.shape))
