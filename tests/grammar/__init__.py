"""Random decoders drawn from a grammar of what decoders are made of, each a function of its seed.

A decoder is a lift of z to features or to an image, up to eight parts, and sometimes a further
input or a flattening. A part keeps its input's kind (features ``[B, F]`` or image ``[B, C, H, W]``)
or turns one into the other; a residual or a concatenation holds parts of its own.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tests.grammar import branches as branches
from tests.grammar import indices as indices
from tests.grammar import masks as masks
from tests.grammar import matrices as matrices
from tests.grammar import recurrent as recurrent
from tests.grammar import spectral as spectral
from tests.grammar.part import FEATURES as FEATURES
from tests.grammar.part import IMAGES as IMAGES
from tests.grammar.part import Part as Part
from tests.grammar.part import Shape
from tests.grammar.plain import Joined, Residual, activation, layers_of_features, layers_of_images

M = 3
# More than this and the oracle's Jacobian takes the time.
_MOST_VALUES = 48


class Conditioned(nn.Module):
    """A lift that takes a further input with a batch axis: numbers or a class.

    Args:
        kind: "joined" to z, "scale" of the lifted features, or "class" that chooses a vector.
        width: of its features.
    """

    def __init__(self, kind: str, width: int):
        super().__init__()
        self.kind, given = kind, M + 2 if kind == "joined" else M
        self.lift, self.condition = nn.Linear(given, width), nn.Linear(2, width)
        self.table = nn.Embedding(4, width)

    def forward(self, z: Tensor, given: Tensor) -> Tensor:
        if self.kind == "joined":
            return self.lift(torch.cat([z, given], 1))
        if self.kind == "class":
            return self.lift(z) + self.table(given)
        return self.lift(z) * torch.tanh(self.condition(given))


class Decoder(nn.Sequential):
    """Parts, one behind the other; the further inputs are for the first."""

    def forward(self, z: Tensor, *args: Tensor) -> Tensor:
        first, *rest = self
        x = first(z, *args)
        for part in rest:
            x = part(x)
        return x


def draw_decoder(seed: int, batch: int) -> tuple[Decoder, tuple[Tensor, ...]]:
    """The decoder ``[B, 3] -> [B, *out]`` of that seed and its further inputs.

    It is in float64 and eval mode.
    """
    rng = random.Random(seed)
    with _float64(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first, args = _draw_lift(rng, batch)
        parts = [first]
        shape = _shape_after(first, torch.zeros(batch, M), *args)
        for _ in range(rng.randint(1, 8)):
            part = _draw_part(rng, shape, depth=2)
            after = _shape_after(part, torch.randn(2, *shape))
            if torch.Size(after).numel() <= _MOST_VALUES:
                parts.append(part)
                shape = after
        return Decoder(*parts).eval(), args


def _draw_lift(rng: random.Random, batch: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    width = rng.randint(4, 8)
    if rng.random() < 0.15:
        kind = rng.choice(("joined", "scale", "class"))
        given = torch.randint(4, (batch,)) if kind == "class" else torch.randn(batch, 2)
        return Conditioned(kind, width), (given,)
    if rng.random() < 0.6:
        return nn.Linear(M, width), ()
    return rng.choice(
        (
            lambda: nn.Sequential(nn.Linear(M, 2 * 6), nn.Unflatten(1, (2, 2, 3))),
            lambda: nn.Sequential(nn.Unflatten(1, (M, 1, 1)), nn.ConvTranspose2d(M, 4, (2, 3))),
        )
    )(), ()


def _draw_part(rng: random.Random, shape: Shape, depth: int) -> nn.Module:
    if len(shape) not in (1, 3):
        return nn.Flatten()
    kind = rng.random()
    if kind < 0.15:
        return activation(rng)
    if kind < 0.3 and depth:
        branches = [_draw_part(rng, shape, depth - 1) for _ in range(2)]
        shapes = [_shape_after(branch, torch.randn(2, *shape)) for branch in branches]
        if shapes[0] == shape:
            return Residual(branches[0])
        if shapes[0][1:] == shapes[1][1:]:
            return Joined(*branches)
    known = FEATURES if len(shape) == 1 else IMAGES
    if kind < 0.8:
        return rng.choice(list(known.values()))(rng, shape[0] if len(shape) == 1 else shape)
    layers = layers_of_features(rng, shape[0]) if len(shape) == 1 else layers_of_images(rng, shape)
    return rng.choice(layers)()


def _shape_after(part: nn.Module, *given: Tensor) -> Shape:
    with torch.no_grad():
        return tuple(part.eval()(*given).shape[1:])


@contextlib.contextmanager
def _float64() -> Iterator[None]:
    """Draw weights in float64: complex ones as well."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
