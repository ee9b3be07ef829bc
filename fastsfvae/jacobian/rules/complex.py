"""Complex values: their parts, their conjugates, and what is made of them.

Tangents of a complex value are complex, its directional derivatives. The gradient of a real
function by it is that by its real part plus i times that by its imaginary part, as in PyTorch: an
operation that multiplies tangents by a number multiplies gradients by its conjugate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Its rules must be there before they get another for complex values.
from fastsfvae.jacobian.rules import elementwise as elementwise
from fastsfvae.jacobian.rules.arithmetic import (
    add,
    aligned_tangent,
    combine,
    div,
    masked_fill,
    power,
    pull_product,
)
from fastsfvae.jacobian.rules.jet import Jet, broadcast_jet, move, primal_of
from fastsfvae.jacobian.rules.pair import atan2
from fastsfvae.jacobian.rules.reduction import mean, norm, var
from fastsfvae.jacobian.rules.registry import RULES, adjoint, always, bind, rule
from fastsfvae.jacobian.rules.rule import Rule
from fastsfvae.jacobian.rules.scatter import zero
from fastsfvae.jacobian.rules.shape import convert, front, squeeze, transpose


@rule("view_as_real")
def view_as_real(x: Jet) -> Jet:
    """Real and imaginary part along a new last axis."""

    def parts(t: Tensor, _: int) -> Tensor:
        t = t.resolve_conj()
        # PyTorch's derivative of the view fails at gradients that begin at an odd place.
        return torch.stack([t.real, t.imag], -1) if t.requires_grad else torch.view_as_real(t)

    return move(x, parts)


@adjoint("view_as_real")
def _view_as_real_adjoint(grad: Jet, out: Jet, needs: tuple, x: Jet) -> tuple[Jet]:
    return (move(grad, _joined),)


def _joined(t: Tensor, _: int) -> Tensor:
    t = t.contiguous()
    # A complex number begins at an even place of its memory.
    return torch.view_as_complex(t.clone() if t.storage_offset() % 2 else t)


@rule("view_as_complex")
def view_as_complex(x: Jet) -> Jet:
    """The last axis holds real and imaginary part."""
    return move(x, _joined, keeps_batch=x.primal.ndim > 1)


@adjoint("view_as_complex")
def _view_as_complex_adjoint(grad: Jet, out: Jet, needs: tuple, x: Jet) -> tuple[Jet]:
    return (move(grad, lambda g, _: torch.view_as_real(g.resolve_conj())),)


@rule("real")
def real(x: Jet) -> Jet:
    """The real part."""
    return move(x, lambda t, _: t.real)


@adjoint("real")
def _real_adjoint(grad: Jet, out: Jet, needs: tuple, x: Jet) -> tuple[Jet]:
    # The tape casts it.
    return (grad,)


@rule("imag")
def imag(x: Jet) -> Jet:
    """The imaginary part."""
    return move(x, lambda t, _: t.imag)


@adjoint("imag")
def _imag_adjoint(grad: Jet, out: Jet, needs: tuple, x: Jet) -> tuple[Jet]:
    return (move(grad, lambda g, _: g * 1j),)


_CONJUGATES = "conj", "_conj", "conj_physical", "_conj_physical"


@rule(*_CONJUGATES)
def conjugate(x: Jet) -> Jet:
    """Linear over the real numbers, and its own adjoint."""
    return move(x, lambda t, _: t.conj())


@adjoint(*_CONJUGATES)
def _conjugate_adjoint(grad: Jet, out: Jet, needs: tuple, x: Jet) -> tuple[Jet]:
    return (move(grad, lambda g, _: g.conj()),)


@rule("matrix_H", "mH", "adjoint", composed=True)
def conjugate_transpose(x: Jet) -> Jet:
    """Exchange the last two axes and take the conjugate."""
    return conjugate(transpose(x, -1, -2))


@rule("complex", several=True)
def complex_(a: Any, b: Any) -> Jet:
    """A + ib."""
    return combine(torch.complex(primal_of(a), primal_of(b)), (a, 1), (b, 1j))


@adjoint("complex", covers=always)
def _complex_adjoint(grad: Jet, out: Jet, needs: tuple, a: Any, b: Any):
    return pull_product(grad, a, 1, None), pull_product(grad, b, 1j, None)


def _unit(angle: Tensor) -> Tensor:
    return torch.polar(torch.ones_like(angle), angle)


@rule("polar", several=True)
def polar(a: Any, b: Any) -> Jet:
    """A e^(ib)."""
    # PyTorch's own derivative by a modulus is wrong where that is negative.
    unit = _unit(primal_of(b))
    primal = primal_of(a) * unit
    return combine(primal, (a, unit), (b, lambda: 1j * primal))


@adjoint("polar", covers=always)
def _polar_adjoint(grad: Jet, out: Jet, needs: tuple, a: Any, b: Any):
    unit = _unit(primal_of(b))
    moved_a, moved_b = aligned_tangent(a, out), aligned_tangent(b, out)
    bend_a = None if moved_b is None else 1j * unit * moved_b
    bend_b = None if moved_a is None else 1j * unit * moved_a
    if moved_b is not None:
        twice = -out.primal * moved_b
        bend_b = twice if bend_b is None else bend_b + twice
    return pull_product(grad, a, unit, bend_a), pull_product(grad, b, 1j * out.primal, bend_b)


@rule("fastsfvae.modulus")
def modulus(x: Jet) -> Jet:
    """D |x| = re(conj(s) dx) with s = x / |x|, 0 at 0."""
    tangent = (torch.sgn(x.primal).conj() * x.tangent).real
    return broadcast_jet(x.primal.abs(), tangent)


@adjoint("fastsfvae.modulus")
def _modulus_adjoint(grad: Jet, out: Jet, needs: tuple, x: Jet) -> tuple[Jet]:
    s, size = torch.sgn(x.primal), out.primal
    inverse = torch.where(size == 0, 0.0, 1 / size)
    # The direction of a tangent along s is turned, not changed in length.
    bend = (grad.tangent * (x.tangent - s * out.tangent)).sum(0) * inverse
    return (Jet(grad.primal * s + bend, grad.tangent * s),)


@rule("angle", composed=True)
def angle(x: Jet) -> Jet:
    """Of the number in the plane; that of a real value is constant but for its sign."""
    if x.primal.is_complex():
        return atan2(imag(x), real(x))
    return add(zero(x), torch.angle(x.primal))


@rule("sgn", composed=True)
def sgn(x: Jet) -> Jet:
    """X / |x|, 0 at 0."""
    if not x.primal.is_complex():
        return add(zero(x), torch.sgn(x.primal))
    size = modulus(x)
    nothing = size.primal == 0
    return masked_fill(div(x, masked_fill(size, nothing, 1.0)), nothing, 0.0)


@rule("resolve_conj", "resolve_neg", composed=True)
def resolved(x: Jet) -> Jet:
    """The same values, written out."""
    return x


def _also_complex(name: str, function: Callable[..., Any]) -> None:
    """Give complex values a rule of their own, composed of others, where there is a real one."""
    of_real = RULES[name]
    on_real = bind(of_real)

    def forward(x: Any, *args: Any, **kwargs: Any) -> Any:
        run = function if primal_of(x).is_complex() else on_real
        return run(x, *args, **kwargs)

    RULES[name] = Rule(name, forward, several=of_real.several, composed=True, covers=of_real.covers)


def _variance(x: Jet, *args: Any, **kwargs: Any) -> Jet:
    """The mean of |x - mean|^2: both parts' variances."""
    return add(var(real(x), *args, **kwargs), var(imag(x), *args, **kwargs))


