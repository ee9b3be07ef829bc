"""Cutting a value apart along an axis, and joining values along one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsfvae.jacobian.rules.jet import Jet, full_tangent, primal_of
from fastsfvae.jacobian.rules.registry import adjoint, always, rule
from fastsfvae.jacobian.rules.shape import front, tangent_of

aten = torch.ops.aten


def _pieces(primals: Any, tangents: Any) -> tuple[Jet, ...]:
    return tuple(Jet(p, t) for p, t in zip(primals, tangents, strict=True))


def _splitting_rule(*names: str) -> Callable[..., tuple[Jet, ...]]:
    operation = getattr(aten, names[0])

    @rule(*names)
    def pieces(x: Jet, how: Any, dim: int = 0) -> tuple[Jet, ...]:
        axis = front(dim, x.primal.ndim)
        tangent = tangent_of(x, axis != 0)
        return _pieces(operation(x.primal, how, axis), operation(tangent, how, axis + 1))

    @adjoint(*names)
    def joined(
        grads: tuple, out: tuple, needs: tuple, x: Jet, how: Any, dim: int = 0
    ) -> tuple[Jet]:
        return (
            _joined(grads, out, lambda parts, k: torch.cat(parts, front(dim, x.primal.ndim) + k)),
        )

    return pieces


def _joined(grads: tuple, out: tuple, join: Callable[[list[Tensor], int], Tensor]) -> Jet:
    """One gradient from those of all pieces, zeros where one is missing."""
    full = [
        Jet(torch.zeros_like(y.primal), torch.zeros_like(y.tangent)) if g is None else g
        for g, y in zip(grads, out, strict=True)
    ]
    return Jet(join([g.primal for g in full], 0), join([g.tangent for g in full], 1))


chunk = _splitting_rule("chunk", "unsafe_chunk")
_splitting_rule("split", "unsafe_split", "split_copy")
_splitting_rule("split_with_sizes", "unsafe_split_with_sizes", "split_with_sizes_copy")
_splitting_rule("tensor_split")


@rule("unbind", "unbind_copy")
def unbind(x: Jet, dim: int = 0) -> tuple[Jet, ...]:
    """Take an axis apart."""
    axis = front(dim, x.primal.ndim)
    return _pieces(x.primal.unbind(axis), tangent_of(x, axis != 0).unbind(axis + 1))


@adjoint("unbind", "unbind_copy")
def _unbind_adjoint(grads: tuple, out: tuple, needs: tuple, x: Jet, dim: int = 0) -> tuple[Jet]:
    axis = front(dim, x.primal.ndim)
    return (_joined(grads, out, lambda parts, k: torch.stack(parts, axis + k)),)


@rule("select", "select_copy")
def select(x: Jet, dim: int, index: int) -> Jet:
    """One entry of an axis."""
    axis = front(dim, x.primal.ndim)
    return Jet(x.primal.select(axis, index), tangent_of(x, axis != 0).select(axis + 1, index))


def put_back(grad: Jet, x: Jet, axis: int, write: Callable[[Tensor, Tensor, int], Any]) -> Jet:
    """The gradient of x, whose entries along an axis were taken.

    Args:
        grad: of what was taken.
        x: what it was taken from.
        axis: the first one that was touched, from the front.
        write: called with zeros of x's extents, the gradient and the number of axes in front of the
            value's own; returns the zeros with the gradient put in.
    """
    tangent = tangent_of(x, axis != 0)
    whole = Jet(torch.zeros_like(x.primal), torch.zeros_like(tangent).contiguous())
    return Jet(write(whole.primal, grad.primal, 0), write(whole.tangent, grad.tangent, 1))


@adjoint("select", "select_copy")
def _select_adjoint(grad: Jet, out: Jet, needs: tuple, x: Jet, dim: int, index: int):
    axis = front(dim, x.primal.ndim)
    return (put_back(grad, x, axis, lambda t, g, k: t.select_scatter(g, axis + k, index)),)


@rule("slice", "slice_copy")
def slice_(
    x: Jet, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Jet:
    """A range of an axis."""
    axis = front(dim, x.primal.ndim)
    y = aten.slice(x.primal, axis, start, end, step)
    if axis == 0 and y.shape[0] == x.primal.shape[0]:
        return Jet(y, x.tangent)
    return Jet(y, aten.slice(tangent_of(x, axis != 0), axis + 1, start, end, step))


@adjoint("slice", "slice_copy")
def _slice_adjoint(
    grad: Jet,
    out: Jet,
    needs: tuple,
    x: Jet,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> tuple[Jet]:
    axis = front(dim, x.primal.ndim)
    if out.primal.shape == x.primal.shape:
        return (grad,)
    return (
        put_back(grad, x, axis, lambda t, g, k: t.slice_scatter(g, axis + k, start, end, step)),
    )


@rule("narrow", "narrow_copy", composed=True)
def narrow(x: Jet, dim: int, start: int, length: int) -> Jet:
    """A range of an axis, by its length."""
    # From the end, the range may reach it.
    start = start + x.primal.shape[dim] if start < 0 else start
    return slice_(x, dim, start, start + length)


def zero_tangent(value: Tensor, like: Tensor) -> Tensor:
    """Tangents [m, *value.shape] of a value that does not depend on z, without storage."""
    return like.new_zeros(()).expand(like.shape[0], *value.shape)


def _tangents_of(items: list[Any], keeps_batch: bool) -> list[Tensor]:
    jets = [x for x in items if isinstance(x, Jet)]
    shared = keeps_batch and all(x.tangent.shape[1] == 1 for x in jets if x.primal.ndim)
    tangents = []
    for x in items:
        if isinstance(x, Jet):
            tangents.append(x.tangent if shared else full_tangent(x))
        else:
            tangents.append(zero_tangent(x[:1] if shared else x, jets[0].tangent))
    return tangents


@rule("cat", "concat", "concatenate", several=True)
def cat(tensors: list[Any], dim: int = 0) -> Jet:
    """Join along an axis."""
    # torch.cat lets empty vectors join anything.
    items = [x for x in tensors if primal_of(x).shape != (0,)]
    ndim = primal_of(items[0]).ndim
    axis = front(dim, ndim)
    primal = torch.cat([primal_of(x) for x in tensors], axis)
    tangent = torch.cat(_tangents_of(items, axis != 0), axis + 1)
    return Jet(primal, tangent.to(primal.dtype))


@adjoint("cat", "concat", "concatenate", covers=always)
def _cat_adjoint(grad: Jet, out: Jet, needs: tuple, tensors: list[Any], dim: int = 0) -> tuple:
    items = [primal_of(x) for x in tensors]
    axis = front(dim, out.primal.ndim)
    parts: list[Any] = []
    start = 0
    for x, value in zip(tensors, items, strict=True):
        if value.shape == (0,):
            parts.append(None)
            continue
        length = value.shape[axis]
        tangent = grad.tangent.narrow(axis + 1, start, length)
        parts.append(_part(x, grad.primal.narrow(axis, start, length), tangent))
        start += length
    return (parts,)


def _part(x: Any, primal: Tensor, tangent: Tensor) -> Any:
    """The gradient of one of the parts that were joined."""
    return Jet(primal, tangent) if isinstance(x, Jet) else primal


@rule("stack", several=True)
def stack(tensors: list[Any], dim: int = 0) -> Jet:
    """Join along a new axis."""
    axis = front(dim, primal_of(tensors[0]).ndim + 1)
    primal = torch.stack([primal_of(x) for x in tensors], axis)
    tangent = torch.stack(_tangents_of(tensors, axis != 0), axis + 1)
    return Jet(primal, tangent.to(primal.dtype))


@adjoint("stack", covers=always)
def _stack_adjoint(grad: Jet, out: Jet, needs: tuple, tensors: list[Any], dim: int = 0) -> tuple:
    axis = front(dim, out.primal.ndim)
    pieces = zip(tensors, grad.primal.unbind(axis), grad.tangent.unbind(axis + 1), strict=True)
    return ([_part(*piece) for piece in pieces],)
