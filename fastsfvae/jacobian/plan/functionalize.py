"""Rewrite in-place operations on values that depend on the batch into out-of-place ones.

Jets are immutable pairs, so `nn.ReLU(inplace=True)`, `h += x` and `out[:, :3] = h` become new
values here: the changed view is scattered back into its base, and every alias that is read later
is taken again from the new base. In-place operations on parameters, buffers and constants alone
(the power iteration of spectral_norm) stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

# What puts a changed view back into what it was taken from, with the view's own arguments.
_SCATTER: dict[Any, Any] = {
    aten.select.int: aten.select_scatter.default,
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.diagonal.default: aten.diagonal_scatter.default,
}
# Views that have all entries of their source in the same order.
_RESHAPED = frozenset(
    "view reshape flatten unflatten unsqueeze squeeze view_as reshape_as ravel".split()
)
_TRANSPOSED = frozenset("transpose swapaxes swapdims t mT numpy_T".split())


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
    _Functionalizer(graph, roots).run()


class _Functionalizer:
    def __init__(self, graph: fx.Graph, roots: set[fx.Node]):
        self.graph, self.roots = graph, roots
        self.dynamic = set(roots)
        # A view's source, and the storage that all views of one base share.
        self.source: dict[fx.Node, fx.Node] = {}
        self.storage: dict[fx.Node, int] = {}
        self.apart: set[fx.Node] = set()
        self.position = {node: index for index, node in enumerate(graph.nodes)}

    def run(self) -> None:
        for node in list(self.graph.nodes):
            touched = any(arg in self.dynamic for arg in node.all_input_nodes)
            if touched and is_mutation(node):
                self._rewrite(node)
                continue
            if touched:
                self.dynamic.add(node)
            self._note_alias(node)

    def _note_alias(self, node: fx.Node) -> None:
        address = _address(node)
        if address is None:
            return
        if any(arg in self.apart for arg in node.all_input_nodes):
            self.storage[node] = -1 - self.position[node]
            return
        self.storage[node] = address
        for arg in node.all_input_nodes:
            if _address(arg) == address:
                self.source[node] = arg
                self.storage[node] = self.storage[arg]
                break
        if isinstance(node.meta["val"], (tuple, list)) and "unsafe_" in str(node.target):
            # Nothing reads its source again, nor another piece when one is changed.
            self.apart.add(node)

    def _rewrite(self, node: fx.Node) -> None:
        target = node.args[0] if node.args else None
        functional = _functional_form(node.target)
        if functional is None or not isinstance(target, fx.Node):
            raise RuntimeError(
                f"the decoder changes a tensor in place with {node.target}, which cannot be "
                "differentiated here; write the out-of-place form"
            )
        now = self.position[node]
        if torch.Tag.inplace_view in getattr(node.target, "tags", ()):
            self._view_instead(node, target, functional)
            return
        aliases = [
            other
            for other, storage in self.storage.items()
            if storage == self.storage[target] and self._read_after(other, now)
        ]
        with self.graph.inserting_before(node):
            changed = self.graph.call_function(functional, node.args, node.kwargs)
            changed.meta = dict(node.meta)
            self.dynamic.add(changed)
            inner, base = self._scatter_back(node, target, changed, aliases)
            self.storage[base] = self.storage[target]
            renewed = {inner: base}
            for alias in [*aliases, target]:
                self._renew(alias, renewed)
        for old, new in renewed.items():
            old.replace_all_uses_with(new, delete_user_cb=lambda user: self._is_after(user, now))
        node.replace_all_uses_with(renewed[target])
        self.graph.erase_node(node)

    def _view_instead(self, node: fx.Node, target: fx.Node, functional: Any) -> None:
        """Give what gets other axes in place a name of its own: its memory stays as it is."""
        with self.graph.inserting_before(node):
            view = self.graph.call_function(functional, node.args, node.kwargs)
        view.meta, now = dict(node.meta), self.position[node]
        self.dynamic.add(view)
        self.source[view], self.storage[view] = target, self.storage[target]
        target.replace_all_uses_with(view, delete_user_cb=lambda user: self._is_after(user, now))
        node.replace_all_uses_with(view)
        self.graph.erase_node(node)

    def _scatter_back(
        self, node: fx.Node, target: fx.Node, changed: fx.Node, aliases: list[fx.Node]
    ) -> tuple[fx.Node, fx.Node]:
        """Carry a changed view into what it is a view of: (the old base, its new value)."""
        inner, base = target, changed
        while inner in self.source and aliases:
            outer = self.source[inner]
            undone = _undone(inner, outer, base)
            if undone is None:
                if all(self._descends(alias, inner) for alias in aliases):
                    break
                raise RuntimeError(
                    f"the decoder changes a view made by {inner.target} in place with "
                    f"{node.target} and reads its base again; write the out-of-place form"
                )
            base = self.graph.call_function(*undone)
            base.meta = {"val": outer.meta["val"]}
            self.dynamic.add(base)
            inner = outer
        held = inner.op in ("placeholder", "get_attr") and inner not in self.roots
        if held and inner not in self.source:
            raise RuntimeError(
                f"the decoder writes values that depend on z into {inner.name}, a parameter, "
                "buffer or constant; keep them in local variables"
            )
        return inner, base

    def _renew(self, alias: fx.Node, renewed: dict[fx.Node, fx.Node]) -> fx.Node:
        """Take an alias again, from the new version of what it is a view of."""
        if alias in renewed:
            return renewed[alias]
        old = self.source[alias]
        source = self._renew(old, renewed)
        new = self.graph.node_copy(alias, lambda n: source if n is old else n)
        self.source[new] = source
        self.storage[new] = self.storage[alias]
        self.dynamic.add(new)
        renewed[alias] = new
        return new

    def _descends(self, node: fx.Node, ancestor: fx.Node) -> bool:
        while node is not ancestor:
            if node not in self.source:
                return False
            node = self.source[node]
        return True

    def _is_after(self, node: fx.Node, now: int) -> bool:
        # Nodes made here stand before everything that is still to come.
        return self.position.get(node, -1) > now

    def _read_after(self, node: fx.Node, now: int) -> bool:
        return any(self._is_after(user, now) for user in node.users)


def _undone(view: fx.Node, outer: fx.Node, changed: fx.Node) -> tuple[Any, tuple, dict] | None:
    """The call that puts a changed view back into what it was taken from, None if there is none."""
    target: Any = view.target
    if target in _SCATTER:
        return _SCATTER[target], (outer, changed, *view.args[1:]), view.kwargs
    if not isinstance(target, torch._ops.OpOverload):
        return None
    name = target._schema.name.partition("::")[2]
    if name in _RESHAPED:
        return aten.reshape_as.default, (changed, outer), {}
    if name in _TRANSPOSED:
        return target, (changed, *view.args[1:]), view.kwargs
    if name == "permute":
        order: Any = view.args[1]
        axes = [axis % len(order) for axis in order]
        return target, (changed, [axes.index(axis) for axis in range(len(axes))]), {}
    if name == "narrow":
        args: Any = view.args
        dim, start, length = args[1:]
        return aten.slice_scatter.default, (outer, changed, dim, start, start + length), {}
    if name == "alias":
        return target, (changed,), {}
    return None


def _address(node: fx.Node) -> int | None:
    """Of the memory that a tensor, or the first of several, lies in."""
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else [value]
    # A sparse tensor lies in several places, and is written to in none.
    dense = (v for v in values if isinstance(v, Tensor) and v.layout is torch.strided)
    found = next(dense, None)
    return None if found is None else found.untyped_storage()._cdata


def _functional_form(target: Any) -> Any:
    """aten.relu_.default -> aten.relu.default, or None."""
    namespace, _, name = target._schema.name.partition("::")
    if namespace != "aten" or not name.endswith("_") or name.endswith("__"):
        return None
    if target is aten.transpose_.default:
        return aten.transpose.int
    packet = getattr(aten, name[:-1], None)
    return getattr(packet, target._overloadname, None)