def _deviation(x: Jet, *args: Any, **kwargs: Any) -> Jet:
    return power(_variance(x, *args, **kwargs), 0.5)


def _with_mean(moment: Callable[..., Jet]) -> Callable[..., tuple[Jet, Jet]]:
    def both(
        x: Jet, dim: Any = None, unbiased: Any = None, keepdim: bool = False, **kwargs: Any
    ) -> tuple[Jet, Jet]:
        centre = mean(x, None if isinstance(dim, bool) else dim, keepdim)
        return moment(x, dim, unbiased, keepdim, **kwargs), centre

    return both


def _vector_norm(
    x: Jet, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Jet:
    """That of the moduli; of order 2, where a modulus may be 0, that of all parts."""
    if dtype is not None:
        x = convert(x, dtype)
    if ord not in (None, 2):
        return norm(modulus(x), ord, dim, keepdim)
    ndim = x.primal.ndim
    dims = range(ndim) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
    axes = [front(d, ndim) for d in dims]
    size = norm(view_as_real(x), 2, [*axes, ndim], keepdim)
    return squeeze(size, -1) if keepdim else size


for _name, _function in {
    "abs": modulus,
    "absolute": modulus,
    "var": _variance,
    "std": _deviation,
    "var_mean": _with_mean(_variance),
    "std_mean": _with_mean(_deviation),
    "linalg_vector_norm": _vector_norm,
}.items():
    _also_complex(_name, _function)
