"""Values without tangents that a gradient goes through, inside the chunk loop.

What is computed there from parameters alone (a mask token, expanded to the batch) is run by the
same rules, as a Jet along one direction of no extent, so that a tape finds its adjoints.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsfvae.jacobian.rules.jet import Jet
from fastsfvae.jacobian.rules.registry import adjoint, rule


@rule("fastsfvae.lift")
def lift(value: Tensor) -> Jet:
    """A value as a Jet whose one tangent is zero."""
    return Jet(value, _zero_tangent(value))


@adjoint("fastsfvae.lift", covers=lambda args, kwargs: True)
def _lift_adjoint(grad: Jet, out: Jet, needs: tuple, value: Tensor) -> tuple[Tensor]:
    return (grad.primal,)


@rule("fastsfvae.lower")
def lower(x: Jet) -> Tensor:
    """The value of a Jet, as a tensor of its own."""
    return torch.ops.aten.alias(x.primal)


@adjoint("fastsfvae.lower")
def _lower_adjoint(grad: Tensor, out: Tensor, needs: tuple, x: Jet) -> tuple[Jet]:
    return (Jet(grad, torch.zeros_like(x.tangent)),)


def _zero_tangent(value: Tensor) -> Tensor:
    return value.new_zeros(()).expand(1, *value.shape)
