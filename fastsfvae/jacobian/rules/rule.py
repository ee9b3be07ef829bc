"""A tangent rule: how one operation carries tangents, and how their gradients come back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastsfvae.jacobian.rules.jet import Jet, flat, primal_of


@dataclasses.dataclass(eq=False)
class Rule:
    """How one operation carries tangents, and how their gradients come back.

    Attributes:
        name: the ATen operation without namespace and overload, such as "conv2d".
        forward: takes the operation's arguments with a Jet in place of every tensor that depends
            on z, and returns a Jet (or a tuple with Jets where the operation has several results).
            It is written with differentiable operations, so autograd gives every gradient.
        triton: the same on the Triton kernels, or None. It covers the calls that they take, and has
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
    triton: Rule | None = None
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
        """The rule that runs a call on the resolved backend: this one, or `triton`."""
        other = self.triton if backend == "triton" else None
        if other is None or primal_of(args[0]).is_complex():
            return self
        return other if other.pulls(args, kwargs) else self
