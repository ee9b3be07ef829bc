"""How a pattern is written down: a function that makes a decoder of M latents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Chunks of two are of one size, and the trace of the whole batch serves them.
B, M = 6, 4


class Pattern(NamedTuple):
    """A decoder and what is known of it.

    Attributes:
        make: gives the decoder, or a tuple of it and its further arguments.
        swept: whether a sweep over chunks takes its gradients by hand; autograd does where not.
        refused: what the error says where the decoder is refused; None where it is not.
        oracle: gives the same decoder in operations that PyTorch differentiates right, where it
            fails at those of `make`.
    """

    make: Callable[[], Any]
    swept: bool = True
    refused: str | None = None
    oracle: Callable[[], nn.Module] | None = None


ZOO: dict[str, Pattern] = {}


def pattern(
    swept: bool = True,
    refused: str | None = None,
    oracle: Callable[[], nn.Module] | None = None,
):
    """Add a function to the zoo under its own name."""

    def register(make: Callable[[], Any]) -> Callable[[], Any]:
        assert make.__name__ not in ZOO, make.__name__
        ZOO[make.__name__] = Pattern(make, swept, refused, oracle)
        return make

    return register


class Parts(nn.Module):
    """Named modules, parameters and buffers, and a function of them and z.

    Args:
        run: called as run(self, z, *args).
        **parts: a module, a parameter, or a tensor that becomes a buffer.
    """

    def __init__(self, run: Callable[..., Tensor], **parts: Any):
        super().__init__()
        self.run = run
        for name, part in parts.items():
            if isinstance(part, (nn.Module, nn.Parameter)):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, *args: Any) -> Tensor:
        return self.run(self, *args)


def weights(*shape: int) -> nn.Parameter:
    """A parameter of moderate numbers."""
    return nn.Parameter(0.5 * torch.randn(*shape))


def lifted(function: Callable[[Tensor], Tensor], *shape: int, **parts: Any) -> nn.Module:
    """`function` of a linear layer's result in the given shape; of the parts first, if any."""
    size = torch.Size(shape).numel()

    def run(own: Parts, z: Tensor) -> Tensor:
        h = own.lift(z).view(-1, *shape)
        return function(own, h) if parts else function(h)

    return Parts(run, lift=nn.Linear(M, size), **parts)
