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

from fastsfvae.jacobian.jet import Jet, broadcast_jet, full_tangent
from fastsfvae.jacobian.registry import rule

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


@rule("softmax")
def softmax(x: Jet, dim: int, dtype: Any = None) -> Jet:
    """Dy = y (dx - sum(y dx))."""
    y = torch.softmax(x.primal, dim, dtype)
    axis = dim if dim < 0 else dim - x.primal.ndim
    tangent = full_tangent(x) if axis == -x.primal.ndim else x.tangent
    tangent = tangent.to(y.dtype)
    return broadcast_jet(y, y * (tangent - (y * tangent).sum(axis, keepdim=True)))


@rule("log_softmax")
def log_softmax(x: Jet, dim: int, dtype: Any = None) -> Jet:
    """Dy = dx - sum(softmax(x) dx)."""
    y = torch.log_softmax(x.primal, dim, dtype)
    axis = dim if dim < 0 else dim - x.primal.ndim
    tangent = full_tangent(x) if axis == -x.primal.ndim else x.tangent
    tangent = tangent.to(y.dtype)
    return broadcast_jet(y, tangent - (y.exp() * tangent).sum(axis, keepdim=True))
