"""Running and total products, sums and extremes along an axis.

A product's derivative by one entry is the product of the others, which no division gives where
entries are zero: products of halves, or of neighbours at growing distances, need none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastsfvae.jacobian.rules.arithmetic import mul
from fastsfvae.jacobian.rules.indexing import gather
from fastsfvae.jacobian.rules.jet import Jet
from fastsfvae.jacobian.rules.pair import logaddexp
from fastsfvae.jacobian.rules.pieces import cat, slice_
from fastsfvae.jacobian.rules.registry import rule
from fastsfvae.jacobian.rules.shape import convert, front, reshape, squeeze


def _converted(x: Jet, dtype: Any) -> Jet:
    return x if dtype is None else convert(x, dtype)


def _running(x: Jet, dim: int, join: Callable[[Jet, Jet], Jet]) -> Jet:
    """Each entry joined with all in front of it, in log2(extent) steps."""
    if not x.primal.ndim:
        return x
    axis, distance = front(dim, x.primal.ndim), 1
    while distance < x.primal.shape[axis]:
        joined = join(slice_(x, axis, 0, -distance), slice_(x, axis, distance))
        x = cat([slice_(x, axis, 0, distance), joined], axis)
        distance *= 2
    return x


@rule("cumprod", composed=True)
def cumprod(x: Jet, dim: int, *, dtype: Any = None) -> Jet:
    """Running products."""
    return _running(_converted(x, dtype), dim, mul)


@rule("logcumsumexp", composed=True)
def logcumsumexp(x: Jet, dim: int) -> Jet:
    """Logarithms of running sums of exponentials."""
    return _running(x, dim, logaddexp)


@rule("prod", composed=True)
def prod(x: Jet, dim: int | None = None, keepdim: bool = False, *, dtype: Any = None) -> Jet:
    """The product along an axis or of everything."""
    x = _converted(x, dtype)
    if dim is None:
        x, dim = reshape(x, [-1]), 0
    elif not x.primal.ndim:
        return x
    axis = front(dim, x.primal.ndim)
    while (extent := x.primal.shape[axis]) > 1:
        half = extent // 2
        product = mul(slice_(x, axis, 0, half), slice_(x, axis, half, 2 * half))
        rest = [slice_(x, axis, 2 * half)] if extent % 2 else []
        x = cat([product, *rest], axis)
    return x if keepdim else squeeze(x, axis)


def _running_extreme(name: str) -> None:
    """The running extremes, and where they lie."""
    operation = getattr(torch, name)

    @rule(name, composed=True)
    def running(x: Jet, dim: int) -> tuple[Jet, torch.Tensor]:
        positions = operation(x.primal, dim).indices
        return (gather(x, dim, positions) if x.primal.ndim else x), positions


_running_extreme("cummax")
_running_extreme("cummin")
