"""Sums, products, quotients, selections: operations on two or more broadcast values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsfvae.jacobian.rules.jet import (
    Jet,
    align,
    broadcast_jet,
    conj,
    from_stack,
    join,
    move,
    primal_of,
)
from fastsfvae.jacobian.rules.registry import adjoint, always, rule


def combine(primal: Tensor, *terms: tuple[Any, Any]) -> Jet:
    """The Jet whose tangent is the sum of derivative * tangent over the Jets among the operands.

    Args:
        primal: the result, which the operands broadcast to.
        *terms: (operand, partial derivative); the derivative is a tensor that broadcasts to the
            primal or a number, and is called for first where it is a function.
    """
    total = None
    for operand, derivative in terms:
        if not isinstance(operand, Jet):
            continue
        if callable(derivative):
            derivative = derivative()
        tangent = align(operand, primal.ndim)
        if not (isinstance(derivative, (int, float)) and derivative == 1):
            tangent = tangent * derivative
        total = tangent if total is None else total + tangent
    assert total is not None
    return broadcast_jet(primal, total)


@rule("add", several=True)
def add(a: Any, b: Any, *, alpha: float = 1) -> Jet:
    """A + alpha * b."""
    if _both_stacked(a, b):
        return from_stack(torch.add(a.stack, b.stack, alpha=alpha))
    primal = torch.add(primal_of(a), primal_of(b), alpha=alpha)
    return combine(primal, (a, 1), (b, alpha))


def _both_stacked(a: Any, b: Any) -> bool:
    stacked = isinstance(a, Jet) and isinstance(b, Jet) and a.stack is not None
    return stacked and b.stack is not None and a.stack.shape == b.stack.shape


def _parts(grad: Jet, operand: Any, factor: Any) -> Any:
    """The gradient of an operand whose multiple by a constant is the result."""
    factor = conj(factor)
    if not isinstance(operand, Jet):
        return grad.primal * factor
    return grad if factor == 1 else move(grad, lambda g, _: g * factor)


@adjoint("add", covers=always)
def _add_adjoint(grad: Jet, out: Jet, needs: tuple, a: Any, b: Any, *, alpha: float = 1):
    return _parts(grad, a, 1), _parts(grad, b, alpha)


@rule("sub", "subtract", several=True)
def sub(a: Any, b: Any, *, alpha: float = 1) -> Jet:
    """A - alpha * b."""
    primal = torch.sub(primal_of(a), primal_of(b), alpha=alpha)
    return combine(primal, (a, 1), (b, -alpha))


@adjoint("sub", "subtract", covers=always)
def _sub_adjoint(grad: Jet, out: Jet, needs: tuple, a: Any, b: Any, *, alpha: float = 1):
    return _parts(grad, a, 1), _parts(grad, b, -alpha)


@rule("rsub", several=True)
def rsub(a: Any, b: Any, alpha: float = 1) -> Jet:
    """B - alpha * a."""
    primal = torch.rsub(primal_of(a), primal_of(b), alpha=alpha)
    return combine(primal, (a, -alpha), (b, 1))


@adjoint("rsub", covers=always)
def _rsub_adjoint(grad: Jet, out: Jet, needs: tuple, a: Any, b: Any, alpha: float = 1):
    return _parts(grad, a, -alpha), _parts(grad, b, 1)


@rule("mul", "multiply", several=True)
def mul(a: Any, b: Any) -> Jet:
    """d(a b) = b da + a db."""
    value_a, value_b = primal_of(a), primal_of(b)
    return combine(torch.mul(value_a, value_b), (a, value_b), (b, value_a))


def pull_product(grad: Jet, operand: Any, partial: Any, bend: Any) -> Any:
    """Gradients of one operand of a smooth function of two.

    Args:
        grad: of the result.
        operand: a Jet or a tensor.
        partial: the derivative by it.
        bend: the derivative of the result's tangents by it, or None for zero.
    """
    partial = conj(partial)
    value = grad.primal * partial
    if bend is not None:
        value = join(value, (grad.tangent * conj(bend)).sum(0))
    return Jet(value, grad.tangent * partial) if isinstance(operand, Jet) else value


def aligned_tangent(x: Any, out: Jet) -> Tensor | None:
    """An operand's tangents, to broadcast against a result's; None where it has none."""
    return align(x, out.primal.ndim) if isinstance(x, Jet) else None


@adjoint("mul", "multiply", covers=always)
def _mul_adjoint(grad: Jet, out: Jet, needs: tuple, a: Any, b: Any):
    pairs = (a, b, needs[0]), (b, a, needs[1])
    return tuple(
        pull_product(grad, x, primal_of(other), aligned_tangent(other, out)) if need else None
        for x, other, need in pairs
    )


def _in_dtype(divisor: Any, quotient: Tensor) -> Any:
    """A divisor in its quotient's dtype: 1 over integers would be rounded to the default one."""
    return divisor.to(quotient.dtype) if isinstance(divisor, Tensor) else divisor


