"""Elementary functions of one value."""

from __future__ import annotations

import math

import torch

from fastsfvae.jacobian.rules.activation import pointwise
from fastsfvae.jacobian.rules.jet import Jet, move
from fastsfvae.jacobian.rules.registry import adjoint, rule


@rule("neg", "negative")
def neg(x: Jet) -> Jet:
    """-x."""
    return move(x, lambda t, _: -t)


@adjoint("neg", "negative")
def _neg_adjoint(grad: Jet, out: Jet, needs: tuple, x: Jet) -> tuple[Jet]:
    return (move(grad, lambda g, _: -g),)


pointwise("exp", curvature=lambda a, y, d: y)(lambda a, y: y)
pointwise("exp2", "special_exp2", curvature=lambda a, y, d: d * math.log(2))(
    lambda a, y: y * math.log(2)
)
pointwise("expm1", "special_expm1", curvature=lambda a, y, d: d)(lambda a, y: y + 1)
pointwise("log", curvature=lambda a, y, d: -d * d)(lambda a, y: 1 / a)
pointwise("log2", curvature=lambda a, y, d: -d / a)(lambda a, y: 1 / (a * math.log(2)))
pointwise("log10", curvature=lambda a, y, d: -d / a)(lambda a, y: 1 / (a * math.log(10)))
pointwise("log1p", "special_log1p", curvature=lambda a, y, d: -d * d)(lambda a, y: 1 / (1 + a))
pointwise("sqrt", curvature=lambda a, y, d: -0.5 * d / a)(lambda a, y: 0.5 / y)
pointwise("rsqrt", curvature=lambda a, y, d: -1.5 * d / a)(lambda a, y: -0.5 * y**3)
pointwise("square", curvature=lambda a, y, d: torch.full_like(a, 2.0))(lambda a, y: 2 * a)
pointwise("reciprocal", curvature=lambda a, y, d: -2 * y * d)(lambda a, y: -y * y)
pointwise("abs", "absolute", straight=True)(lambda a, y: torch.sign(a))
pointwise("sin", curvature=lambda a, y, d: -y)(lambda a, y: torch.cos(a))
pointwise("cos", curvature=lambda a, y, d: -y)(lambda a, y: -torch.sin(a))
pointwise("tan", curvature=lambda a, y, d: 2 * y * d)(lambda a, y: 1 + y * y)
pointwise("asin", "arcsin", curvature=lambda a, y, d: a * d**3)(lambda a, y: torch.rsqrt(1 - a * a))
pointwise("acos", "arccos", curvature=lambda a, y, d: a * d**3)(
    lambda a, y: -torch.rsqrt(1 - a * a)
)
pointwise("atan", "arctan", curvature=lambda a, y, d: -2 * a * d * d)(lambda a, y: 1 / (1 + a * a))
pointwise("sinh", curvature=lambda a, y, d: y)(lambda a, y: torch.cosh(a))
pointwise("cosh", curvature=lambda a, y, d: y)(lambda a, y: torch.sinh(a))
pointwise("asinh", "arcsinh", curvature=lambda a, y, d: -a * d**3)(
    lambda a, y: torch.rsqrt(a * a + 1)
)
pointwise("acosh", "arccosh", curvature=lambda a, y, d: -a * d**3)(
    lambda a, y: torch.rsqrt(a * a - 1)
)
pointwise("atanh", "arctanh", curvature=lambda a, y, d: 2 * a * d * d)(lambda a, y: 1 / (1 - a * a))
pointwise("erf", "special_erf", curvature=lambda a, y, d: -2 * a * d)(
    lambda a, y: (2 / math.sqrt(math.pi)) * torch.exp(-a * a)
)
pointwise("erfc", "special_erfc", curvature=lambda a, y, d: -2 * a * d)(
    lambda a, y: (-2 / math.sqrt(math.pi)) * torch.exp(-a * a)
)
pointwise("erfinv", "special_erfinv", curvature=lambda a, y, d: 2 * y * d * d)(
    lambda a, y: (0.5 * math.sqrt(math.pi)) * torch.exp(y * y)
)
pointwise("frac", straight=True)(lambda a, y: torch.ones_like(a))


def _logit_curvature(a, y, d, eps=None):
    return (2 * a - 1) * d * d


@pointwise("logit", "special_logit", curvature=_logit_curvature)
def _logit(a, y, eps=None):
    if eps is None:
        return 1 / (a * (1 - a))
    outside = (a < eps) | (a > 1 - eps)
    # The unused branch gets a harmless value, so that its own derivative is finite.
    a = torch.where(outside, 0.5, a)
    return torch.where(outside, 0.0, 1 / (a * (1 - a)))


@pointwise("nan_to_num", straight=True)
def _nan_to_num(a, y, nan=None, posinf=None, neginf=None):
    return torch.isfinite(a)
