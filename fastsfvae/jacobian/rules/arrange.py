"""Entries of a value repeated, moved and padded along its axes."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsfvae.jacobian.rules.jet import Jet, align, fold, full_tangent, move, unfold
from fastsfvae.jacobian.rules.registry import RULES, adjoint, rule
from fastsfvae.jacobian.rules.shape import flatten, front, tangent_of


@rule("repeat", "tile")
def repeat(x: Jet, repeats: list[int]) -> Jet:
    """Tile along each axis."""
    repeats = _all_repeats(x, repeats)
    keeps = len(repeats) == x.primal.ndim and repeats[:1] in ([1], [])
    tangent = x.tangent if keeps else align(Jet(x.primal, full_tangent(x)), len(repeats))
    return Jet(x.primal.repeat(repeats), tangent.repeat(1, *repeats))


def _all_repeats(x: Jet, repeats: list[int]) -> list[int]:
    return [1] * (x.primal.ndim - len(repeats)) + list(repeats)


@adjoint("repeat", "tile")
def _repeat_adjoint(grad: Jet, out: Jet, needs: tuple, x: Jet, repeats: list[int]) -> tuple[Jet]:
    def back(g: Tensor, k: int) -> Tensor:
        for axis, times in enumerate(_all_repeats(x, repeats), k):
            g = g.unflatten(axis, (times, g.shape[axis] // times)).sum(axis)
        return g

    return (move(grad, back),)


@rule("repeat_interleave")
def repeat_interleave(x: Jet, repeats: Any, dim: int | None = None, **kwargs: Any) -> Jet:
    """Repeat each entry along an axis."""
    if dim is None:
        x, dim = flatten(x), 0
    axis = front(dim, x.primal.ndim)
    return Jet(
        x.primal.repeat_interleave(repeats, axis, **kwargs),
        tangent_of(x, axis != 0).repeat_interleave(repeats, axis + 1, **kwargs),
    )


@adjoint("repeat_interleave", covers=lambda args, kwargs: _whole_repeats(*args, **kwargs))
def _repeat_interleave_adjoint(
    grad: Jet, out: Jet, needs: tuple, x: Jet, repeats: Any, dim: int, **kwargs: Any
) -> tuple[Jet]:
    axis = front(dim, x.primal.ndim)
    if not isinstance(repeats, Tensor):
        return (move(grad, lambda g, k: g.unflatten(axis + k, (-1, repeats)).sum(axis + k + 1)),)
    entries = torch.arange(x.primal.shape[axis], device=x.primal.device)
    places = entries.repeat_interleave(repeats)

    def back(g: Tensor, k: int) -> Tensor:
        shape = list(g.shape)
        shape[axis + k] = len(entries)
        return g.new_zeros(shape).index_add_(axis + k, places, g)

    return (move(grad, back),)


def _whole_repeats(x: Any, repeats: Any, dim: int | None = None, **kwargs: Any) -> bool:
    return dim is not None


@rule("flip")
def flip(x: Jet, dims: list[int]) -> Jet:
    """Reverse axes."""
    axes = [front(d, x.primal.ndim) for d in dims]
    return move(x, lambda t, k: t.flip([a + k for a in axes]), keeps_batch=0 not in axes)


@adjoint("flip")
def _flip_adjoint(grad: Jet, out: Jet, needs: tuple, x: Jet, dims: list[int]) -> tuple[Jet]:
    return (RULES["flip"].forward(grad, dims),)


@rule("roll")
def roll(x: Jet, shifts: Any, dims: Any = ()) -> Jet:
    """Shift cyclically; over the flattened values where no axes are given."""
    axes = [front(d, x.primal.ndim) for d in ([dims] if isinstance(dims, int) else dims)]

    if not x.primal.ndim:
        return x

    def rolled(t: Tensor, k: int) -> Tensor:
        if axes:
            return t.roll(shifts, [a + k for a in axes])
        return t.flatten(k).roll(shifts, k).view(t.shape)

    return move(x, rolled, keeps_batch=bool(axes) and 0 not in axes)


@adjoint("roll")
def _roll_adjoint(grad: Jet, out: Jet, needs: tuple, x: Jet, shifts: Any, dims: Any = ()):
    back = -shifts if isinstance(shifts, int) else [-shift for shift in shifts]
    return (RULES["roll"].forward(grad, back, dims),)


@rule("pad")
def pad(x: Jet, pad: list[int], mode: str = "constant", value: float | None = None) -> Jet:
    """Pad the last axes; constants have tangent zero."""
    primal = F.pad(x.primal, pad, mode, value)
    padded = len(pad) // 2
    if mode == "constant":
        return Jet(primal, F.pad(tangent_of(x, padded < x.primal.ndim), pad))
    if x.primal.ndim == padded + 1:
        return Jet(primal, F.pad(full_tangent(x), pad, mode))
    return Jet(primal, unfold(F.pad(fold(x.tangent), pad, mode), x.tangent.shape[0]))


@adjoint("pad")
def _pad_adjoint(
    grad: Jet, out: Jet, needs: tuple, x: Jet, pad: list[int], mode: str = "constant", *_: Any
) -> tuple[Jet]:
    if mode == "constant":
        return (move(grad, lambda g, _: F.pad(g, [-p for p in pad])),)
    # Where in space each padded entry was taken from; reflection knows floating point alone.
    space = x.primal.shape[-(len(pad) // 2) :]
    count = math.prod(space)
    numbers = torch.arange(count, dtype=torch.float64, device=x.primal.device)
    sources = F.pad(numbers.view(1, 1, *space), pad, mode).flatten().long()

    def back(g: Tensor, k: int) -> Tensor:
        flat = g.flatten(-len(space))
        zeros = flat.new_zeros(*flat.shape[:-1], count)
        return zeros.index_add_(-1, sources, flat).unflatten(-1, space)

    return (move(grad, back),)


@rule("constant_pad_nd", composed=True)
def constant_pad(x: Jet, pad_: list[int], value: float = 0.0) -> Jet:
    """Pad the last axes with a constant."""
    return pad(x, pad_, "constant", value)


@rule("pixel_shuffle")
def pixel_shuffle(x: Jet, factor: int) -> Jet:
    """Channels into space."""
    return move(x, lambda t, _: torch.pixel_shuffle(t, factor))


@rule("pixel_unshuffle")
def pixel_unshuffle(x: Jet, factor: int) -> Jet:
    """Space into channels."""
    return move(x, lambda t, _: torch.pixel_unshuffle(t, factor))


@adjoint("pixel_shuffle")
def _pixel_shuffle_adjoint(grad: Jet, out: Jet, needs: tuple, x: Jet, factor: int) -> tuple[Jet]:
    return (RULES["pixel_unshuffle"].forward(grad, factor),)


@adjoint("pixel_unshuffle")
def _pixel_unshuffle_adjoint(grad: Jet, out: Jet, needs: tuple, x: Jet, factor: int) -> tuple[Jet]:
    return (RULES["pixel_shuffle"].forward(grad, factor),)


@rule("channel_shuffle")
def channel_shuffle(x: Jet, groups: int) -> Jet:
    """Interleave groups of channels (axis 1)."""

    def interleaved(t: Tensor, k: int) -> Tensor:
        axis = k + 1
        return t.unflatten(axis, (groups, -1)).transpose(axis, axis + 1).flatten(axis, axis + 1)

    return move(x, interleaved)


@adjoint("channel_shuffle")
def _channel_shuffle_adjoint(grad: Jet, out: Jet, needs: tuple, x: Jet, groups: int) -> tuple[Jet]:
    return (RULES["channel_shuffle"].forward(grad, x.primal.shape[1] // groups),)
