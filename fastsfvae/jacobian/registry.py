"""The registry of tangent rules: one per ATen operation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass
class Rule:
    """How one operation carries tangents.

    Attributes:
        name: the ATen operation without namespace and overload, such as "conv2d".
        forward: takes the operation's arguments with a Jet in place of every tensor that depends
            on z, and returns a Jet (or a tuple with Jets where the operation has several results).
            It is written with differentiable operations, so autograd gives every gradient.
        fused: the same function on the Triton kernels, or None.
        several: whether arguments other than the first may be Jets as well; where they may not
            and one is, the operation is differentiated generically.
    """

    name: str
    forward: Callable[..., Any]
    fused: Callable[..., Any] | None = None
    several: bool = False

    def bind(self, backend: str) -> Callable[..., Any]:
        """The function that runs on the resolved backend, "torch" or "triton"."""
        return self.fused if backend == "triton" and self.fused is not None else self.forward


RULES: dict[str, Rule] = {}


def rule(*names: str, fused: Callable[..., Any] | None = None, several: bool = False):
    """Register the decorated function as the rule of the named ATen operations."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            if name in RULES:
                raise ValueError(f"there are two tangent rules for {name!r}")
            RULES[name] = Rule(name, function, fused, several)
        return function

    return register
