"""Elementary functions of one value."""

from __future__ import annotations

import math

import torch

from fastsfvae.jacobian.jet import Jet
from fastsfvae.jacobian.registry import rule
from fastsfvae.jacobian.rules.activation import pointwise


@rule("neg", "negative")
def neg(x: Jet) -> Jet:
    """-x."""
    return Jet(-x.primal, -x.tangent)


@rule("positive")
def positive(x: Jet) -> Jet:
    """+x."""
    return x


pointwise("exp")(lambda a, y: y)
pointwise("exp2", "special_exp2")(lambda a, y: y * math.log(2))
pointwise("expm1", "special_expm1")(lambda a, y: y + 1)
pointwise("log")(lambda a, y: 1 / a)
pointwise("log2")(lambda a, y: 1 / (a * math.log(2)))
pointwise("log10")(lambda a, y: 1 / (a * math.log(10)))
pointwise("log1p", "special_log1p")(lambda a, y: 1 / (1 + a))
pointwise("sqrt")(lambda a, y: 0.5 / y)
pointwise("rsqrt")(lambda a, y: -0.5 * y**3)
pointwise("square")(lambda a, y: 2 * a)
pointwise("reciprocal")(lambda a, y: -y * y)
pointwise("abs", "absolute")(lambda a, y: torch.sign(a))
pointwise("sin")(lambda a, y: torch.cos(a))
pointwise("cos")(lambda a, y: -torch.sin(a))
pointwise("tan")(lambda a, y: 1 + y * y)
pointwise("asin", "arcsin")(lambda a, y: torch.rsqrt(1 - a * a))
pointwise("acos", "arccos")(lambda a, y: -torch.rsqrt(1 - a * a))
pointwise("atan", "arctan")(lambda a, y: 1 / (1 + a * a))
pointwise("sinh")(lambda a, y: torch.cosh(a))
pointwise("cosh")(lambda a, y: torch.sinh(a))
pointwise("asinh", "arcsinh")(lambda a, y: torch.rsqrt(a * a + 1))
pointwise("acosh", "arccosh")(lambda a, y: torch.rsqrt(a * a - 1))
pointwise("atanh", "arctanh")(lambda a, y: 1 / (1 - a * a))
pointwise("erf", "special_erf")(lambda a, y: (2 / math.sqrt(math.pi)) * torch.exp(-a * a))
pointwise("erfc", "special_erfc")(lambda a, y: (-2 / math.sqrt(math.pi)) * torch.exp(-a * a))
pointwise("erfinv", "special_erfinv")(lambda a, y: (0.5 * math.sqrt(math.pi)) * torch.exp(y * y))
pointwise("frac")(lambda a, y: torch.ones_like(a))


@pointwise("logit", "special_logit")
def _logit(a, y, eps=None):
    slope = 1 / (a * (1 - a))
    if eps is None:
        return slope
    return torch.where((a < eps) | (a > 1 - eps), 0.0, slope)


@pointwise("nan_to_num")
def _nan_to_num(a, y, nan=None, posinf=None, neginf=None):
    return torch.isfinite(a)


pointwise("remainder", "fmod")(lambda a, y, divisor: torch.ones_like(a))
