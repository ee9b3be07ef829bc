"""The registry of tangent rules: one per ATen operation.

A rule carries tangents forward. With an adjoint it also pulls gradients of (value, tangents) back
by hand, so that a sweep over a chunk of samples needs no autograd.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastsfvae._ranges import span
from fastsfvae.jacobian.rules.jet import Jet
from fastsfvae.jacobian.rules.tape import current_tape, flat


@dataclasses.dataclass(eq=False)
class Rule:
    """How one operation carries tangents, and how their gradients come back.

    Attributes:
        name: the ATen operation without namespace and overload, such as "conv2d".
        forward: takes the operation's arguments with a Jet in place of every tensor that depends
            on z, and returns a Jet (or a tuple with Jets where the operation has several results).
            It is written with differentiable operations, so autograd gives every gradient.
        fused: the same on the Triton kernels, or None. It covers the calls that they take, and has
            two more arguments behind the first: a bias to be added to the value, or None, and its
            axis there. So the layer in front can leave its bias to the kernel's one pass.
        several: whether arguments other than the first may be Jets as well; where they may not
            and one is, the operation is differentiated generically.
        composed: whether `forward` does all its work on Jets and parameters by calling other
            rules, whose adjoints are then its own.
        adjoint: ``(grad, out, needs, *args, **kwargs) -> gradients of args``; see `adjoint`.
        covers: ``(args, kwargs) -> bool``, whether the adjoint (or, for a composed rule, those of
            its parts) is right for a call; asked when a plan is built, with the trace's fake
            tensors in the Jets. None where only the first argument may be a Jet.
        lean: `forward` where no autograd records it and an adjoint follows: called with the
            arguments after ``private``, which tells whether it may overwrite its first one.
        fresh: whether results and gradients lie in new memory that nothing else refers to.
        overwrites: whether the adjoint may write into `grad`.
    """

    name: str
    forward: Callable[..., Any]
    fused: Rule | None = None
    several: bool = False
    composed: bool = False
    adjoint: Callable[..., Any] | None = None
    covers: Callable[..., bool] | None = None
    lean: Callable[..., Any] | None = None
    fresh: bool = False
    overwrites: bool = False

    def pulls(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Whether gradients of a call can be pulled back by hand."""
        if self.adjoint is None and not self.composed:
            return False
        if any(isinstance(value, (Jet, Tensor)) for value in kwargs.values()):
            return False
        if self.covers is not None:
            return self.covers(args, kwargs)
        return not any(isinstance(arg, Jet) for arg in flat(args[1:]))

    def on(self, backend: str, args: tuple, kwargs: dict[str, Any]) -> Rule:
        """The rule that runs a call on the resolved backend: this one, or `fused`."""
        fused = self.fused if backend == "triton" else None
        return fused if fused is not None and fused.pulls(args, kwargs) else self

    def bind(self, private: bool = False, label: str = "") -> Callable[..., Any]:
        """The function that runs, and is recorded where a tape is running.

        Args:
            private: whether nothing else reads the first argument's memory.
            label: its name for a profiler; that of the rule where none is given.
        """
        label = label or self.name

        def run(*args: Any, **kwargs: Any) -> Any:
            tape = current_tape()
            with span(label):
                if tape is None:
                    return self.forward(*args, **kwargs)
                if self.lean is not None:
                    return tape.record(self, self.lean, (private, *args), kwargs, label, skip=1)
                return tape.record(self, self.forward, args, kwargs, label)

        return run


RULES: dict[str, Rule] = {}


def rule(
    *names: str,
    fused: Rule | None = None,
    several: bool = False,
    composed: bool = False,
    covers: Callable[..., bool] | None = None,
):
    """Register the decorated function as the rule of the named ATen operations.

    What it returns calls the function, and notes the call where a tape is running: rules may call
    one another.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            if name in RULES:
                raise ValueError(f"there are two tangent rules for {name!r}")
            RULES[name] = Rule(name, function, fused, several, composed, covers=covers)
        return RULES[names[0]].bind()

    return register


def always(args: tuple, kwargs: dict[str, Any]) -> bool:
    """What `covers` is where any argument may be a Jet."""
    return True


def adjoint(
    *names: str,
    covers: Callable[..., bool] | None = None,
    lean: Callable[..., Any] | None = None,
    fresh: bool = False,
    overwrites: bool = False,
):
    """Register the decorated function as the adjoint of the rules of the named operations.

    It is called as ``(grad, out, needs, *args, **kwargs)`` with the rule's arguments and result.
    `grad` is a Jet of gradients of `out`, tangents with `out`'s own extents; for an operation with
    several results it is a tuple with None where a gradient is missing. `needs` has one entry for
    each of args: whether its gradient is wanted (a list for a list). It returns a tuple with the
    gradients of the leading args: a Jet for a Jet, a tensor for a tensor, None for nothing.
    Whatever was broadcast may be left so: the tape sums it and casts it to the argument's dtype.

    Args:
        *names: ATen operations that have rules.
        covers: see `Rule`.
        lean: see `Rule`.
        fresh: see `Rule`.
        overwrites: see `Rule`.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            entry = RULES[name]
            entry.adjoint, entry.covers, entry.lean = function, covers, lean
            entry.fresh, entry.overwrites = fresh, overwrites
        return function

    return register
