"""Whether a decoder ends in a layer that is left to whoever needs the Gram of its Jacobian."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx

from fastsfvae.jacobian.plan.last_layer import LastLayer, stop_at, stop_at_linear
from fastsfvae.jacobian.plan.nodes import VIEWS, leading, packet_name
from fastsfvae.jacobian.plan.place import Placed
from fastsfvae.jacobian.rules.triton_activation import kernel_of
from fastsfvae.ops.gram_tail import largest_batch

# Of a layer with more, even random tangents keep too small a part of |T|^2 |W|^2: about 1 / k.
_MOST_INPUTS = 1024


class Ending(NamedTuple):
    """The end of a decoder's graph, as far as its Gram is taken without it.

    Attributes:
        inputs: the last layer's source, weight and bias; nodes but for a bias that is None.
        stop: what is called with them.
        replaced: the layer, and the activation or the views behind it.
        least_batch: samples of a call from which on it is the better way.
    """

    inputs: tuple[Any, Any, Any]
    stop: Callable[..., LastLayer]
    replaced: frozenset[fx.Node]
    least_batch: int = 1


def find_ending(
    result: fx.Node, placed: dict[fx.Node, Placed], dynamic: set[fx.Node], m: int
) -> Ending | None:
    """The ending of a graph with a fused last layer, None where `gram_tail` does not take it.

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


def find_cut(
    ending: Ending, placed: dict[fx.Node, Placed], per_chunk: set[fx.Node]
) -> tuple[fx.Node, frozenset[fx.Node]] | None:
    """Where a chunk may be cut into fewer samples: (what the second half reads, its nodes).

    In front of the last fused layer before the ending, if that layer alone makes the ending's
    source: the largest stacks of a decoder that doubles its images lie behind it.

    Args:
        ending: with a tail.
        placed: how the layers run.
        per_chunk: the nodes whose values belong to a chunk's samples.
    """
    node: Any = ending.inputs[0]
    behind = {node}
    while node not in placed and _name(node) in VIEWS and len(node.users) == 1:
        node = node.args[0]
        behind.add(node)
    if node not in placed or placed[node].layer is None or len(node.users) != 1:
        return None
    cut = node.args[0]
    read = {arg for inner in behind for arg in inner.all_input_nodes} - behind
    if len(cut.users) != 1 or (read | set(ending.inputs[1:])) & per_chunk != {cut}:
        return None
    return cut, frozenset(behind)


def find_linear_ending(
    result: fx.Node, jets: set[fx.Node], z: fx.Node, dynamic: set[fx.Node]
) -> Ending | None:
    """The ending of a graph whose last layer is linear, None where J is the better way to its Gram.

    Args:
        result: the node that the decoder returns.
        jets: the nodes that carry tangents.
        z: the latents.
        dynamic: the nodes that depend on a batched input.
    """
    node: Any = result
    replaced = {result}
    while _name(node) in VIEWS and len(node.users) == 1:
        node = node.args[0]
        replaced.add(node)
    if _name(node) != "linear" or len(node.users) > 1:
        return None
    source, weight, *rest = node.args
    bias = rest[0] if rest else None
    # Of one layer J is its weight, the same for all samples.
    if source not in jets or source is z or weight in dynamic or bias in dynamic:
        return None
    if source.meta["val"].ndim != 2 or weight.meta["val"].ndim != 2:
        return None
    # A view may have made several rows of a sample.
    if leading(source) != leading(z):
        return None
    n, k = map(int, weight.meta["val"].shape)
    least = least_batch(n, k, int(z.meta["val"].shape[1]))
    if source.meta["val"].device.type != "cpu" or not least:
        return None
    return Ending((source, weight, bias), stop_at_linear, frozenset(replaced), least)


def least_batch(n: int, k: int, m: int) -> int:
    """Samples from which on G through W^T W takes a quarter less multiplications; 0 for never.

    Forward and backward (see `fastsfvae.gram.contracted.Contracted`), where W^T W and its adjoint
    are shared by all tangents of a call.
    """
    saved = 3 * (3 * n * k + 2 * m * n) - 4 * (2 * k * k + 3 * m * k)
    if saved <= 0 or k > _MOST_INPUTS:
        return 0
    return -(-8 * n * k * k // (m * saved))


def _name(node: fx.Node) -> str:
    return packet_name(node.target) if isinstance(node.target, torch._ops.OpOverload) else ""
