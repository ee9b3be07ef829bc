"""How a part of a random decoder is written down: a function that draws it for a shape."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]
Draw = Callable[[random.Random, Any], nn.Module]
# By name: those of features [B, F], drawn for F, and those of an image, for (C, H, W).
FEATURES: dict[str, Draw] = {}
IMAGES: dict[str, Draw] = {}


class Part(nn.Module):
    """Named modules, parameters and buffers, and a function of them and the input.

    Args:
        run: called as run(self, x, *args).
        plain: the same function in operations that every supported PyTorch differentiates twice,
            and right, where one fails at those of `run`.
        **parts: a module, a parameter, or a tensor that becomes a buffer.
    """

    name = ""
    flat = False

    def __init__(
        self,
        run: Callable[..., Tensor],
        plain: Callable[..., Tensor] | None = None,
        **parts: Any,
    ):
        super().__init__()
        self.run, self.plain = run, plain
        for name, part in parts.items():
            if isinstance(part, (nn.Module, nn.Parameter)):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, *args: Any) -> Tensor:
        result = self.run(self, *args)
        return result.flatten(1) if self.flat else result

    def extra_repr(self) -> str:
        return self.name


def on_features(make: Draw) -> Draw:
    """Add a part of features to the grammar; its result is flattened to features."""

    def draw(rng: random.Random, size: int) -> nn.Module:
        part = make(rng, size)
        part.name, part.flat = make.__name__, True
        return part

    assert make.__name__ not in FEATURES, make.__name__
    FEATURES[make.__name__] = draw
    return make


def on_images(make: Draw) -> Draw:
    """Add a part of images to the grammar; its result is an image or features."""

    def draw(rng: random.Random, shape: Shape) -> nn.Module:
        part = make(rng, shape)
        part.name = make.__name__
        return part

    assert make.__name__ not in IMAGES, make.__name__
    IMAGES[make.__name__] = draw
    return make


def weights(*shape: int, scale: float = 0.5) -> nn.Parameter:
    """A parameter of moderate numbers."""
    return nn.Parameter(scale * torch.randn(shape))


def complex_weights(*shape: int, scale: float = 0.5) -> nn.Parameter:
    """A complex parameter of moderate numbers."""
    return nn.Parameter(scale * torch.randn(shape, dtype=torch.complex128))


def as_complex(pairs: Tensor) -> Tensor:
    """[..., 2 n] real numbers as [..., n] complex ones: real parts first."""
    return torch.complex(*pairs.chunk(2, -1))


def as_real(values: Tensor) -> Tensor:
    """[..., n] complex numbers as [..., n, 2] real ones."""
    return torch.view_as_real(values)
