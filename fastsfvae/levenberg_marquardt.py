"""Latents that explain given data: Levenberg-Marquardt on a decoder's Gram, sample by sample.

With r = x - f(z), W = diag(w), J = df/dz, G = J^T W J and p = J^T W r a sample's objective, its
gradient and its Gauss-Newton matrix are

    F(z) = r^T W r / (2c) + |z|^2 / (2 v)        g = z / v - p / c        H = G / c + I / v

and a step d solves (H + lambda t I) d = -g, where t = trace(H) / m (Marquardt 1963). With the gain

    rho = (F(z) - F(z + d)) / (the reduction that the quadratic model of F predicts)

lambda is multiplied by max(1/10, 1 - (2 rho - 1)^3) after a step that lowers F, and by 2, 4, 8, ...
after others, which are not taken (Nielsen 1999; his factor for good steps is 1/3). What a step
without any damping would gain, g^T H^-1 g / 2 by the model, tells when to stop.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

# Of the first step, and how far it may fall after a good one: the fewest steps over decoders of
# digits, trained and drawn, from three starts each.
_DAMPING, _FALL = 1e-2, 0.1
# A damped step that promises less than that share of the tolerance is not worth more steps.
_HOPELESS = 1e-4


class Point(NamedTuple):
    """The objective at some latents.

    Attributes:
        z: ``[B, m]``.
        squared_error: r^T W r, ``[B]``.
        value: F, ``[B]``, float64 like the next two.
        gradient: g, ``[B, m]``.
        curvature: H, ``[B, m, m]``.
        finite: whether F, g and H are, ``[B]``.
    """

    z: Tensor
    squared_error: Tensor
    value: Tensor
    gradient: Tensor
    curvature: Tensor
    finite: Tensor


class State(NamedTuple):
    """Where each sample stands.

    Attributes:
        point: the best one.
        damping: lambda.
        growth: what it is multiplied by if the next step fails.
        floor: F below which a fit is perfect to rounding.
        steps: that were tried.
        converged: as in `Fit`.
        stopped: converged, or no step will help.
    """

    point: Point
    damping: Tensor
    growth: Tensor
    floor: Tensor
    steps: Tensor
    converged: Tensor
    stopped: Tensor


class Objective(Protocol):
    """F of a batch of data."""

    def at(self, z: Tensor) -> Point:
        """Evaluate at z ``[B, m]``."""
        ...

    def perfect(self, squared_error: Tensor) -> Tensor:
        """F below which a fit is perfect, given the squared error ``[B]`` at some z."""
        ...

    def take(self, rows: Tensor) -> Objective:
        """The objective of some of the data."""
        ...

    def can_take(self, count: int) -> bool:
        """Whether it can be taken for so many."""
        ...


def _curvature_with(point: Point, damping: Tensor) -> Tensor:
    """H + damping t I, with t = trace(H) / m."""
    mean = point.curvature.diagonal(dim1=1, dim2=2).mean(1)
    return point.curvature + torch.diag_embed((damping * mean).unsqueeze(1).expand_as(point.z))


def _solve(point: Point, damping: Tensor) -> tuple[Tensor, Tensor]:
    """The step (H + damping t I)^-1 (-g), ``[B, m]``, and whether there is one, ``[B]``."""
    # Neither waits for a device; where a factorisation fails, its numbers are discarded.
    factor, info = torch.linalg.cholesky_ex(_curvature_with(point, damping))
    step = -torch.cholesky_solve(point.gradient.unsqueeze(-1), factor).squeeze(-1)
    found = (info == 0) & step.isfinite().all(1)
    return step, found


def _converged(point: Point, tol: float, floor: Tensor) -> Tensor:
    """Whether g^T H^-1 g / 2 (Newton's decrement) is at most max(tol, eps) F, or F the floor.

    H gets eps of its trace on the diagonal: what rounding has left of directions without any
    curvature does not count, and leaves a factor.
    """
    rounding = point.z.shape[1] * rounding_of(point.z)
    step, found = _solve(point, torch.full_like(point.value, rounding))
    gain = -0.5 * (point.gradient * step).sum(1)
    small = found & (gain <= _resolved(tol, point))
    # A flat F has no curvature to be solved with.
    flat = (point.gradient == 0).all(1)
    return point.finite & (small | flat | (point.value <= floor))


def rounding_of(z: Tensor) -> float:
    """The eps of what is summed up over the outputs at z."""
    return torch.finfo(torch.promote_types(z.dtype, torch.float32)).eps


def _resolved(tol: float, point: Point) -> Tensor:
    """max(tol, eps) F: F is not known any better."""
    return max(tol, rounding_of(point.z)) * point.value


def _start(objective: Objective, z: Tensor, damping: float, tol: float) -> State:
    point = objective.at(z)
    floor = objective.perfect(point.squared_error)
    converged = _converged(point, tol, floor)
    return State(
        point=point,
        damping=torch.full_like(point.value, damping),
        growth=torch.full_like(point.value, 2.0),
        floor=floor,
        steps=torch.zeros_like(point.value, dtype=torch.int64),
        converged=converged,
        # Without curvature there is no step.
        stopped=converged | ~point.finite,
    )


def _step(objective: Objective, state: State, adaptive: bool, tol: float) -> State:
    """Try a step of each sample that has not stopped."""
    point, going = state.point, ~state.stopped
    step, found = _solve(point, state.damping)
    z = point.z + step.to(point.z.dtype)
    tried = going & found & z.isfinite().all(1)
    # What is not tried stays where it is: a decoder meets finite latents alone.
    trial = objective.at(_where(tried, z, point.z))
    mean = point.curvature.diagonal(dim1=1, dim2=2).mean(1)
    damped = (state.damping * mean).unsqueeze(1) * step
    promised = 0.5 * (step * (damped - point.gradient)).sum(1)
    gain = (point.value - trial.value) / promised
    better = tried & trial.finite & (trial.value < point.value)
    best = Point(*(_where(better, new, old) for new, old in zip(trial, point, strict=True)))
    damping, growth = state.damping, state.growth
    if adaptive:
        fall = (1 - (2 * gain - 1) ** 3).clamp_min(_FALL)
        damping = damping * torch.where(better, fall, growth)
        growth = torch.where(better, 2.0, 2 * growth)
    converged = torch.where(better, _converged(best, tol, state.floor), state.converged)
    hopeless = found & (promised <= _HOPELESS * _resolved(tol, best))
    if not adaptive:
        # The same step would fail again.
        hopeless = hopeless | ~better
    return State(
        point=best,
        damping=_where(going, damping, state.damping),
        growth=_where(going, growth, state.growth),
        floor=state.floor,
        steps=state.steps + going,
        converged=converged,
        stopped=state.stopped | converged | (going & hopeless),
    )


def _where(condition: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(condition.view(-1, *[1] * (new.ndim - 1)), new, old)


def _take(state: State, rows: Tensor) -> State:
    return pytree.tree_map(lambda t: t[rows], state)


def minimise(
    objective: Objective, z: Tensor, steps: int, damping: float | None, tol: float
) -> State:
    """The states after at most `steps` steps; with a damping of None it adapts."""
    adaptive, first = damping is None, _DAMPING if damping is None else damping
    state = _start(objective, z, first, tol)
    index, parts = torch.arange(len(z)), []
    for _ in range(steps):
        # On a GPU the flags are not read, as that would wait for it: steps of samples that have
        # stopped change nothing.
        if z.device.type == "cpu":
            going = ~state.stopped
            count = int(going.sum())
            if count == 0:
                break
            # Half at least, so that few batch sizes occur.
            if 2 * count <= len(going) and objective.can_take(count):
                parts.append((index[~going], _take(state, ~going)))
                index, state, objective = index[going], _take(state, going), objective.take(going)
        state = _step(objective, state, adaptive, tol)
    if not parts:
        return state
    indices, states = zip(*parts, (index, state), strict=True)
    order = torch.cat(indices).argsort()
    return pytree.tree_map(lambda *each: torch.cat(each)[order], *states)


def covariance_of(point: Point, prior_var: float | Tensor | None) -> Tensor:
    """H^-1, as `Fit` says."""
    finite = point.finite.view(-1, 1, 1)
    # Eigenvectors of NaN raise.
    values, vectors = torch.linalg.eigh(torch.where(finite, point.curvature, 0.0))
    if prior_var is None:
        cut = values.shape[1] * rounding_of(point.z) * values.amax(1, keepdim=True)
        inverse = torch.where(values > cut, 1 / values, 0.0)
    else:
        # Rounding of G may have taken them below.
        inverse = 1 / values.clamp_min(1 / prior_var)
    covariance = (vectors * inverse.unsqueeze(1)) @ vectors.mT
    return torch.where(finite, covariance, torch.nan)
