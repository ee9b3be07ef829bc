"""The tangents and the adjoint that all normalisations share.

With c = x - mean(x) (c = x where nothing is subtracted), xh = rstd c and t = T - mean(T), all means
over the normalised axes, the tangents of xh are D = rstd (t - xh s) with s = mean(xh t). A gradient
g of xh and gradients V_i of its tangents are pulled back by

    T_i:  P(V_i)                                          P(v) = rstd (v - mean(v) - xh mean(xh v))
    x:    P(g - rstd sum_i (s_i V_i + a_i t_i)) - rstd xh mean(sum_i V_i D_i)

with a_i = mean(xh V_i). (mean(v) is left out of P without centring.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastsfvae.jacobian.rules.jet import Jet


def precise(t: Tensor) -> Tensor:
    """Statistics of half-precision values are taken in float32."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


class _Normalized(NamedTuple):
    """The quantities of the formulas: t, rstd, xh, s and D."""

    tangent: Tensor
    rstd: Tensor
    normal: Tensor
    along: Tensor
    moved: Tensor


def _normalize(value: Tensor, tangent: Tensor, axes: list[int], eps: float, center: bool):
    value, tangent = precise(value), precise(tangent)
    if center:
        value = value - value.mean(axes, keepdim=True)
        tangent = tangent - tangent.mean(axes, keepdim=True)
    rstd = torch.rsqrt(value.square().mean(axes, keepdim=True) + eps)
    normal = value * rstd
    along = (normal * tangent).mean(axes, keepdim=True)
    return _Normalized(tangent, rstd, normal, along, rstd * (tangent - normal * along))


def move_normalized(
    value: Tensor, tangent: Tensor, axes: list[int], eps: float, center: bool
) -> Tensor:
    """The tangents of xh; see `pull_normalized`."""
    return _normalize(value, tangent, axes, eps, center).moved


def pull_normalized(
    grad: Jet, x: Jet, axes: list[int], eps: float, center: bool, weight: Tensor | None
) -> tuple[Jet, Tensor | None]:
    """Gradients of ``weight * xh + bias`` in x and, not yet summed over samples, in the weight.

    Args:
        grad: of the result.
        x: the argument.
        axes: negative, the same for values and tangents.
        eps: added to the variance.
        center: whether the mean is subtracted.
        weight: broadcasts against x, or None.
    """
    tangent, rstd, normal, along, moved = _normalize(x.primal, x.tangent, axes, eps, center)
    g, V = precise(grad.primal), precise(grad.tangent)
    by_weight = None
    if weight is not None:
        by_weight = g * normal + (V * moved).sum(0)
        g, V = g * weight, V * weight

    def project(v: Tensor) -> Tensor:
        inner = v - normal * (normal * v).mean(axes, keepdim=True)
        return rstd * (inner - v.mean(axes, keepdim=True) if center else inner)

    across = (normal * V).mean(axes, keepdim=True)
    inner = g - rstd * (along * V + across * tangent).sum(0)
    by_scale = (V * moved).sum(0).mean(axes, keepdim=True)
    return Jet(project(inner) - rstd * normal * by_scale, project(V)), by_weight
