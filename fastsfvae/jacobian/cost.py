"""What carrying tangents through a decoder costs, and the least time of that on a named card.

A product (convolution, linear layer, matrix product) reads its input's tangents and writes its
output's; its adjoint reads its input again and its output's gradient, and writes its input's
gradient: 3 inputs + 2 outputs. Everything else can be done where a product reads or writes, and
counts as nothing. Of J, the Gram matrix reads J, its adjoint reads J and writes dJ: 3 J. The
backward of a product takes twice its forward's arithmetic. The value goes along as tangent 0.

No layer is faster than its arithmetic at the card's peak, or its bytes at the card's bandwidth; the
floor is the sum of each one's larger time. Launches, and passes that no product takes in, come
on top.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor, fx

# Views, and copies at most.
_FREE = frozenset(
    """
    view reshape flatten unflatten squeeze unsqueeze permute transpose t movedim expand expand_as
    contiguous clone alias to _to_copy type_as chunk split split_with_sizes tensor_split unbind
    select slice narrow pixel_shuffle pixel_unshuffle cat stack flip roll pad constant_pad_nd
    dropout feature_dropout alpha_dropout repeat _unsafe_view view_as reshape_as
    """.split()
)
_ITEMSIZE = {"float32": 4, "tf32": 4, "bfloat16": 2}


class Cost(NamedTuple):
    """Of one tangent of one sample.

    Attributes:
        flops: floating point operations of the forward, two per multiply-add; moving data counts
            nothing, everything that is no product one per element of the result.
        elements: elements that forward and backward together must move through memory.
    """

    flops: int
    elements: int


class Card(NamedTuple):
    """A device's rates by its maker's data sheet: bytes and dense FLOPs a second.

    Attributes:
        name: as its maker calls it.
        bandwidth: of its memory.
        float32: of products without tensor cores.
        tf32: of TF32 products, None without.
        bfloat16: of bfloat16 products with float32 sums, None without.
    """

    name: str
    bandwidth: float
    float32: float
    tf32: float | None = None
    bfloat16: float | None = None

    def rate(self, dtype: str) -> float:
        """FLOPs a second.

        Raises:
            ValueError: for a dtype that the card has no products of.
        """
        found = getattr(self, dtype) if dtype in _ITEMSIZE else None
        if found is None:
            has = [name for name in _ITEMSIZE if getattr(self, name)]
            raise ValueError(f"{self.name} has no {dtype!r} products: give one of {', '.join(has)}")
        return found


CARDS = {
    card.name: card
    for card in (
        Card("RTX 3090", 936e9, 35.6e12, 35.6e12, 71e12),
        Card("RTX 4090", 1008e9, 82.6e12, 82.6e12, 165.2e12),
        Card("RTX 5090", 1792e9, 104.8e12, 104.8e12, 209.5e12),
        # Its tensor cores know float16 only.
        Card("Quadro RTX 6000", 672e9, 16.3e12),
        Card("H100", 3350e9, 66.9e12, 494.7e12, 989.4e12),
    )
}


class Layer(Protocol):
    """What a floor needs of a `LayerReport`."""

    @property
    def flops(self) -> int:
        """Forward, of the m tangents of one sample."""

    @property
    def elements(self) -> int:
        """Moved forward and backward, of the m tangents of one sample."""


class Floor(NamedTuple):
    """The least that decoder and loss, forward and backward, can take.

    Attributes:
        flops: floating point operations.
        bytes: through device memory.
        seconds: on the card.
    """

    flops: float
    bytes: float
    seconds: float


def step_floor(
    layers: Sequence[Layer], m: int, outputs: int, batch: int, card: Card, dtype: str
) -> Floor:
    """The floor of a decoder's loss with all gradients; see the module's formulas.

    Args:
        layers: costs of all m tangents of one sample.
        m: latent dimensions.
        outputs: n, elements of one output.
        batch: B.
        card: the device.
        dtype: "float32", "tf32" or "bfloat16".

    Raises:
        ValueError: for a dtype that the card has no products of.
    """
    rate = card.rate(dtype)
    parts = step_parts(layers, m, outputs, batch, dtype)
    seconds = sum(max(flops / rate, moved / card.bandwidth) for flops, moved in parts)
    flops, moved = (sum(column) for column in zip(*parts, strict=True))
    return Floor(flops, moved, seconds)


def step_parts(
    layers: Sequence[Layer], m: int, outputs: int, batch: int, dtype: str
) -> list[tuple[float, float]]:
    """(FLOPs, bytes) of each layer, and of the Gram matrix last; arguments as in `step_floor`."""
    # All tangents and the value, of all samples.
    tangents, size = batch * (m + 1), _ITEMSIZE[dtype]
    parts = [(3 * tangents * e.flops / m, tangents * size * e.elements / m) for e in layers]
    # G and its adjoint M J are an m x m by m x n product each.
    return [*parts, (4 * batch * m * m * outputs, 3 * batch * m * size * outputs)]


def tangent_cost(operation: str, node: fx.Node, batch: int) -> Cost:
    """The cost of one operation.

    Args:
        operation: the ATen name, without overload.
        node: a traced node with fake tensors in meta["val"].
        batch: the batch size of the trace.
    """
    if operation in _FREE:
        return Cost(0, 0)
    result = _shape(node)
    arguments = [_shape(arg) for arg in node.args]
    if operation.startswith("conv_transpose"):
        flops = 2 * math.prod(arguments[0]) * math.prod(arguments[1][1:])
    elif operation.startswith("conv"):
        flops = 2 * math.prod(result) * math.prod(arguments[1][1:])
    elif operation in ("linear", "addmm", "baddbmm"):
        flops = 2 * math.prod(result) * arguments[1][-1]
    elif operation in ("matmul", "mm", "bmm", "mv"):
        flops = 2 * math.prod(result) * arguments[0][-1]
    elif operation == "scaled_dot_product_attention":
        # Scores and their product with the values, each by the product rule.
        flops = 8 * math.prod(arguments[0]) * arguments[1][-2]
    else:
        return Cost(-(-math.prod(result) // batch), 0)
    # Weights are read once a batch, not once a tangent; an addmm's first argument is its bias.
    source = arguments[1] if operation in ("addmm", "baddbmm") else arguments[0]
    moved = 3 * math.prod(source) + 2 * math.prod(result)
    return Cost(-(-flops // batch), -(-moved // batch))


def _shape(node: object) -> tuple[int, ...]:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if isinstance(value, (tuple, list)) and value:
        value = value[0]
    return tuple(int(s) for s in value.shape) if isinstance(value, Tensor) else ()
