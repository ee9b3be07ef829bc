"""Plain tensors as Jets, where a rule composed of others takes one apart.

A parameter's gradient is found by the tensor itself: what a rule computes from it alone by plain
arithmetic has none.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastsfvae.jacobian.rules.jet import Jet
from fastsfvae.jacobian.rules.pieces import zero_tangent
from fastsfvae.jacobian.rules.registry import adjoint, always, rule


@rule("fastsfvae.constant", several=True)
def constant(value: Tensor, like: Tensor) -> Jet:
    """A value with as many tangents as those of another, all zero and without storage."""
    return Jet(value, zero_tangent(value, like))


@adjoint("fastsfvae.constant", covers=always)
def _constant_adjoint(grad: Jet, out: Jet, needs: tuple, value: Tensor, like: Tensor) -> tuple:
    return (grad.primal,)


def as_jets(*values: Any) -> list[Any]:
    """Each tensor as a Jet, by the first one that is; None stays None."""
    like = next(x.tangent for x in values if isinstance(x, Jet))
    return [constant(x, like) if isinstance(x, Tensor) else x for x in values]
