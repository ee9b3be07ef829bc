"""Softmax and its logarithm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsfvae.jacobian.rules.jet import Jet, broadcast_jet
from fastsfvae.jacobian.rules.registry import adjoint, rule
from fastsfvae.jacobian.rules.shape import tangent_of


def _axis(y: Tensor, dim: int) -> int:
    """Counted from the end, where it is the tangents' as well."""
    return dim if dim < 0 else dim - y.ndim


def _tangent(x: Jet, y: Tensor, dim: int) -> Tensor:
    return tangent_of(x, _axis(y, dim) != -y.ndim).to(y.dtype)


@rule("softmax")
def softmax(x: Jet, dim: int, dtype: Any = None) -> Jet:
    """Dy = y (dx - sum(y dx))."""
    return _moved(x, torch.softmax(x.primal, dim, dtype), dim)


@rule("_safe_softmax")
def safe_softmax(x: Jet, dim: int, dtype: Any = None) -> Jet:
    """Zero where all entries are minus infinity, as attention has it where all is masked out."""
    return _moved(x, torch.ops.aten._safe_softmax(x.primal, dim, dtype), dim)


def _moved(x: Jet, y: Tensor, dim: int) -> Jet:
    axis, tangent = _axis(y, dim), _tangent(x, y, dim)
    return broadcast_jet(y, y * (tangent - (y * tangent).sum(axis, keepdim=True)))


@adjoint("softmax", "_safe_softmax")
def _softmax_adjoint(grad: Jet, out: Jet, needs: tuple, x: Jet, dim: int, dtype: Any = None):
    y = out.primal
    axis = _axis(y, dim)
    along = (y * x.tangent).sum(axis, keepdim=True)
    total = (y * grad.tangent).sum(axis, keepdim=True)
    # T' = y (T - sum(y T)) depends on y in both places.
    by_y = grad.primal + (grad.tangent * (x.tangent - along) - x.tangent * total).sum(0)
    pulled = y * (by_y - (y * by_y).sum(axis, keepdim=True))
    return (Jet(pulled, y * (grad.tangent - total)),)


@rule("log_softmax")
def log_softmax(x: Jet, dim: int, dtype: Any = None) -> Jet:
    """Dy = dx - sum(softmax(x) dx)."""
    y = torch.log_softmax(x.primal, dim, dtype)
    axis, tangent = _axis(y, dim), _tangent(x, y, dim)
    return broadcast_jet(y, tangent - (y.exp() * tangent).sum(axis, keepdim=True))


@adjoint("log_softmax")
def _log_softmax_adjoint(grad: Jet, out: Jet, needs: tuple, x: Jet, dim: int, dtype: Any = None):
    p = out.primal.exp()
    axis = _axis(p, dim)
    total = grad.tangent.sum(axis, keepdim=True)
    by_y = grad.primal - p * (x.tangent * total).sum(0)
    return (Jet(by_y - p * by_y.sum(axis, keepdim=True), grad.tangent - p * total),)


def _precise(x: Jet, half_to_float: bool) -> Any:
    return torch.float32 if half_to_float else x.primal.dtype


@rule("_softmax", composed=True)
def softmax_of_parts(x: Jet, dim: int, half_to_float: bool) -> Jet:
    """What decompositions call it."""
    return softmax(x, dim, _precise(x, half_to_float))


@rule("_log_softmax", composed=True)
def log_softmax_of_parts(x: Jet, dim: int, half_to_float: bool) -> Jet:
    """What decompositions call it."""
    return log_softmax(x, dim, _precise(x, half_to_float))
