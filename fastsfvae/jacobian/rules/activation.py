"""Pointwise nonlinearities: d phi(a) = phi'(a) da.

Each derivative is written from the value a and, where cheaper, the result y, in operations that
can be differentiated again: phi'' reaches a through autograd. At a kink it is what PyTorch's own
backward takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsfvae.jacobian.jet import Jet, broadcast_jet
from fastsfvae.jacobian.registry import rule
from fastsfvae.jacobian.rules.arithmetic import mul
from fastsfvae.jacobian.rules.shape import chunk

_SELU_ALPHA = 1.6732632423543772848170429916717
_SELU_SCALE = 1.0507009873554804934193349852946


def pointwise(*names: str, fused: Callable[..., Any] | None = None):
    """Register `derivative(a, y, *arguments)` as the rule of operations phi(a, *arguments)."""

    def register(derivative: Callable[..., Tensor]) -> Callable[..., Tensor]:
        for name in names:
            operation = getattr(torch.ops.aten, name)
            rule(name, fused=fused)(_pointwise_rule(operation, derivative))
        return derivative

    return register


def _pointwise_rule(operation: Callable[..., Tensor], derivative: Callable[..., Tensor]):
    def forward(x: Jet, *args: Any, **kwargs: Any) -> Jet:
        y = operation(x.primal, *args, **kwargs)
        slope = derivative(x.primal, y, *args, **kwargs)
        return broadcast_jet(y, x.tangent * slope)

    return forward


def _kernel(kind: str, parameters: Callable[..., tuple[float, ...]]) -> Callable[..., Jet]:
    """The same on the fused kernel, which makes one pass over the tangents."""

    def fused(x: Jet, *args: Any, **kwargs: Any) -> Jet:
        from fastsfvae.ops.tangent_activation import tangent_activation

        values = tuple(float(p) for p in parameters(*args, **kwargs))
        return Jet(*tangent_activation(x.primal, x.tangent, kind, values, "triton"))

    return fused


def _between(a: Tensor, low: float, high: float) -> Tensor:
    return (a > low) & (a < high)


def _unit_like(a: Tensor, value: float = 1.0) -> Tensor:
    return torch.full_like(a, value)


@pointwise("relu", fused=_kernel("relu", lambda: ()))
def _relu(a, y):
    return a > 0


@pointwise("relu6")
def _relu6(a, y):
    return _between(a, 0.0, 6.0)


@pointwise("leaky_relu", fused=_kernel("leaky_relu", lambda negative_slope=0.01: (negative_slope,)))
def _leaky_relu(a, y, negative_slope=0.01):
    return torch.where(a > 0, 1.0, _unit_like(a, negative_slope))


@pointwise("rrelu")
def _rrelu(a, y, lower=1 / 8, upper=1 / 3, training=False, generator=None):
    return torch.where(a > 0, 1.0, _unit_like(a, (lower + upper) / 2))


@pointwise("hardtanh", fused=_kernel("hardtanh", lambda lo=-1.0, hi=1.0: (lo, hi)))
def _hardtanh(a, y, min_val=-1.0, max_val=1.0):
    return _between(a, min_val, max_val)


@pointwise("hardsigmoid")
def _hardsigmoid(a, y):
    return _between(a, -3.0, 3.0).to(a.dtype) / 6


@pointwise("hardswish")
def _hardswish(a, y):
    inner = torch.where(a < -3, 0.0, a / 3 + 0.5)
    return torch.where(a > 3, 1.0, inner)


@pointwise("hardshrink", "softshrink")
def _shrink(a, y, lambd=0.5):
    return a.abs() > lambd


@pointwise("threshold")
def _threshold(a, y, threshold, value):
    return a > threshold


@pointwise("elu", fused=lambda x, *args: _fused_elu(x, *args))
def _elu(a, y, alpha=1.0, scale=1.0, input_scale=1.0):
    # The exponential of the clamped value: where() would pass on the nan of an overflow.
    negative = (alpha * scale * input_scale) * (a.clamp(max=0) * input_scale).exp()
    return torch.where(a > 0, scale, negative)


def _fused_elu(x: Jet, alpha=1.0, scale=1.0, input_scale=1.0) -> Jet:
    if scale != 1 or input_scale != 1:
        return _pointwise_rule(torch.ops.aten.elu, _elu)(x, alpha, scale, input_scale)
    return _kernel("elu", lambda: (alpha,))(x)


@pointwise("celu")
def _celu(a, y, alpha=1.0):
    return torch.where(a > 0, 1.0, (a.clamp(max=0) / alpha).exp())


@pointwise("selu", fused=_kernel("selu", lambda: ()))
def _selu(a, y):
    return _elu(a, y, _SELU_ALPHA, _SELU_SCALE)


@pointwise("silu", fused=_kernel("silu", lambda: ()))
def _silu(a, y):
    s = torch.sigmoid(a)
    return s * (1 + a * (1 - s))


@pointwise("gelu", fused=lambda x, **kwargs: _fused_gelu(x, **kwargs))
def _gelu(a, y, *, approximate="none"):
    if approximate == "tanh":
        inner = math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)
        t = torch.tanh(inner)
        slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * a**2)
        return 0.5 * (1 + t) + 0.5 * a * (1 - t * t) * slope
    density = torch.exp(-0.5 * a * a) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(a / math.sqrt(2))) + a * density


def _fused_gelu(x: Jet, *, approximate: str = "none") -> Jet:
    return _kernel("gelu_tanh" if approximate == "tanh" else "gelu", lambda: ())(x)


@pointwise("mish")
def _mish(a, y):
    t = torch.tanh(F.softplus(a))
    return t + a * (1 - t * t) * torch.sigmoid(a)


@pointwise("tanh", fused=_kernel("tanh", lambda: ()))
def _tanh(a, y):
    return 1 - y * y


@pointwise("sigmoid", "special_expit", fused=_kernel("sigmoid", lambda: ()))
def _sigmoid(a, y):
    return y * (1 - y)


@pointwise("log_sigmoid")
def _log_sigmoid(a, y):
    return torch.sigmoid(-a)


@pointwise("softplus", fused=_kernel("softplus", lambda beta=1, threshold=20: (beta, threshold)))
def _softplus(a, y, beta=1, threshold=20):
    return torch.where(a * beta > threshold, 1.0, torch.sigmoid(a * beta))


@rule("prelu")
def prelu(x: Jet, weight: Tensor) -> Jet:
    """The slope is a parameter, one or one per channel (axis 1)."""
    if weight.numel() > 1:
        weight = weight.view(1, -1, *[1] * (x.primal.ndim - 2))
    slope = torch.where(x.primal > 0, torch.ones_like(weight), weight)
    return broadcast_jet(x.primal * slope, x.tangent * slope)


@rule("glu")
def glu(x: Jet, dim: int = -1) -> Jet:
    """The first half times the sigmoid of the second."""
    value, gate = chunk(x, 2, dim)
    open_ = torch.sigmoid(gate.primal)
    return mul(value, Jet(open_, gate.tangent * _sigmoid(gate.primal, open_)))
