"""Views, permutations and copies: tangents move as values do, one axis further in.

Tangents shared by all samples (extent 1) stay shared while axis 0 is the same batch before and
after; otherwise they are expanded first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsfvae.jacobian.rules.constant import as_jets
from fastsfvae.jacobian.rules.jet import (
    Jet,
    align,
    cast,
    fold,
    from_stack,
    full_tangent,
    is_list,
    move,
    primal_of,
    unfold,
)
from fastsfvae.jacobian.rules.registry import RULES, adjoint, always, rule

aten = torch.ops.aten


def tangent_of(x: Jet, keeps_batch: bool) -> Tensor:
    """The tangents, expanded where an operation does not keep axis 0 as the batch."""
    return x.tangent if keeps_batch else full_tangent(x)


def front(dim: int, ndim: int) -> int:
    """An axis counted from the front."""
    return dim if dim >= 0 else dim + ndim


def _viewed(value: Tensor, size: Any) -> Tensor:
    if isinstance(size, torch.dtype):
        raise RuntimeError(
            f"the decoder views the bits of a value as {size}: use .to(), torch.view_as_complex or "
            "torch.view_as_real"
        )
    return aten.reshape(value, size)


def _reshape_rule(name: str) -> Callable[..., Jet]:
    # A rule may return other strides than the operation it stands for, which view() would refuse.
    plain = name.removeprefix("fastsfvae.")
    operation = _viewed if plain == "view" else getattr(aten, plain)

    @rule(name)
    def reshaped(x: Jet, *args: Any, **kwargs: Any) -> Jet:
        y = operation(x.primal, *args, **kwargs)
        m = x.tangent.shape[0]
        if x.stack is not None:
            return move(x, lambda t, k: t.reshape(*t.shape[:k], *y.shape))
        if y.ndim and x.primal.ndim and y.shape[0] == x.primal.shape[0]:
            # Row-major order: an equal leading extent means that each row maps onto itself.
            return Jet(y, x.tangent.reshape(m, x.tangent.shape[1], *y.shape[1:]))
        return Jet(y, full_tangent(x).reshape(m, *y.shape))

    adjoint(name)(_reshape_adjoint)
    return reshaped


def _reshape_adjoint(grad: Jet, out: Jet, needs: tuple, x: Jet, *args: Any, **kwargs: Any):
    if grad.stack is not None:
        return (move(grad, lambda g, _: g.reshape(g.shape[0], *x.primal.shape)),)
    m, same = x.tangent.shape[0], grad.tangent.numel() == x.tangent.numel()
    shape = x.tangent.shape if same else (m, *x.primal.shape)
    return (Jet(grad.primal.reshape(x.primal.shape), grad.tangent.reshape(shape)),)


for _name in "view", "ravel":
    _reshape_rule(_name)
reshape = _reshape_rule("reshape")
flatten = _reshape_rule("flatten")
unflatten = _reshape_rule("unflatten")
squeeze = _reshape_rule("squeeze")
unsqueeze = _reshape_rule("unsqueeze")


def _at_least(name: str) -> None:
    of_one = _reshape_rule(f"fastsfvae.{name}")

    @rule(name, several=True, composed=True, covers=always)
    def of_each(x: Any) -> Any:
        return [of_one(item) for item in as_jets(*x)] if is_list(x) else of_one(x)


for _name in "atleast_1d", "atleast_2d", "atleast_3d":
    _at_least(_name)


def _first_jet(args: tuple, kwargs: dict) -> bool:
    return isinstance(args[0], Jet)


@rule("view_as", "reshape_as", several=True, composed=True, covers=_first_jet)
def reshape_as(x: Jet, other: Any) -> Jet:
    """With another tensor's shape."""
    return reshape(x, list(primal_of(other).shape))


@rule("permute")
def permute(x: Jet, dims: list[int]) -> Jet:
    """Reorder the axes."""
    order = [front(d, x.primal.ndim) for d in dims]
    return move(x, lambda t, k: _permuted(t, order, k), keeps_batch=order[:1] == [0])


def _permuted(t: Tensor, order: list[int], leading: int) -> Tensor:
    return t.permute(*range(leading), *(d + leading for d in order))


@adjoint("permute")
def _permute_adjoint(grad: Jet, out: Jet, needs: tuple, x: Jet, dims: list[int]) -> tuple[Jet]:
    order = [front(d, x.primal.ndim) for d in dims]
    inverse = [order.index(i) for i in range(len(order))]
    return (move(grad, lambda g, k: _permuted(g, inverse, k)),)


@rule("transpose", "swapaxes", "swapdims")
def transpose(x: Jet, dim0: int, dim1: int) -> Jet:
    """Exchange two axes."""
    a, b = front(dim0, x.primal.ndim), front(dim1, x.primal.ndim)
    keeps = a == b or 0 not in (a, b)
    return move(x, lambda t, k: t.transpose(a + k, b + k), keeps_batch=keeps)


