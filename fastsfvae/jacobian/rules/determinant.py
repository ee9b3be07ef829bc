"""Determinants and their logarithms."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsfvae.jacobian.rules.arithmetic import where
from fastsfvae.jacobian.rules.jet import Jet, broadcast_jet
from fastsfvae.jacobian.rules.linalg import identity_like, matrix_tangent
from fastsfvae.jacobian.rules.registry import adjoint, rule


class _Frame(NamedTuple):
    """A = U diag(s) V^T: what tells the determinant's derivatives at any rank.

    Along U dM V^T, with diagonal entries d_i and others d_ij of dM, the determinant to the second
    order is det(U V) (prod s + sum_i d_i prod_{k != i} s_k
    + 1/2 sum_{i != j} (d_i d_j - d_ij d_ji) prod_{k != i, j} s_k).

    Attributes:
        u: [..., n, n].
        s: [..., n].
        vh: V^T, [..., n, n].
        by_one: det(U V) times the products of all of s but one, [..., n].
        by_two: the same but two, [..., n, n] with a diagonal of zeros.
    """

    u: Tensor
    s: Tensor
    vh: Tensor
    by_one: Tensor
    by_two: Tensor

    def cofactors(self) -> Tensor:
        """The derivative of the determinant, [..., n, n]."""
        return self.u * self.by_one[..., None, :] @ self.vh

    def bend(self, p: Tensor) -> Tensor:
        """The derivative of the cofactors along p, [..., n, n]."""
        moved = self.u.mT @ p @ self.vh.mT
        straight = self.by_two @ moved.diagonal(dim1=-2, dim2=-1)[..., None]
        return self.u @ (straight.squeeze(-1).diag_embed() - self.by_two * moved.mT) @ self.vh


def _frame(a: Tensor) -> _Frame:
    with torch.no_grad():
        u, s, vh = torch.linalg.svd(a.detach())
        sign = torch.linalg.slogdet(u).sign * torch.linalg.slogdet(vh).sign
        # Products of all in front, of all behind, and of all between two: no division by zero.
        one = torch.ones_like(s[..., :1])
        before = torch.cat([one, s.cumprod(-1)[..., :-1]], -1)
        behind = torch.cat([one, s.flip(-1).cumprod(-1)[..., :-1]], -1).flip(-1)
        later = torch.where(torch.ones_like(a).triu(1) > 0, s[..., None, :], 1).cumprod(-1)
        between = torch.cat([torch.ones_like(a[..., :1]), later[..., :-1]], -1)
        upper = (before[..., None] * between * behind[..., None, :]).triu(1)
        by_two = sign[..., None, None] * (upper + upper.mT)
    return _Frame(u, s, vh, sign[..., None] * before * behind, by_two)


def _cofactors(a: Tensor) -> Tensor:
    """The derivative of the determinant, to be differentiated by autograd.

    It is det(A) A^-T. Near a singular matrix, where that loses all digits, it is written as its
    value and its first derivative, which need no inverse.
    """
    frame = _frame(a)
    near = frame.s[..., -1:] <= torch.finfo(a.dtype).eps ** (1 / 3) * frame.s[..., :1]
    near = near[..., None]
    safe = torch.where(near, identity_like(a), a)
    regular = torch.linalg.det(safe)[..., None, None] * torch.linalg.inv_ex(safe).inverse.mT
    return torch.where(near, frame.cofactors() + frame.bend(a - a.detach()), regular)


@rule("linalg_det", "det")
def det(x: Jet) -> Jet:
    """D det A = sum(cofactors * dA), at singular matrices as well."""
    moved = _cofactors(x.primal) * matrix_tangent(x)
    return broadcast_jet(torch.linalg.det(x.primal), moved.sum((-2, -1)))


@adjoint("linalg_det", "det")
def _det_adjoint(grad: Jet, out: Jet, needs: tuple, x: Jet) -> tuple[Jet]:
    frame = _frame(x.primal)
    cofactors, by_tangents = frame.cofactors(), grad.tangent[..., None, None]
    direction = (by_tangents * matrix_tangent(x)).sum(0)
    by_value = grad.primal[..., None, None] * cofactors + frame.bend(direction)
    return (Jet(by_value, by_tangents * cofactors),)


def _inverse(a: Tensor) -> Tensor:
    """A^-1, nan where there is none: the logarithm has no derivative there."""
    inverse, info = torch.linalg.inv_ex(a)
    return torch.where(info[..., None, None] == 0, inverse, torch.nan)


@rule("linalg_slogdet", "slogdet")
def slogdet(x: Jet) -> tuple[Jet, Jet]:
    """D log |det A| = tr(A^-1 dA); the sign is constant."""
    sign, logarithm = torch.linalg.slogdet(x.primal)
    moved = (_inverse(x.primal).mT * matrix_tangent(x)).sum((-2, -1))
    return Jet(sign, torch.zeros_like(moved)), broadcast_jet(logarithm, moved)


@adjoint("linalg_slogdet", "slogdet")
def _slogdet_adjoint(grads: tuple, out: tuple, needs: tuple, x: Jet) -> tuple[Any]:
    grad, inverse = grads[1], _inverse(x.primal)
    if grad is None:
        return (Jet(torch.zeros_like(x.primal), torch.zeros_like(x.tangent)),)
    by_tangents = grad.tangent[..., None, None]
    direction = (by_tangents * matrix_tangent(x)).sum(0)
    by_value = grad.primal[..., None, None] * inverse.mT - (inverse @ direction @ inverse).mT
    return (Jet(by_value, by_tangents * inverse.mT),)


@rule("logdet", composed=True)
def logdet(x: Jet) -> Jet:
    """The logarithm of a positive determinant, nan of a negative one."""
    sign, logarithm = slogdet(x)
    return where(sign.primal < 0, torch.nan, logarithm)
