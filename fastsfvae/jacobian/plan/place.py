"""Which layers of a traced decoder run on the fused kernels, and what activation each takes in.

An activation that a fused layer alone reads needs no pass of its own. Where its slope is told by
its result and what is in front of it is a fused layer too, that one applies it as it stores, and
the one behind pulls gradients through it. Elsewhere the layer behind applies it as it loads. The
graph is rewritten so: the layer reads what went into the activation, which is gone. Views between
the two stay, as an activation works on each element alone. The layer in front of the activation
then adds its own bias.

Up to the first activation all samples have the same tangents. The library moves them once for all
samples, and the first activation's own pass spreads them out; so layers in front of it are not
fused, nor is it. Where it alone reads a linear layer of the latents, the tangents are the weight's
columns: that layer's own kernel takes it in, whatever its kind is and whoever reads it. Gradients
come back to that layer behind the activation, so to all that follows there is none in front.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from fastsfvae.jacobian.plan.nodes import VIEWS, contains, packet_name
from fastsfvae.jacobian.rules.convolution import geometry_of
from fastsfvae.jacobian.rules.jet import Jet
from fastsfvae.jacobian.rules.registry import RULES
from fastsfvae.jacobian.rules.triton_activation import kernel_of
from fastsfvae.kernels._contract import reads_result
from fastsfvae.ops import gram_tail
from fastsfvae.ops.dispatch import NO_ACTIVATION, Choice, decide, decide_of_latents, is_forced
from fastsfvae.ops.latent_layer import takes_latents
from fastsfvae.ops.tangent_layer import Layer, largest_batch

_LAYERS = frozenset({"linear", "conv2d", "conv_transpose2d"})
_BROADCAST = "its bias is broadcast"


class Placed(NamedTuple):
    """How a layer runs.

    Attributes:
        choice: "fused" or "library", and why.
        layer: for the kernels; None where it is the library's.
        activation: the one in front that is no longer in the graph, whichever layer applies it; or
            None.
        largest_batch: samples of a chunk at most, where it is fused.
        behind: of a fused layer of the latents, the activation that it has taken in, which is no
            longer in the graph either; or None.
        read_in: of such a layer, how the fused layer that alone reads it multiplies float32.
    """

    choice: Choice
    layer: Layer | None = None
    activation: fx.Node | None = None
    largest_batch: int = 0
    behind: fx.Node | None = None
    read_in: str = "ieee"

    @property
    def behind_kernel(self) -> tuple[str, tuple[float, ...]] | None:
        """Kind and parameters of the activation that a layer of the latents has taken in."""
        return None if self.behind is None else _kernel(self.behind)


def place_layers(graph: fx.Graph, z: fx.Node, jets: set[fx.Node]) -> dict[fx.Node, Placed]:
    """Choose for every layer that carries tangents, on the Triton backend, and rewrite the graph.

    Args:
        graph: changed in place; its nodes carry fake tensors in meta["val"].
        z: its latents.
        jets: the nodes that carry tangents.

    Raises:
        ValueError: an unknown $FASTSFVAE_FUSED.
    """
    lifts = [node for node in z.users if node in jets and is_of_latents(node, z, jets)]
    placed = {node: _place_of_latents(graph, z, jets, node) for node in lifts}
    # What lies behind an activation, where each sample has tangents of its own.
    apart = {node for node in lifts if placed[node].behind is not None}
    for node in graph.nodes:
        if node not in jets or node is z:
            continue
        if _name(node) in _LAYERS and node not in placed:
            placed[node] = _place(z, jets, apart, node)
        if _kernel(node) is not None or any(arg in apart for arg in node.all_input_nodes):
            apart.add(node)
    for node in placed:
        _take_in(graph, placed, apart, node)
    for node in lifts:
        reader = _sole_reader(node)
        layer = placed[reader].layer if reader in placed else None
        if layer is not None:
            placed[node] = placed[node]._replace(read_in=layer.product)
    placed = {node: _settled(found) for node, found in placed.items()}
    return {node: _among(placed, node) for node in placed}


def is_of_latents(node: fx.Node, z: fx.Node, jets: set[fx.Node]) -> bool:
    """Whether a node is a linear layer of the latents themselves."""
    arguments = node.args[1:], node.kwargs
    return _name(node) == "linear" and node.args[0] is z and not contains(arguments, jets)


def _place_of_latents(graph: fx.Graph, z: fx.Node, jets: set[fx.Node], node: fx.Node) -> Placed:
    """The choice for a linear layer of the latents; takes in the activation behind it."""
    activation, out = _sole_reader(node), node.meta["val"]
    if activation is None or activation not in jets or _kernel(activation) is None or out.ndim != 2:
        return Placed(Choice("library", "in front of the first activation"))
    if not bias_fits(node):
        return Placed(Choice("library", _BROADCAST))
    same = activation.meta["val"].dtype == out.dtype
    if not same or not takes_latents(int(z.meta["val"].shape[1]), out.dtype):
        return Placed(Choice("library", "no kernel for its dtype or size"))
    choice = decide_of_latents(out.device)
    if choice.how == "library":
        return Placed(choice)
    _erase(graph, activation)
    return Placed(choice, behind=activation)


def _place(z: fx.Node, jets: set[fx.Node], apart: set[fx.Node], node: fx.Node) -> Placed:
    """The choice for a layer, taking that an activation on either side can be taken in."""
    given: Any = node.args, node.kwargs
    described: Any = fx.map_arg(given, lambda arg: _described(arg, jets))
    (args, kwargs), out = described, node.meta["val"]
    name, x, weight = _name(node), args[0], args[1]
    if node.args[0] not in apart:
        return Placed(Choice("library", "in front of the first activation"))
    of_weight = any(isinstance(arg, Jet) for arg in args[1:])
    if of_weight or not RULES[name].pulls(args, kwargs):
        return Placed(Choice("library", "the layer's weight depends on z, or it has no adjoint"))
    if not bias_fits(node):
        return Placed(Choice("library", _BROADCAST))
    geometry = None
    if name != "linear":
        geometry = geometry_of(name, *args[3:], kernel=weight.shape[2:], **kwargs)
    (batch, m), (rows, *x_shape) = (tuple(map(int, t.shape)) for t in (z.meta["val"], x.primal))
    # A view may have made several rows of a sample.
    most = largest_batch(Layer(geometry), 1 + m, x_shape, weight.shape, out.dtype) * batch // rows
    if most < batch:
        return Placed(Choice("library", "no kernel for its geometry, dtype or size"))
    sizes = x_shape, tuple(weight.shape), tuple(map(int, out.shape[1:]))
    around = _activation_in_front(node, apart) is not None or _can_apply_behind(node)
    of_gram = _is_last(node) and bool(
        gram_tail.largest_batch(Layer(geometry), 1 + m, x_shape, weight.shape, out.dtype)
    )
    choice = decide(
        *(name, *sizes), device=out.device, dtype=out.dtype, activated=around, of_gram=of_gram
    )
    if choice.how == "library":
        return Placed(choice)
    return Placed(choice, Layer(geometry, product=choice.product), None, most)


def _is_last(layer: fx.Node) -> bool:
    """Whether the decoder returns a layer's result, behind an activation at most."""
    users = list(layer.users)
    if len(users) == 1 and _kernel(users[0]) is not None:
        users = list(users[0].users)
    return len(users) == 1 and users[0].op == "output"


