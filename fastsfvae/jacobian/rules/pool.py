"""Pooling and resampling in space: [B, C, *space] to [B, C, *other space]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsfvae.jacobian.jet import Jet, full_tangent, move_folded
from fastsfvae.jacobian.registry import adjoint, rule


def _linear_in_space(name: str, spatial: int) -> None:
    """A linear operation on [N, C, *space], or on [C, *space] where there is no batch."""
    operation = getattr(torch.ops.aten, name)

    @rule(name)
    def moved(x: Jet, *args: Any, **kwargs: Any) -> Jet:
        if x.primal.ndim == spatial + 1:
            tangent = operation(full_tangent(x), *args, **kwargs)
            return Jet(operation(x.primal, *args, **kwargs), tangent)
        return move_folded(x, lambda t: operation(t, *args, **kwargs))


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


def _resampling_adjoint(name: str, spatial: int, corners: bool) -> None:
    """Of upsample_*(x, size, [align_corners,] scales): PyTorch's own backward operator."""
    operation = getattr(torch.ops.aten, f"{name}_backward")

    @adjoint(name, covers=lambda args, kwargs: args[0].primal.ndim == spatial + 2 and not kwargs)
    def pulled(grad: Jet, out: Jet, needs: tuple, x: Jet, size: Any, *options: Any) -> tuple[Jet]:
        mode = options[:1] if corners else ()
        # One list of factors, or one number for each axis.
        factors = [f for o in options[len(mode) :] for f in (o if isinstance(o, list) else [o])]
        factors = factors or [None] * spatial
        size = list(out.primal.shape[2:])

        def back(g: Tensor) -> Tensor:
            source = [g.shape[0], *x.primal.shape[1:]]
            return operation(g.contiguous(), size, source, *mode, *factors)

        return (move_folded(grad, back),)


for _spatial in (1, 2, 3):
    _resampling_adjoint(f"upsample_nearest{_spatial}d", _spatial, corners=False)
    _resampling_adjoint(f"_upsample_nearest_exact{_spatial}d", _spatial, corners=False)
for _name, _spatial in (
    ("upsample_linear1d", 1),
    ("upsample_bilinear2d", 2),
    ("upsample_bicubic2d", 2),
    ("upsample_trilinear3d", 3),
):
    _resampling_adjoint(_name, _spatial, corners=True)


def _average_adjoint(name: str, spatial: int) -> None:
    adaptive = name.startswith("adaptive")
    prefix = "_" if adaptive else ""
    operation = getattr(torch.ops.aten, f"{prefix}{name}_backward")

    @adjoint(name, covers=lambda args, kwargs: args[0].primal.ndim == spatial + 2 and not kwargs)
    def pulled(grad: Jet, out: Jet, needs: tuple, x: Jet, *options: Any) -> tuple[Jet]:
        if not adaptive:
            defaults: tuple[Any, ...] = (None, [], 0, False, True, None)
            options = (*options, *defaults[len(options) :])

        def back(g: Tensor) -> Tensor:
            # Only the shape of the argument counts.
            source = g.new_empty((g.shape[0], *x.primal.shape[1:]))
            return operation(g.contiguous(), source, *(() if adaptive else options))

        return (move_folded(grad, back),)


for _spatial in (2, 3):
    _average_adjoint(f"avg_pool{_spatial}d", _spatial)
    _average_adjoint(f"adaptive_avg_pool{_spatial}d", _spatial)
