"""Eigenvalues of symmetric matrices and singular values, with their vectors.

The vectors have derivatives where the values are distinct; the values' second derivatives, and so
the gradients of J, as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsfvae.jacobian.rules.jet import Jet
from fastsfvae.jacobian.rules.linalg import identity_like, matrix_tangent
from fastsfvae.jacobian.rules.registry import adjoint, rule


def _gaps(values: Tensor) -> Tensor:
    """1 / (value_j - value_i), zero on the diagonal: [..., n] to [..., n, n]."""
    differences = values[..., None, :] - values[..., :, None]
    unity = identity_like(differences)
    return 1 / (differences + unity) - unity


def _diagonal(t: Tensor) -> Tensor:
    return t.diagonal(dim1=-2, dim2=-1)


@rule("_linalg_eigh")
def eigh(x: Jet, UPLO: str = "L", compute_v: bool = True) -> tuple[Jet, Jet]:  # noqa: N803
    """With T = V^T dA V it is dw = diag(T) and dV = V (F * T), where F_ij = 1 / (w_j - w_i)."""
    values, vectors = torch.linalg.eigh(x.primal, UPLO)
    moved = vectors.mT @ matrix_tangent(x) @ vectors
    return Jet(values, _diagonal(moved)), Jet(vectors, vectors @ (_gaps(values) * moved))


@adjoint("_linalg_eigh")
def _eigh_adjoint(
    grads: tuple,
    out: tuple,
    needs: tuple,
    x: Jet,
    UPLO: str = "L",  # noqa: N803
    compute_v: bool = True,
) -> tuple[Jet]:
    values, vectors = (y.primal for y in out)
    of_values, of_vectors = grads
    gaps, tangent = _gaps(values), matrix_tangent(x)
    moved = vectors.mT @ tangent @ vectors
    # Gradients of T, and through it and dV of the values and vectors that they are made of.
    by_moved = torch.zeros_like(moved)
    to_values, to_vectors = torch.zeros_like(values), torch.zeros_like(vectors)
    if of_values is not None:
        by_moved = by_moved + of_values.tangent.diag_embed()
        to_values = to_values + of_values.primal
    if of_vectors is not None:
        turned = vectors.mT @ of_vectors.tangent
        by_moved = by_moved + gaps * turned
        slope = (gaps**2 * moved * turned).sum(0)
        to_values = to_values + slope.sum(-1) - slope.sum(-2)
        bend = of_vectors.tangent @ (gaps * moved).mT
        to_vectors = to_vectors + of_vectors.primal + bend.sum(0)
    bend = tangent @ vectors @ by_moved.mT + tangent.mT @ vectors @ by_moved
    to_vectors = to_vectors + bend.sum(0)
    by_value = to_values.diag_embed() + gaps * (vectors.mT @ to_vectors)
    return (Jet(vectors @ by_value @ vectors.mT, vectors @ by_moved @ vectors.mT),)


class _Singular:
    """The derivatives of U, s and V by A, [..., r, c], of which k = min(r, c) values are taken.

    With P = U^T dA V:
    ds = diag(P),
    dU = U (F * (P S + S P^T)) + (1 - U U^T) dA V / S, where F_ij = 1 / (s_j^2 - s_i^2),
    dV = V (F * (S P + P^T S)) + (1 - V V^T) dA^T U / S.
    """

    def __init__(self, u: Tensor, s: Tensor, v: Tensor):
        self.u, self.s, self.v = u, s, v
        self.gaps = _gaps(s**2)
        # Only one of them has columns that do not span its space.
        self.tall, self.wide = u.shape[-2] > u.shape[-1], v.shape[-2] > v.shape[-1]
        self.columns = s[..., None, :]
        self.rows = s[..., :, None]

    def sides(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """P S + S P^T and S P + P^T S."""
        by_columns, by_rows = p * self.columns, self.rows * p
        return by_columns + by_columns.mT, by_rows + by_rows.mT

    def push(self, moved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """DU, ds and dV for dA."""
        p = self.u.mT @ moved @ self.v
        of_u, of_v = self.sides(p)
        du, dv = self.u @ (self.gaps * of_u), self.v @ (self.gaps * of_v)
        if self.tall:
            du = du + self.rest_of_u(moved, p)
        if self.wide:
            dv = dv + self.rest_of_v(moved, p)
        return du, _diagonal(p), dv

    def rest_of_u(self, moved: Tensor, p: Tensor) -> Tensor:
        return (moved @ self.v - self.u @ p) / self.columns

    def rest_of_v(self, moved: Tensor, p: Tensor) -> Tensor:
        return (moved.mT @ self.u - self.v @ p.mT) / self.columns

    def pull_p(self, gu: Tensor, gs: Tensor, gv: Tensor) -> Tensor:
        """The gradient of P."""
        x, y = self.gaps * (self.u.mT @ gu), self.gaps * (self.v.mT @ gv)
        by_p = gs.diag_embed() + (x + x.mT) * self.columns + self.rows * (y + y.mT)
        if self.tall:
            by_p = by_p - self.u.mT @ (gu / self.columns)
        if self.wide:
            by_p = by_p - (gv / self.columns).mT @ self.v
        return by_p

    def pull(self, gu: Tensor, gs: Tensor, gv: Tensor) -> Tensor:
        """The gradient of dA."""
        by_a = self.u @ self.pull_p(gu, gs, gv) @ self.v.mT
        if self.tall:
            by_a = by_a + (gu / self.columns) @ self.v.mT
        if self.wide:
            by_a = by_a + self.u @ (gv / self.columns).mT
        return by_a

    def bend(
        self, moved: Tensor, gu: Tensor, gs: Tensor, gv: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of U, s and V through `push`, for gradients of what it returns."""
        p = self.u.mT @ moved @ self.v
        by_p = self.pull_p(gu, gs, gv)
        of_u, of_v = self.sides(p)
        turned_u, turned_v = self.u.mT @ gu, self.v.mT @ gv
        x, y = self.gaps * turned_u, self.gaps * turned_v
        to_s = ((x + x.mT) * p).sum(-2) + ((y + y.mT) * p).sum(-1)
        slope = self.gaps**2 * (turned_u * of_u + turned_v * of_v)
        to_s = to_s + 2 * self.s * (slope.sum(-1) - slope.sum(-2))
        to_u = gu @ (self.gaps * of_u).mT + moved @ self.v @ by_p.mT
        to_v = gv @ (self.gaps * of_v).mT + moved.mT @ self.u @ by_p
        if self.tall:
            scaled = gu / self.columns
            to_u, to_v = to_u - scaled @ p.mT, to_v + moved.mT @ scaled
            to_s = to_s - (scaled * self.rest_of_u(moved, p)).sum(-2)
        if self.wide:
            scaled = gv / self.columns
            to_u, to_v = to_u + moved @ scaled, to_v - scaled @ p
            to_s = to_s - (scaled * self.rest_of_v(moved, p)).sum(-2)
        return to_u, to_s, to_v


