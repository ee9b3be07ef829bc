"""From a trace to its plan: every node sorted into prelude, side or body, and written as source."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from fastsfvae.jacobian.cost import Cost, tangent_cost
from fastsfvae.jacobian.plan.ending import Ending, find_ending, find_linear_ending
from fastsfvae.jacobian.plan.functionalize import functionalize
from fastsfvae.jacobian.plan.nodes import (
    VIEWS,
    contains,
    is_autocast,
    is_floating,
    is_tensor,
    live_nodes,
    packet_name,
)
from fastsfvae.jacobian.plan.place import Placed, place_layers
from fastsfvae.jacobian.plan.plan import Plan, Step
from fastsfvae.jacobian.plan.refuse import layer_name, refuse_training_mode
from fastsfvae.jacobian.plan.samples import refuse_noise
from fastsfvae.jacobian.plan.sort import Sorted, sort_nodes
from fastsfvae.jacobian.plan.source import Source, Statement, identifier, tuple_text
from fastsfvae.jacobian.plan.strided import rewrite_strided
from fastsfvae.jacobian.plan.trace import Trace
from fastsfvae.jacobian.rules.fallback import generic_rule, where
from fastsfvae.jacobian.rules.fused_layer import fused_layer
from fastsfvae.jacobian.rules.jet import Jet
from fastsfvae.jacobian.rules.lift import lift, lower
from fastsfvae.jacobian.rules.registry import RULES, bind
from fastsfvae.jacobian.rules.scatter import copied
from fastsfvae.ops.dispatch import Choice
from fastsfvae.ops.tangent_layer import Layer

# What stands for an operation that autograd does not know.
_PLAIN = {torch.ops.aten.copy.default: copied}
# Layers whose third argument is a bias, which an activation's kernel can add.
_BIASED = frozenset(
    "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d".split()
)


def build_plan(trace: Trace, trained: list[bool], batched: list[bool], backend: str) -> Plan:
    """Turn a trace into code for the resolved backend, "torch" or "triton".

    Args:
        trace: of the decoder.
        trained: for each parameter and buffer, whether it may require a gradient.
        batched: for each further tensor input, whether it has the batch axis.
        backend: chooses among a rule's implementations.
    """
    graph = trace.module.graph
    params, rest = trace.inputs[: len(trained)], trace.inputs[len(trained) :]
    z, extras = rest[0], rest[1:]
    batch_inputs = {z, *(node for node, along in zip(extras, batched, strict=True) if along)}
    for node in live_nodes(graph):
        refuse_noise(node, trace.paths.get(node, ""))
    functionalize(graph, batch_inputs)
    with temporarily_clear_interpreter_stack():
        rewrite_strided(graph, batch_inputs, trace.paths)
    carriers = {node for node, along in zip(params, trained, strict=True) if along}
    carriers.update(node for node in extras if is_floating(node))

    def module_of(node: fx.Node) -> str:
        return layer_name(trace.paths.get(node, ""))

    kinds = sort_nodes(graph, z, batch_inputs, carriers, module_of)
    emitter = _Emitter(trace, params, z, extras, kinds, backend)
    # The caller may be inside torch.func.grad, where stand-ins cannot ask for gradients.
    with temporarily_clear_interpreter_stack():
        return emitter.plan()


class _Emitter:
    """Sorts the nodes of a graph into prelude, side and body, and has them written."""

    def __init__(self, trace, params, z, extras, kinds: Sorted, backend):
        self.trace, self.params, self.z, self.extras = trace, params, z, extras
        self.kinds, self.backend = kinds, backend
        self.jets, self.dynamic = kinds.jets, kinds.dynamic
        self.placed: dict[fx.Node, Placed] = {}
        if backend == "triton":
            self.placed = place_layers(trace.module.graph, z, self.jets)
        self.source = Source(params, z, extras)
        self.source.bind("lift", lift), self.source.bind("lower", lower)
        self.prelude: list[Statement] = []
        self.side: list[Statement] = []
        self.body: list[Statement] = []
        self.controls = 0
        self.obstacles: list[str] = []
        self.steps: list[Step] = []
        self.widest = self.total = 0

    def plan(self) -> Plan:
        result: fx.Node | None = None
        for node in self.trace.module.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                (result,) = node.all_input_nodes
            elif node not in self.kinds.used:
                continue
            elif node.op == "get_attr":
                value = operator.attrgetter(node.target)(self.trace.module)
                if isinstance(value, Tensor) and value.requires_grad:
                    self._obstruct("a trained tensor that is no parameter of the decoder", node)
                self.source.names[node] = self.source.bind(identifier(node.target), value)
            elif node.target is torch._C._set_grad_enabled:
                self._control(node, f"torch.set_grad_enabled({bool(node.args[0])} and ambient)")
            elif is_autocast(node.target):
                self._control(node, f"{node.name} = {self._plain_call(node)}")
            else:
                self._operation(node)
        assert result is not None
        self._see(result)
        return self._finish(result)

    def _obstruct(self, what: str, node: fx.Node) -> None:
        self.obstacles.append(what + where(self.trace.paths.get(node, "")))

    def _control(self, node: fx.Node, line: str) -> None:
        self.controls += 1
        for part in (self.prelude, self.side, self.body):
            part.append((line, node))

    def _operation(self, node: fx.Node) -> None:
        if isinstance(node.target, torch._ops.OpOverload):
            path = self.trace.paths.get(node, "")
            refuse_training_mode(packet_name(node.target), node, path)
        if node not in self.dynamic:
            self.prelude.append((f"{node.name} = {self._plain_call(node)}", node))
            return
        if node in self.kinds.aside:
            self.side.append((f"{node.name} = {self._plain_call(node, self._side_text)}", node))
        if node not in self.kinds.per_chunk:
            return
        handled = "plain"
        if node in self.jets:
            call, handled = self._jet_call(node)
        elif node in self.kinds.lifted:
            call = self._lifted_call(node)
        else:
            call = self._plain_call(node)
        self.body.append((f"{node.name} = {call}", node))
        if isinstance(node.target, torch._ops.OpOverload):
            self._see(node, handled)

    def _see(self, node: fx.Node, handled: str | None = None) -> None:
        value = node.meta.get("val")
        if handled is not None:
            placed = self.placed.get(node)
            if placed is not None and placed.activation is not None:
                self._step(placed.activation, handled, Choice("fused", "in the layer behind it"))
            self._step(node, handled, None if placed is None else placed.choice)
        if node in self.jets and isinstance(value, Tensor):
            batch = int(self.z.meta["val"].shape[0])
            elements = -(-int(value.numel()) // batch)
            self.widest = max(self.widest, elements)
            self.total += elements

    def _step(self, node: fx.Node, handled: str, choice: Choice | None) -> None:
        value, path = node.meta.get("val"), self.trace.paths.get(node, "")
        shape = tuple(int(s) for s in value.shape) if isinstance(value, Tensor) else ()
        op, cost = packet_name(node.target), Cost(0, 0)
        if handled != "plain":
            cost = tangent_cost(op, node, int(self.z.meta["val"].shape[0]))
        self.steps.append(Step(op, path, handled, shape, cost, choice))

    def _jet_call(self, node: fx.Node) -> tuple[str, str]:
        target: Any = node.target
        if target is operator.getitem:
            return f"{self.source.text(node.args[0])}[{node.args[1]!r}]", "rule"
        packet = packet_name(target)
        if packet == "linear" and node.args[0] is self.z and not contains(node.args[1:], self.jets):
            packet = "linear_of_latents"
        found = RULES.get(packet)
        others = (*node.args[1:], *node.kwargs.values())
        arguments = [self.source.text(arg) for arg in node.args]
        if found is not None and (found.several or not contains(others, self.jets)):
            described = self._described(node, self.jets)
            layer = self._fused(node)
            chosen = found.on(self.backend, *described)
            if layer is not None:
                chosen = fused_layer(packet, layer)
            label = f"{packet} {self.trace.paths.get(node, '')}".rstrip()
            function, handled = bind(chosen, self._private(node.args[0]), label), "rule"
            if not found.pulls(*described):
                self._obstruct(f"{packet} has no adjoint", node)
            if chosen is found.triton:
                arguments[1:1] = self._bias_left_by(node.args[0])
        else:
            path = self.trace.paths.get(node, "")
            function, handled = generic_rule(target, path), "fallback"
            self._obstruct(f"{packet} has no rule", node)
            packet = node.name
        name = self.source.bind(f"{packet}_{handled}", function)
        arguments += [f"{key}={self.source.text(value)}" for key, value in node.kwargs.items()]
        return f"{name}({', '.join(arguments)})", handled

    def _lifted_call(self, node: fx.Node) -> str:
        """A call without tangents through which gradients of parameters go.

        By its rule, where that can pull them back.
        """
        lifted, plain = self.kinds.lifted, self._plain_call(node)
        inputs = {arg for arg in node.all_input_nodes if arg in lifted}
        if node.target is operator.getitem:
            if not inputs:
                lifted.discard(node)
                return plain
            self.source.names[node] = f"lower({node.name})"
            return f"{node.args[0].name}[{node.args[1]!r}]"
        packet = packet_name(node.target)
        found = RULES.get(packet)
        # A rule needs one Jet.
        jets = inputs or set(filter(is_floating, node.all_input_nodes[:1]))
        others = (*node.args[1:], *node.kwargs.values())
        fits = found is not None and (found.several or not contains(others, jets))
        if found is None or not jets or not (fits and found.pulls(*self._described(node, jets))):
            self._obstruct(f"{packet} on parameters has no adjoint", node)
            lifted.discard(node)
            return plain

        def text(value: Any) -> str:
            if isinstance(value, fx.Node) and value in jets:
                return value.name if value in inputs else f"lift({self.source.text(value)})"
            return self.source.text(value, text)

        if is_tensor(node):
            # Elsewhere it is read as a value.
            self.source.names[node] = f"lower({node.name})"
        label = f"{packet} {self.trace.paths.get(node, '')}".rstrip()
        name = self.source.bind(f"{packet}_lifted", bind(found, label=label))
        return f"{name}({self._arguments(node, text)})"

    def _fused(self, node: fx.Node) -> Layer | None:
        return self.placed[node].layer if node in self.placed else None

    def _bias_left_by(self, layer: Any) -> tuple[str, str]:
        """A bias, taken out of the layer's own call, and its axis; "None" where it must stay."""
        nothing = "None", "0"
        if layer not in self.jets or len(layer.users) > 1 or len(layer.args) < 3:
            return nothing
        # The layer's kernel adds it at no cost.
        if self._fused(layer) is not None:
            return nothing
        name, bias = packet_name(layer.target), layer.args[2]
        # What is computed in the body would be deleted behind the layer.
        if name not in _BIASED or not isinstance(bias, fx.Node) or bias in self.dynamic:
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
        if not isinstance(arg, fx.Node) or arg not in self.jets or len(arg.users) > 1:
            return False
        if arg is self.z or not isinstance(arg.target, torch._ops.OpOverload):
            return False
        name = packet_name(arg.target)
        if name in VIEWS:
            return self._private(arg.args[0])
        return name in RULES and RULES[name].fresh and not RULES[name].overwrites

    def _plain_call(self, node: fx.Node, text: Callable[[Any], str] | None = None) -> str:
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
        # There all are plain tensors.
        if isinstance(value, fx.Node) and value.op != "get_attr":
            return value.name
        return self.source.text(value, self._side_text)

    def _primal_text(self, value: Any) -> str:
        if isinstance(value, fx.Node) and value in self.jets and is_tensor(value):
            return f"{self.source.text(value)}.primal"
        return self.source.text(value, self._primal_text)

    def _finish(self, result: fx.Node) -> Plan:
        sides = self.kinds.sides
        in_body = {arg for _, node in self.body for arg in node.all_input_nodes} | {result}
        produced = {node for _, node in self.prelude if node not in self.dynamic}
        wanted = in_body | {arg for _, node in self.side for arg in node.all_input_nodes}
        carried = [n for n in dict.fromkeys(n for _, n in self.prelude) if n in produced & wanted]
        body_inputs = [index for index, node in enumerate(self.params) if node in in_body]
        if result not in self.jets:
            self.obstacles.append("a result that does not depend on z")
        if not all(is_tensor(node) for node in carried):
            self.obstacles.append("numbers computed from parameters")
        statics, side_values = (
            tuple_text(map(self.source.text, nodes)) for nodes in (carried, sides)
        )
        write, of_statics = self.source.function, [(statics, "statics")] * bool(carried)
        of_sides = [(side_values, "sides")] * bool(sides)
        write("prelude", "tensors, extras", self.prelude, carried, statics)
        write("side", "z, tensors, extras, statics", self.side, sides, side_values, of_statics)
        returned = self.source.text(result)
        parameters = "z, tensors, extras, statics, sides"
        unpacked = of_statics + of_sides
        write("body", parameters, self.body, [result], returned, unpacked)
        ending = self._ending(result)
        if ending is not None:
            before = [(line, node) for line, node in self.body if node not in ending.replaced]
            stop, inputs = self.source.bind("stop", ending.stop), ending.inputs
            stopped = f"{stop}({', '.join(map(self.source.text, inputs))})"
            kept = [node for node in inputs if node is not None]
            self._tell_of_tail(ending)
            write("to_tail", parameters, before, kept, stopped, unpacked)
        functions = self.source.run()
        if self.controls:
            functions = [_keeping_modes(function) for function in functions]
        prelude, side_of_batch, body_of_chunk, *to_tail = functions
        return Plan(
            str(self.source),
            prelude,
            side_of_batch,
            body_of_chunk,
            body_inputs,
            self.obstacles,
            self.steps,
            _limited(self.trace.accepts, self.placed.values()),
            self.widest,
            self.total,
            (tuple(body_inputs), *(tuple(n.name for n in nodes) for nodes in (carried, sides))),
            tuple(int(size) for size in result.meta["val"].shape[1:]),
            result.meta["val"].dtype,
            to_tail[0] if to_tail else None,
            1 if ending is None else ending.least_batch,
        )

    def _ending(self, result: fx.Node) -> Ending | None:
        """What a sweep need not run itself; its modes must not change on the way."""
        if self.controls or self.obstacles:
            return None
        if self.backend == "torch":
            return find_linear_ending(result, self.jets, self.z, self.dynamic)
        return find_ending(result, self.placed, self.dynamic, int(self.z.meta["val"].shape[1]))

    def _tell_of_tail(self, ending: Ending) -> None:
        # What lies behind the last layer makes no choice, nor does PyTorch's backend.
        chosen = [index for index, step in enumerate(self.steps) if step.choice is not None]
        linear = [index for index, step in enumerate(self.steps) if step.op == "linear"]
        last = max(chosen or linear)
        choice, how = self.steps[last].choice, "the loss takes its Gram at once and writes no J"
        if choice is None:
            samples = (
                f"from {ending.least_batch} samples on" if ending.least_batch > 1 else "always"
            )
            choice = Choice("library", f"{how}, through W^T W, {samples}")
        else:
            choice = choice._replace(why=f"{choice.why}; {how}")
        self.steps[last] = dataclasses.replace(self.steps[last], choice=choice)


def _limited(accepts: Callable[[int], bool], placed: Iterable[Placed]) -> Callable[[int], bool]:
    """What a trace accepts as far as every fused kernel can count its positions."""
    limits = [p.largest_batch for p in placed if p.layer is not None]
    if not limits:
        return accepts
    most = min(limits)
    return lambda batch: batch <= most and accepts(batch)


def _keeping_modes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Restore the gradient mode also where the decoder's own no_grad block raises."""

    def guarded(*args: Any) -> Any:
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            return function(*args)

    return guarded
