"""A decoder's last layer, left to whoever needs the Gram of its Jacobian and not the Jacobian."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastsfvae.jacobian.rules.jet import Jet, stack_of
from fastsfvae.jacobian.rules.tape import once, running_sums
from fastsfvae.kernels._contract import tangents_like
from fastsfvae.ops._precision import autocast
from fastsfvae.ops.gram_project import full_products
from fastsfvae.ops.gram_tail import Tail
from fastsfvae.ops.tangent_layer import Layer


class Linear(NamedTuple):
    """A last layer f = W a + b.

    Attributes:
        weight: W, ``[n, k]``.
        bias: ``[n]`` or None.
        metric: W^T W, ``[k, k]``, in float32 at least.
    """

    weight: Tensor
    bias: Tensor | None
    metric: Tensor


class LastLayer(NamedTuple):
    """What a plan returns that stops in front of the last layer.

    Attributes:
        source: what goes into it; the gradient of the tail's stack is its gradient.
        tail: the layer on a stack of `source`, in autocast's dtype; or a linear one.
    """

    source: Jet
    tail: Tail | Linear


def stop_at(
    layer: Layer, behind: str = "none", behind_params: tuple[float, ...] = ()
) -> Callable[[Jet, Tensor, Tensor | None], LastLayer]:
    """The function ``(x, weight, bias)`` that a plan calls in the layer's place.

    Args:
        layer: see `fastsfvae.ops.gram_tail.Tail`.
        behind: likewise.
        behind_params: likewise.
    """
    # Late: `import fastsfvae` loads no fused layers.
    from fastsfvae.jacobian.rules.fused_layer import dense_weight

    def stop(x: Jet, weight: Tensor, bias: Tensor | None = None) -> LastLayer:
        # Dense once, for the kernels of the forward, its rescue and the backward.
        stack = tangents_like(autocast(stack_of(x)), torch.channels_last)
        dense = dense_weight(weight, stack, layer)
        given = layer, stack, weight, bias, behind, behind_params, dense
        return LastLayer(x, Tail(*given, running_sums()))

    return stop


def stop_at_linear(x: Jet, weight: Tensor, bias: Tensor | None = None) -> LastLayer:
    """What a plan calls in a linear layer's place."""
    return LastLayer(x, Linear(weight, bias, once(weight, "metric", _metric, _metric_adjoint)))


def _metric(weight: Tensor) -> Tensor:
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    with full_products(weight):
        return weight.mT @ weight


def _metric_adjoint(weight: Tensor, gradient: Tensor) -> Tensor:
    with full_products(weight):
        return weight.to(gradient.dtype) @ (gradient + gradient.mT)
