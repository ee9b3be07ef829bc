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

from fastsfvae.jacobian.rules.arithmetic import mul
from fastsfvae.jacobian.rules.jet import Jet, broadcast_jet, from_stack
from fastsfvae.jacobian.rules.pieces import chunk
from fastsfvae.jacobian.rules.registry import RULES, adjoint, bind, rule
from fastsfvae.jacobian.rules.triton_activation import Read, triton_rule

_SELU_ALPHA = 1.6732632423543772848170429916717
_SELU_SCALE = 1.0507009873554804934193349852946


def pointwise(
    *names: str,
    curvature: Callable[..., Tensor] | None = None,
    straight: bool = False,
    kernel: Read | None = None,
):
    """Register `derivative(a, y, *arguments)` as the rule of operations phi(a, *arguments).

    Args:
        *names: ATen operations, or custom ones such as "namespace.name.default".
        curvature: phi'' as ``(a, y, phi', *arguments)``, for the adjoint.
        straight: phi'' is 0.
        kernel: which Triton kernel takes a call; see `triton_rule`.
    """

    def register(derivative: Callable[..., Tensor]) -> Callable[..., Tensor]:
        for name in names:
            operation = _operation(name)
            triton = None if kernel is None else triton_rule(name, kernel)
            rule(name, triton=triton)(_pointwise_rule(operation, derivative))
            if straight or curvature is not None:
                pull = _pointwise_adjoint(derivative, curvature)
                lean = _pointwise_lean(operation, derivative)
                adjoint(name, lean=lean, fresh=True, overwrites=True)(pull)
        return derivative

    return register


def _operation(name: str) -> Callable[..., Tensor]:
    if "." not in name:
        return getattr(torch.ops.aten, name)
    namespace, packet, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload)


def _pointwise_rule(operation: Callable[..., Tensor], derivative: Callable[..., Tensor]):
    def forward(x: Jet, *args: Any, **kwargs: Any) -> Jet:
        y = operation(x.primal, *args, **kwargs)
        slope = derivative(x.primal, y, *args, **kwargs)
        return broadcast_jet(y, x.tangent * slope)

    return forward


def _pointwise_lean(operation: Callable[..., Tensor], derivative: Callable[..., Tensor]):
    """The same into one stack; ReLU in place, as its sign is all that its adjoint reads."""
    in_place = operation is torch.ops.aten.relu

    def forward(private: bool, x: Jet, *args: Any, **kwargs: Any) -> Jet:
        y = operation(x.primal, *args, **kwargs)
        slope = derivative(x.primal, y, *args, **kwargs).to(y.dtype)
        if x.stack is not None and private and in_place:
            x.tangent.mul_(slope)
            x.primal.copy_(y)
            return x._replace()
        stack = _empty_stack(y, x.tangent.shape[0])
        torch.mul(x.tangent, slope, out=stack[1:])
        stack[0].copy_(y)
        return from_stack(stack)

    return forward


def _empty_stack(y: Tensor, m: int) -> Tensor:
    """[1 + m, *y.shape] whose slices lie in memory as y does."""
    stack = torch.empty((1 + m, *y.shape), dtype=y.dtype, device=y.device)
    if y.ndim == 4 and y.is_contiguous(memory_format=torch.channels_last):
        folded = torch.empty_like(stack.flatten(0, 1), memory_format=torch.channels_last)
        return folded.view(1 + m, *y.shape)
    return stack


def _pointwise_adjoint(
    derivative: Callable[..., Tensor], curvature: Callable[..., Tensor] | None
) -> Callable[..., Any]:
    def pull(grad: Jet, out: Jet, needs: tuple, x: Jet, *args: Any, **kwargs: Any) -> tuple[Jet]:
        # ReLU may have been done in place: its result has the sign of its argument.
        a = x.primal
        slope = derivative(a, out.primal, *args, **kwargs).to(grad.primal.dtype)
        bend = None
        if curvature is not None:
            bend = (x.tangent.conj() * grad.tangent).sum(0)
            bend *= curvature(a, out.primal, slope, *args, **kwargs).conj()
        # Gradients of complex values take conjugate factors; on real ones that does nothing.
        slope = slope.conj()
        if grad.stack is not None:
            pulled = from_stack(grad.stack.mul_(slope))
        else:
            pulled = Jet(grad.primal.mul_(slope), grad.tangent.mul_(slope))
        if bend is not None:
            pulled.primal.add_(bend)
        return (pulled,)

    return pull


