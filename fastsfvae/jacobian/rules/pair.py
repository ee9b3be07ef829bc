"""Smooth functions of two values, by their first and second derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsfvae.jacobian.rules.arithmetic import combine
from fastsfvae.jacobian.rules.jet import Jet, align, join, primal_of
from fastsfvae.jacobian.rules.registry import adjoint, always, rule

# The derivatives by the first and by the second operand, from both and the result.
Slopes = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
# The second ones, from the two operands, the result and the first ones: by the first operand
# twice, by both, by the second twice; None where it is zero everywhere.
Bends = Callable[..., tuple[Tensor | None, Tensor | None, Tensor | None]]


def pair(
    *names: str, operation: Callable[..., Tensor], slopes: Slopes, bends: Bends
) -> Callable[..., Jet]:
    """Register the rule and the adjoint of the named operations f(a, b); returns the rule.

    Args:
        *names: ATen operations.
        operation: f, of tensors of any shapes that broadcast, or numbers where it takes them.
        slopes: written in operations that can be differentiated again.
        bends: see `Bends`.
    """

    @rule(*names, several=True)
    def forward(a: Any, b: Any) -> Jet:
        y = operation(primal_of(a), primal_of(b))
        by_a, by_b = slopes(_as(a, y), _as(b, y), y)
        return combine(y, (a, by_a), (b, by_b))

    @adjoint(*names, covers=always)
    def pull(grad: Jet, out: Jet, needs: tuple, a: Any, b: Any) -> tuple[Any, Any]:
        y = out.primal
        values = _as(a, y), _as(b, y)
        by_a, by_b = slopes(*values, y)
        twice_a, both, twice_b = bends(*values, y, by_a, by_b)
        moved = [align(x, y.ndim) if isinstance(x, Jet) else None for x in (a, b)]
        return (
            _pulled(grad, a, by_a, zip((twice_a, both), moved, strict=True)) if needs[0] else None,
            _pulled(grad, b, by_b, zip((both, twice_b), moved, strict=True)) if needs[1] else None,
        )

    return forward


def _as(x: Any, y: Tensor) -> Tensor:
    return torch.as_tensor(primal_of(x), dtype=y.dtype, device=y.device)


def _pulled(grad: Jet, operand: Any, slope: Tensor, terms: Any) -> Any:
    """The gradient of one operand: a Jet for a Jet, a tensor for a tensor.

    Args:
        grad: of the result.
        operand: the operand.
        slope: the derivative by it.
        terms: (second derivative by it and an operand, that operand's tangents), None for zero.
    """
    value = grad.primal * slope
    for bend, moved in terms:
        if bend is not None and moved is not None:
            value = join(value, (grad.tangent * moved).sum(0) * bend)
    return Jet(value, grad.tangent * slope) if isinstance(operand, Jet) else value


def _atan2_slopes(y: Tensor, x: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    square = x * x + y * y
    # The origin gets derivative zero, as PyTorch's backward gives it.
    origin = square == 0
    inverse = torch.where(origin, 0.0, 1 / torch.where(origin, 1.0, square))
    return x * inverse, -y * inverse


def _atan2_bends(y, x, angle, by_y, by_x):
    # That by x twice is minus that by y twice.
    twice = 2 * by_y * by_x
    return twice, by_x * by_x - by_y * by_y, -twice


atan2 = pair("atan2", "arctan2", operation=torch.atan2, slopes=_atan2_slopes, bends=_atan2_bends)
pair(
    "hypot",
    operation=torch.hypot,
    slopes=lambda a, b, y: (a / y, b / y),
    bends=lambda a, b, y, by_a, by_b: (by_b * by_b / y, -by_a * by_b / y, by_a * by_a / y),
)


def _logaddexp(name: str, operation: Callable[..., Tensor], scale: float) -> Callable[..., Jet]:
    def slopes(a: Tensor, b: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        # Equal operands may be infinite.
        gap = torch.where(a == b, 0.0, a - b) * scale
        return torch.sigmoid(gap), torch.sigmoid(-gap)

    def bends(a, b, y, by_a, by_b):
        bend = scale * by_a * by_b
        return bend, -bend, bend

    return pair(name, operation=operation, slopes=slopes, bends=bends)


logaddexp = _logaddexp("logaddexp", torch.logaddexp, 1.0)
_logaddexp("logaddexp2", torch.logaddexp2, math.log(2))


def _times_logarithm(
    name: str, operation: Callable[..., Tensor], shift: float, logarithm: Callable[[Tensor], Tensor]
) -> None:
    """The first times log(shift + the second); zero where the first is, whatever that is."""

    def slopes(a: Tensor, b: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        masked = (a == 0) & (b <= -shift)
        log = torch.where(masked, 0.0, logarithm(torch.where(masked, 1.0, b)))
        return log, a / (shift + b)

    def bends(a, b, y, by_a, by_b):
        inverse = 1 / (shift + b)
        return None, inverse, -by_b * inverse

    pair(name, operation=operation, slopes=slopes, bends=bends)


_times_logarithm("xlogy", torch.xlogy, 0.0, torch.log)
_times_logarithm("special_xlog1py", torch.special.xlog1py, 1.0, torch.log1p)
