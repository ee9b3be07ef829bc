"""Entries replaced or added to at places that do not depend on z: the writes of in-place code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsfvae.jacobian.rules.indexing import places_of
from fastsfvae.jacobian.rules.jet import Jet, align, broadcast_jet, full_tangent, move, primal_of
from fastsfvae.jacobian.rules.pieces import zero_tangent
from fastsfvae.jacobian.rules.registry import adjoint, always, rule
from fastsfvae.jacobian.rules.shape import front

aten = torch.ops.aten


@rule("index_put", several=True)
def index_put(x: Any, indices: list[Any], values: Any, accumulate: bool = False) -> Jet:
    """X with indexed entries replaced or added to."""
    value, patch = primal_of(x), primal_of(values)
    places = places_of(value, indices)
    tangent, patches = _both_tangents(x, values)
    axes = (1,) * (places.ndim - patch.ndim)
    patches = patches.unflatten(0, (-1, *axes)).expand(-1, *places.shape).flatten(1)
    write = torch.index_add if accumulate else torch.index_copy
    moved = write(tangent.flatten(1), 1, places.flatten(), patches)
    return Jet(aten.index_put(value, indices, patch, accumulate), moved.view(tangent.shape))


@adjoint("index_put", covers=always)
def _index_put_adjoint(
    grad: Jet,
    out: Jet,
    needs: tuple,
    x: Any,
    indices: list[Any],
    values: Any,
    accumulate: bool = False,
):
    places = places_of(out.primal, indices)

    def kept(g: Tensor, k: int) -> Tensor:
        if accumulate:
            return g
        return g.flatten(k).index_fill(k, places.flatten(), 0).view(g.shape)

    def taken(g: Tensor, k: int) -> Tensor:
        return g.flatten(k).index_select(k, places.flatten()).unflatten(k, places.shape)

    return _share(grad, x, kept), None, _share(grad, values, taken)


def _both_tangents(a: Any, b: Any) -> tuple[Tensor, Tensor]:
    """Tangents ``[m, *shape]`` of two operands; those of a constant are zero, without storage."""
    like = next(x.tangent for x in (a, b) if isinstance(x, Jet))
    first, second = (
        full_tangent(x) if isinstance(x, Jet) else zero_tangent(x, like) for x in (a, b)
    )
    return first, second.to(first.dtype)


def _share(grad: Jet, operand: Any, operation: Callable[[Tensor, int], Tensor]) -> Any:
    """What a linear operation makes of a gradient: a Jet for a Jet, a tensor for a tensor."""
    return move(grad, operation) if isinstance(operand, Jet) else operation(grad.primal, 0)


@rule("index_add", several=True)
def index_add(x: Any, dim: int, positions: Tensor, source: Any, *, alpha: float = 1) -> Jet:
    """X with rows of another tensor added."""
    axis = front(dim, primal_of(x).ndim)
    tangent, added = _both_tangents(x, source)
    primal = primal_of(x).index_add(axis, positions, primal_of(source), alpha=alpha)
    return Jet(primal, tangent.index_add(axis + 1, positions, added, alpha=alpha))


@adjoint("index_add", covers=always)
def _index_add_adjoint(
    grad: Jet,
    out: Jet,
    needs: tuple,
    x: Any,
    dim: int,
    positions: Tensor,
    source: Any,
    *,
    alpha: float = 1,
):
    axis = front(dim, out.primal.ndim)
    rows = _share(grad, source, lambda g, k: g.index_select(axis + k, positions) * alpha)
    return _share(grad, x, lambda g, _: g), None, None, rows


@rule("scatter_add", several=True)
def scatter_add(x: Any, dim: int, positions: Tensor, source: Any) -> Jet:
    """X with entries added at positions."""
    axis = front(dim, primal_of(x).ndim)
    tangent, added = _both_tangents(x, source)
    places = positions.expand(len(tangent), *positions.shape)
    primal = primal_of(x).scatter_add(axis, positions, primal_of(source))
    return Jet(primal, tangent.scatter_add(axis + 1, places, added))


def _one_position_each(args: tuple, kwargs: dict) -> bool:
    return primal_of(args[3]).shape == args[2].shape


@adjoint("scatter_add", covers=_one_position_each)
def _scatter_add_adjoint(
    grad: Jet, out: Jet, needs: tuple, x: Any, dim: int, positions: Tensor, source: Any
):
    axis = front(dim, out.primal.ndim)

    def taken(g: Tensor, k: int) -> Tensor:
        return g.gather(axis + k, positions.expand(*g.shape[:k], *positions.shape))

    return _share(grad, x, lambda g, _: g), None, None, _share(grad, source, taken)


@rule("slice_scatter", several=True)
def slice_scatter(
    x: Any, source: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Jet:
    """X with a range of an axis replaced."""
    axis = front(dim, primal_of(x).ndim)
    base, patch = _both_tangents(x, source)
    primal = torch.slice_scatter(primal_of(x), primal_of(source), axis, start, end, step)
    return Jet(primal, torch.slice_scatter(base, patch, axis + 1, start, end, step))


@adjoint("slice_scatter", covers=always)
def _slice_scatter_adjoint(
    grad: Jet,
    out: Jet,
    needs: tuple,
    x: Any,
    source: Any,
    dim: int = 0,
    start: Any = None,
    end: Any = None,
    step: int = 1,
):
    axis = front(dim, out.primal.ndim)

    def taken(g: Tensor, k: int) -> Tensor:
        return aten.slice(g, axis + k, start, end, step)

    def kept(g: Tensor, k: int) -> Tensor:
        zeros = torch.zeros_like(taken(g, k))
        return torch.slice_scatter(g, zeros, axis + k, start, end, step)

    return _share(grad, x, kept), _share(grad, source, taken)


@rule("select_scatter", several=True)
def select_scatter(x: Any, source: Any, dim: int, position: int) -> Jet:
    """X with one entry of an axis replaced."""
    axis = front(dim, primal_of(x).ndim)
    base, patch = _both_tangents(x, source)
    primal = torch.select_scatter(primal_of(x), primal_of(source), axis, position)
    return Jet(primal, torch.select_scatter(base, patch, axis + 1, position))


@adjoint("select_scatter", covers=always)
def _select_scatter_adjoint(
    grad: Jet, out: Jet, needs: tuple, x: Any, source: Any, dim: int, position: int
):
    axis = front(dim, out.primal.ndim)

    def taken(g: Tensor, k: int) -> Tensor:
        return g.select(axis + k, position)

    def kept(g: Tensor, k: int) -> Tensor:
        return torch.select_scatter(g, torch.zeros_like(taken(g, k)), axis + k, position)

    return _share(grad, x, kept), _share(grad, source, taken)


@rule("copy", several=True)
def copy(x: Any, source: Any, non_blocking: bool = False) -> Jet:
    """X with all its values replaced by the source's, broadcast."""
    primal = copied(primal_of(x), primal_of(source))
    if not isinstance(source, Jet):
        return Jet(primal, zero_tangent(primal, x.tangent))
    return broadcast_jet(primal, align(source, primal.ndim).to(primal.device))


def copied(value: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """aten.copy in operations that PyTorch can differentiate."""
    return source.to(value.device, value.dtype).expand_as(value)


@rule("fill", several=True)
def fill(x: Any, source: Any) -> Jet:
    """X with all its values replaced by one."""
    if isinstance(source, Jet):
        return copy(x, source)
    primal = torch.fill(x.primal, source)
    return Jet(primal, zero_tangent(primal, x.tangent))


@rule("zero")
def zero(x: Jet) -> Jet:
    """X with all its values replaced by zero."""
    return fill(x, 0)


@adjoint("copy", "fill", "zero", covers=always)
def _replaced_adjoint(grad: Jet, out: Jet, needs: tuple, x: Any, source: Any = None, *_: Any):
    nothing = _share(grad, x, lambda g, _: g.new_zeros(()).expand(g.shape))
    return nothing, None if source is None else _share(grad, source, lambda g, _: g)