@rule("div", "divide", "true_divide", several=True)
def div(a: Any, b: Any, *, rounding_mode: str | None = None) -> Jet:
    """d(a / b) = da / b - (a / b) db / b; zero where the quotient is rounded."""
    value_a, value_b = primal_of(a), primal_of(b)
    if rounding_mode is not None:
        rounded = torch.div(value_a, value_b, rounding_mode=rounding_mode)
        return combine(rounded, (a, 0.0), (b, 0.0))
    quotient = torch.div(value_a, value_b)
    divisor = _in_dtype(value_b, quotient)
    return combine(quotient, (a, lambda: 1 / divisor), (b, lambda: -quotient / divisor))


@adjoint("div", "divide", "true_divide", covers=always)
def _div_adjoint(
    grad: Jet, out: Jet, needs: tuple, a: Any, b: Any, *, rounding_mode: str | None = None
):
    if rounding_mode is not None:
        nothing = torch.zeros_like(grad.primal)
        return tuple(pull_product(grad, operand, nothing, None) for operand in (a, b))
    inverse = 1 / _in_dtype(primal_of(b), out.primal)
    moved_a, moved_b = aligned_tangent(a, out), aligned_tangent(b, out)
    bend_a = None if moved_b is None else -moved_b * inverse**2
    bend_b = None if moved_a is None else -moved_a * inverse**2
    if moved_b is not None:
        twice = 2 * out.primal * moved_b * inverse**2
        bend_b = twice if bend_b is None else bend_b + twice
    grad_a = pull_product(grad, a, inverse, bend_a) if needs[0] else None
    grad_b = pull_product(grad, b, -out.primal * inverse, bend_b) if needs[1] else None
    return grad_a, grad_b


@rule("pow", several=True)
def power(a: Any, b: Any) -> Jet:
    """d(a^b) = b a^(b-1) da + a^b log(a) db."""
    value_a, value_b = primal_of(a), primal_of(b)
    primal = torch.pow(value_a, value_b)

    def by_exponent() -> Tensor:
        base = torch.as_tensor(value_a, dtype=primal.dtype, device=primal.device)
        # 0^b is constant in b > 0; the logarithm must not turn that into 0 * inf.
        return primal * torch.where(base == 0, torch.ones_like(base), base).log()

    return combine(primal, (a, lambda: _base_derivative(value_a, value_b)), (b, by_exponent))


def _base_derivative(base: Tensor, exponent: Any) -> Tensor:
    if not isinstance(exponent, Tensor):
        if exponent == 0:
            return torch.zeros_like(base)
        if not _has_kink(exponent):
            return exponent * base.pow(exponent - 1)
        flat = base == 0
    else:
        zero = exponent == 0
        flat = zero | ((base == 0) & _has_kink(exponent))
        exponent = torch.where(zero, torch.ones_like(exponent), exponent)
    # The unused branch gets a harmless base and exponent, so that its own derivative is finite.
    base = torch.where(flat, torch.ones_like(base), base)
    return torch.where(flat, 0.0, exponent * base.pow(exponent - 1))


def _has_kink(exponent: Any) -> Any:
    """Whether the derivative at a base of zero is zero and that one's is infinite."""
    if isinstance(exponent, complex) or (isinstance(exponent, Tensor) and exponent.is_complex()):
        return False
    return (1 < exponent) & (exponent < 2)


def _base_curvature(base: Tensor, exponent: Any) -> Tensor:
    if not isinstance(exponent, Tensor):
        if exponent in (0, 1):
            return torch.zeros_like(base)
        flat = base == 0 if _has_kink(exponent) else None
    else:
        flat = (base == 0) & (_has_kink(exponent) | (exponent == 0))
    curvature = exponent * _base_derivative(base, exponent - 1)
    return curvature if flat is None else torch.where(flat, 0.0, curvature)


@adjoint("pow", covers=always)
def _power_adjoint(grad: Jet, out: Jet, needs: tuple, a: Any, b: Any):
    base, exponent = primal_of(a), primal_of(b)
    moved_a, moved_b = aligned_tangent(a, out), aligned_tangent(b, out)
    grad_a: Any = None
    grad_b: Any = None
    log: Any = None
    mixed: Any = None
    if moved_b is not None or needs[1]:
        base = torch.as_tensor(base, dtype=out.primal.dtype, device=out.primal.device)
        log = torch.where(base == 0, torch.ones_like(base), base).log()
        # The second derivative by both.
        mixed = _base_derivative(base, exponent) * log + base ** (exponent - 1)
    if needs[0]:
        bend: Any = 0 if moved_b is None else mixed * moved_b
        if moved_a is not None:
            bend = bend + _base_curvature(base, exponent) * moved_a
        grad_a = pull_product(grad, a, _base_derivative(base, exponent), bend)
    if needs[1]:
        bend = 0 if moved_a is None else mixed * moved_a
        if moved_b is not None:
            bend = bend + out.primal * log**2 * moved_b
        grad_b = pull_product(grad, b, out.primal * log, bend)
    return grad_a, grad_b


