"""Operations that are others by another name: copies in place of views, turns, plain aliases."""

from __future__ import annotations

from typing import Any

from fastsfvae.jacobian.rules import arrange as arrange
from fastsfvae.jacobian.rules.jet import Jet
from fastsfvae.jacobian.rules.registry import RULES, bind, rule
from fastsfvae.jacobian.rules.shape import front, reshape, transpose

for _name in "view permute expand transpose t squeeze unsqueeze".split():
    rule(f"{_name}_copy", composed=True)(bind(RULES[_name]))


@rule("alias", "alias_copy", "lift", "lift_fresh", "lift_fresh_copy", composed=True)
def alias(x: Jet) -> Jet:
    """The same value."""
    return x


@rule("_unsafe_view", "_reshape_alias", composed=True)
def reshaped(x: Jet, size: list[int], *_: Any) -> Jet:
    """With another shape."""
    return reshape(x, size)


@rule("rot90", composed=True)
def rot90(x: Jet, k: int = 1, dims: Any = (0, 1)) -> Jet:
    """Turned by k quarters in the plane of two axes."""
    flip, (a, b) = bind(RULES["flip"]), (front(d, x.primal.ndim) for d in dims)
    if k % 4 == 0:
        return x
    if k % 4 == 2:
        return flip(x, [a, b])
    return flip(transpose(x, a, b), [a if k % 4 == 1 else b])
