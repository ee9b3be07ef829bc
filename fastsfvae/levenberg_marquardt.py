"""Latents that explain given data: Levenberg-Marquardt on a decoder's Gram, sample by sample.

With r = x - f(z), W = diag(w), J = df/dz, G = J^T W J and p = J^T W r a sample's objective, its
gradient and its Gauss-Newton matrix are

    F(z) = r^T W r / (2c) + |z|^2 / (2 v)        g = z / v - p / c        H = G / c + I / v

and a move d solves (H + lambda I) d = -g (Levenberg 1944, Marquardt 1963). With the gain

    rho = (F(z) - F(z + d)) / (the reduction that the quadratic model of F predicts)

lambda is multiplied by max(1/10, 1 - (2 rho - 1)^3) after a move that lowers F, and by 2, 4, 8, ...
after others, which are not made (Nielsen 1999; his factor for good ones is 1/3). It starts in
proportion to the mean of H's diagonal. What a move without any damping would gain by the model,
g^T H^-1 g / 2, tells when to stop.

H costs as much as some ten of F and g, and changes less: a step takes it once and moves a few
times with it (Newton's method with a Hessian that is kept: Shamanskii 1967).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

# Damping of the first move, and how far it may fall after a good one: the fewest steps over
# decoders of digits, trained and drawn, from three starts each. Up to six moves saved steps there.
_DAMPING, _FALL, _MOVES = 1e-2, 0.1, 6
# A damped move that promises less than that share of the tolerance is not worth a step.
_HOPELESS = 1e-4


class Slope(NamedTuple):
    """The objective at some latents.

    Attributes:
        z: ``[B, m]``.
        squared_error: r^T W r, ``[B]``.
        value: F, ``[B]``, float64.
        gradient: g, ``[B, m]``, float64.
    """

    z: Tensor
    squared_error: Tensor
    value: Tensor
    gradient: Tensor


class State(NamedTuple):
    """Where each sample stands.

    Attributes:
        best: the best latents that were met.
        curvature: H, at them between two steps, ``[B, m, m]``, float64.
        damping: lambda.
        growth: what it is multiplied by if the next move fails.
        floor: F below which a fit is perfect to rounding.
        steps: that were made.
        converged: as in `Fit`.
        stopped: converged, or no step will help.
    """

    best: Slope
    curvature: Tensor
    damping: Tensor
    growth: Tensor
    floor: Tensor
    steps: Tensor
    converged: Tensor
    stopped: Tensor


class Objective(Protocol):
    """F of a batch of data."""

    def slope(self, z: Tensor) -> Slope:
        """F and g at z ``[B, m]``."""
        ...

    def curvature(self, z: Tensor) -> Tensor:
        """H at z, ``[B, m, m]``."""
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


def _solve(state: State, damping: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The move d ``[B, m]`` with that damping, the reduction it promises, and whether there is one.

    By the model F falls by d^T (lambda d - g) / 2.
    """
    gradient, added = state.best.gradient, damping.unsqueeze(1)
    damped = state.curvature + torch.diag_embed(added.expand_as(gradient))
    # Neither waits for a device; where a factorisation fails, its numbers are discarded.
    factor, info = torch.linalg.cholesky_ex(damped)
    move = -torch.cholesky_solve(gradient.unsqueeze(-1), factor).squeeze(-1)
    promised = 0.5 * (move * (added * move - gradient)).sum(1)
    return move, promised, (info == 0) & promised.isfinite()


def rounding_of(z: Tensor) -> float:
    """The eps of what is summed up over the outputs at z."""
    return torch.finfo(torch.promote_types(z.dtype, torch.float32)).eps


def _resolved(tol: float, best: Slope) -> Tensor:
    """max(tol, 8 eps) F: F is not known any better."""
    return max(tol, 8 * rounding_of(best.z)) * best.value


