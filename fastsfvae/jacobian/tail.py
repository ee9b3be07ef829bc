"""A decoder's last layer, left to whoever needs the Gram of its Jacobian and not the Jacobian."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastsfvae.jacobian.jet import Jet, full_tangent
from fastsfvae.ops._precision import autocast
from fastsfvae.ops.gram_tail import Tail
from fastsfvae.ops.tangent_layer import Layer


class LastLayer(NamedTuple):
    """What a plan returns that stops in front of the last layer.

    Attributes:
        source: what goes into it; the gradient of the tail's stack is its gradient.
        tail: the layer on a stack of `source`, in autocast's dtype.
    """

    source: Jet
    tail: Tail


def stop_at(
    layer: Layer, behind: str = "none", behind_params: tuple[float, ...] = ()
) -> Callable[[Jet, Tensor, Tensor | None], LastLayer]:
    """The function ``(x, weight, bias)`` that a plan calls in the layer's place.

    Args:
        layer: see `fastsfvae.ops.gram_tail.Tail`.
        behind: likewise.
        behind_params: likewise.
    """

    def stop(x: Jet, weight: Tensor, bias: Tensor | None = None) -> LastLayer:
        stack = torch.cat([x.primal[None], full_tangent(x)]) if x.stack is None else x.stack
        tail = Tail(layer, autocast(stack), weight, bias, behind, behind_params)
        return LastLayer(x, tail)

    return stop
