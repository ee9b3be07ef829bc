"""Special functions of one value: of the gamma, Bessel and error families."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastsfvae.jacobian.rules.activation import pointwise
from fastsfvae.jacobian.rules.arithmetic import mul, power
from fastsfvae.jacobian.rules.jet import Jet, broadcast_jet
from fastsfvae.jacobian.rules.registry import adjoint, always, rule

_ROOT_PI = math.sqrt(math.pi)


@pointwise("lgamma", curvature=lambda a, y, d: torch.polygamma(1, a))
def _lgamma(a, y):
    return torch.digamma(a)


@pointwise("digamma", curvature=lambda a, y, d: torch.polygamma(2, a))
def _digamma(a, y):
    return torch.polygamma(1, a)


@rule("polygamma", several=True)
def polygamma(n: int, x: Jet) -> Jet:
    """The order comes first; the derivative is the next order's function."""
    slope = torch.polygamma(n + 1, x.primal)
    return broadcast_jet(torch.polygamma(n, x.primal), x.tangent * slope)


@adjoint("polygamma", covers=always)
def _polygamma_adjoint(grad: Jet, out: Jet, needs: tuple, n: int, x: Jet) -> tuple[None, Jet]:
    slope, bend = torch.polygamma(n + 1, x.primal), torch.polygamma(n + 2, x.primal)
    by_tangents = (grad.tangent * x.tangent).sum(0) * bend
    return None, Jet(grad.primal * slope + by_tangents, grad.tangent * slope)


def _of_shifted(order: int, a: Tensor, p: int) -> Tensor:
    return sum((torch.polygamma(order, a - j / 2) for j in range(p)), torch.zeros_like(a))


@pointwise("mvlgamma", curvature=lambda a, y, d, p: _of_shifted(1, a, p))
def _mvlgamma(a, y, p):
    return _of_shifted(0, a, p)


# The coefficients of t^(2k) / (2k + 1)! in sin(t) / t, as far as they count for t < 1/2.
_SINC = [(-1) ** k / math.factorial(2 * k + 1) for k in range(9)]


def _sinc_parts(a: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(whether a is small, t = pi a where it is, a where it is not); 1 in the places between."""
    small = a.abs() < 0.5 / math.pi
    return small, torch.where(small, math.pi * a, 1.0), torch.where(small, 1.0, a)


def _sinc_curvature(a, y, d):
    small, t, large = _sinc_parts(a, y)
    series = sum(2 * k * (2 * k - 1) * c * t ** (2 * k - 2) for k, c in enumerate(_SINC) if k)
    return torch.where(small, math.pi**2 * series, -(math.pi**2) * y - 2 * d / large)


@pointwise("sinc", curvature=_sinc_curvature)
def _sinc(a, y):
    # The closed form cancels near 0.
    small, t, large = _sinc_parts(a, y)
    series = sum(2 * k * c * t ** (2 * k - 1) for k, c in enumerate(_SINC) if k)
    return torch.where(small, math.pi * series, (torch.cos(math.pi * large) - y) / large)


@pointwise("special_erfcx", curvature=lambda a, y, d: 2 * (y + a * d))
def _erfcx(a, y):
    return 2 * a * y - 2 / _ROOT_PI


@pointwise("special_log_ndtr", curvature=lambda a, y, d: -d * (a + d))
def _log_ndtr(a, y):
    return torch.exp(-0.5 * a * a - y) / math.sqrt(2 * math.pi)


@pointwise("special_ndtri", curvature=lambda a, y, d: y * d * d)
def _ndtri(a, y):
    return math.sqrt(2 * math.pi) * torch.exp(0.5 * y * y)


@pointwise("special_entr", curvature=lambda a, y, d: -1 / a)
def _entr(a, y):
    return -torch.log(a) - 1


def _over(y: Tensor, a: Tensor) -> Tensor:
    """I_1(a) / a and the like, whose value at 0 is 1/2."""
    zero = a == 0
    return torch.where(zero, 0.5, y / torch.where(zero, 1.0, a))


@pointwise("i0", curvature=lambda a, y, d: y - _over(d, a))
def _i0(a, y):
    return torch.special.i1(a)


@pointwise(
    "special_i0e", curvature=lambda a, y, d: y - _over(d + a.sign() * y, a) - _sloped(a, y, d)
)
def _i0e(a, y):
    return torch.special.i1e(a) - a.sign() * y


def _sloped(a: Tensor, y: Tensor, d: Tensor) -> Tensor:
    # Of exp(-|a|): twice its slope times the function's own, and its curvature.
    return 2 * a.sign() * d + a.sign() ** 2 * y


# The coefficients of a^(2k - 1) in the second derivative of I_1, as far as they count for a < 1/4.
_I1 = [
    (2 * k + 1) * (2 * k) / (2 ** (2 * k + 1) * math.factorial(k) * math.factorial(k + 1))
    for k in range(8)
]


def _i1_curvature(a, y, d):
    small = a.abs() < 0.25
    t, large = torch.where(small, a, 0.25), torch.where(small, 1.0, a)
    series = sum(c * t ** (2 * k - 1) for k, c in enumerate(_I1) if k)
    return torch.where(small, series, (1 + large**-2) * y - d / large)


@pointwise("special_i1", curvature=_i1_curvature)
def _i1(a, y):
    return torch.special.i0(a) - _over(y, a)


def _i1e_curvature(a, y, d):
    factor, sign = torch.exp(-a.abs()), a.sign()
    # Of I_1 = y exp(|a|), whose values may be too large.
    inner = _i1_curvature(a, y, d + sign * y)
    small = a.abs() < 0.25
    return torch.where(small, inner * factor, inner) - 2 * sign * d - sign**2 * y


@pointwise("special_i1e", curvature=_i1e_curvature)
def _i1e(a, y):
    return torch.special.i0e(a) - a.sign() * y - _over(y, a)


@rule("deg2rad", composed=True)
def deg2rad(x: Jet) -> Jet:
    """Degrees to radians."""
    return mul(x, math.pi / 180)


@rule("rad2deg", composed=True)
def rad2deg(x: Jet) -> Jet:
    """Radians to degrees."""
    return mul(x, 180 / math.pi)


def _no_trained_exponent(args: tuple, kwargs: dict[str, Any]) -> bool:
    # Two to the power of a parameter is plain arithmetic, which no adjoint sees.
    exponent = args[1]
    return isinstance(exponent, Jet) or not exponent.requires_grad


@rule("ldexp", several=True, composed=True, covers=_no_trained_exponent)
def ldexp(x: Any, exponent: Any) -> Jet:
    """X times two to the power of the exponent."""
    return mul(x, power(2.0, exponent) if isinstance(exponent, Jet) else 2.0**exponent)
