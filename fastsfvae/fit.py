"""Latents that explain given data: a decoder is fitted to them, sample by sample."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastsfvae import _checks
from fastsfvae._checks import Backend
from fastsfvae.gram.pullback import pullback
from fastsfvae.gram.reverse import gram_by_rows, projection
from fastsfvae.jacobian.backend import resolve_backend
from fastsfvae.jacobian.plan.restore import undone
from fastsfvae.jacobian.shared import bind
from fastsfvae.jacobian.validate import (
    Derived,
    Shared,
    check_chunk_size,
    check_latents,
    check_output,
    check_shape,
    check_target,
)
from fastsfvae.levenberg_marquardt import Slope, covariance_of, minimise, rounding_of

# Residuals of that many roundings of the data are none.
_ROUNDINGS = 32


class Fit(NamedTuple):
    """What `fit_latents` found, without gradients; with `joint` B is 1.

    Attributes:
        z: the best latents that were met, [B, m].
        squared_error: sum_k w_k (x_k - f(z)_k)^2 there, weighted, [B], in squared units of x.
        covariance: (G / c + I / prior_var)^-1 there, [B, m, m], the weights in G: Laplace's
            approximation of the posterior's. Without a prior it is a pseudo-inverse: eigenvalues of
            G below m eps of its largest count as 0, and such directions, which the data do not
            determine, have no variance in it. NaN where f or J is not finite.
        converged: whether an undamped step would gain no more than `tol` says, [B], bool.
        steps: evaluations of J after the first one, [B], int64.
    """

    z: Tensor
    squared_error: Tensor
    covariance: Tensor
    converged: Tensor
    steps: Tensor


class _Function(nn.Module):
    """A function as a module, which keeps its plan from step to step."""

    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Call it."""
        return self.function(*args, **kwargs)


class _Weighted(Derived):
    """A decoder whose outputs are multiplied by the roots of their weights, ``[B, *out]``."""

    def forward(self, z: Tensor, *args: Any, _root: Tensor, **kwargs: Any) -> Tensor:
        """Decode and multiply."""
        output = self.inner(z, *args, **kwargs)
        check_output(output, z)
        check_shape(_root, output.shape)
        return output * _root


@dataclasses.dataclass(frozen=True)
class _Objective:
    """F of a batch of data.

    Attributes:
        decoder: a module.
        x: ``[B, *out]``.
        leaves: the decoder's further inputs.
        spec: their structure, (args, kwargs).
        along: for each, whether it has the batch axis.
        noise_var: c.
        prior_var: v, None for no prior.
        backend: as the user gave it.
        chunk_size: likewise.
        joint: whether all data have one latent.
    """

    decoder: nn.Module
    x: Tensor
    leaves: list
    spec: Any
    along: list[bool]
    noise_var: float | Tensor
    prior_var: float | Tensor | None
    backend: Backend
    chunk_size: int | None
    joint: bool

    def slope(self, z: Tensor) -> Slope:
        """F and g at z ``[B, m]``, by one reverse pass."""
        args, kwargs = pytree.tree_unflatten(self.leaves, self.spec)
        given = self.decoder, self._expanded(z), self.x, args, kwargs
        p, rr = projection(*given, chunk_size=self.chunk_size)
        if self.joint:
            p, rr = p.sum(0, True), rr.sum(0, True)
        wide = z.double()
        value, gradient = rr.double() / (2 * self.noise_var), -p.double() / self.noise_var
        if self.prior_var is not None:
            value = value + wide.square().sum(1) / (2 * self.prior_var)
            gradient = gradient + wide / self.prior_var
        return Slope(z, rr, value, gradient)

    def curvature(self, z: Tensor) -> Tensor:
        """H at z, ``[B, m, m]``."""
        H = self._gram(z).double() / self.noise_var
        if self.prior_var is None:
            return H
        return H + torch.eye(z.shape[1], dtype=H.dtype, device=z.device) / self.prior_var

    def _gram(self, z: Tensor) -> Tensor:
        args, kwargs = pytree.tree_unflatten(self.leaves, self.spec)
        few = self.x[0].numel() < z.shape[1] and self.backend in ("auto", "torch")
        z, size = self._expanded(z), self.chunk_size
        if few:
            given = self.decoder, z, args, kwargs
            return gram_by_rows(*given, chunk_size=size, total=self.joint)
        G = pullback(
            *(self.decoder, z, None, *args), backend=self.backend, chunk_size=size, **kwargs
        ).gram
        return G.sum(0, True) if self.joint else G

    def _expanded(self, z: Tensor) -> Tensor:
        return z.expand(len(self.x), -1) if self.joint else z

    def perfect(self, squared_error: Tensor) -> Tensor:
        """F of residuals that are a few roundings of the data and of f, ``[B]``."""
        squares = self.x.double().square()
        data = squares.sum().view(1) if self.joint else squares.flatten(1).sum(1)
        share = (_ROUNDINGS * rounding_of(self.x)) ** 2
        return share * (data + squared_error) / (2 * self.noise_var)

    def take(self, rows: Tensor) -> _Objective:
        """The objective of some of the data."""
        pairs = zip(self.leaves, self.along, strict=True)
        leaves = [leaf[rows] if along else leaf for leaf, along in pairs]
        return dataclasses.replace(self, x=self.x[rows], leaves=leaves)

    def can_take(self, count: int) -> bool:
        """Whether none of the inputs without a batch axis looks as if it had one of that extent."""
        pairs = zip(self.leaves, self.along, strict=True)
        whole = [leaf for leaf, along in pairs if isinstance(leaf, Tensor) and not along]
        return all(leaf.ndim == 0 or leaf.shape[0] != count for leaf in whole)


