"""Sums, moments, norms and extremes over axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsfvae.jacobian.fallback import generic_rule
from fastsfvae.jacobian.jet import Jet, broadcast_jet, full_tangent
from fastsfvae.jacobian.registry import RULES, adjoint, rule
from fastsfvae.jacobian.rules.arithmetic import maximum, minimum

aten = torch.ops.aten


def _axes(x: Jet, dim: Any) -> list[int]:
    """The reduced axes counted from the end, where they are the tangent's as well."""
    ndim = x.primal.ndim
    if dim is None or (isinstance(dim, (list, tuple)) and not dim):
        return list(range(-ndim, 0))
    dims = [dim] if isinstance(dim, int) else dim
    return [d if d < 0 else d - ndim for d in dims]


def _tangent(x: Jet, axes: list[int]) -> Tensor:
    return full_tangent(x) if -x.primal.ndim in axes else x.tangent


def _reduced(tangent: Tensor, axes: list[int], keepdim: bool) -> Tensor:
    return tangent.sum(axes, keepdim=keepdim) if axes else tangent


@rule("sum")
def sum_(x: Jet, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Jet:
    """Linear."""
    axes = _axes(x, dim)
    primal = x.primal.sum(axes, keepdim=keepdim, dtype=dtype) if axes else x.primal
    return broadcast_jet(primal, _reduced(_tangent(x, axes), axes, keepdim))


@rule("mean")
def mean(x: Jet, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Jet:
    """Linear."""
    axes = _axes(x, dim)
    primal = x.primal.mean(axes, keepdim=keepdim, dtype=dtype) if axes else x.primal
    tangent = _tangent(x, axes)
    return broadcast_jet(primal, tangent.mean(axes, keepdim=keepdim) if axes else tangent)


def _spreading(name: str, average: bool) -> None:
    @adjoint(name)
    def spread(
        grad: Jet, out: Jet, needs: tuple, x: Jet, dim: Any = None, keepdim: bool = False, **_: Any
    ) -> tuple[Jet]:
        axes = _axes(x, dim)
        share = out.primal.numel() / x.primal.numel() if average else 1

        def wide(g: Tensor, shape: torch.Size) -> Tensor:
            if not keepdim:
                # The last axis first: the others are counted from the end.
                for axis in sorted(axes, reverse=True):
                    g = g.unsqueeze(axis)
            return (g * share).expand(shape)

        tangents = wide(grad.tangent, _tangent(x, axes).shape)
        return (Jet(wide(grad.primal, x.primal.shape), tangents),)


_spreading("sum", average=False)
_spreading("mean", average=True)


@rule("cumsum")
def cumsum(x: Jet, dim: int, *, dtype: Any = None) -> Jet:
    """Linear."""
    (axis,) = _axes(x, dim)
    return broadcast_jet(x.primal.cumsum(axis, dtype=dtype), _tangent(x, [axis]).cumsum(axis))


def _moment(x: Jet, dim: Any, unbiased: Any, correction: Any, keepdim: bool):
    """(axes, centred value, d variance) for the variance's two spellings."""
    if isinstance(dim, bool):
        dim, unbiased = None, dim
    if unbiased is not None:
        correction = int(unbiased)
    correction = 1 if correction is None else correction
    axes = _axes(x, dim)
    centred = x.primal - x.primal.mean(axes, keepdim=True)
    count = 1
    for axis in axes:
        count *= x.primal.shape[axis]
    product = (centred * _tangent(x, axes)).sum(axes, keepdim=keepdim)
    return axes, correction, product * (2 / max(0, count - correction))


@rule("var")
def var(
    x: Jet, dim: Any = None, unbiased: Any = None, keepdim: bool = False, *, correction: Any = None
) -> Jet:
    """D var = 2 / (N - correction) * sum((x - mean) dx)."""
    axes, correction, tangent = _moment(x, dim, unbiased, correction, keepdim)
    return broadcast_jet(x.primal.var(axes, correction=correction, keepdim=keepdim), tangent)


@rule("std")
def std(
    x: Jet, dim: Any = None, unbiased: Any = None, keepdim: bool = False, *, correction: Any = None
) -> Jet:
    """D std = d var / (2 std)."""
    axes, correction, tangent = _moment(x, dim, unbiased, correction, keepdim)
    primal = x.primal.std(axes, correction=correction, keepdim=keepdim)
    return broadcast_jet(primal, tangent / (2 * primal))


@rule("var_mean")
def var_mean(
    x: Jet, dim: Any = None, unbiased: Any = None, keepdim: bool = False, *, correction: Any = None
) -> tuple[Jet, Jet]:
    """Both moments."""
    mean_dim = None if isinstance(dim, bool) else dim
    variance = var(x, dim, unbiased, keepdim, correction=correction)
    return variance, mean(x, mean_dim, keepdim)


@rule("logsumexp", "special_logsumexp")
def logsumexp(x: Jet, dim: Any, keepdim: bool = False) -> Jet:
    """D lse = sum(softmax(x) dx)."""
    axes = _axes(x, dim)
    kept = x.primal.logsumexp(axes, keepdim=True)
    weights = (x.primal - kept).exp()
    primal = kept if keepdim else x.primal.logsumexp(axes)
    return broadcast_jet(primal, (weights * _tangent(x, axes)).sum(axes, keepdim=keepdim))


@rule("linalg_vector_norm")
def norm(x: Jet, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Jet:
    """D |x|_p = sum(sign(x) |x|^(p-1) dx) / |x|^(p-1), 0 at 0."""
    ord = 2.0 if ord is None else float(ord)
    axes = _axes(x, dim)
    value = x.primal if dtype is None else x.primal.to(dtype)
    if not 1 <= ord < float("inf"):
        moved = generic_rule(torch.linalg.vector_norm, "")(x, ord, axes, keepdim)
        return broadcast_jet(moved.primal, moved.tangent)
    kept = torch.linalg.vector_norm(value, ord, axes, keepdim=True)
    if ord == 1.0:
        weights = torch.sign(value)
    else:
        # A vector of zeros gets tangent zero, as PyTorch's backward does.
        safe = torch.where(kept == 0, torch.ones_like(kept), kept)
        ratio = value / safe
        weights = ratio if ord == 2.0 else ratio * ratio.abs() ** (ord - 2)
    primal = kept if keepdim else torch.linalg.vector_norm(value, ord, axes)
    return broadcast_jet(primal, (weights * _tangent(x, axes)).sum(axes, keepdim=keepdim))


def _even_share(name: str) -> None:
    """Amax and amin: the tangents of all the extreme entries, averaged."""
    operation = getattr(torch, name)

    @rule(name)
    def extreme(x: Jet, dim: Any = (), keepdim: bool = False) -> Jet:
        axes = _axes(x, dim)
        primal = operation(x.primal, axes, keepdim=keepdim)
        kept = primal if keepdim else operation(x.primal, axes, keepdim=True)
        share = (x.primal == kept).to(x.primal.dtype)
        share = share / share.sum(axes, keepdim=True)
        return broadcast_jet(primal, (share * _tangent(x, axes)).sum(axes, keepdim=keepdim))


_even_share("amax")
_even_share("amin")


def _extreme(name: str, pairwise: Callable[..., Jet]) -> None:
    """Max and min in their three forms: of everything, along an axis, of two tensors."""
    operation = getattr(torch, name)

    @rule(name, several=True)
    def extreme(x: Any, dim: Any = None, keepdim: bool = False) -> Any:
        if dim is None:
            return RULES[f"a{name}"].forward(x)
        if not isinstance(dim, int):
            return pairwise(x, dim)
        (axis,) = _axes(x, dim)
        values, indices = operation(x.primal, axis, keepdim=keepdim)
        return along_axis(x, values, indices, axis, keepdim), indices


def along_axis(x: Jet, values: Tensor, indices: Tensor, axis: int, keepdim: bool) -> Jet:
    """The tangents of the entries taken along an axis, counted from the end."""
    index = indices if keepdim else indices.unsqueeze(axis)
    tangent = full_tangent(x)
    moved = tangent.gather(axis, index.expand(tangent.shape[0], *index.shape))
    return Jet(values, moved if keepdim else moved.squeeze(axis))


_extreme("max", maximum)
_extreme("min", minimum)
