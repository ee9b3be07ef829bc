"""What a plan asks about the nodes of a traced graph."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fastsfvae.jacobian.plan.functionalize import is_mutation
from fastsfvae.jacobian.rules.catalogue import NOT_DIFFERENTIABLE
from fastsfvae.jacobian.rules.jet import is_differentiable

# What gives its argument another shape and moves no element past another.
VIEWS = frozenset("view reshape flatten unflatten unsqueeze squeeze".split())


def is_tensor(node: fx.Node) -> bool:
    """Whether its value is a tensor."""
    return isinstance(node.meta.get("val"), Tensor)


def is_floating(node: fx.Node) -> bool:
    """Whether its value is a floating point tensor, real or complex."""
    return is_differentiable(node.meta.get("val"))


def leading(node: fx.Node) -> str:
    """The leading extent, which may be a symbol, as text."""
    shape = node.meta["val"].shape
    return str(shape[0]) if shape else ""


def contains(arguments: Any, nodes: set[fx.Node]) -> bool:
    """Whether any of the nodes is among nested arguments."""
    leaves = pytree.tree_leaves(arguments)
    return any(isinstance(leaf, fx.Node) and leaf in nodes for leaf in leaves)


def differentiable(node: fx.Node) -> bool:
    """Whether its value has a derivative by its arguments."""
    if node.target is operator.getitem:
        return is_differentiable(node.meta.get("val"))
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    if packet_name(node.target) in NOT_DIFFERENTIABLE:
        return False
    return is_differentiable_result(node)


def is_differentiable_result(node: fx.Node) -> bool:
    """Whether it is a floating point tensor, real or complex, or several with one among them."""
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else [value]
    return any(map(is_differentiable, values))


def live_nodes(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that the result needs, and those that act by side effect."""
    live: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        needed = node.op == "output" or node in live or is_mutation(node) or is_control(node)
        if needed:
            live.add(node)
            live.update(node.all_input_nodes)
    return live


# Operations that read only the shape or the dtype of their arguments from a place on.
_SHAPED_LIKE = {"type_as": 1, "expand_as": 1, "view_as": 1, "reshape_as": 1}


def tangent_inputs(node: fx.Node) -> list[fx.Node]:
    """The arguments of a node that its value depends on, if they have tangents."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = packet_name(target)
        place = 1 if target is torch.ops.aten.to.other else _SHAPED_LIKE.get(name)
        if place is not None:
            return [arg for arg in node.args[:place] if isinstance(arg, fx.Node)]
    return node.all_input_nodes


def is_autocast(target: Any) -> bool:
    """Whether a call enters or leaves an autocast region."""
    return target in (
        torch.amp.autocast_mode._enter_autocast,
        torch.amp.autocast_mode._exit_autocast,
    )


def is_control(node: fx.Node) -> bool:
    """Whether the node sets a mode and computes nothing."""
    return node.target is torch._C._set_grad_enabled or is_autocast(node.target)


def packet_name(target: Any) -> str:
    """The operation without namespace and overload, such as "conv2d"."""
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
        return target._schema.name.partition("::")[2]
    return operation_name(target)


def operation_name(target: Any) -> str:
    """How messages call an operation, such as "aten.conv2d.default"; no address of a function."""
    known = isinstance(target, (torch._ops.OpOverload, torch._ops.HigherOrderOperator))
    return str(target) if known else getattr(target, "__name__", type(target).__name__)
