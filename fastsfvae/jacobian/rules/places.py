"""Entries of a value that another value's entries replace, wherever integers say.

An operation that moves entries moves their numbers in the same way: what it does to integers tells,
for every entry of the result, where it came from. Of several that were written to one place the
last one counts, for values, tangents and gradients alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsfvae.jacobian.rules.jet import Jet, full_tangent, move, primal_of
from fastsfvae.jacobian.rules.pieces import zero_tangent
from fastsfvae.jacobian.rules.registry import adjoint, always, rule


def numbered(value: Tensor) -> Tensor:
    """The numbers of a value's entries in row-major order, in its shape."""
    return torch.arange(value.numel(), device=value.device).view(value.shape)


def both_tangents(a: Any, b: Any) -> tuple[Tensor, Tensor]:
    """Tangents ``[m, *shape]`` of two operands; those of a constant are zero, without storage."""
    like = next(x.tangent for x in (a, b) if isinstance(x, Jet))
    first, second = (
        full_tangent(x) if isinstance(x, Jet) else zero_tangent(x, like) for x in (a, b)
    )
    return first, second.to(first.dtype)


def share(grad: Jet, operand: Any, operation: Callable[[Tensor, int], Tensor]) -> Any:
    """What a linear operation makes of a gradient: a Jet for a Jet, a tensor for a tensor."""
    return move(grad, operation) if isinstance(operand, Jet) else operation(grad.primal, 0)


def flattened(t: Tensor, leading: int) -> Tensor:
    """All axes but the leading ones as one, which a number has as well."""
    return t.reshape(*t.shape[:leading], math.prod(t.shape[leading:]))


@rule("fastsfvae.replaced_at", several=True)
def replaced_at(x: Any, source: Any, places: Tensor) -> Jet:
    """X with entries replaced by those of another value.

    Args:
        x: of any shape.
        source: of any shape.
        places: integers in x's shape: which entry of the flattened source replaces this one, or -1
            where it stays.
    """
    taken = places >= 0
    which = places.clamp(min=0).flatten()

    def replaced(base: Tensor, patch: Tensor, k: int) -> Tensor:
        if not patch.numel():
            return base
        patch = flattened(patch, k).index_select(k, which).view(patch.shape[:k] + places.shape)
        return torch.where(taken, patch.to(base.dtype), base)

    tangents = both_tangents(x, source)
    return Jet(replaced(primal_of(x), primal_of(source), 0), replaced(*tangents, 1))


@adjoint("fastsfvae.replaced_at", covers=always)
def _replaced_at_adjoint(grad: Jet, out: Jet, needs: tuple, x: Any, source: Any, places: Tensor):
    taken = places >= 0
    which, shape = places.clamp(min=0).flatten(), primal_of(source).shape

    def pulled(g: Tensor, k: int) -> Tensor:
        zeros = g.new_zeros(*g.shape[:k], shape.numel())
        if shape.numel():
            zeros.index_add_(k, which, flattened(g.masked_fill(~taken, 0), k))
        return zeros.view(g.shape[:k] + shape)

    kept = share(grad, x, lambda g, _: g.masked_fill(taken, 0)) if needs[0] else None
    return kept, share(grad, source, pulled) if needs[1] else None


def replaced(x: Any, source: Any, write: Callable[[Tensor, Tensor], Tensor]) -> Jet:
    """What an operation makes of x that replaces its entries by a source's, unchanged.

    Args:
        x: a Jet or a tensor.
        source: another one; one of the two is a Jet.
        write: the operation on integers in the shapes of x and of the source.
    """
    value = primal_of(x)
    kept = torch.full(value.shape, -1, device=value.device)
    return replaced_at(x, source, write(kept, numbered(primal_of(source))))
