"""How a decoder of a package is written down: a function that makes it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

M = 4


class Entry(NamedTuple):
    """A decoder: its package on PyPI, and what makes it (an nn.Module of z alone, [B, M])."""

    package: str
    make: Callable[[], nn.Module]


ENTRIES: dict[str, Entry] = {}


def entry(package: str):
    """Add a function to the list as PACKAGE/FUNCTION."""

    def register(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        name = f"{package}/{make.__name__}"
        if name in ENTRIES:
            raise ValueError(f"there are two decoders {name!r}")
        ENTRIES[name] = Entry(package, make)
        return make

    return register


class Lifted(nn.Module):
    """A network behind a linear layer that gives it what it expects.

    Args:
        net: the network.
        shape: of one sample of its input.
        call: (net, input [B, *shape]) -> [B, *out].
        m: number of latents.
    """

    def __init__(
        self,
        net: nn.Module,
        *shape: int,
        call: Callable[[Any, Tensor], Tensor] | None = None,
        m: int = M,
    ):
        super().__init__()
        self.lift = nn.Linear(m, math.prod(shape))
        self.net, self.shape, self.call = net, shape, call

    def forward(self, z: Tensor) -> Tensor:
        """[B, m] -> [B, *out]."""
        h = self.lift(z).view(-1, *self.shape)
        return self.net(h) if self.call is None else self.call(self.net, h)


class Direct(nn.Module):
    """A network and what gives its output at z: call(net, z [B, M]) -> [B, *out]."""

    def __init__(self, net: nn.Module, call: Callable[[Any, Tensor], Tensor]):
        super().__init__()
        self.net, self.call = net, call

    def forward(self, z: Tensor) -> Tensor:
        """[B, M] -> [B, *out]."""
        return self.call(self.net, z)
