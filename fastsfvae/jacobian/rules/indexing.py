"""Gathers and scatters with indices that do not depend on z, and the writes of in-place code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsfvae.jacobian.jet import Jet, align, broadcast_jet, full_tangent, primal_of
from fastsfvae.jacobian.registry import rule
from fastsfvae.jacobian.rules.reduction import along_axis
from fastsfvae.jacobian.rules.shape import zero_tangent

aten = torch.ops.aten


def jointly_linear(operation: Callable[..., Tensor], *operands: Any) -> Jet:
    """Apply an operation that is linear in all its operands together, some of them Jets.

    Operands without a tangent count as constants: their tangent is zero.
    """
    primal = operation(*map(primal_of, operands))
    return Jet(primal, torch.func.vmap(operation)(*_expanded(*operands)).to(primal.dtype))


def _expanded(*operands: Any) -> list[Tensor]:
    like = next(x.tangent for x in operands if isinstance(x, Jet))
    return [full_tangent(x) if isinstance(x, Jet) else zero_tangent(x, like) for x in operands]


@rule("index")
def index(x: Jet, indices: list[Any]) -> Jet:
    """x[indices]."""
    return jointly_linear(lambda t: aten.index(t, indices), x)


@rule("index_select")
def index_select(x: Jet, dim: int, positions: Tensor) -> Jet:
    """Entries of an axis."""
    axis = dim if dim >= 0 else dim + x.primal.ndim
    tangent = full_tangent(x) if axis == 0 else x.tangent
    return Jet(x.primal.index_select(axis, positions), tangent.index_select(axis + 1, positions))


@rule("gather")
def gather(x: Jet, dim: int, positions: Tensor, *, sparse_grad: bool = False) -> Jet:
    """One entry of an axis per position."""
    return jointly_linear(lambda t: t.gather(dim, positions), x)


@rule("take_along_dim")
def take_along_dim(x: Jet, positions: Tensor, dim: int | None = None) -> Jet:
    """Like gather, with broadcasting."""
    return jointly_linear(lambda t: torch.take_along_dim(t, positions, dim), x)


@rule("topk")
def topk(
    x: Jet, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> tuple[Jet, Tensor]:
    """The tangents of the k entries taken."""
    values, positions = x.primal.topk(k, dim, largest, sorted)
    axis = dim if dim < 0 else dim - x.primal.ndim
    return along_axis(x, values, positions, axis, keepdim=True), positions


@rule("sort")
def sort(x: Jet, dim: int = -1, descending: bool = False) -> tuple[Jet, Tensor]:
    """The tangents in the order of their values."""
    values, positions = x.primal.sort(dim=dim, descending=descending)
    axis = dim if dim < 0 else dim - x.primal.ndim
    return along_axis(x, values, positions, axis, keepdim=True), positions


@rule("tril")
def tril(x: Jet, diagonal: int = 0) -> Jet:
    """The lower triangle of the last two axes."""
    tangent = x.tangent if x.primal.ndim > 2 else full_tangent(x)
    return Jet(x.primal.tril(diagonal), tangent.tril(diagonal))


@rule("triu")
def triu(x: Jet, diagonal: int = 0) -> Jet:
    """The upper triangle of the last two axes."""
    tangent = x.tangent if x.primal.ndim > 2 else full_tangent(x)
    return Jet(x.primal.triu(diagonal), tangent.triu(diagonal))


@rule("diagonal")
def diagonal(x: Jet, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Jet:
    """A diagonal of two axes."""
    return jointly_linear(lambda t: t.diagonal(offset, dim1, dim2), x)


@rule("unfold")
def unfold(x: Jet, dimension: int, size: int, step: int) -> Jet:
    """Sliding windows along an axis."""
    return jointly_linear(lambda t: t.unfold(dimension, size, step), x)


@rule("im2col")
def im2col(x: Jet, *args: Any) -> Jet:
    """Sliding windows in space, F.unfold."""
    return jointly_linear(lambda t: aten.im2col(t, *args), x)


@rule("col2im")
def col2im(x: Jet, *args: Any) -> Jet:
    """Overlapping windows added up, F.fold."""
    return jointly_linear(lambda t: aten.col2im(t, *args), x)


@rule("copy", several=True)
def copy(x: Any, source: Any, non_blocking: bool = False) -> Jet:
    """X with all its values replaced by the source's, broadcast."""
    value = primal_of(x)
    if not isinstance(source, Jet):
        replaced = source.to(value.device, value.dtype).expand_as(value)
        return Jet(replaced, zero_tangent(replaced, x.tangent))
    primal = source.primal.to(value.device, value.dtype).expand_as(value)
    return broadcast_jet(primal, align(source, primal.ndim).to(value.device))


@rule("fill", several=True)
def fill(x: Any, source: Any) -> Jet:
    """X with all its values replaced by one."""
    if isinstance(source, Jet):
        return copy(x, source)
    return zero_values(x, torch.fill(x.primal, source))


@rule("zero")
def zero(x: Jet) -> Jet:
    """X with all its values replaced by zero."""
    return zero_values(x, torch.zeros_like(x.primal))


def zero_values(x: Jet, primal: Tensor) -> Jet:
    """A Jet that no longer depends on z."""
    return Jet(primal, zero_tangent(primal, x.tangent))


@rule("slice_scatter", several=True)
def slice_scatter(
    x: Any, source: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Jet:
    """X with a range of an axis replaced."""
    axis = dim if dim >= 0 else dim + primal_of(x).ndim
    base, patch = _expanded(x, source)
    primal = torch.slice_scatter(primal_of(x), primal_of(source), axis, start, end, step)
    return Jet(primal, torch.slice_scatter(base, patch, axis + 1, start, end, step))


@rule("select_scatter", several=True)
def select_scatter(x: Any, source: Any, dim: int, position: int) -> Jet:
    """X with one entry of an axis replaced."""
    axis = dim if dim >= 0 else dim + primal_of(x).ndim
    base, patch = _expanded(x, source)
    primal = torch.select_scatter(primal_of(x), primal_of(source), axis, position)
    return Jet(primal, torch.select_scatter(base, patch, axis + 1, position))


@rule("index_put", several=True)
def index_put(x: Any, indices: list[Any], values: Any, accumulate: bool = False) -> Jet:
    """X with indexed entries replaced or added to."""
    return jointly_linear(lambda t, v: aten.index_put(t, indices, v, accumulate), x, values)


@rule("index_add", several=True)
def index_add(x: Any, dim: int, positions: Tensor, source: Any, *, alpha: float = 1) -> Jet:
    """X with rows of another tensor added."""
    return jointly_linear(lambda t, s: t.index_add(dim, positions, s, alpha=alpha), x, source)


@rule("scatter_add", several=True)
def scatter_add(x: Any, dim: int, positions: Tensor, source: Any) -> Jet:
    """X with entries added at positions."""
    return jointly_linear(lambda t, s: t.scatter_add(dim, positions, s), x, source)
