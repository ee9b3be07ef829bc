"""Entries of one value reduced into another's at positions that do not depend on z.

Whatever is reduced into one place lies along a new axis of slots, one entry in each, and that axis
is reduced by rules that exist; sums have rules of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsfvae.jacobian.rules.arithmetic import div, mul
from fastsfvae.jacobian.rules.constant import as_jets
from fastsfvae.jacobian.rules.jet import Jet, primal_of
from fastsfvae.jacobian.rules.pieces import stack
from fastsfvae.jacobian.rules.places import numbered, replaced, replaced_at
from fastsfvae.jacobian.rules.registry import RULES, always, bind, rule
from fastsfvae.jacobian.rules.scatter import scatter_add
from fastsfvae.jacobian.rules.shape import front, reshape

_NEUTRAL = {"sum": 0, "mean": 0, "prod": 1, "amax": -torch.inf, "amin": torch.inf}


@rule("scatter", several=True, composed=True, covers=always)
def scatter(x: Any, dim: int, positions: Tensor, source: Any, *, reduce: str | None = None) -> Jet:
    """X with entries replaced at positions; or added to, or multiplied, where `reduce` says so."""
    if not isinstance(source, (Jet, Tensor)):
        source = x.primal.new_full(positions.shape, source)
    if reduce is not None:
        return scatter_reduce(x, dim, positions, source, {"add": "sum", "multiply": "prod"}[reduce])
    return replaced(x, source, lambda kept, number: kept.scatter(dim, positions, number))


@rule("scatter_reduce", several=True, composed=True, covers=always)
def scatter_reduce(
    x: Any, dim: int, positions: Tensor, source: Any, reduce: str, *, include_self: bool = True
) -> Jet:
    """X with entries reduced into it at positions; without what was there, if not included."""
    x, source = as_jets(x, source)
    shape = x.primal.shape
    if not shape:
        given = [reshape(x, [1]), 0, positions.view(1), reshape(source, [1]), reduce]
        return reshape(scatter_reduce(*given, include_self=include_self), [])
    axis = front(dim, len(shape))
    if not include_self:
        untouched = torch.full_like(numbered(x.primal), -1)
        left = x.primal.new_full((), _NEUTRAL[reduce])
        x = replaced_at(x, left, untouched.scatter(axis, positions, 0))
    if reduce in ("sum", "mean"):
        added = scatter_add(x, axis, positions, source)
        if reduce == "sum":
            return added
        counts = torch.full_like(x.primal, float(include_self))
        ones = torch.ones_like(source.primal)
        return div(added, counts.scatter_add(axis, positions, ones).clamp(min=1))
    # The places in x and in the source of all the pairs of the two.
    corner = numbered(source.primal)[tuple(slice(size) for size in positions.shape)]
    table = _slots(numbered(x.primal).gather(axis, positions).flatten(), corner.flatten(), x.primal)
    empty = torch.full_like(x.primal, _NEUTRAL[reduce])
    slots = [replaced_at(empty, source, places) for places in table.unbind()]
    if reduce == "prod":
        for factor in slots:
            x = mul(x, factor)
        return x
    return bind(RULES[reduce])(stack([x, *slots], -1), -1)


def _slots(to: Tensor, of: Tensor, value: Tensor) -> Tensor:
    """Which entries of a source go to each entry of a value, -1 where none is left.

    Args:
        to: the places in the value, [n].
        of: those in the source, [n].
        value: of any shape.

    Returns:
        [k, *value.shape], where k is the most entries that go to one place.
    """
    order = to.argsort(stable=True)
    to, of = to[order], of[order]
    rank = torch.arange(len(to), device=to.device) - torch.searchsorted(to, to)
    count = int(rank.max()) + 1 if len(to) else 0
    table = to.new_full((count, value.numel()), -1)
    return table.index_put((rank, to), of).view(count, *value.shape)


@rule("index_reduce", several=True, composed=True, covers=always)
def index_reduce(
    x: Any, dim: int, positions: Tensor, source: Any, reduce: str, *, include_self: bool = True
) -> Jet:
    """X with rows reduced into it."""
    shape = primal_of(source).shape
    axis = front(dim, len(shape))
    rows = [-1 if axis == other else 1 for other in range(len(shape))]
    places = positions.reshape(rows).expand(shape)
    return scatter_reduce(x, dim, places, source, reduce, include_self=include_self)
