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


def _total(t: Tensor, y: Tensor, dim: int) -> Tensor:
    """The sum along the axis of a value or of its tangents; a number is its own."""
    return t.sum(_axis(y, dim), keepdim=True) if y.ndim else t


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
    tangent = _tangent(x, y, dim)
    return broadcast_jet(y, y * (tangent - _total(y * tangent, y, dim)))


@adjoint("softmax", "_safe_softmax")
def _softmax_adjoint(grad: Jet, out: Jet, needs: tuple, x: Jet, dim: int, dtype: Any = None):
    y = out.primal
    along = _total(y * x.tangent, y, dim)
    total = _total(y * grad.tangent, y, dim)
    # T' = y (T - sum(y T)) depends on y in both places.
    by_y = grad.primal + (grad.tangent * (x.tangent - along) - x.tangent * total).sum(0)
    pulled = y * (by_y - _total(y * by_y, y, dim))
    return (Jet(pulled, y * (grad.tangent - total)),)


@rule("log_softmax")
def log_softmax(x: Jet, dim: int, dtype: Any = None) -> Jet:
    """Dy = dx - sum(softmax(x) dx)."""
    y = torch.log_softmax(x.primal, dim, dtype)
    tangent = _tangent(x, y, dim)
    return broadcast_jet(y, tangent - _total(y.exp() * tangent, y, dim))


@adjoint("log_softmax")
def _log_softmax_adjoint(grad: Jet, out: Jet, needs: tuple, x: Jet, dim: int, dtype: Any = None):
    p = out.primal.exp()
    total = _total(grad.tangent, p, dim)
    by_y = grad.primal - p * (x.tangent * total).sum(0)
    return (Jet(by_y - p * _total(by_y, p, dim), grad.tangent - p * total),)


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
