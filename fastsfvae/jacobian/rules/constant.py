"""Plain tensors as Jets whose tangents are zero, and back.

A tape finds a parameter's gradient by the tensor itself: what plain arithmetic makes of it has
none. So where a rule composed of others takes a parameter apart, or a plan computes something from
parameters inside its chunk loop (a mask token, expanded to the batch), that runs on Jets as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsfvae.jacobian.rules.jet import Jet
from fastsfvae.jacobian.rules.registry import adjoint, rule


@rule("fastsfvae.constant")
def constant(value: Tensor, m: int) -> Jet:
    """A value with m tangents of zero, which have no storage."""
    return Jet(value, value.new_zeros(()).expand(m, *value.shape))


@adjoint("fastsfvae.constant")
def _constant_adjoint(grad: Jet, out: Jet, needs: tuple, value: Tensor, m: int) -> tuple[Tensor]:
    return (grad.primal,)


@rule("fastsfvae.value_of")
def value_of(x: Jet) -> Tensor:
    """The value of a Jet, as a tensor of its own."""
    return torch.ops.aten.alias(x.primal)


@adjoint("fastsfvae.value_of")
def _value_of_adjoint(grad: Tensor, out: Tensor, needs: tuple, x: Jet) -> tuple[Jet]:
    return (Jet(grad, torch.zeros_like(x.tangent)),)


def as_jets(*values: Any) -> list[Any]:
    """Each tensor as a Jet, with as many tangents as those have that are; None stays None."""
    m = next(len(x.tangent) for x in values if isinstance(x, Jet))
    return [constant(x, m) if isinstance(x, Tensor) else x for x in values]
