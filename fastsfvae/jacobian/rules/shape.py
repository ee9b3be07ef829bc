"""Views, permutations, joins and splits: tangents move as values do, one axis further in.

Tangents shared by all samples (extent 1) stay shared while axis 0 is the same batch before and
after; otherwise they are expanded first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsfvae.jacobian.jet import Jet, align, fold, full_tangent, move, primal_of, unfold
from fastsfvae.jacobian.registry import adjoint, rule

aten = torch.ops.aten


def _tangent(x: Jet, keeps_batch: bool) -> Tensor:
    return x.tangent if keeps_batch else full_tangent(x)


def _front(dim: int, ndim: int) -> int:
    return dim if dim >= 0 else dim + ndim


def _reshape_rule(name: str) -> Callable[..., Jet]:
    # A rule may return other strides than the operation it stands for, which view() would refuse.
    operation = aten.reshape if name.endswith("view") else getattr(aten, name)

    @rule(name, several=name.endswith("_as"))
    def reshaped(x: Jet, *args: Any, **kwargs: Any) -> Jet:
        y = operation(x.primal, *map(primal_of, args), **kwargs)
        m = x.tangent.shape[0]
        if x.stack is not None:
            return move(x, lambda t, k: t.reshape(*t.shape[:k], *y.shape))
        if y.ndim and x.primal.ndim and y.shape[0] == x.primal.shape[0]:
            # Row-major order: an equal leading extent means that each row maps onto itself.
            return Jet(y, x.tangent.reshape(m, x.tangent.shape[1], *y.shape[1:]))
        return Jet(y, full_tangent(x).reshape(m, *y.shape))

    adjoint(name)(_reshape_adjoint)
    return reshaped


def _first_jet(args: tuple, kwargs: dict) -> bool:
    return isinstance(args[0], Jet)


def _reshape_adjoint(grad: Jet, out: Jet, needs: tuple, x: Jet, *args: Any, **kwargs: Any):
    if grad.stack is not None:
        return (move(grad, lambda g, _: g.reshape(g.shape[0], *x.primal.shape)),)
    m, same = x.tangent.shape[0], grad.tangent.numel() == x.tangent.numel()
    shape = x.tangent.shape if same else (m, *x.primal.shape)
    return (Jet(grad.primal.reshape(x.primal.shape), grad.tangent.reshape(shape)),)


for _name in (
    "view reshape flatten unflatten ravel squeeze view_as reshape_as "
    "atleast_1d atleast_2d atleast_3d"
).split():
    _reshape_rule(_name)
unsqueeze = _reshape_rule("unsqueeze")


@rule("permute")
def permute(x: Jet, dims: list[int]) -> Jet:
    """Reorder the axes."""
    order = [_front(d, x.primal.ndim) for d in dims]
    return move(x, lambda t, k: _permuted(t, order, k), keeps_batch=order[:1] == [0])


def _permuted(t: Tensor, order: list[int], leading: int) -> Tensor:
    return t.permute(*range(leading), *(d + leading for d in order))


@adjoint("permute")
def _permute_adjoint(grad: Jet, out: Jet, needs: tuple, x: Jet, dims: list[int]) -> tuple[Jet]:
    order = [_front(d, x.primal.ndim) for d in dims]
    inverse = [order.index(i) for i in range(len(order))]
    return (move(grad, lambda g, k: _permuted(g, inverse, k)),)


@rule("transpose", "swapaxes", "swapdims")
def transpose(x: Jet, dim0: int, dim1: int) -> Jet:
    """Exchange two axes."""
    a, b = _front(dim0, x.primal.ndim), _front(dim1, x.primal.ndim)
    keeps = a == b or 0 not in (a, b)
    return move(x, lambda t, k: t.transpose(a + k, b + k), keeps_batch=keeps)


@adjoint("transpose", "swapaxes", "swapdims")
def _transpose_adjoint(grad: Jet, out: Jet, needs: tuple, x: Jet, dim0: int, dim1: int):
    a, b = _front(dim0, x.primal.ndim), _front(dim1, x.primal.ndim)
    return (move(grad, lambda g, k: g.transpose(a + k, b + k)),)


@rule("t", "matrix_H", "mT", "adjoint", "mH", composed=True)
def matrix_transpose(x: Jet) -> Jet:
    """Exchange the last two axes (real values)."""
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
    placed = {_front(t, ndim): _front(s, ndim) for s, t in zip(sources, targets, strict=True)}
    rest = iter(a for a in range(ndim) if a not in placed.values())
    return permute(x, [placed[i] if i in placed else next(rest) for i in range(ndim)])


@rule("expand")
def expand(x: Jet, size: list[int], *, implicit: bool = False) -> Jet:
    """Broadcast to a larger shape."""
    y = x.primal.expand(size)
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


@rule("repeat", "tile")
def repeat(x: Jet, repeats: list[int]) -> Jet:
    """Tile along each axis."""
    repeats = [1] * (x.primal.ndim - len(repeats)) + list(repeats)
    if len(repeats) == x.primal.ndim and repeats[0] == 1:
        return Jet(x.primal.repeat(repeats), x.tangent.repeat(1, *repeats))
    tangent = align(Jet(x.primal, full_tangent(x)), len(repeats))
    return Jet(x.primal.repeat(repeats), tangent.repeat(1, *repeats))


@rule("repeat_interleave")
def repeat_interleave(x: Jet, repeats: Any, dim: int | None = None, **kwargs: Any) -> Jet:
    """Repeat each entry along an axis."""
    if dim is None:
        x, dim = _flattened(x), 0
    axis = _front(dim, x.primal.ndim)
    return Jet(
        x.primal.repeat_interleave(repeats, axis, **kwargs),
        _tangent(x, axis != 0).repeat_interleave(repeats, axis + 1, **kwargs),
    )


@adjoint("repeat_interleave", covers=lambda args, kwargs: _whole_repeats(*args, **kwargs))
def _repeat_interleave_adjoint(
    grad: Jet, out: Jet, needs: tuple, x: Jet, repeats: int, dim: int, **kwargs: Any
) -> tuple[Jet]:
    axis = _front(dim, x.primal.ndim)
    return (move(grad, lambda g, k: g.unflatten(axis + k, (-1, repeats)).sum(axis + k + 1)),)


def _whole_repeats(x: Any, repeats: Any, dim: int | None = None, **kwargs: Any) -> bool:
    return isinstance(repeats, int) and dim is not None


def _flattened(x: Jet) -> Jet:
    return Jet(x.primal.reshape(-1), full_tangent(x).flatten(1))


def _pieces(primals: Any, tangents: Any) -> tuple[Jet, ...]:
    return tuple(Jet(p, t) for p, t in zip(primals, tangents, strict=True))


def _splitting_rule(*names: str) -> Callable[..., tuple[Jet, ...]]:
    operation = getattr(aten, names[0])

    @rule(*names)
    def pieces(x: Jet, how: Any, dim: int = 0) -> tuple[Jet, ...]:
        axis = _front(dim, x.primal.ndim)
        tangent = _tangent(x, axis != 0)
        return _pieces(operation(x.primal, how, axis), operation(tangent, how, axis + 1))

    @adjoint(*names)
    def joined(
        grads: tuple, out: tuple, needs: tuple, x: Jet, how: Any, dim: int = 0
    ) -> tuple[Jet]:
        return (
            _joined(grads, out, lambda parts, k: torch.cat(parts, _front(dim, x.primal.ndim) + k)),
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
_splitting_rule("split", "unsafe_split")
_splitting_rule("split_with_sizes", "unsafe_split_with_sizes")
_splitting_rule("tensor_split")


@rule("unbind")
def unbind(x: Jet, dim: int = 0) -> tuple[Jet, ...]:
    """Take an axis apart."""
    axis = _front(dim, x.primal.ndim)
    return _pieces(x.primal.unbind(axis), _tangent(x, axis != 0).unbind(axis + 1))


@adjoint("unbind")
def _unbind_adjoint(grads: tuple, out: tuple, needs: tuple, x: Jet, dim: int = 0) -> tuple[Jet]:
    axis = _front(dim, x.primal.ndim)
    return (_joined(grads, out, lambda parts, k: torch.stack(parts, axis + k)),)


@rule("select")
def select(x: Jet, dim: int, index: int) -> Jet:
    """One entry of an axis."""
    axis = _front(dim, x.primal.ndim)
    return Jet(x.primal.select(axis, index), _tangent(x, axis != 0).select(axis + 1, index))


def _padded(grad: Jet, x: Jet, axis: int, write: Callable[[Tensor, Tensor, int], Any]) -> Jet:
    """Zeros of x's extents into which `write(zeros, grad, leading axes)` puts the gradient."""
    tangent = _tangent(x, axis != 0)
    whole = Jet(torch.zeros_like(x.primal), torch.zeros_like(tangent).contiguous())
    return Jet(write(whole.primal, grad.primal, 0), write(whole.tangent, grad.tangent, 1))


