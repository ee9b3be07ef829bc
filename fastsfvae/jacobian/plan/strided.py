"""Views by strides, rewritten as reads and writes at places: `as_strided` and what goes with it.

What such a view shows depends on how its source lies in memory, which a rule may change. The trace
knows how it lies in plain PyTorch, so here its entries are put in that order, and those that the
strides ask for are taken from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fastsfvae.jacobian.plan.nodes import packet_name
from fastsfvae.jacobian.plan.refuse import layer_name

aten = torch.ops.aten

_STRIDED = frozenset({"as_strided", "as_strided_copy", "as_strided_scatter"})
# Views through which a read may reach what lies beside its source.
_WINDOWS = frozenset(
    """
    slice select narrow view view_as reshape unsqueeze squeeze flatten unflatten transpose permute t
    mT alias expand expand_as diagonal unfold
    """.split()
)


def rewrite_strided(graph: fx.Graph, roots: set[fx.Node], paths: dict[fx.Node, str]) -> None:
    """Replace the views by strides of what is computed from `roots`.

    Args:
        graph: changed in place; its nodes carry fake tensors in meta["val"].
        roots: z and the batched further inputs.
        paths: the module of each node.

    Raises:
        RuntimeError: the source has gaps or overlaps in memory.
    """
    dynamic = set(roots)
    switches = any(node.target is torch._C._set_grad_enabled for node in graph.nodes)
    for node in list(graph.nodes):
        if not any(arg in dynamic for arg in node.all_input_nodes):
            continue
        dynamic.add(node)
        target = node.target
        if isinstance(target, torch._ops.OpOverload) and packet_name(target) in _STRIDED:
            # Where no gradients are taken, a view is no way back to what has them.
            new = _rewritten(graph, node, not switches, layer_name(paths.get(node, "")))
            paths[new] = paths.get(node, "")
            dynamic.add(new)
            node.replace_all_uses_with(new)
            graph.erase_node(node)


def _rewritten(graph: fx.Graph, node: fx.Node, beyond: bool, module: str) -> fx.Node:
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
    x: fx.Node = given["self"]
    source = _whole(x) if beyond and "src" not in given else x
    value: Tensor = source.meta["val"]
    offset = given.get("storage_offset")
    offset = x.meta["val"].storage_offset() if offset is None else offset
    order = _order(value)
    if order is None or not all(
        isinstance(k, (int, fx.Node)) for k in (offset, value.storage_offset())
    ):
        raise RuntimeError(
            f"{module} takes {node.target} of a value with gaps or overlaps in memory: call "
            ".contiguous() before it, or index"
        )
    with graph.inserting_before(node):

        def call(target: Any, args: tuple, meta: Any) -> fx.Node:
            made = graph.call_function(target, args)
            made.meta["val"] = meta
            return made

        laid = value.permute(order)
        ordered = call(aten.permute.default, (source, order), laid)
        flat = call(aten.reshape.default, (ordered, [-1]), laid.reshape(-1))
        shape = given["src"].meta["val"] if "src" in given else node.meta["val"]
        start = value.storage_offset()
        device = value.device
        where = (given["size"], given["stride"], offset, start, device)
        places = call(storage_places, where, torch.empty_like(shape, dtype=torch.long))
        if "src" not in given:
            return call(aten.index.Tensor, (flat, [places]), node.meta["val"])
        put = call(aten.put.default, (flat, places, given["src"]), flat.meta["val"])
        back = call(aten.view_as.default, (put, ordered), laid)
        inverse = [order.index(axis) for axis in range(len(order))]
        return call(aten.permute.default, (back, inverse), node.meta["val"])


def storage_places(
    size: Sequence[int], stride: Sequence[int], offset: int, start: int, device: torch.device
) -> Tensor:
    """Where in memory the entries of a view by strides lie, counted from `start`."""
    places = torch.tensor(offset - start, device=device)
    for axis, (extent, step) in enumerate(zip(size, stride, strict=True)):
        along = torch.arange(extent, device=device) * step
        places = places + along.view(-1, *[1] * (len(size) - axis - 1))
    return places


def _whole(x: fx.Node) -> fx.Node:
    """The value that a chain of views was taken from."""
    while isinstance(x.target, torch._ops.OpOverload) and packet_name(x.target) in _WINDOWS:
        source: Any = x.args[0]
        if _memory(source) != _memory(x):
            break
        x = source
    return x


def _memory(node: fx.Node) -> int:
    return node.meta["val"].untyped_storage()._cdata


def _order(value: Tensor) -> list[int] | None:
    """The axes from the slowest to the fastest in memory; None where there are gaps or overlaps."""
    sizes, strides = ([_number(k) for k in numbers] for numbers in (value.shape, value.stride()))
    # An axis of one entry has its place by its neighbours.
    order = sorted(range(value.ndim), key=lambda axis: (-strides[axis], sizes[axis] > 1))
    expected = 1
    for axis in reversed(order):
        if sizes[axis] != 1 and strides[axis] != expected:
            return None
        expected *= sizes[axis]
    return order


def _number(size: Any) -> int:
    """A size of the traced batch, without a guard on it."""
    return size if isinstance(size, int) else int(size.node.hint)
