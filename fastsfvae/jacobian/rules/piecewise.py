"""Functions that are linear piece by piece: bounds, remainders, signs.

Where pieces meet, PyTorch's versions differ in what each operand gets: it is asked once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes

from fastsfvae.jacobian.rules.arithmetic import combine
from fastsfvae.jacobian.rules.jet import Jet, move, primal_of
from fastsfvae.jacobian.rules.registry import adjoint, always, rule


def _piecewise(
    *names: str, operation: Callable[..., Tensor], slopes: Callable[..., tuple[Any, ...]]
) -> Callable[..., Jet]:
    """Register the rule and the adjoint of operations on values that broadcast.

    Args:
        *names: ATen operations.
        operation: of tensors and numbers.
        slopes: the derivative by each operand, from the operands' values.
    """

    @rule(*names, several=True)
    def forward(*operands: Any, **named: Any) -> Jet:
        operands = _in_order(operands, named)
        values = [primal_of(x) for x in operands]
        return combine(operation(*values), *zip(operands, slopes(*values), strict=False))

    @adjoint(*names, covers=always)
    def pull(grad: Jet, out: Jet, needs: tuple, *operands: Any, **named: Any) -> tuple[Any, ...]:
        operands = _in_order(operands, named)
        factors = slopes(*map(primal_of, operands))
        return tuple(
            _scaled(grad, x, factor) if need else None
            for x, factor, need in zip(operands, factors, needs, strict=False)
        )

    return forward


def _in_order(operands: tuple, named: dict[str, Any]) -> tuple:
    if not named:
        return operands
    return operands[0], *operands[1:], *(named.get(k) for k in ("min", "max")[len(operands) - 1 :])


def _scaled(grad: Jet, operand: Any, factor: Any) -> Any:
    """The gradient of an operand: a Jet for a Jet, a tensor for a tensor."""
    if isinstance(factor, int) and factor == 1:
        return grad if isinstance(operand, Jet) else grad.primal
    if isinstance(operand, Jet):
        return move(grad, lambda g, _: g * factor)
    return grad.primal * factor


def _shares(operation: Callable[..., Tensor], *values: float) -> list[float]:
    """What PyTorch's backward gives each operand at a point, whatever mode this is imported in."""
    with (
        _disable_current_modes(),
        temporarily_clear_interpreter_stack(),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        options: dict[str, Any] = {"dtype": torch.float64, "device": "cpu", "requires_grad": True}
        leaves = [torch.tensor(value, **options) for value in values]
        return [float(g) for g in torch.autograd.grad(operation(*leaves), leaves)]


# Of the value at a bound that is a number, and at one that is a tensor; of the value where it and
# both bounds are equal; of the lower bound where it equals the upper one and both are larger.
(_AT_NUMBER,) = _shares(lambda x: torch.clamp(x, 0.0, 2.0), 0.0)
_AT_TENSOR = _shares(torch.clamp, 0.0, 0.0, 2.0)[0]
_ALL_EQUAL = _shares(torch.clamp, 1.0, 1.0, 1.0)[0]
_EQUAL_ABOVE = _shares(torch.clamp, 0.0, 1.0, 1.0)[1]
# Of the first operand where both are equal.
_AT_TIE = _shares(torch.fmax, 1.0, 1.0)[0]


def _clamp_slopes(x: Any, low: Any = None, high: Any = None) -> tuple[Any, ...]:
    """What the value, the lower and the upper bound count for in the result.

    PyTorch returns the upper bound where the bounds cross.
    """
    numbers = not isinstance(low, Tensor) and not isinstance(high, Tensor)
    low = -math.inf if low is None else low
    high = math.inf if high is None else high
    inside = ((x > low) & (x < high)).to(x.dtype)
    if numbers:
        if _AT_NUMBER != 0:
            edge = ((x == low) | (x == high)) & (x >= low) & (x <= high)
            inside = inside + _AT_NUMBER * edge
        return inside, None, None
    ordered, equal = torch.as_tensor(low < high), torch.as_tensor(low == high)
    at_low, at_high = (x == low) & ordered, (x == high) & ordered
    value = inside + _AT_TENSOR * (at_low | at_high) + _ALL_EQUAL * (equal & (x == low))
    below = ((x < low) & ordered) + (1 - _AT_TENSOR) * at_low + _EQUAL_ABOVE * ((x < low) & equal)
    above = ((x > high) | ~(ordered | equal)) + (1 - _AT_TENSOR) * at_high
    return value.to(x.dtype), below.to(x.dtype), above.to(x.dtype)


def _clamp(x: Any, low: Any = None, high: Any = None) -> Tensor:
    return torch.clamp(x, low, high)


clamp = _piecewise("clamp", "clip", operation=_clamp, slopes=_clamp_slopes)


@rule("clamp_min", several=True, composed=True, covers=always)
def clamp_min(x: Any, min: Any) -> Jet:  # noqa: A002
    """Clamp from below."""
    return clamp(x, min, None)


@rule("clamp_max", several=True, composed=True, covers=always)
def clamp_max(x: Any, max: Any) -> Jet:  # noqa: A002
    """Clamp from above."""
    return clamp(x, None, max)


def _extreme(name: str, sign: int) -> None:
    """The larger (or smaller) of two values, the other one of nan."""

    def slopes(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.result_type(a, b)
        first = ((sign * a > sign * b) | b.isnan()).to(dtype) + _AT_TIE * (a == b)
        return first, 1 - first

    _piecewise(name, operation=getattr(torch, name), slopes=slopes)


_extreme("fmax", 1)
_extreme("fmin", -1)


def _remainder(name: str, mode: str) -> None:
    """A - b * (a / b, rounded)."""

    def slopes(a: Any, b: Any) -> tuple[Any, Any]:
        if not isinstance(b, Tensor):
            return 1, None
        a = torch.as_tensor(a, dtype=torch.result_type(a, b), device=b.device)
        return 1, -torch.div(a, b, rounding_mode=mode)

    _piecewise(name, operation=getattr(torch, name), slopes=slopes)


_remainder("remainder", "floor")
_remainder("fmod", "trunc")


def _copysign_slopes(a: Tensor, b: Any) -> tuple[Any, Any]:
    signs = torch.copysign(torch.ones_like(a), b)
    return torch.where(a == 0, 0.0, torch.where(a < 0, -signs, signs)), 0.0


_piecewise("copysign", operation=torch.copysign, slopes=_copysign_slopes)
