"""The calls of a plan: each operation of a trace as an expression."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from fastsfvae.jacobian.plan.nodes import VIEWS, contains, is_floating, is_tensor, packet_name
from fastsfvae.jacobian.plan.place import Placed, bias_fits, is_of_latents
from fastsfvae.jacobian.plan.sort import Sorted
from fastsfvae.jacobian.plan.source import Source, Statement, identifier
from fastsfvae.jacobian.plan.trace import Trace
from fastsfvae.jacobian.rules.constant import constant, value_of
from fastsfvae.jacobian.rules.fallback import generic_rule, where
from fastsfvae.jacobian.rules.fused_layer import fused_layer, latent_layer
from fastsfvae.jacobian.rules.jet import Jet
from fastsfvae.jacobian.rules.registry import RULES, bind
from fastsfvae.jacobian.rules.scatter import copied, written_entry, written_range
from fastsfvae.ops.tangent_layer import Layer

# What stands for an operation that autograd does not know, or not of complex values.
_PLAIN: dict[Any, Callable[..., Tensor]] = {
    torch.ops.aten.copy.default: copied,
    torch.ops.aten.select_scatter.default: written_entry,
    torch.ops.aten.slice_scatter.default: written_range,
}
# Layers whose third argument is a bias, which an activation's kernel can add.
_BIASED = frozenset(
    "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d".split()
)


class Calls:
    """Writes the calls of one plan, and notes what keeps it from being swept.

    Args:
        trace: of the decoder.
        z: the latents' node.
        kinds: what each node is to the plan.
        placed: how its layers run, on the Triton backend.
        source: where the values are bound that a call names.
        body: the statements of a chunk so far.
        backend: "torch" or "triton".
    """

    def __init__(
        self,
        trace: Trace,
        z: fx.Node,
        kinds: Sorted,
        placed: dict[fx.Node, Placed],
        source: Source,
        body: list[Statement],
        backend: str,
    ):
        self.trace, self.z, self.kinds, self.placed = trace, z, kinds, placed
        self.source, self.body, self.backend = source, body, backend
        self.obstacles: list[str] = []
        self.source.bind("constant", constant)
        self.source.bind("value_of", value_of)

    def obstruct(self, what: str, node: fx.Node) -> None:
        """Note an obstacle."""
        self.obstacles.append(what + where(self.trace.paths.get(node, "")))

    def with_tangents(self, node: fx.Node) -> tuple[str, str]:
        """A call on Jets, and how it is handled: "rule" or "fallback"."""
        target: Any = node.target
        if target is operator.getitem:
            return f"{self.source.text(node.args[0])}[{node.args[1]!r}]", "rule"
        packet = packet_name(target)
        if is_of_latents(node, self.z, self.kinds.jets):
            packet = "linear_of_latents"
        found = RULES.get(packet)
        others = (*node.args[1:], *node.kwargs.values())
        arguments = [self.source.text(arg) for arg in node.args]
        if found is not None and (found.several or not contains(others, self.kinds.jets)):
            described = self._described(node, self.kinds.jets)
            layer = self._fused(node)
            chosen = found.on(self.backend, *described)
            if layer is not None:
                chosen = fused_layer(packet, layer)
            behind = self.placed[node].behind_kernel if node in self.placed else None
            if behind is not None:
                chosen = latent_layer(*behind, self.placed[node].read_in)
            label = f"{packet} {self.trace.paths.get(node, '')}".rstrip()
            function, handled = bind(chosen, self._private(node.args[0]), label), "rule"
            if not found.pulls(*described):
                self.obstruct(f"{packet} has no adjoint", node)
            if chosen is found.triton:
                arguments[1:1] = self._bias_left_by(node.args[0])
        else:
            path = self.trace.paths.get(node, "")
            function, handled = generic_rule(target, path), "fallback"
            self.obstruct(f"{packet} has no rule", node)
            packet = node.name
        name = self.source.bind(f"{packet}_{handled}", function)
        arguments += [f"{key}={self.source.text(value)}" for key, value in node.kwargs.items()]
        return f"{name}({', '.join(arguments)})", handled

    def lifted(self, node: fx.Node) -> str:
        """A call without tangents through which gradients of parameters go.

        By its rule, where that can pull them back.
        """
        lifted, plain = self.kinds.lifted, self.plain(node)
        inputs = {arg for arg in node.all_input_nodes if arg in lifted}
        if node.target is operator.getitem:
            if not inputs:
                lifted.discard(node)
                return plain
            self.source.names[node] = f"value_of({node.name})"
            several: Any = node.args[0]
            return f"{several.name}[{node.args[1]!r}]"
        packet = packet_name(node.target)
        found = RULES.get(packet)
        # A rule needs one Jet.
        jets = inputs or set(filter(is_floating, node.all_input_nodes[:1]))
        others = (*node.args[1:], *node.kwargs.values())
        fits = found is not None and (found.several or not contains(others, jets))
        if found is None or not jets or not (fits and found.pulls(*self._described(node, jets))):
            self.obstruct(f"{packet} on parameters has no adjoint", node)
            lifted.discard(node)
            return plain

        def text(value: Any) -> str:
            if isinstance(value, fx.Node) and value in jets:
                return value.name if value in inputs else f"constant({self.source.text(value)}, 1)"
            return self.source.text(value, text)

        if is_tensor(node):
            # Elsewhere it is read as a value.
            self.source.names[node] = f"value_of({node.name})"
        label = f"{packet} {self.trace.paths.get(node, '')}".rstrip()
        name = self.source.bind(f"{packet}_lifted", bind(found, label=label))
        return f"{name}({self._arguments(node, text)})"

    def _fused(self, node: fx.Node) -> Layer | None:
        return self.placed[node].layer if node in self.placed else None

    def _bias_left_by(self, layer: Any) -> tuple[str, str]:
        """A bias, taken out of the layer's own call, and its axis; "None" where it must stay."""
        nothing = "None", "0"
        if layer not in self.kinds.jets or len(layer.users) > 1 or len(layer.args) < 3:
            return nothing
        # The layer's kernel adds it at no cost.
        if self._fused(layer) is not None:
            return nothing
        name, bias = packet_name(layer.target), layer.args[2]
        # What is computed in the body would be deleted behind the layer.
        if (
            name not in _BIASED
            or not bias_fits(layer)
            or not isinstance(bias, fx.Node)
            or bias in self.kinds.dynamic
        ):
            return nothing
        # Behind the batch axis come the channels, or any axes with the features last.
        spatial = layer.args[1].meta["val"].ndim - 2
        if spatial and layer.meta["val"].ndim != spatial + 2:
            return nothing
        place = next(i for i, (_, node) in enumerate(self.body) if node is layer)
        function, _, _ = self.body[place][0].partition("(")
        x, weight, _, *rest = (self.source.text(arg) for arg in layer.args)
        rest += [f"{key}={self.source.text(value)}" for key, value in layer.kwargs.items()]
        self.body[place] = f"{function}({', '.join([x, weight, 'None', *rest])})", layer
        return self.source.text(bias), "1" if spatial else "-1"

    def _described(self, node: fx.Node, jets: set[fx.Node]) -> tuple[tuple, dict[str, Any]]:
        """The arguments as a rule gets them, with fake tensors."""

        def describe(arg: fx.Node) -> Any:
            value: Any = arg.meta.get("val")
            if arg in jets:
                return Jet(value, value)
            carries = arg in self.kinds.carriers and isinstance(value, Tensor)
            return value.detach().requires_grad_() if carries else value

        return fx.map_arg((node.args, node.kwargs), describe)

    def _private(self, arg: Any) -> bool:
        """Whether a rule may overwrite this argument: new memory that only it reads."""
        if not isinstance(arg, fx.Node) or arg not in self.kinds.jets or len(arg.users) > 1:
            return False
        if arg is self.z or not isinstance(arg.target, torch._ops.OpOverload):
            return False
        name = packet_name(arg.target)
        if name in VIEWS:
            return self._private(arg.args[0])
        return name in RULES and RULES[name].fresh and not RULES[name].overwrites

    def aside(self, node: fx.Node) -> str:
        """A call outside the chunk loop, where all are plain tensors."""
        return self.plain(node, self._side_text)

    def plain(self, node: fx.Node, text: Callable[[Any], str] | None = None) -> str:
        """A call on values."""
        target: Any = node.target
        if isinstance(target, torch._ops.OpOverload):
            name, target = identifier(str(target)), _PLAIN.get(target, target)
        else:
            name = "py_" + identifier(getattr(target, "__name__", "function"))
        name = self.source.bind(name, target)
        return f"{name}({self._arguments(node, text or self._primal_text)})"

    def _arguments(self, node: fx.Node, text: Callable[[Any], str]) -> str:
        parts = [text(arg) for arg in node.args]
        parts += [f"{key}={text(value)}" for key, value in node.kwargs.items()]
        return ", ".join(parts)

    def _side_text(self, value: Any) -> str:
        if isinstance(value, fx.Node) and value.op != "get_attr":
            return value.name
        return self.source.text(value, self._side_text)

    def _primal_text(self, value: Any) -> str:
        if isinstance(value, fx.Node) and value in self.kinds.jets and is_tensor(value):
            return f"{self.source.text(value)}.primal"
        return self.source.text(value, self._primal_text)
