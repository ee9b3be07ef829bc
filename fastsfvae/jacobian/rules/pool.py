"""Pooling and resampling in space: [B, C, *space] to [B, C, *other space]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsfvae.jacobian.jet import Jet, fold, full_tangent, unfold
from fastsfvae.jacobian.registry import rule


def _linear_in_space(name: str, spatial: int) -> None:
    """A linear operation on [N, C, *space], or on [C, *space] where there is no batch."""
    operation = getattr(torch.ops.aten, name)

    @rule(name)
    def moved(x: Jet, *args: Any, **kwargs: Any) -> Jet:
        primal = operation(x.primal, *args, **kwargs)
        if x.primal.ndim == spatial + 1:
            return Jet(primal, operation(full_tangent(x), *args, **kwargs))
        folded = operation(fold(x.tangent), *args, **kwargs)
        return Jet(primal, unfold(folded, x.tangent.shape[0]))


for _spatial in (1, 2, 3):
    for _name in (
        f"avg_pool{_spatial}d",
        f"adaptive_avg_pool{_spatial}d",
        f"upsample_nearest{_spatial}d",
        f"_upsample_nearest_exact{_spatial}d",
    ):
        _linear_in_space(_name, _spatial)
for _name, _spatial in (
    ("upsample_linear1d", 1),
    ("upsample_bilinear2d", 2),
    ("upsample_bicubic2d", 2),
    ("upsample_trilinear3d", 3),
    ("_upsample_bilinear2d_aa", 2),
    ("_upsample_bicubic2d_aa", 2),
):
    _linear_in_space(_name, _spatial)


def _pick(x: Jet, values: Tensor, indices: Tensor, spatial: int) -> Jet:
    """The tangents of the entries that a maximum took, by their flat index within a plane."""
    tangent = full_tangent(x).flatten(-spatial)
    flat = indices.flatten(-spatial).expand(tangent.shape[0], *indices.shape[:-spatial], -1)
    return Jet(values, tangent.gather(-1, flat).view(tangent.shape[0], *values.shape))


def _max_rule(name: str, operation: Callable[..., Any], spatial: int, pair: bool) -> None:
    @rule(name)
    def pooled(x: Jet, *args: Any, **kwargs: Any) -> Any:
        values, indices = operation(x.primal, *args, **kwargs)
        jet = _pick(x, values, indices, spatial)
        return (jet, indices) if pair else jet


def _with_indices(operation: Callable[..., Any]) -> Callable[..., Any]:
    def call(x: Tensor, kernel, stride=(), padding=0, dilation=1, ceil_mode=False) -> Any:
        return operation(x, kernel, stride or None, padding, dilation, ceil_mode, True)

    return call


for _spatial, _maximum in (
    (1, F.max_pool1d),
    (2, F.max_pool2d),
    (3, F.max_pool3d),
):
    _indexed = _with_indices(_maximum)
    _max_rule(f"max_pool{_spatial}d", _indexed, _spatial, pair=False)
    _max_rule(f"max_pool{_spatial}d_with_indices", _indexed, _spatial, pair=True)
    _both = getattr(torch.ops.aten, f"adaptive_max_pool{_spatial}d")
    _max_rule(f"adaptive_max_pool{_spatial}d", _both, _spatial, pair=True)
