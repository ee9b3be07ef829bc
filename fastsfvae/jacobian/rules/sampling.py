"""Samples of an image or a volume at points of a grid, and the grid that an affine map makes.

Where the grid does not depend on z, PyTorch's own kernels take tangents as they take values. Where
it does, the samples are sums over the neighbours of each point, with weights that are polynomials
in where the point lies between them.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsfvae.jacobian.rules.arithmetic import add, mul
from fastsfvae.jacobian.rules.constant import as_jets
from fastsfvae.jacobian.rules.indexing import gather
from fastsfvae.jacobian.rules.jet import Jet, full_tangent, move, move_folded
from fastsfvae.jacobian.rules.pieces import select
from fastsfvae.jacobian.rules.registry import adjoint, always, rule
from fastsfvae.jacobian.rules.shape import flatten, unflatten, unsqueeze

aten = torch.ops.aten
# PyTorch's numbers for the interpolation and for what lies outside.
_BILINEAR, _NEAREST, _BICUBIC = range(3)
_ZEROS, _BORDER, _REFLECTION = range(3)
_MODES, _PADDINGS = ("bilinear", "nearest", "bicubic"), ("zeros", "border", "reflection")


@rule(
    "grid_sampler", "grid_sampler_2d", "grid_sampler_3d", several=True, composed=True, covers=always
)
def grid_sampler(x: Any, grid: Any, mode: int, padding: int, align_corners: bool) -> Jet:
    """Samples ``[N, C, *points]`` of x ``[N, C, *space]`` at a grid ``[N, *points, axes]``."""
    plain, (x, grid) = not isinstance(grid, Jet), as_jets(x, grid)
    # The nearest neighbour stays the same around a point.
    if plain or mode == _NEAREST:
        return _sampled(x, grid.primal, mode, padding, align_corners)
    space = x.primal.shape[2:]
    pixels = flatten(x, 2)
    taps = []
    for axis, size in enumerate(space):
        # The grid's last axis counts the columns first.
        where = select(grid, -1, len(space) - 1 - axis)
        taps.append(_taps(where, size, mode, padding, align_corners))
    strides = [math.prod(space[axis + 1 :]) for axis in range(len(space))]
    terms = []
    for corner in itertools.product(*taps):
        place = sum(index * stride for (index, _), stride in zip(corner, strides, strict=True))
        weight = corner[0][1]
        for _, factor in corner[1:]:
            weight = mul(weight, factor)
        places = place.flatten(1)[:, None].expand(-1, x.primal.shape[1], -1)
        taken = unflatten(gather(pixels, 2, places), 2, list(place.shape[1:]))
        terms.append(mul(taken, unsqueeze(weight, 1)))
    total = terms[0]
    for term in terms[1:]:
        total = add(total, term)
    return total


@rule("fastsfvae.sampled")
def _sampled(x: Jet, grid: Tensor, mode: int, padding: int, align_corners: bool) -> Jet:
    """`grid_sampler` at points that have no tangents."""

    def sampled(t: Tensor) -> Tensor:
        points = _for_all(grid, t)
        return F.grid_sample(t, points, _MODES[mode], _PADDINGS[padding], align_corners)

    return move_folded(Jet(x.primal, full_tangent(x)), sampled)


def _for_all(grid: Tensor, folded: Tensor) -> Tensor:
    return grid.repeat(folded.shape[0] // max(1, grid.shape[0]), *[1] * (grid.ndim - 1))


@adjoint("fastsfvae.sampled", covers=always)
def _sampled_adjoint(
    grad: Jet, out: Jet, needs: tuple, x: Jet, grid: Tensor, mode: int, padding: int, corners: bool
):
    backward = getattr(aten, f"grid_sampler_{grid.shape[-1]}d_backward")

    def back(g: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        points, wanted = _for_all(grid, g), (needs[0], needs[1])
        return backward(g.contiguous(), t, points, mode, padding, corners, wanted)

    by_value = back(grad.primal, x.primal)
    by_tangents = back(grad.tangent.flatten(0, 1), full_tangent(x).flatten(0, 1))
    of_x, of_grid = None, None
    if needs[0]:
        of_x = Jet(by_value[0], by_tangents[0].view(len(grad.tangent), *x.primal.shape))
    if needs[1]:
        of_grid = by_value[1] + by_tangents[1].view(-1, *grid.shape).sum(0)
    return of_x, of_grid


def _taps(
    where: Jet, size: int, mode: int, padding: int, align_corners: bool
) -> list[tuple[Tensor, Jet]]:
    """The neighbours along one axis: pairs of an index and a weight, both in the grid's shape."""
    scale = (size - 1) / 2 if align_corners else size / 2
    value = (where.primal + 1) * scale if align_corners else ((where.primal + 1) * size - 1) / 2
    slope = torch.full_like(value, scale)
    if mode == _BILINEAR:
        value, turn = _padded(value, size, padding, align_corners)
        slope = slope * turn
    first = value.floor()
    between = _moved_to(where, value - first, slope)
    weights = _linear(between) if mode == _BILINEAR else _cubic(between)
    taps = []
    for offset, weight in enumerate(weights, 0 if mode == _BILINEAR else -1):
        place = first + offset
        if mode == _BICUBIC:
            place, _ = _padded(place, size, padding, align_corners)
        inside = (place >= 0) & (place < size)
        taps.append((place.clamp(0, size - 1).long(), mul(weight, inside.to(value.dtype))))
    return taps


