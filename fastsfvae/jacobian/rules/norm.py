"""Normalisations, in primitive operations.

PyTorch's own forward-mode formulas of layer_norm and instance_norm give tangents whose gradients
are wrong. With xh = (x - mean) * rstd over the normalised axes, d xh = rstd * (c - xh * mean(xh c))
with c = dx - mean(dx), or c = dx where nothing is subtracted (RMSNorm).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsfvae.jacobian.jet import Jet, broadcast_jet, full_tangent, move
from fastsfvae.jacobian.registry import adjoint, rule
from fastsfvae.jacobian.rules.normalize import pull_normalized

aten = torch.ops.aten


def _precise(t: Tensor) -> Tensor:
    """Statistics of half-precision values are taken in float32."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def _normalized(x: Tensor, tangent: Tensor, axes: list[int], eps: float, center: bool) -> Tensor:
    """D xh over negative axes, which are the same ones for values and tangents."""
    x, tangent = _precise(x), _precise(tangent)
    if center:
        x = x - x.mean(axes, keepdim=True)
        tangent = tangent - tangent.mean(axes, keepdim=True)
    rstd = torch.rsqrt(x.square().mean(axes, keepdim=True) + eps)
    normal = x * rstd
    along = (normal * tangent).mean(axes, keepdim=True)
    return rstd * (tangent - normal * along)


