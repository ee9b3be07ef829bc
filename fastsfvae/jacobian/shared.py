"""Further decoder inputs that all samples share, though their first extent may be the batch's.

A tensor with leading extent B goes with its samples, and a table of B rows has that extent by
chance. What is shared becomes the decoder's own for one call, as its parameters are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastsfvae.jacobian.validate import Derived, Shared, unwrap


class Bound(Derived):
    """A decoder with further inputs that have no batch axis.

    Args:
        inner: the decoder.
        args: by their positions behind z.
        kwargs: by name.
    """

    def __init__(self, inner: nn.Module, args: dict[int, Any], kwargs: dict[str, Any]):
        super().__init__(inner)
        self.args, self.kwargs = args, kwargs

    def positions(self, count: int) -> list[int]:
        """Where a user gave those that are left."""
        return [i for i in range(count + len(self.args)) if i not in self.args]

    def forward(self, z: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Call the decoder with all of its inputs."""
        return _call(self.inner, self.args, self.kwargs, z, *args, **kwargs)


class Asked(NamedTuple):
    """A decoder with what is shared, and the other further inputs."""

    decoder: Callable[..., Tensor]
    args: tuple
    kwargs: dict[str, Any]


def bind(
    decoder: Callable[..., Tensor], args: tuple, kwargs: dict[str, Any], shared: Shared
) -> Asked:
    """Make further inputs of a decoder, itself without wrappers, its own.

    Args:
        decoder: see `decode_with_jacobian`.
        args: the further inputs.
        kwargs: likewise, by name.
        shared: which of them.

    Raises:
        TypeError: a wrapped decoder, or what is no position or name.
        ValueError: a position or name that no input has.
    """
    inner, kwargs = unwrap(decoder, kwargs)
    places = find_shared(len(args), kwargs, shared)
    if not places:
        return Asked(inner, args, kwargs)
    own_args = {place: args[place] for place in places if isinstance(place, int)}
    own_kwargs = {place: kwargs[place] for place in places if isinstance(place, str)}
    if isinstance(inner, nn.Module):
        bound: Callable[..., Tensor] = Bound(inner, own_args, own_kwargs)
    else:
        bound = functools.partial(_call, inner, own_args, own_kwargs)
    rest = tuple(value for index, value in enumerate(args) if index not in own_args)
    return Asked(bound, rest, {k: v for k, v in kwargs.items() if k not in own_kwargs})


def find_shared(count: int, names: Any, shared: Shared) -> tuple[int | str, ...]:
    """The inputs that `shared` means.

    Args:
        count: further inputs by position.
        names: those by name.
        shared: names, and positions behind z.

    Raises:
        TypeError, ValueError: see `bind`.
    """
    places = (shared,) if isinstance(shared, (int, str)) else tuple(shared)
    for place in places:
        if isinstance(place, bool) or not isinstance(place, (int, str)):
            raise TypeError(
                f"shared={shared!r}: give names of further inputs and positions behind z, from 0"
            )
        there = 0 <= place < count if isinstance(place, int) else place in names
        if not there:
            given = [*range(count), *names]
            raise ValueError(
                f"shared={shared!r}: there is no further input {place!r}, but "
                f"{', '.join(map(repr, given)) or 'none at all'}"
            )
    return places


def _call(
    decoder: Callable[..., Tensor],
    own_args: dict[int, Any],
    own_kwargs: dict[str, Any],
    z: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    rest = iter(args)
    count = len(own_args) + len(args)
    merged = [own_args[i] if i in own_args else next(rest) for i in range(count)]
    return decoder(z, *merged, **own_kwargs, **kwargs)
