"""Distances, as norms of differences."""

from __future__ import annotations

from typing import Any

import torch

from fastsfvae.jacobian.rules.arithmetic import add, mul, power, sub, where
from fastsfvae.jacobian.rules.constant import as_jets
from fastsfvae.jacobian.rules.indexing import index_select
from fastsfvae.jacobian.rules.jet import Jet, primal_of
from fastsfvae.jacobian.rules.linear import einsum
from fastsfvae.jacobian.rules.reduction import norm, root, sum_
from fastsfvae.jacobian.rules.registry import always, rule
from fastsfvae.jacobian.rules.shape import unsqueeze

# PyTorch's: from so many points on, Euclidean distances come from a matrix product.
_MANY = 25
_PRODUCT, _NO_PRODUCT = 1, 2


@rule("cdist", several=True, composed=True, covers=always)
def cdist(x1: Any, x2: Any, p: float = 2.0, compute_mode: int | None = None) -> Jet:
    """``[..., P, M]``, ``[..., R, M] -> [..., P, R]``; equal points get derivative zero.

    Of order infinity, axes of equal extent share the derivative; PyTorch's backward gives each of
    them all of it, which is no subgradient.
    """
    a, b = as_jets(x1, x2)
    many = max(a.primal.shape[-2], b.primal.shape[-2]) > _MANY
    if p == 2 and (compute_mode == _PRODUCT or (many and compute_mode != _NO_PRODUCT)):
        products = mul(einsum("...pm,...rm->...pr", [x1, x2]), -2)
        squares = add(unsqueeze(_square(a), -1), unsqueeze(_square(b), -2))
        return root(add(squares, products))
    return norm(sub(unsqueeze(a, -2), unsqueeze(b, -3)), p, -1)


def _square(x: Jet) -> Jet:
    """The square of the length along the last axis."""
    return sum_(mul(x, x), -1)


@rule("pdist", composed=True)
def pdist(x: Jet, p: float = 2.0) -> Jet:
    """The distances of all pairs of rows."""
    rows = x.primal.shape[0]
    first, second = torch.triu_indices(rows, rows, 1, device=x.primal.device)
    return norm(sub(index_select(x, 0, first), index_select(x, 0, second)), p, -1)


@rule("dist", several=True, composed=True, covers=always)
def dist(a: Any, b: Any, p: float = 2.0) -> Jet:
    """The norm of the difference of everything."""
    return norm(sub(a, b), p)


@rule("renorm", composed=True)
def renorm(x: Jet, p: float, dim: int, maxnorm: float) -> Jet:
    """Slices along an axis shortened to a norm where they are longer."""
    others = [axis for axis in range(x.primal.ndim) if axis != dim % x.primal.ndim]
    length = norm(x, p, others, True)
    # PyTorch's guard against a norm of zero.
    shorter = mul(power(add(length, 1e-7), -1.0), maxnorm)
    return mul(x, where(primal_of(length) > maxnorm, shorter, 1.0))