def _between(a: Tensor, low: float, high: float) -> Tensor:
    return (a > low) & (a < high)


def _unit_like(a: Tensor, value: float = 1.0) -> Tensor:
    return torch.full_like(a, value)


@pointwise("relu", straight=True, kernel=lambda: ("relu", ()))
def _relu(a, y):
    # In a's dtype at once: a CPU writes a comparison as bools several times as slowly.
    return a.detach().clone().gt_(0)


@pointwise("relu6", straight=True)
def _relu6(a, y):
    return _between(a, 0.0, 6.0)


@pointwise(
    "leaky_relu",
    straight=True,
    kernel=lambda negative_slope=0.01: ("leaky_relu", (negative_slope,)),
)
def _leaky_relu(a, y, negative_slope=0.01):
    return torch.where(a > 0, 1.0, _unit_like(a, negative_slope))


@pointwise("rrelu", straight=True)
def _rrelu(a, y, lower=1 / 8, upper=1 / 3, training=False, generator=None):
    return torch.where(a > 0, 1.0, _unit_like(a, (lower + upper) / 2))


@pointwise("hardtanh", straight=True, kernel=lambda lo=-1.0, hi=1.0: ("hardtanh", (lo, hi)))
def _hardtanh(a, y, min_val=-1.0, max_val=1.0):
    return _between(a, min_val, max_val)


@pointwise("hardsigmoid", straight=True)
def _hardsigmoid(a, y):
    return _between(a, -3.0, 3.0).to(a.dtype) / 6


@pointwise("hardswish", curvature=lambda a, y, d: _between(a, -3.0, 3.0).to(a.dtype) / 3)
def _hardswish(a, y):
    inner = torch.where(a <= -3, 0.0, a / 3 + 0.5)
    return torch.where(a >= 3, 1.0, inner)


@pointwise("hardshrink", "softshrink", straight=True)
def _shrink(a, y, lambd=0.5):
    return a.abs() > lambd


@pointwise("threshold", straight=True)
def _threshold(a, y, threshold, value):
    return a > threshold


def _elu_curvature(a, y, d, alpha=1.0, scale=1.0, input_scale=1.0):
    return torch.where(a > 0, 0.0, d * input_scale)


@pointwise("elu", curvature=_elu_curvature, kernel=lambda *args: _elu_kernel(*args))
def _elu(a, y, alpha=1.0, scale=1.0, input_scale=1.0):
    # The exponential of the clamped value: where() would pass on the nan of an overflow.
    negative = (alpha * scale * input_scale) * (a.clamp(max=0) * input_scale).exp()
    return torch.where(a > 0, scale, negative)


def _elu_kernel(alpha=1.0, scale=1.0, input_scale=1.0):
    return ("elu", (alpha,)) if scale == 1 and input_scale == 1 else None


@pointwise("celu", curvature=lambda a, y, d, alpha=1.0: torch.where(a > 0, 0.0, d / alpha))
def _celu(a, y, alpha=1.0):
    return torch.where(a > 0, 1.0, (a.clamp(max=0) / alpha).exp())


@pointwise("selu", curvature=_elu_curvature, kernel=lambda: ("selu", ()))
def _selu(a, y):
    return _elu(a, y, _SELU_ALPHA, _SELU_SCALE)


def _silu_curvature(a, y, d):
    s = torch.sigmoid(a)
    return s * (1 - s) * (2 + a * (1 - 2 * s))


@pointwise("silu", curvature=_silu_curvature, kernel=lambda: ("silu", ()))
def _silu(a, y):
    s = torch.sigmoid(a)
    return s * (1 + a * (1 - s))


