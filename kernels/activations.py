"""Activations with their first two derivatives, written once for every kernel that applies one.

Computed in float32, each derivative in a form that does not cancel: tanh' is 4 e / (1 + e)^2 with
e = exp(-2 |x|), not 1 - tanh^2.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

from ._contract import PARAMETERS

_SELU_ALPHA = tl.constexpr(1.6732632423543772848170429916717)
_SELU_SCALE = tl.constexpr(1.0507009873554804934193349852946)
_SQRT_HALF = tl.constexpr(0.70710678118654752440)
_SQRT_2_OVER_PI = tl.constexpr(0.79788456080286535588)
_INV_SQRT_2PI = tl.constexpr(0.39894228040143267794)
_GELU_CUBIC = tl.constexpr(0.044715)


# Parameters of those kinds that have some, for the audit.
EXAMPLES = {"leaky_relu": (0.01,), "elu": (1.0,), "softplus": (1.0, 20.0), "hardtanh": (-1.0, 1.0)}


@triton.jit
def _expm1(x):
    # exp(x) - 1 cancels near 0; eight terms of the series are exact to float32 within |x| < 1/4.
    series = 1.0 + x / 6.0 * (1.0 + x / 7.0 * (1.0 + x / 8.0))
    series = 1.0 + x / 3.0 * (1.0 + x / 4.0 * (1.0 + x / 5.0 * series))
    return tl.where(tl.abs(x) < 0.25, x * (1.0 + x / 2.0 * series), tl.exp(x) - 1.0)


@triton.jit
def _tanh(x):
    """Tanh and its derivative; exp only ever sees a negative argument, so nothing overflows."""
    e1 = _expm1(-2.0 * tl.abs(x))
    t = -e1 / (e1 + 2.0)
    e = tl.exp(-2.0 * tl.abs(x))
    return tl.where(x < 0.0, -t, t), 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def _sigmoid(x):
    """Sigmoid, its derivative and its second derivative, each without 1 - s."""
    e = tl.exp(-tl.abs(x))
    s = 1.0 / (1.0 + e)
    d1 = e * s * s
    slope = (1.0 - e) * s
    return tl.where(x < 0.0, e * s, s), d1, d1 * tl.where(x < 0.0, slope, -slope)


@triton.jit
def activation(x, KIND: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr):
    """(phi, phi', phi'') of float32 x; at a kink, the derivatives that torch's backward uses."""
    zero = x * 0.0
    if KIND == "relu":
        return tl.where(x <= 0.0, 0.0, x), tl.where(x <= 0.0, 0.0, 1.0), zero
    elif KIND == "leaky_relu":
        return tl.where(x > 0.0, x, x * P0), tl.where(x > 0.0, 1.0, P0), zero
    elif KIND == "hardtanh":
        phi = tl.where(x < P0, P0, tl.where(x > P1, P1, x))
        return phi, tl.where((x <= P0) | (x >= P1), 0.0, 1.0), zero
    elif KIND == "elu" or KIND == "selu":
        alpha: tl.constexpr = _SELU_ALPHA if KIND == "selu" else P0
        scale: tl.constexpr = _SELU_SCALE if KIND == "selu" else 1.0
        # The branch not taken must not overflow.
        below = tl.where(x > 0.0, 0.0, x)
        curve = tl.exp(below) * (scale * alpha)
        phi = tl.where(x > 0.0, x * scale, _expm1(below) * (scale * alpha))
        return phi, tl.where(x > 0.0, scale, curve), tl.where(x < 0.0, curve, 0.0)
    elif KIND == "silu":
        s, d1, d2 = _sigmoid(x)
        return x * s, s + x * d1, 2.0 * d1 + x * d2
    elif KIND == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(x * _SQRT_HALF))
        pdf = tl.exp(-0.5 * x * x) * _INV_SQRT_2PI
        return x * cdf, cdf + x * pdf, pdf * (2.0 - x * x)
    elif KIND == "gelu_tanh":
        t, d1 = _tanh(x * (1.0 + x * x * _GELU_CUBIC) * _SQRT_2_OVER_PI)
        u1 = (1.0 + x * x * (3.0 * _GELU_CUBIC)) * _SQRT_2_OVER_PI
        u2 = x * (6.0 * _GELU_CUBIC * _SQRT_2_OVER_PI)
        curve = d1 * u1 + 0.5 * x * d1 * (u2 - 2.0 * t * u1 * u1)
        return 0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * d1 * u1, curve
    elif KIND == "tanh":
        t, d1 = _tanh(x)
        return t, d1, -2.0 * t * d1
    elif KIND == "sigmoid":
        return _sigmoid(x)
    else:
        tl.static_assert(KIND == "softplus")
        s, d1, _ = _sigmoid(x * P0)
        # log(1 + e) with the rounding error of 1 + e divided out again.
        e = tl.exp(-tl.abs(x * P0))
        u = 1.0 + e
        log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
        linear = x * P0 > P1
        phi = tl.where(linear, x, tl.where(x * P0 > 0.0, x, 0.0) + log1p / P0)
        return phi, tl.where(linear, 1.0, s), tl.where(linear, 0.0, d1 * P0)


@triton.jit
def times_slope(x, a, KIND: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr):
    """phi'(a) x in x's dtype; where the slope is 0 or 1, by selection in any layout and dtype.

    Where the result tells the slope (`_contract.reads_result`), `a` may be phi(a).
    """
    # Compared in float32, where bounds are what they were given as: Triton 3.9 would round them to
    # a's dtype, and its interpreter compares bit patterns of bfloat16.
    a = a.to(tl.float32)
    if KIND == "relu":
        return tl.where(a <= 0.0, 0.0, x)
    elif KIND == "leaky_relu":
        return tl.where(a > 0.0, x, (x.to(tl.float32) * P0).to(x.dtype))
    elif KIND == "hardtanh":
        return tl.where((a <= P0) | (a >= P1), 0.0, x)
    else:
        _, d1, _ = activation(a, KIND, P0, P1)
        return (d1 * x.to(tl.float32)).to(x.dtype)


def front_constexprs(kind: str, params: Sequence[float]) -> dict:
    """`activation_constexprs`, or KIND "none" for a layer without an activation in front."""
    if kind == "none":
        return {"KIND": kind, "P0": 0.0, "P1": 0.0}
    return activation_constexprs(kind, params)


def activation_constexprs(kind: str, params: Sequence[float]) -> dict:
    """KIND, P0 and P1 of `activation`.

    Raises:
        ValueError: an unknown kind or a wrong number of parameters.
    """
    if kind not in PARAMETERS:
        raise ValueError(f"kind={kind!r} is not one of {', '.join(PARAMETERS)}")
    names = PARAMETERS[kind]
    if len(params) != len(names):
        raise ValueError(f"kind={kind!r} takes the parameters {names}, got {tuple(params)}")
    p0, p1 = (*map(float, params), 0.0, 0.0)[:2]
    return {"KIND": kind, "P0": p0, "P1": p1}
