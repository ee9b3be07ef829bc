"""Normalisations, in primitive operations.

PyTorch's own forward-mode formulas of layer_norm and instance_norm give tangents whose gradients
are wrong. `normalize` has the formulas that are used here, for tangents and for their gradients.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsfvae.jacobian.rules.jet import Jet, broadcast_jet, move
from fastsfvae.jacobian.rules.normalize import move_normalized, precise, pull_normalized
from fastsfvae.jacobian.rules.registry import adjoint, rule
from fastsfvae.jacobian.rules.shape import tangent_of


def _over_last(
    x: Jet, primal: Tensor, shape: list[int], weight: Tensor | None, eps: float, center: bool
) -> Jet:
    tangent = tangent_of(x, len(shape) < x.primal.ndim)
    moved = move_normalized(x.primal, tangent, _last(shape), eps, center)
    return broadcast_jet(primal, moved if weight is None else moved * weight)


def _last(shape: list[int]) -> list[int]:
    return list(range(-len(shape), 0))


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
    return _over_last(x, primal, shape, weight, eps, center=True)


@adjoint("layer_norm")
def _layer_norm_adjoint(
    grad: Jet, out: Jet, needs: tuple, x: Jet, shape, weight=None, bias=None, eps=1e-5, *_
):
    grad_x, by_weight = pull_normalized(grad, x, _last(shape), eps, True, weight)
    return grad_x, None, by_weight, grad.primal


@rule("rms_norm")
def rms_norm(
    x: Jet, shape: list[int], weight: Tensor | None = None, eps: float | None = None
) -> Jet:
    """Over the last axes, without centring."""
    primal = F.rms_norm(x.primal, shape, weight, eps)
    return _over_last(x, primal, shape, weight, _rms_eps(x, eps), center=False)


def _rms_eps(x: Jet, eps: float | None) -> float:
    return torch.finfo(precise(x.primal).dtype).eps if eps is None else eps


@adjoint("rms_norm")
def _rms_norm_adjoint(grad: Jet, out: Jet, needs: tuple, x: Jet, shape, weight=None, eps=None):
    grad_x, by_weight = pull_normalized(grad, x, _last(shape), _rms_eps(x, eps), False, weight)
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
    apart, axes = _by_group(x, groups), _in_group(x)
    moved = move_normalized(apart.primal, apart.tangent, axes, eps, center=True).flatten(2, 3)
    return broadcast_jet(primal, moved if weight is None else moved * _of_channels(weight, x))


def _by_group(x: Jet, groups: int) -> Jet:
    """Channels as groups of channels; unflattened, so that a channels-last layout survives."""
    split = (groups, x.primal.shape[1] // groups)
    return Jet(x.primal.unflatten(1, split), x.tangent.unflatten(2, split))


def _in_group(x: Jet) -> list[int]:
    return list(range(1 - x.primal.ndim, 0))


def _of_channels(t: Tensor, x: Jet) -> Tensor:
    """One number a channel, to broadcast against x and its tangents."""
    return t.view(-1, *[1] * (x.primal.ndim - 2))


def _per_channel(t: Tensor) -> Tensor:
    """Summed over the batch and space."""
    return t.transpose(0, 1).flatten(1).sum(1)


@adjoint("group_norm")
def _group_norm_adjoint(
    grad: Jet, out: Jet, needs: tuple, x: Jet, groups, weight=None, bias=None, eps=1e-5, *_
):
    shaped = weight if weight is None else _of_channels(weight, x).unflatten(0, (groups, -1))
    apart = _by_group(grad, groups), _by_group(x, groups)
    pulled, by_weight = pull_normalized(*apart, _in_group(x), eps, True, shaped)
    grad_x = Jet(pulled.primal.flatten(1, 2), pulled.tangent.flatten(2, 3))
    if by_weight is not None:
        by_weight = _per_channel(by_weight.flatten(1, 2))
    return grad_x, None, by_weight, _per_channel(grad.primal)


@rule("instance_norm", composed=True)
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
    """Each channel a group of its own; in evaluation with running statistics, as batch_norm."""
    if use_input_stats:
        return group_norm(x, x.primal.shape[1], weight, bias, eps)
    return batch_norm(x, weight, bias, running_mean, running_var, False, momentum, eps, True)


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
    scale = torch.rsqrt(precise(running_var) + eps)
    scale = scale if weight is None else scale * weight
    return broadcast_jet(primal, x.tangent * _of_channels(scale.to(x.tangent.dtype), x))


@adjoint("batch_norm")
def _batch_norm_adjoint(
    grad: Jet, out: Jet, needs: tuple, x: Jet, weight, bias, mean, variance, training, _, eps, *__
):
    dtype = grad.primal.dtype
    rstd = torch.rsqrt(precise(variance) + eps).to(dtype)
    by_weight = None
    if needs[1]:
        centred = x.primal - _of_channels(mean.to(dtype), x)
        moved = (grad.tangent * x.tangent).sum(0)
        by_weight = (_per_channel(grad.primal * centred) + _per_channel(moved)) * rstd
    scale = _of_channels(rstd if weight is None else rstd * weight.to(dtype), x)
    return move(grad, lambda g, _: g * scale), by_weight, _per_channel(grad.primal)