def _padded(value: Tensor, size: int, padding: int, align_corners: bool) -> tuple[Tensor, Tensor]:
    """Where points outside are looked up along an axis, and the derivative of that."""
    slope = torch.ones_like(value)
    if padding == _ZEROS:
        return value, slope
    if padding == _REFLECTION:
        least, span = (0.0, size - 1) if align_corners else (-0.5, size)
        if span == 0:
            return torch.zeros_like(value), torch.zeros_like(value)
        distance = (value - least).abs()
        flips, rest = (distance / span).floor(), distance.fmod(span)
        odd = flips % 2 == 1
        slope = torch.where((value < least) ^ odd, -slope, slope)
        value = torch.where(odd, span - rest, rest) + least
    # As in PyTorch, the bounds themselves count as outside.
    slope = slope * ((value > 0) & (value < size - 1))
    return value.clamp(0, size - 1), slope


@rule("fastsfvae.moved_to")
def _moved_to(x: Jet, value: Tensor, slope: Tensor) -> Jet:
    """A piecewise linear function of x, given by its value and its slope."""
    return Jet(value, x.tangent * slope)


@adjoint("fastsfvae.moved_to")
def _moved_to_adjoint(grad: Jet, out: Jet, needs: tuple, x: Jet, value: Tensor, slope: Tensor):
    return (move(grad, lambda g, _: g * slope),)


def _linear(between: Jet) -> list[Jet]:
    return [_less(between), between]


def _less(x: Jet) -> Jet:
    """1 - x."""
    return add(mul(x, -1), 1)


def _cubic(between: Jet) -> list[Jet]:
    """The weights of cubic convolution with PyTorch's parameter."""
    a = -0.75

    def near(s: Jet) -> Jet:
        return add(mul(mul(s, s), add(mul(s, a + 2), -(a + 3))), 1)

    def far(s: Jet) -> Jet:
        return add(mul(s, add(mul(s, add(mul(s, a), -5 * a)), 8 * a)), -4 * a)

    other = _less(between)
    return [far(add(between, 1)), near(between), near(other), far(add(other, 1))]


@rule("affine_grid_generator")
def affine_grid(theta: Jet, size: list[int], align_corners: bool) -> Jet:
    """The points that maps ``[N, axes, axes + 1]`` give to those of a regular grid."""

    def points(t: Tensor) -> Tensor:
        return aten.affine_grid_generator(t, [t.shape[0], *size[1:]], align_corners)

    return move_folded(theta, points)


@adjoint("affine_grid_generator")
def _affine_grid_adjoint(
    grad: Jet, out: Jet, needs: tuple, theta: Jet, size: list[int], align_corners: bool
) -> tuple[Jet]:
    def back(g: Tensor) -> Tensor:
        whole = [g.shape[0], *size[1:]]
        return aten.affine_grid_generator_backward(g.contiguous(), whole, align_corners)

    return (move_folded(grad, back),)
