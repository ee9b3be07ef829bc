"""Rewrite in-place operations on values that depend on the batch into out-of-place ones.

Jets are immutable pairs, so `nn.ReLU(inplace=True)`, `h += x` and `out[:, :3] = h` become new
values here: the changed view is scattered back into its base, and every alias that is read later
is taken again from the new base. In-place operations on parameters, buffers and constants alone
(the power iteration of spectral_norm) stay as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

aten = torch.ops.aten

_SCATTER = {
    aten.select.int: aten.select_scatter.default,
    aten.slice.Tensor: aten.slice_scatter.default,
}
_MUTABLE_ONLY = {"out", "data", "resize"}


def is_mutation(node: fx.Node) -> bool:
    """Whether the node writes into one of its arguments."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def functionalize(graph: fx.Graph, roots: set[fx.Node]) -> None:
    """Remove the in-place operations that touch anything computed from `roots`.

    Args:
        graph: changed in place; its nodes carry fake tensors in meta["val"].
        roots: z and the batched further inputs.

    Raises:
        RuntimeError: an in-place operation that has no out-of-place form here.
    """
    dynamic = set(roots)
    parents: dict[fx.Node, fx.Node] = {}
    storages: dict[fx.Node, int] = {}
    position = {node: index for index, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if is_mutation(node) and any(arg in dynamic for arg in node.all_input_nodes):
            _rewrite(graph, node, roots, dynamic, parents, storages, position)
            continue
        if any(arg in dynamic for arg in node.all_input_nodes):
            dynamic.add(node)
        _note_alias(node, parents, storages)


def _note_alias(node: fx.Node, parents: dict, storages: dict) -> None:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return
    # A rewritten value lives on under its old storage's number, so look at the arguments first.
    for arg in node.all_input_nodes:
        source = arg.meta.get("val")
        if isinstance(source, Tensor) and _storage(source) == _storage(value):
            parents[node] = arg
            storages[node] = storages[arg]
            return
    storages[node] = _storage(value)


def _storage(value: Tensor) -> int:
    return value.untyped_storage()._cdata


def _rewrite(graph, node, roots, dynamic, parents, storages, position) -> None:
    target = node.args[0] if node.args else None
    functional = _functional(node)
    if functional is None or not isinstance(target, fx.Node):
        raise RuntimeError(
            f"the decoder changes a tensor in place with {node.target}, which cannot be "
            "differentiated here; write the out-of-place form"
        )
    now = position[node]
    aliases = [
        other
        for other, storage in storages.items()
        if storage == storages[target] and any(position.get(u, -1) > now for u in other.users)
    ]
    with graph.inserting_before(node):
        changed = graph.call_function(functional, node.args, node.kwargs)
        changed.meta = dict(node.meta)
        base, inner = changed, target
        while inner in parents and (aliases or node.users):
            outer = parents[inner]
            scatter = _SCATTER.get(inner.target)
            if scatter is None:
                if all(_descends(alias, inner, parents) for alias in aliases):
                    break
                raise RuntimeError(
                    f"the decoder changes a view made by {inner.target} in place with "
                    f"{node.target} and reads its base again; write the out-of-place form"
                )
            base = graph.call_function(scatter, (outer, base, *inner.args[1:]), inner.kwargs)
            base.meta = {"val": outer.meta["val"]}
            dynamic.add(base)
            inner = outer
        if inner not in parents and inner not in roots and inner.op in ("placeholder", "get_attr"):
            raise RuntimeError(
                f"the decoder writes values that depend on z into {inner.name}, a parameter, "
                "buffer or constant; keep them in local variables"
            )
        dynamic.add(changed)
        storage = storages[target]
        renewed = {inner: base}
        storages[base] = storage
        for alias in [*aliases, target]:
            _renew(graph, alias, renewed, parents, storages, dynamic)
    for old, new in renewed.items():
        old.replace_all_uses_with(new, delete_user_cb=lambda user: position.get(user, -1) > now)
    node.replace_all_uses_with(renewed[target])
    graph.erase_node(node)


def _renew(graph, alias, renewed, parents, storages, dynamic) -> fx.Node:
    """Take an alias again, from the new version of what it is a view of."""
    if alias in renewed:
        return renewed[alias]
    source = _renew(graph, parents[alias], renewed, parents, storages, dynamic)
    new = graph.node_copy(alias, lambda n: source if n is parents[alias] else n)
    parents[new] = source
    storages[new] = storages[alias]
    renewed[alias] = new
    dynamic.add(new)
    return new


def _descends(node: fx.Node, ancestor: fx.Node, parents: dict) -> bool:
    while node is not ancestor:
        if node not in parents:
            return False
        node = parents[node]
    return True


def _functional(node: fx.Node):
    """aten.relu_.default -> aten.relu.default, or None."""
    namespace, _, name = node.target._schema.name.partition("::")
    if not name.endswith("_") or name.endswith("__") or namespace != "aten":
        return None
    packet = getattr(aten, name[:-1], None)
    return getattr(packet, node.target._overloadname, None) if packet is not None else None