@adjoint("select")
def _select_adjoint(grad: Jet, out: Jet, needs: tuple, x: Jet, dim: int, index: int):
    axis = _front(dim, x.primal.ndim)
    return (_padded(grad, x, axis, lambda t, g, k: t.select_scatter(g, axis + k, index)),)


@rule("slice")
def slice_(
    x: Jet, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Jet:
    """A range of an axis."""
    axis = _front(dim, x.primal.ndim)
    y = aten.slice(x.primal, axis, start, end, step)
    if axis == 0 and y.shape[0] == x.primal.shape[0]:
        return Jet(y, x.tangent)
    return Jet(y, aten.slice(_tangent(x, axis != 0), axis + 1, start, end, step))


@adjoint("slice")
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
    axis = _front(dim, x.primal.ndim)
    if out.primal.shape == x.primal.shape:
        return (grad,)
    return (_padded(grad, x, axis, lambda t, g, k: t.slice_scatter(g, axis + k, start, end, step)),)


@rule("narrow", composed=True)
def narrow(x: Jet, dim: int, start: int, length: int) -> Jet:
    """A range of an axis, by its length."""
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
    axis = _front(dim, ndim)
    primal = torch.cat([primal_of(x) for x in tensors], axis)
    tangent = torch.cat(_tangents_of(items, axis != 0), axis + 1)
    return Jet(primal, tangent.to(primal.dtype))


@adjoint("cat", "concat", "concatenate", covers=lambda args, kwargs: True)
def _cat_adjoint(grad: Jet, out: Jet, needs: tuple, tensors: list[Any], dim: int = 0) -> tuple:
    items = [primal_of(x) for x in tensors]
    axis = _front(dim, out.primal.ndim)
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
    axis = _front(dim, primal_of(tensors[0]).ndim + 1)
    primal = torch.stack([primal_of(x) for x in tensors], axis)
    tangent = torch.stack(_tangents_of(tensors, axis != 0), axis + 1)
    return Jet(primal, tangent.to(primal.dtype))


@adjoint("stack", covers=lambda args, kwargs: True)
def _stack_adjoint(grad: Jet, out: Jet, needs: tuple, tensors: list[Any], dim: int = 0) -> tuple:
    axis = _front(dim, out.primal.ndim)
    pieces = zip(tensors, grad.primal.unbind(axis), grad.tangent.unbind(axis + 1), strict=True)
    return ([_part(*piece) for piece in pieces],)


@rule("flip")
def flip(x: Jet, dims: list[int]) -> Jet:
    """Reverse axes."""
    axes = [_front(d, x.primal.ndim) for d in dims]
    return Jet(x.primal.flip(axes), _tangent(x, 0 not in axes).flip([a + 1 for a in axes]))


@adjoint("flip")
def _flip_adjoint(grad: Jet, out: Jet, needs: tuple, x: Jet, dims: list[int]) -> tuple[Jet]:
    axes = [_front(d, x.primal.ndim) for d in dims]
    return (move(grad, lambda g, k: g.flip([a + k for a in axes])),)


@rule("roll")
def roll(x: Jet, shifts: Any, dims: Any = ()) -> Jet:
    """Shift cyclically; over the flattened values where no axes are given."""
    if not dims and dims != 0:
        flat = roll(_flattened(x), shifts, [0])
        shape = x.primal.shape
        return Jet(flat.primal.view(shape), flat.tangent.view(flat.tangent.shape[0], *shape))
    axes = [_front(d, x.primal.ndim) for d in ([dims] if isinstance(dims, int) else dims)]
    tangent = _tangent(x, 0 not in axes)
    return Jet(x.primal.roll(shifts, axes), tangent.roll(shifts, [a + 1 for a in axes]))


@rule("pad")
def pad(x: Jet, pad: list[int], mode: str = "constant", value: float | None = None) -> Jet:
    """Pad the last axes; constants have tangent zero."""
    primal = torch.nn.functional.pad(x.primal, pad, mode, value)
    padded = len(pad) // 2
    if mode == "constant":
        tangent = _tangent(x, padded < x.primal.ndim)
        return Jet(primal, torch.nn.functional.pad(tangent, pad))
    if x.primal.ndim == padded + 1:
        return Jet(primal, torch.nn.functional.pad(full_tangent(x), pad, mode))
    moved = torch.nn.functional.pad(fold(x.tangent), pad, mode)
    return Jet(primal, unfold(moved, x.tangent.shape[0]))


@adjoint("pad", covers=lambda args, kwargs: args[2:3] in ((), ("constant",)))
def _pad_adjoint(grad: Jet, out: Jet, needs: tuple, x: Jet, pad: list[int], *_: Any):
    inverse = [-p for p in pad]
    return (move(grad, lambda g, k: torch.nn.functional.pad(g, inverse)),)


@rule("constant_pad_nd", composed=True)
def constant_pad(x: Jet, pad_: list[int], value: float = 0.0) -> Jet:
    """Pad the last axes with a constant."""
    return pad(x, pad_, "constant", value)


@rule("contiguous", "clone")
def identity(x: Jet, *, memory_format: Any = None) -> Jet:
    """The same values; a change to channels-last is carried over to the tangents."""
    if memory_format in (torch.channels_last, torch.channels_last_3d):
        folded = fold(x.tangent).contiguous(memory_format=memory_format)
        primal = x.primal.contiguous(memory_format=memory_format)
        return Jet(primal, unfold(folded, x.tangent.shape[0]))
    return x


@adjoint("contiguous", "clone")
def _identity_adjoint(grad: Jet, *_: Any, **__: Any) -> tuple[Jet]:
    # The tape casts it.
    return (grad,)


@rule("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
def identity_in_evaluation(x: Jet, *args: Any) -> Jet:
    """Dropout in evaluation; in training it is refused before it runs."""
    return x


@rule("to", "type_as", several=True)
def convert(x: Jet, *args: Any, **kwargs: Any) -> Jet:
    """To another dtype, device or memory format."""
    if len(args) == 1 and isinstance(primal_of(args[0]), Tensor):
        args = (primal_of(args[0]).device, primal_of(args[0]).dtype)
    primal = aten.to(x.primal, *args, **kwargs)
    moved = identity(Jet(primal, x.tangent), memory_format=kwargs.get("memory_format"))
    return Jet(moved.primal, moved.tangent.to(primal.device, primal.dtype))


adjoint("to", "type_as")(_identity_adjoint)


@rule("pixel_shuffle")
def pixel_shuffle(x: Jet, factor: int) -> Jet:
    """Channels into space."""
    return move(x, lambda t, _: torch.pixel_shuffle(t, factor))


@adjoint("pixel_shuffle")
def _pixel_shuffle_adjoint(grad: Jet, out: Jet, needs: tuple, x: Jet, factor: int) -> tuple[Jet]:
    return (move(grad, lambda g, _: torch.pixel_unshuffle(g, factor)),)


@rule("pixel_unshuffle")
def pixel_unshuffle(x: Jet, factor: int) -> Jet:
    """Space into channels."""
    return move(x, lambda t, _: torch.pixel_unshuffle(t, factor))


@adjoint("pixel_unshuffle")
def _pixel_unshuffle_adjoint(grad: Jet, out: Jet, needs: tuple, x: Jet, factor: int) -> tuple[Jet]:
    return (move(grad, lambda g, _: torch.pixel_shuffle(g, factor)),)


@rule("channel_shuffle")
def channel_shuffle(x: Jet, groups: int) -> Jet:
    """Interleave groups of channels (axis 1)."""
    return move(x, lambda t, k: _interleaved(t, k + 1, groups))


def _interleaved(t: Tensor, axis: int, groups: int) -> Tensor:
    return t.unflatten(axis, (groups, -1)).transpose(axis, axis + 1).flatten(axis, axis + 1)


@adjoint("channel_shuffle")
def _channel_shuffle_adjoint(grad: Jet, out: Jet, needs: tuple, x: Jet, groups: int) -> tuple[Jet]:
    inverse = x.primal.shape[1] // groups
    return (move(grad, lambda g, k: _interleaved(g, k + 1, inverse)),)