@rule("layer_norm")
def layer_norm(
    x: Jet,
    shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Jet:
    """Over the last axes."""
    primal = F.layer_norm(x.primal, shape, weight, bias, eps)
    axes = list(range(-len(shape), 0))
    tangent = x.tangent if len(shape) < x.primal.ndim else full_tangent(x)
    moved = _normalized(x.primal, tangent, axes, eps, center=True)
    return broadcast_jet(primal, moved if weight is None else moved * weight)


@adjoint("layer_norm")
def _layer_norm_adjoint(
    grad: Jet,
    out: Jet,
    needs: tuple,
    x: Jet,
    shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
):
    axes = list(range(-len(shape), 0))
    grad_x, by_weight = pull_normalized(grad, x, axes, eps, True, weight)
    return grad_x, None, by_weight, grad.primal


@rule("rms_norm")
def rms_norm(
    x: Jet, shape: list[int], weight: Tensor | None = None, eps: float | None = None
) -> Jet:
    """Over the last axes, without centring."""
    primal = F.rms_norm(x.primal, shape, weight, eps)
    if eps is None:
        eps = torch.finfo(_precise(x.primal).dtype).eps
    axes = list(range(-len(shape), 0))
    tangent = x.tangent if len(shape) < x.primal.ndim else full_tangent(x)
    moved = _normalized(x.primal, tangent, axes, eps, center=False)
    return broadcast_jet(primal, moved if weight is None else moved * weight)


@adjoint("rms_norm")
def _rms_norm_adjoint(
    grad: Jet,
    out: Jet,
    needs: tuple,
    x: Jet,
    shape: list[int],
    weight: Tensor | None = None,
    eps: float | None = None,
):
    if eps is None:
        eps = torch.finfo(_precise(x.primal).dtype).eps
    axes = list(range(-len(shape), 0))
    grad_x, by_weight = pull_normalized(grad, x, axes, eps, False, weight)
    return grad_x, None, by_weight


@rule("group_norm")
def group_norm(
    x: Jet,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Jet:
    """Over each group of channels (axis 1) and space."""
    primal = F.group_norm(x.primal, groups, weight, bias, eps)
    return _by_group(x, primal, groups, weight, eps)


def _by_group(x: Jet, primal: Tensor, groups: int, weight: Tensor | None, eps: float) -> Jet:
    batch, channels, *space = x.primal.shape
    split = (groups, channels // groups, *space)
    # Unflattened, not merged: a channels-last layout survives.
    value, tangent = x.primal.unflatten(1, split[:2]), x.tangent.unflatten(2, split[:2])
    axes = list(range(-len(split) + 1, 0))
    moved = _normalized(value, tangent, axes, eps, center=True)
    moved = moved.flatten(2, 3)
    if weight is not None:
        moved = moved * weight.view(-1, *[1] * len(space))
    return broadcast_jet(primal, moved)


@adjoint("group_norm")
def _group_norm_adjoint(
    grad: Jet,
    out: Jet,
    needs: tuple,
    x: Jet,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
):
    grad_x, by_weight, by_bias = _pull_by_group(grad, x, groups, weight, eps)
    return grad_x, None, by_weight, by_bias


def _pull_by_group(grad: Jet, x: Jet, groups: int, weight: Tensor | None, eps: float):
    split = (groups, x.primal.shape[1] // groups)

    def apart(jet: Jet) -> Jet:
        return Jet(jet.primal.unflatten(1, split), jet.tangent.unflatten(2, split))

    axes = list(range(1 - x.primal.ndim, 0))
    shaped = weight if weight is None else weight.view(*split, *[1] * (x.primal.ndim - 2))
    pulled, by_weight = pull_normalized(apart(grad), apart(x), axes, eps, True, shaped)
    if by_weight is not None:
        by_weight = by_weight.flatten(1, 2).transpose(0, 1).flatten(1).sum(1)
    by_bias = grad.primal.transpose(0, 1).flatten(1).sum(1)
    return Jet(pulled.primal.flatten(1, 2), pulled.tangent.flatten(2, 3)), by_weight, by_bias


@rule("instance_norm")
def instance_norm(
    x: Jet,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Jet:
    """Over each channel's space; in evaluation with running statistics, as batch_norm."""
    if not use_input_stats:
        return batch_norm(x, weight, bias, running_mean, running_var, False, momentum, eps, True)
    primal = F.instance_norm(x.primal, None, None, weight, bias, True, momentum, eps)
    return _by_group(x, primal, x.primal.shape[1], weight, eps)


@adjoint("instance_norm", covers=lambda args, kwargs: bool(args[5]))
def _instance_norm_adjoint(
    grad: Jet,
    out: Jet,
    needs: tuple,
    x: Jet,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
):
    return _pull_by_group(grad, x, x.primal.shape[1], weight, eps)


@rule("batch_norm")
def batch_norm(
    x: Jet,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Jet:
    """With running statistics: linear. Training mode is refused before it runs."""
    primal = F.batch_norm(x.primal, running_mean, running_var, weight, bias, False, momentum, eps)
    assert running_var is not None
    scale = torch.rsqrt(_precise(running_var) + eps)
    scale = scale if weight is None else scale * weight
    scale = scale.to(x.tangent.dtype).view(-1, *[1] * (x.primal.ndim - 2))
    return broadcast_jet(primal, x.tangent * scale)


@adjoint("batch_norm")
def _batch_norm_adjoint(
    grad: Jet,
    out: Jet,
    needs: tuple,
    x: Jet,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
):
    def shaped(t: Tensor) -> Tensor:
        return t.to(grad.primal.dtype).view(-1, *[1] * (x.primal.ndim - 2))

    def per_channel(t: Tensor) -> Tensor:
        return t.transpose(0, 1).flatten(1).sum(1)

    rstd = shaped(torch.rsqrt(_precise(running_var) + eps))
    by_weight = None
    if needs[1]:
        value = per_channel(grad.primal * (x.primal - shaped(running_mean)))
        moved = per_channel((grad.tangent * x.tangent).sum(0))
        by_weight = (value + moved) * rstd.flatten()
    scale = rstd if weight is None else rstd * shaped(weight)
    return move(grad, lambda g, _: g * scale), by_weight, per_channel(grad.primal)


@rule("softmax")
def softmax(x: Jet, dim: int, dtype: Any = None) -> Jet:
    """Dy = y (dx - sum(y dx))."""
    y = torch.softmax(x.primal, dim, dtype)
    axis = dim if dim < 0 else dim - x.primal.ndim
    tangent = full_tangent(x) if axis == -x.primal.ndim else x.tangent
    tangent = tangent.to(y.dtype)
    return broadcast_jet(y, y * (tangent - (y * tangent).sum(axis, keepdim=True)))


@adjoint("softmax")
def _softmax_adjoint(grad: Jet, out: Jet, needs: tuple, x: Jet, dim: int, dtype: Any = None):
    y = out.primal
    axis = dim if dim < 0 else dim - y.ndim
    along = (y * x.tangent).sum(axis, keepdim=True)
    total = (y * grad.tangent).sum(axis, keepdim=True)
    # T' = y (T - sum(y T)) depends on y in both places.
    by_y = grad.primal + (grad.tangent * (x.tangent - along) - x.tangent * total).sum(0)
    pulled = y * (by_y - (y * by_y).sum(axis, keepdim=True))
    return (Jet(pulled, y * (grad.tangent - total)),)


@rule("log_softmax")
def log_softmax(x: Jet, dim: int, dtype: Any = None) -> Jet:
    """Dy = dx - sum(softmax(x) dx)."""
    y = torch.log_softmax(x.primal, dim, dtype)
    axis = dim if dim < 0 else dim - x.primal.ndim
    tangent = full_tangent(x) if axis == -x.primal.ndim else x.tangent
    tangent = tangent.to(y.dtype)
    return broadcast_jet(y, tangent - (y.exp() * tangent).sum(axis, keepdim=True))


@adjoint("log_softmax")
def _log_softmax_adjoint(grad: Jet, out: Jet, needs: tuple, x: Jet, dim: int, dtype: Any = None):
    p = out.primal.exp()
    axis = dim if dim < 0 else dim - p.ndim
    total = grad.tangent.sum(axis, keepdim=True)
    by_y = grad.primal - p * (x.tangent * total).sum(0)
    return (Jet(by_y - p * by_y.sum(axis, keepdim=True), grad.tangent - p * total),)
