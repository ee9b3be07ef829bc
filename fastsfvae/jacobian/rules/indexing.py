"""Entries taken at places that do not depend on z.

Whatever takes entries of a value at places that it finds (an extreme, a sort, a pooling window) is
a `gather` of its Jet at those places.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsfvae.jacobian.rules.arithmetic import where
from fastsfvae.jacobian.rules.jet import Jet, full_tangent, move
from fastsfvae.jacobian.rules.pieces import put_back
from fastsfvae.jacobian.rules.places import flattened
from fastsfvae.jacobian.rules.registry import RULES, adjoint, rule
from fastsfvae.jacobian.rules.shape import expand, front, reshape

aten = torch.ops.aten


def _with_an_axis(t: Tensor, leading: int) -> Tensor:
    """A number as a vector of one; anything else unchanged."""
    return t if t.ndim > leading else t.unsqueeze(leading)


@rule("gather")
def gather(x: Jet, dim: int, positions: Tensor, *, sparse_grad: bool = False) -> Jet:
    """One entry of an axis per position."""
    axis, places = front(dim, max(1, x.primal.ndim)), _with_an_axis(positions, 0)

    def taken(t: Tensor, k: int) -> Tensor:
        t = _with_an_axis(t, k).gather(axis + k, places.expand(t.shape[:k] + places.shape))
        return t.view(t.shape[:k] + positions.shape)

    return Jet(taken(x.primal, 0), taken(full_tangent(x), 1))


@adjoint("gather")
def _gather_adjoint(
    grad: Jet, out: Jet, needs: tuple, x: Jet, dim: int, positions: Tensor, **_: Any
) -> tuple[Jet]:
    axis, places = front(dim, max(1, x.primal.ndim)), _with_an_axis(positions, 0)

    def back(g: Tensor, k: int) -> Tensor:
        g, zeros = _with_an_axis(g, k), g.new_zeros(g.shape[:k] + x.primal.shape)
        _with_an_axis(zeros, k).scatter_add_(axis + k, places.expand(g.shape), g)
        return zeros

    return (move(grad, back),)


@rule("take_along_dim", composed=True)
def take_along_dim(x: Jet, positions: Tensor, dim: int | None = None) -> Jet:
    """Like gather, with broadcasting."""
    if dim is None:
        return gather(reshape(x, [-1]), 0, positions.flatten())
    axis = front(dim, x.primal.ndim)
    shape = list(x.primal.shape)
    shape[axis] = 1
    others = list(positions.shape)
    others[axis] = 1
    common = list(torch.broadcast_shapes(shape, others))
    wide, places = list(common), list(common)
    wide[axis], places[axis] = x.primal.shape[axis], positions.shape[axis]
    # Counted from the end where they are negative.
    positions = positions + wide[axis] * (positions < 0)
    return gather(expand(x, wide), axis, positions.expand(places))


@rule("take", composed=True)
def take(x: Jet, positions: Tensor) -> Jet:
    """Entries of the flattened value."""
    return index(reshape(x, [-1]), [positions])


@rule("masked_select", composed=True)
def masked_select(x: Jet, mask: Tensor) -> Jet:
    """The entries where a mask is true, in row-major order."""
    shape = torch.broadcast_shapes(x.primal.shape, mask.shape)
    return index(expand(x, list(shape)), [mask.expand(shape)])


@rule("index_select")
def index_select(x: Jet, dim: int, positions: Tensor) -> Jet:
    """Entries of an axis."""
    if not x.primal.ndim:
        return x
    axis = front(dim, x.primal.ndim)
    return move(x, lambda t, k: t.index_select(axis + k, positions), keeps_batch=axis != 0)


@adjoint("index_select")
def _index_select_adjoint(
    grad: Jet, out: Jet, needs: tuple, x: Jet, dim: int, positions: Tensor
) -> tuple[Jet]:
    axis = front(dim, x.primal.ndim)
    return (put_back(grad, x, axis, lambda t, g, k: t.index_add_(axis + k, positions, g)),)


@rule("embedding", composed=True)
def embedding(
    weight: Jet, positions: Tensor, padding_idx: int = -1, by_frequency: bool = False, _: Any = None
) -> Jet:
    """Rows of a matrix, of which one may be trained by nothing.

    Raises:
        RuntimeError: gradients are to be divided by how often a row is taken in the whole batch.
    """
    if by_frequency:
        raise RuntimeError(
            "an embedding with scale_grad_by_freq weighs a sample's gradient by those of the batch "
            "that it is in: set it to False"
        )
    rows = index(weight, [positions])
    if padding_idx < 0:
        return rows
    return where((positions == padding_idx)[..., None], rows.primal.detach(), rows)


def places_of(value: Tensor, indices: list[Any]) -> Tensor:
    """Where the indexed entries lie in the flattened value."""
    numbers = torch.arange(value.numel(), device=value.device)
    return aten.index(numbers.view(value.shape), indices)


@rule("index")
def index(x: Jet, indices: list[Any]) -> Jet:
    """x[indices]."""
    places = places_of(x.primal, indices)
    return Jet(aten.index(x.primal, indices), flattened(full_tangent(x), 1)[:, places])


@adjoint("index")
def _index_adjoint(grad: Jet, out: Jet, needs: tuple, x: Jet, indices: list[Any]) -> tuple[Jet]:
    places = places_of(x.primal, indices).flatten()

    def back(g: Tensor, k: int) -> Tensor:
        flat = g.new_zeros(*g.shape[:k], x.primal.numel())
        return flat.index_add_(k, places, flattened(g, k)).view(g.shape[:k] + x.primal.shape)

    return (move(grad, back),)


@rule("tril")
def tril(x: Jet, diagonal: int = 0) -> Jet:
    """The lower triangle of the last two axes."""
    return move(x, lambda t, _: t.tril(diagonal), keeps_batch=x.primal.ndim > 2)


@rule("triu")
def triu(x: Jet, diagonal: int = 0) -> Jet:
    """The upper triangle of the last two axes."""
    return move(x, lambda t, _: t.triu(diagonal), keeps_batch=x.primal.ndim > 2)


@adjoint("tril")
def _tril_adjoint(grad: Jet, out: Jet, needs: tuple, x: Jet, diagonal: int = 0) -> tuple[Jet]:
    return (RULES["tril"].forward(grad, diagonal),)


@adjoint("triu")
def _triu_adjoint(grad: Jet, out: Jet, needs: tuple, x: Jet, diagonal: int = 0) -> tuple[Jet]:
    return (RULES["triu"].forward(grad, diagonal),)


@rule("diagonal", "diagonal_copy")
def diagonal(x: Jet, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Jet:
    """A diagonal of two axes."""
    a, b = front(dim1, x.primal.ndim), front(dim2, x.primal.ndim)
    return move(x, lambda t, k: t.diagonal(offset, a + k, b + k), keeps_batch=0 not in (a, b))


@adjoint("diagonal", "diagonal_copy")
def _diagonal_adjoint(
    grad: Jet, out: Jet, needs: tuple, x: Jet, offset: int = 0, dim1: int = 0, dim2: int = 1
) -> tuple[Jet]:
    a, b = front(dim1, x.primal.ndim), front(dim2, x.primal.ndim)

    def write(t: Tensor, g: Tensor, k: int) -> Tensor:
        return torch.diagonal_scatter(t, g, offset, a + k, b + k)

    return (put_back(grad, x, min(a, b), write),)


@rule("diag_embed")
def diag_embed(x: Jet, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Jet:
    """The last axis as a diagonal of two new axes, zeros beside it."""
    a, b = front(dim1, x.primal.ndim + 1), front(dim2, x.primal.ndim + 1)
    keeps = x.primal.ndim > 1 and 0 not in (a, b)
    return move(x, lambda t, k: t.diag_embed(offset, a + k, b + k), keeps_batch=keeps)


@adjoint("diag_embed")
def _diag_embed_adjoint(
    grad: Jet, out: Jet, needs: tuple, x: Jet, offset: int = 0, dim1: int = -2, dim2: int = -1
) -> tuple[Jet]:
    a, b = front(dim1, out.primal.ndim), front(dim2, out.primal.ndim)
    return (move(grad, lambda g, k: g.diagonal(offset, a + k, b + k)),)


@rule("unfold", "unfold_copy")
def unfold(x: Jet, dimension: int, size: int, step: int) -> Jet:
    """Sliding windows along an axis."""
    axis = front(dimension, x.primal.ndim)
    return move(x, lambda t, k: t.unfold(axis + k, size, step), keeps_batch=axis != 0)


@adjoint("unfold", "unfold_copy")
def _unfold_adjoint(
    grad: Jet, out: Jet, needs: tuple, x: Jet, dimension: int, size: int, step: int
) -> tuple[Jet]:
    axis = front(dimension, x.primal.ndim)

    def write(t: Tensor, g: Tensor, k: int) -> Tensor:
        return aten.unfold_backward(g, t.shape, axis + k, size, step)

    return (put_back(grad, x, axis, write),)