def _gelu_curvature(a, y, d, *, approximate="none"):
    if approximate == "tanh":
        root, cube = math.sqrt(2 / math.pi), 0.044715
        t = torch.tanh(root * (a + cube * a**3))
        slope = root * (1 + 3 * cube * a**2)
        return (1 - t * t) * (slope + a * (3 * root * cube * a - t * slope**2))
    return torch.exp(-0.5 * a * a) / math.sqrt(2 * math.pi) * (2 - a * a)


@pointwise("gelu", curvature=_gelu_curvature, kernel=lambda **kwargs: _gelu_kernel(**kwargs))
def _gelu(a, y, *, approximate="none"):
    if approximate == "tanh":
        inner = math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)
        t = torch.tanh(inner)
        slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * a**2)
        return 0.5 * (1 + t) + 0.5 * a * (1 - t * t) * slope
    density = torch.exp(-0.5 * a * a) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(a / math.sqrt(2))) + a * density


def _gelu_kernel(*, approximate="none"):
    return "gelu_tanh" if approximate == "tanh" else "gelu", ()


def _mish_curvature(a, y, d):
    t, s = torch.tanh(F.softplus(a)), torch.sigmoid(a)
    return (1 - t * t) * s * (2 + a * (1 - s) - 2 * a * t * s)


@pointwise("mish", curvature=_mish_curvature)
def _mish(a, y):
    t = torch.tanh(F.softplus(a))
    return t + a * (1 - t * t) * torch.sigmoid(a)


@pointwise("tanh", curvature=lambda a, y, d: -2 * y * d, kernel=lambda: ("tanh", ()))
def _tanh(a, y):
    return 1 - y * y


@pointwise(
    "sigmoid",
    "special_expit",
    curvature=lambda a, y, d: d * (1 - 2 * y),
    kernel=lambda: ("sigmoid", ()),
)
def _sigmoid(a, y):
    return y * (1 - y)


@pointwise("log_sigmoid", curvature=lambda a, y, d: d * (d - 1))
def _log_sigmoid(a, y):
    return torch.sigmoid(-a)


def _softplus_curvature(a, y, d, beta=1, threshold=20):
    return beta * d * (1 - d)


@pointwise(
    "softplus",
    curvature=_softplus_curvature,
    kernel=lambda beta=1, threshold=20: ("softplus", (beta, threshold)),
)
def _softplus(a, y, beta=1, threshold=20):
    return torch.where(a * beta > threshold, 1.0, torch.sigmoid(a * beta))


@rule("prelu")
def prelu(x: Jet, weight: Tensor) -> Jet:
    """The slope is a parameter, one or one per channel (axis 1)."""
    weight = weight.view(_prelu_shape(x, weight))
    slope = torch.where(x.primal > 0, torch.ones_like(weight), weight)
    return broadcast_jet(x.primal * slope, x.tangent * slope)


def _prelu_shape(x: Jet, weight: Tensor) -> tuple[int, ...]:
    return () if weight.numel() == 1 else (1, -1, *[1] * (x.primal.ndim - 2))


@adjoint("prelu")
def _prelu_adjoint(grad: Jet, out: Jet, needs: tuple, x: Jet, weight: Tensor):
    shape = _prelu_shape(x, weight)
    positive = x.primal > 0
    slope = torch.where(positive, 1.0, weight.view(shape)).to(grad.primal.dtype)
    grad_x = Jet(grad.primal * slope, grad.tangent * slope)
    moved = (grad.tangent * x.tangent).sum(0) + grad.primal * x.primal
    by_weight = torch.where(positive, 0.0, moved)
    if weight.numel() > 1:
        by_weight = by_weight.transpose(0, 1).flatten(1).sum(1)
    return grad_x, by_weight.sum().view(weight.shape) if weight.numel() == 1 else by_weight


_open = bind(RULES["sigmoid"])


@rule("glu", composed=True)
def glu(x: Jet, dim: int = -1) -> Jet:
    """The first half times the sigmoid of the second."""
    value, gate = chunk(x, 2, dim)
    return mul(value, _open(gate))