@torch.no_grad()
def fit_latents(
    decoder: Callable[..., Tensor],
    x: Tensor,
    z0: Tensor,
    *args: Any,
    steps: int = 20,
    damping: Literal["lm"] | float = "lm",
    prior_var: float | Tensor | None = None,
    noise_var: float | Tensor = 1.0,
    weight: Tensor | None = None,
    joint: bool = False,
    tol: float = 1e-4,
    backend: Backend = "auto",
    chunk_size: int | None = None,
    shared: Shared = (),
    **kwargs: Any,
) -> Fit:
    """The latents that explain data best, by Levenberg-Marquardt on J^T J.

    Minimises, for each sample by itself,

        F(z) = 1/(2c) sum_k w_k (x_k - f(z)_k)^2 + |z|^2 / (2 prior_var)

    which with prior_var = 1 is -log p(x, z) of a VAE, up to a constant. A step takes J once, by
    forward mode, or by reverse mode where an output has fewer numbers than z; with that J^T J it
    moves several times, each for one reverse pass. F never rises, and no move is made to where f is
    not finite. Finds a local minimum, which depends on z0. No gradient flows through it, and none
    is written.

    Args:
        decoder: f, see `decode_with_jacobian`.
        x: data [B, *out]; with `joint` [N, *out].
        z0: where to start, [B, m]; with `joint` [1, m].
        *args: further decoder inputs; tensors with x's leading extent go with their samples.
        steps: how many to try at most; 0 evaluates at z0.
        damping: "lm" adapts it; a number >= 0 fixes it, as a multiple of the mean of the diagonal
            of G / c + I / prior_var at z0: 0 is Gauss-Newton, which ends where a move fails.
        prior_var: variance of the prior N(0, prior_var I), in squared units of z; None for none.
        noise_var: c, variance of the observation noise, in squared units of x.
        weight: w >= 0, like x; None for ones. Where it is 0, x may be anything, NaN included.
        joint: whether one latent is seen through all of x, such as the shape of a decoder of
            coordinates: f is called with z0 expanded to [N, m], and all samples are summed up.
        tol: a sample has converged where an undamped step would lower F by at most tol F, by the
            quadratic model; F is not resolved below 8 eps F, nor residuals below 32 eps of x.
        backend: of J^T J, see `decode_with_jacobian`; reverse mode is in "auto" and "torch".
        chunk_size: samples that are differentiated together; None chooses. Changes rounding only.
        shared: see `decode_with_jacobian`.
        **kwargs: further decoder inputs by name.

    Returns:
        A `Fit`.

    Raises:
        TypeError, ValueError, RuntimeError: see `decode_with_jacobian`; x, z0, weight and settings
            that do not fit, in one line.
    """
    decoder, args, kwargs = bind(decoder, args, kwargs, shared)
    check_latents(z0)
    check_chunk_size(chunk_size)
    resolve_backend(backend, z0)
    _check_settings(steps, damping, prior_var, noise_var, tol)
    _check_data(x, z0, weight, joint)
    function = decoder if isinstance(decoder, nn.Module) else _Function(decoder)
    x, z = x.detach(), z0.detach().clone()
    if weight is not None:
        root = weight.detach().sqrt()
        x = torch.where(root > 0, root * x, 0.0)
        function, kwargs = _Weighted(function), {**kwargs, "_root": root}
    leaves, spec = pytree.tree_flatten((args, kwargs))
    objective = _Objective(
        decoder=function,
        x=x,
        leaves=leaves,
        spec=spec,
        along=[isinstance(t, Tensor) and t.ndim > 0 and len(t) == len(x) for t in leaves],
        noise_var=_plain(noise_var, z),
        prior_var=None if prior_var is None else _plain(prior_var, z),
        backend=backend,
        chunk_size=chunk_size,
        joint=joint,
    )
    fixed = None if isinstance(damping, str) else float(damping)
    # Side effects of a forward are no more lasting than those of a trace.
    with undone(function):
        state = minimise(objective, z, steps, fixed, tol)
    z, squared_error, *_ = state.best
    covariance = covariance_of(state, objective.prior_var).to(squared_error.dtype)
    return Fit(z, squared_error, covariance, state.converged, state.steps)


def _plain(value: float | Tensor, z: Tensor) -> float | Tensor:
    """A setting without a gradient, in float64 where it is a tensor."""
    return value.detach().to(z.device, torch.float64) if isinstance(value, Tensor) else value


def _check_settings(
    steps: int,
    damping: str | float,
    prior_var: float | Tensor | None,
    noise_var: float | Tensor,
    tol: float,
) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps={steps!r} must be an int >= 0")
    if damping != "lm":
        _checks.not_negative("damping", damping, ', or "lm"')  # type: ignore[arg-type]
    _checks.prior_var(prior_var)
    _checks.noise_var(noise_var)
    _checks.not_negative("tol", tol)


def _check_data(x: Tensor, z0: Tensor, weight: Tensor | None, joint: bool) -> None:
    _checks.floating("x", x)
    if joint and len(z0) != 1:
        raise ValueError(
            f"z0 has shape {tuple(z0.shape)}: with joint=True one latent [1, m] explains all of x"
        )
    check_target(x, z0.expand(len(x), -1) if joint and x.ndim > 0 else z0)
    if 0 in x.shape:
        raise ValueError(f"x has shape {tuple(x.shape)}: it is empty")
    if weight is None:
        return
    _checks.floating("weight", weight)
    if weight.shape != x.shape:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)} but x has {tuple(x.shape)}: "
            "give weight.expand_as(x)"
        )
    _checks.same_device(("x", x), ("weight", weight))
    # Waits for the device once, before the loop.
    if not bool((weight >= 0).all()):
        raise ValueError(
            f"weight has {float(weight.min())} as its smallest: no weight may be negative or NaN"
        )