@adjoint("transpose", "swapaxes", "swapdims")
def _transpose_adjoint(grad: Jet, out: Jet, needs: tuple, x: Jet, dim0: int, dim1: int):
    a, b = front(dim0, x.primal.ndim), front(dim1, x.primal.ndim)
    return (move(grad, lambda g, k: g.transpose(a + k, b + k)),)


@rule("t", "mT", composed=True)
def matrix_transpose(x: Jet) -> Jet:
    """Exchange the last two axes."""
    return transpose(x, -1, -2) if x.primal.ndim > 1 else x


@rule("numpy_T", composed=True)
def reversed_axes(x: Jet) -> Jet:
    """All axes in reverse order."""
    return permute(x, list(range(x.primal.ndim))[::-1])


@rule("movedim", "moveaxis", composed=True)
def movedim(x: Jet, source: Any, destination: Any) -> Jet:
    """Move axes to new places."""
    ndim = x.primal.ndim
    sources = [source] if isinstance(source, int) else source
    targets = [destination] if isinstance(destination, int) else destination
    placed = {front(t, ndim): front(s, ndim) for s, t in zip(sources, targets, strict=True)}
    rest = iter(a for a in range(ndim) if a not in placed.values())
    return permute(x, [placed[i] if i in placed else next(rest) for i in range(ndim)])


@rule("expand")
def expand(x: Jet, size: list[int], *, implicit: bool = False) -> Jet:
    """Broadcast to a larger shape."""
    y = x.primal.expand(size)
    if y.ndim == 0:
        return Jet(y, x.tangent)
    keeps = y.ndim == x.primal.ndim and y.shape[0] == x.primal.shape[0]
    tangent = x.tangent if keeps else align(x, y.ndim)
    batch = tangent.shape[1] if keeps else y.shape[0]
    return Jet(y, tangent.expand(tangent.shape[0], batch, *y.shape[1:]))


@adjoint("expand")
def _expand_adjoint(grad: Jet, *_: Any, **__: Any) -> tuple[Jet]:
    # What was broadcast is summed by the tape.
    return (grad,)


@rule("expand_as", "broadcast_to", several=True, composed=True, covers=_first_jet)
def expand_as(x: Jet, other: Any) -> Jet:
    """Broadcast to another tensor's shape, or to a given one."""
    other = primal_of(other)
    return expand(x, list(other.shape) if isinstance(other, Tensor) else other)


@rule("contiguous")
def contiguous(x: Jet, *, memory_format: Any = torch.contiguous_format) -> Jet:
    """The same values, in the memory that what reads its strides next expects of them."""
    if memory_format is not torch.contiguous_format:
        return _channels_last(x, memory_format)
    if x.primal.is_contiguous():
        return x
    if x.stack is not None:
        return from_stack(x.stack.contiguous())
    return Jet(x.primal.contiguous(), x.tangent)


@rule("clone")
def clone(x: Jet, *, memory_format: Any = None) -> Jet:
    """The same values, in memory without gaps or overlaps; copied only where there are some."""
    if memory_format is torch.contiguous_format:
        return RULES["contiguous"].forward(x)
    if memory_format not in (None, torch.preserve_format):
        return _channels_last(x, memory_format)
    if x.primal.is_contiguous() or aten.is_non_overlapping_and_dense(x.primal):
        return x
    return Jet(x.primal.clone(), x.tangent)


def _channels_last(x: Jet, memory_format: Any) -> Jet:
    if memory_format not in (torch.channels_last, torch.channels_last_3d):
        return x
    folded = fold(x.tangent).contiguous(memory_format=memory_format)
    primal = x.primal.contiguous(memory_format=memory_format)
    return Jet(primal, unfold(folded, x.tangent.shape[0]))


@adjoint("contiguous", "clone")
def _identity_adjoint(grad: Jet, *_: Any, **__: Any) -> tuple[Jet]:
    # The tape casts it.
    return (grad,)


@rule(
    "positive",
    "dropout",
    "feature_dropout",
    "alpha_dropout",
    "feature_alpha_dropout",
    composed=True,
)
def unchanged(x: Jet, *args: Any) -> Jet:
    """+x, and dropout in evaluation; in training it is refused before it runs."""
    return x


@rule("fastsfvae.to")
def convert(x: Jet, *args: Any, **kwargs: Any) -> Jet:
    """To another dtype, device or memory format; a real one keeps the real part."""
    primal = aten.to(x.primal, *args, **kwargs)
    moved = _channels_last(Jet(primal, x.tangent), kwargs.get("memory_format"))
    return Jet(moved.primal, cast(moved.tangent, primal.dtype).to(primal.device))


adjoint("fastsfvae.to")(_identity_adjoint)


@rule("to", several=True, composed=True, covers=_first_jet)
def to(x: Jet, *args: Any, **kwargs: Any) -> Jet:
    """`convert`, or to another tensor's dtype and device."""
    return convert(x, *map(primal_of, args), **kwargs)


@rule("type_as", several=True, composed=True, covers=_first_jet)
def type_as(x: Jet, other: Any) -> Jet:
    """With another tensor's dtype and device."""
    other = primal_of(other)
    return convert(x, other.device, other.dtype)
