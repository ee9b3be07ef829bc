"""Pooling, windows and resampling in space: [B, C, *space] to [B, *other extents]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsfvae.jacobian.rules.indexing import gather
from fastsfvae.jacobian.rules.jet import Jet, full_tangent, move_folded
from fastsfvae.jacobian.rules.registry import adjoint, rule
from fastsfvae.jacobian.rules.shape import flatten, unflatten


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
_SMOOTH = (
    ("upsample_linear1d", 1),
    ("upsample_bilinear2d", 2),
    ("upsample_bicubic2d", 2),
    ("upsample_trilinear3d", 3),
    ("_upsample_bilinear2d_aa", 2),
    ("_upsample_bicubic2d_aa", 2),
)
for _name, _spatial in (*_SMOOTH, ("im2col", 2), ("col2im", 1)):
    _linear_in_space(_name, _spatial)


def _max_rule(name: str, operation: Callable[..., Any], spatial: int, pair: bool) -> None:
    """The entries that the maxima took, by their flat index within a plane."""

    @rule(name, composed=True)
    def pooled(x: Jet, *args: Any, **kwargs: Any) -> Any:
        positions = operation(x.primal, *args, **kwargs)[1]
        taken = gather(flatten(x, -spatial), -1, positions.flatten(-spatial))
        maxima = unflatten(taken, -1, list(positions.shape[-spatial:]))
        return (maxima, positions) if pair else maxima


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


def _without_names(args: tuple, kwargs: dict[str, Any]) -> bool:
    return not kwargs


def _pulled(grad: Jet, x: Jet, spatial: int, back: Callable[[Tensor, list[int]], Tensor]) -> Jet:
    """The adjoint of a linear operation on [N, C, *space], or on [C, *space] without a batch.

    Args:
        grad: of the result.
        x: the argument.
        spatial: the number of axes of space.
        back: maps a gradient [N, C, *space], whose argument had that shape, to the argument's.
    """
    inner = list(x.primal.shape[-1 - spatial :])
    if x.primal.ndim == spatial + 2:
        return move_folded(grad, lambda g: back(g, [g.shape[0], *inner]))
    return Jet(
        back(grad.primal[None], [1, *inner])[0], back(grad.tangent, [len(grad.tangent), *inner])
    )


def _resampling_adjoint(name: str, spatial: int, corners: bool) -> None:
    """Of upsample_*(x, size, [align_corners,] scales): PyTorch's own backward operator."""
    operation = getattr(torch.ops.aten, f"{name}_backward")

    @adjoint(name, covers=_without_names)
    def pulled(grad: Jet, out: Jet, needs: tuple, x: Jet, size: Any, *options: Any) -> tuple[Jet]:
        mode = options[:1] if corners else ()
        # One list of factors, or one number for each axis.
        factors = [f for o in options[len(mode) :] for f in (o if isinstance(o, list) else [o])]
        factors = factors or [None] * spatial
        size = list(out.primal.shape[-spatial:])

        def back(g: Tensor, source: list[int]) -> Tensor:
            return operation(g.contiguous(), size, source, *mode, *factors)

        return (_pulled(grad, x, spatial, back),)


for _spatial in (1, 2, 3):
    _resampling_adjoint(f"upsample_nearest{_spatial}d", _spatial, corners=False)
    _resampling_adjoint(f"_upsample_nearest_exact{_spatial}d", _spatial, corners=False)
for _name, _spatial in _SMOOTH:
    _resampling_adjoint(_name, _spatial, corners=True)


def _average_adjoint(spatial: int, adaptive: bool) -> None:
    """PyTorch's own backward operators; a line is pooled as a plane of one row."""
    planar = max(2, spatial)
    name = f"adaptive_avg_pool{spatial}d" if adaptive else f"avg_pool{spatial}d"
    operation = getattr(
        torch.ops.aten,
        f"_adaptive_avg_pool{planar}d_backward" if adaptive else f"avg_pool{planar}d_backward",
    )

    def settings_of(kernel: Any, stride: Any = (), padding: Any = 0, *flags: Any) -> tuple:
        window: tuple = kernel, stride or kernel, padding
        if spatial == 1:
            lists = [[size] if isinstance(size, int) else size for size in window]
            window = tuple([fill, *size] for fill, size in zip((1, 1, 0), lists, strict=True))
        defaults = (False, True, None)
        return *window, *flags, *defaults[len(flags) :]

    @adjoint(name, covers=_without_names)
    def pulled(grad: Jet, out: Jet, needs: tuple, x: Jet, *options: Any) -> tuple[Jet]:
        settings = () if adaptive else settings_of(*options)

        def back(g: Tensor, shape: list[int]) -> Tensor:
            # Only the shape of the argument counts.
            source = g.new_empty(shape)
            if spatial == 1:
                return operation(g.unsqueeze(-2), source.unsqueeze(-2), *settings).squeeze(-2)
            return operation(g.contiguous(), source, *settings)

        return (_pulled(grad, x, spatial, back),)


for _spatial in (1, 2, 3):
    _average_adjoint(_spatial, adaptive=False)
    _average_adjoint(_spatial, adaptive=True)


@adjoint("im2col", covers=_without_names)
def _im2col_adjoint(grad: Jet, out: Jet, needs: tuple, x: Jet, *window: Any) -> tuple[Jet]:
    space = list(x.primal.shape[-2:])
    return (_pulled(grad, x, 2, lambda g, _: torch.ops.aten.col2im(g, space, *window)),)


@adjoint("col2im", covers=_without_names)
def _col2im_adjoint(
    grad: Jet, out: Jet, needs: tuple, x: Jet, space: list[int], *window: Any
) -> tuple[Jet]:
    return (_pulled(grad, x, 1, lambda g, _: torch.ops.aten.im2col(g, *window)),)
