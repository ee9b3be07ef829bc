"""Entries of an axis by their order: extremes, sorts, medians.

The values are a `gather` of the Jet at the positions that the operation found; positions are plain
integers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastsfvae.jacobian.rules.indexing import gather
from fastsfvae.jacobian.rules.jet import Jet
from fastsfvae.jacobian.rules.registry import rule
from fastsfvae.jacobian.rules.shape import flatten, squeeze


def _at(x: Jet, dim: int, positions: Tensor) -> tuple[Jet, Tensor]:
    # A number has one entry, which is where it is.
    return gather(x, dim, positions) if x.primal.ndim else x, positions


@rule("topk", composed=True)
def topk(
    x: Jet, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> tuple[Jet, Tensor]:
    """The k extreme entries of an axis."""
    return _at(x, dim, x.primal.topk(k, dim, largest, sorted).indices)


@rule("sort", composed=True)
def sort(
    x: Jet, dim: int = -1, descending: bool = False, *, stable: bool | None = None
) -> tuple[Jet, Tensor]:
    """The entries of an axis in the order of their values."""
    found = x.primal.sort(stable=bool(stable), dim=dim, descending=descending)
    return _at(x, dim, found.indices)


def _one_of_an_axis(name: str) -> Callable[..., Any]:
    """An entry of an axis, and its position; or of everything, without one."""

    @rule(name, composed=True)
    def one(x: Jet, *args: Any, **kwargs: Any) -> Any:
        found = getattr(x.primal, name)
        if not args and not kwargs:
            flat = flatten(x)
            return squeeze(gather(flat, 0, getattr(flat.primal, name)(0, True).indices), 0)
        return _kept(x, found, *args, **kwargs)

    return one


def _kept(
    x: Jet, operation: Callable[..., Any], dim: int = -1, keepdim: bool = False
) -> tuple[Jet, Tensor]:
    taken, positions = _at(x, dim, operation(dim, True).indices)
    if keepdim or not x.primal.ndim:
        return taken, positions
    return squeeze(taken, dim), positions.squeeze(dim)


for _name in ("median", "nanmedian"):
    _one_of_an_axis(_name)


@rule("mode", composed=True)
def mode(x: Jet, dim: int = -1, keepdim: bool = False) -> tuple[Jet, Tensor]:
    """The most frequent entry of an axis."""
    return _kept(x, x.primal.mode, dim, keepdim)


@rule("kthvalue", composed=True)
def kthvalue(x: Jet, k: int, dim: int = -1, keepdim: bool = False) -> tuple[Jet, Tensor]:
    """The k-th smallest entry of an axis."""
    return _kept(x, lambda *place: x.primal.kthvalue(k, *place), dim, keepdim)
