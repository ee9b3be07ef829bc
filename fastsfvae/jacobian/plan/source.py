"""Write a plan's functions as straight-line Python.

Run from source, an operation costs a call; interpreted from its graph it would cost 10 to 20 us
more.
"""

from __future__ import annotations

import keyword
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx

from fastsfvae.jacobian.plan.nodes import is_control

_INDENT = "    "
# A line of code and the node whose value it computes.
Statement = tuple[str, fx.Node]


class Source:
    """The text of functions over one graph's inputs, and the values that it names.

    Args:
        params: the graph's inputs that a function takes as `tensors`.
        z: the one that it takes as `z`.
        extras: those that it takes as `extras`.
    """

    def __init__(self, params: list[fx.Node], z: fx.Node, extras: list[fx.Node]):
        self._params, self._z, self._extras = params, z, extras
        # The names that values have in the text, where they are not their nodes' own.
        self.names: dict[fx.Node, str] = {}
        self._functions: dict[str, str] = {}
        self._namespace: dict[str, Any] = {
            "torch": torch,
            "device": torch.device,
            "inf": float("inf"),
            "nan": float("nan"),
        }

    def __str__(self) -> str:
        """All functions."""
        return "\n\n".join(self._functions.values())

    def text(self, value: Any, inner: Callable[[Any], str] | None = None) -> str:
        """An argument as an expression; `inner` writes what lies in a list, a tuple or a slice."""
        inner = inner or self.text
        if isinstance(value, fx.Node):
            return self.names.get(value, value.name)
        if isinstance(value, list):
            return f"[{', '.join(inner(item) for item in value)}]"
        if isinstance(value, tuple):
            return f"({''.join(inner(item) + ', ' for item in value)})"
        if isinstance(value, slice):
            return f"slice({inner(value.start)}, {inner(value.stop)}, {inner(value.step)})"
        return repr(value)

    def bind(self, name: str, value: Any) -> str:
        """Make a value reachable from the generated code under a free name."""
        name = identifier(name)
        candidate, count = name, 0
        while candidate in self._namespace and self._namespace[candidate] is not value:
            count += 1
            candidate = f"{name}_{count}"
        self._namespace[candidate] = value
        return candidate

    def function(
        self,
        name: str,
        parameters: str,
        statements: list[Statement],
        results: list[fx.Node],
        result: str,
        unpacked: Sequence[tuple[str, str]] = (),
    ) -> None:
        """Write a function.

        Args:
            name: its name.
            parameters: as in its signature.
            statements: its lines, with the nodes that they compute.
            results: the nodes that outlive it.
            result: the expression that it returns.
            unpacked: pairs (names, parameter) to be unpacked first.
        """
        lines = [f"def {name}({parameters}):"]
        lines += [f"{_INDENT}{values} = {source}" for values, source in unpacked]
        lines += self._unpack(statements, results)
        lines += _with_deletions(statements, set(results))
        self._functions[name] = "\n".join([*lines, f"{_INDENT}return {result}"]) + "\n"

    def _unpack(self, statements: list[Statement], results: list[fx.Node]) -> list[str]:
        wanted = {arg for _, node in statements for arg in node.all_input_nodes} | set(results)
        lines = [
            f"{_INDENT}{node.name} = {source}[{index}]"
            for source, nodes in (("tensors", self._params), ("extras", self._extras))
            for index, node in enumerate(nodes)
            if node in wanted
        ]
        if self._z in wanted and self._z.name != "z":
            lines.append(f"{_INDENT}{self._z.name} = z")
        return lines

    def run(self) -> list[Callable[..., Any]]:
        """The functions, in the order in which they were written."""
        exec(compile(str(self), "<fastsfvae plan>", "exec"), self._namespace)
        return [self._namespace[name] for name in self._functions]


def _with_deletions(statements: list[Statement], kept: set[fx.Node]) -> list[str]:
    """The lines, with `del` after a value's last use so that memory is returned early."""
    mine = {node for line, node in statements}
    last: dict[fx.Node, int] = {}
    for index, (_, node) in enumerate(statements):
        last[node] = index
        for arg in node.all_input_nodes:
            last[arg] = index
    dying: dict[int, list[str]] = {}
    for node, index in last.items():
        if node in mine and node not in kept and not is_control(node):
            dying.setdefault(index, []).append(node.name)
    lines = []
    for index, (line, _) in enumerate(statements):
        lines.append(_INDENT + line)
        if index in dying:
            lines.append(f"{_INDENT}del {', '.join(dying[index])}")
    if any(is_control(node) for _, node in statements):
        lines.insert(0, f"{_INDENT}ambient = torch.is_grad_enabled()")
    return lines


def identifier(text: str) -> str:
    """A Python name made of any text."""
    name = "".join(c if c.isalnum() or c == "_" else "_" for c in text)
    return name + "_" if keyword.iskeyword(name) else name


def tuple_text(items: Iterable[str]) -> str:
    """A tuple of expressions."""
    return f"({''.join(item + ', ' for item in items)})"
