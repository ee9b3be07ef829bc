"""From a trace to its plan: every node sorted into prelude, side or body, and written as source."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from fastsfvae.jacobian.cost import Cost, tangent_cost
from fastsfvae.jacobian.plan.calls import Calls
from fastsfvae.jacobian.plan.ending import Ending, find_cut, find_ending, find_linear_ending
from fastsfvae.jacobian.plan.functionalize import functionalize
from fastsfvae.jacobian.plan.nodes import (
    is_autocast,
    is_control,
    is_floating,
    is_tensor,
    live_nodes,
    packet_name,
)
from fastsfvae.jacobian.plan.place import Placed, place_layers
from fastsfvae.jacobian.plan.plan import Halves, Plan, Step
from fastsfvae.jacobian.plan.refuse import layer_name, refuse_training_mode
from fastsfvae.jacobian.plan.samples import refuse_noise
from fastsfvae.jacobian.plan.sort import Sorted, sort_nodes
from fastsfvae.jacobian.plan.source import Source, Statement, identifier, tuple_text
from fastsfvae.jacobian.plan.strided import rewrite_strided
from fastsfvae.jacobian.plan.trace import Trace
from fastsfvae.ops.dispatch import Choice
from fastsfvae.ops.tangent_layer import Layer


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
        self.prelude: list[Statement] = []
        self.side: list[Statement] = []
        self.body: list[Statement] = []
        self.controls = 0
        self.calls = Calls(trace, z, kinds, self.placed, self.source, self.body, backend)
        self.obstacles = self.calls.obstacles
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
                    self.calls.obstruct(
                        "a trained tensor that is no parameter of the decoder", node
                    )
                self.source.names[node] = self.source.bind(identifier(node.target), value)
            elif node.target is torch._C._set_grad_enabled:
                self._control(node, f"torch.set_grad_enabled({bool(node.args[0])} and ambient)")
            elif is_autocast(node.target):
                self._control(node, f"{node.name} = {self.calls.plain(node)}")
            else:
                self._operation(node)
        assert result is not None
        self._see(result)
        return self._finish(result)

    def _control(self, node: fx.Node, line: str) -> None:
        self.controls += 1
        for part in (self.prelude, self.side, self.body):
            part.append((line, node))

    def _operation(self, node: fx.Node) -> None:
        if isinstance(node.target, torch._ops.OpOverload):
            path = self.trace.paths.get(node, "")
            refuse_training_mode(packet_name(node.target), node, path)
        if node not in self.dynamic:
            line = f"{node.name} = {self.calls.plain(node)}", node
            self.prelude.append(line)
            if node in self.kinds.numbers:
                self.side.append(line)
                self.body.append(line)
            return
        if node in self.kinds.aside:
            self.side.append((f"{node.name} = {self.calls.aside(node)}", node))
        if node not in self.kinds.per_chunk:
            return
        handled = "plain"
        if node in self.jets:
            call, handled = self.calls.with_tangents(node)
        elif node in self.kinds.lifted:
            call = self.calls.lifted(node)
        else:
            call = self.calls.plain(node)
        self.body.append((f"{node.name} = {call}", node))
        if isinstance(node.target, torch._ops.OpOverload):
            self._see(node, handled)

    def _see(self, node: fx.Node, handled: str | None = None) -> None:
        value = node.meta.get("val")
        if handled is not None:
            placed = self.placed.get(node)
            if placed is not None and placed.activation is not None:
                assert placed.layer is not None
                where = "in front of" if placed.layer.applied else "behind"
                self._step(placed.activation, handled, Choice("fused", f"in the layer {where} it"))
            self._step(node, handled, None if placed is None else placed.choice)
            if placed is not None and placed.behind is not None:
                self._step(placed.behind, handled, Choice("fused", "in the layer in front of it"))
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

    def _finish(self, result: fx.Node) -> Plan:
        sides = self.kinds.sides
        in_body = {arg for _, node in self.body for arg in node.all_input_nodes} | {result}
        produced = {node for _, node in self.prelude if node not in self.dynamic}
        wanted = in_body | {arg for _, node in self.side for arg in node.all_input_nodes}
        carried = [n for n in dict.fromkeys(n for _, n in self.prelude) if n in produced & wanted]
        carried = [n for n in carried if n not in self.kinds.numbers and not is_control(n)]
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
            per_chunk = self.dynamic | {node for _, node in before}
            cut = find_cut(ending, self.placed, per_chunk) if self.placed else None
            if cut is not None:
                node, behind = cut
                parts = tuple(
                    [line for line in before if (line[1] in behind) == at] for at in (0, 1)
                )
                write("to_cut", parameters, parts[0], [node], self.source.text(node), unpacked)
                given = f"{node.name}, tensors, extras, statics, sides"
                write("from_cut", given, parts[1], kept, stopped, of_statics)
        functions = self.source.run()
        if self.controls:
            functions = [_keeping_modes(function) for function in functions]
        prelude, side_of_batch, body_of_chunk, *to_tail = functions
        halves = None
        if len(to_tail) > 1:
            assert ending is not None
            shape = ending.inputs[0].meta["val"].shape
            halves = Halves(to_tail[1], to_tail[2], math.prod(map(int, shape[1:])))
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
            (
                tuple(body_inputs),
                *(tuple(n.name for n in nodes) for nodes in (carried, sides)),
                # A trace for one batch size may have that size among its constants.
                tuple(line for line, _ in self.prelude),
            ),
            tuple(int(size) for size in result.meta["val"].shape[1:]),
            result.meta["val"].dtype,
            to_tail[0] if to_tail else None,
            1 if ending is None else ending.least_batch,
            halves,
            self._fused_weights(),
        )

    def _fused_weights(self) -> tuple[tuple[int, Layer], ...]:
        """Those that no mode of the decoder's own casts otherwise."""
        if self.controls:
            return ()
        fused = {node.args[1]: p.layer for node, p in self.placed.items() if p.layer is not None}
        return tuple((i, fused[node]) for i, node in enumerate(self.params) if node in fused)

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
