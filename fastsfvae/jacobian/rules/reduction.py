"""Sums, moments, norms and extremes over axes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsfvae.jacobian.rules.arithmetic import div, maximum, minimum, power, where
from fastsfvae.jacobian.rules.indexing import gather
from fastsfvae.jacobian.rules.jet import Jet, broadcast_jet, move
from fastsfvae.jacobian.rules.registry import adjoint, always, rule
from fastsfvae.jacobian.rules.shape import squeeze, tangent_of


def _axes(x: Jet, dim: Any) -> list[int]:
    """The reduced axes counted from the end, where they are the tangent's as well."""
    ndim = x.primal.ndim
    if not ndim:
        return []
    if dim is None or (isinstance(dim, (list, tuple)) and not dim):
        return list(range(-ndim, 0))
    dims = [dim] if isinstance(dim, int) else dim
    return [d if d < 0 else d - ndim for d in dims]


def _tangent(x: Jet, axes: list[int]) -> Tensor:
    return tangent_of(x, -x.primal.ndim not in axes)


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


def _widened(g: Tensor, axes: list[int], keepdim: bool) -> Tensor:
    """The gradient of a result with the reduced axes put back, of extent 1."""
    if not keepdim:
        # The last axis first: the others are counted from the end.
        for axis in sorted(axes, reverse=True):
            g = g.unsqueeze(axis)
    return g


def _spreading(name: str, average: bool) -> None:
    @adjoint(name)
    def spread(
        grad: Jet, out: Jet, needs: tuple, x: Jet, dim: Any = None, keepdim: bool = False, **_: Any
    ) -> tuple[Jet]:
        axes = _axes(x, dim)
        share = out.primal.numel() / x.primal.numel() if average else 1

        def wide(g: Tensor, shape: torch.Size) -> Tensor:
            return (_widened(g, axes, keepdim) * share).expand(shape)

        tangents = wide(grad.tangent, _tangent(x, axes).shape)
        return (Jet(wide(grad.primal, x.primal.shape), tangents),)


_spreading("sum", average=False)
_spreading("mean", average=True)


def _pull_weighted(
    grad: Jet,
    axes: list[int],
    keepdim: bool,
    weights: Tensor,
    bend: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Jet]:
    """The adjoint of a function whose tangents are ``sum(weights * dx)``.

    Args:
        grad: of the result.
        axes: the reduced ones, from the end.
        keepdim: whether the result has them.
        weights: the derivative by x, in x's shape.
        bend: maps the gradients of the tangents, with the axes put back, to the gradients that
            reach x through the weights, one for each tangent; None where the weights are constant.
    """
    value, tangents = (_widened(g, axes, keepdim) for g in (grad.primal, grad.tangent))
    by_value = value * weights
    if bend is not None:
        by_value = by_value + bend(tangents).sum(0)
    return (Jet(by_value, tangents * weights),)


@rule("cumsum")
def cumsum(x: Jet, dim: int, *, dtype: Any = None) -> Jet:
    """Linear."""
    if not x.primal.ndim:
        return broadcast_jet(x.primal.cumsum(0, dtype=dtype), x.tangent)
    (axis,) = _axes(x, dim)
    return broadcast_jet(x.primal.cumsum(axis, dtype=dtype), _tangent(x, [axis]).cumsum(axis))


@adjoint("cumsum")
def _cumsum_adjoint(grad: Jet, out: Jet, needs: tuple, x: Jet, dim: int, **_: Any) -> tuple[Jet]:
    if not x.primal.ndim:
        return (grad,)
    (axis,) = _axes(x, dim)
    return (move(grad, lambda g, _: g.flip(axis).cumsum(axis).flip(axis)),)


def _moment(x: Jet, dim: Any, unbiased: Any, correction: Any) -> tuple[list[int], Any, float]:
    """(axes, correction, 2 / (N - correction)) for the variance's two spellings."""
    if isinstance(dim, bool):
        dim, unbiased = None, dim
    if unbiased is not None:
        correction = int(unbiased)
    correction = 1 if correction is None else correction
    axes = _axes(x, dim)
    divisor = math.prod(x.primal.shape[axis] for axis in axes) - correction
    return axes, correction, 2 / divisor if divisor > 0 else math.inf


def _centred(t: Tensor, axes: list[int]) -> Tensor:
    return t - t.mean(axes, keepdim=True) if axes else torch.zeros_like(t)


