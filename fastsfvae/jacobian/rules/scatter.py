"""Entries replaced or added to at places that do not depend on z: the writes of in-place code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsfvae.jacobian.rules.constant import as_jets
from fastsfvae.jacobian.rules.indexing import places_of
from fastsfvae.jacobian.rules.jet import Jet, align, broadcast_jet, cast, primal_of
from fastsfvae.jacobian.rules.pieces import zero_tangent
from fastsfvae.jacobian.rules.places import (
    both_tangents,
    flattened,
    numbered,
    replaced,
    replaced_at,
    share,
)
from fastsfvae.jacobian.rules.registry import adjoint, always, rule
from fastsfvae.jacobian.rules.shape import expand, front

aten = torch.ops.aten


@rule("index_put", several=True, composed=True, covers=always)
def index_put(x: Any, indices: list[Any], values: Any, accumulate: bool = False) -> Jet:
    """X with indexed entries replaced or added to."""
    if accumulate:
        return _added_at(x, values, places_of(primal_of(x), indices))
    return replaced(x, values, lambda kept, number: aten.index_put(kept, indices, number))


@rule("put", several=True, composed=True, covers=always)
def put(x: Any, positions: Tensor, source: Any, accumulate: bool = False) -> Jet:
    """X with entries of its flattened form replaced or added to."""
    if accumulate:
        places = numbered(primal_of(x)).take(positions)
        return _added_at(x, source, places.view(primal_of(source).shape))
    return replaced(x, source, lambda kept, number: kept.put(positions, number))


@rule("fastsfvae.added_at", several=True)
def _added_at(x: Any, source: Any, places: Tensor) -> Jet:
    """X with another value, broadcast to the places, added at places of its flattened form."""

    def added(base: Tensor, patch: Tensor, k: int) -> Tensor:
        axes = (1,) * (places.ndim - patch.ndim + k)
        patch = patch.reshape(patch.shape[:k] + axes + patch.shape[k:])
        patch = flattened(patch.expand(patch.shape[:k] + places.shape), k)
        return flattened(base, k).index_add(k, places.flatten(), patch).view(base.shape)

    tangents = both_tangents(x, source)
    return Jet(added(primal_of(x), primal_of(source), 0), added(*tangents, 1))


@adjoint("fastsfvae.added_at", covers=always)
def _added_at_adjoint(grad: Jet, out: Jet, needs: tuple, x: Any, source: Any, places: Tensor):
    def taken(g: Tensor, k: int) -> Tensor:
        g = flattened(g, k).index_select(k, places.flatten())
        return g.view(g.shape[:k] + places.shape)

    return share(grad, x, lambda g, _: g), share(grad, source, taken)


@rule("index_add", several=True)
def index_add(x: Any, dim: int, positions: Tensor, source: Any, *, alpha: float = 1) -> Jet:
    """X with rows of another tensor added."""
    axis = front(dim, primal_of(x).ndim)
    tangent, added = both_tangents(x, source)
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
    rows = share(grad, source, lambda g, k: g.index_select(axis + k, positions) * alpha)
    return share(grad, x, lambda g, _: g), None, None, rows


@rule("scatter_add", several=True)
def scatter_add(x: Any, dim: int, positions: Tensor, source: Any) -> Jet:
    """X with entries added at positions."""
    axis = front(dim, primal_of(x).ndim)
    tangent, added = both_tangents(x, source)
    places = positions.expand(len(tangent), *positions.shape)
    primal = primal_of(x).scatter_add(axis, positions, primal_of(source))
    return Jet(primal, tangent.scatter_add(axis + 1, places, added))


@adjoint("scatter_add", covers=always)
def _scatter_add_adjoint(
    grad: Jet, out: Jet, needs: tuple, x: Any, dim: int, positions: Tensor, source: Any
):
    axis = front(dim, out.primal.ndim)

    def taken(g: Tensor, k: int) -> Tensor:
        g = g.gather(axis + k, positions.expand(*g.shape[:k], *positions.shape))
        # The source may be larger than its positions.
        sizes = zip(primal_of(source).shape, positions.shape, strict=True)
        return F.pad(g, [n for size, used in reversed(list(sizes)) for n in (0, size - used)])

    return share(grad, x, lambda g, _: g), None, None, share(grad, source, taken)


@rule("index_copy", several=True, composed=True, covers=always)
def index_copy(x: Any, dim: int, positions: Tensor, source: Any) -> Jet:
    """X with rows replaced by those of another tensor."""
    return replaced(x, source, lambda kept, number: kept.index_copy(dim, positions, number))


@rule("index_fill", several=True, composed=True, covers=always)
def index_fill(x: Any, dim: int, positions: Tensor, value: Any) -> Jet:
    """X with rows replaced by one number."""
    if not isinstance(value, (Jet, Tensor)):
        value = x.primal.new_full((), value)
    return replaced(x, value, lambda kept, _: kept.index_fill(dim, positions, 0))


@rule("masked_scatter", several=True, composed=True, covers=always)
def masked_scatter(x: Any, mask: Tensor, source: Any) -> Jet:
    """X with the masked entries replaced by the first ones of another tensor.

    Raises:
        RuntimeError: a sample takes what lies in another one's part of the source.
    """
    shape = torch.broadcast_shapes(primal_of(x).shape, mask.shape)
    if primal_of(x).shape != shape:
        x = expand(*as_jets(x, source)[:1], list(shape))
    value, entries = primal_of(x), primal_of(source).numel()
    kept = torch.full(shape, -1, device=value.device)
    places = kept.masked_scatter(mask, numbered(primal_of(source)))
    batch = max(1, shape[0]) if shape else 1
    of_sample = torch.arange(batch, device=value.device).repeat_interleave(value.numel() // batch)
    strange = (places >= 0) & (places // max(1, entries // batch) != of_sample.view(shape))
    if bool(strange.any()):
        raise RuntimeError(
            "masked_scatter gives samples what belongs to other ones, so they have no Jacobian of "
            "their own: give it as many entries per sample as the mask takes, or use torch.where"
        )
    return replaced_at(x, source, places)


@rule("diagonal_scatter", several=True, composed=True, covers=always)
def diagonal_scatter(x: Any, source: Any, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Jet:
    """X with a diagonal of two axes replaced."""
    return replaced(x, source, lambda kept, n: kept.diagonal_scatter(n, offset, dim1, dim2))


def _written(write: Callable[[Tensor, Tensor], Tensor], x: Tensor, source: Tensor) -> Tensor:
    """`write(x, source)`; of both parts where PyTorch has no derivative of it, complex."""
    if not x.is_complex():
        return write(x, source)
    x, source = (torch.view_as_real(t.resolve_conj()) for t in (x, source.to(x.dtype)))
    return torch.view_as_complex(write(x, source).contiguous())


@rule("slice_scatter", several=True)
def slice_scatter(
    x: Any, source: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Jet:
    """X with a range of an axis replaced."""
    axis = front(dim, primal_of(x).ndim)
    base, patch = both_tangents(x, source)
    primal = written_range(primal_of(x), primal_of(source), axis, start, end, step)
    tangent = written_range(base, patch, axis + 1, start, end, step)
    return Jet(primal, cast(tangent, primal.dtype))


def written_range(
    x: Tensor, source: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Tensor:
    """aten.slice_scatter in operations that PyTorch can differentiate."""
    axis = front(dim, x.ndim)
    return _written(lambda t, s: torch.slice_scatter(t, s, axis, start, end, step), x, source)


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

    return share(grad, x, kept), share(grad, source, taken)


@rule("select_scatter", several=True)
def select_scatter(x: Any, source: Any, dim: int, position: int) -> Jet:
    """X with one entry of an axis replaced."""
    axis = front(dim, primal_of(x).ndim)
    base, patch = both_tangents(x, source)
    primal = written_entry(primal_of(x), primal_of(source), axis, position)
    return Jet(primal, cast(written_entry(base, patch, axis + 1, position), primal.dtype))


def written_entry(x: Tensor, source: Tensor, dim: int, position: int) -> Tensor:
    """aten.select_scatter in operations that PyTorch can differentiate."""
    axis = front(dim, x.ndim)
    return _written(lambda t, s: torch.select_scatter(t, s, axis, position), x, source)


@adjoint("select_scatter", covers=always)
def _select_scatter_adjoint(
    grad: Jet, out: Jet, needs: tuple, x: Any, source: Any, dim: int, position: int
):
    axis = front(dim, out.primal.ndim)

    def taken(g: Tensor, k: int) -> Tensor:
        return g.select(axis + k, position)

    def kept(g: Tensor, k: int) -> Tensor:
        return torch.select_scatter(g, torch.zeros_like(taken(g, k)), axis + k, position)

    return share(grad, x, kept), share(grad, source, taken)


@rule("copy", several=True)
def copy(x: Any, source: Any, non_blocking: bool = False) -> Jet:
    """X with all its values replaced by the source's, broadcast."""
    primal = copied(primal_of(x), primal_of(source))
    if not isinstance(source, Jet):
        return Jet(primal, zero_tangent(primal, x.tangent))
    return broadcast_jet(primal, cast(align(source, primal.ndim), primal.dtype).to(primal.device))


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
    return _zeros_for(x), None if source is None else share(grad, source, lambda g, _: g)


def _zeros_for(x: Any) -> Any:
    """The gradient of what was overwritten, in its own extents: the result's may be others."""
    if isinstance(x, Jet):
        return Jet(_zeros_for(x.primal), _zeros_for(x.tangent))
    return x.new_zeros(()).expand(x.shape)
