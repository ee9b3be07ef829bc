"""Plain tensors as Jets, where a rule composed of others takes one apart.

A parameter's gradient is found by the tensor itself: what a rule computes from it alone by plain
arithmetic has none.
"""

from __future__ import annotations

from typing import Any

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


def as_jets(*values: Any) -> list[Any]:
    """Each tensor as a Jet, with as many tangents as those have that are; None stays None."""
    m = next(len(x.tangent) for x in values if isinstance(x, Jet))
    return [constant(x, m) if isinstance(x, Tensor) else x for x in values]