def bias_fits(node: fx.Node) -> bool:
    """Whether a layer has no bias or one number for each channel, which is what kernels read."""
    bias: Any = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    if bias is None or _name(node) != "linear":
        return True
    return tuple(bias.meta["val"].shape) == (int(node.meta["val"].shape[-1]),)


def _take_in(
    graph: fx.Graph, placed: dict[fx.Node, Placed], apart: set[fx.Node], node: fx.Node
) -> None:
    """Give the activation in front of a fused layer to the layer before, or else to this one."""
    layer, activation = placed[node].layer, _activation_in_front(node, apart)
    taken = None if activation is None else _kernel(activation)
    if layer is None or taken is None:
        return
    kind, params = taken
    before = _layer_in_front(activation, placed) if reads_result(kind, params) else None
    if before is not None:
        found = placed[before]
        assert found.layer is not None
        applies = found.layer._replace(behind=kind, behind_params=params)
        placed[before] = found._replace(layer=applies)
    layer = layer._replace(kind=kind, params=params, applied=before is not None)
    placed[node] = placed[node]._replace(layer=layer, activation=activation)
    _erase(graph, activation)


def _erase(graph: fx.Graph, activation: fx.Node) -> None:
    argument: Any = activation.args[0]
    activation.replace_all_uses_with(argument)
    graph.erase_node(activation)


def _settled(found: Placed) -> Placed:
    """A layer that has taken in nothing is the library's, unless the kernels are asked for."""
    layer = found.layer
    if layer is None or layer.kind != "none" or layer.behind != "none" or is_forced():
        return found
    return Placed(Choice("library", NO_ACTIVATION))


def _among(placed: dict[fx.Node, Placed], node: fx.Node) -> Placed:
    """A layer that knows whether those around it round to TF32 what its products read.

    A layer rounds what it makes behind an activation, and the gradient that it pulls through one or
    none; one of the latents what its reader multiplies so.
    """
    found = placed[node]
    if found.layer is None or found.layer.product != "tf32":
        return found
    source: Any = node.args[0]
    while source not in placed and _name(source) in VIEWS:
        source = source.args[0]
    rounded = source in placed and _rounds_result(placed[source])
    reader = _sole_reader(node)
    behind = placed[reader].layer if reader in placed else None
    back = behind is not None and behind.product == "tf32"
    return found._replace(layer=found.layer._replace(rounded=rounded, grad_rounded=back))


def _rounds_result(found: Placed) -> bool:
    if found.layer is not None:
        return found.layer.behind != "none" and found.layer.product == "tf32"
    return found.behind is not None and found.read_in == "tf32"


def _can_apply_behind(layer: fx.Node) -> bool:
    """Whether an activation whose result tells its slope stands between this and another layer."""
    activation = _sole_reader(layer)
    taken = None if activation is None else _kernel(activation)
    if activation is None or taken is None or not reads_result(*taken):
        return False
    reader = _sole_reader(activation)
    return reader is not None and _name(reader) in _LAYERS and len(activation.users) == 1


def _sole_reader(node: fx.Node) -> fx.Node | None:
    """The only node that reads another one, behind views; or None."""
    while len(node.users) == 1:
        node = next(iter(node.users))
        if _name(node) not in VIEWS:
            return node
    return None


def _layer_in_front(activation: Any, placed: dict[fx.Node, Placed]) -> fx.Node | None:
    """The fused layer whose result only this activation reads, through views at most; or None."""
    reader, node = activation, activation.args[0]
    while list(node.users) == [reader]:
        if node in placed:
            return node if placed[node].layer is not None else None
        if _name(node) not in VIEWS:
            return None
        reader, node = node, node.args[0]
    return None


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