@rule("var")
def var(
    x: Jet, dim: Any = None, unbiased: Any = None, keepdim: bool = False, *, correction: Any = None
) -> Jet:
    """D var = 2 / (N - correction) * sum((x - mean) dx)."""
    axes, correction, factor = _moment(x, dim, unbiased, correction)
    primal = x.primal.var(axes, correction=correction, keepdim=keepdim)
    moved = _reduced(_centred(x.primal, axes) * _tangent(x, axes), axes, keepdim)
    return broadcast_jet(primal, moved * factor)


@adjoint("var")
def _var_adjoint(
    grad: Jet,
    out: Jet,
    needs: tuple,
    x: Jet,
    dim: Any = None,
    unbiased: Any = None,
    keepdim: bool = False,
    *,
    correction: Any = None,
) -> tuple[Jet]:
    axes, _, factor = _moment(x, dim, unbiased, correction)
    bend = factor * _centred(_tangent(x, axes), axes)
    weights = factor * _centred(x.primal, axes)
    return _pull_weighted(grad, axes, keepdim, weights, lambda g: g * bend)


@rule("std", composed=True)
def std(
    x: Jet, dim: Any = None, unbiased: Any = None, keepdim: bool = False, *, correction: Any = None
) -> Jet:
    """The root of the variance."""
    return root(var(x, dim, unbiased, keepdim, correction=correction))


def root(x: Jet) -> Jet:
    """The square root, with derivative zero at zero, as PyTorch's backward gives of std."""
    # A value that rounding made negative is zero.
    zero = x.primal <= 0
    return where(zero, 0.0, power(where(zero, 1.0, x), 0.5))


def _with_mean(name: str, moment: Callable[..., Jet]) -> None:
    @rule(name, composed=True)
    def both(
        x: Jet,
        dim: Any = None,
        unbiased: Any = None,
        keepdim: bool = False,
        *,
        correction: Any = None,
    ) -> tuple[Jet, Jet]:
        spread = moment(x, dim, unbiased, keepdim, correction=correction)
        return spread, mean(x, None if isinstance(dim, bool) else dim, keepdim)


_with_mean("var_mean", var)
_with_mean("std_mean", std)