def _judged(state: State, tol: float) -> State:
    """The state with new flags, for an H that is that of its latents.

    A sample has converged where g^T H^-1 g / 2 (Newton's decrement) is at most max(tol, 8 eps) F,
    or F the floor. H gets eps of its trace on the diagonal: what rounding has left of directions
    without any curvature does not count, and leaves a factor.
    """
    best, m = state.best, state.best.z.shape[1]
    rounding = m * rounding_of(best.z) * _mean_diagonal(state.curvature)
    _, decrement, found = _solve(state, rounding)
    # A flat F has no curvature to be solved with.
    flat = (best.gradient == 0).all(1)
    close = (found & (decrement <= _resolved(tol, best))) | flat | (best.value <= state.floor)
    finite = _is_finite(best) & state.curvature.isfinite().all(2).all(1)
    converged = finite & close
    # Without curvature there is no move.
    return state._replace(converged=converged, stopped=converged | ~finite)


def _mean_diagonal(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=1, dim2=2).mean(1)


def _is_finite(at: Slope) -> Tensor:
    return at.value.isfinite() & at.gradient.isfinite().all(1)


def _start(objective: Objective, z: Tensor, damping: float, tol: float) -> State:
    # The first to be asked, as it refuses what is no decoder.
    curvature, best = objective.curvature(z), objective.slope(z)
    no = torch.zeros_like(best.value, dtype=torch.bool)
    state = State(
        best=best,
        curvature=curvature,
        damping=damping * _mean_diagonal(curvature),
        growth=torch.full_like(best.value, 2.0),
        floor=objective.perfect(best.squared_error),
        steps=torch.zeros_like(best.value, dtype=torch.int64),
        converged=no,
        stopped=no,
    )
    return _judged(state, tol)


def _step(objective: Objective, state: State, adaptive: bool, tol: float) -> State:
    """Move each sample that has not stopped a few times, and take H where it is then."""
    going, before = ~state.stopped, state.best
    moving = going
    for _ in range(_MOVES):
        state, moving = _move(objective, state, moving, adaptive, tol)
        if moving.device.type == "cpu" and not moving.any():
            break
    moved = (state.best.z != before.z).any(1)
    curvature = _where(moved, objective.curvature(state.best.z), state.curvature)
    judged = _judged(state._replace(curvature=curvature, steps=state.steps + going), tol)
    # The next step would be the same.
    stuck = ~moved & ~moving
    return judged._replace(stopped=judged.stopped | stuck | ~going)


def _move(
    objective: Objective, state: State, moving: Tensor, adaptive: bool, tol: float
) -> tuple[State, Tensor]:
    """Move once by the H that there is; also which samples this H may still help."""
    best = state.best
    move, promised, found = _solve(state, state.damping)
    z = best.z + move.to(best.z.dtype)
    tried = moving & found & z.isfinite().all(1)
    # What is not tried stays where it is: a decoder meets finite latents alone.
    trial = objective.slope(_where(tried, z, best.z))
    better = tried & _is_finite(trial) & (trial.value < best.value)
    damping, growth = state.damping, state.growth
    if adaptive:
        gain = (best.value - trial.value) / promised
        fall = (1 - (2 * gain - 1) ** 3).clamp_min(_FALL)
        damping = _where(moving, damping * torch.where(better, fall, growth), damping)
        growth = _where(moving, torch.where(better, 2.0, 2 * growth), growth)
        moving = moving & ~(found & (promised <= _HOPELESS * _resolved(tol, best)))
    else:
        moving = better
    best = Slope(*(_where(better, new, old) for new, old in zip(trial, best, strict=True)))
    return state._replace(best=best, damping=damping, growth=growth), moving


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


def covariance_of(state: State, prior_var: float | Tensor | None) -> Tensor:
    """H^-1, as `Fit` says."""
    finite = state.curvature.isfinite().all(2).all(1).view(-1, 1, 1)
    # Eigenvectors of NaN raise.
    values, vectors = torch.linalg.eigh(torch.where(finite, state.curvature, 0.0))
    if prior_var is None:
        cut = values.shape[1] * rounding_of(state.best.z) * values.amax(1, keepdim=True)
        inverse = torch.where(values > cut, 1 / values, 0.0)
    else:
        # Rounding of G may have taken them below.
        inverse = 1 / values.clamp_min(1 / prior_var)
    covariance = (vectors * inverse.unsqueeze(1)) @ vectors.mT
    return torch.where(finite, covariance, torch.nan)