@rule("where", several=True)
def where(condition: Tensor, a: Any, b: Any) -> Jet:
    """The tangents of the branch taken."""
    primal = torch.where(condition, primal_of(a), primal_of(b))
    if isinstance(a, Jet) and isinstance(b, Jet):
        chosen = torch.where(condition, align(a, primal.ndim), align(b, primal.ndim))
        return broadcast_jet(primal, chosen)
    if isinstance(a, Jet):
        return broadcast_jet(primal, torch.where(condition, align(a, primal.ndim), 0.0))
    return broadcast_jet(primal, torch.where(condition, 0.0, align(b, primal.ndim)))


@adjoint("where", covers=always)
def _where_adjoint(grad: Jet, out: Jet, needs: tuple, condition: Tensor, a: Any, b: Any):
    def kept(operand: Any, taken: Tensor) -> Any:
        if not isinstance(operand, Jet):
            return torch.where(taken, grad.primal, 0.0)
        return move(grad, lambda g, _: torch.where(taken, g, 0.0))

    return None, kept(a, condition), kept(b, ~condition)


@rule("masked_fill", several=True, composed=True, covers=always)
def masked_fill(x: Any, mask: Tensor, value: Any) -> Jet:
    """X where the mask is False, a 0-d value elsewhere."""
    return where(mask, value, x)


@rule("maximum", several=True)
def maximum(a: Any, b: Any) -> Jet:
    """The tangents of the larger value, their mean where both are equal."""
    value_a, value_b = primal_of(a), primal_of(b)
    share = _share(value_a, value_b)
    return combine(torch.maximum(value_a, value_b), (a, share), (b, 1 - share))


@rule("minimum", several=True)
def minimum(a: Any, b: Any) -> Jet:
    """The tangents of the smaller value, their mean where both are equal."""
    value_a, value_b = primal_of(a), primal_of(b)
    share = _share(value_b, value_a)
    return combine(torch.minimum(value_a, value_b), (a, share), (b, 1 - share))


@adjoint("maximum", "minimum", covers=always)
def _extreme_adjoint(grad: Jet, out: Jet, needs: tuple, a: Any, b: Any):
    """Of either: the value tells which operand it took."""
    value_a, value_b = primal_of(a), primal_of(b)
    share = (value_a == out.primal).to(out.primal.dtype)
    share = share / (share + (value_b == out.primal))
    return pull_product(grad, a, share, None), pull_product(grad, b, 1 - share, None)


def _share(a: Tensor, b: Tensor) -> Tensor:
    return (a > b).to(a.dtype) + 0.5 * (a == b).to(a.dtype)


@rule("lerp", several=True)
def lerp(a: Any, b: Any, weight: Any) -> Jet:
    """A + weight * (b - a)."""
    value_a, value_b, w = primal_of(a), primal_of(b), primal_of(weight)
    primal = torch.lerp(value_a, value_b, w)
    return combine(primal, (a, 1 - w), (b, w), (weight, lambda: value_b - value_a))


@adjoint("lerp", covers=always)
def _lerp_adjoint(grad: Jet, out: Jet, needs: tuple, a: Any, b: Any, weight: Any):
    w, step = primal_of(weight), primal_of(b) - primal_of(a)
    moved_a, moved_b, moved_w = (aligned_tangent(x, out) for x in (a, b, weight))
    moved_step = _difference(moved_b, moved_a)
    return (
        pull_product(grad, a, 1 - w, None if moved_w is None else -moved_w),
        pull_product(grad, b, w, moved_w),
        pull_product(grad, weight, step, moved_step) if needs[2] else None,
    )


def _difference(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if b is None:
        return a
    return -b if a is None else a - b


def jet_product(args: tuple, kwargs: dict) -> bool:
    """Whether a product of the second and third argument leaves no parameter's gradient out.

    One of two parameters is plain arithmetic, which no adjoint sees.
    """
    factors = args[1:3]
    return any(isinstance(factor, Jet) for factor in factors) or not any(
        isinstance(factor, Tensor) and factor.requires_grad for factor in factors
    )


@rule("addcmul", several=True, composed=True, covers=jet_product)
def addcmul(x: Any, a: Any, b: Any, *, value: float = 1) -> Jet:
    """X + value * a * b."""
    product = mul(a, b) if isinstance(a, Jet) or isinstance(b, Jet) else a * b
    return add(x, product, alpha=value)


@rule("addcdiv", several=True, composed=True, covers=jet_product)
def addcdiv(x: Any, a: Any, b: Any, *, value: float = 1) -> Jet:
    """X + value * a / b."""
    quotient = div(a, b) if isinstance(a, Jet) or isinstance(b, Jet) else a / b
    return add(x, quotient, alpha=value)
