"""Which layers of a traced decoder run on the fused kernels, and what activation each takes in.

A fused layer applies the activation in front of it as it loads, where no other operation reads the
activation's result. The graph is rewritten so: the layer reads what went into the activation, which
is gone. Views between the two stay, as an activation works on each element alone. The layer in
front of the activation then adds its own bias.

Up to the first activation all samples have the same tangents, the columns of the first layer's
weight. The library moves them once for all samples, and the first activation's own pass spreads
them out; so layers in front of it are not fused, nor is it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from fastsfvae.jacobian.plan.nodes import VIEWS, packet_name
from fastsfvae.jacobian.rules.convolution import geometry_of
from fastsfvae.jacobian.rules.jet import Jet
from fastsfvae.jacobian.rules.registry import RULES
from fastsfvae.jacobian.rules.triton_activation import kernel_of
from fastsfvae.ops.dispatch import Choice, decide
from fastsfvae.ops.tangent_layer import Layer, largest_batch

_LAYERS = frozenset({"linear", "conv2d", "conv_transpose2d"})


class Placed(NamedTuple):
    """How a layer runs.

    Attributes:
        choice: "fused" or "library", and why.
        layer: for the kernels; None where it is the library's.
        activation: the node that the layer took in, no longer in the graph; or None.
        largest_batch: samples of a chunk at most, where it is fused.
    """

    choice: Choice
    layer: Layer | None = None
    activation: fx.Node | None = None
    largest_batch: int = 0


def place_layers(graph: fx.Graph, z: fx.Node, jets: set[fx.Node]) -> dict[fx.Node, Placed]:
    """Choose for every layer that carries tangents, on the Triton backend, and rewrite the graph.

    Args:
        graph: changed in place; its nodes carry fake tensors in meta["val"].
        z: its latents.
        jets: the nodes that carry tangents.

    Raises:
        ValueError: an unknown $FASTSFVAE_FUSED.
    """
    placed: dict[fx.Node, Placed] = {}
    # What lies behind an activation, where each sample has tangents of its own.
    apart: set[fx.Node] = set()
    for node in graph.nodes:
        if node not in jets or node is z:
            continue
        if _name(node) in _LAYERS:
            placed[node] = _place(graph, z, jets, apart, node)
        if _kernel(node) is not None or any(arg in apart for arg in node.all_input_nodes):
            apart.add(node)
    return placed


def _place(
    graph: fx.Graph, z: fx.Node, jets: set[fx.Node], apart: set[fx.Node], node: fx.Node
) -> Placed:
    given: Any = node.args, node.kwargs
    described: Any = fx.map_arg(given, lambda arg: _described(arg, jets))
    (args, kwargs), out = described, node.meta["val"]
    name, x, weight = _name(node), args[0], args[1]
    if node.args[0] not in apart:
        return Placed(Choice("library", "in front of the first activation"))
    of_weight = any(isinstance(arg, Jet) for arg in args[1:])
    if of_weight or not RULES[name].pulls(args, kwargs):
        return Placed(Choice("library", "the layer's weight depends on z, or it has no adjoint"))
    geometry = None
    if name != "linear":
        geometry = geometry_of(name, *args[3:], kernel=weight.shape[2:], **kwargs)
    (batch, m), (rows, *x_shape) = (tuple(map(int, t.shape)) for t in (z.meta["val"], x.primal))
    # A view may have made several rows of a sample.
    most = largest_batch(Layer(geometry), 1 + m, x_shape, weight.shape, out.dtype) * batch // rows
    if most < batch:
        return Placed(Choice("library", "no kernel for its geometry, dtype or size"))
    sizes = x_shape, tuple(weight.shape), tuple(map(int, out.shape[1:]))
    activation = _activation_in_front(node, apart)
    options: dict[str, Any] = {
        "device": out.device,
        "dtype": out.dtype,
        "activated": activation is not None,
    }
    choice = decide(name, *sizes, **options)
    if choice.how == "library":
        return Placed(choice)
    layer = Layer(geometry, product=choice.product)
    taken = None if activation is None else _kernel(activation)
    if activation is not None and taken is not None:
        layer = layer._replace(kind=taken[0], params=taken[1])
        activation.replace_all_uses_with(activation.args[0])
        graph.erase_node(activation)
    return Placed(choice, layer, activation, most)


def _activation_in_front(layer: fx.Node, apart: set[fx.Node]) -> Any:
    """The activation whose result only this layer reads, through views at most; or None."""
    reader: Any = layer
    node: Any = layer.args[0]
    while node.args and node.args[0] in apart and list(node.users) == [reader]:
        if _kernel(node) is not None:
            return node
        if _name(node) not in VIEWS:
            return None
        reader, node = node, node.args[0]
    return None


def _kernel(node: fx.Node) -> tuple[str, tuple[float, ...]] | None:
    return kernel_of(_name(node), node.args[1:], node.kwargs)


def _name(node: fx.Node) -> str:
    return packet_name(node.target) if isinstance(node.target, torch._ops.OpOverload) else ""


def _described(arg: fx.Node, jets: set[fx.Node]) -> Any:
    value: Any = arg.meta.get("val")
    return Jet(value, value) if arg in jets else value