@rule("nansum", composed=True)
def nansum(x: Jet, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Jet:
    """The sum of what is a number."""
    return sum_(where(x.primal.isnan(), 0.0, x), dim, keepdim, dtype=dtype)


@rule("nanmean", composed=True)
def nanmean(x: Jet, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Jet:
    """The mean of what is a number."""
    total = nansum(x, dim, keepdim, dtype=dtype)
    count = (~x.primal.isnan()).sum(_axes(x, dim), keepdim=keepdim)
    return div(total, count.to(total.primal.dtype))


@rule("logsumexp", "special_logsumexp")
def logsumexp(x: Jet, dim: Any, keepdim: bool = False) -> Jet:
    """D lse = sum(softmax(x) dx)."""
    axes = _axes(x, dim)
    kept = x.primal.logsumexp(axes, keepdim=True)
    weights = _softmax_weights(x.primal, kept)
    primal = kept if keepdim else x.primal.logsumexp(axes)
    return broadcast_jet(primal, _reduced(weights * _tangent(x, axes), axes, keepdim))


def _softmax_weights(value: Tensor, total: Tensor) -> Tensor:
    # Where all that is summed is masked out, nothing counts.
    return (value - torch.where(total == -math.inf, 0.0, total)).exp()


@adjoint("logsumexp", "special_logsumexp")
def _logsumexp_adjoint(
    grad: Jet, out: Jet, needs: tuple, x: Jet, dim: Any, keepdim: bool = False
) -> tuple[Jet]:
    axes = _axes(x, dim)
    weights = _softmax_weights(x.primal, _widened(out.primal, axes, keepdim))
    moved = _tangent(x, axes) - _widened(out.tangent, axes, keepdim)
    return _pull_weighted(grad, axes, keepdim, weights, lambda g: g * weights * moved)


@rule("linalg_vector_norm")
def norm(x: Jet, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Jet:
    """D |x|_p = sum(sign(x) |x|^(p-1) dx) / |x|^(p-1), 0 at 0; see `_norm_weights`."""
    ord = _order(ord)
    axes = _axes(x, dim)
    value = x.primal if dtype is None else x.primal.to(dtype)
    kept = torch.linalg.vector_norm(value, ord, axes, keepdim=True)
    primal = kept if keepdim else torch.linalg.vector_norm(value, ord, axes)
    moved = _norm_weights(value, kept, ord, axes) * _tangent(x, axes)
    return broadcast_jet(primal, _reduced(moved, axes, keepdim))


@rule("norm", composed=True)
def norm_of_tensor(
    x: Jet, p: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Jet:
    """The older name."""
    return norm(x, p, dim, keepdim, dtype=dtype)


def _order(ord: Any) -> float:
    return 2.0 if ord is None else float(ord)


def _nonzero(t: Tensor) -> Tensor:
    # A vector of zeros gets tangent zero, and so does an entry, as in PyTorch's backward.
    return torch.where(t == 0, torch.ones_like(t), t)


def _norm_weights(value: Tensor, norm: Tensor, ord: float, axes: list[int]) -> Tensor:
    """The derivative of the norm, which has the reduced axes, by the value."""
    if ord == 0:
        return torch.zeros_like(value)
    if ord == 1:
        return torch.sign(value)
    if math.isinf(ord):
        # All the extreme entries, averaged.
        taken = (value.abs() == norm).to(value.dtype)
        return torch.sign(value) * taken / taken.sum(axes, keepdim=True)
    ratio = value / _nonzero(norm)
    return ratio if ord == 2 else ratio * _power_of_ratio(ratio, ord)


def _power_of_ratio(ratio: Tensor, ord: float) -> Tensor:
    """|x|^(p-2), zero at 0, where it or its derivative may be infinite."""
    return torch.where(ratio == 0, 0.0, _nonzero(ratio).abs() ** (ord - 2))


@adjoint("linalg_vector_norm")
def _norm_adjoint(
    grad: Jet,
    out: Jet,
    needs: tuple,
    x: Jet,
    ord: Any = 2,
    dim: Any = None,
    keepdim: bool = False,
    **_: Any,
) -> tuple[Jet]:
    ord, axes = _order(ord), _axes(x, dim)
    value, kept = x.primal.to(out.primal.dtype), _widened(out.primal, axes, keepdim)
    weights = _norm_weights(value, kept, ord, axes)
    if ord in (0, 1) or math.isinf(ord):
        return _pull_weighted(grad, axes, keepdim, weights)
    moved = _tangent(x, axes)
    if ord != 2:
        moved = moved * _power_of_ratio(value / _nonzero(kept), ord)
    moved = moved - weights * _widened(out.tangent, axes, keepdim)
    bend = moved * ((ord - 1) * (kept != 0) / _nonzero(kept))
    return _pull_weighted(grad, axes, keepdim, weights, lambda g: g * bend)


def _even_share(name: str) -> Callable[..., Jet]:
    """Amax and amin: the tangents of all the extreme entries, averaged."""
    operation = getattr(torch, name)

    def share(x: Jet, kept: Tensor, axes: list[int]) -> Tensor:
        taken = (x.primal == kept).to(x.primal.dtype)
        return taken / taken.sum(axes, keepdim=True)

    @rule(name)
    def extreme(x: Jet, dim: Any = (), keepdim: bool = False) -> Jet:
        axes = _axes(x, dim)
        primal = operation(x.primal, axes, keepdim=keepdim)
        weights = share(x, _widened(primal, axes, keepdim), axes)
        return broadcast_jet(primal, _reduced(weights * _tangent(x, axes), axes, keepdim))

    @adjoint(name)
    def spread(
        grad: Jet, out: Jet, needs: tuple, x: Jet, dim: Any = (), keepdim: bool = False
    ) -> tuple[Jet]:
        axes = _axes(x, dim)
        weights = share(x, _widened(out.primal, axes, keepdim), axes)
        return _pull_weighted(grad, axes, keepdim, weights)

    return extreme


_amax, _amin = _even_share("amax"), _even_share("amin")


def _extreme(name: str, of_everything: Callable[..., Jet], pairwise: Callable[..., Jet]) -> None:
    """Max and min in their three forms: of everything, along an axis, of two tensors."""
    operation = getattr(torch, name)

    @rule(name, several=True, composed=True, covers=always)
    def extreme(x: Any, dim: Any = None, keepdim: bool = False) -> Any:
        if dim is None:
            return of_everything(x)
        if not isinstance(dim, int):
            return pairwise(x, dim)
        if not x.primal.ndim:
            return x, torch.zeros_like(x.primal, dtype=torch.long)
        positions = operation(x.primal, dim, keepdim=True).indices
        taken = gather(x, dim, positions)
        if keepdim:
            return taken, positions
        return squeeze(taken, dim), positions.squeeze(dim)


_extreme("max", _amax, maximum)
_extreme("min", _amin, minimum)


@rule("aminmax", composed=True)
def aminmax(x: Jet, *, dim: Any = None, keepdim: bool = False) -> tuple[Jet, Jet]:
    """Both extremes."""
    axes = () if dim is None else dim
    return _amin(x, axes, keepdim), _amax(x, axes, keepdim)