@rule("_linalg_svd")
def svd(
    x: Jet, full_matrices: bool = False, compute_uv: bool = True, *, driver: str | None = None
) -> tuple[Jet, Jet, Jet]:
    """U, s and V^T of A = U S V^T.

    Raises:
        RuntimeError: vectors that A does not determine.
    """
    rows, columns = x.primal.shape[-2:]
    if full_matrices and compute_uv and rows != columns:
        raise RuntimeError(
            f"torch.linalg.svd of {rows} rows and {columns} columns with full_matrices=True has "
            "no derivative: use full_matrices=False"
        )
    u, s, vh = torch.linalg.svd(x.primal, full_matrices=False, driver=driver)
    du, ds, dv = _Singular(u, s, vh.mT).push(matrix_tangent(x))
    return Jet(u, du), Jet(s, ds), Jet(vh, dv.mT)


@adjoint("_linalg_svd")
def _svd_adjoint(grads: tuple, out: tuple, needs: tuple, x: Jet, *_: Any, **__: Any) -> tuple[Jet]:
    factors = _Singular(out[0].primal, out[1].primal, out[2].primal.mT)
    given = [
        Jet(torch.zeros_like(y.primal), torch.zeros_like(y.tangent)) if g is None else g
        for g, y in zip(grads, out, strict=True)
    ]
    by_tangents = given[0].tangent, given[1].tangent, given[2].tangent.mT
    bends = [bend.sum(0) for bend in factors.bend(matrix_tangent(x), *by_tangents)]
    by_values = factors.pull(
        given[0].primal + bends[0], given[1].primal + bends[1], given[2].primal.mT + bends[2]
    )
    return (Jet(by_values, factors.pull(*by_tangents)),)
