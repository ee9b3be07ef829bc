"""A decoder's last layer, left to whoever needs the Gram of its Jacobian and not the Jacobian."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx

from fastsfvae.jacobian.jet import Jet, stack_of
from fastsfvae.jacobian.nodes import packet_name
from fastsfvae.jacobian.rules.fused_activation import kernel_of
from fastsfvae.kernels._contract import tangents_like
from fastsfvae.ops._precision import autocast
from fastsfvae.ops.gram_tail import Tail, largest_batch
from fastsfvae.ops.tangent_layer import Layer

if TYPE_CHECKING:
    from fastsfvae.jacobian.fuse import Placed


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
        # Dense once, for the kernels of the forward, its rescue and the backward.
        stack = tangents_like(autocast(stack_of(x)), torch.channels_last)
        return LastLayer(x, Tail(layer, stack, weight, bias, behind, behind_params))

    return stop


class Ending(NamedTuple):
    """The end of a decoder's graph, as far as `gram_tail` takes it.

    Attributes:
        inputs: the last layer's source, weight and bias; nodes but for a bias that is None.
        stop: what is called with them.
        replaced: the layer, and the activation behind it.
    """

    inputs: tuple[Any, Any, Any]
    stop: Callable[..., LastLayer]
    replaced: frozenset[fx.Node]


def find_ending(
    result: fx.Node, placed: dict[fx.Node, Placed], dynamic: set[fx.Node], m: int
) -> Ending | None:
    """The ending of a graph whose last layer is fused, None where the kernels do not take it.

    Args:
        result: the node that the decoder returns.
        placed: how its layers run.
        dynamic: the nodes that depend on a batched input.
        m: latents.
    """
    layer_node: Any = result
    behind: tuple[str, tuple[float, ...]] | None = ("none", ())
    if result not in placed and isinstance(result.target, torch._ops.OpOverload):
        behind = kernel_of(packet_name(result.target), result.args[1:], result.kwargs)
        layer_node = result.args[0]
    if behind is None or layer_node not in placed or len(layer_node.users) + len(result.users) > 2:
        return None
    layer, (source, weight, *rest) = placed[layer_node].layer, layer_node.args
    bias = rest[0] if rest else None
    if layer is None or weight in dynamic or bias in dynamic:
        return None
    value, shape = source.meta["val"], weight.meta["val"].shape
    if not largest_batch(layer, 1 + m, value.shape[1:], shape, layer_node.meta["val"].dtype):
        return None
    replaced = frozenset({layer_node, result})
    return Ending((source, weight, bias), stop_at(layer, *behind), replaced)
