"""What each node of a traced graph is to its plan: with tangents or without, once or per chunk."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fastsfvae.jacobian.plan.nodes import (
    differentiable,
    is_control,
    is_differentiable_result,
    is_tensor,
    leading,
    live_nodes,
    operation_name,
    packet_name,
    tangent_inputs,
)
from fastsfvae.jacobian.rules.catalogue import COMPLEX, NOT_DIFFERENTIABLE


@dataclasses.dataclass
class Sorted:
    """The nodes of a graph by what they depend on.

    Attributes:
        used: what the result needs, and what acts by side effect.
        jets: depend on z where gradients are enabled, and carry tangents.
        carriers: a gradient may be wanted of them, or of what they are computed from; no Jets.
        dynamic: depend on z or on a batched input, if only through its size: not in the prelude.
        aside: computed once for all samples, outside the chunk loop, with the batch in front: what
            carries gradients but does not come from z, and what that needs.
        sides: those of `aside` that a chunk reads.
        per_chunk: what a chunk computes, of the dynamic ones.
        numbers: depend on no sample, are no tensors, and are read per chunk: computed there again.
        lifted: computed per chunk without tangents, and a gradient goes through them.
    """

    used: set[fx.Node]
    jets: set[fx.Node]
    carriers: set[fx.Node]
    dynamic: set[fx.Node]
    aside: set[fx.Node] = dataclasses.field(default_factory=set)
    sides: list[fx.Node] = dataclasses.field(default_factory=list)
    per_chunk: set[fx.Node] = dataclasses.field(default_factory=set)
    numbers: set[fx.Node] = dataclasses.field(default_factory=set)
    lifted: set[fx.Node] = dataclasses.field(default_factory=set)


def sort_nodes(
    graph: fx.Graph,
    z: fx.Node,
    batched: set[fx.Node],
    trained: set[fx.Node],
    name: Callable[[fx.Node], str],
) -> Sorted:
    """Sort the nodes of a graph without in-place operations on what depends on the batch.

    Args:
        graph: its nodes carry stand-ins in meta["val"].
        z: the latents' node.
        batched: z and the further inputs with a batch axis.
        trained: inputs that may require a gradient, but for z.
        name: how messages call the module of a node.

    Raises:
        RuntimeError: an operation behind which tangents would be lost.
    """
    found = Sorted(live_nodes(graph), {z}, set(trained), set(batched))
    from_z, enabled = {z}, True
    for node in graph.nodes:
        if node.target is torch._C._set_grad_enabled:
            enabled = bool(node.args[0])
        if node.op != "call_function" or node not in found.used:
            continue
        inputs = node.all_input_nodes
        if any(arg in found.dynamic for arg in inputs):
            found.dynamic.add(node)
        # A size of a chunk is known without its values.
        if any(arg in from_z and is_valued(arg) for arg in inputs):
            from_z.add(node)
        if not enabled:
            continue
        if any(arg in found.jets for arg in tangent_inputs(node)):
            if differentiable(node):
                _refuse_unknown_complex(node, name(node))
                found.jets.add(node)
            else:
                _refuse_to_lose_tangents(node, name(node))
        elif any(arg in found.carriers for arg in tangent_inputs(node)) and differentiable(node):
            found.carriers.add(node)
    _put_aside(graph, z, found, from_z)
    for node in reversed(graph.nodes):
        fixed = node.op == "call_function" and node in found.used and node not in found.dynamic
        if fixed and not is_valued(node) and not is_control(node):
            if any(user in found.dynamic or user in found.numbers for user in node.users):
                found.numbers.add(node)
    return found


def is_valued(node: fx.Node) -> bool:
    """Whether it is a tensor or several, no number such as a size."""
    return is_tensor(node) or isinstance(node.meta.get("val"), (tuple, list))


def _put_aside(graph: fx.Graph, z: fx.Node, found: Sorted, from_z: set[fx.Node]) -> None:
    moved: set[fx.Node] = set()
    result: fx.Node | None = None
    for node in reversed(graph.nodes):
        if node.op == "output":
            (result,) = node.all_input_nodes
        if not _computed(node, found) or node not in found.carriers or node in from_z:
            continue
        per_chunk = any(user in found.used and user not in moved for user in node.users)
        if per_chunk and not (is_tensor(node) and leading(node) == leading(z)):
            continue
        moved.add(node)
        if per_chunk:
            found.sides.insert(0, node)
    found.aside = _needed_for(moved, found, frozenset())
    found.per_chunk = _needed_for({result}, found, frozenset(moved))
    found.lifted = found.carriers & found.per_chunk


def _computed(node: Any, found: Sorted) -> bool:
    return node.op == "call_function" and node in found.dynamic


def _needed_for(results: set[Any], found: Sorted, given: frozenset[fx.Node]) -> set[fx.Node]:
    """What of the batch's own must be computed for results, where some nodes are given."""
    needed: set[fx.Node] = set()
    pending = list(results)
    while pending:
        node = pending.pop()
        if _computed(node, found) and node not in needed and node not in given:
            needed.add(node)
            pending += node.all_input_nodes
    return needed


def _refuse_unknown_complex(node: fx.Node, module: str) -> None:
    values = pytree.tree_leaves([n.meta.get("val") for n in (node, *tangent_inputs(node))])
    if not any(isinstance(value, Tensor) and value.is_complex() for value in values):
        return
    target: Any = node.target
    if target is not operator.getitem and packet_name(target) not in COMPLEX:
        raise RuntimeError(
            f"{module} uses {operation_name(target)} on complex values, which has no tangent rule "
            'for them: write it in real and imaginary parts, or use backend="reference"'
        )


def _refuse_to_lose_tangents(node: fx.Node, module: str) -> None:
    if not is_differentiable_result(node):
        return
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload) and packet_name(target) in NOT_DIFFERENTIABLE:
        return
    raise RuntimeError(
        f"{module} uses {operation_name(target)}, through which no tangents can be carried: write "
        'it in plain PyTorch operations, or use backend="reference"'
    )
